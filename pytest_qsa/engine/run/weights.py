"""Weights as sites: [out, in], dequantized where a module keeps them quantized. No forward is needed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...captures import STORED, Site, SiteNumbers, Statistic
from ...common import InfraError
from ..formats.format import dequantized
from ..formats.stored import StoredWeights
from ..reduce.observer import StreamObserver


def observe_weights(
    modules: Mapping[str, nn.Module],
    wanted: Mapping[tuple[str, Site], frozenset[Statistic]],
    stored: StoredWeights | None = None,
) -> dict[tuple[str, Site], SiteNumbers]:
    """Reduce the weight of each wanted layer that owns one; the output channels stand where tokens do.

    `stored`: what the checkpoint's files hold, for layers that are compared with that.
    """
    found: dict[tuple[str, Site], SiteNumbers] = {}
    for (layer, site), statistics in wanted.items():
        with torch.no_grad(), align_module_device(modules[layer]):
            numbers = _reduced(layer, modules[layer], statistics) if statistics - {STORED} else None
            powers = stored.powers(layer, modules[layer]) if stored and STORED in statistics else None
        if powers is not None:
            numbers = (numbers or _nothing(statistics)).having((), {"stored": powers})
        if numbers is not None:
            found[layer, site] = numbers
    return found


def _reduced(layer: str, module: nn.Module, statistics: frozenset[Statistic]) -> SiteNumbers | None:
    weight = _dequantized(layer, module)
    if weight is None:
        return None
    observer = StreamObserver(statistics)
    matrix = weight.dim() >= 2
    observer.add(weight.flatten(1)[None] if matrix else weight[None], [None], [0], 0, token_axis=matrix)
    return observer.numbers(statistics)


def _nothing(statistics: frozenset[Statistic]) -> SiteNumbers:
    """Return the numbers of one weight of which nothing was reduced."""
    zero = np.zeros(1, dtype=np.int32)
    return SiteNumbers("", (), False, statistics, zero, zero, np.zeros(1, dtype=np.int64))


def _dequantized(layer: str, module: nn.Module) -> Tensor | None:
    try:
        return dequantized(module)
    except InfraError as error:
        raise InfraError(f"{layer}: {error}") from None

"""Weights as sites: [out, in], dequantized where a module keeps them quantized. No forward is needed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import InfraError
from ..numbers import SiteNumbers
from ..plan import Site
from .dequantized import dequantized
from .observers import StreamObserver


def observe_weights(
    modules: Mapping[str, nn.Module], wanted: Mapping[tuple[str, Site], frozenset[str]]
) -> dict[tuple[str, Site], SiteNumbers]:
    """Reduce the weight of each wanted layer that owns one; the output channels stand where tokens do."""
    found: dict[tuple[str, Site], SiteNumbers] = {}
    for (layer, site), statistics in wanted.items():
        with torch.no_grad(), align_module_device(modules[layer]):
            weight = _dequantized(layer, modules[layer])
            if weight is None:
                continue
            observer = StreamObserver(statistics)
            matrix = weight.dim() >= 2
            observer.add(weight.flatten(1)[None] if matrix else weight[None], [None], [0], 0, token_axis=matrix)
            found[layer, site] = observer.numbers(statistics)
    return found


def _dequantized(layer: str, module: nn.Module) -> Tensor | None:
    try:
        return dequantized(module)
    except InfraError as error:
        raise InfraError(f"{layer}: {error}") from None

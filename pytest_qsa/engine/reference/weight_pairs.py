"""The weights of two models, layer by layer: dequantized, and the powers of their difference in each output channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...captures import ERROR, SiteKey, SiteNumbers
from ...common import InfraError
from ..formats.format import dequantized
from ..reduce.pairs import powers_of
from ..stream.stream import Stream


def weighed(
    sites: Sequence[SiteKey],
    modules: tuple[Mapping[str, nn.Module], Mapping[str, nn.Module]],
    streams: tuple[Stream | None, Stream | None],
    numbers: Mapping[SiteKey, SiteNumbers],
) -> dict[SiteKey, SiteNumbers]:
    """Compare the weights at some sites, of the reference (first of each pair) and of the subject.

    A layer that owns no weight has no numbers.

    Raises:
        InfraError: two weights have different shapes.
    """
    found: dict[SiteKey, SiteNumbers] = {}
    for site in sites:
        pair = [_weight(side[site[0]], stream) for side, stream in zip(modules, streams, strict=True)]
        reference, own = pair
        if own is None or reference is None:
            continue
        if reference.shape != own.shape:
            theirs, ours = ("×".join(map(str, tensor.shape)) for tensor in (reference, own))
            raise InfraError(f"the weight of {site[0]} is {ours} here and {theirs} in the reference")
        found[site] = _numbers(reference, own, numbers.get(site))
    return found


def _weight(module: nn.Module, stream: Stream | None) -> Tensor | None:
    if stream is not None:
        stream.enter_module(module)
    with torch.no_grad(), align_module_device(module):
        return dequantized(module)


def _numbers(reference: Tensor, own: Tensor, known: SiteNumbers | None) -> SiteNumbers:
    matrix = own.dim() >= 2
    x, y = (tensor.flatten(1) if matrix else tensor[None] for tensor in (reference, own))
    powers = powers_of(x, y, None).cpu().numpy()
    if known is None:
        nothing = np.zeros(1, dtype=np.int32)
        dtype, lengths = str(own.dtype).removeprefix("torch."), np.array([len(y) if matrix else 0], dtype=np.int64)
        known = SiteNumbers(dtype, tuple(y.shape), matrix, frozenset(), nothing, nothing, lengths)
    return known.having({ERROR}, {"error": powers})

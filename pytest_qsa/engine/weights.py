"""Weights as sites: [out, in], dequantized where a module keeps them packed. No forward is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..numbers import SiteNumbers
from ..plan import Site
from .observers import StreamObserver


def packed(modules: Mapping[str, nn.Module], wanted: Iterable[tuple[str, Site]]) -> bool:
    """Say whether a wanted weight is still packed: compressed-tensors unpacks at the first forward."""
    weights = [getattr(modules[layer], "weight", None) for layer, _ in wanted]
    quantized = any(isinstance(weight, Tensor) and not weight.is_floating_point() for weight in weights)
    return quantized or any(hasattr(modules[layer], "weight_packed") for layer, _ in wanted)


def observe_weights(
    modules: Mapping[str, nn.Module], wanted: Mapping[tuple[str, Site], frozenset[str]]
) -> dict[tuple[str, Site], SiteNumbers]:
    """Reduce the weight of each wanted layer that owns one; the output channels stand where tokens do."""
    found: dict[tuple[str, Site], SiteNumbers] = {}
    for (layer, site), statistics in wanted.items():
        with torch.no_grad(), align_module_device(modules[layer]):
            weight = weight_of(modules[layer])
            if weight is None:
                continue
            observer = StreamObserver(statistics)
            matrix = weight.dim() >= 2
            observer.add(weight.flatten(1)[None] if matrix else weight[None], [None], [0], 0, token_axis=matrix)
            found[layer, site] = observer.numbers(statistics)
    return found


def weight_of(module: nn.Module) -> Tensor | None:
    """Return a module's own weight as a plain floating-point tensor; None where it has none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
        weight = weight.dequantize()
    return weight.detach() if weight.is_floating_point() else None

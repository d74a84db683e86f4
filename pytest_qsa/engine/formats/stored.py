"""What the files of a checkpoint hold, by the quantizer's own library, against what the loader made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...checkpoint import Files
from ...common import AnomalyError, InfraError
from ..modules import packed_experts
from .format import dequantized, engine_format_of

ELEMENTS_AT_ONCE = 1 << 24
"""The number of elements that are compared at a time."""
EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
"""The tensors of packed experts → the projections of one expert in the files, one below the other."""


class StoredWeights:
    """The quantized layers of the files, unpacked one at a time, and the modules that they were loaded into.

    `unmatched`: layers that the files hold quantized and the model has no weight of its own for.
    """

    def __init__(self, files: Files, modules: Mapping[str, nn.Module]) -> None:
        self._stored = files.format
        self._engine = engine_format_of(files.format)
        quantized = set(files.stored_quantized)
        self._layers: dict[str, str] = {}
        self._experts: set[str] = set()
        found: set[str] = set()
        for name, layer in self._stored.layers_of(modules).items():
            packed = packed_experts(modules[name]) > 0
            inside = {other for other in quantized if other.startswith(f"{name}.")} if packed else set()
            if layer in quantized:
                self._layers[name] = layer
                found.add(layer)
            elif inside:
                self._experts.add(name)
                found |= inside
        self.unmatched = sorted(quantized - found)

    def powers(self, name: str, module: nn.Module) -> NDArray[np.float64] | None:
        """Return Σw₀², Σ(w − w₀)², Σw·w₀ and Σw² of a module; None where the files don't hold it quantized.

        Raises:
            AnomalyError: the tensors of the files contradict one another.
            InfraError: the module keeps its weight in a format that isn't known, or in another shape.
        """
        if name in self._layers:
            weight = dequantized(module)
            return None if weight is None else _powers(name, weight, self._weight(self._layers[name]))
        if name not in self._experts:
            return None
        # A layer has one number: of its experts, the one that differs most stands for all.
        worst = np.zeros(4)
        for parameter, projections in EXPERT_PARTS.items():
            packed = getattr(module, parameter, None)
            weights: Sequence[Tensor] = list(packed) if isinstance(packed, Tensor) else []
            for index, weight in enumerate(weights):
                if f"{name}.{parameter}" in self._stored.folder.layers:
                    stored = self._packed_expert(f"{name}.{parameter}", index, len(weights))
                else:
                    stored = torch.cat([self._weight(self._expert(name, index, names)) for names in projections])
                found = _powers(f"{name}.{parameter}[{index}]", weight.detach(), stored)
                worst = max(worst, found, key=lambda powers: powers[1] / powers[0] if powers[0] else powers[1])
        return worst

    def _packed_expert(self, layer: str, index: int, experts: int) -> Tensor:
        """Return one expert of a tensor [experts · out, in] as models hold it whose files pack experts: [in, out]."""
        shape = self._stored.weight_shape(layer)
        count = shape[0] // experts if shape else 0
        rows = self._stored.rows(layer, slice(index * count, (index + 1) * count))
        if rows is None:
            raise InfraError(f"{layer} can't be unpacked: {self._stored.refusal(layer)}")
        return torch.from_numpy(rows).T

    def _expert(self, name: str, index: int, names: Sequence[str]) -> str:
        for projection in names:
            if self._stored.parts(layer := f"{name}.{index}.{projection}"):
                return layer
        raise InfraError(f"the files hold no {names[0]} of {name}.{index}, so that the loader can't be checked there")

    def _weight(self, layer: str) -> Tensor:
        """Unpack a layer of the files, and say whose fault it is where that fails."""
        unpacking = f"{layer} can't be unpacked from {self._stored.folder.path}"
        try:
            with torch.no_grad():
                weight = self._engine.stored_weight(self._stored, layer)
        except ImportError as error:
            needed = " ".join(self._stored.libraries)
            raise InfraError(f"{unpacking}: {error}; pip install {needed}".rstrip()) from error
        except torch.OutOfMemoryError:  # a RuntimeError too, which the pass reports as what it is
            raise
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            if finding := next(self._stored.findings(layer), None):
                raise AnomalyError(f"{unpacking}: {finding}") from error
            raise InfraError(f"{unpacking}: {type(error).__name__}: {error}") from error
        if weight is None:
            raise InfraError(f"{unpacking}: {self._stored.refusal(layer)}")
        return weight


def _powers(name: str, weight: Tensor, stored: Tensor) -> NDArray[np.float64]:
    if weight.shape != stored.shape and weight.shape == stored.T.shape:
        stored = stored.T
    if weight.shape != stored.shape:
        ours, theirs = ("×".join(map(str, tensor.shape)) for tensor in (weight, stored))
        raise InfraError(f"the weight of {name} is {ours} in the loaded model and {theirs} in the file")
    stored = stored.to(device=weight.device, dtype=weight.dtype)  # as the loader casts it
    total = torch.zeros(4, dtype=torch.float64)
    # float64 takes four times the memory of bfloat16, so that only a part is widened at a time.
    step = max(1, ELEMENTS_AT_ONCE // max(1, weight[0].numel()))
    for start in range(0, len(weight), step):
        w, w0 = weight[start : start + step].double(), stored[start : start + step].double()
        sums = [w0.square().sum(), (w - w0).square().sum(), (w * w0).sum(), w.square().sum()]
        total += torch.stack(sums).cpu()
    return total.numpy()

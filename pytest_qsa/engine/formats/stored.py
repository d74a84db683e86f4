"""What the files of a checkpoint hold, by the quantizer's own library, against what the loader made of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checkpoint import Files
from ...common import AnomalyError, InfraError
from ..modules import Expert, Layer
from .format import dequantized, engine_format_of

ELEMENTS_AT_ONCE = 1 << 24
"""The number of elements that are compared at a time."""


class StoredWeights:
    """The quantized layers of the files, unpacked one at a time, and the modules that they were loaded into.

    `unmatched`: layers that the files hold quantized and the model has no weight of its own for.
    """

    def __init__(self, files: Files, layers: Mapping[str, Layer]) -> None:
        self._stored = files.format
        self._engine = engine_format_of(files.format)
        quantized = set(files.stored_quantized)
        self._layers: dict[str, str] = {}
        self._experts: dict[str, list[tuple[str, Expert]]] = {}
        self._known: dict[str, NDArray[np.float64] | None] = {}
        found: set[str] = set()
        for name, stored in self._stored.layers_of(layers).items():
            layer = layers[name]
            # Packed experts have one quantized tensor together, of which each has its rows.
            module, _, place = self._stored.experts.get(stored, (stored, 0, None))
            holder = f"{module}.{place.tensor}" if place else stored
            if holder in quantized:
                self._layers[name] = stored
                found.add(holder)
                if isinstance(layer, Expert):
                    self._experts.setdefault(layer.holder, []).append((name, layer))
        self.unmatched = sorted(quantized - found)

    def powers(self, name: str, module: Layer) -> NDArray[np.float64] | None:
        """Return Σw₀², Σ(w − w₀)², Σw·w₀ and Σw² of a module; None where the files don't hold it quantized.

        Raises:
            AnomalyError: the tensors of the files contradict one another.
            InfraError: the module keeps its weight in a format that isn't known, or in another shape.
        """
        if name not in self._known:
            self._known[name] = self._powers(name, module)
        return self._known[name]

    def _powers(self, name: str, module: Layer) -> NDArray[np.float64] | None:
        if name in self._layers:
            weight = dequantized(module)
            return None if weight is None else _powers(name, weight, self._weight(self._layers[name]))
        # A module of packed experts has a number as well: the expert that differs most stands for all.
        found = [self.powers(*expert) for expert in self._experts.get(name, ())]
        known = [powers for powers in found if powers is not None]
        return max(known, key=lambda powers: powers[1] / powers[0] if powers[0] else powers[1], default=None)

    def _weight(self, layer: str) -> Tensor:
        """Unpack a layer of the files, and say whose fault it is where that fails."""
        unpacking = f"{layer} can't be unpacked from {self._stored.folder.path}"
        try:
            with torch.no_grad():
                weight = self._adapted(layer, self._engine.stored_weight(self._stored, layer))
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

    def _adapted(self, layer: str, weight: Tensor | None) -> Tensor | None:
        """Return a layer's weight of the files with its adapter, as the loaded layer has it."""
        if weight is None or self._stored.adapter is None:
            return weight
        rows = self._stored.adapted(layer, slice(None), weight.double().numpy())
        return None if rows is None else torch.from_numpy(rows)


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

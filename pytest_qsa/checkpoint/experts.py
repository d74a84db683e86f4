"""Experts that lie packed in tensors [experts, …]: which part of a tensor is the weight of which expert's layer.

Each has the name that a file with a tensor for each expert gives it: `model.layers.0.mlp.experts.3.down_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

_Matrix = TypeVar("_Matrix", bound=Any)

PACKED = {"gate_up_proj": ("gate_proj", "up_proj")} | {name: (name,) for name in ("gate_proj", "up_proj", "down_proj")}
"""The names of packed tensors → the layers of an expert that each holds."""
INTERLEAVED = ("gpt_oss",)
"""The `model_type` of models whose rows of gate and up alternate (transformers: `is_concatenated=False`)."""
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
EXPERT = re.compile(rf"\.\d+\.({'|'.join(sorted({layer for layers in PACKED.values() for layer in layers}))})$")
"""Matches the end of the name of an expert's layer."""


def as_loaded(name: str) -> str:
    """Return the name that transformers gives a layer of Mixtral's kind of files: `mlp.experts.3.gate_proj` for w1."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"(?<=\.)w[123]$", lambda end: _MIXTRAL[end[0]], name) if ".experts." in name else name


@dataclass(frozen=True)
class ExpertLayer:
    """Where a packed tensor holds one layer of each expert. `tensor`: its name; `rows`: the layer's outputs in it.

    `transposed`: the tensor is [experts, in, out], as for a product x · W.
    """

    tensor: str
    rows: slice
    transposed: bool

    def of(self, expert: _Matrix) -> _Matrix:
        """Return the layer's weight [out, in], a view, from one expert's part of the tensor, of any library."""
        weight: _Matrix = (expert.T if self.transposed else expert)[self.rows]
        return weight


def expert_layers(shapes: Mapping[str, tuple[int, ...]], *, interleaved: bool) -> dict[str, ExpertLayer]:
    """Return the layers that each expert has, by name; none where the shapes are not those of packed experts.

    The shapes alone tell [experts, out, in] from [experts, in, out]: `down_proj` returns what the others take.

    Args:
        shapes: name of a tensor → its shape, [experts, …].
        interleaved: the outputs of gate and up alternate, where they share a tensor; else gate comes first.
    """
    down, up = shapes.get("down_proj"), next((shapes[name] for name in PACKED if name in shapes), None)
    if down is None or up is None or len(down) != 3 or len(up) != 3:
        return {}
    share = 2 if "gate_up_proj" in shapes else 1
    if up[1:] == (share * down[2], down[1]):
        transposed = False
    elif up[1:] == (down[2], share * down[1]):
        transposed = True
    else:
        return {}
    found = {}
    for tensor, layers in PACKED.items():
        for index, layer in enumerate(layers if tensor in shapes else ()):
            outputs = shapes[tensor][2 if transposed else 1] // len(layers)
            rows = slice(index * outputs, (index + 1) * outputs)
            if interleaved and len(layers) > 1:
                rows = slice(index, None, len(layers))
            found[layer] = ExpertLayer(tensor, rows, transposed)
    return found

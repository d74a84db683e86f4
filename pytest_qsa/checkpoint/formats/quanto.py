"""optimum-quanto as its own saver writes it: the parts of a weight under its name, and a map of the layers' types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..folder import Folder, Settings
from ..tensors import EIGHT_BITS, FLOATS, Matrix, Tensor, cast_to, decoded
from .format import BUDGET, Format
from .hqq import folded_codes, packed_again
from .scheme import Declaration, LayerScheme

MAP = "quanto_qmap.json"
BITS = {"qint2": 2, "qint4": 4, "qint8": 8}
GROUPS = (128, 96, 64, 32)
"""The columns that can share a scale; where none of them divides a row, a scale is the row's."""
READS_STREAM = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3", "qkv_proj", "gate_up_proj"})
WRITES_STREAM = frozenset({"o_proj", "down_proj", "w2"})


class Quanto(Format):
    """`weight._data` × `weight._scale` in 8 bits, else `weight._data._data` × `weight._scale` − `weight._shift`.

    The layout is that of optimum-quanto 0.2.7. Groups of codes lie below one another, and the file doesn't say how many
    make a row: the hidden size does, of which every layer that reads or writes the residual stream has one a row.
    """

    name = "quanto"
    libraries = ("optimum-quanto",)
    loads = False
    codes = ("weight._data._data", "weight._data", "weight")
    scales = re.compile(r"^(weight\._scale|(input|output)_scale)$")
    zero_points = re.compile(r"^weight\._shift$")

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize it by its map, for its own saver leaves config.json as it was."""
        if folder.gguf_file or folder.quantization:
            return super().declared_in(folder)
        return folder.json(MAP) is not None

    @cached_property
    def _map(self) -> Mapping[str, LayerScheme]:
        stated: Settings = self.folder.json(MAP) or {}
        return {layer: _scheme(types) for layer, types in stated.items() if isinstance(types, dict)}

    @cached_property
    def declaration(self) -> Declaration:
        """What the map says of each layer."""
        return Declaration([([layer], scheme) for layer, scheme in self._map.items()], names_layers=bool(self._map))

    def scheme_of(self, layer: str) -> LayerScheme | None:
        """Return what the map says of a layer."""
        return self._map.get(layer)

    def scales_of(self, layer: str) -> dict[str, Tensor]:
        """Return the scales of a layer; those of inputs and outputs only where they are quantized, else they are 1."""
        found, scheme = super().scales_of(layer), self.scheme_of(layer)
        rounds = scheme is not None and scheme.form.endswith("inputs")
        return found if rounds else {part: scale for part, scale in found.items() if part == "weight._scale"}

    def weight_scale_of(self, layer: str) -> Tensor | None:
        """Return the scales of a layer's weight."""
        return self.parts(layer).get("weight._scale")

    def code_bits(self, layer: str, codes: Tensor) -> int:
        """Return the bits of the type that the map states."""
        scheme = self.scheme_of(layer)
        return scheme.bits if scheme is not None else 8

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return the code of zero; with shifts it is another in every group."""
        return super().zero_codes(layer, codes) if codes.dtype in EIGHT_BITS else (0,)

    def zero_point_range(self, layer: str) -> tuple[int, int] | None:
        """Return None: a shift is a weight, not a code."""
        return None

    def zero_point_step(self, layer: str) -> Matrix | float:
        """Return the scales, by which a zero point is multiplied before it is stored as a shift."""
        scale, shift = self.weight_scale_of(layer), self.zero_point_of(layer)
        return scale.values() if scale is not None and shift is not None and shift.dtype in FLOATS else 1.0

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in] of a layer's weight; None where neither its groups nor the hidden size say it."""
        codes, scale = self.codes_of(layer), self.weight_scale_of(layer)
        if codes is None or codes.part != "weight._data._data":
            return super().weight_shape(layer)
        if scale is None or len(codes.shape) != 2 or len(scale.shape) != 2:
            return None
        groups, size = scale.shape[0], codes.shape[1]
        if size not in GROUPS:
            return groups, size
        hidden, kind = self.folder.text_config.get("hidden_size"), layer.rpartition(".")[2]
        if not isinstance(hidden, int) or hidden < 1:
            return None
        rows = groups * size // hidden if kind in READS_STREAM else hidden if kind in WRITES_STREAM else 0
        return (rows, groups * size // rows) if rows and groups % rows == 0 else None

    def words(self, layer: str, codes: Tensor) -> tuple[NDArray[np.generic], int]:
        """Return codes of outputs, several a byte as in the file, though there they are of several groups."""
        shape, bits = self.weight_shape(layer), self.code_bits(layer, codes)
        if codes.part != "weight._data._data" or shape is None or bits == 8:
            return super().words(layer, codes)
        step = max(1, shape[0] * shape[1] // BUDGET)
        raw = np.asarray(codes.raw())
        return packed_again(
            folded_codes(raw, shape, slice(None, None, step), bits, axis=1, high_first=False)[0], bits
        ), step

    def unread(self, layer: str) -> str:
        """Say what is missing: the map's word of a layer, or how many groups make a row."""
        if self.scheme_of(layer) is None:
            return f"{MAP} doesn't name it"
        return "nothing says how many of its groups make a row: it neither reads nor writes the residual stream"

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Multiply codes by the scales of their groups and subtract shifts, rounding as the library does."""
        shape, scale, shift = self.weight_shape(layer), self.weight_scale_of(layer), self.zero_point_of(layer)
        scheme = self.scheme_of(layer)
        if scheme is None or shape is None or codes.part == "weight":
            return None
        if lost := [choice[0] for choice in scheme.required if choice[0] not in self.parts(layer)]:
            raise ValueError(f"{lost[0]} is missing")
        assert scale is not None
        raw, scales = np.asarray(codes.raw()), scale.values().ravel()
        if codes.part == "weight._data":
            values = decoded(raw[rows], codes.dtype).astype(np.float64)
            return cast_to(values * (scales[rows, None] if scales.size > 1 else scales), scale.dtype)
        numbers, groups = folded_codes(raw, shape, rows, scheme.bits, axis=1, high_first=False)
        assert shift is not None
        shifts = shift.values().ravel()[groups]
        if shift.dtype == "I8":  # a zero point, of which the codes are freed before they are scaled
            return cast_to((numbers - shifts) * scales[groups], scale.dtype)
        return cast_to(cast_to(numbers * scales[groups], scale.dtype) - shifts, scale.dtype)


def _scheme(types: Settings) -> LayerScheme:
    """Return the scheme of a layer by its types, `{"weights": "qint4", "activations": "none"}`."""
    kind, inputs = str(types.get("weights")), str(types.get("activations") or "none")
    bits = BITS.get(kind, 8)
    parts = ("weight._data",) if bits == 8 else ("weight._data._data", "weight._shift")
    form = kind if inputs == "none" else f"{kind} with {inputs} inputs"
    dtypes = ("U8",) if bits < 8 else ("I8",) if kind == "qint8" else EIGHT_BITS
    required = tuple((part,) for part in (*parts, "weight._scale"))
    return LayerScheme(form, bits, "any", None, required, frozenset({"bias", "input_scale", "output_scale"}), dtypes)

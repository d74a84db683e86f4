"""MXFP4 as gpt-oss is released: all experts of a block in one tensor of 4-bit floats, an exponent for 32 of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from ...captures import Array
from ..experts import ExpertLayer
from ..folder import Finding
from ..tensors import Matrix, Tensor, decoded, scale_values
from .format import AGAIN, Format
from .scheme import Declaration, LayerScheme, ScaleGroups

GROUP = 32


class Mxfp4(Format):
    """w = E2M1(`X_blocks` [experts, out, in / 32, 16]) · 2^(`X_scales` [experts, out, in / 32] − 127).

    Rows of a layer are those of its experts, one below the other. OCP Microscaling Formats 1.0.
    """

    name = "mxfp4"
    libraries = ("kernels", "triton")
    gpu_only = True
    codes = ("blocks",)
    scales = re.compile("^scales$")

    @cached_property
    def declaration(self) -> Declaration:
        """The packed experts; what the configuration leaves out it names by patterns of its own."""
        scheme = LayerScheme(self.name, 4, "group", GROUP, (("blocks",), ("scales",)), frozenset(), ("U8",))
        return Declaration([([r"re:.*\.(gate_up|down)_proj$"], scheme)])

    def scales_of(self, layer: str) -> dict[str, Tensor]:
        """Return the exponents of a layer's groups."""
        return {part: tensor for part, tensor in self.parts(layer).items() if part == "scales"}

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [experts · out, in]; None where the blocks aren't 16 bytes for 32 weights."""
        codes = self.codes_of(layer)
        if codes is None or len(codes.shape) != 4 or codes.shape[-1] * 2 != GROUP:
            return None
        experts, out, groups, _ = codes.shape
        return experts * out, groups * GROUP

    def scale_groups(self, layer: str, shape: tuple[int, int]) -> ScaleGroups:
        """Return the groups of packed experts as well, which have their scales together."""
        return ScaleGroups(1, GROUP) if layer in self.experts else super().scale_groups(layer, shape)

    def packed_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield also the quantized ones, [experts, out, in]."""
        yield from super().packed_tensors()
        for layer in self.folder.layers:
            shape, codes = self.weight_shape(layer), self.codes_of(layer)
            if shape and codes:
                yield layer, (codes.shape[0], codes.shape[1], shape[1])

    def expert_rows(self, tensor: str, index: int, place: ExpertLayer, rows: slice) -> Matrix | None:
        """Return rows of an expert's layer, which lie among those of all experts."""
        codes = self.codes_of(tensor)
        if codes is None:
            return super().expert_rows(tensor, index, place, rows)
        outputs = codes.shape[1]
        among = range(index * outputs, (index + 1) * outputs)[place.rows][rows]
        return self.stored_rows(tensor, slice(among.start, among.stop, among.step))

    def by_output(self, layer: str, raw: Array) -> Array:
        """Return the bytes of every output of every expert in a row."""
        return raw.reshape(-1, raw.shape[-1] * raw.shape[-2]) if raw.ndim == 4 else super().by_output(layer, raw)

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix:
        """Multiply codes by the power of two of their group; rows [rows of all experts, in]."""
        shape, scale = self.weight_shape(layer), self.parts(layer).get("scales")
        if shape is None or scale is None:
            raise ValueError("its scales are missing" if shape else f"its blocks are {list(codes.shape)}")
        powers = scale_values(scale).reshape(shape[0], -1)[rows]
        values = decoded(np.asarray(self.by_output(layer, codes.raw())[rows]), "F4")
        return values.astype(np.float64) * np.repeat(powers, GROUP, axis=1)

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield also blocks of another shape, and scales without blocks."""
        yield from super().findings(layer)
        codes, scale = self.codes_of(layer), self.parts(layer).get("scales")
        if codes is None:
            if scale is not None:
                yield Finding.at(scale, "its blocks are missing: nothing would be multiplied by it", AGAIN)
        elif self.weight_shape(layer) is None:
            size = "×".join(map(str, codes.shape))
            yield Finding.at(codes, f"shape {size}, but MXFP4 is [experts, out, in / 32, 16]", AGAIN)

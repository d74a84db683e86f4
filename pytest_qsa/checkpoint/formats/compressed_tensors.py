"""compressed-tensors: the files of llm-compressor, in 8 bits or packed, with integers or floats."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from ..folder import Folder
from ..tensors import EIGHT_BITS, Tensor, decoded
from .format import Format, Matrix, decoded_rows, spread, spread_scales
from .scheme import Declaration, LayerScheme, block_of

FLOAT4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
PACKED_DTYPES = {"pack-quantized": "I32", **dict.fromkeys(FLOAT4, "U8")}
OPTIONAL = frozenset(
    {"weight_zero_point", "weight_g_idx", "input_zero_point", "input_global_scale", "output_scale", "bias"}
)


class CompressedTensors(Format):
    """Codes in `weight`, or in `weight_packed` with several a word, times `weight_scale`."""

    name = "compressed-tensors"
    libraries = ("compressed-tensors",)
    streams = True
    codes = ("weight_packed", "weight")

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize it by its config groups too, for old files name no quant_method."""
        method = folder.quantization.get("quant_method")
        return method == cls.name or (not method and "config_groups" in folder.quantization)

    @cached_property
    def declaration(self) -> Declaration:
        """What the config groups declare for their targets."""
        config = self.folder.quantization
        groups = [
            (list(group.get("targets") or ()), _scheme(group, config))
            for group in (config.get("config_groups") or {}).values()
            if isinstance(group, dict) and group.get("weights")
        ]
        return Declaration(groups, list(config.get("ignore") or ()), names_layers=True)

    def code_bits(self, layer: str, codes: Tensor) -> int:
        """Return the bits of the scheme where codes are packed; else a code has a byte of its own."""
        scheme = self.scheme_of(layer)
        packed = scheme is not None and codes.part == "weight_packed"
        return scheme.bits if scheme is not None and packed else super().code_bits(layer, codes)

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return the shape that `weight_shape` states, or that of the unpacked codes."""
        codes = self.codes_of(layer)
        if codes is None or codes.part != "weight_packed" or len(codes.shape) != 2:
            return super().weight_shape(layer)
        if stated := self.parts(layer).get("weight_shape"):
            sizes = [int(length) for length in stated.values().ravel()]
            return (sizes[0], sizes[1]) if len(sizes) == 2 else None
        rows, words = codes.shape
        return rows, words * (8 if codes.dtype == "U8" else 32) // self.code_bits(layer, codes)

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return the middle of the range for packed integers, which are stored with half of it added."""
        if codes.part == "weight_packed" and codes.dtype != "U8":
            return (1 << (self.code_bits(layer, codes) - 1),)
        return super().zero_codes(layer, codes)

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Multiply codes by scales: 8 bits, packed 4-bit floats, and packed integers with symmetric scales."""
        parts = self.parts(layer)
        scale, zero_point = parts.get("weight_scale"), parts.get("weight_zero_point")
        if scale is None:
            return None
        if codes.part == "weight_packed":
            values = self._unpacked(layer, codes, rows) if zero_point is None else None
        else:
            values = decoded_rows(codes, rows)
        if values is None:
            return None
        shape = (codes.shape[0], values.shape[1])
        if zero_point is not None:
            values = values - spread(zero_point.values(), shape, rows)
        scales = spread_scales(scale, shape, rows)
        if whole := parts.get("weight_global_scale"):
            scales /= float(whole.values().item())  # of NVFP4, by which the scales of the groups were multiplied
        return values * scales

    def _unpacked(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Unpack 4-bit floats, or words of 32 bits: the first code in the lowest bits, with half of the range added."""
        scheme = self.scheme_of(layer)
        if scheme is not None and codes.dtype == "U8" and scheme.form in FLOAT4:
            return decoded(np.asarray(codes.raw()[rows]), "F4").astype(np.float64)
        if scheme is None or codes.dtype != "I32" or 32 % scheme.bits:
            return None
        words = np.asarray(codes.raw()[rows]).view(np.uint32)
        shifts = np.arange(0, 32, scheme.bits, dtype=np.uint32)
        numbers = (words[:, :, None] >> shifts) & np.uint32((1 << scheme.bits) - 1)
        return numbers.reshape(len(words), -1).astype(np.float64) - (1 << (scheme.bits - 1))


def _scheme(group: Mapping[str, Any], config: Mapping[str, Any]) -> LayerScheme:
    weights, inputs = group["weights"], group.get("input_activations") or {}
    form = str(group.get("format") or config.get("format") or "dense")
    bits, strategy = int(weights.get("num_bits") or 8), str(weights.get("strategy") or "tensor")
    required = [("weight_packed",), ("weight_scale",)] if "pack" in form else [("weight",), ("weight_scale",)]
    if not weights.get("symmetric", True):
        required.append(("weight_zero_point",))
    if form == "pack-quantized":
        required.append(("weight_shape",))
    if strategy == "tensor_group" and form.startswith("nvfp4"):
        required.append(("weight_global_scale",))
    if weights.get("actorder") in ("group", True):
        required.append(("weight_g_idx",))
    if inputs and inputs.get("dynamic") is False:
        required.append(("input_scale",))
    size = weights.get("group_size")
    group_size = size if isinstance(size, int) and size > 0 else None
    kv_cache = {"k_scale", "v_scale", "q_scale"} if config.get("kv_cache_scheme") else set()
    return LayerScheme(
        form,
        bits,
        strategy,
        block_of(weights.get("block_structure")) or group_size,
        tuple(required),
        OPTIONAL | kv_cache,
        _dtypes(form, str(weights.get("type")), bits),
    )


def _dtypes(form: str, kind: str, bits: int) -> tuple[str, ...]:
    if form in ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized"):
        return ("I8",) if kind == "int" else EIGHT_BITS if bits == 8 else ()
    return (PACKED_DTYPES[form],) if form in PACKED_DTYPES else ()

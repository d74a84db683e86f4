"""AMD Quark: integers of 4 and 8 bits, FP8 and MXFP4, as `export_safetensors` writes them in its own layout."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ..folder import Settings
from ..tensors import Matrix, Tensor, decoded, scale_values, spread, unpacked
from .format import BUDGET, Format
from .gptq import AWQ_ORDER
from .scheme import Declaration, LayerScheme

WEIGHT_TYPES = {
    "int4": (4, "I32"),
    "uint4": (4, "I32"),
    "int8": (8, "I8"),
    "uint8": (8, "U8"),
    "fp8_e4m3": (8, "F8_E4M3"),
    "fp8_e5m2": (8, "F8_E5M2"),
    "fp4": (4, "U8"),
}
"""The types of a weight that are read → the bits of a code, and the dtype in the file."""
STRATEGIES = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group"}
SCALE = ("weight_scale", "weight_quantizer.scale")
ZERO_POINT = ("weight_zero_point", "weight_quantizer.zero_point")
INPUT_SCALE = ("input_scale", "input_quantizer.scale")
OUTPUT_SCALE = ("output_scale", "output_quantizer.scale")
_SIDES = "(weight|input|output|bias)"


class Quark(Format):
    """(`weight` − `weight_zero_point`) × `weight_scale`; older exports say `weight_quantizer.scale`.

    Integers with groups are stored transposed, [in, out], their scales [groups, out]. Eight 4-bit codes share a word,
    in AWQ's order where `pack_method` is `reorder`. The layouts are those of amd-quark 0.13.
    """

    name = "quark"
    libraries = ("amd-quark",)
    codes = ("weight",)
    scales = re.compile(rf"^{_SIDES}_(scale|quantizer\.scale)$")
    zero_points = re.compile(rf"^{_SIDES}_(zero_point|quantizer\.zero_point)$")

    @cached_property
    def _export(self) -> Settings:
        stated = self.folder.quantization.get("export")
        return stated if isinstance(stated, dict) else {}

    @cached_property
    def declaration(self) -> Declaration:
        """The settings of single layers, of a type of layer, and of all; `exclude` has names with stars."""
        config = self.folder.quantization
        if self._export.get("weight_format") == "fake_quantized":  # rounded, and stored as the floats that they were
            return Declaration()
        stated = {
            **{_pattern(name): each for name, each in (config.get("layer_quant_config") or {}).items()},
            **{name: each for name, each in (config.get("layer_type_quant_config") or {}).items() if name == "Linear"},
        }
        stated.setdefault("Linear", config.get("global_quant_config"))
        weights = {target: each.get("weight") if isinstance(each, dict) else None for target, each in stated.items()}
        cached = {_pattern(name) for name in self._cache_layers}
        groups = [
            ([target], _scheme(weight, stated[target], cached=target in cached or bool(self.cache_scales_by)))
            for target, weight in weights.items()
            if weight
        ]
        plain = [target for target, weight in weights.items() if not weight and target != "Linear"]
        return Declaration(groups, [*map(_pattern, config.get("exclude") or ()), *plain], names_layers=True)

    @cached_property
    def _cache_layers(self) -> Sequence[str]:
        """The names, with stars, of the layers whose outputs are a KV cache."""
        group = self._export.get("kv_cache_group")
        return [str(name) for name in group] if isinstance(group, list) else []

    @property
    def cache_scales_by(self) -> str:
        """What declares the scales: `kv_cache_group` names the layers whose outputs they are of.

        How these are quantized stands in `layer_quant_config`, in newer files in `kv_cache_quant_config`.
        """
        config, outputs = self.folder.quantization, []
        for part in ("layer_quant_config", "kv_cache_quant_config"):
            for name, each in (config.get(part) or {}).items():
                if isinstance(each, dict) and any(fnmatch.fnmatchcase(str(name), own) for own in self._cache_layers):
                    outputs.append(each.get("output_tensors"))
        if outputs and all(isinstance(each, dict) and each.get("is_dynamic") for each in outputs):
            return ""
        return f"kv_cache_group is {', '.join(self._cache_layers)}" if self._cache_layers else ""

    def weight_scale_of(self, layer: str) -> Tensor | None:
        """Return the scales of a layer's weight under either name."""
        return next((self.parts(layer)[part] for part in SCALE if part in self.parts(layer)), None)

    def zero_point_of(self, layer: str) -> Tensor | None:
        """Return the zero points of a layer's weight under either name."""
        return next((self.parts(layer)[part] for part in ZERO_POINT if part in self.parts(layer)), None)

    def code_bits(self, layer: str, codes: Tensor) -> int:
        """Return the bits that are declared."""
        scheme = self.scheme_of(layer)
        return scheme.bits if scheme is not None else super().code_bits(layer, codes)

    def _is_transposed(self, layer: str) -> bool:
        """Say whether a layer is stored [in, out], as Quark stores integers with groups."""
        scheme = self.scheme_of(layer)
        return scheme is not None and scheme.strategy == "group" and "int" in scheme.form

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in] of a layer's weight, unpacked."""
        shape, codes, scale = super().weight_shape(layer), self.codes_of(layer), self.weight_scale_of(layer)
        if codes is None or shape is None:
            return shape
        if self._is_transposed(layer):
            # the last word may be filled up
            return (scale.shape[-1], shape[0]) if scale is not None and len(scale.shape) == 2 else None
        return shape[0], shape[1] * {"I32": 8, "U8": 8 // self.code_bits(layer, codes)}.get(codes.dtype, 1)

    def by_output(self, layer: str, raw: Array) -> Array:
        """Return codes with the outputs first; eight of them share a word of 4-bit codes with groups."""
        return super().by_output(layer, raw).T if self._is_transposed(layer) else super().by_output(layer, raw)

    def words(self, layer: str, codes: Tensor) -> tuple[Array, int]:
        """Return codes by output; of 4-bit codes with groups a byte each."""
        shape = self.weight_shape(layer)
        if codes.dtype != "I32" or shape is None or not self._is_transposed(layer):
            return super().words(layer, codes)
        step = max(1, shape[0] * shape[1] // BUDGET)
        return self._nibbles(np.asarray(codes.raw())).T[: shape[0] : step], step

    def scale_values(self, layer: str, part: str) -> Matrix:
        """Return the scales in a part of a layer, those of groups as [out, groups]."""
        values = super().scale_values(layer, part)
        return values.T if part in SCALE and values.ndim == 2 and self._is_transposed(layer) else values

    def zero_point_values(self, layer: str) -> Matrix | None:
        """Return the zero points, those of groups as [out, groups]; packed ones lie along the outputs."""
        tensor, scheme, shape = self.zero_point_of(layer), self.scheme_of(layer), self.weight_shape(layer)
        if tensor is None or scheme is None or shape is None or scheme.form not in WEIGHT_TYPES:
            return None
        if tensor.dtype != "I32" or scheme.bits != 4 or not tensor.shape:
            values = tensor.values()
        else:
            words = np.asarray(tensor.raw()).reshape(-1, tensor.shape[-1])
            values = _signed(self._nibbles(words), scheme)[:, : shape[0]].reshape(*tensor.shape[:-1], -1)
        return values.T if self._is_transposed(layer) and values.ndim == 2 else values

    def zero_point_range(self, layer: str) -> tuple[int, int] | None:
        """Return the range of the codes."""
        scheme = self.scheme_of(layer)
        if scheme is None or not scheme.form.startswith("uint"):
            return super().zero_point_range(layer)
        return 0, (1 << scheme.bits) - 1

    def unread(self, layer: str) -> str:
        """Name the type of the weight."""
        scheme = self.scheme_of(layer)
        return f"Quark's {scheme.form} is not read here" if scheme is not None else "nothing declares it quantized"

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Subtract zero points from codes and multiply by scales."""
        scheme, shape, scale = self.scheme_of(layer), self.weight_shape(layer), self.weight_scale_of(layer)
        if scale is None:
            raise ValueError("weight_scale is missing")
        if scheme is None or shape is None or scheme.form not in WEIGHT_TYPES:
            return None
        values = self._values(layer, codes, scheme, shape, rows)
        zero_points, part = self.zero_point_values(layer), scale.part
        if zero_points is not None:
            values = values - spread(np.asarray(zero_points), shape, rows, scheme.group)
        scales = self.scale_values(layer, part) if self._is_transposed(layer) else scale_values(scale)
        return values * spread(scales, shape, rows, scheme.group)

    def _values(self, layer: str, codes: Tensor, scheme: LayerScheme, shape: tuple[int, int], rows: slice) -> Matrix:
        """Return the codes of some rows [rows, in] as numbers."""
        raw = np.asarray(codes.raw())
        if codes.dtype != "I32":
            chosen = self.by_output(layer, raw)[rows]
            return decoded(chosen, "F4" if scheme.form == "fp4" else codes.dtype).astype(np.float64)
        if not self._is_transposed(layer):
            return _signed(self._nibbles(raw[rows]), scheme)[:, : shape[1]]
        wanted = np.arange(shape[0])[rows]
        words, place = np.unique(wanted // 8, return_inverse=True)
        every = self._nibbles(np.ascontiguousarray(raw[:, words]))
        return _signed(every[:, place * 8 + wanted % 8].T, scheme)

    def _nibbles(self, words: Array) -> NDArray[np.uint8]:
        """Unpack words [rows, words] into 4-bit codes [rows, 8 · words], in the order in which they were packed."""
        codes = unpacked(np.ascontiguousarray(words).view(np.uint32), 4)
        if self._export.get("pack_method", "reorder") != "reorder":
            return codes
        return codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].reshape(len(codes), -1)


def _signed(codes: NDArray[np.uint8], scheme: LayerScheme) -> Matrix:
    """Return 4-bit codes as numbers: of int4 the upper half of them is negative."""
    values = codes.astype(np.float64)
    return np.where(values > 7, values - 16, values) if scheme.form == "int4" else values


def _pattern(name: str) -> str:
    """Return a name with stars as Quark matches it, as the regex that `matches` wants."""
    return name if str(name).startswith("re:") else f"re:{fnmatch.translate(str(name))}"


def _scheme(weight: Settings | Sequence[Any], layer: Settings, *, cached: bool) -> LayerScheme:
    """Return the scheme of a weight's settings; those of two stages, a list, aren't read as numbers.

    `layer`: the settings of its inputs and outputs too. `cached`: a KV cache demands the scales of its outputs.
    """
    if not isinstance(weight, Mapping):
        return LayerScheme("two stages", 8)
    kind, strategy = str(weight.get("dtype")), STRATEGIES.get(str(weight.get("qscheme")), "any")
    bits, stored = WEIGHT_TYPES.get(kind, (8, ""))
    size = weight.get("group_size")
    required = [("weight",), SCALE]
    if "int" in kind and weight.get("symmetric") is False:
        required.append(ZERO_POINT)
    if _is_static(layer.get("input_tensors")):
        required.append(INPUT_SCALE)
    if _is_static(layer.get("output_tensors")) and not cached:
        required.append(OUTPUT_SCALE)
    optional = frozenset({"bias", "bias_scale", "bias_zero_point", "input_zero_point", "output_zero_point"})
    allowed = optional | {*ZERO_POINT, *INPUT_SCALE, *OUTPUT_SCALE}
    group = int(size) if strategy == "group" and isinstance(size, int) and size > 0 else None
    zero_point = 0 if kind.startswith("int") and weight.get("symmetric") else None
    return LayerScheme(kind, bits, strategy, group, tuple(required), allowed, (stored,) if stored else (), zero_point)


def _is_static(tensors: Any) -> bool:
    """Say whether inputs or outputs have one scale that calibration found."""
    return isinstance(tensors, Mapping) and tensors.get("is_dynamic") is False and tensors.get("scale_format") != "e8m0"

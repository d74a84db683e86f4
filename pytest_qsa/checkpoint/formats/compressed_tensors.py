"""compressed-tensors: the files of llm-compressor, in 8 bits or packed, with integers or floats."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ..folder import Folder, Settings
from ..tensors import EIGHT_BITS, Matrix, Tensor, decoded, decoded_rows, element_count, spread, spread_scales, unpacked
from .format import Format
from .gptq import borrowed_layout
from .scheme import Declaration, LayerScheme, ScaleGroups, block_of

PACKED_FLOATS = {"nvfp4-pack-quantized": "F4", "mxfp4-pack-quantized": "F4", "mxfp6-pack-quantized": "F6_E2M3"}
"""The formats with several floats in a byte or in three → the dtype as `decoded` names it."""
PACKED_DTYPES = {"pack-quantized": "I32", **dict.fromkeys(PACKED_FLOATS, "U8")}
WHOLE = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
"""The formats with a code in each byte."""
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

    def unread(self, layer: str) -> str:
        """Name the format: those of earlier versions are packed otherwise."""
        scheme = self.scheme_of(layer)
        return super().unread(layer) if scheme is None else f"{scheme.form} is not read here"

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return the middle of the range for packed integers, which are stored with half of it added."""
        if codes.part == "weight_packed" and codes.dtype != "U8":
            return (1 << (self.code_bits(layer, codes) - 1),)
        return (0, 32) if self.code_bits(layer, codes) == 6 else super().zero_codes(layer, codes)

    def words(self, layer: str, codes: Tensor) -> tuple[Array, int]:
        """Return the words of every row, or its codes where a word holds parts of some."""
        words, step = super().words(layer, codes)
        bits, shape = self.code_bits(layer, codes), self.weight_shape(layer)
        if shape is None or words.itemsize * 8 % bits == 0 or words.nbytes // len(words) % 4:
            return words, step
        return unpacked(np.ascontiguousarray(words).view("<u4"), bits)[:, : shape[1]], step

    def zero_point_values(self, layer: str) -> Matrix | None:
        """Return the zero points [out, groups].

        Packed ones are packed along the outputs, with half of the range added.
        """
        tensor, shape, scheme = self.zero_point_of(layer), self.weight_shape(layer), self.scheme_of(layer)
        if tensor is None or tensor.dtype != "I32":
            return super().zero_point_values(layer)
        if shape is None or scheme is None or len(tensor.shape) != 2:
            return None
        words = np.ascontiguousarray(np.asarray(tensor.raw()).view(np.uint32).T)
        return unpacked(words, scheme.bits).T[: shape[0]].astype(np.float64) - (1 << (scheme.bits - 1))

    def scale_groups(self, layer: str, shape: tuple[int, int]) -> ScaleGroups:
        """Return groups of inputs, in the order that `weight_g_idx` gives them."""
        groups, stated = super().scale_groups(layer, shape), self.parts(layer).get("weight_g_idx")
        if stated is None or element_count(stated) != shape[1] or (stated.values() == -1).all():
            return groups
        return replace(groups, order=np.argsort(stated.values().ravel(), kind="stable"))

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Subtract zero points from codes and multiply by scales: 8 bits, packed floats, and packed integers."""
        parts, scheme = self.parts(layer), self.scheme_of(layer)
        needed = {choice[0] for choice in scheme.required} - {"weight_shape"} if scheme else set()
        if scheme is not None and not needed:
            return None
        if lost := sorted(part for part in needed - set(parts) if part.startswith("weight_")):
            raise ValueError(f"{lost[0]} is missing")
        scale = parts.get("weight_scale")
        if scale is None:
            return None
        packed = codes.part == "weight_packed"
        values = self._unpacked(layer, codes, rows) if packed else decoded_rows(codes, rows)
        zero_points = self.zero_point_values(layer)
        if values is None or (zero_points is None and "weight_zero_point" in parts):
            return None
        if zero_points is not None and zero_points.size not in (1, element_count(scale)):
            raise ValueError(f"{zero_points.size} zero points for {element_count(scale)} scales")
        if scheme is not None and scheme.strategy == "channel" and scale.shape[0] != codes.shape[0]:
            raise ValueError(f"scales {'×'.join(map(str, scale.shape))} for {codes.shape[0]} rows")
        shape = (codes.shape[0], values.shape[1])
        group = scheme.group if scheme else None
        columns = _group_order(parts.get("weight_g_idx"), scale, shape[1])
        if zero_points is not None:
            values = values - spread(zero_points, shape, rows, group)[:, columns]
        scales = spread_scales(scale, shape, rows, group)[:, columns]
        # A scale of 0 or Inf makes Inf and NaN, which are counted.
        with np.errstate(divide="ignore", invalid="ignore"):
            if whole := parts.get("weight_global_scale"):
                # of NVFP4, by which the scales of the groups were multiplied
                scales = scales / float(whole.values().item())
            return values * scales

    def _unpacked(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Unpack small floats, or words of 32 bits: the first code in the lowest bits, with half of the range added."""
        scheme, shape = self.scheme_of(layer), self.weight_shape(layer)
        if scheme is not None and codes.dtype == "U8" and scheme.form in PACKED_FLOATS:
            return decoded(np.asarray(codes.raw()[rows]), PACKED_FLOATS[scheme.form]).astype(np.float64)
        if scheme is None or shape is None or codes.dtype != "I32" or scheme.form != "pack-quantized":
            return None
        # earlier versions leave bits of a word unused where 32 is no multiple of a code's: these have more words
        if codes.shape[1] != -(-shape[1] * scheme.bits // 32):
            return None
        numbers = unpacked(np.asarray(codes.raw()[rows]).view(np.uint32), scheme.bits)[:, : shape[1]]
        return numbers.astype(np.float64) - (1 << (scheme.bits - 1))


class AutoRoundFloats(CompressedTensors):
    """AutoRound's NVFP4, MXFP4 and MXFP8: in the layout of compressed-tensors, declared in settings of its own."""

    name = "auto-round:llm_compressor"

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize AutoRound's files in this packing."""
        return borrowed_layout(folder) == "llm_compressor"

    @cached_property
    def declaration(self) -> Declaration:
        """The settings of all layers, and those of single ones in `extra_config`."""
        config, extra = self.folder.quantization, self.folder.quantization.get("extra_config") or {}
        own = [([name], _scheme_of_auto_round({**config, **(settings or {})})) for name, settings in extra.items()]
        return Declaration([*own, (["Linear"], _scheme_of_auto_round(config))])


def _scheme_of_auto_round(config: Settings) -> LayerScheme:
    """Return the scheme of compressed-tensors that AutoRound's settings of a layer stand for."""
    bits, size = int(config.get("bits") or 4), config.get("group_size")
    kind, _, _ = str(config.get("data_type")).partition("_fp")
    form = {("nv", 4): "nvfp4-pack-quantized", ("mx", 4): "mxfp4-pack-quantized", ("mx", 8): "mxfp8-quantized"}
    strategy = "tensor_group" if kind == "nv" else "group"
    weights = {"num_bits": bits, "type": "float", "strategy": strategy, "group_size": size}
    static = str(config.get("act_data_type")).endswith("static_gs")
    inputs = {"dynamic": "local", "strategy": "tensor_group"} if static else {}
    stored = form.get((kind, bits), str(config.get("data_type")))
    return _scheme({"weights": weights, "input_activations": inputs, "format": stored}, config)


def _group_order(order: Tensor | None, scale: Tensor, inputs: int) -> slice | NDArray[np.intp]:
    """Return the columns to take from scales that are spread in order, where `weight_g_idx` orders inputs otherwise."""
    groups = None if order is None else order.values().astype(np.intp)
    if groups is None or (groups == -1).all():  # as it is initialized
        return slice(None)
    if groups.shape != (inputs,) or groups.min() < 0 or groups.max() >= scale.shape[-1]:
        raise ValueError(f"weight_g_idx doesn't name one of {scale.shape[-1]} groups for each of {inputs} inputs")
    return groups * -(-inputs // scale.shape[-1])


def _scheme(group: Settings, config: Settings) -> LayerScheme:
    weights, inputs = group["weights"], group.get("input_activations") or {}
    form = str(group.get("format") or config.get("format") or "dense")
    bits, strategy = int(weights.get("num_bits") or 8), str(weights.get("strategy") or "tensor")
    if form not in (*WHOLE, *PACKED_DTYPES, "dense", "mixed-precision"):  # marlin-24, sparse-24-bitmask
        return LayerScheme(form, bits, allowed=OPTIONAL | {"weight_scale", "input_scale"})
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
    if inputs and inputs.get("dynamic") in (False, "local") and inputs.get("strategy") == "tensor_group":
        required.append(("input_global_scale",))
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
        0 if weights.get("symmetric", True) else None,
    )


def _dtypes(form: str, kind: str, bits: int) -> tuple[str, ...]:
    if form in WHOLE:
        return ("I8",) if kind == "int" else EIGHT_BITS if bits == 8 else ()
    return (PACKED_DTYPES[form],) if form in PACKED_DTYPES else ()

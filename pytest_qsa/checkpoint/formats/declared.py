"""What a `quantization_config` declares: which layers are quantized, and which tensors such a layer then has.

The formats are those of compressed-tensors, GPTQ, AWQ, block- and tensor-wise FP8, and torchao as transformers saves
it. Of other methods the layers are compared with their siblings only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from ..folder import Folder
from ..tensors import EIGHT_BITS, FLOATS, Tensor

SCALE = re.compile(r"(^|_)scales?(_inv|_2)?$")
ZERO_POINT = re.compile(r"(^|_)(zero_point|qzeros)$")
CODES = ("weight_packed", "qweight", "_weight_qdata", "weight")
"""The parts that may hold a layer's quantized weight; `weight` only where its dtype says so."""
NOT_LINEAR = re.compile(
    r"(embed|wte|wpe|norm|rotary|router|conv|position)|(^|\.)(gate|wg|shared|ln_\w+)$", re.IGNORECASE
)
"""Layers with a matrix that a target `Linear` may not mean: embeddings, routers, convolutions."""


@dataclass(frozen=True)
class Scheme:
    """How a layer is quantized. `required`: parts that it must have, each a choice; `allowed`: parts it may have.

    `group`: the input columns that share a scale; None for a scale a row (`channel`) or a `tensor`. `codes`: the dtypes
    that its weight may be stored in. `bits`: of one weight.
    """

    form: str
    bits: int
    strategy: str
    group: int | tuple[int, int] | None
    required: tuple[tuple[str, ...], ...]
    allowed: frozenset[str] = frozenset()
    codes: tuple[str, ...] = ()

    def scale_count(self, rows: int, columns: int) -> int | None:
        """Return how many scales a weight [rows, columns] has; None where the scheme leaves it open."""
        if self.strategy == "tensor":
            return 1
        if self.strategy == "channel":
            return rows
        if self.strategy in ("group", "tensor_group") and isinstance(self.group, int) and self.group > 0:
            return rows * ceil(columns / self.group)
        if self.strategy == "block" and isinstance(self.group, tuple):
            return ceil(rows / self.group[0]) * ceil(columns / self.group[1])
        return None


def codes_of(parts: Mapping[str, Tensor]) -> Tensor | None:
    """Return the tensor that holds a layer's quantized weight; None for a layer in floating point."""
    for part in CODES:
        tensor = parts.get(part)
        if tensor is not None and not (part == "weight" and tensor.dtype in FLOATS):
            return tensor
    return None


def weight_shape(parts: Mapping[str, Tensor], bits: int) -> tuple[int, int] | None:
    """Return [rows, columns] of a layer's weight, unpacked; None for a packing that isn't known."""
    codes = codes_of(parts)
    if codes is None or len(codes.shape) != 2:
        return None
    rows, columns = codes.shape
    if codes.part == "weight_packed":
        if "weight_shape" in parts:
            stated = [int(length) for length in parts["weight_shape"].values().ravel()]
            return (stated[0], stated[1]) if len(stated) == 2 else None
        return rows, columns * (8 if codes.dtype == "U8" else 32) // bits
    if codes.part == "qweight":  # GPTQ packs along the inputs, AWQ along the outputs; the scales tell
        outputs = parts["scales"].shape[-1] if "scales" in parts else columns
        return outputs, rows * 32 // bits if outputs == columns else rows
    return rows, columns


@dataclass(frozen=True)
class Declaration:
    """What a configuration declares. `names_layers`: it says by name or class which layers are quantized."""

    method: str
    groups: Sequence[tuple[Sequence[str], Scheme]]
    ignore: Sequence[str]
    names_layers: bool

    def of(self, layer: str) -> Scheme | None:
        """Return the scheme that a linear layer of this name is declared to have; None for none."""
        if any(matches(layer, pattern) for pattern in self.ignore):
            return None
        for targets, scheme in self.groups:
            if any(target == "Linear" or matches(layer, target) for target in targets):
                return scheme
        return None


def matches(layer: str, pattern: str) -> bool:
    """Match a layer as compressed-tensors does: `re:` for a regex from the start, else the whole name.

    A name whose front differs (files and modules are named apart in multimodal models) counts as the same.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return layer == pattern or layer.endswith(f".{pattern}") or pattern.endswith(f".{layer}")


def declared(folder: Folder) -> Declaration:
    """Read what the checkpoint's configuration declares."""
    config = folder.quantization
    method = str(config.get("quant_method") or ("compressed-tensors" if "config_groups" in config else ""))
    reader = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq, "fp8": _fp8}.get(method)
    if reader is None:
        return Declaration(method or "none", (), (), names_layers=False)
    return reader(config)


def _compressed_tensors(config: Mapping[str, Any]) -> Declaration:
    kv_cache = frozenset({"k_scale", "v_scale", "q_scale"}) if config.get("kv_cache_scheme") else frozenset()
    groups = [
        (list(group.get("targets") or ()), _compressed_scheme(group, config, kv_cache))
        for group in (config.get("config_groups") or {}).values()
        if isinstance(group, dict) and group.get("weights")
    ]
    return Declaration("compressed-tensors", groups, list(config.get("ignore") or ()), names_layers=True)


def _compressed_scheme(group: Mapping[str, Any], config: Mapping[str, Any], kv_cache: frozenset[str]) -> Scheme:
    weights, inputs = group["weights"], group.get("input_activations") or {}
    form = str(group.get("format") or config.get("format") or "dense")
    symmetric, bits = bool(weights.get("symmetric", True)), int(weights.get("num_bits") or 8)
    required = [("weight_packed",), ("weight_scale",)] if "pack" in form else [("weight",), ("weight_scale",)]
    if not symmetric:
        required.append(("weight_zero_point",))
    if form == "pack-quantized":
        required.append(("weight_shape",))
    if str(weights.get("strategy")) == "tensor_group" and form.startswith("nvfp4"):
        required.append(("weight_global_scale",))
    if weights.get("actorder") in ("group", True):
        required.append(("weight_g_idx",))
    static = bool(inputs) and inputs.get("dynamic") is False
    if static:
        required.append(("input_scale",))
    allowed = {"weight_zero_point", "weight_g_idx", "input_zero_point", "input_global_scale", "output_scale", "bias"}
    return Scheme(
        form, bits, str(weights.get("strategy") or "tensor"), _group(weights), tuple(required),
        frozenset(allowed) | kv_cache, _codes(form, weights, bits),
    )  # fmt: skip


def _codes(form: str, weights: Mapping[str, Any], bits: int) -> tuple[str, ...]:
    if form in ("int-quantized", "float-quantized", "naive-quantized"):
        return ("I8",) if str(weights.get("type")) == "int" else EIGHT_BITS if bits == 8 else ()
    return {"pack-quantized": ("I32",), "nvfp4-pack-quantized": ("U8",), "mxfp4-pack-quantized": ("U8",)}.get(form, ())


def _group(weights: Mapping[str, Any]) -> int | tuple[int, int] | None:
    block, size = weights.get("block_structure"), weights.get("group_size")
    if isinstance(block, list) and len(block) == 2:
        return int(block[0]), int(block[1])
    return int(size) if isinstance(size, int) and size > 0 else None


def _gptq(config: Mapping[str, Any]) -> Declaration:
    scheme = _group_packed("gptq", config, extra=frozenset({"g_idx", "bias"}))
    dynamic = config.get("dynamic") or {}
    ignore = [] if config.get("lm_head") else ["lm_head"]
    ignore += [f"re:.*{key[2:]}" for key in dynamic if str(key).startswith("-:")]
    return Declaration(
        "gptq", [(["Linear"], scheme)], ignore, names_layers=not config.get("modules_in_block_to_quantize")
    )


def _awq(config: Mapping[str, Any]) -> Declaration:
    scheme = _group_packed("awq", config, extra=frozenset({"bias"}))
    skipped = [f"re:.*{re.escape(name)}" for name in config.get("modules_to_not_convert") or ()]
    return Declaration("awq", [(["Linear"], scheme)], ["lm_head", *skipped], names_layers=True)


def _group_packed(form: str, config: Mapping[str, Any], *, extra: frozenset[str]) -> Scheme:
    size, bits = int(config.get("group_size") or -1), int(config.get("bits") or config.get("w_bit") or 4)
    required = (("qweight",), ("qzeros",), ("scales",))
    strategy, group = ("group", size) if size > 0 else ("channel", None)
    return Scheme(form, bits, strategy, group, required, extra, ("I32",))


def _fp8(config: Mapping[str, Any]) -> Declaration:
    block = config.get("weight_block_size")
    static = config.get("activation_scheme") == "static"
    required: list[tuple[str, ...]] = [("weight",), ("weight_scale_inv", "weight_scale")]
    required += [("input_scale", "activation_scale")] if static else []
    group = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None
    allowed = frozenset({"bias", "input_scale", "k_scale", "v_scale"})
    scheme = Scheme("fp8", 8, "block" if group else "any", group, tuple(required), allowed, EIGHT_BITS)
    skipped = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
    return Declaration("fp8", [(["Linear"], scheme)], ["lm_head", *(f"re:.*{re.escape(n)}" for n in skipped)], True)


def is_linear(layer: str, parts: Mapping[str, Tensor]) -> bool:
    """Say whether a layer is one that a target `Linear` means: a matrix, and no embedding, norm or router by name."""
    if codes_of(parts) is not None:
        return True
    weight = parts.get("weight")
    return weight is not None and len(weight.shape) == 2 and min(weight.shape) > 1 and not NOT_LINEAR.search(layer)


def scale_parts(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's scales by part: `weight_scale`, `input_scale`, or `scales` beside `qweight`."""
    found = {part: tensor for part, tensor in parts.items() if SCALE.search(part)}
    found.pop("scale", None)  # the weight of some norms
    if "scales" in found and "qweight" not in parts:
        found.pop("scales")
    return found


def element_count(tensor: Tensor) -> int:
    """Return how many elements a tensor has."""
    return prod(tensor.shape)

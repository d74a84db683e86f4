"""What the files hold of each layer: its codes, scales and zero points, and experts that lie packed in one tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import ClassVar

from ..experts import INTERLEAVED, PACKED, ExpertLayer, expert_layers
from ..folder import Folder
from ..tensors import FLOATS, Matrix, Tensor, scale_values
from .scheme import Declaration, LayerScheme

NOT_LINEAR = re.compile(
    r"(embed|wte|wpe|norm|rotary|router|conv|position|relative_\w*bias)|(^|\.)(gate|wg|shared|ln_\w+)$", re.IGNORECASE
)
"""Layers with a matrix that a target `Linear` may not mean: embeddings, routers, convolutions."""
SIGNS = re.compile(
    r"^weight\..+|^_?weight_(packed|qdata|shape|zero_point|g_idx|format|(global_)?scale\w*)$|_proj_(blocks|scales)$"
    r"|^(qweight|qzeros|scales|absmax|SCB|quant_map|g_idx|qscale_weight|pre_quant_scale)$"
)
"""The parts of a layer that show that its weight is quantized, whatever dtype it is stored in."""

OF_MODELS = frozenset({"scale", "scales", "correct_output_scale", "per_dim_scale", "logit_scale"})
"""Parameters of models that are called scales and scale no codes: of some norms, of Gemma 3n, of CLIP."""


@lru_cache(maxsize=1024)  # a checkpoint of a hundred thousand layers has a few sets of parts
def _found(pattern: re.Pattern[str], parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for part in parts if pattern.search(part))


@lru_cache(maxsize=1024)
def _scale_parts(pattern: re.Pattern[str], parts: tuple[str, ...]) -> tuple[str, ...]:
    others = OF_MODELS - {"scales"} if "qweight" in parts else OF_MODELS
    return tuple(part for part in _found(pattern, parts) if part not in others)


@lru_cache(maxsize=1024)
def _part_of_weight(scales: tuple[str, ...]) -> str:
    other = ("input", "output", "k_", "v_", "q_")
    return next((part for part in scales if not part.startswith(other) and "global" not in part), "")


class LayerTensors:
    """What the files of one checkpoint folder hold of each layer, and what its configuration declares of it.

    The defaults fit a format that stores one code an element and one scale a row, group, block or tensor.

    Attributes:
        codes: the parts that may hold a layer's codes, in the order in which they are looked for.
        scales: matches the parts that hold scales, those of inputs, outputs and KV caches too.
        zero_points: matches the parts that hold zero points.
    """

    codes: ClassVar[tuple[str, ...]] = ("weight_packed", "qweight", "_weight_qdata", "weight")
    scales: ClassVar[re.Pattern[str]] = re.compile(r"(^|_)scales?(_inv|_2)?$")
    zero_points: ClassVar[re.Pattern[str]] = re.compile(r"(^|_)(zero_point|qzeros)$")

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    @cached_property
    def declaration(self) -> Declaration:
        """What the configuration declares of each layer; nothing, unless a format overrides it."""
        return Declaration()

    @property
    def cache_scales_by(self) -> str:
        """What declares static scales of a KV cache, as a clause of a sentence; empty where nothing does."""
        scheme = self.folder.quantization.get("kv_cache_scheme")
        static = isinstance(scheme, dict) and bool(scheme) and not scheme.get("dynamic")
        return "kv_cache_scheme declares a static cache" if static or scheme == "static" else ""

    @property
    def cast_cache(self) -> bool:
        """Whether a KV cache that is declared and has no scales means 1.0 for all, by what wrote the files."""
        return False

    def scheme_of(self, layer: str) -> LayerScheme | None:
        """Return the scheme that a layer is declared to have; None for none."""
        if layer not in self._schemes:
            self._schemes[layer] = self.declaration.scheme_of(layer)
        return self._schemes[layer]

    @cached_property
    def _schemes(self) -> dict[str, LayerScheme | None]:
        """The answers of `scheme_of`, as those of `codes_of`."""
        return {}

    def parts(self, layer: str) -> Mapping[str, Tensor]:
        """Return the tensors of a layer by part; empty where the files have no such layer."""
        return self.folder.layers.get(layer, {})

    def codes_of(self, layer: str) -> Tensor | None:
        """Return the tensor that holds a layer's quantized weight; None for a layer in floating point."""
        if layer not in self._coded:
            self._coded[layer] = self._codes_among(self.parts(layer))
        return self._coded[layer]

    @cached_property
    def _coded(self) -> dict[str, Tensor | None]:
        """The answers of `codes_of`: checks ask many times, of hundreds of thousands of layers."""
        return {}

    def _codes_among(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        for part in self.codes:
            tensor = parts.get(part)
            if tensor is not None and not (part == "weight" and tensor.dtype in FLOATS):
                return tensor
        return None

    def weight_of(self, layer: str) -> Tensor | None:
        """Return the tensor that holds a layer's weight, as codes or in floating point; None where it has none."""
        return self.codes_of(layer) or self.parts(layer).get("weight")

    def scales_of(self, layer: str) -> dict[str, Tensor]:
        """Return the scales of a layer by part: of its weight, inputs, outputs and KV cache."""
        parts = self.parts(layer)
        return {part: parts[part] for part in _scale_parts(self.scales, tuple(parts))}

    def weight_scale_of(self, layer: str) -> Tensor | None:
        """Return the scales of a layer's weight; None where it has none."""
        return self.parts(layer).get(_part_of_weight(tuple(self.scales_of(layer))))

    def signs_of(self, layer: str) -> list[str]:
        """Return the parts of a layer that show that its weight is quantized, whatever dtype it is stored in."""
        return list(_found(SIGNS, tuple(self.parts(layer))))

    def zero_point_of(self, layer: str) -> Tensor | None:
        """Return the zero points of a layer's weight; None where it has none."""
        parts = self.parts(layer)
        found = (part for part in _found(self.zero_points, tuple(parts)) if not part.startswith(("input", "output")))
        return parts.get(next(found, ""))

    def scale_values(self, layer: str, part: str) -> Matrix:
        """Return the scales in a part of a layer in float64, without padding."""
        return scale_values(self.parts(layer)[part])

    def zero_point_values(self, layer: str) -> Matrix | None:
        """Return the zero points of a layer's weight as they are subtracted from its codes; None where it has none.

        None too where they are packed in words of 32 bits, which a format unpacks by itself.
        """
        tensor = self.zero_point_of(layer)
        return None if tensor is None or tensor.dtype == "I32" else tensor.values()

    def zero_point_step(self, layer: str) -> Matrix | float:
        """Return by how much a stored zero point in floating point grows where the zero point grows by one code."""
        return 1.0

    def zero_point_range(self, layer: str) -> tuple[int, int] | None:
        """Return the least and the largest zero point of a layer; None where no scheme is declared.

        The default is that of signed codes.
        """
        scheme = self.scheme_of(layer)
        return None if scheme is None else (-(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1)

    def is_linear(self, layer: str) -> bool:
        """Say whether a target `Linear` means a layer: one with codes, or a matrix that isn't named as an embedding."""
        if self.codes_of(layer) is not None:
            return True
        weight = self.parts(layer).get("weight")
        return weight is not None and len(weight.shape) == 2 and min(weight.shape) > 1 and not NOT_LINEAR.search(layer)

    def code_bits(self, layer: str, codes: Tensor) -> int:
        """Return the bits that one code takes in its word."""
        return 4 if codes.dtype in ("I32", "U8", "F4") else 8

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in] of a layer's weight, unpacked; None where it is no matrix or its packing isn't known."""
        weight = self.weight_of(layer)
        return (weight.shape[0], weight.shape[1]) if weight is not None and len(weight.shape) == 2 else None

    @cached_property
    def experts(self) -> Mapping[str, tuple[str, int, ExpertLayer]]:
        """The layers of experts that lie packed → the module that holds them, the expert's number, and the place.

        `Format.rows` reads them by these names, which are those of files with a tensor for each expert.
        """
        holders: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.packed_shapes.items():
            holder, _, tensor = name.rpartition(".")
            holders.setdefault(holder, {})[tensor] = shape
        interleaved = self.folder.text_config.get("model_type") in INTERLEAVED
        return {
            f"{holder}.{index}.{layer}": (holder, index, place)
            for holder, shapes in holders.items()
            for layers in [expert_layers(shapes, interleaved=interleaved)]
            for index in range(min(shape[0] for shape in shapes.values()))
            for layer, place in layers.items()
        }

    @cached_property
    def packed_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The `packed_tensors` by name."""
        return dict(self.packed_tensors())

    def packed_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the tensors that hold all experts of a layer and their shapes, unpacked: those in floating point."""
        for tensor in self.folder.tensors.values():
            if tensor.part in PACKED and tensor.dtype in FLOATS and len(tensor.shape) == 3:
                yield tensor.name, tensor.shape

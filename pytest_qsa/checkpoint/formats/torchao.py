"""torchao as transformers saves it: a tensor subclass in parts, whose class the metadata of the file names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from ...common import AnomalyError, parsed_json
from ..folder import Finding, Settings
from ..tensors import EIGHT_BITS, Matrix, Tensor, decoded, element_count, spread
from .format import Format
from .scheme import LayerScheme

_BYTES, _FLOAT4 = ("I8",), ("U8", "F4")
CLASSES: dict[str, tuple[int, tuple[str, ...]]] = {
    "Int8Tensor": (8, _BYTES),
    "IntxUnpackedToInt8Tensor": (8, _BYTES),
    "Float8Tensor": (8, EIGHT_BITS),
    "MXTensor": (8, (*EIGHT_BITS, *_FLOAT4)),
    "NVFP4Tensor": (4, _FLOAT4),
}
"""The tensor subclasses that are read → the most bits of a code, and the dtypes of their codes.

Of the classes that torchao lets a file name (`ALLOWED_TENSORS_SUBCLASSES`) Int4Tensor, Int4PlainInt32Tensor and
Int4TilePackedTo4dTensor are left out: they have no `dequantize`, so that nothing says what their codes stand for.
"""
TILE = (128, 4)
"""The rows and columns of scales that are stored together where scales are swizzled (cuBLAS, block scaling factors)."""
PREFIX = "_weight_"


@dataclass(frozen=True)
class Subclass:
    """What the metadata says of a weight. `name`: its class; `data`: its attributes; `parts`: its tensors."""

    name: str
    data: Settings
    parts: tuple[str, ...]

    @property
    def bits(self) -> int:
        """The bits of a code; 4 where the class isn't known, for all such have 4."""
        stated = _dtype(self.data.get("target_dtype") or self.data.get("elem_dtype"))
        found = re.match(r"(?:int|float|fp)(\d)", stated)
        return int(found[1]) if found else CLASSES.get(self.name, (4, ()))[0]

    @property
    def block(self) -> int | tuple[int, int] | None:
        """The columns of a group, or the rows and columns of a block; None for a scale of the whole tensor."""
        size = self.data.get("block_size")
        if isinstance(size, list) and len(size) == 2:
            return int(size[0]), int(size[1])
        return size if isinstance(size, int) else None

    @property
    def is_swizzled(self) -> bool:
        """Say whether the scales lie in tiles, in the order of NVIDIA's kernels."""
        return bool(self.data.get("is_swizzled_scales"))


class TorchAo(Format):
    """(`_weight_qdata` − `_weight_zero_point`) × `_weight_scale`, one code a byte or two 4-bit floats.

    Its configuration doesn't say which layers are quantized, so that they are compared with their siblings.
    """

    name = "torchao"
    libraries = ("torchao",)
    codes = ("_weight_qdata", "weight")
    scales = re.compile(r"^_weight_(act_quant_|(act_)?per_tensor_)?scale$")
    zero_points = re.compile(r"^_weight_(act_quant_)?zero_point$")

    @cached_property
    def _subclasses(self) -> Mapping[str, Subclass]:
        found = {}
        for name, text in self.folder.metadata.items():
            layer, _, part = name.rpartition(".")
            if part != "weight":
                continue
            try:
                stated = parsed_json(text)
                if stated["_type"] != "Tensor":
                    found[layer] = Subclass(stated["_type"], stated["_data"], tuple(stated["_tensor_data_names"]))
            except (ValueError, KeyError, TypeError) as error:
                what = f"the metadata of {name} isn't torchao's: {error}"
                raise AnomalyError(f"{self.folder.path}: {what}; save the checkpoint again") from None
        return found

    def scheme_of(self, layer: str) -> LayerScheme | None:
        """Return what the metadata of the file says of a layer; None where it says nothing."""
        stored = self._subclasses.get(layer)
        if stored is None:
            return None
        required = tuple((f"{PREFIX}{part}",) for part in stored.parts)
        dtypes = CLASSES.get(stored.name, (0, ()))[1]
        strategy, group = ("any", None) if stored.is_swizzled or stored.name not in CLASSES else _strategy(stored.block)
        return LayerScheme(stored.name, stored.bits, strategy, group, required, frozenset({"bias"}), dtypes)

    def weight_scale_of(self, layer: str) -> Tensor | None:
        """Return the scales of a layer's groups; those of its inputs begin with `_weight_act`."""
        return self.parts(layer).get(f"{PREFIX}scale")

    def zero_point_of(self, layer: str) -> Tensor | None:
        """Return the zero points of a layer's weight."""
        return self.parts(layer).get(f"{PREFIX}zero_point")

    def zero_point_values(self, layer: str) -> Matrix | None:
        """Return the zero points of a layer's weight; None where its class isn't read."""
        stored = self._subclasses.get(layer)
        return super().zero_point_values(layer) if stored is not None and stored.name in CLASSES else None

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in] of a layer's weight; of some classes the metadata states it."""
        stored, shape, codes = self._subclasses.get(layer), super().weight_shape(layer), self.codes_of(layer)
        if stored is None or codes is None or codes.part == "weight":
            return shape
        if stored.name not in CLASSES:
            stated = stored.data.get("shape")
            return (int(stated[0]), int(stated[1])) if isinstance(stated, list) and len(stated) == 2 else None
        return (shape[0], shape[1] * 2) if shape and codes.dtype == "U8" and stored.bits == 4 else shape

    def scale_values(self, layer: str, part: str) -> Matrix:
        """Return the scales in a part of a layer; swizzled ones in the order of their groups, without padding."""
        values, stored, shape = super().scale_values(layer, part), self._subclasses.get(layer), self.weight_shape(layer)
        if stored is None or shape is None or not stored.is_swizzled or part != f"{PREFIX}scale":
            return values
        size = shape[0], _groups(stored, shape[1])
        return _in_order(values, *size) if values.size == _padded(*size) else values

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Multiply codes, less their zero points, by scales, and columns by what the inputs are multiplied by.

        None where the metadata names another class than those that are read, or none.
        """
        stored, shape, parts = self._subclasses.get(layer), self.weight_shape(layer), self.parts(layer)
        if stored is None or shape is None or stored.name not in CLASSES or codes.part == "weight":
            return None
        if lost := [f"{PREFIX}{part}" for part in stored.parts if f"{PREFIX}{part}" not in parts]:
            raise ValueError(f"{lost[0]} is missing")
        raw = np.asarray(codes.raw()[rows])
        values = decoded(raw, "F4" if stored.bits == 4 and codes.dtype == "U8" else codes.dtype).astype(np.float64)
        group = _strategy(stored.block)[1]
        if (zero_points := self.zero_point_of(layer)) is not None:
            values = values - spread(zero_points.values(), shape, rows, group)
        scales = self.scale_values(layer, f"{PREFIX}scale")
        if (whole := parts.get(f"{PREFIX}per_tensor_scale")) is not None:
            # float32, in which the library multiplies the two scales
            scales = (scales * whole.values()).astype(np.float32).astype(np.float64)
        weight = values * spread(scales, shape, rows, group)
        smoothing = parts.get(f"{PREFIX}act_pre_scale")
        return weight if smoothing is None else weight * smoothing.values().ravel()

    def unread(self, layer: str) -> str:
        """Name the tensor subclass that torchao itself can't dequantize."""
        stored = self._subclasses.get(layer)
        if stored is None:
            return "the metadata of its file doesn't name its tensor subclass"
        return f"it is torchao's {stored.name}, which has no dequantize"

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield also codes whose class the metadata doesn't name, and swizzled scales of a wrong size."""
        yield from super().findings(layer)
        codes, stored, shape = self.codes_of(layer), self._subclasses.get(layer), self.weight_shape(layer)
        if codes is not None and codes.part != "weight" and stored is None:
            what = "the metadata of its file doesn't name its tensor subclass, by which torchao reads it"
            yield Finding.at(codes, what, "save the checkpoint again by save_pretrained, which writes it")
        scale = self.weight_scale_of(layer)
        if scale is None or shape is None or stored is None or not stored.is_swizzled:
            return
        expected = _padded(shape[0], _groups(stored, shape[1]))
        if element_count(scale) != expected:
            what = f"{element_count(scale)} elements, but the swizzled scales of a weight {shape} are {expected}"
            yield Finding.at(scale, what, "quantize the layer again")


def _dtype(stated: object) -> str:
    """Return the name of a dtype as torchao writes it, `{"_type": "torch.dtype", "_data": "int4"}` or a string."""
    return str(stated.get("_data") if isinstance(stated, Mapping) else stated or "")


def _strategy(block: int | tuple[int, int] | None) -> tuple[str, int | tuple[int, int] | None]:
    """Return what shares a scale, as `LayerScheme` names it, and its size."""
    return ("block", block) if isinstance(block, tuple) else ("group", block) if block else ("tensor", None)


def _groups(stored: Subclass, inputs: int) -> int:
    """Return how many groups a row has."""
    return -(-inputs // stored.block) if isinstance(stored.block, int) else 1


def _padded(rows: int, columns: int) -> int:
    """Return how many scales whole tiles of scales [rows, columns] have."""
    return prod(-(-count // step) * step for count, step in zip((rows, columns), TILE, strict=True))


def _in_order(values: NDArray[np.float64], rows: int, columns: int) -> Matrix:
    """Return scales [rows, columns] from tiles, each stored as [32, 4, 4]: row modulo 32, row // 32, column."""
    high, wide = (-(-count // step) for count, step in zip((rows, columns), TILE, strict=True))
    tiles = values.reshape(high, wide, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return tiles.reshape(high * TILE[0], wide * TILE[1])[:rows, :columns]

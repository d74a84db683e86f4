"""HQQ as its own saver and transformers' write it: groups of codes folded into bytes, every setting a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..folder import Finding, Folder
from ..tensors import FLOATS, Matrix, Tensor, cast_to, element_count
from .format import BUDGET, Format
from .scheme import LayerScheme

PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1, "3bit_32": 3}
"""The packings → the bits of one code in a byte or, of 3 bits, in a word of 32."""
LAYER_SETTINGS = ("shape", "nbits", "axis", "packing", "compute_dtype", "view_as_float", "unpack_view_dtype")


class Hqq(Format):
    """(`W_q` − `zero`) × `scale`, a scale and a zero point a group of `group_size` along `axis`, in `shape`.

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023; the layout is that of the
    package hqq 0.2.8. Scales and zero points that are quantized themselves are never in safetensors files.
    """

    name = "hqq"
    libraries = ("hqq",)
    loads = False
    codes = ("W_q", "weight")
    scales = re.compile(r"^scale$")
    zero_points = re.compile(r"^zero$")

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize the files of the package's own saver too, whose config.json doesn't name the format."""
        if folder.gguf_file or folder.quantization or not any(folder.path.glob("*.safetensors")):
            return super().declared_in(folder)
        return any({"W_q", *LAYER_SETTINGS[:4]} <= set(parts) for parts in folder.layers.values())

    def scales_of(self, layer: str) -> dict[str, Tensor]:
        """Return the scales of a layer; `scale` beside no codes is the weight of some norms."""
        scale = self.parts(layer).get("scale")
        return {} if scale is None or "W_q" not in self.parts(layer) else {"scale": scale}

    def scheme_of(self, layer: str) -> LayerScheme | None:
        """Return what a layer says of itself."""
        if "W_q" not in self.parts(layer):
            return None
        required = tuple((part,) for part in ("W_q", "scale", "zero", *LAYER_SETTINGS[:5]))
        bits, size = self._number(layer, "nbits") or 4, self._number(layer, "group_size")
        return LayerScheme(self.label, bits, "any", size, required, frozenset({"bias"}))

    def _number(self, layer: str, part: str) -> int | None:
        """Return a setting; None where it isn't there, as a group size for a scale a row. 1.58 bits are 2."""
        tensor = self.parts(layer).get(part)
        return None if tensor is None else int(np.ceil(tensor.values().ravel()[0]))

    def _text(self, layer: str, part: str) -> str:
        """Return a setting that is a text, whose letters are bytes."""
        tensor = self.parts(layer).get(part)
        return "" if tensor is None else bytes(np.asarray(tensor.raw()).astype(np.uint8).ravel()).decode("latin-1")

    def codes_of(self, layer: str) -> Tensor | None:
        """Return the words of a layer's codes, which may be stored under the dtype in which the library computes."""
        found = super().codes_of(layer)
        if found is None or found.part != "W_q" or found.dtype not in FLOATS or len(found.shape) != 2:
            return found
        kind, size = ("I32", 4) if self._text(layer, "packing") == "3bit_32" else ("U8", 1)
        lines = found.shape[0]
        return replace(found, dtype=kind, shape=(lines, (found.stop - found.start) // max(1, lines) // size))

    def code_bits(self, layer: str, codes: Tensor) -> int:
        """Return the bits that one code takes."""
        return PACKINGS.get(self._text(layer, "packing"), 8) if codes.part == "W_q" else super().code_bits(layer, codes)

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return the [out, in] that the layer states."""
        stated = self.parts(layer).get("shape")
        if stated is None or "W_q" not in self.parts(layer):
            return super().weight_shape(layer) if self.codes_of(layer) is None else None
        sizes = stated.values().ravel().astype(int).tolist()
        return (sizes[0], sizes[1]) if len(sizes) == 2 else None

    def unread(self, layer: str) -> str:
        """Name the packing, or the settings that are lost."""
        lost = [part for part in LAYER_SETTINGS[:4] if part not in self.parts(layer)]
        return (
            f"{', '.join(lost)} are missing" if lost else f"HQQ's packing {self._text(layer, 'packing')!r} is not known"
        )

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield also a packing that isn't known, and scales and zero points of another number than there are groups."""
        yield from super().findings(layer)
        codes, shape, axis = self.codes_of(layer), self.weight_shape(layer), self._number(layer, "axis")
        if codes is None or codes.part != "W_q" or shape is None or axis is None:
            return
        if (packing := self._text(layer, "packing")) not in PACKINGS:
            yield Finding.at(
                codes, f"packed as {packing!r}, which is not known here", "known are " + ", ".join(PACKINGS)
            )
        size = self._number(layer, "group_size")
        expected = shape[0] * shape[1] // size if size else shape[1 - axis]
        for part in ("scale", "zero"):
            tensor = self.parts(layer).get(part)
            if tensor is not None and element_count(tensor) not in (1, expected):
                what = (
                    f"{element_count(tensor)} elements, but a weight {shape} in groups of {size} has {expected} groups"
                )
                yield Finding.at(tensor, what, "quantize the layer again")

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return 0: a group of zeros has the zero point 0."""
        return (0,)

    def words(self, layer: str, codes: Tensor) -> tuple[NDArray[np.generic], int]:
        """Return codes of outputs, several a byte as in the file, though there they are of several groups."""
        shape, bits = self.weight_shape(layer), self.code_bits(layer, codes)
        if codes.part != "W_q" or shape is None or self._folded(layer, codes, slice(0, 1)) is None:
            return super().words(layer, codes)
        step = max(1, shape[0] * shape[1] // BUDGET)
        found = self._folded(layer, codes, slice(None, None, step))
        assert found is not None
        return packed_again(found[0], bits) if codes.dtype == "U8" else found[0], step

    def zero_point_values(self, layer: str) -> Matrix | None:
        """Return the zero points, which are no integers."""
        tensor = self.zero_point_of(layer)
        return None if tensor is None else tensor.values()

    def zero_point_range(self, layer: str) -> tuple[int, int] | None:
        """Return None: zero points are fitted, and may lie outside of the codes."""
        return None

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Subtract zero points from codes and multiply by scales, in the dtype in which the library computes."""
        parts, found = self.parts(layer), self._folded(layer, codes, rows) if codes.part == "W_q" else None
        if found is None:
            return None
        if lost := [part for part in ("scale", "zero") if part not in parts]:
            raise ValueError(f"{lost[0]} is missing")
        numbers, groups = found
        dtype = parts["scale"].dtype
        scales, zeros = (parts[part].values().ravel() for part in ("scale", "zero"))
        values = cast_to(numbers - (zeros[groups] if zeros.size > 1 else zeros), dtype)
        return cast_to(values * (scales[groups] if scales.size > 1 else scales), dtype)

    def _folded(self, layer: str, codes: Tensor, rows: slice) -> tuple[NDArray[np.uint8], NDArray[np.intp]] | None:
        """Return the codes of some outputs [rows, in] and the group of each; None where a setting is lost or unknown.

        The weight is [groups, group size] for axis 1 and [group size, groups] for axis 0.
        """
        shape, bits = self.weight_shape(layer), PACKINGS.get(self._text(layer, "packing"))
        axis = self._number(layer, "axis")
        if shape is None or bits is None or axis not in (0, 1):
            return None
        return folded_codes(np.asarray(codes.raw()), shape, rows, bits, axis=axis, high_first=True)


def folded_codes(
    raw: NDArray[np.generic], shape: tuple[int, int], rows: slice, bits: int, *, axis: int, high_first: bool
) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
    """Return the codes of some rows of a weight [rows, in], and the group of each code.

    `raw`: words [lines, columns] of 8 or 32 bits, of the weight in another shape [lines · codes a word, columns] whose
    lines (`axis` 1) or columns (0) are the groups. A word holds codes that lie whole lines apart, the first of them in
    its highest bits (`high_first`) or in its lowest.

    Raises:
        ValueError: the words hold fewer codes than the weight has.
    """
    lines, columns = raw.shape
    many = raw.dtype.itemsize * 8 // bits
    if lines * many * columns < shape[0] * shape[1]:
        raise ValueError(f"{raw.shape} words of {many} codes are too few for a weight {shape}")
    index = np.arange(shape[0])[rows, None] * shape[1] + np.arange(shape[1])
    line, column = np.divmod(index, columns)
    place, word = np.divmod(line, lines)
    shift = bits * (many - 1 - place if high_first else place)
    found = (raw[word, column].astype(np.int64) >> shift) & ((1 << bits) - 1)
    return found.astype(np.uint8), line if axis else column


def packed_again(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return codes [rows, in] with as many a byte as fit, those of a row beside one another; the last are left out."""
    many = 8 // bits
    whole = codes[:, : codes.shape[1] // many * many].reshape(len(codes), -1, many)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(whole << (bits * np.arange(many, dtype=np.uint8)), axis=2)
    return packed

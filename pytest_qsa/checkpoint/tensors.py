"""The tensors of safetensors files, read with numpy: the header first, bytes only where they are asked for.

The format: 8 bytes with the header's length, the header as JSON, the tensors' bytes (safetensors' own README).
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..captures import Array
from ..common import AnomalyError, InfraError, mistaken_for, refuse_sparse, refuse_special

LFS_POINTER = b"version https://git-lfs"
"""How the file begins that git has in the place of one which git-lfs would fetch."""
RAW: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4", "U8", "BOOL"), "u1"),
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
}
"""The dtypes of safetensors → the numpy dtype that holds their bytes.

Refused by name are complex numbers, and F6, for safetensors doesn't say in which order its codes lie in the bytes.
"""
Matrix = NDArray[np.float64]
ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in RAW.items() if name != "F4"}
FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SMALL_TENSOR = 1 << 14
"""Bytes of a tensor up to which reading it is faster than mapping its file, of which a checkpoint has thousands."""
MOST_ENTRIES = 150_000
"""The most tensors of one file; the largest known checkpoints have 300,000 in all, in files of a few thousand."""
LONGEST_HEADER = 100_000_000
"""The limit of the safetensors library in bytes; a file of another kind states far more."""


class _OpenFile:
    """A file that is read at any offset, and closed when it is forgotten."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if descriptor := vars(self).get("_descriptor"):
            os.close(descriptor)

    def read(self, start: int, count: int) -> bytes:
        return os.pread(self._descriptor, count, start)


@lru_cache(maxsize=4)  # opening a file takes longer than reading a small tensor of it
def _opened(path: Path, written: tuple[int, int]) -> _OpenFile:
    return _OpenFile(path)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. `start`, `stop`: the offsets of its bytes in the file.

    `written`: what the file was when its header was read: its inode, and when it was written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int
    written: tuple[int, int] = field(compare=False)

    @cached_property
    def layer(self) -> str:
        """The module that owns it."""
        return layer_of(self.name)

    @cached_property
    def part(self) -> str:
        """What follows the module in its name: weight, weight_scale, qzeros or weight.absmax."""
        return self.name[len(self.layer) + 1 :] if self.layer != self.name else self.name

    @property
    def file(self) -> str:
        """The name of its file."""
        return self.path.name

    def raw(self) -> Array:
        """Return the bytes, read-only and in the tensor's shape, of a large tensor as a memory map; of F4 two a byte.

        Raises:
            InfraError: its dtype isn't known here, or can't have its shape.
        """
        if self.dtype not in RAW:
            raise InfraError(f"{self.path}: {self.name} has the dtype {self.dtype}, which isn't known here")
        kind = np.dtype(RAW[self.dtype])
        shape = self.shape
        if self.dtype == "F4":  # the header counts elements, and a row of an odd length would end within a byte
            if not shape or shape[-1] % 2:
                raise InfraError(f"{self.path}: {self.name} is F4 of the shape {list(shape)}, which no bytes hold")
            shape = (*shape[:-1], shape[-1] // 2)
        if not prod(shape):
            return np.zeros(shape, dtype=kind)  # the system maps no file of zero bytes
        if self.stop - self.start <= SMALL_TENSOR:
            return self._read().view(kind).reshape(shape)
        # mapped, so that a check which looks at every tenth row of a matrix reads no more than that
        # by its name, for of a path numpy resolves every link, which takes as long as mapping it
        return np.memmap(str(self.path), dtype=kind, mode="r", offset=self.start, shape=shape)

    def bytes(self) -> NDArray[np.uint8]:
        """Return the bytes as they lie in the file, of any dtype; of a large tensor a memory map."""
        count = self.stop - self.start
        if not count:
            return np.zeros(0, dtype=np.uint8)  # the system maps no file of zero bytes
        if count <= SMALL_TENSOR:
            return self._read()
        return np.memmap(str(self.path), dtype=np.uint8, mode="r", offset=self.start, shape=(count,))

    def _read(self) -> NDArray[np.uint8]:
        content = _opened(self.path, self.written).read(self.start, self.stop - self.start)
        return np.frombuffer(content, dtype=np.uint8)

    def repeats(self, other: Tensor) -> bool:
        """Say whether another tensor has the same dtype, shape and bytes."""
        alike = (self.dtype, self.shape) == (other.dtype, other.shape)
        return alike and np.array_equal(self.bytes(), other.bytes())

    def values(self) -> NDArray[np.float64]:
        """Return the values, of any dtype, as float64 in the tensor's shape."""
        with np.errstate(invalid="ignore"):  # a signalling NaN is reported, not raised
            return decoded(np.asarray(self.raw()), self.dtype).astype(np.float64)


_OF_WEIGHT = re.compile(r"\.(weight(\.quant_state|\._data)?|(weight|input|output|bias)_quantizer(\.\d+)?)$")
_PACKED = re.compile(r"(.+\.(?:gate_up|down)_proj)_(?:blocks|scales)")


def layer_of(name: str) -> str:
    """Return the module that owns a tensor, by the tensor's name."""
    # X.weight.absmax is a tensor of X, as bitsandbytes, quanto, Quark and ModelOpt save what belongs to a weight
    owner = name.rpartition(".")[0]
    if "weight" in owner or "quantizer" in owner:
        owner = _OF_WEIGHT.sub("", owner)
    # gpt-oss keeps two packed weights in one module, each with scales: X_blocks and X_scales are of X
    packed = _PACKED.fullmatch(name) if name.endswith(("_blocks", "_scales")) else None
    return packed[1] if packed else owner or name


def decoded(raw: Array, dtype: str) -> Array:
    """Return the numbers that raw bytes stand for, in the smallest dtype of numpy that holds them.

    Two numbers of F4 share a byte, four of F6_E2M3 three bytes, so that the last axis becomes longer. The first number
    is in the lowest bits.
    """
    if dtype == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (raw.astype(np.uint16) << 8).view(np.float16)
    if dtype == "F8_E8M0":
        return np.where(raw == 255, np.nan, np.exp2(raw.astype(np.float64) - 127))
    if dtype == "F4":
        raw = np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)
    elif dtype == "F6_E2M3":
        bits = np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little").reshape(*raw.shape[:-1], -1, 6)
        raw = np.packbits(bits, axis=-1, bitorder="little")[..., 0]
    return np.asarray(_TABLES[dtype][raw]) if dtype in _TABLES else raw


def _floats(bits: int, mantissa_bits: int, bias: int, nan: tuple[int, ...] = ()) -> NDArray[np.float32]:
    """Return the value of each code of a small float without infinities. `nan`: the codes that are no number."""
    code, sign = np.arange(1 << bits), 1 << (bits - 1)
    steps = 1 << mantissa_bits
    exponent, mantissa = (code & (sign - 1)) // steps, code % steps / steps
    size = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    size[list(nan)] = np.nan
    return np.where(code & sign, -size, size).astype(np.float32)


_TABLES = {
    "F8_E4M3": _floats(8, 3, 7, (0x7F, 0xFF)),  # arXiv 2209.05433
    # arXiv 2206.02915: no negative zero, whose code is the one NaN
    "F8_E4M3FNUZ": _floats(8, 3, 8, (0x80,)),
    "F8_E5M2FNUZ": _floats(8, 2, 16, (0x80,)),
    # OCP Microscaling Formats 1.0, tables 4 and 5
    "F6_E2M3": _floats(6, 3, 1),
    "F4": _floats(4, 1, 1),
}


def encoded(values: NDArray[np.float64], dtype: str) -> Array:
    """Return raw bytes that `decoded` reads as these numbers, rounded to the nearest; integers are clipped."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest, ties to even
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    if dtype == "F8_E8M0":
        with np.errstate(divide="ignore", invalid="ignore"):  # it has no zero, whose logarithm is clipped
            exponents = np.clip(np.round(np.log2(values)) + 127, 0, 254)
        return np.where(np.isnan(exponents), 255, exponents).astype(np.uint8)
    if dtype in EIGHT_BITS:
        table = decoded(np.arange(256, dtype=np.uint8), dtype).astype(np.float64)
        # the finite codes in the order of their values; a number belongs to the code on its side of the midpoint
        order = np.flatnonzero(np.isfinite(table))[np.argsort(table[np.isfinite(table)])]
        middle = (table[order][1:] + table[order][:-1]) / 2
        nan = 0x80 if dtype.endswith("FNUZ") else 0x7F
        return np.where(np.isnan(values), nan, order[np.searchsorted(middle, values)]).astype(np.uint8)
    kind = np.dtype(RAW[dtype])
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return np.clip(np.round(values), info.min, info.max).astype(kind)
    return values.astype(kind)


def cast_to(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return numbers rounded to a dtype in floating point, through float32, in which libraries compute."""
    with np.errstate(over="ignore"):
        return decoded(encoded(values.astype(np.float32).astype(np.float64), dtype), dtype).astype(np.float64)


def tensors_of(path: Path) -> list[Tensor]:
    """Return the tensors of a file by its header alone.

    Raises:
        AnomalyError: it is no whole safetensors file.
        InfraError: it can't be read, or is a pointer of git-lfs.
    """
    header, base, found = _header(path)
    if (count := header.count(b'"data_offsets"')) > MOST_ENTRIES:
        what = f"its header lists {count:,} tensors, more than the {MOST_ENTRIES:,} that are read of one file"
        raise AnomalyError(f"{path}: {what}: save the checkpoint in smaller files")
    collects = gc.isenabled()
    gc.disable()  # of hundreds of thousands of entries, none of them in a cycle, collections take half of the time
    try:
        entries = json.loads(header).items()
        return [_tensor(path, name, entry, base, found) for name, entry in entries if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AnomalyError(f"{path} can't be read as safetensors: {error}; copy or download it again") from None
    finally:
        if collects:
            gc.enable()


def metadata_of(path: Path) -> Mapping[str, str]:
    """Return what the header of a file says beside its tensors, texts by name; empty for nothing.

    Raises:
        AnomalyError: it is no safetensors file.
        InfraError: it can't be read, or is a pointer of git-lfs.
    """
    try:
        return dict(json.loads(_header(path)[0]).get("__metadata__") or {})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AnomalyError(f"{path} can't be read as safetensors: {error}; copy or download it again") from None


def _header(path: Path) -> tuple[bytes, int, os.stat_result]:
    """Return the header of a file, the offset of what follows it, and what the system says of the file."""
    refuse_special(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if head == LFS_POINTER[:8]:  # text, and as a number a header of 2·10¹⁸ bytes
                raise InfraError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
            if not 0 < length <= LONGEST_HEADER:
                damaged = f"is not a safetensors file, for it begins with {head!r}: copy or download it again"
                raise AnomalyError(f"{path} {mistaken_for(head) or damaged}")
            refuse_sparse(path)
            return file.read(length), 8 + length, os.fstat(file.fileno())
    except (IsADirectoryError, FileNotFoundError) as error:  # the latter of a link to a file that is gone
        raise AnomalyError(f"{path} is no file: {error.strerror}; copy or download it again") from None
    except OSError as error:
        raise InfraError(f"{path} can't be read: {error.strerror or error}") from None


def _tensor(path: Path, name: str, entry: dict[str, Any], base: int, found: os.stat_result) -> Tensor:
    start, stop = entry["data_offsets"]
    if base + stop > found.st_size:
        what = f"{name} ends at byte {base + stop:,} of {found.st_size:,}"
        raise AnomalyError(f"{path} is cut short: {what}; copy or download it again")
    shape, dtype = tuple(map(int, entry["shape"])), str(entry["dtype"])
    if (shape and min(shape) < 0) or not 0 <= start <= stop:
        raise AnomalyError(f"{path}: {name} has the shape {list(shape)} and lies at the bytes {start:,} to {stop:,}")
    if dtype in ITEM_BYTES and (takes := prod(shape) * ITEM_BYTES[dtype]) != stop - start:
        raise AnomalyError(
            f"{path}: {name} of the shape {list(shape)} takes {takes:,} bytes, and its header gives it {stop - start:,}"
        )
    return Tensor(name, dtype, shape, path, base + int(start), base + int(stop), (found.st_ino, found.st_mtime_ns))


def element_count(tensor: Tensor) -> int:
    """Return how many elements a tensor has."""
    return prod(tensor.shape)


def decoded_rows(tensor: Tensor, rows: slice | NDArray[np.intp]) -> Matrix:
    """Return some rows of a tensor as float64."""
    return decoded(np.atleast_1d(tensor.raw())[rows], tensor.dtype).astype(np.float64)


def scale_values(tensor: Tensor) -> NDArray[np.float64]:
    """Return scales as float64; microscaling's bytes are exponents (OCP MX: E8M0)."""
    return decoded(np.asarray(tensor.raw()), "F8_E8M0") if tensor.dtype == "U8" else tensor.values()


def unpacked(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Unpack words [rows, words] into codes [rows, words · 32 // bits], the first one in the lowest bits.

    Where 32 is no multiple of the bits, a code may begin in one word and end in the next.
    """
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        codes = (words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
        return codes.astype(np.uint8).reshape(len(words), -1)
    stream = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=1, bitorder="little")
    count = stream.shape[1] // bits
    digits = stream[:, : count * bits].reshape(len(words), count, bits)
    return np.packbits(digits, axis=2, bitorder="little").reshape(len(words), count)


Group = int | tuple[int, int] | None
"""The columns that share a scale, or the rows and columns of a block; None where nothing says it."""


def spread_scales(scale: Tensor, shape: tuple[int, int], rows: slice, group: Group = None) -> Matrix:
    """Return the scale of each element of some rows of a weight, [rows, in].

    `shape`: [out, in] of the weight. The scales are one, one a row, or one a group or block of `group`.

    Raises:
        ValueError: the scales don't divide the weight evenly, and `group` doesn't say where the last ones begin.
    """
    return spread(scale_values(scale), shape, rows, group)


def spread(values: NDArray[np.float64], shape: tuple[int, int], rows: slice, group: Group = None) -> Matrix:
    """Return the scale or zero point of each element of some rows of a weight, as `spread_scales` does."""
    table = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)
    block = group if isinstance(group, tuple) else (None, group)
    return _repeated(_repeated(table, 0, shape[0], block[0])[rows], 1, shape[1], block[1])


def _repeated(table: Matrix, axis: int, length: int, step: int | None) -> Matrix:
    """Repeat the numbers along an axis for the `step` elements that share each; the last may have fewer."""
    count = table.shape[axis]
    if not count:
        raise ValueError("there are no scales")
    if step is None or count in (1, length):  # a scale for all of the axis, or for each element, whatever is declared
        step = length // count
    # Of 576 rows 5 blocks are 128 rows each and a last one of 64: dividing the lengths would make it 116.
    if step < 1 or -(-length // step) != count:
        what = "columns" if axis else "rows"
        raise ValueError(f"{count} scales for {length} {what}, and no group size that fits")
    if count in (1, length):  # no copy, which takes as long as the product with the codes
        return np.broadcast_to(table, (table.shape[0], length) if axis else (length, table.shape[1]))
    repeated = np.repeat(table, step, axis=axis)
    return repeated[:, :length] if axis else repeated[:length]

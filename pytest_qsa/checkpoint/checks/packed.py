"""Quantized weights that hold nothing: constant as a whole, or constant rows and groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..findings import Finding
from ..folder import Folder
from ..formats.declared import SCALE, Scheme, codes_of, declared
from ..tensors import FLOATS, Tensor, decoded

BUDGET = 4 << 20
"""The bytes that are read of one tensor: all of a small one, evenly spaced rows of a large one."""
_AGAIN = "pack and save the layer again"


def constant_weights(folder: Folder) -> Iterator[Finding]:
    """Yield quantized weights that are one code throughout, and rows or groups that are one code other than zero."""
    declaration = declared(folder)
    for layer, parts in folder.layers.items():
        codes = codes_of(parts)
        if codes is not None and len(codes.shape) >= 2 and 0 not in codes.shape and codes.dtype in _UNSIGNED:
            yield from _constant(layer, parts, codes, declaration.of(layer))


_UNSIGNED = {"I8": "u1", "U8": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1", "I32": "u4", "U32": "u4", "I64": "u8"}


def _constant(layer: str, parts: Mapping[str, Tensor], codes: Tensor, scheme: Scheme | None) -> Iterator[Finding]:
    bits = _bits(codes, scheme)
    words, seen = _words(codes, parts, bits)
    if (words == words.ravel()[0]).all():
        yield Finding(
            layer,
            codes.name,
            codes.file,
            f"all of it is one value, {int(words.ravel()[0]):#x}: nothing was packed",
            _AGAIN,
        )
        return
    for what, lanes in _lanes(words, scheme, bits):
        code = _constant_codes(lanes, bits)
        dead = np.flatnonzero((code >= 0) & ~np.isin(code, _zeros(codes, bits)))
        if dead.size:
            share = f"{dead.size} of {len(code)} {what}s are" if dead.size > 1 else f"{what} {dead[0]} is"
            first = f", the first {what} {dead[0]}" if dead.size > 1 else ""
            read = f" (every {seen}th row was read)" if seen > 1 else ""
            yield Finding(layer, codes.name, codes.file, f"{share} one code throughout{first}{read}", _AGAIN)
            return


def _bits(codes: Tensor, scheme: Scheme | None) -> int:
    if scheme is not None and codes.part in ("weight_packed", "qweight"):
        return scheme.bits
    return 4 if codes.dtype in ("I32", "U8") else 8


def _words(codes: Tensor, parts: Mapping[str, Tensor], bits: int) -> tuple[NDArray[Any], int]:
    """Return the words as [rows, words of a row], and the step between the rows that were read.

    A row holds what makes one output; GPTQ's and AWQ's are stored the other way around.
    """
    raw = codes.raw().view(_UNSIGNED[codes.dtype])
    raw = raw.reshape(-1, raw.shape[-1])
    step = max(1, raw.nbytes // BUDGET)
    if codes.part == "qweight":
        turned: NDArray[Any] = np.ascontiguousarray(raw[:, ::step].T)
        awq = "scales" in parts and parts["scales"].shape[-1] != raw.shape[1]
        return (_spread(turned, bits) if awq else turned), step
    return np.asarray(raw[::step]), step


def _spread(words: NDArray[Any], bits: int) -> NDArray[Any]:
    """Give each of the outputs that share AWQ's words a row of its own, its code repeated over the word."""
    rows = []
    for shift in range(0, 32, bits):
        code = (words >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
        rows.append(sum(code << np.uint32(other) for other in range(0, 32, bits)))
    return np.stack(rows, axis=1).reshape(-1, words.shape[1]).astype(np.uint32)


def _lanes(words: NDArray[Any], scheme: Scheme | None, bits: int) -> Iterator[tuple[str, NDArray[Any]]]:
    yield "row", words
    width = words.dtype.itemsize * 8 // bits
    size = scheme.group if scheme is not None and isinstance(scheme.group, int) else 0
    if size and size % width == 0 and words.shape[1] % (size // width) == 0 and size // width < words.shape[1]:
        yield "group", words.reshape(-1, size // width)


def _constant_codes(lanes: NDArray[Any], bits: int) -> NDArray[np.int64]:
    """Return the one code of each lane [lanes, words]; −1 where it has several."""
    first = lanes[:, 0]
    same = (lanes == first[:, None]).all(axis=1)
    size = lanes.dtype.itemsize * 8
    if size % bits == 0 and size > bits:
        kind = lanes.dtype.type
        turned = (first >> kind(bits)) | (first << kind(size - bits))
        same &= turned == first
        first = first & kind((1 << bits) - 1)
    return np.where(same, first.astype(np.int64), -1)


def _zeros(codes: Tensor, bits: int) -> list[int]:
    """Return the codes that stand for zero: a row of them is a dead output, which pruning makes too."""
    if codes.dtype in ("F8_E4M3", "F8_E5M2"):
        return [0x00, 0x80]
    if codes.part == "qweight":
        return [(1 << (bits - 1)) - 1, 1 << (bits - 1)]
    if codes.dtype == "U8":
        return [0, 8]
    return [1 << (bits - 1)] if codes.part == "weight_packed" else [0]


def unsound_floats(folder: Folder) -> Iterator[Finding]:
    """Yield what is kept in floating point and holds NaN or Inf, or is a matrix of one number."""
    for layer, parts in folder.layers.items():
        for tensor in parts.values():
            if tensor.dtype not in FLOATS or not tensor.shape or 0 in tensor.shape or SCALE.search(tensor.part):
                continue
            raw = tensor.raw().reshape(tensor.shape[0], -1)
            values = decoded(np.asarray(raw[:: max(1, raw.nbytes // BUDGET)]), tensor.dtype)
            bad = int(np.count_nonzero(~np.isfinite(values)))
            if bad:
                yield Finding(layer, tensor.name, tensor.file, f"{bad} elements are NaN or infinite", _SAVE)
            elif tensor.part == "weight" and min(raw.shape) > 1 and (values == values.flat[0]).all():
                yield Finding(layer, tensor.name, tensor.file, f"all of it is {values.flat[0]:g}", _SAVE)


_SAVE = "save the checkpoint again from the original"

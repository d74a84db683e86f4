"""Weights: constant codes, floats with NaN or Inf, and floats that differ from the reference's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ..folder import Finding, Folder
from ..formats.format import BUDGET, Format
from ..formats.scheme import LayerScheme
from ..tensors import FLOATS, Tensor, decoded, layer_of
from .parts import lost_parts

ROUNDING = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""The relative distance of neighbouring numbers: what writing a tensor in another dtype may change."""
PIECE = 1 << 22
"""The number of elements that are compared at a time."""
_PACK_AGAIN = "pack and save the layer again"
_SAVE_AGAIN = "save the checkpoint again from the original"
_RESTORE = "take it from the reference; a smoothing or a rotation changes it by design: then exclude it"


def constant_weights(form: Format) -> Iterator[Finding]:
    """Yield quantized weights that are one code throughout, and rows or groups that are one code other than zero.

    Raises:
        InfraError: codes have a dtype that isn't known here.
    """
    for layer in form.folder.layers:
        codes = form.codes_of(layer)
        if codes is None or len(codes.shape) < 2 or 0 in codes.shape:
            continue
        if codes.dtype not in form.word_dtypes:
            codes.raw()  # which refuses a dtype that isn't known, by its name
            continue
        try:
            yield from list(_constant(form, layer, codes))
        except (ValueError, IndexError) as error:
            yield Finding.at(codes, f"its codes can't be unpacked: {error}", _PACK_AGAIN)


def _constant(form: Format, layer: str, codes: Tensor) -> Iterator[Finding]:
    words, step = form.words(layer, codes)
    if (words == words.ravel()[0]).all():
        what = f"all of it is one value, {int(words.ravel()[0]):#x}: nothing was packed"
        yield Finding.at(codes, what, _PACK_AGAIN)
        return
    unpacked = words.dtype.itemsize < np.dtype(form.word_dtypes[codes.dtype]).itemsize
    bits = 8 if unpacked else form.code_bits(layer, codes)
    # groups too: a writer that loses the signs or the shift of one group leaves its row varied
    for noun, lanes in _lanes(words, form.scheme_of(layer), bits):
        code = _constant_codes(lanes, bits)
        dead = np.flatnonzero(code >= 0)
        dead = dead[~np.isin(code[dead], form.zero_codes(layer, codes))] if dead.size else dead
        if dead.size:
            share = f"{dead.size} of {len(code)} {noun}s are" if dead.size > 1 else f"{noun} {dead[0]} is"
            first = f", the first {noun} {dead[0]}" if dead.size > 1 else ""
            read = f" (every {step}th row was read)" if step > 1 else ""
            what = f"{share} one code throughout{first}{read}"
            yield Finding.at(codes, what, _PACK_AGAIN)
            return


def _lanes(words: Array, scheme: LayerScheme | None, bits: int) -> Iterator[tuple[str, Array]]:
    yield "row", words
    width = words.dtype.itemsize * 8 // bits
    size = scheme.group if scheme is not None and isinstance(scheme.group, int) else 0
    if size and size % width == 0 and words.shape[1] % (size // width) == 0 and size // width < words.shape[1]:
        yield "group", words.reshape(-1, size // width)


def _constant_codes(lanes: Array, bits: int) -> NDArray[np.int64]:
    """Return the one code of each lane [lanes, words]; −1 where it has several."""
    # all codes of a word are the same where rotating it by one code changes nothing
    first = lanes[:, 0]
    same = (lanes == first[:, None]).all(axis=1)
    size = lanes.dtype.itemsize * 8
    if size % bits == 0 and size > bits:
        kind = lanes.dtype.type
        turned = (first >> kind(bits)) | (first << kind(size - bits))
        same &= turned == first
        first = first & kind((1 << bits) - 1)
    return np.where(same, first.astype(np.int64), -1)


def unsound_floats(form: Format) -> Iterator[Finding]:
    """Yield tensors in floating point that hold NaN or Inf, and matrices of one number; scales have their own check."""
    own = form.adapter.layers.values() if form.adapter else ()
    for tensor in chain(form.folder.tensors.values(), *(parts.values() for parts in own)):
        if tensor.dtype not in FLOATS or not tensor.shape or 0 in tensor.shape or form.scales.search(tensor.part):
            continue
        codes = form.codes_of(tensor.layer)
        if codes is not None and codes.name == tensor.name:
            continue  # bitsandbytes and HQQ may store bytes of codes under a float dtype, where they can look like NaN
        raw = tensor.raw().reshape(tensor.shape[0], -1)
        values = decoded(np.asarray(raw[:: max(1, raw.nbytes // BUDGET)]), tensor.dtype)
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            yield Finding.at(tensor, f"{bad} elements are NaN or infinite", _SAVE_AGAIN)
        elif tensor.part == "weight" and min(raw.shape) > 1 and (values == values.flat[0]).all():
            yield Finding.at(tensor, f"all of it is {values.flat[0]:g}", _SAVE_AGAIN)


def kept_tensors(form: Format, reference: Folder) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield (layer here, reference's, own) for each tensor that both keep in floating point; None for a lost one."""
    for name, own in form.kept_names(reference).items():
        theirs, mine, layer = reference.tensors[name], form.folder.tensors.get(own), layer_of(own)
        if theirs.dtype not in FLOATS or layer not in form.folder.layers:
            continue
        quantized = theirs.part == "weight" and form.codes_of(layer) is not None
        if not quantized and (mine is None or (mine.dtype in FLOATS and 0 not in theirs.shape)):
            yield layer, theirs, mine


def changed_floats(form: Format, reference: Folder, *, rel: float) -> Iterator[Finding]:
    """Yield float tensors that are missing, of another shape, or differ by more than rel × the reference's value.

    Parts that are gone as a whole too.
    """
    yield from lost_parts(form, reference)
    for layer, theirs, mine in kept_tensors(form, reference):
        if mine is None:
            what = "missing, the reference has it"
            yield Finding(layer, theirs.name, "", what, "a loader leaves it out or fills it with random numbers")
        elif mine.shape != theirs.shape:
            size, other = ("×".join(map(str, tensor.shape)) or "scalar" for tensor in (mine, theirs))
            yield Finding.at(mine, f"shape {size}, in the reference {other}", _RESTORE)
        elif difference := _difference(mine, theirs, rel, form.added_to(mine)):
            yield Finding.at(mine, difference, _RESTORE)


def _difference(mine: Tensor, theirs: Tensor, rel: float, added: float) -> str:
    # another dtype or a sum may round every number; else the bits are the reference's
    rounded = mine.dtype != theirs.dtype or added
    allowed = max(rel, *(ROUNDING[t.dtype] for t in (mine, theirs))) if rounded else rel
    width = theirs.shape[-1] if len(theirs.shape) > 1 else 1
    one, other = mine.raw().reshape(-1, width), theirs.raw().reshape(-1, width)
    rows, first, gains = 0, -1, np.zeros(0)
    step = max(1, PIECE // width)
    for start in range(0, len(one), step):
        mine_raw, their_raw = one[start : start + step], other[start : start + step]
        if not rounded and np.array_equal(mine_raw, their_raw):
            continue
        x = decoded(np.asarray(mine_raw), mine.dtype).astype(np.float64)
        y = decoded(np.asarray(their_raw), theirs.dtype).astype(np.float64) + added
        wrong = ~(np.abs(x - y) <= allowed * np.abs(y)).all(axis=1)
        if wrong.any():
            first = first if first >= 0 else start + int(np.flatnonzero(wrong)[0])
            rows += int(wrong.sum())
            x, y = x[wrong], y[wrong]
            gains = np.concatenate([gains, (x[y != 0] / y[y != 0]).ravel()])
    if not rows:
        return ""
    noun = "rows" if width > 1 else "elements"
    return f"{rows} of {len(one)} {noun} differ from the reference's, the first {first}{_pattern(gains)}"


def _pattern(gains: NDArray[np.float64]) -> str:
    """Say what the ratios to the reference have in common: zeros, or one factor; empty for neither."""
    if not gains.size or not np.isfinite(gains).all():
        return ""
    middle = float(np.median(gains))
    if not gains.any():
        return "; they are zero"
    return f"; all are × {middle:.3g}" if np.allclose(gains, middle, rtol=0.02) and abs(middle - 1) > 0.02 else ""

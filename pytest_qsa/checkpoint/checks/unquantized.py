"""What is kept in floating point against the reference's: embeddings, norms, biases, the head."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..findings import Finding
from ..folder import Folder
from ..formats.declared import codes_of
from ..tensors import FLOATS, Tensor, decoded

ROUNDING = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""The relative distance of neighbouring numbers: what writing a tensor in another dtype may change."""
PIECE = 1 << 22
"""So many elements are compared at a time."""
_RESTORE = "take it from the reference; a smoothing or a rotation changes it by design: then exclude it"


def kept_tensors(folder: Folder, reference: Folder) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield each tensor that both keep in floating point, the reference's first, None where this one lost it."""
    for name, theirs in reference.tensors.items():
        mine = folder.tensors.get(name)
        if theirs.dtype not in FLOATS or theirs.layer not in folder.layers:
            continue
        quantized = codes_of(folder.layers[theirs.layer]) is not None and theirs.part == "weight"
        if not quantized and (mine is None or (mine.dtype in FLOATS and 0 not in theirs.shape)):
            yield theirs, mine


def changed_floats(folder: Folder, reference: Folder, *, rel: float) -> Iterator[Finding]:
    """Yield float tensors that are missing, of another shape, or differ by more than rel × the reference's value."""
    for theirs, mine in kept_tensors(folder, reference):
        if mine is None:
            what = "missing, the reference has it"
            yield Finding(theirs.layer, theirs.name, "", what, "a loader leaves it out or fills it with random numbers")
        elif mine.shape != theirs.shape:
            size, other = ("×".join(map(str, tensor.shape)) or "scalar" for tensor in (mine, theirs))
            yield Finding(mine.layer, mine.name, mine.file, f"shape {size}, in the reference {other}", _RESTORE)
        elif told := _difference(mine, theirs, rel):
            yield Finding(mine.layer, mine.name, mine.file, told, _RESTORE)


def _difference(mine: Tensor, theirs: Tensor, rel: float) -> str:
    allowed = max(rel, *(ROUNDING[t.dtype] for t in (mine, theirs))) if mine.dtype != theirs.dtype else rel
    width = theirs.shape[-1] if len(theirs.shape) > 1 else 1
    one, other = mine.raw().reshape(-1, width), theirs.raw().reshape(-1, width)
    rows, first, gains = 0, -1, np.zeros(0)
    step = max(1, PIECE // width)
    for start in range(0, len(one), step):
        mine_raw, their_raw = one[start : start + step], other[start : start + step]
        if mine.dtype == theirs.dtype and np.array_equal(mine_raw, their_raw):
            continue
        x = decoded(np.asarray(mine_raw), mine.dtype).astype(np.float64)
        y = decoded(np.asarray(their_raw), theirs.dtype).astype(np.float64)
        wrong = ~(np.abs(x - y) <= allowed * np.abs(y)).all(axis=1)
        if wrong.any():
            first = first if first >= 0 else start + int(np.flatnonzero(wrong)[0])
            rows += int(wrong.sum())
            gains = np.concatenate([gains, _gains(x[wrong], y[wrong])])
    if not rows:
        return ""
    word = "rows" if width > 1 else "elements"
    text = f"{rows} of {len(one)} {word} differ from the reference's, the first {first}"
    return text + _suspicion(gains)


def _gains(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    gains: NDArray[np.float64] = (x[y != 0] / y[y != 0]).ravel()
    return gains


def _suspicion(gains: NDArray[np.float64]) -> str:
    """Say what the numbers allow: zeros, or one factor throughout."""
    if not gains.size or not np.isfinite(gains).all():
        return ""
    middle = float(np.median(gains))
    if not gains.any():
        return "; they are zero"
    return f"; all are × {middle:.3g}" if np.allclose(gains, middle, rtol=0.02) and abs(middle - 1) > 0.02 else ""

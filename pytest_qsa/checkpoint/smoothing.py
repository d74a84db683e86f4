"""Smoothing and rotation: whether single layers of a checkpoint may differ from the original's by design.

SmoothQuant and AWQ divide a norm's output by a scale for each channel, and multiply the columns of the layers that
read it by the same scale; QuaRot and SpinQuant rotate the whole residual stream. The model's output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..common import counted
from .checks.scales import FOLDED_LAYERS
from .checks.values import ROUNDING
from .folder import Folder, natural
from .formats.format import BUDGET, Format, format_of
from .tensors import FLOATS, Matrix, Tensor, decoded_rows

MOST_NORMS = 8
"""The number of norms that are followed into the matrices which read them, evenly spaced among those that differ."""
AGREES = 0.05
"""The median |ln| by which norm × column may differ from 1: rounding to 4 bits moves a column's norm by about 2 %."""
EMBEDDING_ROWS = 64
"""The number of rows of the embeddings that are compared."""
TURNS = 4
"""How often the factors of rows and of columns are fitted in turns."""
TABLES = ("embed_tokens", "wte", "tok_embeddings")
OUTPUT_HEADS = ("lm_head", "embed_out")
Compare = Literal["layers", "blocks", "logits"]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Relation:
    """How a checkpoint differs from its original by design. `norms`: those whose weights differ; `why`: in words.

    `same`: no difference by design was found. `changed`: norms differ, and no layer compensates for it.
    """

    kind: Literal["same", "smoothed", "rotated", "changed"]
    norms: Sequence[str] = ()
    why: str = ""

    @property
    def compare(self) -> Compare:
        """What can be compared with the original: every layer, whole blocks, or only what the model predicts."""
        return {"smoothed": "blocks", "rotated": "logits"}.get(self.kind, "layers")  # type: ignore[return-value]


def compare_norms(folder: Folder, reference: Folder) -> Relation:
    """Say whether a checkpoint was smoothed or rotated, from the norms, embeddings and matrices in the files of both.

    It reads the norms, 64 rows of the embeddings and, where norms differ, at most 4 MiB of each matrix of 8 blocks. A
    suite that is drafted against a reference asks `compare_norms(…).compare`: with `layers` all of sqnr, local_sqnr and
    weight_sqnr make sense, with `blocks` sqnr at the outputs of whole blocks and the logits, with `logits` only these.

    Raises:
        AnomalyError: a file is damaged.
        InfraError: a file is missing or can't be read.
    """
    if transforms := (folder.quantization.get("transform_config") or {}).get("config_groups"):
        return Relation("rotated", (), f"its transform_config declares rotations ({', '.join(transforms)})")
    differing = [name for name in _norms(folder, reference) if _differs(folder.tensors[name], reference.tensors[name])]
    if turned := _turned(folder, reference):
        return Relation("rotated", differing, turned)
    if not differing:
        return Relation("same")
    chosen = [differing[i] for i in np.unique(np.linspace(0, len(differing) - 1, MOST_NORMS).astype(int))]
    mine, theirs = format_of(folder), format_of(reference)
    followed = [_made_up_for(mine, theirs, name) for name in chosen]
    many = f"the weights of {counted(len(differing), 'norm')} differ ({differing[0]}"
    many += ", …)" if differing[1:] else ")"
    if all(answer is None for answer in followed):
        return Relation("changed", differing, f"{many}, and the layers that read them can't be multiplied out here")
    if 2 * sum(answer is True for answer in followed) > sum(answer is not None for answer in followed):
        return Relation("smoothed", differing, f"{many}, and the columns of the layers that read them make up for it")
    return Relation("changed", differing, f"{many}, and no layer that reads them makes up for it")


def _norms(folder: Folder, reference: Folder) -> list[str]:
    """Return the names of the vectors of norms that both have, in natural order."""
    both = folder.tensors.keys() & reference.tensors.keys()
    names = (name for name in both if _is_norm(folder.tensors[name]) and _is_norm(reference.tensors[name]))
    return sorted(names, key=natural)


def _is_norm(tensor: Tensor) -> bool:
    last = tensor.layer.rpartition(".")[2].lower()
    named = "norm" in last or last.startswith("ln_")
    return named and tensor.part == "weight" and len(tensor.shape) == 1 and tensor.dtype in FLOATS


def _differs(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape:
        return False  # another model: the settings say so
    allowed = max(ROUNDING[mine.dtype], ROUNDING[theirs.dtype]) if mine.dtype != theirs.dtype else 0.0
    x, y = mine.values(), theirs.values()
    return not bool((np.abs(x - y) <= allowed * np.abs(y)).all())


def _turned(folder: Folder, reference: Folder) -> str:
    """Return which embeddings were rotated: their rows have the original's norms and another direction."""
    for name, theirs in reference.tensors.items():
        mine = folder.tensors.get(name)
        if theirs.part != "weight" or theirs.layer.rpartition(".")[2] not in TABLES or mine is None:
            continue
        if mine.shape != theirs.shape or mine.dtype not in FLOATS or theirs.dtype not in FLOATS:
            continue
        rows = np.unique(np.linspace(0, len(theirs.raw()) - 1, EMBEDDING_ROWS).astype(np.intp))
        x, y = (decoded_rows(tensor, rows) for tensor in (mine, theirs))
        lengths = np.linalg.norm(y, axis=1)
        some = lengths > 0
        moved = np.linalg.norm(x - y, axis=1)[some] / lengths[some]
        longer = np.abs(np.linalg.norm(x, axis=1)[some] / lengths[some] - 1)
        if some.any() and np.median(moved) > 0.3 and np.median(longer) < 0.02:
            return f"the rows of {theirs.layer} are as long as the original's and point elsewhere"
    return ""


def _made_up_for(mine: Format, theirs: Format, norm: str) -> bool | None:
    """Say whether the columns of a layer in the norm's block compensate its change; None if no layer can be read."""
    own, original = mine.folder.tensors[norm].values(), theirs.folder.tensors[norm].values()
    readable = False
    for layer in _readers(mine, theirs, mine.folder.tensors[norm]):
        columns = _column_ratio(mine, theirs, layer)
        if columns is None:
            continue
        readable = True
        for offset in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
            with np.errstate(all="ignore"):
                ratio = (own + offset) / (original + offset)
                change, product = np.abs(np.log(np.abs(ratio))), np.abs(np.log(np.abs(ratio * columns)))
            sound = np.isfinite(change) & np.isfinite(product)
            if sound.any() and np.median(product[sound]) < min(AGREES, 0.5 * np.median(change[sound])):
                return True
    return False if readable else None


def _readers(mine: Format, theirs: Format, norm: Tensor) -> Iterator[str]:
    """Yield the matrices of the norm's block that have an input for each of its channels; for a last norm the head."""
    block, width = norm.layer.rpartition(".")[0], norm.shape[0]
    within = any(part.isdigit() for part in block.split("."))
    for layer in mine.folder.layers:
        near = layer.startswith(f"{block}.") if within else layer.rpartition(".")[2] in OUTPUT_HEADS
        if near and all((form.weight_shape(layer) or (0, 0))[1] == width for form in (mine, theirs)):
            yield layer


def _column_ratio(mine: Format, theirs: Format, layer: str) -> Vector | None:
    """Return the norms of a layer's columns over the original's, of the same rows."""
    original = theirs.weight_of(layer)
    assert original is not None  # it has a shape
    rows = slice(None, None, max(1, (original.stop - original.start) // BUDGET))
    one, other = (form.stored_rows(layer, rows) for form in (mine, theirs))
    if one is None or other is None or one.shape != other.shape:
        return None
    with np.errstate(all="ignore"):
        ratio: Vector = np.linalg.norm(one, axis=0) / np.linalg.norm(other, axis=0)
    return ratio


class Unsmoothed:
    """The weights of a smoothed checkpoint as they would be without the smoothing, so that each fits the original.

    A norm that was divided by s has left the factors s in the columns of its readers: the norms of both tell s exactly.
    AWQ also takes factors out of the rows of a layer into the columns of the next one (`FOLDED_LAYERS`): there they are
    those of least squared error, ⟨w′, w⟩ / ⟨w, w⟩ of a column.

    `norms`: the tensors of the norms that differ. `own`, `original`: the weight [out, in] of a module in the checkpoint
    and in its original; None for none.
    """

    def __init__(
        self,
        folders: tuple[Folder, Folder],
        norms: Sequence[str],
        own: Callable[[str], Matrix | None],
        original: Callable[[str], Matrix | None],
    ) -> None:
        self._own, self._original = own, original
        self._norms = [change for name in norms for change in _changes(*(each.tensors[name] for each in folders))]
        self._fed = lru_cache(maxsize=None)(self._fed_by)
        self._columns = lru_cache(maxsize=None)(self._folded_into)

    def weight(self, module: str) -> Matrix:
        """Return the weight of a module without the factors in its columns and rows."""
        weight = self._own(module)
        assert weight is not None
        columns = self._fed(module)
        if columns is None:
            columns = self._columns(module)
        if columns is not None:
            weight = weight / columns
        parent, _, end = module.rpartition(".")
        for reader in (f"{parent}.{second}" for first, second in FOLDED_LAYERS if first == end):
            if (taken := self._columns(reader)) is not None and len(taken) == len(weight):
                weight = weight * taken[:, None]
        return weight

    def _fed_by(self, module: str) -> Vector | None:
        """Return the factors that a norm of the module's block has left in its columns; None where none has."""
        found = self._column_factors(module)
        for norm, change in self._norms:
            block = norm.rpartition(".")[0]
            if found is None or not module.startswith(f"{block}.") or len(change) != len(found):
                continue
            # Up to a constant, which rows that were divided hide.
            if _makes_up(found / np.median(found * change), change):
                return 1 / change
        return None

    def _folded_into(self, module: str) -> Vector | None:
        """Return the factors in a module's columns that the rows of the layer before it make up for; None for none."""
        parent, _, end = module.rpartition(".")
        found = self._column_factors(module)
        for before in (f"{parent}.{first}" for first, second in FOLDED_LAYERS if second == end):
            own, original = self._own(before), self._original(before)
            if (
                found is None
                or own is None
                or original is None
                or len(own) != len(found)
                or own.shape != original.shape
            ):
                continue
            fed = self._fed(before)
            if _makes_up(_column_factors((own if fed is None else own / fed).T, original.T), found):
                return found
        return None

    def _column_factors(self, module: str) -> Vector | None:
        own, original = self._own(module), self._original(module)
        if own is None or original is None or own.shape != original.shape:
            return None
        return _column_factors(own, original)


def _changes(own: Tensor, original: Tensor) -> Iterator[tuple[str, Vector]]:
    """Yield by what a norm multiplies more than the original's; Gemma's multiply by 1 + weight."""
    x, y = own.values(), original.values()
    for offset in (0.0, 1.0):
        some = (x + offset != 0) & (y + offset != 0)
        yield own.layer, np.divide(x + offset, y + offset, out=np.ones(len(x)), where=some)


def _column_factors(own: Matrix, original: Matrix) -> Vector:
    """Return the factor of each column that makes the original most like a weight, whatever factors its rows have.

    Those of rows and of columns are fitted in turns; the median of the rows' is 1.
    """
    rows, columns = np.ones((len(own), 1)), np.ones(own.shape[1])
    for _ in range(TURNS):
        rows = _least_squares((own / columns).T, original.T)[:, None]
        rows /= np.median(rows)
        columns = _least_squares(own / rows, original)
    return columns


def _least_squares(own: Matrix, original: Matrix) -> Vector:
    """Return ⟨w′, w⟩ / ⟨w, w⟩ of each column; 1 where it holds zeros, or nothing of the original."""
    power, product = (original * original).sum(0), (own * original).sum(0)
    factors: Vector = np.divide(product, power, out=np.ones(len(power)), where=(power > 0) & (product > 0))
    return factors


def _makes_up(factors: Vector, change: Vector) -> bool:
    """Say whether factors undo a change, but for rounding."""
    with np.errstate(all="ignore"):
        moved, left = np.abs(np.log(np.abs(change))), np.abs(np.log(np.abs(factors * change)))
    sound = np.isfinite(moved) & np.isfinite(left)
    return bool(sound.any()) and bool(np.median(left[sound]) < min(AGREES, 0.5 * np.median(moved[sound])))

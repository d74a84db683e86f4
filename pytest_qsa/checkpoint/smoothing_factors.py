"""Smoothing factors: what a smoothing has moved from norms and rows into the columns of the layers that read them.

SmoothQuant and AWQ divide a norm's output by a scale for each channel, and multiply the columns of the layers that
read it by the same scale. The model's output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..common import AnomalyError
from .checks.scales import FOLDED_LAYERS
from .folder import NUMBER, Folder
from .formats.format import Format
from .row_orders import heads_of
from .tensors import Matrix

MOST_NORMS = 8
"""The number of norms that are followed into the matrices which read them, evenly spaced among those that differ."""
AGREES = 0.05
"""The median |ln| by which norm × column may differ from 1: rounding to 4 bits moves a column's norm by about 2 %."""
FIRST_ROWS = 64
"""The rows of a layer that are looked at first, where no norm differs."""
ROWS_OF_FACTORS = 256
"""About how many rows tell the factors that a smoothing has left in the columns of a layer."""
MOST_MOVED = np.log(256)
"""The most that a smoothing moves between two layers, in the median; AWQ moves a factor of 10 in a layer of SmolLM2."""
HALVED = 0.5
"""What is left of a change that was made up for, at most; the rest may be rounding."""
MOST_APART = 3.0
"""No channel counts for more than this |ln|, whatever its noise."""
LEAST_MOVED = 0.005
"""The share of channels that a smoothing moves at least."""
TURNS = 4
"""How often the factors of rows and of columns are fitted in turns."""
CROSSED_LAYERS = ("k_proj", "q_proj")
"""The layers of which a smoothing of the KV cache divides the rows of one and multiplies those of the other."""
Vector = NDArray[np.float64]
Rows = Callable[[str, slice], Matrix | None]
"""A module, and which rows of its weight → these rows [rows, in]; None where they can't be read."""


def readable_rows(form: Format, layer: str, rows: slice) -> Matrix | None:
    """Return rows of a layer's matrix in the files; None where they can't be read, or their tensors don't fit."""
    try:
        return form.stored_rows(layer, rows) if len(form.weight_shape(layer) or ()) == 2 else None
    except AnomalyError:  # tensors that are lost or don't fit have findings of their own
        return None


class _Norm(NamedTuple):
    """A norm of a block. `rest`: its name without the block's; `offset`: what its weight is added to."""

    rest: str
    offset: float


class Smoothing:
    """The factors that a smoothing has moved between the layers of a checkpoint, found beside its original.

    A norm that was divided by s has left the factors s in the columns of its readers: the norms of both tell s exactly.
    AWQ also takes factors out of the rows of a layer into the columns of the next one (`FOLDED_LAYERS`), and others out
    of the rows of k_proj into those of q_proj. Those are the factors of least squared error, ⟨w′, w⟩ / ⟨w, w⟩. Where
    nothing undoes a factor, it is no smoothing and stays.

    `norms`: the tensors of the norms that differ. `own`, `original`: rows of the weight [out, in] of a module in the
    checkpoint and in its original; None for none. `shape`: that of a module in the original. `most`: about how many of
    its rows are read to find the factors of its columns; all for None. `rotated`: a norm's factors went into matrices
    that were turned afterwards, of which only the whole size is left (`octaves`).
    """

    def __init__(
        self,
        folders: tuple[Folder, Folder],
        norms: Sequence[str],
        own: Rows,
        original: Rows,
        shape: Callable[[str], Sequence[int] | None],
        most: int | None = None,
        *,
        rotated: bool = False,
    ) -> None:
        self._rotated = rotated
        self._own, self._original, self._shape, self._most = own, original, shape, most
        self._settings = folders[1].text_config
        self._norms: dict[str, dict[_Norm, Vector]] = {}
        for name in norms:
            block, rest = _in_block(name.removesuffix(".weight"))
            for offset in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
                change = ratio_of(*(each.tensors[name].values() + offset for each in folders))
                self._norms.setdefault(block, {})[_Norm(rest, offset)] = change
        self._source = lru_cache(maxsize=None)(self._norm_before)
        self._fed = lru_cache(maxsize=None)(self._fed_by)
        self._folded = lru_cache(maxsize=None)(self._folded_into)
        self._crossed = lru_cache(maxsize=None)(self._made_up_across)

    @classmethod
    def between(cls, mine: Format, theirs: Format, norms: Sequence[str]) -> Smoothing:
        """Return that of a checkpoint whose layers have the names of the original's, from a few rows of each."""
        own, original = partial(readable_rows, mine), partial(readable_rows, theirs)
        return cls((mine.folder, theirs.folder), norms, own, original, theirs.weight_shape, ROWS_OF_FACTORS)

    def is_larger(self, module: str) -> bool:
        """Say whether the first rows of a module are of other sizes than the original's."""
        factors = self._row_factors(module, slice(0, FIRST_ROWS))
        return factors is not None and bool(_moved(factors).any())

    def is_fed(self, module: str, change: Vector) -> bool:
        """Say whether the columns of a module make up for the change of a norm, whatever its rows were divided by."""
        found = self._column_factors(module)
        if found is None or len(found) != len(change):
            return False
        return _spread(found * change) < min(AGREES, HALVED * _spread(found))

    def undone(self, module: str) -> Matrix:
        """Return the weight of a module without the factors in its columns and rows."""
        weight = self._own(module, slice(None))
        assert weight is not None
        columns, divisors = self.columns(module), self.divisors(module)
        weight = weight if columns is None else weight / columns
        return weight if divisors is None or len(divisors) != len(weight) else weight * divisors[:, None]

    def applied(self, module: str, rows: slice) -> Matrix | None:
        """Return rows of the original's weight with the factors that the checkpoint's has; None for none."""
        weight = self._original(module, rows)
        if weight is None:
            return None
        columns, divisors = self.columns(module), self.divisors(module)
        weight = weight if columns is None or len(columns) != weight.shape[1] else weight * columns
        return weight if divisors is None else weight / divisors[rows, None]

    def columns(self, module: str) -> Vector | None:
        """Return the factors in a module's columns, of a norm or of the layer before it; None where there are none."""
        fed = self._fed(module)
        return self._folded(module) if fed is None else fed

    def divisors(self, module: str) -> Vector | None:
        """Return what a module's rows were divided by, which the next layer makes up for; None for nothing."""
        parent, _, end = module.rpartition(".")
        for reader in (f"{parent}.{second}" for first, second in FOLDED_LAYERS if first == end):
            if (taken := self._folded(reader)) is None or (shared := self._by_row(taken, module)) is None:
                continue
            found: Vector = np.median(shared, axis=0)
            return found
        return self._crossed(module)

    def partner(self, module: str) -> str:
        """Return the layer of whose rows a module's factors are, which may as well be the one at fault; or none."""
        parent, _, end = module.rpartition(".")
        if self._fed(module) is None and self._folded(module) is not None:
            pairs: Sequence[tuple[str, str]] = FOLDED_LAYERS
        else:
            pairs = (CROSSED_LAYERS,) if self._crossed(module) is not None else ()
        return next((f"{parent}.{first}" for first, second in pairs if second == end), "")

    def _fed_by(self, module: str) -> Vector | None:
        """Return the factors that a norm of the module's block has left in its columns; None where none has."""
        block, rest = _in_block(module)
        norms = self._norms.get(block, {})
        source = self._source(rest) if norms else None
        return None if source is None or source not in norms else 1 / norms[source]

    def _norm_before(self, rest: str) -> _Norm | None:
        """Return which norm of its block the layers of a kind read, by the columns of a few; None for none of them.

        Of one layer alone it can't be said: a norm may be divided by nearly the same number in all channels.
        """
        blocks = [each for each in self._norms if self._shape(each + rest) is not None]
        apart: dict[_Norm | None, float] = {None: 0.0}
        for block in (blocks[i] for i in np.unique(np.linspace(0, len(blocks) - 1, MOST_NORMS).astype(int)) if blocks):
            if (distance := self._distance(block + rest)) is None:
                continue
            columns = (self._shape(block + rest) or (0, 0))[1]
            changes = {norm: change for norm, change in self._norms[block].items() if len(change) == columns}
            inside = [norm for norm in changes if rest.startswith(norm.rest.rpartition(".")[0] + ".")]
            known = apart.keys() | {*inside}
            apart = {
                norm: apart.get(norm, apart[None]) + distance(changes[norm] if norm in inside else np.ones(columns))
                for norm in known
            }
        best = min(apart, key=lambda norm: apart[norm])
        return best if apart[best] < HALVED * apart[None] else None

    def _distance(self, module: str) -> Callable[[Vector], float] | None:
        """Return what says how far a module is from the original's where it read a norm with a change."""
        if not self._rotated:
            found = self._column_factors(module)
            return None if found is None else lambda change: _spread(found * change)
        own, original = self._some(module)
        if own is None or original is None:
            return None
        return lambda change: abs(float(np.log2(_rms(own) / _rms(original / change))))

    def octaves(self, module: str) -> float | None:
        """Return log₂ of the rms of a rotated weight over the original's with its norm's factors; None for none."""
        own, original = self._some(module)
        if own is None or original is None:
            return None
        columns = self._fed(module)
        with np.errstate(all="ignore"):
            return float(np.log2(_rms(own) / _rms(original if columns is None else original * columns)))

    def _some(self, module: str) -> tuple[Matrix | None, Matrix | None]:
        """Return the same rows of a module in the checkpoint and in its original, with one shape; else None."""
        sample = self._sample(module)
        own, original = self._own(module, sample), self._original(module, sample)
        fit = own is not None and original is not None and own.shape == original.shape
        return (own, original) if fit else (None, None)

    def _folded_into(self, module: str) -> Vector | None:
        """Return the factors in a module's columns that the rows of the layer before it make up for; None for none."""
        parent, _, end = module.rpartition(".")
        for before in (f"{parent}.{first}" for first, second in FOLDED_LAYERS if second == end):
            sample = self._sample(before)
            given = self._row_factors(before, sample)
            found = self._column_factors(module) if given is not None and _moved(given).any() else None
            shared = None if found is None else self._by_row(found, before)
            if given is None or found is None or shared is None:
                continue
            left = _left(np.tile(given, len(shared)), shared[:, sample].ravel())
            if left is not None:
                return found / left
        return None

    def _made_up_across(self, module: str) -> Vector | None:
        """Return what the rows of a k_proj were divided by where those of its q_proj make up for it, or the reverse."""
        parent, _, end = module.rpartition(".")
        if end not in CROSSED_LAYERS:
            return None
        keys, queries = (f"{parent}.{each}" for each in CROSSED_LAYERS)
        some = self._row_factors(keys, self._sample(keys))
        if some is None or not _moved(some).any():
            return None
        of_keys, of_queries = (self._row_factors(each, slice(None)) for each in (keys, queries))
        shared = None if of_queries is None else self._by_row(of_queries, keys)
        if of_keys is None or of_queries is None or shared is None:
            return None
        left = _left(np.tile(of_keys, len(shared)), shared.ravel())
        if left is None:
            return None
        return 1 / of_keys if module == keys else left / of_queries

    def _by_row(self, factors: Vector, module: str) -> Matrix | None:
        """Return factors of channels by the module's rows, [g, rows], of which a head is read by g heads.

        None where they don't fit.
        """
        rows = (self._shape(module) or (0,))[0]
        several, head = len(factors) // max(rows, 1), heads_of(self._settings, rows)
        if len(factors) == rows:
            return factors[None]
        if len(factors) != several * rows or not head:
            return None
        return factors.reshape(-1, several, head).swapaxes(0, 1).reshape(several, rows)

    def _sample(self, module: str) -> slice:
        """Return which rows of a module are read to find the factors of its columns."""
        shape = self._shape(module)
        return slice(None, None, max(1, shape[0] // self._most) if shape and self._most else 1)

    def _row_factors(self, module: str, rows: slice) -> Vector | None:
        """Return by which each row is larger than the original's, apart from what a norm left in the columns."""
        own, original = self._own(module, rows), self._original(module, rows)
        if own is None or original is None or own.shape != original.shape:
            return None
        columns = self._fed(module)
        return _least_squares(own.T, (original if columns is None else original * columns).T)

    def _column_factors(self, module: str) -> Vector | None:
        own, original = self._some(module)
        return None if own is None or original is None else _column_factors(own, original)


def _in_block(name: str) -> tuple[str, str]:
    """Return the block that a layer lies in and the rest of its name: `model.layers.3` and `.mlp.up_proj`."""
    found = NUMBER.search(name)
    return (name[: found.end()], name[found.end() :]) if found else ("", name)


def ratio_of(x: Vector, y: Vector) -> Vector:
    """Return x / y; 1 where one of both is 0."""
    found: Vector = np.divide(x, y, out=np.ones(len(x)), where=(x != 0) & (y != 0))
    return found


def _rms(weight: Matrix) -> float:
    return float(np.sqrt(np.mean(np.square(weight))))


def _spread(factors: Vector) -> float:
    """Return the mean distance of ln |factors| from their median: 0 where they are one number, ∞ where most are 0."""
    with np.errstate(all="ignore"):
        logarithms = np.log(np.abs(factors))
    sound = logarithms[np.isfinite(logarithms)]
    if 2 * sound.size <= len(factors):
        return np.inf
    return float(np.abs(sound - np.median(sound)).clip(max=MOST_APART).mean())


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


def makes_up(factors: Vector, change: Vector) -> bool:
    """Say whether factors undo a change, but for rounding, in the channels that it moves."""
    with np.errstate(all="ignore"):
        moved, left = np.abs(np.log(np.abs(change))), np.abs(np.log(np.abs(factors * change)))
    sound = np.isfinite(moved) & np.isfinite(left)
    sound &= _moved(change) | (not (sound & _moved(change)).any())
    return bool(sound.any()) and bool(np.median(left[sound]) < min(AGREES, HALVED * np.median(moved[sound])))


def _left(factors: Vector, change: Vector) -> float | None:
    """Return the factor that is left where others undo a change: 1 but for a fault; None where they don't undo it."""
    with np.errstate(divide="ignore"):
        if np.median(np.abs(np.log(np.abs(change)))) > MOST_MOVED:
            return None
    if makes_up(factors, change):
        return 1.0
    if _spread(factors * change) < min(AGREES, HALVED * _spread(change)):
        return float(np.median(factors * change))
    return None


def _moved(factors: Vector) -> NDArray[np.bool_]:
    """Say which factors are more than rounding leaves: none where these are a few of very many."""
    with np.errstate(all="ignore"):
        found: NDArray[np.bool_] = np.abs(np.log(np.abs(factors))) > AGREES
    return found if found.mean() >= LEAST_MOVED else np.zeros_like(found)

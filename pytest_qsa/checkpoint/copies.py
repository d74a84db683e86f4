"""Copies and permutations: weights that are the reference's, of another layer, in another order or times a factor.

Rows are sampled first. What a sample suggests is then confirmed on all rows, so that a suspicion is never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..common import QsaError, logger
from .files import Files
from .folder import NUMBER
from .row_orders import Order, heads_of, named_order
from .weight_statistics import Singles
from .weights import StoredWeight, paired_weights, stored_weights

SEED = 20261129
LEAST_ROWS = 64
"""The rows of a matrix that are sampled, or every 32nd where these are more, so that each head has some."""
COLUMNS = 64
"""The columns of a row that are sampled: rows that have nothing in common correlate by about ± 1/8."""
ALIKE = 0.8
"""Above this correlation two sampled rows are one row, quantized: 2 bits leave 0.9, 4 bits 0.99."""
CONFIRMED = 0.85
"""The mean correlation over all rows from which two matrices are one."""
TIED = 0.01
"""A row that is its own but for less than this correlation has not moved: the reference may have it twice."""
MATCHED = 0.9
"""The share of the sampled rows that have to be found."""
LEAST_FACTOR = 0.02
"""A factor this close to 1 is what rounding and clipping may leave."""
SAME_VALUES = 2.0**-6
"""The relative distance of a vector's elements that another dtype may leave."""
RANK_ROWS = 256
"""The rows and columns of a difference whose rank is counted."""
FULL_RANK = 0.75
"""From this share of the dimensions that noise fills, a difference is noise."""
ABOVE_NOISE = 12.0
"""Above this multiple of the median, an eigenvalue is no noise: the largest of noise is 6 × the median."""
GAP = 4.0
"""The ratio of two eigenvalues in a row where the rank ends."""
IN_FEW = 0.5
"""The share of a difference that these eigenvalues hold, where it is of low rank."""
NEIGHBOURS_ALIKE = 0.5
"""From this mean correlation of neighbouring columns a difference is a shift of groups, as by a zero point."""
TOUCHED = 1e-4
"""The share of the largest energy from which a row or a column counts as changed: an adapter changes most of them."""
LEAST_DIFFERENCE = 1e-6
"""The share of the energy from which a difference is looked at."""
MOST_ELEMENTS = 1 << 26
"""The elements of the largest matrix in which an order of rows is looked for: it is held in memory."""


@dataclass(frozen=True)
class Resemblance:
    """What a weight of the checkpoint is in the reference.

    `source`: the layer of the reference under its name here; the layer itself where the weight is its own. `order`: how
    its rows or columns are moved; `places`: from where each comes. `factor`: what multiplies all of it. `rank`: that of
    the difference, where it is low.
    """

    layer: str
    source: str
    order: Order | None = None
    factor: float = 1.0
    rank: int = 0
    places: Sequence[int] = ()

    @property
    def own(self) -> bool:
        """Whether nothing is odd: it is the reference's, quantized."""
        return self.source == self.layer and self.order is None and self.factor == 1 and not self.rank


class _Sample(NamedTuple):
    """Some rows of a weight [n, in], and some columns of these [n, C]."""

    rows: Singles
    values: Singles


class _Fit(NamedTuple):
    """How all rows of two matrices fit: the mean correlation of a row, and the factor that explains most."""

    correlation: float
    factor: float


@dataclass(eq=False)
class Recognizer:
    """Recognizes the weights of a checkpoint in its reference; remembers each that was asked for."""

    files: Files
    _found: dict[str, Resemblance | None] = field(default_factory=dict)
    _samples: dict[tuple[bool, str], Singles | None] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Mapping[str, StoredWeight]:
        """The checkpoint's weights by layer."""
        return stored_weights(self.files)

    @cached_property
    def pairs(self) -> Mapping[str, StoredWeight]:
        """The reference's weights by the name of the layer here: those that it has, in the shape of this one."""
        pairs = paired_weights(self.files, self.weights)
        return {layer: pair for layer, pair in pairs.items() if pair.shape and pair.shape == self.weights[layer].shape}

    def find(self, layer: str) -> Resemblance | None:
        """Return what a layer's weight is; None where it is nothing that is known here.

        What can't be read, or has no weight of its shape in the reference, counts as the reference's own.
        """
        if layer not in self._found:
            try:
                known = layer in self.pairs and not self.weights[layer].problem and not self.pairs[layer].problem
                with np.errstate(all="ignore"):  # NaN and Inf have checks of their own, and are like nothing
                    self._found[layer] = self._search(layer) if known else Resemblance(layer, layer)
            except QsaError as error:  # damaged files: the static checks say so
                logger.debug("what %s is like can't be said: %s", layer, error)
                self._found[layer] = Resemblance(layer, layer)
        return self._found[layer]

    def _search(self, layer: str) -> Resemblance | None:
        mine, theirs = self._sample(layer), self._sample(layer, reference=True)
        assert mine is not None  # it is no problem to read
        assert theirs is not None
        if not self.weights[layer].matrix:
            return self._vector(layer, mine, theirs)
        likeness = _correlations(mine, theirs)
        wrong = likeness < ALIKE
        if not wrong.any() or float(np.mean(likeness < -ALIKE)) >= MATCHED:  # its own, or its own with other signs
            return self._scaled(layer, mine, theirs)
        if not mine.any():
            return None
        return self._elsewhere(layer, mine) or self._moved(layer, wrong) or self._added(layer, mine, theirs)

    def _sample(self, layer: str, *, reference: bool = False) -> Singles | None:
        """Return sampled rows and columns of a layer's weight [n, C], of a vector all of it; None if unreadable."""
        key = reference, layer
        if key not in self._samples:
            weight = (self.pairs if reference else self.weights)[layer]
            sample = None if weight.problem else _sampled(weight).values
            self._samples[key] = sample
        return self._samples[key]

    def _vector(self, layer: str, mine: Singles, theirs: Singles) -> Resemblance | None:
        if _equal(mine, theirs):
            return Resemblance(layer, layer)
        same = [
            each
            for each in self._kin(layer)
            if (other := self._sample(each, reference=True)) is not None and _equal(mine, other)
        ]
        if same and mine.size > 1 and np.ptp(mine) > 0:
            return Resemblance(layer, same[0])
        some = theirs != 0
        ratios = mine[some] / theirs[some]
        factor = float(np.median(ratios)) if ratios.size else 1.0
        found = factor != 0 and abs(factor - 1) > LEAST_FACTOR and _equal(mine, theirs * np.float32(factor))
        return Resemblance(layer, layer, factor=factor) if found else None

    def _scaled(self, layer: str, mine: Singles, theirs: Singles) -> Resemblance:
        """Return the layer times a factor or with an addition, where one explains most of how it differs."""
        if _factor(_products(mine, theirs)) == 1:
            return self._added(layer, mine, theirs) or Resemblance(layer, layer)
        parts = zip(self.weights[layer].parts(), self.pairs[layer].parts(), strict=True)
        products = np.sum([_products(mine, theirs) for mine, theirs in parts], axis=0)
        return Resemblance(layer, layer, factor=_factor(products))

    def _added(self, layer: str, mine: Singles, theirs: Singles) -> Resemblance | None:
        """Return the layer with the rank of what was added to it, where it is low, as that of an adapter is."""
        difference = mine - theirs
        if np.vdot(difference, difference) <= LEAST_DIFFERENCE * np.vdot(theirs, theirs) or _is_noise(difference):
            return None
        weight, pair = self.weights[layer], self.pairs[layer]
        one, other = (_sampled(each, RANK_ROWS).rows for each in (weight, pair))
        columns = np.ascontiguousarray((one - other).T)
        few = any(np.mean(sums > TOUCHED * sums.max()) < 0.5 for sums in (np.sum(columns**2, axis=i) for i in (0, 1)))
        if few or float(np.mean(_correlations(columns[:-1], columns[1:]))) >= NEIGHBOURS_ALIKE:
            return None
        rank = _low_rank(columns[_columns(weight.table, RANK_ROWS)])
        return Resemblance(layer, layer, rank=rank) if rank > 1 else None

    def _elsewhere(self, layer: str, mine: Singles) -> Resemblance | None:
        """Return the other layer whose matrix it is, of its block or in its place of another block."""
        likest, most = "", ALIKE
        for each in self._kin(layer):
            other = self._sample(each, reference=True)
            if other is not None and (likeness := float(np.mean(_correlations(mine, other)))) > most:
                likest, most = each, likeness
        if not likest:
            return None
        fit = _fit(self.weights[layer], self.pairs[likest])
        return Resemblance(layer, likest, factor=fit.factor) if fit.correlation >= CONFIRMED else None

    def _kin(self, layer: str) -> Iterator[str]:
        """Yield the layers of its shape that are in its block, or have its place in another one."""
        own, shape = place_of(layer), self.weights[layer].shape
        for each in self.pairs:
            other = place_of(each)
            near = own.block and other.before == own.before and (other.block == own.block or other.rest == own.rest)
            if near and each != layer and self.weights[each].shape == shape:
                yield each

    def _moved(self, layer: str, wrong: NDArray[np.bool_]) -> Resemblance | None:
        """Return how the rows of the layer's own matrix were moved, or its columns."""
        weight, pair = self.weights[layer], self.pairs[layer]
        rows, columns = weight.table
        if rows * columns > MOST_ELEMENTS:
            return None
        mine, theirs = _sampled(weight), _sampled(pair)
        whole = np.concatenate(list(pair.parts()))
        taken = _columns(weight.table)
        few = np.flatnonzero(wrong)[:LEAST_ROWS]
        if _matches(mine.values[few], whole[:, taken]):
            own = np.concatenate([part[:, taken] for part in weight.parts()])
            order = _order_of(own, whole[:, taken])
            if order is not None and _fit(weight, pair, whole[order]).correlation >= CONFIRMED:
                heads = heads_of(self.files.folder.text_config, rows)
                return Resemblance(layer, layer, named_order(order, heads, "rows"), places=tuple(order.tolist()))
        if len(mine.rows) >= LEAST_ROWS and _matches(mine.rows.T[:LEAST_ROWS], theirs.rows.T):
            order = _order_of(mine.rows.T, theirs.rows.T)
            if order is not None and _fit(weight, pair, whole[:, order]).correlation >= CONFIRMED:
                heads = heads_of(self.files.folder.text_config, columns)
                return Resemblance(layer, layer, named_order(order, heads, "columns"), places=tuple(order.tolist()))
        turned = rows == columns and _fit(weight, pair, np.ascontiguousarray(whole.T)).correlation >= CONFIRMED
        return Resemblance(layer, layer, Order("transposed")) if turned else None


@lru_cache(maxsize=4)  # of the same files: each layer is looked at once for all assertions
def recognizer_of(files: Files) -> Recognizer:
    """Return what recognizes the weights of these files in their reference."""
    return Recognizer(files)


class Place(NamedTuple):
    """Where a layer stands: `model.layers.`, the block's number (empty for none), `.mlp.up_proj`."""

    before: str
    block: str
    rest: str


@lru_cache(maxsize=1 << 16)
def place_of(layer: str) -> Place:
    """Return where a layer stands."""
    found = NUMBER.search(layer)
    return Place(layer[: found.start()], found[0], layer[found.end() :]) if found else Place(layer, "", "")


def resemblances(files: Files, layers: Iterable[str]) -> dict[str, Resemblance | None]:
    """Return what the weights of some layers, and of all below them, are in the reference: without those in order.

    None for a weight that is unlike its own in the reference and nothing else that is known here.
    """
    recognizer, wanted = recognizer_of(files), tuple(layers)
    inside = tuple(f"{layer}." for layer in wanted)
    named = set(wanted)
    chosen = [layer for layer in recognizer.weights if layer in named or layer.startswith(inside)]
    found = {layer: recognizer.find(layer) for layer in chosen}
    return {layer: each for layer, each in found.items() if each is None or not each.own}


def _step(rows: int, least: int) -> int:
    """Return an odd distance of the sampled rows: it meets every place in a head, whose rows are an even number."""
    step = max(1, rows // max(least, rows // 32))
    return step - 1 if step > 1 and step % 2 == 0 else step


def _columns(table: tuple[int, int], most: int = COLUMNS) -> NDArray[np.intp]:
    generator = np.random.default_rng([SEED, *table])
    return np.sort(generator.permutation(table[1])[:most])


def _sampled(weight: StoredWeight, least: int = LEAST_ROWS) -> _Sample:
    rows, _ = weight.table
    if not weight.matrix:
        values = np.concatenate(list(weight.parts()))
        return _Sample(values, values)
    step = _step(rows, least)
    first = int(np.random.default_rng([SEED, rows]).integers(step))
    found = weight.form.rows(weight.layer, slice(first, None, step))
    assert found is not None  # it is no problem to read
    values = found.astype(np.float32)
    return _Sample(values, values[:, _columns(weight.table)])


def _normalized(rows: Singles) -> Singles:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _correlations(one: Singles, other: Singles) -> NDArray[np.float64]:
    """Return the correlation of each row with the other's, about 0; 1 where both are zeros."""
    squares = np.einsum("ij,ij->i", one, one) * np.einsum("ij,ij->i", other, other).astype(np.float64)
    product = np.einsum("ij,ij->i", one, other) / np.sqrt(np.where(squares > 0, squares, 1))
    blank = squares == 0
    if blank.any():
        product[blank] = ~one[blank].any(axis=1) & ~other[blank].any(axis=1)
    found: NDArray[np.float64] = np.nan_to_num(product, nan=-1.0)
    return found


def _equal(one: Singles, other: Singles) -> bool:
    return bool((np.abs(one - other) <= SAME_VALUES * np.abs(other)).all())


def _products(mine: Singles, theirs: Singles) -> NDArray[np.float64]:
    """Return Σx², Σx·y and Σy², x the reference's."""
    return np.array([np.vdot(theirs, theirs), np.vdot(theirs, mine), np.vdot(mine, mine)], dtype=np.float64)


def _factor(products: NDArray[np.float64]) -> float:
    """Return the factor of least squares; 1 where it doesn't explain most of the difference."""
    signal, product, own = products.tolist()
    if not signal > 0 or not np.isfinite(products).all():
        return 1.0
    factor = product / signal
    left = max(0.0, own - factor * product)
    return factor if abs(factor - 1) > LEAST_FACTOR and (factor - 1) ** 2 * signal > left else 1.0


def _fit(weight: StoredWeight, pair: StoredWeight, ordered: Singles | None = None) -> _Fit:
    """Compare all rows of a weight with the reference's. `ordered`: the reference's rows, where they were moved."""
    products, total, start = np.zeros(3), 0.0, 0
    theirs = iter(()) if ordered is not None else pair.parts()
    for mine in weight.parts():
        other = next(theirs) if ordered is None else ordered[start : start + len(mine)]
        total += float(_correlations(mine, other).sum())
        products += _products(mine, other)
        start += len(mine)
    return _Fit(total / start, _factor(products))


def _matches(few: Singles, all_rows: Singles) -> bool:
    """Say whether nearly all of a few rows are found among all."""
    found = (_normalized(few) @ _normalized(all_rows).T).max(axis=1)
    return bool(np.mean(found >= ALIKE) >= MATCHED)


def _order_of(mine: Singles, theirs: Singles) -> NDArray[np.intp] | None:
    """Return the reference's row that each row is; a row that is its own stays. None where it is no permutation.

    None as well where each stays: then it isn't the order that is another one.
    """
    one, other, order = _normalized(mine), _normalized(theirs), np.arange(len(mine))
    for start in range(0, len(one), 1024):
        likeness = one[start : start + 1024] @ other.T
        best, at = likeness.argmax(axis=1), np.arange(len(likeness))
        moved = likeness[at, best] > likeness[at, start + at] + TIED
        order[start : start + 1024][moved] = best[moved]
    anywhere = (order != np.arange(len(order))).any()
    return order if anywhere and len(np.unique(order)) == len(order) else None


def _even(difference: Singles) -> Singles:
    """Return it with columns and then rows of one size: the sizes of scales leave its rank as it is."""
    even = difference / np.maximum(np.sqrt(np.mean(difference**2, axis=0)), np.finfo(np.float32).tiny)
    return _normalized(even)


def _is_noise(difference: Singles) -> bool:
    """Say whether a difference fills the dimensions of noise: (Σλ)² / Σλ² of n × C of it is n·C / (n + C)."""
    even = _even(difference)
    gram = even.T @ even
    rows, columns = difference.shape
    filled = np.trace(gram) ** 2 / max(np.vdot(gram, gram), np.finfo(np.float32).tiny)
    return bool(filled >= FULL_RANK * rows * columns / (rows + columns))


def _low_rank(difference: Singles) -> int:
    """Return the rank of what is in a difference beside noise; 0 where most of it is noise."""
    even = _even(difference)
    gram = even @ even.T if len(even) < even.shape[1] else even.T @ even
    if not np.isfinite(gram).all():  # a scale is NaN, say: no eigenvalue can be computed
        return 0
    values = np.sort(np.linalg.eigvalsh(gram))[::-1]
    above = values[values > ABOVE_NOISE * max(np.median(values), 1e-6 * values[0])]  # float32 leaves 1e-7
    if not 0 < len(above) <= len(values) // 4 or above.sum() < IN_FEW * values.sum():
        return 0
    ends = np.flatnonzero(above >= GAP * values[1 : len(above) + 1])
    return int(ends[-1]) + 1 if ends.size else len(above)

"""The statistics of a weight in numpy: one reduction each, found by the statistic's name and fed with rows.

A weight [out, in] is one population whose tokens are its rows; one that is no matrix, [n], is one row without a token
axis. The engine reduces loaded weights by compiled kernels and by torch's operators; these reductions are the oracle of
both, and all that weights read from files need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..captures import (
    CODES,
    ERROR,
    FIRST_CODE,
    GAIN,
    SHIFT,
    TOP_NAMES,
    UNKNOWN,
    Array,
    FeatureCounts,
    HeatMap,
    Massive,
    QuantizationPowers,
    SiteNumbers,
    Statistic,
    bin_values,
    cell_size,
    ranks_of,
)
from ..metrics import (
    CARRIED_SIGMAS,
    FAINT,
    FEW_SIGMAS,
    LARGEST_CODE,
    LEAST_ROOM,
    MOST_ROOM,
    ROOM_SIGMAS,
    UNEXPLAINED,
    rounded_to,
)
from .formats.scheme import ScaleGroups

Arrays = dict[str, Array]
Singles = NDArray[np.float32]
PATTERNS = 1 << 15
"""The 16-bit patterns of |x|."""
COLUMNS_AT_ONCE = 64
"""How many columns are counted together: a table of counts of all of them would be larger than the weight."""


@dataclass(frozen=True, eq=False)
class WeightRows:
    """Successive rows of a weight, [R, C], from row `start` on; what several reductions need is computed once.

    `dtype`: the dtype that holds the weight exactly. `reference`: the reference's rows, where two weights are compared.
    `groups`: which weights share a scale, where that matters. `nearest`: the reference's rows rounded to nearest in the
    scheme, where it is known and matters.
    """

    values: Singles
    start: int
    dtype: str
    reference: Singles | None = None
    groups: ScaleGroups | None = None
    nearest: Singles | None = None

    @cached_property
    def magnitudes(self) -> Singles:
        """|x|."""
        return np.abs(self.values)

    @cached_property
    def patterns(self) -> NDArray[np.uint16]:
        """The 16-bit pattern of each element, flat; of float32 its upper half."""
        if self.dtype == "float16":
            return self.values.astype(np.float16).view(np.uint16).ravel()
        return (self.values.view(np.uint32) >> 16).astype(np.uint16).ravel()


class WeightReduction:
    """Reduces a weight to the arrays of one statistic. A subclass that sets `name` is found by it.

    `shape`: [out, in] of the weight. `twice`: all rows come once more, to `add_again`.
    """

    name: ClassVar[str] = ""
    twice = False

    def __init_subclass__(cls) -> None:
        WEIGHT_REDUCTIONS[cls.name] = cls

    def __init__(self, statistic: Any, shape: tuple[int, int]) -> None:
        self.statistic = statistic
        self.shape = shape
        self.begin()

    def begin(self) -> None:
        """Begin with no rows."""

    def add(self, rows: WeightRows) -> None:
        """Take the next rows."""
        raise NotImplementedError

    def add_again(self, rows: WeightRows) -> None:
        """Take the same rows in a second run over the weight."""

    def arrays(self) -> Arrays:
        """Return the arrays of the statistic, after all rows."""
        raise NotImplementedError


WEIGHT_REDUCTIONS: dict[str, type[WeightReduction]] = {}
"""The name of a statistic → its reduction. Sinks and experts are of activations and have none."""


class TokenMaxima(WeightReduction):
    """The largest |x| of each row, and which rows are the largest."""

    name = "tokens"

    def begin(self) -> None:
        """Begin with no rows."""
        self._maxima: list[Singles] = []
        self._channels: list[NDArray[np.int32]] = []

    def add(self, rows: WeightRows) -> None:
        """Keep the maximum of each row and its first channel."""
        self._maxima.append(rows.magnitudes.max(axis=1))
        self._channels.append(rows.magnitudes.argmax(axis=1).astype(np.int32))

    def arrays(self) -> Arrays:
        """Return the maxima, and the largest of these with their channels."""
        maxima, channels = np.concatenate(self._maxima), np.concatenate(self._channels)
        # Patterns of magnitudes order as these do, with NaN above all. Stable: of equal rows the first one comes first.
        order = np.argsort(-maxima.view(np.int32), kind="stable")[: max(16, len(maxima) // 32)]
        return {"token_max": maxima, "peaks": order.astype(np.int32)[None], "peak_channels": channels[order][None]}


class ChannelMaxima(WeightReduction):
    """The largest |x| of each column, and order statistics of these."""

    name = "channels"

    def begin(self) -> None:
        """Begin with columns of zeros."""
        self.maxima = np.zeros(self.shape[1], dtype=np.float32)

    def add(self, rows: WeightRows) -> None:
        """Raise the maxima."""
        np.maximum(self.maxima, rows.magnitudes.max(axis=0), out=self.maxima)

    def arrays(self) -> Arrays:
        """Return the maxima, and the order statistics of them."""
        ordered = np.sort(self.maxima)  # NaN last, as largest
        known = [(rank, 0 <= rank < len(ordered)) for rank in ranks_of(len(ordered))]
        top = np.array([ordered[rank] if there else np.nan for rank, there in known], dtype=np.float32)
        return {"channel_top": _blank_unless_finite(top)[None], "channel_max": self.maxima}


class PatternCounts(WeightReduction):
    """How often each 16-bit pattern of |x| occurs, and the extremes of |x|."""

    name = "counts"
    signed: ClassVar[bool] = False

    def begin(self) -> None:
        """Begin with counts of zero."""
        self.counts = np.zeros(2 * PATTERNS if self.signed else PATTERNS, dtype=np.int64)
        self._ends: list[tuple[Any, ...]] = []

    def add(self, rows: WeightRows) -> None:
        """Add the counts of some rows, and note their extremes."""
        patterns = rows.patterns if self.signed else rows.patterns & np.uint16(PATTERNS - 1)
        self.counts += np.bincount(patterns, minlength=len(self.counts))
        smallest = np.where(np.isnan(rows.magnitudes), np.inf, rows.magnitudes).min()
        low, high = (rows.values.min(), rows.values.max()) if self.signed else (np.nan, np.nan)
        self._ends.append((rows.magnitudes.max(), smallest, low, high))

    def arrays(self) -> Arrays:
        """Return the patterns that occur, their counts, and the extremes."""
        largest, smallest, low, high = np.array(self._ends, dtype=np.float32).T
        ends = (np.max(largest), np.min(smallest), np.min(low), np.max(high))
        bins, prefix = np.flatnonzero(self.counts), "signed_" if self.signed else ""
        return {
            f"{prefix}bins": bins.astype(np.uint16),
            f"{prefix}counts": self.counts[bins],
            "extremes": np.array(ends, dtype=np.float32),
        }


class SignedPatternCounts(PatternCounts):
    """How often each 16-bit pattern of x occurs, and the extremes of |x| and of x."""

    name = "signed_counts"
    signed = True


class ElementOrder(WeightReduction):
    """Order statistics of |x|: exact for 16 bits; else the median is within 2⁻⁸, and the ends are exact."""

    name = "elements"

    def begin(self) -> None:
        """Begin with counts of zero."""
        self._counts = np.zeros(PATTERNS, dtype=np.int64)
        self._largest = self._least = np.zeros(0, dtype=np.float32)
        self._dtype = "float32"

    def add(self, rows: WeightRows) -> None:
        """Add the counts of some rows, and keep the three largest and least |x|."""
        self._dtype = rows.dtype
        self._counts += np.bincount(rows.patterns & np.uint16(PATTERNS - 1), minlength=PATTERNS)
        flat = rows.magnitudes.ravel()
        few = min(3, flat.size)
        ends = np.partition(flat, sorted({*range(few), *range(flat.size - few, flat.size)}))
        self._largest = np.sort(np.concatenate([self._largest, ends[-few:]]))[-3:]
        self._least = np.sort(np.concatenate([self._least, ends[:few]]))[:3]

    @cached_property
    def order(self) -> Singles:
        """`TOP_NAMES` of |x|, after all rows."""
        count = int(self._counts.sum())
        ranks = np.array(ranks_of(count))
        bins = np.searchsorted(np.cumsum(self._counts), np.clip(ranks, 0, count - 1), side="right")
        found = bin_values(bins.astype(np.uint16), self._dtype).astype(np.float32)
        few = min(3, count)
        found[:few], found[7 - few :] = self._largest[::-1], self._least[::-1]
        return _blank_unless_finite(np.where((ranks >= 0) & (ranks < count), found, np.float32(np.nan)))

    def arrays(self) -> Arrays:
        """Return the order statistics."""
        return {"element_top": self.order[None]}


class MassiveElements(ElementOrder):
    """The elements above both thresholds, the second a multiple of the median, which is known after all rows."""

    name = Massive.name
    twice = True

    def begin(self) -> None:
        """Begin with a count of zero."""
        super().begin()
        self._count = 0

    def add_again(self, rows: WeightRows) -> None:
        """Count some rows, now that the median is known."""
        least = np.float32(self.statistic.ratio) * self.order[TOP_NAMES.index("median")]
        self._count += int(np.count_nonzero((rows.magnitudes > self.statistic.absolute) & (rows.magnitudes >= least)))

    def arrays(self) -> Arrays:
        """Return the count; `UNKNOWN` where the weight holds NaN or Inf."""
        known = np.isfinite(self.order[0])
        return {self.statistic.key: np.array([self._count if known else UNKNOWN], dtype=np.int64)}


class WeightMoments(WeightReduction):
    """Count, mean and central power sums; those of successive rows are joined in float64.

    The formulas are those of Pébay, SAND2008-6212, equations 3.1 for n = nA + nB.
    """

    name = "moments"

    def begin(self) -> None:
        """Begin with no elements."""
        self._sums = (0, 0.0, 0.0, 0.0, 0.0)
        self._largest = np.float32(0)
        self._zeros = self._nonfinite = 0

    def add(self, rows: WeightRows) -> None:
        """Join the sums of some rows."""
        x = rows.values.ravel().astype(np.float64)
        mean = x.mean()
        x -= mean
        squares = x * x
        own = (x.size, float(mean), float(squares.sum()), float(squares @ x), float(squares @ squares))
        self._sums = own if not self._sums[0] else _joined(self._sums, own)
        self._largest = np.maximum(self._largest, rows.magnitudes.max())
        self._zeros += int(np.count_nonzero(rows.values == 0))
        self._nonfinite += int(np.count_nonzero(~np.isfinite(rows.values)))

    def arrays(self) -> Arrays:
        """Return `MOMENT_NAMES`."""
        count, mean, m2, _, m4 = self._sums
        found = (count, mean, m2, m4, self._largest, self._zeros, self._nonfinite)
        return {"moments": np.array([found], dtype=np.float64)}


def _joined(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[Any, ...]:
    """Join n, mean, Σ(x − mean)², Σ(x − mean)³ and Σ(x − mean)⁴ of two parts."""
    (n1, mean1, p2, p3, p4), (n2, mean2, q2, q3, q4) = one, other
    n, d = n1 + n2, mean2 - mean1
    m2 = p2 + q2 + d * d * n1 * n2 / n
    m3 = p3 + q3 + d**3 * n1 * n2 * (n1 - n2) / n**2 + 3 * d * (n1 * q2 - n2 * p2) / n
    m4 = p4 + q4 + d**4 * n1 * n2 * (n1 * n1 - n1 * n2 + n2 * n2) / n**3
    m4 += 6 * d * d * (n1 * n1 * q2 + n2 * n2 * p2) / n**2 + 4 * d * (n1 * q3 - n2 * p3) / n
    return n, (n1 * mean1 + n2 * mean2) / n, m2, m3, m4


class WeightChannelCounts(WeightReduction):
    """How often x falls into each bin, column by column; the extremes of each column."""

    name = "channel_counts"

    def begin(self) -> None:
        """Begin with counts of zero."""
        self._counts = np.zeros((2 * CODES, self.shape[1]), dtype=np.uint32)
        self._ends: Array | None = None

    def add(self, rows: WeightRows) -> None:
        """Add the counts of some rows, and widen the extremes."""
        patterns = rows.values.view(np.uint32)
        codes = ((patterns & np.uint32(0x7FFFFFFF)) >> np.uint32(SHIFT)).astype(np.int64) - FIRST_CODE
        codes = np.clip(codes, 0, CODES - 1) + CODES * (patterns >> np.uint32(31)).astype(np.int64)
        for first in range(0, self.shape[1], COLUMNS_AT_ONCE):
            part = codes[:, first : first + COLUMNS_AT_ONCE]
            width = part.shape[1]
            found = np.bincount((part * width + np.arange(width)).ravel(), minlength=2 * CODES * width)
            self._counts[:, first : first + width] += found.reshape(2 * CODES, width).astype(np.uint32)
        x, magnitudes = rows.values, rows.magnitudes
        ends = np.stack([magnitudes.max(0), magnitudes.min(0), x.min(0), x.max(0)]) + np.float32(0)
        if self._ends is not None:
            largest, least = np.maximum(self._ends, ends), np.minimum(self._ends, ends)
            ends = np.stack([largest[0], least[1], least[2], largest[3]])
        self._ends = ends

    def arrays(self) -> Arrays:
        """Return the bins that occur in any column, their counts, and the extremes."""
        assert self._ends is not None
        bins = np.flatnonzero(self._counts.any(axis=1))
        counts = self._counts[bins]
        return {"channel_bins": bins.astype(np.uint16), "channel_counts": counts, "channel_extremes": self._ends}


class Features(WeightReduction):
    """In how many rows each column reaches the threshold; the rows; the NaN and Inf."""

    name = FeatureCounts.name

    def begin(self) -> None:
        """Begin with counts of zero."""
        self._counts = np.zeros(self.shape[1] + 2, dtype=np.int64)

    def add(self, rows: WeightRows) -> None:
        """Add the counts of some rows."""
        reached = np.count_nonzero(rows.magnitudes >= self.statistic.absolute, axis=0)
        nonfinite = np.count_nonzero(~np.isfinite(rows.values))
        self._counts += np.concatenate([reached, [len(rows.values), nonfinite]])

    def arrays(self) -> Arrays:
        """Return the counts."""
        return {self.statistic.key: self._counts}


class WeightMap(WeightReduction):
    """|x| made smaller: the largest of each cell."""

    name = HeatMap.name

    def begin(self) -> None:
        """Begin with cells of zero."""
        self._cell = [cell_size(size) for size in self.shape]
        self._map = np.zeros([-(-size // cell) for size, cell in zip(self.shape, self._cell, strict=True)], np.float32)

    def add(self, rows: WeightRows) -> None:
        """Raise the cells of some rows."""
        columns = np.arange(0, self.shape[1], self._cell[1])
        at = np.arange(rows.start, rows.start + len(rows.values)) // self._cell[0]
        np.maximum.at(self._map, at, np.maximum.reduceat(rows.magnitudes, columns, axis=1))

    def arrays(self) -> Arrays:
        """Return the map, if it is asked of the sample that a weight counts as, 0."""
        return {self.statistic.key: self._map} if self.statistic.sample == 0 else {}


class QuantizationError(WeightReduction):
    """Σx² and Σ(x − x̂)² under a simulated quantization, in float32 as the engine rounds, summed in float64."""

    name = QuantizationPowers.name

    def begin(self) -> None:
        """Begin with powers of zero."""
        self._powers = np.zeros(2)
        # The scale of a column is known after all rows.
        self.twice = self.statistic.by == "channel"
        self._columns = ChannelMaxima(self.statistic, self.shape)

    def add(self, rows: WeightRows) -> None:
        """Round some rows to the grid and back."""
        if self.twice:
            self._columns.add(rows)
        elif self.statistic.by == "group":
            size, columns = self.statistic.group_size, self.shape[1]
            largest = np.maximum.reduceat(rows.magnitudes, np.arange(0, columns, size), axis=1)
            self._add(rows.values, np.repeat(self._scales(largest), size, axis=1)[:, :columns])
        else:
            self._add(rows.values, self._scales(rows.magnitudes.max(axis=1, keepdims=True)))

    def add_again(self, rows: WeightRows) -> None:
        """Round some rows by the scales of their columns."""
        self._add(rows.values, self._scales(self._columns.maxima))

    def _scales(self, largest: Singles) -> Singles:
        scales = largest / np.float32(LARGEST_CODE[self.statistic.scheme])
        return np.where(scales == 0, np.float32(1), scales)

    def _add(self, x: Singles, scales: Singles) -> None:
        scaled = (x / scales).astype(np.float64)
        restored = rounded_to(self.statistic.scheme, scaled).astype(np.float32) * scales
        wide = x.astype(np.float64)
        error = wide - restored
        self._powers += [np.sum(wide * wide), np.sum(error * error)]

    def arrays(self) -> Arrays:
        """Return the two powers."""
        return {self.statistic.key: self._powers[None]}


class PairError(WeightReduction):
    """The powers of each row's error: Σx², Σ(x − x̂)², Σx̂² and max |x − x̂|, x the reference's."""

    name = ERROR.name

    def begin(self) -> None:
        """Begin with no rows."""
        self._powers: list[Singles] = []

    def add(self, rows: WeightRows) -> None:
        """Take the powers of some rows."""
        assert rows.reference is not None
        x, y = rows.reference.astype(np.float64), rows.values.astype(np.float64)
        apart = x - y
        sums = [np.einsum("ij,ij->i", one, one) for one in (x, apart, y)]
        self._powers.append(np.stack([*sums, np.abs(apart).max(axis=1)], axis=1).astype(np.float32))

    def arrays(self) -> Arrays:
        """Return `ERROR_NAMES` of each row."""
        return {"error": np.concatenate(self._powers)}


MOVED = 0.01
"""From this distance to 1 it counts where round to nearest puts a group; 8 bits leave less."""


class GroupGains(WeightReduction):
    """The factor of each scale group against the reference's, Σw·w₀ / Σw₀²; the group that is farthest out is kept."""

    name = GAIN.name

    def begin(self) -> None:
        """Begin without groups, which come with the first rows."""
        self._groups: ScaleGroups | None = None

    def add(self, rows: WeightRows) -> None:
        """Add Σw₀², Σw·w₀, Σw², Σw₀⁴, Σw₁·w₀ and Σ(w₁ − w₀)² of the groups of some rows, w₁ by round to nearest."""
        assert rows.reference is not None
        assert rows.groups is not None
        if self._groups is None:
            self._groups = rows.groups
            self._starts = np.arange(0, self.shape[1], rows.groups.columns)
            self._sums = np.zeros((6, -(-self.shape[0] // rows.groups.rows), len(self._starts)))
        x, y = rows.reference.astype(np.float64), rows.values.astype(np.float64)
        if (order := self._groups.order) is not None:
            x, y = x[:, order], y[:, order]
        plainest = x if rows.nearest is None else rows.nearest.astype(np.float64)
        if order is not None and rows.nearest is not None:
            plainest = plainest[:, order]
        blocks = np.arange(rows.start, rows.start + len(x)) // self._groups.rows
        squares, apart = x * x, plainest - x
        factors = ((x, x), (x, y), (y, y), (squares, squares), (x, plainest), (apart, apart))
        products = np.empty_like(x)  # one for all: new memory for each takes longer than the product
        for sums, pair in zip(self._sums, factors, strict=True):
            np.multiply(*pair, out=products)
            np.add.at(sums, blocks, np.add.reduceat(products, self._starts, axis=1))

    def arrays(self) -> Arrays:
        """Return `GAIN_NAMES` of the group whose factor is farthest out of its room; NaN where no group counts."""
        assert self._groups is not None
        signal, product, own, fourth, plainest, rounding = self._sums
        sizes = [
            np.diff(np.append(np.arange(0, length, step), length))
            for length, step in zip(self.shape, (self._groups.rows, self._groups.columns), strict=True)
        ]
        counts = np.outer(*sizes)
        nmse = (signal + own - 2 * product).sum() / signal.sum()
        # What lies below the layer's rounding error may be lost: the scales of groups can be rounded themselves.
        faint = min(nmse, FAINT) * signal.sum() / counts.sum()
        counted = np.maximum(signal, own) > np.maximum(faint, 0) * counts
        factors, rounded = (np.where(signal > 0, each / signal, np.inf) for each in (product, plainest))
        # Where few weights carry a group its factor varies as theirs: of (Σw₀²)² / Σw₀⁴ weights.
        sigmas = np.maximum(ROOM_SIGMAS / np.sqrt(counts), FEW_SIGMAS * np.sqrt(fourth) / signal)
        rooms = np.clip(sigmas * np.sqrt(np.maximum(nmse, 0)), LEAST_ROOM, MOST_ROOM)
        # GPTQ adds to later columns what rounding takes from earlier ones: a group that carries so much more error than
        # rounding makes has a factor as uncertain as that error, and a scale that is off multiplies only what is there.
        errors = np.maximum(own / signal - factors**2, 0)
        explained = np.maximum(rounding / signal, nmse) * np.maximum(factors**2, 1)
        carried = np.where(errors > UNEXPLAINED * explained, CARRIED_SIGMAS * np.sqrt(errors / counts), 0)
        rooms = np.maximum(rooms, carried)
        # In few bits the largest weight of a group may be clipped, and small ones lost, by round to nearest as well.
        rounded = np.where(np.abs(rounded - 1) > MOVED, rounded, 1.0)
        away = np.maximum(np.minimum(rounded, 1) - factors, factors - np.maximum(rounded, 1))
        away = np.where(np.isfinite(factors), np.maximum(away, 0), np.abs(factors - 1))
        shares = np.where(counted | ~np.isfinite(factors) & (own > 0), away / rooms, -1.0)
        row, column = np.unravel_index(int(np.argmax(shares)), shares.shape)  # the first NaN, where there is one
        place = [row * self._groups.rows, sizes[0][row], column * self._groups.columns, sizes[1][column]]
        if self._groups.order is not None:
            place[2] = -1
        share = float(shares[row, column])
        return {"gain": np.array([share if share != -1 else np.nan, factors[row, column], *place], dtype=np.float64)}


def _blank_unless_finite(order: Singles) -> Singles:
    """Return order statistics [7]; NaN for all where the largest is NaN or Inf."""
    return order if np.isfinite(order[0]) else np.full_like(order, np.nan)


def reduced(
    statistics: Iterable[Statistic], rows: Callable[[], Iterator[WeightRows]], shape: tuple[int, int], *, matrix: bool
) -> SiteNumbers:
    """Reduce a weight to the numbers of its site.

    `rows`: returns the rows in order, each time anew; it is called twice where a statistic needs that. `shape`: [out,
    in], or [1, n] of a weight that is no matrix, which has none of the statistics that need tokens.
    """
    wanted = frozenset(statistics)
    taken = [each for each in sorted(wanted) if each.name in WEIGHT_REDUCTIONS and (matrix or not each.needs_tokens)]
    made = [WEIGHT_REDUCTIONS[each.name](each, shape) for each in taken]
    dtype = ""
    with np.errstate(all="ignore"):  # NaN and Inf are numbers to report, and so is a row of zeros
        for part in rows() if made else ():
            dtype = part.dtype
            for reduction in made:
                reduction.add(part)
        again = [reduction for reduction in made if reduction.twice]
        for part in rows() if again else ():
            for reduction in again:
                reduction.add_again(part)
        arrays = {name: array for reduction in made for name, array in reduction.arrays().items()}
    zero, length = np.zeros(1, dtype=np.int32), np.array([shape[0] if matrix else 0], dtype=np.int64)
    return SiteNumbers(dtype, shape if matrix else shape[1:], matrix, wanted, zero, zero, length, arrays)

"""The reductions of one row on the CPU, by the kernels: the numbers of `torch_ops` in a fraction of the time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...captures import PADDING, TOP_NAMES, UNKNOWN, Array, bin_values, ranks_of
from . import cpu_kernels as kernels, survey_kernels
from .reductions import Plan, Row, Tables, peak_count, reduce_each
from .storage import Accumulator, Window, floats_of, maxima_of, peaks_of, record_size

WIDTHS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}


class CpuReducer:
    """Reduces rows of one dtype. The scratch counts are zero between two rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self.wide = WIDTHS[dtype] == 32
        self.integers = torch.int32 if self.wide else torch.int16
        self.patterns: Any = np.uint32 if self.wide else np.uint16
        self.itemsize = 4 if self.wide else 2
        self.survey = survey_kernels.survey32 if self.wide else survey_kernels.survey16
        self.shift = 16 if self.wide else 0
        self.tables = Tables()
        self.threads = kernels.share_torchs_threads()
        self.scratch = np.zeros((self.threads, 1 << 16), dtype=np.uint32)
        self.counts = np.empty((2, (1 << 15) + 1), dtype=np.uint32)
        self.no_counts = self.counts[:, :0]
        self.rows = np.empty((self.threads, *self.counts.shape), dtype=np.uint32)
        self._description = np.empty(survey_kernels.FIELDS, dtype=np.int64)
        self.no_window = Window(counts=False, signs=False, dtype=self.name)
        self.smallest = np.zeros(self.threads, dtype=self.patterns)
        self.values = bin_values(np.arange(1 << 15, dtype=np.uint16), self.name)
        # Its sign bit tells the pattern of −1 from every maximum, which is signless.
        self.padding = torch.tensor(PADDING, dtype=dtype).view(self.integers).numpy().view(self.patterns)

    def reduce(self, row: Tensor, kept: Tensor | None, sample: int, plan: Plan, into: Accumulator) -> None:
        """Reduce one population, [T, C] or [n]; `kept` says which tokens count."""
        counted = (row if kept is None else row.index_select(0, kept)).contiguous()
        patterns = counted.view(self.integers).numpy().view(self.patterns)
        table = patterns.ndim == 2
        lines = patterns if table else patterns[None]
        length = 0 if not (table and plan.tokens) else len(lines) if kept is None else row.shape[0]
        if length or plan.counted or plan.moments:
            record, peaks = self._record(lines, length, kept, into)
            self._surveyed(counted, lines, record, peaks, plan, into)
            if kept is not None and length:
                self._spread(record, kept, length, peaks, into)
        if table and plan.channels:
            self._channels(lines, into)
        if plan.others:
            reduce_each(plan.others, Row(row, kept, counted, sample, plan, self.tables, compiled=True), into)

    def reduce_packed(self, rows: Tensor, lengths: tuple[int, ...], plan: Plan, into: Accumulator) -> bool:
        """Reduce populations that lie one after the other in rows [N, C], in one launch.

        Returns False, and does nothing, for what has no such kernel, and for fewer populations than threads.
        """
        if self.wide or len(lengths) < self.threads or not plan.packs:
            return False
        patterns = rows.contiguous().view(self.integers).numpy().view(self.patterns)
        layout = _packed(lengths, self.itemsize)
        records = into.rooms("tokens", layout.sizes, self.patterns)
        moments = np.empty((0, 7)) if not plan.moments else into.rooms("moments", (7,) * len(lengths), np.float64)
        survey_kernels.survey_each16(
            patterns, layout.ends, layout.peaks, self.scratch, self.rows, self.values, records, layout.starts,
            moments.reshape(-1, 7),
        )  # fmt: skip
        return True

    def finish(self) -> None:
        """Do nothing: the numbers of every row are complete."""

    def _record(self, lines: Array, length: int, kept: Tensor | None, into: Accumulator) -> tuple[Array, int]:
        """Return where the kernels write the maxima of the tokens that count, and how many peaks among `length`."""
        peaks, size = _layout(len(lines), length, self.itemsize)
        if length and kept is None:
            return into.room("tokens", size, self.patterns), peaks
        # With padding the record is spread over all tokens afterwards, so that this one is scratch.
        return np.empty(size, dtype=self.patterns), peaks

    def _spread(self, record: Array, kept: Tensor, length: int, peaks: int, into: Accumulator) -> None:
        """Keep the record of some tokens as that of all `length`, with padding between them."""
        index = kept.numpy()
        whole = into.room("tokens", record_size(length, peaks, self.itemsize), self.patterns)
        maxima_of(whole, length)[:] = self.padding
        maxima_of(whole, length)[index] = maxima_of(record, len(index))
        found, placed = peaks_of(record, len(index)), peaks_of(whole, length)
        placed[0], placed[1] = index[found[0]], found[1]

    def _surveyed(
        self, counted: Tensor, lines: Array, record: Array, peaks: int, plan: Plan, into: Accumulator
    ) -> None:
        """Reduce the tokens of a row, and what its counts tell, if they are needed."""
        counted_too = plan.counted or (plan.moments and not self.wide)
        needed = plan.ordered or ((plan.moments or plan.signed) and not self.wide)
        counts = self.counts if needed else self.no_counts
        # Without signs half as many bins have to stay in the cache.
        signs = 1 + (plan.signed or plan.moments)
        window = self.window_of(plan, into) if counted_too else self.no_window
        sizes = *lines.shape, len(record), peaks, int(counted_too), signs
        self.describe(self._description.ctypes.data, sizes, window, counts)
        top, smallest, zeros = self.survey(lines.ctypes.data, record.ctypes.data, self._description.ctypes.data)
        if counted_too and zeros < 0:
            self.widen(window, lines.size, top, smallest, signs, counts)
        if counted_too and (needed or plan.signed):
            high, low = top >> self.shift, max(1, min(smallest, top) >> self.shift)
            cells = counts[:, : max(1, high - low + 2)]
            if plan.signed:
                window.widen(*(torch.aminmax(counted) if self.wide else kernels.signed_ends(cells, low, self.values)))
            self._of_counts(counted, lines, cells, low, plan, into)
        if plan.moments and self.wide:
            into.add("moments", self._moments_of_values(counted, top))

    def describe(self, address: int, sizes: tuple[int, ...], window: Window, counts: NDArray[np.uint32]) -> None:
        """Write to an address where a call of `survey` finds all but its patterns and their record."""
        survey_kernels.describe(
            address, sizes, self.smallest, self.scratch, window.sums, window.base, window.marks, counts
        )

    def widen(
        self, window: Window, count: int, top: int, smallest: int, signs: int, counts: NDArray[np.uint32]
    ) -> None:
        """Let a window reach as far as a row of `count` elements, and flush the row's counts from scratch."""
        high, low = top >> self.shift, max(1, min(smallest, top) >> self.shift)
        window.expect(count)
        window.cover(low, high)
        zeros = survey_kernels.settle(self.scratch, low, high, signs, window.sums, window.base, counts)
        window.meet(top, 0 if zeros else smallest)

    def repeated(self, tokens: int, channels: int, plan: Plan, into: Accumulator) -> Repeated:
        """Return what reduces further rows [T, C] of a site, by their addresses."""
        return Repeated(self, tokens, channels, plan, into)

    def window_of(self, plan: Plan, into: Accumulator) -> Window:
        """Return the counts of a site; those of a row alone where the site keeps none."""
        known: Window | None = into.pooled.get("window")
        if known is not None:
            return known
        window = Window(plan.counts, plan.signed, self.name, into.arena.zeros)
        if plan.counts or plan.signed:
            into.pooled["window"] = window
        return window

    def _of_counts(
        self,
        counted: Tensor,
        lines: Array,
        row: NDArray[np.uint32],
        low: int,
        plan: Plan,
        into: Accumulator,
    ) -> None:
        """Keep what follows from the counts of a row, [2, bins] from the pattern `low` on."""
        order = self._order(lines.reshape(-1), row, low) if plan.ordered else None
        if plan.elements and order is not None:
            into.add("element_top", order)
        if plan.moments and not self.wide:
            into.add("moments", self._moments(row, low))
        for name, (absolute, ratio) in plan.massive.items():
            assert order is not None
            least = float(np.float32(ratio) * order[TOP_NAMES.index("median")])
            if np.isnan(least):
                count = UNKNOWN
            elif self.wide:
                count = kernels.massive_of_values(counted.flatten().numpy(), absolute, least)
            else:
                count = kernels.massive_of_counts(row, low, self.values, absolute, least)
            into.add(name, np.array(count, dtype=np.int64))

    def _channels(self, lines: Array, into: Accumulator) -> None:
        shares = np.zeros((self.threads, lines.shape[1]), dtype=self.patterns)
        kernels.channel_maxima(lines, shares)
        maxima = shares.max(axis=0)
        floats = floats_of(maxima, self.name)
        if "channel_max" in into.pooled:
            np.maximum(into.pooled["channel_max"], floats, out=into.pooled["channel_max"])
        else:
            into.pooled["channel_max"] = into.arena.zeros(floats.shape, np.float32)
            into.pooled["channel_max"][:] = floats
        wanted, _, known = _ranks(len(maxima))
        into.add("channel_top", _blank_missing(floats_of(np.sort(maxima)[wanted], self.name), known))

    def _order(self, flat: Array, row: NDArray[np.uint32], low: int) -> NDArray[np.float32]:
        wanted, ascending, known = _ranks(flat.size)
        found = np.empty(len(wanted), dtype=np.float32)
        kernels.order_of(row, low, self.values, wanted, ascending, found)
        # The counts know float32 by its upper half only; the ends are exact.
        if self.wide:
            few = min(3, flat.size)
            largest, least = np.empty(few, dtype=np.uint32), np.empty(few, dtype=np.uint32)
            kernels.extremes32(flat, largest, least)
            found[:few] = largest.view(np.float32)
            found[7 - few :] = least.view(np.float32)[::-1]
        return _blank_missing(found, known)

    def _moments(self, row: NDArray[np.uint32], low: int) -> NDArray[np.float64]:
        """Return `MOMENT_NAMES` of a 16-bit row from its counts."""
        found = np.empty(7, dtype=np.float64)
        kernels.moments_of_counts(row, low, self.values, found)
        return found

    def _moments_of_values(self, counted: Tensor, top: int) -> NDArray[np.float64]:
        """Return the same of a float32 row, summed in float64."""
        found, sums = np.zeros(7, dtype=np.float64), np.zeros(6, dtype=np.float64)
        kernels.moments_of_values(counted.flatten().numpy(), sums)
        found[:4], found[5:] = sums[:4], sums[4:]
        found[4] = floats_of(np.array([top], dtype=self.patterns), self.name)[0]
        return found


@dataclass(frozen=True)
class Packed:
    """Where several populations end in one tensor, and where their records begin in one array."""

    ends: NDArray[np.int64]
    peaks: NDArray[np.int64]
    sizes: tuple[int, ...]
    starts: NDArray[np.int64]


@lru_cache(1024)
def _packed(lengths: tuple[int, ...], itemsize: int) -> Packed:
    """Return where populations of some lengths lie."""
    layouts = [_layout(length, length, itemsize) for length in lengths]
    sizes = tuple(size for _, size in layouts)
    return Packed(np.cumsum(lengths), np.array([peaks for peaks, _ in layouts]), sizes, np.cumsum((0, *sizes)))


class Repeated:
    """Reduces rows of one shape at one site by their addresses: what `CpuReducer.reduce` does, with little Python.

    What lies at the addresses that it has lives as long as it: the reducer's scratch, and the site's numbers.
    """

    def __init__(self, reducer: CpuReducer, tokens: int, channels: int, plan: Plan, into: Accumulator) -> None:
        peaks, size = _layout(tokens, tokens, reducer.itemsize)
        self._reducer, self._into = reducer, into
        self._sizes = tokens, channels, size, peaks, int(plan.counts), 1
        self._survey = reducer.survey
        self._reserve = into.column("tokens", reducer.patterns, (0,)).reserve
        self._bytes = size * reducer.itemsize
        self._description = into.arena.reserve(survey_kernels.DESCRIPTION)[1]
        self._describe(reducer.window_of(plan, into) if plan.counts else reducer.no_window)
        self._counts = plan.counts

    def __call__(self, address: int) -> None:
        """Reduce the row that begins at an address."""
        top, least, zeros = self._survey(address, self._reserve(self._bytes), self._description)
        if zeros < 0 and self._counts:
            window: Window = self._into.pooled["window"]
            count = self._sizes[0] * self._sizes[1]
            self._reducer.widen(window, count, top, least, 1, self._reducer.no_counts)
            self._describe(window)

    def _describe(self, window: Window) -> None:
        """Write down where everything lies; a window moves where it grows."""
        self._reducer.describe(self._description, self._sizes, window, self._reducer.no_counts)


@lru_cache(1024)
def _layout(count: int, length: int, itemsize: int) -> tuple[int, int]:
    """Return how many peaks are kept of `count` tokens among `length`, 0 for no tokens, and the size of the record."""
    peaks = peak_count(count, length) if length else 0
    return peaks, record_size(count, peaks, itemsize)


@lru_cache(1024)
def _ranks(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return the ranks of `TOP_NAMES` among `count` values, their order, and which of them there are."""
    ranks = np.array(ranks_of(count))
    wanted = np.clip(ranks, 0, count - 1)
    return wanted, np.argsort(wanted, kind="stable"), (ranks >= 0) & (ranks < count)


def _blank_missing(values: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(known & np.isfinite(values[0]), values, np.float32("nan"))

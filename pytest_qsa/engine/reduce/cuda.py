"""The reductions of 16-bit rows on CUDA: one kernel reads each row, and the rest is launched for a batch of rows.

A launch costs as much as a small row's arithmetic. So the numbers that follow from a row's maxima and counts are
computed for several rows of one shape together. Nothing here synchronizes with the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...captures import PADDING, TOP_NAMES, UNKNOWN
from . import cuda_kernels as triton_kernels
from .reductions import Plan, Row, Tables, blank_missing, peak_count, reduce_each
from .storage import HALF, Accumulator, widened
from .torch_ops import TorchReducer

BATCH_SIZE = 8
"""Rows whose numbers are computed together."""
COPIES = 64
"""The most copies of a row's counts: programs that add atomically to one address wait for one another."""
MAX_BATCHES = 12
"""Shapes whose batches may be open at once; one with counts holds some 2 to 4 MB."""
BLOCK = 2048
"""Values that a program reads at a time."""


class CudaReducer:
    """Reduces rows of bfloat16 and float16 by the kernel, others by torch's operators."""

    def __init__(self) -> None:
        self._tables = Tables()
        self._operators = TorchReducer(self._tables)
        self._batches: dict[tuple[object, ...], RowBatch] = {}
        self._copies: dict[tuple[object, ...], Tensor] = {}

    def reduce(self, row: Tensor, kept: Tensor | None, sample: int, plan: Plan, into: Accumulator) -> None:
        """Reduce one population, [T, C] or [n]; `kept` says which tokens count. It is complete after `finish`."""
        if row.dtype not in (torch.bfloat16, torch.float16):
            self._operators.reduce(row, kept, sample, plan, into)
            return
        counted = (row if kept is None else row.index_select(0, kept)).contiguous()
        # Equal statistics share one plan (`plan_of`), so that its id stands for it.
        key = (counted.shape, row.shape, row.dtype, row.device, id(plan))
        if key not in self._batches:
            if len(self._batches) >= MAX_BATCHES:
                # The oldest: a dict keeps the order in which batches were begun.
                self._batches.pop(next(iter(self._batches))).compute()
            self._batches[key] = RowBatch.for_rows(counted, row.shape[0], plan, self._tables)
        batch = self._batches[key]
        found = batch.add(counted, kept, into.pooled, self._copies_for(counted, batch.bins))
        if len(batch.pooled) == BATCH_SIZE:
            self._batches.pop(key).compute()
        for name, value in found.items():
            into.hold(name, value)
        if plan.others:
            reduce_each(plan.others, Row(row, kept, counted, sample, plan, self._tables), into)

    def reduce_packed(self, rows: Tensor, lengths: tuple[int, ...], plan: Plan, into: Accumulator) -> bool:
        """Do nothing: rows of one shape wait for one another anyway."""
        return False

    def _copies_for(self, counted: Tensor, bins: int) -> Tensor:
        """Return zeros that a row's programs count into, [copies, bins]: fewer for a small row, none without bins."""
        copies = min(COPIES, _power_of_two(-(-counted.numel() // HALF))) if bins else 0
        key = (copies, bins, counted.device)
        if key not in self._copies:
            self._copies[key] = torch.zeros((copies, bins), dtype=torch.int32, device=counted.device)
        return self._copies[key]

    def repeated(self, tokens: int, channels: int, plan: Plan, into: Accumulator) -> None:
        """Return nothing: each row goes through `reduce`."""

    def finish(self) -> None:
        """Compute the batches that are still open."""
        while self._batches:
            self._batches.popitem()[1].compute()


@dataclass
class RowBatch:
    """Rows of one shape: their maxima and counts, and tensors that receive the numbers that follow from them.

    `length`: the tokens of a row, padding included. `bins`: how many there are, 0 for none. `scratch`: what the kernel
    fills; `found`: the numbers, which a row gets before they are computed; `views`: both, row by row.
    """

    plan: Plan
    dtype: torch.dtype
    length: int
    shape: torch.Size
    bins: int
    scratch: dict[str, Tensor]
    found: dict[str, Tensor]
    tables: Tables
    views: dict[str, tuple[Tensor, ...]] = field(init=False)
    pooled: list[dict[str, Tensor]] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def for_rows(cls, counted: Tensor, length: int, plan: Plan, tables: Tables) -> RowBatch:
        """Allocate a batch for rows like this one."""
        table = counted.dim() == 2
        tokens, channels = counted.shape if table else (0, 0)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros((BATCH_SIZE, *shape), dtype=dtype, device=counted.device)

        scratch, found = {}, {}
        if table and plan.tokens:
            peaks = peak_count(tokens, length)
            scratch["token_at"], found["peaks"], found["peak_channels"] = zeros(tokens), zeros(peaks), zeros(peaks)
            found["token_max"] = zeros(tokens, dtype=torch.float32)
        if table and plan.channels:
            scratch["channel_max"], found["channel_top"] = zeros(channels), zeros(7, dtype=torch.float32)
        bins = 0
        if plan.counted or plan.moments:
            bins = 2 * HALF if plan.signed or plan.moments else HALF
            scratch["counts"] = zeros(bins, dtype=torch.int64)
        if plan.elements:
            found["element_top"] = zeros(7, dtype=torch.float32)
        if plan.moments:
            found["moments"] = zeros(7, dtype=torch.float64)
        found |= {name: zeros(dtype=torch.int64) for name in plan.massive}
        return cls(plan, counted.dtype, length, counted.shape, bins, scratch, found, tables)

    def __post_init__(self) -> None:
        self.views = {name: values.unbind() for name, values in (self.scratch | self.found).items()}

    def add(self, counted: Tensor, kept: Tensor | None, pooled: dict[str, Tensor], copies: Tensor) -> dict[str, Tensor]:
        """Take the maxima and counts of a row; return the views that `compute` fills. `copies`: zeros, also after."""
        index = len(self.pooled)
        self.pooled.append(pooled)
        self.kept.append(kept)
        views = {name: rows[index] for name, rows in self.views.items()}
        found = {name: view for name, view in views.items() if name not in self.scratch}
        if self.scratch:
            _survey(counted, views, copies)
        if self.bins:
            torch.sum(copies, dim=0, out=views["counts"])
            copies.zero_()
        # With padding a row needs an array of its own: the batch has room for the tokens that count only.
        if kept is not None and "token_max" in found:
            whole = torch.full((self.length,), PADDING, dtype=torch.float32, device=counted.device)
            found["token_max"] = whole.index_copy_(0, kept, found["token_max"])
        return found

    def compute(self) -> None:
        """Launch what fills in the numbers of the rows that were added."""
        rows = len(self.pooled)
        scratch = {name: values[:rows] for name, values in self.scratch.items()}
        found = {name: values[:rows] for name, values in self.found.items()}
        if "token_at" in scratch:
            self._find_peaks(scratch["token_at"], found)
        if "channel_max" in scratch:
            self._order_channels(scratch["channel_max"], found["channel_top"])
        if "counts" in scratch:
            counts = scratch["counts"]
            folded = counts[:, :HALF] + counts[:, HALF:] if counts.shape[1] > HALF else counts
            self._pool(counts, folded)
            self._order_elements(folded, found)
            if "moments" in found:
                found["moments"].copy_(_moments(counts, folded, self._values(counts)))

    def _values(self, counts: Tensor) -> Tensor:
        return self.tables.values(counts.shape[1], self.dtype, counts.device)

    def _find_peaks(self, channels: Tensor, found: dict[str, Tensor]) -> None:
        # Stable, as on the CPU: of equal maxima the first token comes first.
        order = found["token_max"].sort(dim=1, descending=True, stable=True).indices[:, : found["peaks"].shape[1]]
        found["peak_channels"].copy_(channels.gather(1, order))
        found["peaks"].copy_(order)
        for row, kept in enumerate(self.kept):
            if kept is not None:
                found["peaks"][row].copy_(kept.index_select(0, order[row]))

    def _order_channels(self, patterns: Tensor, tops: Tensor) -> None:
        maxima = patterns.to(torch.int16).view(self.dtype).float()
        for row, pooled in enumerate(self.pooled):
            before = pooled.get("channel_max")
            # A copy: a view would keep the maxima of the whole batch in memory.
            pooled["channel_max"] = maxima[row].clone() if before is None else torch.maximum(before, maxima[row])
        ranks = self.tables.ranks(maxima.shape[1], maxima.device)
        picked = maxima.sort(dim=1).values.index_select(1, ranks.clamp(0, maxima.shape[1] - 1))
        tops.copy_(blank_missing(picked, ranks, maxima.shape[1]))

    def _pool(self, counts: Tensor, folded: Tensor) -> None:
        plan = self.plan
        if not (plan.counts or plan.signed):
            return
        ends = _extremes(counts, folded, self._values(counts), signed=plan.signed)
        for row, pooled in enumerate(self.pooled):
            for name, wanted, new in (("counts", plan.counts, folded), ("signed_counts", plan.signed, counts)):
                if wanted:
                    pooled[name] = pooled[name].add_(new[row]) if name in pooled else new[row].clone()
            before = pooled.get("extremes")
            pooled["extremes"] = ends[row] if before is None else widened(before, ends[row])

    def _order_elements(self, folded: Tensor, found: dict[str, Tensor]) -> None:
        if not self.plan.ordered:
            return
        size = self.shape.numel()
        ranks = self.tables.ranks(size, folded.device)
        wanted = ranks.clamp(0, size - 1).expand(len(folded), -1).contiguous()
        bins = torch.searchsorted(folded.cumsum(1), wanted, right=True)
        order = blank_missing(bins.to(torch.int16).view(self.dtype).float(), ranks, size)
        if "element_top" in found:
            found["element_top"].copy_(order)
        values = self.tables.values(HALF, self.dtype, folded.device)
        for name, (absolute, ratio) in self.plan.massive.items():
            least = ratio * order[:, TOP_NAMES.index("median"), None]
            count = (folded * ((values > absolute) & (values >= least))).sum(dim=1)
            found[name].copy_(count.masked_fill(least[:, 0].isnan(), UNKNOWN))


def _survey(counted: Tensor, views: dict[str, Tensor], copies: Tensor) -> None:
    size = counted.numel()
    columns = counted.shape[1] if counted.dim() == 2 else min(size, BLOCK)
    # Triton's ranges are powers of two.
    block = min(_power_of_two(columns), BLOCK)
    rows = BLOCK // block
    patterns = counted.view(torch.int16)  # also passed for each pointer that this launch doesn't use
    triton_kernels.survey[(-(-size // (columns * rows)),)](
        patterns,
        views.get("token_max", patterns),
        views.get("token_at", patterns),
        views.get("channel_max", patterns),
        copies,
        size,
        columns,
        half=counted.dtype == torch.float16,
        with_tokens="token_at" in views,
        with_channels="channel_max" in views,
        bins=copies.shape[1],
        copies=max(1, len(copies)),
        rows_each=rows,
        block=block,
        num_warps=4,
    )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _extremes(counts: Tensor, folded: Tensor, values: Tensor, *, signed: bool) -> Tensor:
    """Return `EXTREME_NAMES` of rows of counts [rows, bins], [rows, 4] float32. `values` [bins]: what they count."""
    largest = _largest(folded, values[:HALF])
    smallest = -_largest(folded, -values[:HALF], numbers=True)
    low = high = torch.full_like(largest, float("nan"))
    if signed:
        low, high = -_largest(counts, -values), _largest(counts, values)
    return torch.stack([largest, smallest, low, high], dim=1) + 0.0  # turns −0 into 0


def _largest(counts: Tensor, values: Tensor, *, numbers: bool = False) -> Tensor:
    """Return the largest value that occurs in each row of counts: NaN if NaN occurs, unless `numbers` skips it."""
    occurs = counts > 0
    if numbers:
        occurs = occurs & ~values.isnan()
    return torch.where(occurs, values, torch.full_like(values, -float("inf"))).amax(dim=1)


def _moments(counts: Tensor, folded: Tensor, values: Tensor) -> Tensor:
    """Return `MOMENT_NAMES` of rows of counts [rows, 65,536], [rows, 7] float64."""
    wide = values.double()
    occurs = counts > 0
    total = counts.sum(dim=1)

    def summed(terms: Tensor) -> Tensor:
        return torch.where(occurs, counts * terms, 0.0).sum(dim=1)

    mean = summed(wide) / total
    squares = (wide - mean[:, None]).square()
    nonfinite = (counts * ~wide.isfinite()).sum(dim=1)
    largest = _largest(folded, values[:HALF])
    found = (total, mean, summed(squares), summed(squares.square()), largest, folded[:, 0], nonfinite)
    return torch.stack([value.double() for value in found], dim=1)

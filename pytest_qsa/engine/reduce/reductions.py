"""Reductions: how a row's numbers follow from its tensor, one function for each statistic, found by its name.

`torch_ops` registers the functions that use torch's operators. They run everywhere, and they are the oracle of the
kernels, which do the statistics in `FUSED` together, in one pass over a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...captures import (
    CHANNELS,
    COUNTS,
    ELEMENTS,
    EXPERTS,
    MOMENTS,
    SIGNED_COUNTS,
    TOKENS,
    InRange,
    Massive,
    Statistic,
    ranks_of,
)
from .storage import Accumulator

PEAKS_MIN = 16
PEAKS_SHARE = 32
FUSED = frozenset(
    {TOKENS.name, CHANNELS.name, ELEMENTS.name, MOMENTS.name, COUNTS.name, SIGNED_COUNTS.name, Massive.name}
)

Reduction = Callable[[Any, "Row", Accumulator], None]
"""A statistic, a row, and where its numbers go."""
REDUCTIONS: dict[str, Reduction] = {}
"""The name of a statistic → its reduction; sinks, experts and what compares two models have none."""


def reduces(*names: str) -> Callable[[Reduction], Reduction]:
    """Register the reduction of the statistics of these names."""

    def register(reduction: Reduction) -> Reduction:
        REDUCTIONS.update(dict.fromkeys(names, reduction))
        return reduction

    return register


@dataclass(frozen=True, eq=False)
class Plan:
    """What one observer reduces, worked out once from its statistics, so that a row costs no look-ups.

    `expert_ranges`: the ranges of tokens whose experts are counted. `massive`: array → its two thresholds. `steps`: all
    reductions; `others`: those that no kernel does. `head_size`: how many channels a head has, 0 where there are none.
    """

    tokens: bool
    channels: bool
    elements: bool
    moments: bool
    counts: bool
    signed: bool
    experts: bool
    expert_ranges: tuple[InRange, ...]
    massive: Mapping[str, tuple[float, float]]
    steps: tuple[tuple[Statistic, Reduction], ...]
    others: tuple[tuple[Statistic, Reduction], ...]
    head_size: int = 0

    @classmethod
    def of(cls, statistics: frozenset[Statistic], head_size: int = 0) -> Plan:
        """Work out the plan of some statistics."""
        # Sorted, so that the order of reductions isn't that of a set.
        ordered = sorted(statistics)
        steps = tuple((s, REDUCTIONS[s.name]) for s in ordered if s.name in REDUCTIONS)
        return cls(
            tokens=TOKENS in statistics,
            channels=CHANNELS in statistics,
            elements=ELEMENTS in statistics,
            moments=MOMENTS in statistics,
            counts=COUNTS in statistics,
            signed=SIGNED_COUNTS in statistics,
            experts=EXPERTS in statistics,
            expert_ranges=tuple(s for s in ordered if isinstance(s, InRange) and s.inner == EXPERTS),
            massive={s.key: (s.absolute, s.ratio) for s in ordered if isinstance(s, Massive)},
            steps=steps,
            others=tuple(step for step in steps if step[0].name not in FUSED),
            head_size=head_size,
        )

    @cached_property
    def ordered(self) -> bool:
        """Whether the order statistics of a row's elements are needed."""
        return self.elements or bool(self.massive)

    @cached_property
    def counted(self) -> bool:
        """Whether a row's patterns have to be counted."""
        return self.counts or self.signed or self.ordered

    @cached_property
    def packs(self) -> bool:
        """Whether it is only what one launch reduces of many populations: tokens, and moments."""
        return self.tokens and not (self.channels or self.counted or self.experts or self.others)

    @cached_property
    def repeats(self) -> bool:
        """Whether the maxima of tokens and counts of magnitudes are all that is needed."""
        more = self.channels or self.moments or self.signed or self.ordered or self.experts or self.others
        return self.tokens and not more


class Tables:
    """Small tables on a device, made there once: a copy of numbers from the host would wait for it."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Tensor] = {}

    def ranks(self, count: int, device: torch.device) -> Tensor:
        """Return `ranks_of`, [7] int64."""
        key = (count, device)
        if key not in self._made:
            # torch.tensor would copy the ranks from the host.
            filled = [torch.full((), rank, dtype=torch.int64, device=device) for rank in ranks_of(count)]
            self._made[key] = torch.stack(filled)
        return self._made[key]

    def values(self, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what the first 16-bit patterns stand for, [bins] float32."""
        key = (bins, dtype, device)
        if key not in self._made:
            patterns = torch.arange(bins, dtype=torch.int32, device=device).to(torch.int16)
            self._made[key] = patterns.view(dtype).float()
        return self._made[key]


@dataclass(eq=False)
class Row:
    """One population, [T, C] with a token axis, else [n]. What several reductions need of it is computed once.

    `whole`: the tensor as it came. `kept`: the indices of the tokens that count, None where all do. `counted`: these
    tokens. `sample`: whose it is. `compiled`: the CPU's kernels may be used.
    """

    whole: Tensor
    kept: Tensor | None
    counted: Tensor
    sample: int
    plan: Plan
    tables: Tables
    compiled: bool = False

    @property
    def has_tokens(self) -> bool:
        """Whether there is a token axis."""
        return self.whole.dim() == 2

    @cached_property
    def wide(self) -> Tensor:
        """The tokens that count as float32, or as they are in float64."""
        return self.counted if self.counted.dtype in (torch.float32, torch.float64) else self.counted.float()

    @cached_property
    def floats(self) -> Tensor:
        """The tokens that count as float32."""
        return self.wide.float()

    @cached_property
    def magnitudes(self) -> Tensor:
        """|x| of the tokens that count, as wide."""
        return self.wide.abs()

    @cached_property
    def elements(self) -> Tensor:
        """|x| of all elements, [n]."""
        return self.magnitudes.flatten()

    def spread(self, values: Tensor, padding: float) -> Tensor:
        """Return a number for each of all tokens, [T], from those of the tokens that count."""
        if self.kept is None:
            return values
        return values.new_full((self.whole.shape[0],), padding).index_copy_(0, self.kept, values)

    @cached_property
    def pattern_counts(self) -> Tensor:
        """How often each 16-bit pattern occurs: of x, [65,536], where the signs count, else of |x|, [32,768]."""
        return count_patterns(self.counted.flatten(), signed=self.plan.signed)

    @cached_property
    def magnitude_counts(self) -> Tensor:
        """How often each pattern of |x| occurs, int64 [32,768]."""
        counts, half = self.pattern_counts, 1 << 15
        return counts[:half] + counts[half:] if self.plan.signed else counts

    @cached_property
    def order(self) -> Tensor:
        """The order statistics of |x|, `TOP_NAMES`: exact for 16 bits; else the median within 2⁻⁸, the ends exact."""
        count = self.elements.numel()
        ranks = self.tables.ranks(count, self.whole.device)
        return _order(self.magnitude_counts, self.elements, self.counted.dtype, ranks)


@reduces(InRange.name)
def of_range(statistic: InRange, row: Row, into: Accumulator) -> None:
    """Reduce some tokens of a row alone; a row that has none of them gets zeros, so that each population has a row."""
    within, inner = into.of_range(str(statistic)), statistic.inner
    tokens = row.counted[statistic.tokens]
    within.take("in_range", torch.full((), len(tokens), dtype=torch.int64, device=tokens.device))
    reduction = REDUCTIONS.get(inner.name)
    if reduction is None:  # experts, which the observer counts
        return
    some = tokens if len(tokens) else row.counted[:1]
    part = Row(some, None, some, row.sample, Plan.of(frozenset({inner}), row.plan.head_size), row.tables, row.compiled)
    if len(tokens):
        reduction(inner, part, within)
        return
    blank = Accumulator(into.arena)
    reduction(inner, part, blank)
    for name, rows in blank.rows.items():
        within.take(name, torch.zeros_like(torch.as_tensor(rows[0])))


def reduce_each(steps: Iterable[tuple[Statistic, Reduction]], row: Row, into: Accumulator) -> None:
    """Reduce a row to some statistics; those that need tokens are left out where there are none."""
    for statistic, reduction in steps:
        if row.has_tokens or not statistic.needs_tokens:
            reduction(statistic, row, into)


def count_patterns(x: Tensor, *, signed: bool) -> Tensor:
    """Count 16-bit patterns, int64 [65,536] of x or [32,768] of |x|; float32 by its upper half."""
    if x.dtype in (torch.bfloat16, torch.float16):
        patterns = x.contiguous().view(torch.int16).int()
    else:
        # The shift repeats the sign in the upper bits, which the mask below clears.
        patterns = x.float().contiguous().view(torch.int32) >> 16
    patterns = patterns & (0xFFFF if signed else 0x7FFF)
    size = 1 << (16 if signed else 15)
    if x.device.type == "cpu":
        return torch.bincount(patterns, minlength=size)
    # Not bincount: it would wait for the device, because the length of its result depends on the values.
    counts = torch.zeros(size, dtype=torch.int64, device=x.device)
    ones = torch.ones((), dtype=torch.int64, device=x.device).expand(len(patterns))
    return counts.scatter_add_(0, patterns.long(), ones)


def _order(counts: Tensor, magnitudes: Tensor, dtype: torch.dtype, ranks: Tensor) -> Tensor:
    count = magnitudes.numel()
    bins = torch.searchsorted(counts.cumsum(0), ranks.clamp(0, count - 1), right=True)
    if dtype in (torch.bfloat16, torch.float16):
        # A 16-bit pattern is its own bin.
        order = bins.to(torch.int16).view(dtype).float()
    else:
        # A bin has the upper half of a pattern; the middle of the lower half stands for all in it.
        order = ((bins << 16) | (bins > 0).long() << 15).to(torch.int32).view(torch.float32).clone()
        few = min(3, count)
        order[:few] = magnitudes.topk(few).values.float()
        order[7 - few :] = magnitudes.topk(few, largest=False).values.flip(0).float()
    return blank_missing(order, ranks, count)


def blank_missing(values: Tensor, ranks: Tensor, count: int) -> Tensor:
    """Return order statistics [..., 7] with NaN for ranks that there are none of, and for all where the largest is."""
    return values.masked_fill((ranks < 0) | (ranks >= count) | ~values[..., :1].isfinite(), float("nan"))


def peak_count(counted: int, length: int) -> int:
    """Return how many of the largest tokens keep their channel: max(16, T / 32), of those that count."""
    return min(counted, max(PEAKS_MIN, length // PEAKS_SHARE))

"""What a metric sees: the numbers of one site of one layer, and which of its tokens count. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..captures import (
    LAYOUTS,
    LOGITS,
    OF_THE_SITE,
    PADDING,
    PER_TOKEN,
    InRange,
    PositionRange,
    Sinks,
    Site,
    SiteNumbers,
    Statistic,
    lower_median,
)
from ..common import AnomalyError


@dataclass(frozen=True)
class View:
    """One site of one layer as a metric sees it: what the pass kept of it, and which tokens count.

    A population is one call of the layer for one sample; there are P of them. `numbers.arrays` holds what the metric's
    statistics keep, in the units of the tensor x, under these names (docs/capture-format.md has the rest):

    - `tokens`: `token_max` [sum of `numbers.lengths`] float32, max over channels of |x| of each token, populations one
      after the other, −1 at padding; `token_maxima()` yields those that count, an array for each population.
    - `channels`: `channel_max` [C] float32, max over tokens of |x|; `channel_top` [P, 7] float32, its order statistics
      top1, top2, top3, median, min3, min2, min in each population.
    - `elements`: `element_top` [P, 7] float32, the same order statistics of |x|.
    - `moments`: `moments` [P, 7] float64: n, mean, sums of the second and fourth powers of x − mean, max of |x|, how
      many zeros, how many NaN and Inf; `numbers.moment(name)` returns the column n, mean, m2, m4, absmax, zeros or
      nonfinite, [P].
    - `counts`, `signed_counts`: `bins` and `counts`, `signed_bins` and `signed_counts`: 16-bit patterns of |x|, or x,
      and how often each occurs; `extremes` [4] float32.
    - `error`: `error` [sum of lengths, 4] float32 of each token: Σx², Σ(x − x̂)², Σx̂², max of |x − x̂|, x the
      reference's; −1 at padding.
    - `scores`, `agreement`, at the site `logits`: `scores` [sum of lengths, 4] float64: −ln q and −ln p of the token
      that came next, the KL divergence, in nats, and 1 where both models find the same token likeliest.

    `numbers.sample`, `numbers.call` [P] say whose populations they are, `numbers.lengths` [P] how many tokens each has.
    `site`, `layer`: where. `positions`: which tokens count. `sinks`: the attention sinks. `reference`: the reference's
    own numbers there, if any. `sampled`: the reference was kept for some tokens only.
    `whole`: the numbers of all positions, where `numbers` are those of a range.
    """

    numbers: SiteNumbers
    site: Site
    positions: str
    sinks: Sinks
    layer: str = ""
    reference: SiteNumbers | None = None
    sampled: bool = False
    whole: SiteNumbers | None = None

    def within(self, needs: Iterable[Statistic]) -> View:
        """Return the view of the tokens that a range of positions names; the same where `positions` is none.

        Raises:
            AnomalyError: no sample has such a token.
        """
        span = PositionRange.parse(self.positions)
        if span is None:
            return self
        ranged = [each for each in needs if isinstance(each, InRange)]
        if self.site == LOGITS:
            counts, numbers = _of_predictions(self.numbers, span)
        elif ranged:
            counts, numbers = _of_ranges(self.numbers, ranged)
        else:
            counts, numbers = _tokens_in(self.numbers, span), self.numbers
        if not counts.any():
            longest = int(self.numbers.lengths.max(initial=0))
            raise AnomalyError(
                f"no sample has {span.text}: the longest has {longest:,} tokens; raise data.seq_len, or begin earlier"
            )
        # A sample that is too short for the range is no population of it.
        reference = self.reference and self.reference.only(counts > 0)
        positions = "all" if ranged else self.positions
        return replace(
            self, numbers=numbers.only(counts > 0), reference=reference, positions=positions, whole=self.numbers
        )

    def of_reference(self) -> View:
        """Return the same site of the reference, where the same tokens count."""
        assert self.reference is not None
        return replace(self, numbers=self.reference, reference=None)

    def among(self, population: int, counting: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return those of a population's tokens that count, [T] booleans, that `positions` names."""
        return self.sinks.among(self.positions, counting, int(self.numbers.sample[population]), self.layer)

    def kept(self, population: int) -> NDArray[np.bool_]:
        """Return [T] booleans, true at the tokens that count: no padding, and what `positions` says."""
        return self.among(population, self.numbers.tokens_of(population) != PADDING)

    def ratios(self, population: int) -> NDArray[np.float32]:
        """Return [T] multiples of the lower median of the tokens that count; −∞ elsewhere, or if it isn't above 0."""
        tokens, kept = self.numbers.tokens_of(population), self.kept(population)
        median = np.float32(lower_median(tokens[kept]))
        if not median > 0:
            return np.full(len(tokens), -np.inf, dtype=np.float32)
        return np.where(kept, tokens / median, np.float32(-np.inf))

    def token_maxima(self) -> Iterator[NDArray[np.float32]]:
        """Yield the token-wise maxima that count, one array a population."""
        for population in range(self.numbers.populations):
            yield self.numbers.tokens_of(population)[self.kept(population)]


def _of_predictions(numbers: SiteNumbers, span: PositionRange) -> tuple[NDArray[np.int64], SiteNumbers]:
    """Return how many predictions of each sample lie in a range, [P], and the numbers, the others' NaN."""
    by_token = {name: array for name, array in numbers.arrays.items() if LAYOUTS[name.partition("/")[0]] == PER_TOKEN}
    # A row of padding alone has nothing.
    known = [~np.isnan(array).reshape(len(array), -1).all(axis=1) for array in by_token.values()]
    counting = np.logical_or.reduce(known)
    parts = [span.among(part) for part in np.split(counting, numbers.offsets[1:-1])]
    kept = np.concatenate(parts)
    blanked = {}
    for name, array in by_token.items():
        blanked[name] = array.copy()
        blanked[name][~kept] = np.nan
    return np.array([part.sum() for part in parts]), numbers.having((), blanked)


def _of_ranges(numbers: SiteNumbers, ranged: Sequence[InRange]) -> tuple[NDArray[np.int64], SiteNumbers]:
    """Return how many tokens of each population lie in the range of some statistics, [P], and these, named plainly."""
    # What is the same of all tokens is that of these.
    arrays = {name: a for name, a in numbers.arrays.items() if LAYOUTS[name.partition("/")[0]] == OF_THE_SITE}
    for each in ranged:
        inner, kinds = each.inner, each.inner.arrays
        names = {kind: inner.key if inner.by_parameters else kind for kind in kinds}
        named = {plain: InRange.named(str(each), kind) for kind, plain in names.items()}
        # What is pooled is kept of ranges that some sample reaches.
        arrays |= {plain: numbers.arrays[name] for plain, name in named.items() if name in numbers}
    counts: NDArray[np.int64] = numbers.arrays[ranged[0].key]
    return counts, replace(numbers, arrays=arrays, statistics=frozenset(each.inner for each in ranged))


def _tokens_in(numbers: SiteNumbers, span: PositionRange) -> NDArray[np.int64]:
    """Return how many tokens of each population lie in a range, sinks included, [P]."""
    if "token_max" in numbers:
        counting = numbers.token_max != PADDING
    elif "error" in numbers:
        counting = numbers.error[:, 0] != PADDING
    else:
        counting = np.ones(int(numbers.lengths.sum()), dtype=bool)
    return np.array([span.among(part).sum() for part in np.split(counting, numbers.offsets[1:-1])])

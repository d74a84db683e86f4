"""What the whole model predicts, against the text's next tokens and against its reference. numpy only.

One position is one row of the logits: position t has read the tokens up to t and says how likely each next one is. The
last position of a sample has no next token, so it counts for what compares the two models only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..captures import AGREEMENT, SCORE_NAMES, SCORES, SHIFTS, PositionRange, Site, SiteNumbers, Statistic
from ..common import AnomalyError
from .intervals import LEAST_WINDOWS, mean_by_window, ratio_by_window, t_quantile, windows_of
from .registry import NOT_NEGATIVE, SHARE, TWO_SIDED_95, Estimate, Parameters, metric
from .view import View

NLL, REFERENCE_NLL, KL, SAME_TOP = range(len(SCORE_NAMES))
GROWTH_WINDOWS = 32
"""Of four windows, healthy models grow by 0.58 to 1.24."""
RECAST = 0.001
"""The KL divergence of a float32 model recast to bfloat16, SmolLM2's."""
LEAST_BASE = 3 * RECAST
KlStat = Literal["mean", "median", "p99", "max"]
DeltaStat = Literal["rms", "mean", "p1", "p5", "p50", "p95", "p99", "min", "max"]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The scores of one sample of T tokens, in nats; NaN where a number isn't known.

    `nll`, `reference_nll` [T]: −ln of the probability of the token at t + 1. `kl` [T]: Σ p·(ln p − ln q), p the
    reference's. `same_top` [T]: 1 where the reference's likeliest token is one of the model's own, else 0.
    """

    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64] | None = None
    kl: NDArray[np.float64] | None = None
    same_top: NDArray[np.float64] | None = None

    def table(self) -> NDArray[np.float64]:
        """Return `SCORE_NAMES` of each position, [T, 4]."""
        # All columns whatever is known, so that `scores` has one shape in every capture.
        unknown = np.full(len(self.nll), np.nan)
        columns = (self.nll, self.reference_nll, self.kl, self.same_top)
        return np.stack([unknown if column is None else column for column in columns], axis=1).astype(np.float64)


def numbers_of(
    samples: Sequence[TokenScores], indices: Sequence[int], statistics: frozenset[Statistic], dtype: str
) -> SiteNumbers:
    """Return the scores of some samples as the numbers of the site `logits`. `indices`: the number of each sample."""
    lengths = np.array([len(sample.nll) for sample in samples], dtype=np.int64)
    return SiteNumbers(
        dtype=dtype,
        shape=(),
        token_axis=True,
        statistics=statistics,
        sample=np.array(indices, dtype=np.int32),
        call=np.zeros(len(samples), dtype=np.int32),
        lengths=lengths,
        arrays={"scores": np.concatenate([sample.table() for sample in samples])},
    )


@metric(AGREEMENT, reduce=None, unit="nats", per="logits", against=True, span=NOT_NEGATIVE)
def kl_divergence(view: View, *, stat: KlStat = "mean") -> float | Estimate:
    """Take Σ p·(ln p − ln q) over the vocabulary at each position, p the reference's, then a statistic of them all.

    llama.cpp `--kl-divergence`. The mean has a 95 % interval.
    """
    values = _known(view, KL)
    if stat == "mean":
        return _mean(values)
    return float(np.percentile(values, {"median": 50, "p99": 99, "max": 100}[stat]))


def _growth_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    return frozenset({AGREEMENT, SHIFTS} if parameters["paired"] else {AGREEMENT})


@metric(_growth_needs, reduce=None, per="logits", against=True, span=NOT_NEGATIVE)
def growth(view: View, *, of: Literal["kl_divergence"] = "kl_divergence", paired: bool = False) -> Estimate:
    """Divide the mean KL divergence over the last quarter of each sample's positions by that over the second quarter.

    A fault of positions, of a window or of a cache shows at depth alone. With its 95 % interval by window, linearised.
    `paired`: the same tokens are read twice, at depth and, in a sample that begins later in the same text
    (`data.stride`), with less text before them, so that the text cancels out. A range of positions is then what counts
    as depth; otherwise the quarters are those of the range.
    """
    return _paired_growth(view) if paired else _growth(view)


def _growth(view: View) -> Estimate:
    """Divide what the last quarter of each sample loses by what the second one does."""
    quarters = [_quarters(part) for part in np.split(view.numbers.scores[:, KL], view.numbers.offsets[1:-1])]
    second, last = (np.array([pair[side].sum() for pair in quarters]) for side in (0, 1))
    counts = [np.array([len(pair[side]) for pair in quarters]) for side in (0, 1)]
    if len(quarters) < GROWTH_WINDOWS:
        raise AnomalyError(
            f"{len(quarters)} samples can't show how an error grows: it takes {GROWTH_WINDOWS} (data.num_samples)"
        )
    if not all(count.sum() for count in counts):
        raise AnomalyError("no sample has four positions, a quarter each: raise data.seq_len")
    base, depth = second.sum() / counts[0].sum(), last.sum() / counts[1].sum()
    _check_base(base, "over the second quarter")
    ratio, windows = float(depth / base), len(quarters)
    rests = (last - ratio * base * counts[1]) / counts[1].sum() - ratio * (second - base * counts[0]) / counts[0].sum()
    half = t_quantile(windows - 1) * math.sqrt(windows / (windows - 1) * float(np.square(rests).sum())) / float(base)
    return Estimate(ratio, ratio - half, ratio + half, int(counts[0].sum() + counts[1].sum()))


def _paired_growth(view: View) -> Estimate:
    """Divide what tokens at depth lose by what the same tokens lose in the sample that begins last before them."""
    numbers, span = view.whole or view.numbers, PositionRange.parse(view.positions)
    samples, shifts = np.split(numbers.scores[:, KL], numbers.offsets[1:-1]), numbers.arrays[SHIFTS.key]
    pairs: list[tuple[int, float, float, int]] = []
    for index, deep in enumerate(samples):
        counting = ~np.isnan(deep)
        rows = np.flatnonzero(span.among(counting) if span else counting)
        rows = rows if span else rows[len(rows) - len(rows) // 4 :]
        other, shift = _last_before(shifts, index, int(rows[0]) if len(rows) else 0)
        rows = rows[rows - shift < len(samples[other])]
        near = samples[other][rows - shift]
        both = ~np.isnan(near)
        pairs.append((shift, float(deep[rows][both].sum()), float(near[both].sum()), int(both.sum())))
    # The last samples have none that begins so much later: they would be compared with more text before them.
    farthest = max(shift for shift, *_ in pairs)
    pairs = [pair for pair in pairs if pair[0] == farthest > 0 and pair[-1]]
    if len(pairs) < LEAST_WINDOWS:
        raise AnomalyError(
            f"{len(pairs)} samples share the tokens at depth with one that begins later in the text, and it takes "
            f"{LEAST_WINDOWS}: say data.stride, half of data.seq_len for the last quarter, and data.num_samples"
        )
    _, last, first, counts = (np.array(column) for column in zip(*pairs, strict=True))
    _check_base(float(first.sum() / counts.sum()), "of the same tokens with less text before them")
    return replace(ratio_by_window(last, first), count=int(counts.sum()))


def _last_before(shifts: NDArray[np.int64], index: int, row: int) -> tuple[int, int]:
    """Return the last sample that begins at or before a row of a sample, and how much later it begins; 0 for none."""
    other, shift = index, 0
    while shifts[other] and shift + shifts[other] <= row:
        shift += int(shifts[other])
        other += 1
    return other, shift


def _check_base(base: float, where: str) -> None:
    """Refuse a divergence that is too small to be divided by."""
    if not base > LEAST_BASE:
        raise AnomalyError(
            f"the KL divergence {where}, {base:.2g}, is within 3 × what a recast to bfloat16 makes "
            f"({RECAST:g}): how it grows says nothing"
        )


def _quarters(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the second and the last quarter of a sample's known values, as many of each."""
    known = values[~np.isnan(values)]
    quarter = len(known) // 4
    return known[quarter : 2 * quarter], known[len(known) - quarter :]


@metric(AGREEMENT, reduce=None, per="logits", against=True, worst="lowest", span=SHARE)
def same_top(view: View) -> Estimate:
    """Take the share of positions where both models find the same token likeliest; a tie is no difference.

    With the 95 % interval of a share.
    """
    return _mean(_known(view, SAME_TOP))


@metric("overlap", reduce=None, per="logits", against=True, worst="lowest", perfect=1.0, span=SHARE)
def overlap(view: View) -> Estimate:
    """Take the mean of Σ min(p, q) over the vocabulary at each position: 1 − the total variation of both predictions.

    It is the share of drafted tokens that speculative sampling accepts with the subject as draft of the reference
    (Leviathan et al., arXiv 2211.17192). With its 95 % interval by window.
    """
    values = view.numbers.arrays["overlap"]
    known = ~np.isnan(values)  # NaN stands at padding
    return mean_by_window(values[known], windows_of(view)[known])


@metric(AGREEMENT, reduce=None, per="logits", against=True, span=(-1.0, 1.0))
def delta_p(view: View, *, stat: DeltaStat = "rms") -> float:
    """Take q − p of the probability of the text's next token, p the reference's; then a statistic of all positions.

    llama.cpp. Symmetric: noise; skewed: harm. `rms` is the root of the mean square.
    """
    own, reference = _pairs(view)
    values = np.exp(-own) - np.exp(-reference)
    plain: dict[str, Any] = {"mean": np.mean, "min": np.min, "max": np.max}
    if stat == "rms":
        return float(np.sqrt(np.mean(values * values)))
    return float(plain[stat](values) if stat in plain else np.percentile(values, float(stat[1:])))


@metric(SCORES, reduce=None, per="logits", span=NOT_NEGATIVE)
def perplexity(view: View) -> float:
    """Take exp of the mean −ln q of the text's next tokens, all samples pooled."""
    return float(np.exp(_known(view, NLL).mean()))


@metric(AGREEMENT, reduce=None, per="logits", against=True)
def ln_ppl_ratio(view: View) -> Estimate:
    """Take the mean of nll_q − nll_p, position by position: ln of the ratio of the perplexities (llama.cpp).

    The 95 % interval comes from the standard error of the paired differences, far smaller than either model's.
    """
    own, reference = _pairs(view)
    return _mean(own - reference)


def _mean(values: NDArray[np.float64]) -> Estimate:
    """Return the mean within 1.96 standard errors of it."""
    mean = float(values.mean())
    half = TWO_SIDED_95 * float(values.std(ddof=1)) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(mean, mean - float(half), mean + float(half), len(values))


def _known(view: View, column: int) -> NDArray[np.float64]:
    scores = view.numbers.scores
    values: NDArray[np.float64] = scores[~np.isnan(scores[:, column]), column]
    if not len(values):
        raise AnomalyError(
            "no token of the samples has a next one that the model predicts: "
            f"{SCORE_NAMES[column]} is known of causal models only, and needs samples of two tokens or more"
        )
    return values


def _pairs(view: View) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # Only for its error, which says why no token counts.
    _known(view, NLL)
    scores = view.numbers.scores
    both = ~np.isnan(scores[:, NLL]) & ~np.isnan(scores[:, REFERENCE_NLL])
    return scores[both, NLL], scores[both, REFERENCE_NLL]

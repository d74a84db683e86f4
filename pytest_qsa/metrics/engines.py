"""The metric of two engines that run one checkpoint: how far their layers or predictions are apart. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..captures import (
    DRAFTS,
    LOGITS,
    MOMENT_NAMES,
    MOMENTS,
    OTHER_ENGINE,
    OTHER_PREDICTIONS,
    PADDING,
    SCORES,
    TOKENS,
    Array,
    Site,
    Statistic,
    lower_median,
)
from ..common import AnomalyError, SuiteError
from .registry import NOT_NEGATIVE, TWO_SIDED_95, Estimate, Parameters, metric
from .view import View

GapStat = Literal["rms", "outlier_tokens", "absmax", "kl"]
LEAST_SAMPLES = 4
"""Fewer samples give no interval of what is drafted behind them."""
THRESHOLD = np.float32(64)
"""The outlier tokens that are counted are those of `outlier_tokens` by default."""
LEAST_FLOOR: Mapping[GapStat, float] = {"rms": 0.004, "outlier_tokens": 1.0, "absmax": 0.0704, "kl": 0.001}
"""What healthy models stay within 6 times of between vLLM and transformers: SmolLM2 reaches 0.0021 and 0.070 in
bfloat16, 0.016 and 0.14 in int8 (docs/engines.md), ln; of counts, one; of predictions 0.0021 and 0.0445 nats."""


def _needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    if (parameters["stat"] == "kl") != (site == LOGITS):
        raise SuiteError("engine_gap: stat: kl is of the predictions, the others are of layers at input or output")
    return frozenset({SCORES, OTHER_PREDICTIONS} if site == LOGITS else {MOMENTS, TOKENS, OTHER_ENGINE})


@metric(_needs, reduce=None, unit="× floor", sites=("input", "output", LOGITS), span=NOT_NEGATIVE)
def engine_gap(view: View, *, stat: GapStat = "rms", relative: bool = True) -> float:
    """Take |ln(a / b)| of a layer's rms or absmax, or |a − b| of its outlier tokens, in model.engine and transformers.

    `kl`: the mean KL divergence of the engine's predictions from transformers', in nats. `relative`: as a multiple of
    its floor, the larger of the gap between transformers' own two attentions (its default and eager) and a constant
    that healthy engines stay near. Over all samples.
    """
    if view.positions != "all":
        raise SuiteError("engine_gap is of all tokens: leave positions out")
    arrays = view.numbers.arrays
    if stat == "kl":
        gap, floor = (float(np.nanmean(arrays[name])) for name in ("other_kl", "eager_kl"))
        return gap / max(floor, LEAST_FLOOR[stat]) if relative else gap
    own, other, eager = (
        _number(stat, arrays[moments], arrays[maxima], view.numbers.lengths)
        for moments, maxima in (
            ("moments", "token_max"),
            ("other_moments", "other_max"),
            ("eager_moments", "eager_max"),
        )
    )
    gap = _gap(stat, own, other)
    return gap / max(_gap(stat, other, eager), LEAST_FLOOR[stat]) if relative else gap


@metric(DRAFTS, reduce=None, worst="lowest", span=(0.0, 1.0))
def mtp_acceptance(view: View) -> Estimate:
    """Take the share of the tokens that the checkpoint's MTP head drafts in vLLM which the model itself would write.

    The sum of vLLM's counter of accepted tokens over that of drafted ones, greedy, while 32 tokens are written behind
    each sample. The interval is that of a ratio of sums over the samples (Cochran, Sampling Techniques, 6.4).
    """
    if view.positions != "all":
        raise SuiteError("mtp_acceptance is of what follows a sample: leave positions out")
    drafted, accepted = view.numbers.arrays["drafts"].T
    if not drafted.sum():
        raise AnomalyError("vLLM drafted no token: what it wrote behind the samples ended at once")
    share, count = float(accepted.sum() / drafted.sum()), len(drafted)
    if count < LEAST_SAMPLES:
        return Estimate(share, float("nan"), float("nan"), int(drafted.sum()))
    spread = np.sqrt(((accepted - share * drafted) ** 2).sum() * count / (count - 1)) / drafted.sum()
    half = TWO_SIDED_95 * float(spread)
    return Estimate(share, max(0.0, share - half), min(1.0, share + half), int(drafted.sum()))


def _gap(stat: GapStat, one: float, other: float) -> float:
    if stat == "outlier_tokens":
        return abs(one - other)
    if not (one > 0 and other > 0):
        if one == other:
            return 0.0
        raise AnomalyError("one engine has only zeros here, or something that is no number, and the other has not")
    return float(abs(np.log(one / other)))


def _number(stat: GapStat, moments: Array, maxima: NDArray[np.float32], lengths: NDArray[np.int64]) -> float:
    """Return the number of all samples: of moments [P, 7] and token-wise maxima [sum of lengths]."""
    columns = dict(zip(MOMENT_NAMES, moments.T, strict=True))
    if stat == "absmax":
        return float(columns["absmax"].max())
    if stat == "rms":
        count, mean, m2 = columns["n"], columns["mean"], columns["m2"]
        return float(np.sqrt((m2 + count * mean**2).sum() / count.sum()))
    samples = (part[part != PADDING] for part in np.split(maxima, np.cumsum(lengths)[:-1]))
    return float(sum(np.count_nonzero(each > THRESHOLD * np.float32(lower_median(each))) for each in samples))

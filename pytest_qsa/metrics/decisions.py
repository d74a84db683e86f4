"""What quantization does to decisions: how clearly the reference's token is still preferred, and where it no longer is.

A margin is z_t − max z_v over all other tokens v, t the token that the reference finds likeliest: `m` in the
reference's logits, `m̂` in the subject's at the same t, in logits made again in float64 (captures/statistics.py).
numpy only.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..captures import AGREEMENT, BoundaryTokens, PredictionMargins, Site, Statistic
from ..common import AnomalyError, SuiteError
from .intervals import mean_by_window, quantile_by_window, share_by_window, windows_of
from .predictions import NLL, REFERENCE_NLL
from .registry import Estimate, Parameters, metric
from .view import View

MARGINS: Statistic = PredictionMargins()
CLEAR = 0.5
"""The least margin of the reference, in logits, that `margin_ratio` counts: below it both tokens will do."""
LEAST_BOUNDARIES = 30
"""Fewer boundaries can't show that one in ten is lost."""
RatioStat = Literal["median", "mean", "p10"]
BoundaryStat = Literal["recall", "missed", "spurious"]

Floats = NDArray[np.float64]


@metric(MARGINS, reduce=None, per="logits", against=True, worst="lowest", perfect=1.0)
def margin_ratio(view: View, *, stat: RatioStat = "median") -> Estimate:
    """Take max(0, m̂) / m of each position whose margin m is 0.5 or more: how much of a clear decision is left.

    arXiv 2608.06564. With its 95 % interval by window. `p10` is for looking: it is 0.48 to 0.63 of healthy models.
    """
    own, windows = _margins(view)
    clear = own[:, 0] >= CLEAR
    if not clear.any():
        raise AnomalyError(f"the reference prefers no token by a margin of {CLEAR} or more: nothing is decided there")
    ratios, windows = np.maximum(own[clear, 1], 0.0) / own[clear, 0], windows[clear]
    if stat == "mean":
        return mean_by_window(ratios, windows)
    return quantile_by_window(ratios, windows, {"median": 0.5, "p10": 0.1}[stat])


@metric(MARGINS, reduce=None, per="logits", against=True, perfect=0.0)
def flips(view: View, *, margin_from: float = 0.0, margin_to: float | None = None) -> Estimate:
    """Take the share of the positions with margin_from ≤ m < margin_to whose likeliest token is another one.

    Without margin_to there is no upper end (arXiv 2607.01478). From 0 on it is 1 − same_top, but for ties of 16-bit
    logits, which are broken here; equal logits in float64 are no difference. With its 95 % interval by window.
    """
    end = math.inf if margin_to is None else margin_to
    if not 0 <= margin_from < end:
        raise SuiteError(f"flips: margin_from is 0 or more and below margin_to, not {margin_from:g}", "margin_from")
    own, windows = _margins(view)
    inside = (own[:, 0] >= margin_from) & (own[:, 0] < end)
    if not inside.any():
        raise AnomalyError(f"no position has a margin from {margin_from:g} to {end:g}: there is nothing to count")
    return share_by_window(own[inside, 1] < 0, windows[inside])


def _boundary_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    return frozenset({MARGINS, AGREEMENT, BoundaryTokens(parameters["tokens"])})


@metric(
    _boundary_needs,
    reduce=None,
    per="logits",
    against=True,
    perfect={"recall": 1.0, "missed": 0.0, "spurious": 0.0},
    counts={"recall": "boundaries", "missed": "boundaries", "spurious": "positions"},
)
def boundary_tokens(view: View, *, stat: BoundaryStat = "recall", tokens: str = "auto") -> Estimate:
    """Look at where the reference ends an answer or marks a thought or a tool call: the share that the model does too.

    `recall`: its likeliest tokens are the boundary's. `missed`: it finds one of them less than half as likely.
    `spurious`: boundaries that it finds likeliest elsewhere, per 1,000 positions. On the reference's own answers
    (`data.answers`). `tokens`: `auto`, the tokens that end an answer and those that the chat template writes, or their
    texts, with spaces between them. With its 95 % interval by window. The field's report: prismaquant#87.
    """
    table, windows = view.numbers.arrays[BoundaryTokens(tokens).key], windows_of(view)
    margins, scores = view.numbers.arrays["margins"], view.numbers.scores
    if stat == "spurious":
        # Where the reference writes a boundary that did not come, the model may as well.
        elsewhere = (table[:, 0] == -1) & ~np.isin(margins[:, 2], table[table[:, 0] >= 0, 0])
        if not elsewhere.any():
            raise AnomalyError("no answer has a token that is no boundary")
        found = share_by_window(table[elsewhere, 2] >= 0, windows[elsewhere])
        return Estimate(1000 * found.value, 1000 * found.low, 1000 * found.high, found.count)
    rows = np.flatnonzero(table[:, 0] >= 0)
    first = np.flatnonzero(table[rows, 1] == 0)
    came, likeliest, own = table[rows, 0], margins[rows, 2], margins[rows, 3]
    # Only where it is the reference's own choice: in a prompt, and in answers of others, it may not be.
    chosen = np.logical_and.reduceat(likeliest == came, first) if len(first) else np.zeros(0, dtype=bool)
    if (own_ones := int(chosen.sum())) < LEAST_BOUNDARIES:
        times = f", about {LEAST_BOUNDARIES / own_ones:.1f} × as many" if own_ones else ""
        raise AnomalyError(
            f"the reference writes {own_ones} boundaries in these samples, and it takes {LEAST_BOUNDARIES} to show a "
            f"loss: take its own answers (data.answers) to more prompts (data.num_samples{times}), or longer ones "
            "(data.answers.max_new_tokens)"
        )
    unlikely = scores[rows, NLL] - scores[rows, REFERENCE_NLL] > math.log(2)
    flags = np.logical_and.reduceat(own == came, first) if stat == "recall" else np.logical_or.reduceat(unlikely, first)
    return share_by_window(flags[chosen], windows[rows][first][chosen])


def _margins(view: View) -> tuple[Floats, NDArray[np.int64]]:
    """Return `MARGIN_NAMES` of each position that counts, [N, 4], and which window it is of, [N]."""
    values = view.numbers.arrays["margins"]
    known = ~np.isnan(values).any(axis=1)
    if not known.any():
        raise AnomalyError("no position has a margin: the logits of one of the models hold NaN or Inf")
    return values[known], windows_of(view)[known]

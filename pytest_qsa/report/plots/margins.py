"""The margins of two models' decisions, one against the other: each position a point."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ...captures import LOGITS, Capture, PredictionMargins
from ...common import counted
from ...metrics import View
from ...verdicts import Verdict
from .style import BLUE, INK, MUTED, RED, add_legend, head, metric_title, new_figure, plain_number, styled

MOST_POINTS = 4000
"""More points cover one another, and take seconds to draw."""


@styled
def margin_figure(verdict: Verdict, capture: Capture) -> Figure | None:
    """Draw the model's margin over the reference's, at the token that the reference prefers; None without margins."""
    numbers = capture.sites.get((LOGITS, LOGITS))
    if verdict.query.get("site") != LOGITS or numbers is None or PredictionMargins().key not in numbers:
        return None
    view = View(numbers, LOGITS, verdict.positions or "all", capture.sinks).within(())
    margins = view.numbers.arrays[PredictionMargins().key][:, :2]
    margins = margins[~np.isnan(margins).any(axis=1)]
    if not len(margins):
        return None
    count, lost = len(margins), int((margins[:, 1] < 0).sum())
    # The widest margins decide nothing, and would press all others into a corner.
    end = max(1.0, float(np.percentile(np.abs(margins), 99)))
    shown = margins[:: -(-count // MOST_POINTS)]
    figure = new_figure(4.4)
    axes = figure.subplots()
    flipped = shown[:, 1] < 0
    for chosen, colour, label in ((~flipped, BLUE, "kept"), (flipped, RED, "the model prefers another token")):
        axes.plot(
            shown[chosen, 0], shown[chosen, 1], linestyle="none", marker="o", markersize=2.6, markeredgewidth=0,
            alpha=0.5, color=colour, label=label, gid=label.partition(" ")[0], rasterized=True,
        )  # fmt: skip
    axes.plot([0, end], [0, end], color=INK, linewidth=0.9, gid="equal", label="nothing lost")
    axes.axhline(0, color=MUTED, linewidth=0.9)
    axes.set_xlim(0, end)
    axes.set_ylim(-end / 2, end)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(plain_number))
    axes.set_xlabel("the reference's margin [logits]")
    axes.set_ylabel("the model's at that token")
    axes.grid()
    title = f"{lost / count:.1%} of the decisions fall otherwise" if lost else "Every decision is kept"
    head(
        figure, axes, title, [metric_title(verdict.query), f"{counted(count, 'position')}, axes to the 99th percentile"]
    )
    add_legend(figure, axes)
    return figure

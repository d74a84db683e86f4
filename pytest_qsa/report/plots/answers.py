"""The answers of two models to the same prompts: how far each pair is alike, and how long both are."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...captures import GENERATED, GENERATION, GENERATION_NAMES, LOGITS, Capture
from ...common import counted
from ...verdicts import Verdict
from .style import BLUE, INK, PALE, RED, add_legend, head, metric_title, new_figure, styled


@styled
def answer_figure(verdict: Verdict, capture: Capture) -> Figure | None:
    """Draw how many first tokens of each prompt's answers are alike, and both lengths; None of another metric."""
    numbers = capture.sites.get((GENERATION, LOGITS))
    if verdict.query.get("metric") != GENERATED.name or numbers is None:
        return None
    table = dict(zip(GENERATION_NAMES, numbers.arrays["generation"].T, strict=True))
    prompts, equal, length = np.arange(numbers.populations), table["equal"], table["length"]
    whole = (equal == length) & (equal == table["reference_length"])
    figure = new_figure(4.0)
    axes = figure.subplots()
    axes.bar(prompts, equal, width=0.8, color=PALE, label="tokens alike", gid="alike")
    axes.plot(
        prompts, table["reference_length"], linestyle="none", marker="o", markersize=7.5, markerfacecolor="none",
        color=INK, label="length of the reference's", gid="reference",
    )  # fmt: skip
    for chosen, colour, label in (
        (table["ended"] == 1, BLUE, "the model's, which ends"),
        (table["ended"] == 0, RED, "the model's, cut off"),
    ):
        if chosen.any():
            axes.plot(
                prompts[chosen], length[chosen], linestyle="none", marker="o", markersize=4, color=colour, label=label,
                gid=label.rpartition(" ")[2],
            )  # fmt: skip
    axes.set_xlim(-0.6, len(prompts) - 0.4)
    axes.set_ylim(0, max(1.0, float(max(length.max(), table["reference_length"].max())) * 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("prompt")
    axes.set_ylabel("tokens of the answer")
    axes.grid(axis="y")
    middle = counted(int(np.median(equal)), "token")
    title = "Every answer is the reference's" if whole.all() else f"Half of the answers part after {middle} or fewer"
    more = f"{int(whole.sum())} of {counted(len(prompts), 'answer')} the same to the end"
    head(figure, axes, title, [metric_title(verdict.query), more])
    add_legend(figure, axes)
    return figure

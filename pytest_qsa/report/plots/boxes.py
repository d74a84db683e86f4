"""Figures of distributions: all elements of a layer as a box, or as a histogram, both from exact counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...captures import SiteNumbers, counted_quantiles, sorted_counts
from .depth import spread
from .panels import panels_of
from .style import BLUE, GROUP_STYLES, INK, MUTED, PALE, add_legend, safe_text, scale_asinh, scale_log, styled

SHARES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
"""What a box shows: the extremes as dots, the whiskers, the box and its middle."""
MOST_CURVES, BINS = 4, 120


@styled
def box_figure(sites: Mapping[str, SiteNumbers], title: str, note: str, *, legend: bool = True) -> Figure:
    """Draw a box for each layer, a panel for each kind of layer; y is linear near 0 and logarithmic beyond."""
    table = np.array([counted_quantiles(numbers, SHARES, signed=True) for numbers in sites.values()])
    panels = panels_of(list(sites), title, note)
    for axes, _, members in panels:
        own = panels.depth.part(members)
        own.label_axis(axes, most=panels.ticks)
        _draw_boxes(axes, np.array(own.x), table[members].T)
    scale_asinh(panels.axes[0].yaxis, _width(np.abs(table[:, [2, 4]])))
    panels.label("block", "x")
    if legend:
        add_legend(panels.figure, panels.axes[0])
    return panels.figure


def _draw_boxes(axes: Axes, x: NDArray[np.float64], table: NDArray[np.float64]) -> None:
    least, low, first, middle, third, high, most = table
    gap = float(np.diff(np.unique(x)).min()) if len(np.unique(x)) > 1 else 1.0
    width = 0.62 * gap
    axes.vlines(x, low, high, color=MUTED, linewidth=1.0, label="1 to 99 %", gid="whiskers", zorder=2)
    axes.bar(x, third - first, width, bottom=first, color=PALE, edgecolor=BLUE, linewidth=0.8, label="25 to 75 %",
             gid="box", zorder=3)  # fmt: skip
    axes.hlines(middle, x - width / 2, x + width / 2, color=INK, linewidth=1.4, label="median", gid="median", zorder=4)
    small = 2.4 if len(x) > 40 else 3.6
    axes.plot(x, most, "^", color=INK, markersize=small, label="largest", gid="largest", zorder=4)
    axes.plot(x, least, "v", color=INK, markersize=small, markerfacecolor="white", label="smallest", gid="smallest",
              zorder=4)  # fmt: skip


@styled
def histogram_figure(sites: Mapping[str, SiteNumbers], title: str, note: str, *, legend: bool = True) -> Figure:
    """Draw the share of elements in bins of equal width on the axis, for layers spread over the depth."""
    panels = panels_of(list(sites), title, note)
    names = list(sites)
    for axes, kind, members in panels:
        chosen = [members[index] for index in spread(len(members), MOST_CURVES)]
        own = panels.depth.part(chosen)
        word = "block " if panels.depth.numbered and len(panels.depth.kinds) == len(panels.axes) else ""
        labels = [f"{word}{own.short(i)}" for i in range(len(chosen))]
        _draw_curves(axes, [sites[names[index]] for index in chosen], labels)
        axes.set_xlabel(f"x at {safe_text(kind, 80)}" if kind else "x")
        if legend:
            axes.legend(loc="upper center", ncols=4, handlelength=2.0, columnspacing=1.2)
    low, high = panels.axes[0].get_ylim()
    panels.axes[0].set_ylim(low, high * 8 if legend else high)
    scale_log(panels.axes[0])
    panels.label("x", "share of the elements in a bin")
    return panels.figure


def _draw_curves(axes: Axes, sites: Sequence[SiteNumbers], labels: Sequence[str]) -> None:
    counted = [sorted_counts(numbers, signed=True) for numbers in sites]
    finite = [(values[np.isfinite(values)], counts[np.isfinite(values)]) for values, counts in counted]
    width = _width(np.array([counted_quantiles(numbers, (0.25, 0.75), signed=True) for numbers in sites]))
    ends = [np.arcsinh(values[[0, -1]] / width) for values, _ in finite if len(values)]
    low, high = (min(end[0] for end in ends), max(end[1] for end in ends)) if ends else (-1.0, 1.0)
    edges = np.linspace(low - 1e-9, max(high, low + 1e-6) + 1e-9, BINS + 1)
    for (values, counts), label, (colour, _, dash) in zip(finite, labels, GROUP_STYLES, strict=False):
        binned, _ = np.histogram(np.arcsinh(values / width), bins=edges, weights=counts)
        shares = np.where(binned > 0, binned / max(counts.sum(), 1), np.nan)
        axes.stairs(shares, width * np.sinh(edges), color=colour, linestyle=dash, linewidth=1.4, gid="curve",
                    label=safe_text(label, 28), baseline=None)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(width * np.sinh(low), width * np.sinh(high))
    scale_asinh(axes.xaxis, width)


def _width(quartiles: NDArray[np.float64]) -> float:
    """Choose how far from 0 an axis stays linear: the middle of the quartiles' magnitudes."""
    magnitudes = np.abs(quartiles[np.isfinite(quartiles) & (quartiles != 0)])
    return float(np.median(magnitudes)) if magnitudes.size else 1.0

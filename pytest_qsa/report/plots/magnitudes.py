"""The figure of magnitudes: the largest, middle and smallest token-wise maxima by layer (PrefixQuant's plot)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...captures import Capture, Site
from ...common import QsaError
from ...metrics import Series
from ...verdicts import Row, Verdict
from .depth import Depth, panels_of
from .style import (
    BLUE,
    GREEN,
    INK,
    OCHRE,
    PALE,
    RED,
    VIOLET,
    bound_label,
    population,
    samples_of,
    scale_log,
    styled,
    wants_log,
)

STATS: Mapping[str, tuple[str, str, Any]] = {
    "top1": (INK, "^", "-"),
    "top2": (VIOLET, "s", "--"),
    "top3": (OCHRE, "v", ":"),
    "median": (BLUE, "o", "-"),
    "min": (GREEN, "D", "-."),
}
"""Colour, marker and dash of each statistic."""
_OF = {"-1": "token-wise maxima", "-2": "channel-wise maxima", "None": "|x|"}


def magnitude_title(site: Site, reduce_dim: int | None) -> str:
    """Write what a figure of magnitudes shows."""
    return f"Magnitude of the {_OF[str(reduce_dim)]} at the {site}s"


@styled
def magnitude_figure(verdict: Verdict, capture: Capture) -> Figure | None:
    """Draw top1, top2, top3, median and min by layer; None where there are not two layers with a finite one."""
    query = verdict.query
    if not query.get("layers") or not query.get("site"):
        return None
    site, positions, judged = query["site"], query.get("positions") or "all", query["metric"] == "magnitude"
    dim: Any = query["parameters"].get("reduce_dim", "auto") if judged else "auto"
    own = query["parameters"].get("stat", "top1") if judged else None
    stats: Any = [*STATS, *([own] if own and own not in STATS else [])]
    reduce = query.get("reduce") if judged else None
    try:
        selection = capture.select(query["layers"], site, query.get("exclude"))
        series = selection.magnitudes(stats, reduce_dim=dim, reduce=reduce, positions=positions)
    except QsaError:
        return None
    first = next(iter(series.values()))
    if len(first.layers) < 2 or not any(np.isfinite(each.values).any() for each in series.values()):
        return None
    if dim == "auto":
        dim = -2 if site == "weight" else -1
    samples = samples_of(capture, first.layers, site)
    note = population(first.query.reduce, samples, positions if samples else None)
    title = f"Magnitude of the {_OF[str(dim)]} at the {site}"
    rows = {row.layer: row for row in verdict.rows} if judged else {}
    return magnitude_panels(series, title, note, own=own, rows=rows)


@styled
def magnitude_panels(
    series: Mapping[Any, Series],
    title: str,
    note: str,
    *,
    own: str | None = None,
    rows: Mapping[str, Row] | None = None,
    legend: bool = True,
) -> Figure:
    """Draw the statistics by layer, in a panel for each kind of layer.

    `series`: statistic → its numbers. `own`: the one that a verdict judges; `rows`: layer → what the verdict says.
    """
    panels = panels_of(next(iter(series.values())).layers, title, note)
    for axes, depth, members in panels.by_depth():
        _draw_allowed(axes, depth, rows or {})
        _draw_statistics(axes, depth, {stat: each.values[members] for stat, each in series.items()}, own)
    positive = [value for each in series.values() for value in each.values.tolist() if 0 < value < math.inf]
    if positive and wants_log(positive):
        scale_log(panels.grid.axes[0])
    panels.label("block", "magnitude, |x|", legend=legend)
    return panels.grid.figure


def _draw_statistics(axes: Axes, depth: Depth, values: Mapping[str, NDArray[np.float64]], own: str | None) -> None:
    scattered, size = len(set(depth.x)) < len(depth.x), 2.6 if len(depth.x) > 60 else 4.2
    for stat, numbers in values.items():
        colour, marker, dash = STATS.get(stat, (RED, "P", "-"))
        loud = own in (None, stat)
        axes.plot(
            depth.x, numbers, color=colour, marker=marker, linestyle="none" if scattered else dash,
            label=stat, gid=stat, linewidth=2.2 if stat == own else 1.2, alpha=1.0 if loud else 0.45,
            zorder=4 if loud else 3, markersize=size * (1.25 if stat == own else 1.0),
        )  # fmt: skip


def _draw_allowed(axes: Axes, depth: Depth, rows: Mapping[str, Row]) -> None:
    """Draw the verdict's own bound, or its baseline with the allowed band."""
    known = [(x, rows[layer]) for x, layer in zip(depth.x, depth.layers, strict=True) if layer in rows]
    compared = [(x, row) for x, row in known if row.baseline is not None]
    if compared and len(set(depth.x)) == len(depth.x):
        x = [x for x, _ in compared]
        low = [row.low if row.low is not None else row.baseline for _, row in compared]
        high = [row.high if row.high is not None else row.baseline for _, row in compared]
        axes.fill_between(x, low, high, color=PALE, linewidth=0, zorder=1, gid="band", label="allowed")  # type: ignore[arg-type]
        return
    for bound, low_side in [(known[0][1].high, False), (known[0][1].low, True)] if known and not compared else []:
        if bound is not None:
            label = bound_label(bound if low_side else None, None if low_side else bound)
            axes.axhline(bound, color=RED, linestyle=(0, (6, 3)), zorder=2.5, gid="bound", label=label)

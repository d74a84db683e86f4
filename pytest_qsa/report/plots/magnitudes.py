"""The figure of magnitudes: the largest, middle and smallest token-wise maxima by layer (PrefixQuant's plot)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...captures import Capture, Site
from ...common import QsaError
from ...verdicts import Row, Verdict
from .captions import bound_label, population, samples_of
from .depth import Depth
from .panels import Panels, panels_of
from .style import BLUE, GREEN, INK, OCHRE, PALE, RED, VIOLET, add_legend, scale_log, styled, wants_log

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


@dataclass(frozen=True)
class Magnitudes:
    """The statistics of the layers: name → [L]. `own`: the statistic that the verdict judges, if it judges one."""

    layers: list[str]
    values: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    of: str
    reduce: str | None
    own: str | None


def magnitudes_of(verdict: Verdict, capture: Capture) -> Magnitudes | None:
    """Compute the statistics at the verdict's site; None where the capture lacks them."""
    query = verdict.query
    if not query.get("layers") or not query.get("site"):
        return None
    judged = query["metric"] == "magnitude"
    dim: Any = query["parameters"].get("reduce_dim", "auto") if judged else "auto"
    reduce = query.get("reduce") if judged else None
    own = query["parameters"].get("stat", "top1") if judged else None
    stats: Any = [*STATS, *([own] if own and own not in STATS else [])]
    try:
        selection = capture.select(query["layers"], query["site"], query.get("exclude"))
        positions = query.get("positions") or "all"
        series: Any = selection.magnitudes(stats, reduce_dim=dim, reduce=reduce, positions=positions)
    except QsaError:
        return None
    first = next(iter(series.values()))
    if dim == "auto":
        dim = -2 if query["site"] == "weight" else -1
    return Magnitudes(first.layers, {s: v.values for s, v in series.items()}, _OF[str(dim)], first.query.reduce, own)


@styled
def magnitude_figure(verdict: Verdict, capture: Capture) -> Figure | None:
    """Draw top1, top2, top3, median and min by layer; None where there are not two layers with a finite one."""
    numbers = magnitudes_of(verdict, capture)
    if numbers is None or len(numbers.layers) < 2 or not any(np.isfinite(v).any() for v in numbers.values.values()):
        return None
    site = verdict.query["site"]
    samples = samples_of(capture, numbers.layers, site)
    note = population(numbers.reduce, samples, (verdict.query.get("positions") or "all") if samples else None)
    title = f"Magnitude of the {numbers.of} at the {site}"
    return magnitude_panels(numbers, title, note, rows={row.layer: row for row in verdict.rows})


@styled
def magnitude_panels(
    numbers: Magnitudes, title: str, note: str, *, rows: Mapping[str, Row] | None = None, legend: bool = True
) -> Figure:
    """Draw the statistics, a panel for each kind of layer; many kinds share one."""
    panels = panels_of(numbers.layers, title, note)
    for axes, _, members in panels:
        _draw_panel(axes, numbers, panels, members, rows or {})
    positive = [value for values in numbers.values.values() for value in values.tolist() if 0 < value < math.inf]
    if positive and wants_log(positive):
        scale_log(panels.axes[0])
    panels.label("block", "magnitude, |x|")
    if legend:
        add_legend(panels.figure, panels.axes[0])
    return panels.figure


def _draw_panel(axes: Axes, numbers: Magnitudes, panels: Panels, members: list[int], rows: Mapping[str, Row]) -> None:
    own = panels.depth.part(members)
    own.label_axis(axes, most=panels.ticks)
    if numbers.own is not None:
        _draw_allowed(axes, own, rows)
    scattered, size = len(set(own.x)) < len(own.x), 2.6 if len(own.x) > 60 else 4.2
    for stat, values in numbers.values.items():
        colour, marker, dash = STATS.get(stat, (RED, "P", "-"))
        loud = numbers.own in (None, stat)
        axes.plot(
            own.x, values[members], color=colour, marker=marker, linestyle="none" if scattered else dash,
            label=stat, gid=stat, linewidth=2.2 if stat == numbers.own else 1.2, alpha=1.0 if loud else 0.45,
            zorder=4 if loud else 3, markersize=size * (1.25 if stat == numbers.own else 1.0),
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

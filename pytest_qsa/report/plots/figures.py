"""The figures of a verdict, and the first of them: value by layer, bounds or baseline, layers out of bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ...captures import Capture
from ...common import QsaError, counted, number, write_atomically
from ...verdicts import Row, Verdict
from .answers import answer_figure
from .chart import chart_of
from .depth import Depth, depth_of
from .magnitudes import magnitude_figure, outlier_figure
from .margins import margin_figure
from .style import (
    AMBER,
    BLUE,
    GROUP_STYLES,
    INK,
    MUTED,
    PALE,
    RED,
    add_legend,
    bound_label,
    head,
    metric_title,
    new_figure,
    plain_number,
    population,
    safe_text,
    samples_of,
    save_png,
    scale_log,
    styled,
    wants_log,
)

COUNTED = ("tokens", "elements")
CHARTED = ("margins", "answers")
"""Titles of figures that the page draws from the data of their points."""


@dataclass(frozen=True)
class Judged:
    """The rows of a verdict in the model's order, on the x axis. `folded`: the row of a verdict over all layers."""

    rows: list[Row]
    depth: Depth
    folded: Row | None = None

    @property
    def finite(self) -> list[int]:
        """The indices of rows with a finite value."""
        return [i for i, row in enumerate(self.rows) if math.isfinite(row.value)]

    @property
    def endless(self) -> list[int]:
        """The indices of rows at +∞ within their bounds: a layer equal to its reference has an SQNR of ∞ dB."""
        return [
            i for i, row in enumerate(self.rows)
            if row.value == math.inf and row.high in (None, math.inf) and not row.excess
        ]  # fmt: skip

    @property
    def broken(self) -> list[int]:
        """The indices of rows that should be finite and are not."""
        drawn = {*self.finite, *self.endless}
        return [i for i in range(len(self.rows)) if i not in drawn]

    @property
    def out(self) -> list[int]:
        """The indices of rows out of bounds."""
        return [i for i, row in enumerate(self.rows) if row.excess]

    @property
    def compared(self) -> bool:
        """Whether each layer has a baseline of its own."""
        return any(row.baseline is not None for row in self.rows)


def draw(capture: Capture, verdict: Verdict, folder: Path, *, without: Container[str] = ()) -> dict[str, str]:
    """Draw all figures that fit a verdict as PNG into a folder, and write the data of those that the page has no other.

    Return title → absolute path of the PNG, or of the data alone; most telling first. `without`: titles that nothing
    shows as a PNG.

    Raises:
        OSError: the folder can't be written.
    """
    paths = {}
    for title, figure_of in FIGURES.items():
        if title in without and title not in CHARTED:
            continue
        if (figure := figure_of(verdict, capture)) is None:
            continue
        if title in CHARTED:
            paths[title] = _save_chart(figure, folder / f"{title}.json")
        if title not in without:
            paths[title] = save_png(figure, folder / f"{title}.png")
    return paths


def _save_chart(figure: Figure, path: Path) -> str:
    write_atomically(path, json.dumps(chart_of(figure)))
    return str(path.resolve())


def judged_layers(verdict: Verdict, capture: Capture) -> Judged | None:
    """Return the rows that a figure can show; None where fewer than two layers are known.

    A verdict over all layers (`over: sum`), or one without rows, has no values by layer; they come from the capture.
    """
    rows, folded = list(verdict.rows), None
    query = verdict.query
    if query.get("over") or not rows:
        folded = rows[0] if rows else None
        try:
            series = capture.select(query["layers"], query["site"], query["exclude"]).series(
                query["metric"], query["reduce"], query["positions"] or "all", **query["parameters"]
            )
        except (KeyError, QsaError):
            return None
        values = zip(series.layers, series.values.tolist(), strict=True)
        # A bound on a sum says nothing about a single layer.
        shared = folded if query.get("over") in ("max", "mean") else None
        low, high = (shared.low, shared.high) if shared and shared.baseline is None else (None, None)
        rows = [Row(layer, value, low, high, None, 0.0) for layer, value in values]
    order = {layer: index for index, layer in enumerate(capture.modules)}
    # A verdict has its worst row first; a line over depth needs the model's order.
    rows.sort(key=lambda row: (order.get(row.layer, len(order)), row.depth))
    return Judged(rows, depth_of([row.layer for row in rows]), folded) if len(rows) > 1 else None


@styled
def value_figure(verdict: Verdict, capture: Capture) -> Figure | None:
    """Draw the assertion's value by layer with its bound or its baseline; None where there are no layers to show."""
    judged = judged_layers(verdict, capture)
    if judged is None or not (judged.finite or judged.endless):
        return None
    figure = new_figure(5.4 if judged.compared else 4.0)
    if judged.compared:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.1, 1.0])
        _draw_used(below, judged)
        judged.depth.label_axis(below)
        axes.tick_params(axis="x", labelbottom=False)
    else:
        axes = figure.subplots()
        judged.depth.label_axis(axes)
    _draw_values(axes, judged, verdict.query.get("unit") in COUNTED)
    _scale(axes, judged, verdict.query.get("unit") in COUNTED)
    _draw_bounds(axes, judged)
    _draw_reference(axes, judged)
    _mark(axes, judged)
    unit = verdict.query.get("unit") or ""
    axes.set_ylabel(safe_text(f"{verdict.query.get('metric', 'value')}{f' [{unit}]' if unit else ''}"))
    axes.grid(axis="y")
    add_legend(figure, axes)
    head(figure, axes, metric_title(verdict.query), _notes(verdict, capture, judged))
    return figure


def _notes(verdict: Verdict, capture: Capture, judged: Judged) -> list[str]:
    query = verdict.query
    samples = samples_of(capture, [row.layer for row in judged.rows], query["site"]) if "site" in query else 0
    positions = query.get("positions") if query.get("site") != "weight" else None
    parts = [population(query.get("reduce"), samples, positions), counted(len(judged.rows), "layer")]
    if judged.folded is not None:
        parts.append(f"{query['over']} over them {number(judged.folded.value)}, bound: {verdict.bound}")
    elif verdict.bound:
        parts.append(f"bound: {verdict.bound}")
    lines = [" · ".join(part for part in parts if part)]
    if judged.out:
        named = judged.depth.names_of(judged.out)
        lines.append(f"out of bounds: {len(judged.out)} of {len(judged.rows)} ({named})")
    for label, members in (("∞", judged.endless), ("not finite", judged.broken)):
        if members:
            lines.append(f"{label}: {len(members)} of {len(judged.rows)} ({judged.depth.names_of(members)})")
    return lines


def _draw_values(axes: Axes, judged: Judged, counts: bool) -> None:
    depth, several = judged.depth, len(judged.depth.kinds) > 1
    values = [row.value if math.isfinite(row.value) else math.nan for row in judged.rows]
    # strict=False: there are at least as many styles as kinds, for depth_of joins more kinds to one.
    for (names, members), (colour, marker, dash) in zip(_equal_kinds(depth, values), GROUP_STYLES, strict=False):
        x, y = [depth.x[i] for i in members], [values[i] for i in members]
        if counts and not several and len(set(x)) == len(x):
            axes.bar(x, y, width=0.62 if len(x) > 6 else 0.36, color=BLUE, gid="values", label="_bars", zorder=2)
            continue
        scattered = len(set(x)) < len(x)
        kinds = " = ".join(depth.kind_labels[name] for name in names)
        size = 3.0 if len(x) > 60 else 4.5
        axes.plot(
            x, y, color=colour, marker=marker, markersize=size, linestyle="none" if scattered else dash, zorder=3,
            gid="values", label=safe_text(kinds, 60) if several else ("value" if judged.compared else "_value"),
        )  # fmt: skip


def _equal_kinds(depth: Depth, values: list[float]) -> list[tuple[list[str], list[int]]]:
    """Join the kinds with equal lines, which would hide one another: q, k and v read the same input."""
    lines: dict[tuple[object, ...], tuple[list[str], list[int]]] = {}
    for name, members in depth.kinds.items():
        line = tuple((depth.x[i], values[i]) for i in members)
        lines.setdefault(line, ([], members))[0].append(name)
    return list(lines.values())


def _draw_bounds(axes: Axes, judged: Judged) -> None:
    if judged.compared:
        _draw_baseline(axes, judged)
        return
    sides: dict[str, set[float | None]] = {"max": {r.high for r in judged.rows}, "min": {r.low for r in judged.rows}}
    for side, bounds in sides.items():
        # Bounds by group differ between layers, and have no one line.
        if len(bounds) != 1 or (bound := bounds.pop()) is None:
            continue
        equal = judged.rows[0].low == judged.rows[0].high
        # `equals` is both bounds at once, and one line shows it.
        if equal and side == "min":
            continue
        label = bound_label(bound if equal or side == "min" else None, bound if equal or side == "max" else None)
        axes.axhline(bound, color=RED, linestyle=(0, (6, 3)), linewidth=1.3, zorder=2.5, gid=f"bound-{side}")
        axes.annotate(
            label, (1, bound), xycoords=axes.get_yaxis_transform(), xytext=(4, 0), textcoords="offset points",
            color=RED, ha="left", va="center", fontsize=8.5, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _draw_baseline(axes: Axes, judged: Judged) -> None:
    """Draw the baseline with its allowed band: one band along a line, one bar a layer where there are several lines."""
    rows, depth = judged.rows, judged.depth
    known = [i for i in range(len(rows)) if rows[i].baseline is not None]
    bottom, top = axes.get_ylim()  # the band must not change what `_scale` chose
    x = [depth.x[i] for i in known]
    low, high, baseline = edges([rows[i] for i in known], bottom, top)
    if len(depth.kinds) == 1 and len(set(x)) == len(x):
        axes.fill_between(x, low, high, color=PALE, linewidth=0, zorder=1, gid="band", label="allowed")
        (line,) = axes.plot(x, baseline, color=MUTED, linestyle=(0, (4, 2)), linewidth=1.2)
    else:
        axes.vlines(x, low, high, color=PALE, linewidth=5, zorder=1, gid="band", label="allowed")
        (line,) = axes.plot(x, baseline, color=MUTED, marker="_", linestyle="none")
    line.set(zorder=2, gid="baseline", label="baseline")
    axes.set_ylim(bottom, top)


def _draw_reference(axes: Axes, judged: Judged) -> None:
    """Draw the reference's value as a stroke at each layer."""
    values = [math.nan if row.reference is None else row.reference for row in judged.rows]
    if any(map(math.isfinite, values)):
        axes.plot(
            judged.depth.x, values, linestyle="none", marker="_", markersize=13 if len(values) < 40 else 7,
            markeredgewidth=2.0, color=INK, gid="reference", label="reference", zorder=4,
        )  # fmt: skip


def edges(rows: Sequence[Row], bottom: float, top: float) -> tuple[list[float], list[float], list[float]]:
    """Return low, high and baseline of each row; an open side of the band reaches to `bottom` or `top`."""
    low = [bottom if row.low is None else row.low for row in rows]
    high = [top if row.high is None else row.high for row in rows]
    return low, high, [math.nan if row.baseline is None else row.baseline for row in rows]


def _mark(axes: Axes, judged: Judged) -> None:
    """Mark the layers out of bounds, label the worst of them, and mark values that are not finite at the top."""
    out = [i for i in judged.out if i in set(judged.finite)]
    rows, depth = judged.rows, judged.depth
    if out:
        x, y = [depth.x[i] for i in out], [rows[i].value for i in out]
        axes.plot(
            x, y, linestyle="none", marker="D", markersize=7 if len(out) < 40 else 5, markerfacecolor="none",
            markeredgecolor=RED, markeredgewidth=1.6, zorder=5, gid="out-of-bounds", label="out of bounds",
            clip_on=False,
        )  # fmt: skip
        worst = max(out, key=lambda i: abs(rows[i].excess))
        _name(axes, depth, worst, rows[worst])
    for members, label, marker, colour in ((judged.endless, "∞", "^", BLUE), (judged.broken, "not finite", "X", AMBER)):
        if members:
            axes.plot(
                [depth.x[i] for i in members], [0.97] * len(members), linestyle="none", marker=marker, markersize=7,
                color=colour, gid=label.replace(" ", "-"), transform=axes.get_xaxis_transform(), label=label, zorder=5,
            )  # fmt: skip


def _name(axes: Axes, depth: Depth, index: int, row: Row) -> None:
    text = f"{'layer ' if depth.numbered and len(depth.kinds) == 1 else ''}{depth.short(index)}: {number(row.value)}"
    if row.baseline is not None:
        text += f", baseline {number(row.baseline)}"
    low, high = axes.get_xlim()
    right = depth.x[index] > (low + high) / 2
    axes.annotate(
        safe_text(text, 70), (depth.x[index], row.value),
        xytext=(-9 if right else 9, 7 if row.excess > 0 else -7), textcoords="offset points",
        ha="right" if right else "left", va="bottom" if row.excess > 0 else "top",
        color=INK, fontsize=8.5, fontweight="bold", zorder=6,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _scale(axes: Axes, judged: Judged, counts: bool) -> None:
    """Scale y, linear or logarithmic, so that it shows the values, the bounds, the baselines and the references."""
    values = [judged.rows[i].value for i in judged.finite]
    others = [b for row in judged.rows for b in (row.low, row.high, row.baseline, row.reference)]
    bounds = [b for b in others if b is not None and math.isfinite(b)]
    if not counts and wants_log([*values, *bounds]):
        least, most = min(*values, *bounds), max(*values, *bounds)
        axes.set_ylim(least / (most / least) ** 0.06, most * (most / least) ** 0.16)
        scale_log(axes)
        return
    low, high = min([*values, *bounds], default=0.0), max([*values, *bounds], default=0.0)
    # Counts begin at 0, whatever the least of them is.
    if counts:
        low, high = min(low, 0), max(high, 1)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        if high > 100:
            scale_log(axes, zero=True)
            axes.set_ylim(low, high * 2)
            return
    room = (high - low) or abs(high) or 1.0
    at_floor = any(bound <= low for bound in bounds)
    below = 0.18 if any(row.excess < 0 for row in judged.rows) else 0.1  # the worst is named below its mark
    axes.set_ylim(low - (below if not counts else 0.05 if at_floor else 0.0) * room, high + 0.18 * room)


def _draw_used(axes: Axes, judged: Judged) -> None:
    """Draw how far each layer moved from its baseline, in percent of the allowed distance: ±100 % is the bound."""
    shares = [_share(row) for row in judged.rows]
    depth = judged.depth
    wide = max((abs(share) for share in shares if math.isfinite(share)), default=0.0)
    kinds = len(depth.kinds)
    for offset, (members, (colour, _, _)) in enumerate(zip(depth.kinds.values(), GROUP_STYLES, strict=False)):
        x = [depth.x[i] + 0.72 * ((offset + 0.5) / kinds - 0.5) for i in members]
        bars = axes.bar(x, [shares[i] for i in members], width=0.72 / kinds, color=colour, gid="used", zorder=2)
        for bar, index in zip(bars, members, strict=True):
            if judged.rows[index].excess:
                bar.set(facecolor=RED, hatch="////")
    if wide > 500:
        axes.set_yscale("symlog", linthresh=100.0)
        axes.yaxis.set_minor_locator(MaxNLocator(1))
    for bound in _sides(judged.rows):
        axes.axhline(bound, color=RED, linestyle=(0, (6, 3)), linewidth=1.1, zorder=2.5, gid="used-bound")
    reach = max(wide * (1.6 if wide > 500 else 1.15), 125.0)
    down = any(share < -20 for share in shares) or -100.0 in _sides(judged.rows)
    axes.set_ylim(-reach if down else -0.2 * reach, reach)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.set_ylabel("moved\n[% of allowed]")
    axes.grid(axis="y")


def _share(row: Row) -> float:
    if row.baseline is None or row.used is None or not math.isfinite(row.value):
        return math.nan
    used = min(row.used, 1e3)  # with no tolerance any change is infinitely far
    return math.copysign(100 * used, row.value - row.baseline)


def _sides(rows: Sequence[Row]) -> list[float]:
    up = any(row.high is not None for row in rows)
    down = any(row.low is not None for row in rows)
    return [100.0] * up + [-100.0] * down


FIGURES = {
    "value": value_figure,
    "outliers": outlier_figure,
    "magnitude": magnitude_figure,
    "margins": margin_figure,
    "answers": answer_figure,
}
"""Title → the function that draws it of a verdict and its capture, None where it does not fit; most telling first."""

"""Figures of what is large: token-wise maxima by layer (PrefixQuant's plot), and outlier tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ...captures import Array, Capture, Site
from ...common import QsaError, counted, size_text
from ...metrics import METRICS, Series, View
from ...verdicts import Row, Verdict
from .depth import Depth, depth_of, panels_of
from .style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    OCHRE,
    PALE,
    RED,
    VIOLET,
    add_legend,
    bound_label,
    head,
    new_figure,
    plain_number,
    population,
    safe_text,
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
BAND = "#dfe6ee"
_OF = {"-1": "token-wise maxima", "-2": "channel-wise maxima", "None": "|x|"}


def magnitude_title(site: Site, reduce_dim: int | None) -> str:
    """Write what a figure of magnitudes shows."""
    return f"Magnitude of the {_OF[str(reduce_dim)]} at the {site}s"


@dataclass(frozen=True)
class Magnitudes:
    """The magnitudes of the layers of a verdict. `series`: statistic → its numbers. `own`: the one that it judges."""

    series: Mapping[Any, Series]
    title: str
    note: str
    own: str | None


def magnitudes_of(verdict: Verdict, capture: Capture) -> Magnitudes | None:
    """Return top1, top2, top3, median and min by layer; None where there are not two layers with a finite one."""
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
    # One point is no line over depth.
    if len(first.layers) < 2 or not any(np.isfinite(each.values).any() for each in series.values()):
        return None
    if dim == "auto":
        dim = -2 if site == "weight" else -1
    samples = samples_of(capture, first.layers, site)
    note = population(first.query.reduce, samples, positions if samples else None)
    title = f"Magnitude of the {_OF[str(dim)]} at the {site}"
    return Magnitudes(series, title, note, own)


@styled
def magnitude_figure(verdict: Verdict, capture: Capture) -> Figure | None:
    """Draw the magnitudes of the layers of a verdict; None where `magnitudes_of` has none."""
    found = magnitudes_of(verdict, capture)
    if found is None:
        return None
    rows = {row.layer: row for row in verdict.rows} if verdict.query["metric"] == "magnitude" else {}
    return magnitude_panels(found.series, found.title, found.note, own=found.own, rows=rows)


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
    site = next(iter(series.values())).query.site
    panels.label("block", f"magnitude, {'|W|' if site == 'weight' else '|x|'}", legend=legend)
    return panels.grid.figure


def _draw_statistics(axes: Axes, depth: Depth, values: Mapping[str, NDArray[np.float64]], own: str | None) -> None:
    # Several layers at one x: a line between them would mean nothing.
    scattered, size = len(set(depth.x)) < len(depth.x), 2.6 if len(depth.x) > 60 else 4.2
    if not scattered and {"top1", "top3"} <= values.keys():
        axes.fill_between(
            depth.x,
            values["top3"],
            values["top1"],
            color=BAND,
            linewidth=0,
            zorder=1.5,
            gid="tops",
            label="top1 to top3",
        )
    for stat, numbers in values.items():
        if stat in ("top2", "top3") and stat != own and not scattered:  # the band's inside and its lower edge
            continue
        colour, marker, dash = STATS.get(stat, (RED, "P", "-"))
        loud = own in (None, stat)
        # A marker at each layer would hide the lines in one another: the ends and the peak have one.
        marked = sorted({0, len(numbers) - 1, _peak(numbers)})
        axes.plot(
            depth.x, numbers, color=colour, marker=marker, linestyle="none" if scattered else dash,
            markevery=None if scattered else marked,
            label=stat, gid=stat, linewidth=2.2 if stat == own else 1.2, alpha=1.0 if loud else 0.45,
            zorder=4 if loud else 3, markersize=size * (1.25 if stat == own else 1.0),
        )  # fmt: skip
    if "top1" in values and np.isfinite(values["top1"]).any():
        _name_peak(axes, depth, values["top1"])


def _peak(numbers: NDArray[np.float64]) -> int:
    """Return the index of the largest finite number."""
    return int(np.nan_to_num(numbers, nan=-1.0, posinf=-1.0).argmax())


def _name_peak(axes: Axes, depth: Depth, numbers: NDArray[np.float64]) -> None:
    """Write the layer and the number at the largest one, on the side of it that has room."""
    index = _peak(numbers)
    right = depth.x[index] > (min(depth.x) + max(depth.x)) / 2
    axes.annotate(
        safe_text(f"{'layer ' if depth.numbered else ''}{depth.short(index)}: {size_text(float(numbers[index]))}", 40),
        (depth.x[index], numbers[index]),
        xytext=(-6 if right else 6, 5), textcoords="offset points", ha="right" if right else "left", va="bottom",
        color=INK, fontsize=8.0, fontweight="bold", gid="peak", zorder=6,
    )  # fmt: skip


def _draw_allowed(axes: Axes, depth: Depth, rows: Mapping[str, Row]) -> None:
    """Draw the verdict's own bound, or its baseline with the allowed band."""
    known = [(x, rows[layer]) for x, layer in zip(depth.x, depth.layers, strict=True) if layer in rows]
    compared = [(x, row) for x, row in known if row.baseline is not None]
    # A band over several layers at one x would connect what does not belong together.
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


# The default of outlier_tokens.
THRESHOLD = 64.0
MOST_TOKENS = 15
SINK = "#9db4c8"


@dataclass(frozen=True)
class Outliers:
    """The N tokens above the threshold. `layer`: [N], indices into `layers`. `sink`: [N], whether it is a sink."""

    layers: list[str]
    layer: NDArray[np.int64]
    sample: NDArray[np.int64]
    position: NDArray[np.int64]
    sink: NDArray[np.bool_]


def outliers_of(capture: Capture, layers: Sequence[str], site: Site, threshold: float, positions: str) -> Outliers:
    """Find the tokens above threshold × the median of their sample, which the metric `outlier_tokens` counts."""
    found: list[tuple[Array, Array, Array, Array]] = []
    for index, layer in enumerate(layers):
        view = View(capture.sites[layer, site], site, positions, capture.sinks, layer)
        for each in range(view.numbers.populations):
            ratios, sample = view.ratios(each), int(view.numbers.sample[each])
            at = np.flatnonzero(ratios > np.float32(threshold))  # in float32, as the metric compares
            sinks = capture.sinks.mask(sample, len(ratios), layer)[at]
            found.append((np.full(len(at), index), np.full(len(at), sample), at, sinks))
    joined = [np.concatenate(parts) for parts in zip(*found, strict=True)] or [np.zeros(0, dtype=np.int64)] * 4
    return Outliers(list(layers), joined[0], joined[1], joined[2], joined[3].astype(bool))


def judged_outliers(verdict: Verdict, capture: Capture) -> tuple[Outliers, float, str] | None:
    """Return the outlier tokens of the layers of a verdict, the threshold and the positions; None without any."""
    query = verdict.query
    metric = METRICS.get(query.get("metric", ""))
    if metric is None or not metric.tokenwise:
        return None
    threshold = float(query["parameters"].get("threshold", THRESHOLD))
    positions = query.get("positions") or "all"
    try:
        layers = capture.select(query["layers"], query["site"], query.get("exclude")).layers
    except QsaError:
        return None
    held = [layer for layer in layers if "token_max" in capture.sites[layer, query["site"]]]
    outliers = outliers_of(capture, held, query["site"], threshold, positions)
    return (outliers, threshold, positions) if len(outliers.layer) else None


@styled
def outlier_figure(verdict: Verdict, capture: Capture) -> Figure | None:
    """Draw outlier tokens by layer, position and text; None where there are none or the metric is not about tokens."""
    found = judged_outliers(verdict, capture)
    return _drawn(found[0], capture, verdict.query["site"], *found[1:]) if found else None


def _drawn(outliers: Outliers, capture: Capture, site: Site, threshold: float, positions: str) -> Figure:
    texts = texts_of(capture, outliers)
    bars = min(len(texts), MOST_TOKENS)
    figure = new_figure(3.9 + 0.21 * max(bars, 5))
    panels = figure.subplot_mosaic(
        [["layer", "layer"], ["position", "token"]] if texts else [["layer"], ["position"]],
        height_ratios=[1.0, 0.45 + 0.1 * max(bars, 5)], width_ratios=[1.25, 1.0] if texts else None,
    )  # fmt: skip
    _by_layer(panels["layer"], outliers)
    _by_position(panels["position"], outliers)
    if texts:
        _by_token(panels["token"], texts)
    samples = samples_of(capture, outliers.layers, site)
    note = f"{population('sum', samples, positions)} · {counted(len(outliers.layers), 'layer')}"
    note += "" if capture.sinks.searched else " · sinks not looked for"
    head(figure, panels["layer"], f"Tokens above {threshold:g} × the median at the {site}", [note])
    add_legend(figure, panels["layer"])
    return figure


@styled
def outlier_picture(
    kind: Literal["layer_wise", "position", "token"],
    outliers: Outliers,
    texts: list[tuple[str, int, int]],
    title: str,
    note: str,
    *,
    most: int = MOST_TOKENS,
    legend: bool = True,
) -> Figure:
    """Draw outlier tokens by layer, by position, or by text (at most `most`); where there are none, say so."""
    figure = new_figure(3.6 if kind != "token" else 1.9 + 0.21 * max(min(len(texts), most), 5))
    axes = figure.subplots()
    head(figure, axes, title, [note])
    missing = "" if len(outliers.layer) else "no token is above the threshold"
    places = {*outliers.position.tolist()}
    if kind == "position" and len(places) == 1:  # one stroke on an empty axis says less than a sentence
        sinks = ", attention sinks" if outliers.sink.all() else ""
        missing = f"all {len(outliers.layer)} are at position {places.pop()} of their samples{sinks}"
    if kind == "token" and not texts:
        missing = missing or "which tokens they are is unknown: the data has no ids, or they are redacted"
    if missing:
        axes.text(0.5, 0.5, missing, ha="center", va="center", color=MUTED)
        axes.set_axis_off()
    elif kind == "token":
        _by_token(axes, texts, most)
    else:
        (_by_layer if kind == "layer_wise" else _by_position)(axes, outliers)
    if legend:
        add_legend(figure, axes)
    return figure


def _by_layer(axes: Axes, outliers: Outliers) -> None:
    depth = depth_of(outliers.layers)
    x = np.array(depth.x)
    bottoms: Counter[float] = Counter()
    parts = (("other tokens", ~outliers.sink, BLUE, ""), ("sinks", outliers.sink, SINK, "////"))
    for label, chosen, colour, hatch in parts:
        count = Counter(x[outliers.layer[chosen]].tolist())
        at = sorted(count)
        if at:
            axes.bar(
                at, [count[i] for i in at], bottom=[bottoms[i] for i in at], width=0.66 if len(x) > 6 else 0.36,
                color=colour, hatch=hatch, label=f"{label}: {sum(count.values())}", gid=label, zorder=2,
            )  # fmt: skip
        bottoms.update(count)
    depth.label_axis(axes)
    _count_axis(axes, max(bottoms.values()))
    axes.set_ylabel("outlier tokens,\nall samples")


def _by_position(axes: Axes, outliers: Outliers) -> None:
    tops: Counter[int] = Counter()
    for label, chosen, colour, marker in (
        ("other tokens", ~outliers.sink, BLUE, "o"),
        ("sinks", outliers.sink, MUTED, "D"),
    ):
        count = Counter(outliers.position[chosen].tolist())
        at = sorted(count)
        if not at:
            continue
        bottom = [tops[i] for i in at]
        tops.update(count)
        top = [tops[i] for i in at]
        axes.vlines(at, bottom, top, color=colour, linewidth=1.6, gid=label, zorder=2)
        axes.plot(
            at, top, linestyle="none", marker=marker, markersize=4.5 if len(at) < 80 else 2.5, color=colour, zorder=3,
            markerfacecolor="white" if label == "sinks" else colour, label=f"{label}: {sum(count.values())}",
        )  # fmt: skip
    _count_axis(axes, max(tops.values()))
    last = max(tops)
    axes.set_xlim(-max(0.8, 0.03 * last), max(last * 1.04, 8))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("position in the sample")
    axes.set_ylabel("outlier tokens,\nall layers and samples")


def texts_of(capture: Capture, outliers: Outliers, *, decode: bool = True) -> list[tuple[str, int, int]]:
    """Return (text, how often it occurs in all layers and samples, how often as a sink), most frequent first.

    `decode` off: the token's id stands for its text.
    """
    total: Counter[str] = Counter()
    sinks: Counter[str] = Counter()
    for sample, position, sink in zip(
        outliers.sample.tolist(), outliers.position.tolist(), outliers.sink.tolist(), strict=True
    ):
        # A redacted capture and batches without ids have no tokens.
        if sample < len(capture.tokens) and position < len(capture.tokens[sample]):
            token = int(capture.tokens[sample][position])
            text = capture.pieces.get(token, f"⟨{token}⟩") if decode else f"⟨{token}⟩"
            total[text] += 1
            sinks[text] += sink
    return [(text, count, sinks[text]) for text, count in sorted(total.items(), key=lambda item: (-item[1], item[0]))]


def _by_token(axes: Axes, texts: list[tuple[str, int, int]], most: int = MOST_TOKENS) -> None:
    shown = texts[:most]
    y = range(len(shown))
    others = [count - sinks for _, count, sinks in shown]
    sinks = [sinks for _, _, sinks in shown]
    parts = (("other tokens", others, 0, BLUE, ""), ("sinks", sinks, others, SINK, "////"))
    for name, widths, left, colour, hatch in parts:
        label = name if any(widths) else None
        axes.barh(y, widths, left=left, height=0.68, color=colour, hatch=hatch, label=label, gid=name, zorder=2)
    largest = max(count for _, count, _ in shown)
    for row, (_, count, _) in enumerate(shown):
        axes.text(count + 0.015 * largest, row, str(count), va="center", fontsize=8, color=INK)
    axes.set_yticks(y, [f"“{safe_text(text, 22)}”" for text, _, _ in shown])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(shown), 5) - 0.4, -0.6)
    axes.set_xlim(0, largest * 1.14)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    left = len(texts) - len(shown)
    axes.set_xlabel("outlier tokens by text" + (f" ({left} more texts not shown)" if left else ""))


def _count_axis(axes: Axes, largest: int) -> None:
    axes.grid(axis="y")
    axes.set_ylim(0, largest * 1.12)
    if largest > 300:
        scale_log(axes, zero=True)
        axes.set_ylim(0, largest * 1.6)
        return
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_formatter(plain_number)

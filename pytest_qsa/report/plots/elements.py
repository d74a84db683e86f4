"""Figures of the elements of tensors: distributions from exact counts, and |x| over tokens and channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator
from matplotlib.transforms import offset_copy
from numpy.typing import NDArray

from ...captures import SiteNumbers, cell_size, counted_quantiles, sorted_counts
from ...common import counted
from .depth import evenly_spread, panels_of
from .style import (
    BLUE,
    GROUP_STYLES,
    INK,
    MUTED,
    PALE,
    add_bars,
    add_legend,
    head,
    new_figure,
    new_grid,
    plain_number,
    safe_text,
    scale_asinh,
    scale_log,
    styled,
)

BOX_SHARES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
"""The quantiles of a box: extremes, whiskers, quartiles, median."""
MOST_CURVES, BINS = 4, 120
Bands = Mapping[str, NDArray[np.float64]]
"""The names of `SHARES` in captures/distributions.py → a number for each channel, [C]."""
PAIRS = (("min", "max"), ("p0.01", "p99.99"), ("p1", "p99"), ("p25", "p75"))
_LABELS = ("all tokens", "0.01 to 99.99 %", "1 to 99 %", "25 to 75 %")
_FILLS = ("#dfe6ee", "#b5c6d8", "#7f9dbb", "#2b5c8a")
_LINES = ((MUTED, ":"), (MUTED, "--"), (BLUE, "-."), (INK, "-"))
MOST_COLUMNS = 400
MOST_WIDEST = 20
TOP, GAP, BOTTOM = 0.88, 0.62, 0.95
"""Inches above, between and below the panels of percentiles: for the title, a panel's title and ticks, the legend."""


@styled
def box_figure(sites: Mapping[str, SiteNumbers], title: str, note: str, *, legend: bool = True) -> Figure:
    """Draw a box for each layer, in a panel for each kind of layer; y is linear near 0 and logarithmic beyond."""
    table = np.array([counted_quantiles(numbers, BOX_SHARES, signed=True) for numbers in sites.values()])
    width = _width(np.abs(table[:, [2, 4]]))
    panels = panels_of(list(sites), title, f"{note} · the axis is linear within ± {width:.2g}, logarithmic beyond")
    for axes, depth, members in panels.by_depth():
        _draw_boxes(axes, np.array(depth.x), table[members].T)
    # The first axis stands for all: the panels share y.
    scale_asinh(panels.grid.axes[0].yaxis, width)
    panels.label("block", "x", legend=legend)
    return panels.grid.figure


def _draw_boxes(axes: Axes, x: NDArray[np.float64], table: NDArray[np.float64]) -> None:
    least, low, first, middle, third, high, most = table
    gap = float(np.diff(np.unique(x)).min()) if len(np.unique(x)) > 1 else 1.0
    width = 0.62 * gap
    axes.vlines(x, low, high, color=MUTED, linewidth=1.0, label="1 to 99 %", gid="whiskers", zorder=2)
    add_bars(axes, x, first, third, width, facecolor=PALE, edgecolor=BLUE, linewidth=0.8, label="25 to 75 %",
             gid="box", zorder=3)  # fmt: skip
    axes.hlines(middle, x - width / 2, x + width / 2, color=INK, linewidth=1.4, label="median", gid="median", zorder=4)
    small = 2.4 if len(x) > 40 else 3.6
    axes.plot(x, most, "^", color=INK, markersize=small, label="largest", gid="largest", zorder=4)
    axes.plot(x, least, "v", color=INK, markersize=small, markerfacecolor="white", label="smallest", gid="smallest",
              zorder=4)  # fmt: skip


@styled
def histogram_figure(sites: Mapping[str, SiteNumbers], title: str, note: str, *, legend: bool = True) -> Figure:
    """Draw histograms of a few layers evenly over depth; their bins are equally wide on the asinh axis."""
    panels = panels_of(list(sites), title, note)
    names, legends = list(sites), set()
    shown = {
        kind: [members[index] for index in evenly_spread(len(members), MOST_CURVES)] for _, kind, members in panels
    }
    bins = _Bins.of([sites[names[index]] for chosen in shown.values() for index in chosen])
    for axes, kind, _ in panels:
        chosen = shown[kind]
        own = panels.depth.part(chosen)
        word = "block " if panels.depth.numbered and len(panels.depth.kinds) == len(panels.grid.axes) else ""
        labels = [f"{word}{own.short(i)}" for i in range(len(chosen))]
        _draw_curves(axes, [sites[names[index]] for index in chosen], labels, bins)
        axes.set_xlabel(f"x at {safe_text(kind, 80)}" if kind else "x")
        legends.add(tuple(labels))
    first = panels.grid.axes[0]
    low, high = first.get_ylim()
    if legend and len(legends) == 1:  # the same blocks in all panels: one legend says it
        add_legend(panels.grid.figure, first)
    elif legend:
        first.set_ylim(low, high * 8)  # room for the legends above the curves
        for axes in panels.grid.axes:
            axes.legend(loc="upper center", ncols=4, handlelength=2.0, columnspacing=1.2)
    scale_log(first)
    panels.label("x", "share of the elements in a bin", legend=False)
    return panels.grid.figure


class _Bins(NamedTuple):
    """Bins that are equally wide on an axis of asinh(x / width), the same in all panels so that these can be compared.

    `low`, `high`: the ends of the axis. `edges`: of the bins; both in asinh(x / width).
    """

    width: float
    low: float
    high: float
    edges: NDArray[np.float64]

    @classmethod
    def of(cls, sites: Sequence[SiteNumbers]) -> _Bins:
        """Return bins for all of some sites."""
        width = _width(np.array([counted_quantiles(numbers, (0.25, 0.75), signed=True) for numbers in sites]))
        known = [values[np.isfinite(values)] for values, _ in (sorted_counts(each, signed=True) for each in sites)]
        ends = [np.arcsinh(values[[0, -1]] / width) for values in known if len(values)]
        low, high = (min(end[0] for end in ends), max(end[1] for end in ends)) if ends else (-1.0, 1.0)
        # A little wider than the extremes, which rounding could leave out.
        return cls(width, low, high, np.linspace(low - 1e-9, max(high, low + 1e-6) + 1e-9, BINS + 1))


def _draw_curves(axes: Axes, sites: Sequence[SiteNumbers], labels: Sequence[str], bins: _Bins) -> None:
    for numbers, label, (colour, _, dash) in zip(sites, labels, GROUP_STYLES, strict=False):
        values, counts = sorted_counts(numbers, signed=True)
        finite = np.isfinite(values)
        binned, _ = np.histogram(np.arcsinh(values[finite] / bins.width), bins=bins.edges, weights=counts[finite])
        # An empty bin is a gap: on a logarithmic axis 0 can't be drawn.
        shares = np.where(binned > 0, binned / max(counts[finite].sum(), 1), np.nan)
        axes.stairs(shares, bins.width * np.sinh(bins.edges), color=colour, linestyle=dash, linewidth=1.4, gid="curve",
                    label=safe_text(label, 28), baseline=None)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(bins.width * np.sinh(bins.low), bins.width * np.sinh(bins.high))
    scale_asinh(axes.xaxis, bins.width)


def _width(quartiles: NDArray[np.float64]) -> float:
    """Return up to which |x| the axis is linear: the median magnitude of the quartiles."""
    magnitudes = np.abs(quartiles[np.isfinite(quartiles) & (quartiles != 0)])
    return float(np.median(magnitudes)) if magnitudes.size else 1.0


@styled
def percentile_figure(
    layers: Mapping[str, Bands], title: str, note: str, *, style: Literal["fill", "line"] = "fill", legend: bool = True
) -> Figure:
    """Draw percentile bands over the channels of each layer, and beside them those of the widest channels."""
    figure = new_figure(height := 1.5 + 2.2 * len(layers))
    # Fixed margins: matplotlib's own layout measures each of the many ticks four times, a third of all drawing.
    figure.set_layout_engine("none")
    inner = height - TOP - BOTTOM - (len(layers) - 1) * GAP
    place = {"left": 0.072, "right": 0.99, "top": 1 - TOP / height, "bottom": BOTTOM / height, "wspace": 0.04}
    place["hspace"] = GAP * len(layers) / inner
    panels = figure.subplots(
        len(layers), 2, squeeze=False, sharey=True, gridspec_kw={"width_ratios": [1.7, 1.0], **place}
    )
    per_column, widths = 1, []
    for (axes, beside), (layer, bands) in zip(panels, layers.items(), strict=True):
        per_column = max(per_column, _draw_bands(axes, bands, style))
        _draw_widest(beside, bands)
        widths.append(float(np.nanmedian(np.abs(np.concatenate([bands["p25"], bands["p75"]])))))
        axes.set_title(safe_text(layer, 60), color=MUTED)
        axes.grid(axis="y")
    # Panels share y, so that a layer that reaches further is seen to.
    known = [width for width in widths if np.isfinite(width) and width > 0]
    scale_asinh(panels[0, 0].yaxis, float(np.median(known)) if known else 1.0)
    signed = any((bands["min"] < 0).any() for bands in layers.values())
    for axes in panels[:, 0]:
        axes.set_ylabel("x" if signed else "|x|")
    across = "channel" + (f" (a column holds up to {per_column})" if per_column > 1 else "")
    panels[-1, 0].set_xlabel(across)
    panels[-1, 1].set_xlabel(f"channel (the {MOST_WIDEST} widest)", labelpad=24)
    head(figure, None, title, [note])
    if legend:
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), columnspacing=1.6)
    return figure


def _draw_widest(axes: Axes, bands: Bands) -> None:
    """Draw the channels that reach furthest, each as a bar of its bands under its number, the widest first."""
    reach = np.nan_to_num(np.maximum(np.abs(bands["min"]), np.abs(bands["max"])), nan=np.inf)
    chosen = np.argsort(-reach, kind="stable")[:MOST_WIDEST]
    x = np.arange(len(chosen))
    for (below, above), label, fill in zip(PAIRS, _LABELS, _FILLS, strict=True):
        add_bars(axes, x, bands[below][chosen], bands[above][chosen], 0.8, facecolor=fill, linewidth=0, gid="widest",
                 label=label)  # fmt: skip
    numbers = [str(channel) for channel in chosen.tolist()]
    axes.xaxis.set_major_locator(FixedLocator(x.tolist()))
    axes.xaxis.set_major_formatter(FixedFormatter(numbers))
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.add_artist(_Numbers(axes, [*zip(x.tolist(), numbers, strict=True)]))
    axes.set_xlim(-0.6, len(chosen) - 0.4)
    axes.grid(axis="y")


class _Numbers(Artist):
    """Upright numbers below an axis, drawn by one text in turn: a tick for each takes matplotlib ten times as long.

    `places`: x in the axis's units, and the number there.
    """

    def __init__(self, axes: Axes, places: Sequence[tuple[float, str]]) -> None:
        super().__init__()
        self.set_gid("numbers")
        self.places = places
        figure: Any = axes.figure
        below = offset_copy(axes.get_xaxis_transform(), figure, y=-3, units="points")
        style: Any = {"rotation": 90, "ha": "center", "va": "top", "fontsize": 7}
        self._text = Text(0, 0, "", transform=below, figure=figure, **style)

    def draw(self, renderer: Any) -> None:
        """Draw each number at its place."""
        for x, number in self.places:
            self._text.set_x(x)
            self._text.set_text(number)
            self._text.draw(renderer)


def _draw_bands(axes: Axes, bands: Bands, style: str) -> int:
    """Draw one layer; return how many channels a column holds."""
    count = len(bands["max"])
    cell = -(-count // MOST_COLUMNS)
    starts = np.arange(0, count, cell)
    edges = np.append(starts, count)
    for (below, above), label, fill, (colour, dash) in zip(PAIRS, _LABELS, _FILLS, _LINES, strict=True):
        # fmin and fmax leave NaN out, where minimum and maximum would spread it over the column.
        low = np.fmin.reduceat(bands[below], starts)
        high = np.fmax.reduceat(bands[above], starts)
        if style == "fill":
            axes.fill_between(
                edges, np.append(low, low[-1]), np.append(high, high[-1]), step="post", color=fill, linewidth=0,
                label=label, gid="band",
            )  # fmt: skip
        else:
            axes.plot(starts, high, color=colour, linestyle=dash, linewidth=0.9, label=label, gid="line")
            axes.plot(starts, low, color=colour, linestyle=dash, linewidth=0.9, gid="line")
    axes.set_xlim(0, count)
    return cell


COLOURS = "cividis"
"""This map's lightness grows evenly, so that a grey print keeps the order."""
SURFACE_SIZE = 48
Map = NDArray[np.float32]


@styled
def map_figure(maps: Mapping[str, Map], size: tuple[int, int], title: str, note: str) -> Figure:
    """Draw a [t, c] map for each layer on one colour scale. `size`: the tokens and channels that a map stands for."""
    grid = new_grid(len(maps), lambda lines: 1.1 + 2.5 * lines, sharex=True, sharey=True)
    colours = ScalarMappable(_norm(list(maps.values())), COLOURS)
    for axes, (layer, picture) in zip(grid.axes, maps.items(), strict=True):
        axes.imshow(
            colours.to_rgba(picture, bytes=True), origin="upper", aspect="auto", extent=(0, size[1], size[0], 0),
            interpolation="nearest", gid="map",
        )  # fmt: skip
        axes.set_title(safe_text(layer, 42), color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    grid.label("channel", "token")
    bar = grid.figure.colorbar(
        colours,
        ax=grid.axes,
        label="|x|",
        extend="max",
        format=FuncFormatter(plain_number),
        fraction=0.05,
        aspect=32,
        pad=0.01,
    )
    bar.outline.set_visible(False)
    bar.minorticks_off()  # they took as long as the maps
    head(grid.figure, None, title, [note, _cells(maps, size)])
    return grid.figure


@styled
def surface_figure(
    maps: Mapping[str, Map], size: tuple[int, int], angle: Sequence[float], title: str, note: str
) -> Figure:
    """Draw a [t, c] map for each layer as a surface. `angle`: elevation and azimuth in degrees."""
    figure = new_figure(4.2)
    for index, (layer, picture) in enumerate(maps.items()):
        axes: Any = figure.add_subplot(1, len(maps), index + 1, projection="3d")
        _draw_surface(axes, _coarse(picture), size)
        axes.view_init(elev=angle[0], azim=angle[1])
        axes.set_title(f"|x| at {safe_text(layer, 36)}", loc="center", color=MUTED, y=1.08)
    head(figure, None, title, [note, _cells({name: _coarse(picture) for name, picture in maps.items()}, size)])
    return figure


def _draw_surface(axes: Any, picture: Map, size: tuple[int, int]) -> None:
    tokens = np.linspace(0, size[0], picture.shape[0])
    channels = np.linspace(0, size[1], picture.shape[1])
    finite = np.nan_to_num(picture, posinf=0.0, neginf=0.0)
    positive = finite[finite > 0]
    # One peak of thousands would leave all else a plane; what is below the hundredth percentile is drawn at it.
    floor = float(np.percentile(positive, 1)) if positive.size else 1.0
    axes.plot_surface(
        channels[None, :], tokens[:, None], np.log10(np.maximum(finite, floor)), cmap=COLOURS, rstride=1, cstride=1,
        linewidth=0, antialiased=False, shade=False, gid="surface",
    )  # fmt: skip
    axes.zaxis.set_major_formatter(FuncFormatter(lambda power, _: plain_number(float(f"{10**power:.2g}"))))
    axes.set_xlim(0, size[1])
    axes.set_ylim(0, size[0])
    axes.set_xlabel("channel", labelpad=2)
    axes.set_ylabel("token", labelpad=2)
    axes.set_box_aspect((1, 1, 0.72), zoom=1.06)
    axes.tick_params(pad=0, labelsize=7.5)
    for axis, ends in ((axes.xaxis, size[1]), (axes.yaxis, size[0]), (axes.zaxis, 0)):
        # No tick beyond the last channel or token: MaxNLocator would round up to 600 of 576.
        axis.set_major_locator(FixedLocator([0, ends / 2, ends]) if ends else MaxNLocator(nbins=4, integer=True))
        axis.set_pane_color((1.0, 1.0, 1.0, 0.0))


def _cells(maps: Mapping[str, Map], size: tuple[int, int]) -> str:
    """Say how many tokens × channels one point is the maximum of."""
    shape = next(iter(maps.values())).shape
    tokens, channels = (-(-whole // max(part, 1)) for whole, part in zip(size, shape, strict=True))
    if tokens * channels == 1:
        return ""
    return f"each point: the largest of {counted(tokens, 'token')} × {counted(channels, 'channel')}"


def _coarse(picture: Map) -> Map:
    """Reduce a map to what a surface can show, keeping every peak."""
    for axis in (0, 1):
        cell = cell_size(picture.shape[axis], SURFACE_SIZE)
        starts = np.arange(0, picture.shape[axis], cell)
        picture = np.maximum.reduceat(picture, starts, axis=axis)
    return picture


def _norm(maps: Sequence[Map]) -> Normalize:
    """Scale the colours by decades where there are several, else evenly."""
    values = np.concatenate([picture[np.isfinite(picture) & (picture > 0)].ravel() for picture in maps])
    if not values.size:
        return Normalize(0, 1)
    # Few cells of sinks would leave all others the middle colours; the title names the largest.
    low, high = (float(np.percentile(values, share)) for share in (1, 99.9))
    return LogNorm(low, high, clip=True) if high > 20 * low else Normalize(0, high)

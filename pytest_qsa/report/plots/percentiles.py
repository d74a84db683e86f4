"""The figure of percentile bands: for each channel, between which values what share of its tokens lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .style import BLUE, INK, MUTED, add_legend, grid_of, head, new_figure, safe_text, scale_asinh, styled

Bands = Mapping[str, NDArray[np.float64]]
"""The names of `channels.SHARES` → [C]."""
PAIRS = (("min", "max"), ("p0.01", "p99.99"), ("p1", "p99"), ("p25", "p75"))
_LABELS = ("all tokens", "0.01 to 99.99 %", "1 to 99 %", "25 to 75 %")
_FILLS = ("#dfe6ee", "#b5c6d8", "#7f9dbb", "#2b5c8a")
_LINES = ((MUTED, ":"), (MUTED, "--"), (BLUE, "-."), (INK, "-"))
MOST_COLUMNS = 400


@styled
def percentile_figure(
    layers: Mapping[str, Bands], title: str, note: str, *, style: Literal["fill", "line"] = "fill", legend: bool = True
) -> Figure:
    """Draw the bands over the channels, one panel a layer. Neighbouring channels share a column where they are many."""
    lines, columns = grid_of(len(layers), 2)
    figure = new_figure(1.4 + 2.2 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(layers) :]:
        axes.remove()
    per_column = 1
    for axes, (layer, bands) in zip(grid, layers.items(), strict=False):
        per_column = max(per_column, _draw(axes, bands, style))
        axes.set_title(safe_text(layer, 60), color=MUTED)
        axes.grid(axis="y")
    for index, axes in enumerate(grid[: len(layers)]):
        if index >= len(layers) - columns:
            axes.set_xlabel("channel" + (f" (a column holds up to {per_column})" if per_column > 1 else ""))
        if index % columns == 0:
            axes.set_ylabel("x" if _signed(layers) else "|x|")
    head(figure, None, title, [note])
    if legend:
        add_legend(figure, grid[0])
    return figure


def _draw(axes: Axes, bands: Bands, style: str) -> int:
    """Draw one layer; return how many channels a column holds."""
    count = len(bands["max"])
    cell = -(-count // MOST_COLUMNS)
    starts = np.arange(0, count, cell)
    edges = np.append(starts, count)
    width = np.nanmedian(np.abs(np.concatenate([bands["p25"], bands["p75"]])))
    for (below, above), label, fill, (colour, dash) in zip(PAIRS, _LABELS, _FILLS, _LINES, strict=True):
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
    scale_asinh(axes.yaxis, float(width) if np.isfinite(width) and width > 0 else 1.0)
    return cell


def _signed(layers: Mapping[str, Bands]) -> bool:
    return any((bands["min"] < 0).any() for bands in layers.values())

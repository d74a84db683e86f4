"""Figures of one sample: |x| over tokens and channels, as maps and as surfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from .style import MUTED, head, new_figure, new_grid, plain_number, safe_text, styled

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
            colours.to_rgba(picture, bytes=True), origin="lower", aspect="auto", extent=(0, size[1], 0, size[0]),
            interpolation="nearest", gid="map",
        )  # fmt: skip
        axes.set_title(safe_text(layer, 42), color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    grid.label("channel", "token")
    bar = grid.figure.colorbar(
        colours, ax=grid.axes, label="|x|", format=FuncFormatter(plain_number), fraction=0.05, aspect=32, pad=0.01
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
    heights = np.nan_to_num(picture, posinf=0.0, neginf=0.0)
    axes.plot_surface(
        channels[None, :], tokens[:, None], heights, cmap=COLOURS, rstride=1, cstride=1, linewidth=0, antialiased=False,
        shade=False, gid="surface",
    )  # fmt: skip
    axes.set_xlabel("channel", labelpad=2)
    axes.set_ylabel("token", labelpad=2)
    axes.set_box_aspect((1, 1, 0.72), zoom=1.06)
    axes.tick_params(pad=0, labelsize=7.5)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(nbins=4))
        axis.set_pane_color((1.0, 1.0, 1.0, 0.0))


def _cells(maps: Mapping[str, Map], size: tuple[int, int]) -> str:
    """Say how many tokens × channels one point is the maximum of."""
    shape = next(iter(maps.values())).shape
    tokens, channels = (-(-whole // max(part, 1)) for whole, part in zip(size, shape, strict=True))
    return f"each point: the largest of {tokens} tokens × {channels} channels" if tokens * channels > 1 else ""


def _coarse(picture: Map) -> Map:
    """Reduce a map to what a surface can show, keeping every peak."""
    for axis in (0, 1):
        cell = -(-picture.shape[axis] // SURFACE_SIZE)
        starts = np.arange(0, picture.shape[axis], cell)
        picture = np.maximum.reduceat(picture, starts, axis=axis)
    return picture


def _norm(maps: Sequence[Map]) -> Normalize:
    """Scale the colours by decades where there are several, else evenly."""
    values = np.concatenate([picture[np.isfinite(picture) & (picture > 0)].ravel() for picture in maps])
    if not values.size:
        return Normalize(0, 1)
    low, high = float(np.percentile(values, 1)), float(values.max())
    return LogNorm(low, high, clip=True) if high > 20 * low else Normalize(0, high)

"""A panel for each kind of layer: the figure that magnitudes, boxes and histograms share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .depth import MOST_TICKS, Depth, depth_of
from .style import MUTED, grid_of, head, new_figure, safe_text

MOST_PANELS = 9
"""More kinds of layers share one panel."""


@dataclass(frozen=True)
class Panels:
    """A figure with a panel for each kind of layer, and its axes in order. All share y."""

    figure: Figure
    depth: Depth
    axes: list[Axes]

    def __iter__(self) -> Iterator[tuple[Axes, str, list[int]]]:
        """Yield the axes, the name and the members of each kind."""
        for axes, (kind, members) in zip(self.axes, self.depth.kinds.items(), strict=True):
            yield axes, kind, members

    @property
    def ticks(self) -> int:
        """The most ticks that a panel has room for."""
        return MOST_TICKS // grid_of(len(self.axes))[1]

    def label(self, across: str, along: str) -> None:
        """Name the y axes of the first column; and, where there are several panels, each x axis."""
        for axes in self.axes:
            axes.grid(axis="y")
            if len(self.axes) > 1:
                axes.set_xlabel(across)
        for axes in self.axes[:: grid_of(len(self.axes))[1]]:
            axes.set_ylabel(along)


def panels_of(layers: Sequence[str], title: str, note: str) -> Panels:
    """Make the panels of some layers, each with its kind above it."""
    depth = depth_of(layers, MOST_PANELS)
    kinds = list(depth.kinds)
    lines, columns = grid_of(len(kinds))
    figure = new_figure((4.0, 6.2, 8.4)[lines - 1])
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes in grid[len(kinds) :]:
        axes.remove()
    head(figure, grid[0] if len(kinds) == 1 else None, title, [note])
    if len(kinds) > 1:
        for axes, kind in zip(grid, kinds, strict=False):
            axes.set_title(safe_text(depth.kind_labels[kind], 40), color=MUTED)
    return Panels(figure, depth, list(grid[: len(kinds)]))

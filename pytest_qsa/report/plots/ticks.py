"""Axes that draw all ticks with one, which moves: matplotlib makes five artists for each, a sixth of all drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, XTick, YAxis, YTick
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox


class _MovingTick:
    """A tick that is drawn at several places. `places`: where, in the axis's units, and the label there.

    `along`: 0 of an x axis, 1 of a y axis.
    """

    along: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.places: Sequence[tuple[float, str]] = ()
        self._measured: dict[tuple[str, float], Bbox] = {}

    def draw(self: Any, renderer: Any) -> None:
        """Draw a grid line and a label at each of the places, and the marks of all at once."""
        for place, label in self.places:
            self.update_position(place)
            self.label1.set_text(label)
            self.gridline.draw(renderer)
            self.label1.draw(renderer)
        ends = np.zeros((2, len(self.places)))
        ends[self.along] = [place for place, _ in self.places]
        self.tick1line.set_data(*ends)
        self.tick1line.draw(renderer)

    def extents(self: Any, renderer: Any) -> list[Bbox]:
        """Return the extents of the labels in pixels. A label is measured once, for a layout asks five times."""
        label, dpi = self.label1, self.get_figure(root=True).dpi
        points = np.tile(np.array(label.get_position(), dtype=float), (len(self.places), 1))
        points[:, self.along] = [place for place, _ in self.places]
        found = []
        for (place, text), at in zip(self.places, label.get_transform().transform(points), strict=True):
            if (text, dpi) not in self._measured:
                self.update_position(place)
                label.set_text(text)
                self._measured[text, dpi] = label.get_window_extent(renderer).translated(*-at)
            found.append(self._measured[text, dpi].translated(*at))
        return found


class _MovingTicks:
    """An axis with one tick for all major places and one for all minor ones."""

    def set_clip_path(self: Any, path: Any, transform: Any = None) -> None:
        """Clip the axis and its grid; matplotlib would make a minor tick for it, which has no grid here."""
        Artist.set_clip_path(self, path, transform)
        for tick in self.majorTicks:
            tick.set_clip_path(path, transform)

    def _update_ticks(self: Any) -> list[Any]:
        """Return the ticks to draw, which know their places: those within the view."""
        ends = np.sort(self.get_transform().transform(self.get_view_interval()))
        slack = 1e-10 * (ends[1] - ends[0])  # matplotlib's own
        shown = []
        for ticker, ticks in (self.major, self.get_major_ticks), (self.minor, self.get_minor_ticks):
            if isinstance(ticker.locator, NullLocator):
                continue
            places = np.asarray(ticker.locator(), dtype=float)
            at = self.get_transform().transform(places)
            within = (ends[0] - slack <= at) & (at <= ends[1] + slack)
            labels = ticker.formatter.format_ticks(places)
            (tick,) = ticks(1)
            tick.places = [each for each, known in zip(zip(places, labels, strict=True), within, strict=True) if known]
            shown += [tick] * bool(tick.places)
        return shown

    def _get_ticklabel_bboxes(self, ticks: Sequence[Any], renderer: Any = None) -> tuple[list[Bbox], list[Bbox]]:
        """Return the extents of all labels on the near side, and of those on the far side, which has none."""
        return [each for tick in ticks if tick.label1.get_visible() for each in tick.extents(renderer)], []


class _XTick(_MovingTick, XTick):
    along = 0


class _YTick(_MovingTick, YTick):
    along = 1


class _XAxis(_MovingTicks, XAxis):
    _tick_class = _XTick


class _YAxis(_MovingTicks, YAxis):
    _tick_class = _YTick


class _Axes(Axes):
    def _init_axis(self) -> None:
        self.xaxis, self.yaxis = _XAxis(self, clear=False), _YAxis(self, clear=False)
        for name, axis in (("bottom", self.xaxis), ("top", self.xaxis), ("left", self.yaxis), ("right", self.yaxis)):
            self.spines[name].register_axis(axis)


class PlainFigure(Figure):
    """A figure whose flat axes draw all ticks with one."""

    def add_subplot(self, *args: Any, **kwargs: Any) -> Any:
        """Add axes, as `Figure.add_subplot` does."""
        return super().add_subplot(*args, **({} if "projection" in kwargs else {"axes_class": _Axes}), **kwargs)

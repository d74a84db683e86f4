"""Where layers stand on the x axis, with labels short enough to read; and a panel for each kind of layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from ...checkpoint import NUMBER, kind_of
from .style import GROUP_STYLES, MUTED, Grid, add_legend, head, new_grid, safe_text

MOST_TICKS = 24
MOST_PANELS = 9
"""Of more kinds than this, all layers share one panel."""


@dataclass(frozen=True)
class Depth:
    """The layers on the x axis. `x`: their positions. `kinds`: kind of layer, which one line joins → indices of layers.

    Where all names have a number (`model.layers.7.mlp`) x is the first number; elsewhere it is the order in the model.
    """

    layers: tuple[str, ...]
    x: tuple[float, ...]
    kinds: dict[str, list[int]]
    numbered: bool

    @property
    def label(self) -> str:
        """The axis label: what all names have in common, with * for what the ticks say."""
        if self.numbered:
            return next(iter(self.kinds)) if len(self.kinds) == 1 else "block"
        prefix, suffix = _affixes(self.layers)
        return f"{prefix}*{suffix}" if prefix or suffix else "layer"

    def short(self, index: int) -> str:
        """Name a layer by its tick: `7`, or `7 q_proj` where there are several kinds."""
        if not self.numbered:
            return self._names[index]
        if len(self.kinds) == 1:
            return NUMBER.findall(self.layers[index])[0] if len(set(self.x)) == len(self.x) else self.layers[index]
        kind = next(name for name, members in self.kinds.items() if index in members)
        return f"{self.x[index]:g} {self.kind_labels[kind]}"

    @cached_property
    def kind_labels(self) -> dict[str, str]:
        """The names of the kinds without their common prefix and suffix."""
        names = list(self.kinds)
        prefix, suffix = _affixes(names)
        return {name: name[len(prefix) : len(name) - len(suffix)].strip(".") or name for name in names}

    @cached_property
    def _names(self) -> list[str]:
        prefix, suffix = _affixes(self.layers)
        return [name[len(prefix) : len(name) - len(suffix)] or name for name in self.layers]

    def part(self, members: Sequence[int]) -> Depth:
        """Return some of the layers, all of one kind, as a depth of their own."""
        kind = next((name for name, kind in self.kinds.items() if members[0] in kind), "")
        places = tuple(self.x[i] for i in members)
        return Depth(tuple(self.layers[i] for i in members), places, {kind: [*range(len(members))]}, self.numbered)

    def ranges(self, indices: Sequence[int], most: int = 90) -> str:
        """Name many layers in few words: `11–26, 29`."""
        if not self.numbered or len(set(self.x)) < len(self.x):
            parts = [self.short(index) for index in indices]
            return _cut(parts, most)
        runs: list[list[int]] = []
        for position in sorted({int(self.x[index]) for index in indices}):
            if runs and position == runs[-1][-1] + 1:
                runs[-1].append(position)
            else:
                runs.append([position])
        return _cut([f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs], most)

    def names_of(self, indices: Sequence[int], most: int = 90) -> str:
        """Name many layers in few words, kind by kind where there are several: `q_proj 7; v_proj 3–5`."""
        if len(self.kinds) == 1 or not self.numbered:
            return self.ranges(indices, most)
        parts = []
        for kind, members in self.kinds.items():
            own = [index for index in indices if index in set(members)]
            if own:
                parts.append(f"{self.kind_labels[kind]} {self.part(own).ranges(range(len(own)), most)}")
        return _cut(parts, most, "; ")

    def label_axis(self, axes: Axes, most: int = MOST_TICKS) -> None:
        """Label the x axis and its ticks, of which there are at most `most`."""
        if self.numbered:
            positions = sorted({int(x) for x in self.x})
            step = _step(positions[-1] - positions[0] + 1, most)
            first = -(-positions[0] // step) * step
            ticks = positions if len(positions) <= most // 2 else list(range(first, positions[-1] + 1, step))
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
        else:
            step = -(-len(self.layers) // most)
            ticks = list(range(0, len(self.layers), step))
            names = [safe_text(self._names[tick], 26) for tick in ticks]
            flat = sum(map(len, names)) < 90
            slant: Any = {} if flat else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(ticks, names, **slant)
        every = len(self.x) <= 130 and most == MOST_TICKS  # in narrow panels a tick for each layer costs time
        axes.xaxis.set_minor_locator(FixedLocator(sorted(set(self.x))) if every else NullLocator())
        axes.tick_params(axis="x", which="minor", length=2)
        low, high = min(self.x), max(self.x)
        margin = max(0.7, 0.02 * (high - low))
        axes.set_xlim(low - margin, high + margin)
        axes.set_xlabel(safe_text(self.label, 100))


def evenly_spread(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` indices, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def _cut(parts: Sequence[str], most: int, separator: str = ", ") -> str:
    shown = list(parts)
    while len(shown) > 1 and len(separator.join(shown)) > most:
        shown.pop()
    more = len(parts) - len(shown)
    return separator.join(shown) + (f" and {more} more" if more else "")


def _step(count: int, most: int) -> int:
    step = 1
    while -(-count // step) > most:
        # 1, 2, 5, 10, 20, 50, …
        step = {"1": step * 2, "2": step // 2 * 5, "5": step * 2}[str(step)[0]]
    return step


def depth_of(layers: Sequence[str], most_kinds: int = len(GROUP_STYLES)) -> Depth:
    """Return the depth of layers, given in the model's order; more than `most_kinds` kinds become one."""
    names = tuple(layers)
    numbers = [NUMBER.search(name) for name in names]
    for count in (1, 0):  # replace the first number, or every number: experts would be too many kinds
        if not all(numbers):
            break
        kinds: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            kinds.setdefault(kind_of(name, count), []).append(index)
        if len(kinds) <= most_kinds:
            return Depth(names, tuple(float(number[0]) for number in numbers if number), kinds, True)
    return Depth(names, tuple(map(float, range(len(names)))), {"": list(range(len(names)))}, False)


def _affixes(names: Sequence[str]) -> tuple[str, str]:
    """Return the common first and last components of names, with their dots."""
    if len(set(names)) < 2:
        return "", ""
    split = [name.split(".") for name in names]
    # One component is left at least, else the shortest name would have an empty label.
    shortest = min(map(len, split)) - 1
    front = next((i for i in range(shortest) if len({parts[i] for parts in split}) > 1), shortest)
    back = next((i for i in range(shortest - front) if len({parts[-1 - i] for parts in split}) > 1), shortest - front)
    prefix = "".join(f"{part}." for part in split[0][:front])
    suffix = "".join(f".{part}" for part in split[0][len(split[0]) - back :])
    return prefix, suffix


@dataclass(frozen=True)
class Panels:
    """A figure with a panel for each kind of layer; all share y."""

    grid: Grid
    depth: Depth

    def __iter__(self) -> Iterator[tuple[Axes, str, list[int]]]:
        """Yield the axes, the name and the members of each kind."""
        for axes, (kind, members) in zip(self.grid.axes, self.depth.kinds.items(), strict=True):
            yield axes, kind, members

    def by_depth(self) -> Iterator[tuple[Axes, Depth, list[int]]]:
        """Yield the axes of each kind with depth on their x axis, the depth of its layers, and its members."""
        for axes, _, members in self:
            part = self.depth.part(members)
            part.label_axis(axes, most=MOST_TICKS // self.grid.columns)
            yield axes, part, members

    def label(self, across: str, along: str, *, legend: bool) -> None:
        """Name the y axes of the first column, every x axis where there are several panels, and what is drawn."""
        for axes in self.grid.axes:
            axes.grid(axis="y")
            if len(self.grid.axes) > 1:
                axes.set_xlabel(across)
        for axes in self.grid.axes[:: self.grid.columns]:
            axes.set_ylabel(along)
        if legend:
            add_legend(self.grid.figure, self.grid.axes[0])


def panels_of(layers: Sequence[str], title: str, note: str) -> Panels:
    """Make the panels of some layers, each with its kind above it."""
    depth = depth_of(layers, MOST_PANELS)
    grid = new_grid(len(depth.kinds), lambda lines: (4.0, 6.2, 8.4)[lines - 1], sharey=True)
    head(grid.figure, grid.axes[0] if len(grid.axes) == 1 else None, title, [note])
    if len(grid.axes) > 1:
        for axes, kind in zip(grid.axes, depth.kinds, strict=True):
            axes.set_title(safe_text(depth.kind_labels[kind], 40), color=MUTED)
    return Panels(grid, depth)

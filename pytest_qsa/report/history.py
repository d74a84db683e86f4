"""A number over the releases: as a table, as a plot, and as a page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..common import code_span, counted, escaped, markdown_table, number, text_table
from .html import render

HEADS = ["when", "release", "value", "worst layer", "change", "where it moved most"]
BARS = "▁▂▃▄▅▆▇█"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 170, 52, 26, 16, 14
"""The size of a plot and its margins, in its own units: near to pixels on a phone, so that its text is not small."""


@dataclass(frozen=True)
class Point:
    """Numbers at a time. `label`: the tag, or what else it is. `when`: ISO; empty for now. `values`: by layer.

    `layer`: the worst one, whose number is shown.

    `release`: whether it is a baseline of a release, which holds until the next; else it was measured once. `compared`:
    what it can be compared with: its definition and tokens. `low`, `high`: its bounds. `kind`: of the verdict.
    """

    label: str
    when: str
    values: Mapping[str, float]
    layer: str
    release: bool = True
    compared: tuple[str, str] = ("", "")
    low: float | None = None
    high: float | None = None
    kind: str = ""

    @property
    def value(self) -> float:
        """The number that is shown."""
        return self.values[self.layer]

    @property
    def worst(self) -> str:
        """The layer of that number, where there are several."""
        return self.layer if len(self.values) > 1 else ""

    @property
    def day(self) -> str:
        """The day, or `now`."""
        return self.when[:10] or "now"

    @property
    def out(self) -> bool:
        """Whether its verdict was red."""
        return self.kind not in ("", "PASSED", "WARNED")


@dataclass(frozen=True)
class Track:
    """The numbers of one assertion on one subject, in the order of time."""

    id: str
    subject: str
    points: Sequence[Point]
    text: str = ""
    unit: str = ""

    @property
    def label(self) -> str:
        """The id with its unit."""
        return f"{self.id} [{self.unit}]" if self.unit else self.id

    def change(self, index: int) -> tuple[str, str]:
        """Say how a point differs from the one before, where it moved most: `+2.1 %` and the layer.

        The first text is empty where nothing moved, and says why two points can't be compared.
        """
        if not index:
            return "", ""
        before, now = self.points[index - 1], self.points[index]
        if why := _apart(before, now):
            return why, ""
        moved = {name: (before.values[name], value) for name, value in now.values.items() if name in before.values}
        if not moved:
            return "other layers", ""
        layer = max(moved, key=lambda name: _size(*moved[name]))
        text = _moved(*moved[layer])
        return text, layer if text and len(moved) > 1 else ""

    @property
    def trend(self) -> str:
        """The values as a row of bars; empty where there are fewer than two."""
        values = [point.value for point in self.points if math.isfinite(point.value)]
        if len(values) < 2:
            return ""
        low, high = min(values), max(values)
        room = (high - low) or 1.0
        return "".join(
            BARS[round((value - low) / room * (len(BARS) - 1))] if high > low else BARS[0] for value in values
        )


def _size(before: float, now: float) -> float:
    """Return how far a number moved, as a share; ∞ from 0 and to or from what is not finite."""
    if before == now:
        return 0.0
    if not before or not math.isfinite(before) or not math.isfinite(now):
        return math.inf
    return abs((now - before) / before)


def _moved(before: float, now: float) -> str:
    """Write how a number moved: `+2.1 %`, or both numbers where a share means nothing; empty where it did not."""
    size = _size(before, now)
    if not size:
        return ""
    if math.isinf(size):
        return f"{number(before)} → {number(now)}".replace("inf", "∞")
    return f"{math.copysign(size, now - before):+.2%}".replace("-", "−").replace("%", " %")


def _apart(before: Point, now: Point) -> str:
    """Say why two points can't be compared; empty where they can, or where it isn't known."""
    names = ("definition", "tokens")
    for name, one, other in zip(names, before.compared, now.compared, strict=True):
        if one and other and one != other:
            return f"other {name}"
    return ""


@dataclass(frozen=True)
class History:
    """The tracks of a suite. `suite`: as a user types it. `notes`: what is not in it."""

    suite: str
    tracks: Sequence[Track]
    notes: Sequence[str] = ()


def history_lines(history: History, last: int) -> Iterator[str]:
    """Yield what the terminal shows. `last`: how many points of each assertion are listed."""
    single = len(history.tracks) == 1
    yield f"{history.suite}: {counted(len(history.tracks), 'assertion')} over time"
    for track in history.tracks:
        yield ""
        yield f"{track.label} on {track.subject}  {track.trend}".rstrip()
        if single and track.text:
            yield f"  {track.text}"
        yield from text_table([HEADS, *_rows(track, last)], right={2, 4}, indent="  ")
        if len(track.points) > last:
            yield f"  … and {len(track.points) - last} before; --last {len(track.points)} shows them"
    yield from (f"note: {note}" for note in history.notes)


def _rows(track: Track, last: int) -> Iterator[list[str]]:
    for index, point in list(enumerate(track.points))[-last:]:
        value = number(point.value).replace("inf", "∞") + " ◆" * point.out
        yield [point.day, point.label, value, point.worst, *track.change(index)]


def history_markdown(history: History, last: int) -> str:
    """Return Markdown. `last`: how many points of each assertion are listed."""
    lines = []
    for track in history.tracks:
        lines += [f"#### {code_span(track.label)} on {code_span(track.subject)} {track.trend}".rstrip(), ""]
        lines += [*markdown_table([HEADS, *_rows(track, last)], plain={0, 2, 4}), ""]
    lines += [f"> {escaped(note)}" for note in history.notes]
    return "\n".join(lines).rstrip() + "\n"


def history_csv(history: History) -> str:
    """Return CSV: a row a point."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["assertion", "subject", "when", "label", "source", "value", "unit", "layer", "kind"])
    for track in history.tracks:
        for point in track.points:
            source = "baseline" if point.release else "report"
            row = [track.id, track.subject, point.when, point.label, source, repr(point.value), track.unit]
            writer.writerow([*row, point.worst, point.kind])
    return file.getvalue()


def history_page(history: History, command: str = "") -> str:
    """Return one self-contained page. `command`: that made it."""
    plots = [Markup(history_plot(track)) if len(track.points) > 1 else "" for track in history.tracks]
    rows = [list(_rows(track, len(track.points))) for track in history.tracks]
    tracks = list(zip(history.tracks, plots, rows, strict=True))
    return render("history.html.j2", history=history, tracks=tracks, heads=HEADS, command=command, session={})


def history_plot(track: Track) -> str:
    """Return an SVG of a track: baselines as steps that hold until the next release, reports as points.

    It carries its own style, so that it is a file of its own as well; all text in it is escaped.
    """
    return render("history.svg.j2", track=track, plot=_plot(track), width=WIDTH, height=HEIGHT, left=LEFT, top=TOP)


def _plot(track: Track) -> dict[str, Any]:
    finite = [point.value for point in track.points if math.isfinite(point.value)]
    last = track.points[-1]
    bounds = [bound for bound in (last.low, last.high) if bound is not None and math.isfinite(bound)]
    low, high = min([*finite, *bounds], default=0.0), max([*finite, *bounds], default=1.0)
    room = (high - low) or abs(high) or 1.0
    low, high = (low - 0.08 * room if low else 0.0), high + 0.12 * room

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP), 1)

    step = (WIDTH - LEFT - RIGHT) / max(len(track.points) - 1, 1)
    marks: list[dict[str, Any]] = []
    for index, point in enumerate(track.points):
        said = [f"{point.day} {point.label}: {number(point.value)} {track.unit}".rstrip(), point.worst]
        said.append(" at ".join(filter(None, track.change(index))))
        place = y(point.value) if math.isfinite(point.value) else TOP
        mark = {"x": round(LEFT + index * step, 1), "y": place, "point": point, "said": ", ".join(filter(None, said))}
        marks.append(mark)
    return {
        "marks": marks,
        "steps": _steps([mark for mark in marks if mark["point"].release]),
        "ticks": [(number(value), y(value)) for value in ([min(finite), max(finite)] if finite else [])],
        "bounds": [(number(bound), y(bound)) for bound in bounds],
        "first": track.points[0].day,
        "last": last.day,
    }


def _steps(marks: Sequence[dict[str, Any]]) -> str:
    """Return the path of the baselines; it breaks where the numbers can't be compared."""
    path = ""
    for index, mark in enumerate(marks):
        broken = not index or _apart(marks[index - 1]["point"], mark["point"])
        path += f"M{mark['x']} {mark['y']}" if broken else f"H{mark['x']}V{mark['y']}"
    return path

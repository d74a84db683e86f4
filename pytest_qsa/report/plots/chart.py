"""A figure as plain data, which a page draws as wide as it is: its text never shrinks, and a pointer reads its values.

The data is read off the figure, so that the picture in a file and the one on a page can't differ.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LogNorm, to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Annotation, Text
from PIL import Image

from .style import Bars

Mark = dict[str, Any]
_DASHES = {"--": "6 3", ":": "1.5 3", "-.": "7 3 1.5 3"}
_WIDTHS = {"asinh": "linear_width", "symlog": "linthresh"}
"""A scale that is linear around 0 → the attribute of its transform that says how far."""


def chart_of(figure: Figure) -> dict[str, Any]:
    """Return a flat figure as plain data.

    `title` and `notes`; `columns`, where the page is wide; and `panels` with axes and marks in the units of the data.

    A mark has a `kind`: `line` (points, joined where it has a `dash`), `area` (between `low` and `high`), `bars` and
    `segments` (four ends each), `steps` (values between edges) or `image`. Numbers have four digits.
    """
    panels = [_panel(axes) for axes in figure.axes if _colour_bar(axes) is None]
    columns = _columns(figure)
    # Panels with a common axis name it once: below the last of a column, and left of the first of a line.
    for index, panel in reversed([*enumerate(panels)]):
        beneath, before = index + columns, index - index % columns
        if not panel["x"]["label"] and beneath < len(panels):
            panel["x"]["label"] = panels[beneath]["x"]["label"]
        panel["y"]["label"] = panel["y"]["label"] or panels[before]["y"]["label"]
    notes = [_plain(each) for each in figure.artists if isinstance(each, Annotation)]
    chart: dict[str, Any] = {
        "title": figure.get_suptitle().strip().replace(r"\$", "$"),
        "notes": [line for note in notes for line in note.splitlines()],
        "columns": columns,
        "panels": panels,
    }
    colours = next((bar for bar in map(_colour_bar, figure.axes) if bar is not None), None)
    if colours is not None:
        chart["colours"] = _colours(colours)
    return chart


def _columns(figure: Figure) -> int:
    place = figure.axes[0].get_subplotspec()
    return place.get_gridspec().ncols if place else 1


def _colour_bar(axes: Axes) -> ScalarMappable | None:
    bar = getattr(axes, "_colorbar", None)
    return bar.mappable if bar is not None else None


def _colours(mappable: ScalarMappable) -> dict[str, Any]:
    """Return the ends of a colour scale, whether it is logarithmic, and its 256 colours."""
    low, high = _numbers((mappable.norm.vmin, mappable.norm.vmax))
    table = [to_hex(colour) for colour in mappable.get_cmap()(np.arange(256))]
    return {"low": low, "high": high, "log": isinstance(mappable.norm, LogNorm), "table": table}


def _panel(axes: Axes) -> dict[str, Any]:
    if not axes.axison:  # an empty picture says in words why it is empty
        return {"message": " ".join(map(_plain, axes.texts)), "x": {"label": ""}, "y": {"label": ""}, "marks": []}
    horizontal = any(each.orientation == "horizontal" for each in axes.containers if isinstance(each, BarContainer))
    return {
        "title": axes.get_title(loc="left").replace(r"\$", "$"),
        "x": _axis(axes.xaxis),
        "y": _axis(axes.yaxis),
        "horizontal": horizontal,
        "marks": list(_marks(axes)),
        "texts": [
            {"at": _numbers(text.xy if isinstance(text, Annotation) else text.get_position()), "text": _plain(text)}
            for text in axes.texts
        ],
    }


def _axis(axis: Axis) -> dict[str, Any]:
    low, high = axis.get_view_interval()
    places = [float(place) for place in axis.get_majorticklocs() if min(low, high) <= place <= max(low, high)]
    names = [name.replace(r"\$", "$") for name in axis.get_major_formatter().format_ticks(places)]
    width = _WIDTHS.get(axis.get_scale())
    return {
        "label": axis.get_label_text().replace(r"\$", "$").replace("\n", " "),
        "scale": axis.get_scale(),
        "width": getattr(axis.get_transform(), width) if width else 1.0,
        "ends": [float(low), float(high)],
        "inverted": bool(axis.get_inverted()),
        "ticks": list(zip(places, names, strict=True)),
    }


def _marks(axes: Axes) -> Iterator[Mark]:
    """Yield what is drawn, from the back to the front."""
    found: list[tuple[float, Mark]] = []
    for image in axes.images:
        left, right, bottom, top = image.get_extent()
        pixels = np.asarray(image.get_array())
        ends = {"ends": [left, right, bottom, top], "size": pixels.shape[1::-1], "source": _png(pixels)}
        found.append((image.zorder, {"kind": "image", **ends}))
    containers = [each for each in axes.containers if isinstance(each, BarContainer) and each.patches]
    found += [(each.patches[0].zorder, _bars(each)) for each in containers]
    for each in axes.patches:
        if isinstance(each, StepPatch):
            values, edges, _ = each.get_data()
            steps = {"kind": "steps", "values": _numbers(values), "edges": _numbers(edges)}
            style = {"colour": to_hex(each.get_edgecolor()), "dash": _DASHES.get(str(each.get_linestyle()), "")}
            found.append((each.zorder, {**steps, **style, "label": _label(each.get_label())}))
    for collection in axes.collections:
        if isinstance(collection, Bars):
            found.append((collection.zorder, _bars(collection)))
        elif isinstance(collection, LineCollection) and collection.get_segments():
            found.append((collection.zorder, _segments(collection)))
        elif isinstance(collection, PolyCollection):
            found.append((collection.zorder, _area(collection)))
    found += [(line.zorder, _line(line, axes)) for line in axes.lines]
    yield from (mark for _, mark in sorted(found, key=lambda pair: pair[0]))


def _bars(bars: BarContainer | Bars) -> Mark:
    """Return bars that are drawn one by one, or as one artist."""
    artist: Any = bars
    if isinstance(bars, Bars):
        ends, colour = [*bars.ends], artist.get_facecolor()[0]
    else:
        each = [bar for bar in bars.patches if isinstance(bar, Rectangle)]
        # A horizontal bar's two ends in y are where it lies, in x what it says.
        ends = [np.array((bar.get_x(), bar.get_x() + bar.get_width(), *_rise(bar))) for bar in each]
        artist, colour = each[0], each[0].get_facecolor()
    style = {"colour": to_hex(colour), "hatched": bool(artist.get_hatch()), "label": _label(bars.get_label())}
    return {"kind": "bars", "ends": [*map(_numbers, ends)], **style, "name": artist.get_gid()}


def _rise(bar: Rectangle) -> tuple[float, float]:
    return bar.get_y(), bar.get_y() + bar.get_height()


def _segments(collection: LineCollection) -> Mark:
    lines: Any = collection.get_segments()
    ends = [_numbers((line[0][0], line[-1][0], line[0][1], line[-1][1])) for line in lines]
    style: Any = collection.get_edgecolor(), collection.get_linewidth()
    colour, width = to_hex(style[0][0]), float(style[1][0])
    return {"kind": "segments", "ends": ends, "colour": colour, "wide": width, "label": _label(collection.get_label())}


def _area(collection: PolyCollection) -> Mark:
    """Read the edges off the outlines of `fill_between`: a corner, the first edge, a corner, the second edge back.

    A gap between two outlines is a None in all three.
    """
    face: Any = collection.get_facecolor()
    parts: dict[str, list[float | None]] = {"x": [], "low": [], "high": []}
    for path in collection.get_paths():
        corners = np.asarray(path.vertices)
        count = (len(corners) - 3) // 2
        edges = corners[1 : count + 1], corners[count + 2 : 2 * count + 2][::-1]
        low, high = sorted((edge[:, 1] for edge in edges), key=lambda edge: float(np.nansum(edge)))
        for name, values in (("x", edges[0][:, 0]), ("low", low), ("high", high)):
            parts[name] += [None] * bool(parts[name]) + _numbers(values)
    return {"kind": "area", **parts, "colour": to_hex(face[0]), "label": _label(collection.get_label())}


def _line(line: Line2D, axes: Axes) -> Mark:
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    style = str(line.get_linestyle())
    every: Any = line.get_markevery()
    marker = str(line.get_marker())
    mark = {
        "kind": "line",
        "x": _numbers(x),
        "y": _numbers(y),
        "across": line.get_transform() == axes.get_yaxis_transform(),
        "colour": to_hex(line.get_color()),
        "joined": style != "None",
        "dash": _DASHES.get(style, ""),
        "wide": float(line.get_linewidth()),
        "faint": (line.get_alpha() or 1.0) < 1,
        "label": _label(line.get_label()),
    }
    if marker not in ("None", ""):
        mark |= {"marker": marker, "size": float(line.get_markersize()), "marked": "all" if every is None else every}
        face = line.get_markerfacecolor()
        mark["hollow"] = isinstance(face, str) and face in ("white", "none")
    return mark


def _png(pixels: Any) -> str:
    stream = io.BytesIO()
    # A scale has 256 colours at most, so that a palette of them loses nothing; Pillow's own choice would merge some.
    colours, places = np.unique(pixels[..., :3].reshape(-1, 3), axis=0, return_inverse=True)
    image = Image.fromarray(places.reshape(pixels.shape[:2]).astype(np.uint8), "P")
    image.putpalette(colours.tobytes())
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _numbers(values: Sequence[Any] | Any) -> list[float | None]:
    return [_short(value) for value in np.asarray(values, dtype=float).tolist()]


def _short(value: float) -> float | None:
    """Keep four digits, which no plot shows more of; None is a gap."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _label(label: object) -> str:
    text = str(label).replace(r"\$", "$")
    return "" if text.startswith("_") else text


def _plain(text: Text) -> str:
    return text.get_text().replace(r"\$", "$")

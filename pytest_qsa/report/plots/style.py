"""What all figures share: palette, marks that differ without colour, grids, scales, captions, text made safe."""

from __future__ import annotations

import functools
import io
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ...captures import Capture, PositionRange, Site
from ...common import counted, write_atomically
from ...metrics import PlainQuery

DPI = 120
FIGURE_WIDTH = 9.0
TICK_DISTANCE = 0.09
"""The least distance of two ticks, as a share of the axis."""

INK, MUTED, FAINT = "#1c2733", "#5b6875", "#dfe4ea"
BLUE, PALE, RED, AMBER = "#2b5c8a", "#c9d9e8", "#b3261e", "#a86400"
GREEN, OCHRE, VIOLET, ROSE = "#14532f", "#bf7709", "#8557a0", "#c2848f"
"""With INK and BLUE: six colours that a grey print keeps apart, each at least 7 % lighter or darker than the others."""
GROUP_STYLES = [
    (BLUE, "o", "-"), (OCHRE, "s", "--"), (GREEN, "^", "-."),
    (VIOLET, "D", ":"), (INK, "v", (0, (5, 1, 1, 1))), (ROSE, "P", (0, (1, 1))),
]  # fmt: skip
"""Colour, marker and dash of each kind of layer in one figure."""

_STYLE: Any = {
    "font.family": ["sans-serif"], "font.size": 9.0, "text.usetex": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.linewidth": 0.8,
    "axes.facecolor": "white",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "axes.axisbelow": True,
    "axes.titlesize": 9.0, "axes.titlelocation": "left", "axes.labelsize": 9.0, "axes.formatter.use_mathtext": False,
    "axes.titley": 1.0,  # otherwise matplotlib looks for a free place, a seventh of the time of all drawing
    "axes.unicode_minus": True, "figure.facecolor": "white", "savefig.facecolor": "auto", "grid.color": FAINT,
    "grid.linewidth": 0.7, "hatch.linewidth": 0.7, "hatch.color": "white",
    "legend.fontsize": 8.5, "legend.frameon": False,
    "lines.linewidth": 1.4, "lines.markersize": 4.5, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "path.sketch": None,
}  # fmt: skip

CJK = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip
"""Fonts of Chinese, Japanese and Korean; the first that is installed draws what DejaVu Sans has no glyph for."""

POSITIONS = {"all": "all positions", "no_sink": "positions without the sinks", "sink": "sinks only"}

P = ParamSpec("P")
R = TypeVar("R")


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Draw in this package's style whatever the user's matplotlibrc says, and leave theirs as it was."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context({**_STYLE, "font.sans-serif": [name for name, _ in fonts()]}):
            return function(*args, **kwargs)

    return inner


def new_figure(height: float) -> Figure:
    """Return an empty figure on an Agg canvas, without pyplot."""
    # pyplot would choose a backend for the machine's display, and keep every figure until it is closed.
    figure = Figure(figsize=(FIGURE_WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    return figure


def save_png(figure: Figure, path: Path) -> str:
    """Write a figure as PNG and return the absolute path."""
    write_atomically(path, encode_figure(figure, "png"))
    return str(path.resolve())


@styled
def encode_figure(figure: Figure, form: str, dpi: int = DPI, *, shaded: bool = False, paths: bool = True) -> bytes:
    """Return a figure as the bytes of a PNG or SVG; the same figure makes the same bytes.

    A PNG is reduced to 256 colours, which takes a third of the bytes and is hardly visible. `shaded`: the figure has a
    colour scale, for which the colours are chosen by a slower method that shows no steps. `paths`: an SVG has outlines
    in the place of text, which need no font; else text, of fewer bytes.
    """
    stream = io.BytesIO()
    _place_empty_labels(figure)
    if form == "png":  # savefig would draw twice: once for the layout alone
        figure.set_dpi(dpi)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        whole = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        method = Image.Quantize.MAXCOVERAGE if shaded else Image.Quantize.FASTOCTREE
        few = whole.quantize(256, method, dither=Image.Dither.NONE)
        few.save(stream, "PNG", dpi=(dpi, dpi), compress_level=5)  # 6, the default, takes half as long again for 5 %
    else:
        # Without a salt and with a date, each SVG of one figure has other ids and other bytes.
        font = "path" if paths else "none"
        with matplotlib.rc_context({"svg.hashsalt": "pytest-qsa", "svg.fonttype": font}):
            figure.savefig(stream, format=form, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _place_empty_labels(figure: Figure) -> None:
    # Else matplotlib looks for a place beside all ticks for each label, a sixth of all drawing.
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if not axis.get_label_text():
                axis.set_label_coords(0, 0)


def head(figure: Figure, axes: Axes | None, title: str, notes: Sequence[str] = ()) -> None:
    """Put a title on the figure and the notes below it: above the axes, or over all panels where `axes` is None."""
    lines = [safe_text(note, 150) for note in notes if note]
    fine = "\n".join(lines)
    # Constrained layout reserves space for the title alone: blank lines in it hold the notes.
    room = "\n " * len(lines) if axes is None else ""
    # A bold title of 84 characters is as wide as the figure.
    size = 11.5 * min(1.0, 84 / max(len(title), 1))
    text = figure.suptitle(
        safe_text(title, 110) + room, x=0.012, ha="left", fontsize=max(size, 8.5), fontweight="bold", color=INK
    )
    if axes is not None:
        axes.set_title(fine, loc="left", color=MUTED, pad=8, linespacing=1.4)
    elif fine:
        figure.add_artist(Annotation(fine, (0, 0), xycoords=text, va="bottom", color=MUTED, fontsize=9.0))


@dataclass(frozen=True)
class Grid:
    """Panels of equal size, line by line."""

    figure: Figure
    axes: list[Axes]
    columns: int

    def label(self, across: str, along: str) -> None:
        """Name the x axis of the last panel in each column, and the y axes of the first column."""
        for axes in self.axes[-self.columns :]:
            axes.set_xlabel(across)
            axes.tick_params(labelbottom=True)
        for axes in self.axes[:: self.columns]:
            axes.set_ylabel(along)


def new_grid(
    count: int, height: Callable[[int], float], *, columns: int = 3, sharex: bool = False, sharey: bool = False
) -> Grid:
    """Return a figure of `count` panels, four of them in a square. `height`: lines → the figure's height in inches."""
    columns = 2 if count == 4 else min(count, columns)
    lines = -(-count // columns)
    figure = new_figure(height(lines))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=sharex, sharey=sharey).ravel()
    for spare in axes[count:]:
        spare.remove()
    return Grid(figure, list(axes[:count]), columns)


def add_legend(figure: Figure, axes: Axes) -> None:
    """Put a short legend beside the title, a longer one under the figure."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 2:
        rows = -(-sum(len(label) + 7 for label in labels) // 120)
        figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // rows), columnspacing=1.6)
    elif labels:
        figure.legend(handles, labels, loc="upper right", bbox_to_anchor=(0.995, 0.998), ncols=2, columnspacing=1.6)


class Bars(PolyCollection):
    """Many upright bars as one artist: matplotlib takes ten times as long for those of `Axes.bar`.

    `ends`: left, right, bottom and top of each, [N, 4].
    """

    def __init__(self, ends: NDArray[np.float64], **style: Any) -> None:
        self.ends = ends
        super().__init__([*ends[:, [[0, 2], [0, 3], [1, 3], [1, 2]]]], **style)


def add_bars(axes: Axes, x: ArrayLike, low: ArrayLike, high: ArrayLike, width: float, **style: Any) -> None:
    """Draw N bars around `x` from `low` to `high`, each [N], within the axes as they are.

    `style`: of a collection, such as `facecolor`.
    """
    middle = np.asarray(x, dtype=float)
    ends = np.stack(np.broadcast_arrays(middle - width / 2, middle + width / 2, low, high), 1)
    axes.add_collection(Bars(ends, **style), autolim=False)  # each would scale all axes that share y


@functools.cache
def fonts() -> tuple[tuple[str, str], ...]:
    """Return (name, file) of the fonts: matplotlib's own DejaVu Sans, and a CJK font if one is installed."""
    own = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    installed = {entry.name: entry.fname for entry in fontManager.ttflist}
    more = next(((name, installed[name]) for name in CJK if name in installed), None)
    return (("DejaVu Sans", own), *([more] if more else []))


@functools.cache
def _glyphs(file: str) -> frozenset[int]:
    return frozenset(FT2Font(file).get_charmap())


def _drawable(code: int) -> bool:
    return any(code in _glyphs(file) for _, file in fonts())


def safe_text(text: str, most: int | None = None) -> str:
    """Escape text for matplotlib: invisible characters, mathtext, and glyphs that the font lacks.

    `most`: the largest length; an ellipsis replaces the middle of a longer text.
    """
    pieces = [_safe_character(character) for character in text]
    if most is not None and sum(map(len, pieces)) > most:
        while sum(map(len, pieces)) > most - 1:
            del pieces[len(pieces) // 2]
        pieces.insert((len(pieces) + 1) // 2, "…")
    return "".join(pieces).replace("$", r"\$")


def _safe_character(character: str) -> str:
    code = ord(character)
    if character in "\n\r\t":
        return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}[character]
    if code < 0x20 or 0x7F <= code < 0xA0:
        return f"\\x{code:02x}"
    # Combining marks would join with the quote before them, and right-to-left letters would turn the label around.
    odd = unicodedata.combining(character) or unicodedata.bidirectional(character) in ("R", "AL", "AN")
    return f"U+{code:04X}" if not character.isprintable() or odd or not _drawable(code) else character


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scale_asinh(axis: Axis, width: float) -> None:
    """Make an axis linear within ± width and logarithmic beyond, on both sides of 0, with plain numbers at decades."""
    scale = {"x": axis.axes.set_xscale, "y": axis.axes.set_yscale}[axis.axis_name]  # type: ignore[attr-defined]
    scale("asinh", linear_width=width)
    low, high = sorted(axis.get_view_interval())
    first, last = math.floor(math.log10(width)), math.ceil(math.log10(max(abs(low), abs(high), 10 * width)))
    apart = TICK_DISTANCE * (math.asinh(high / width) - math.asinh(low / width))
    kept = [0.0]
    for tick in (sign * 10.0**power for power in range(last, first - 1, -1) for sign in (1, -1)):
        room = min(abs(math.asinh(tick / width) - math.asinh(other / width)) for other in kept)
        if low <= tick <= high and room >= apart:
            kept.append(tick)
    axis.set_major_locator(FixedLocator(sorted(kept)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain_number))


def plain_number(value: float, _position: object = None) -> str:
    """Write a tick: 0.01, 1, 2500, 10⁻⁵, 2·10⁶."""
    plain, _, exponent = f"{value:g}".partition("e")
    if exponent:
        plain = plain.removesuffix("1") if plain in ("1", "-1") else f"{plain}·"
        plain += "10" + str(int(exponent)).translate(_RAISED)
    return plain.replace("-", "−")


def scale_log(axes: Axes, *, zero: bool = False) -> None:
    """Make y logarithmic, with plain numbers; `zero` keeps a linear piece from 0 to 1, for counts."""
    if zero:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(10, numticks=9))
        axes.yaxis.set_minor_locator(LogLocator(10, subs=(2.0, 5.0), numticks=9))
        # Numbers between the decades only where there are few decades.
        axes.yaxis.set_minor_formatter(FuncFormatter(plain_number) if high < 300 * low else NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))


def wants_log(values: list[float]) -> bool:
    """Say whether positive values span more than two decades."""
    return bool(values) and min(values) > 0 and max(values) > 100 * min(values)


def metric_title(query: PlainQuery) -> str:
    """Name the metric with its parameters and site: `outlier_tokens(threshold=64) at the output`."""
    parameters = {name: value for name, value in (query.get("parameters") or {}).items() if value != "auto"}
    arguments = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in parameters.items())
    name = query.get("metric", "value") + (f"({arguments})" if arguments else "")
    return f"{name} at the {query['site']}" if query.get("site") else name


def samples_of(capture: Capture, layers: Sequence[str], site: Site) -> int:
    """Count the samples behind the layers; 0 where the capture doesn't hold them."""
    numbers = capture.sites.get((layers[0], site)) if layers and site != "weight" else None
    return len(set(numbers.sample.tolist())) if numbers is not None else 0


def population(reduce: str | None, samples: int, positions: str | None) -> str:
    """Say how samples were folded and which positions count: `max over 8 samples · all positions`."""
    parts = []
    if samples:
        parts.append(f"{reduce or 'pooled'} over {counted(samples, 'sample')}")
    if positions and (span := PositionRange.parse(positions)):
        parts.append(span.text)
    elif positions:
        skipped = positions.partition(":")[2]
        parts.append(POSITIONS.get(positions) or (f"without the first {skipped} positions" if skipped else positions))
    return " · ".join(parts)


def bound_label(low: float | None, high: float | None) -> str:
    """Name a line that is drawn: `max 1`."""
    if low is not None and low == high:
        return f"equals {low:g}"
    return f"max {high:g}" if high is not None else f"min {low or 0.0:g}"

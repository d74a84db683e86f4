"""The HTML templates with their filters, and the page of an analysis: pictures and heat maps that turn, in one file."""

from __future__ import annotations

import base64
import functools
import gzip
import math
import re
import struct
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from numpy.typing import NDArray

from ..captures import cell_size
from ..common import shown_path
from .report import strict_json

MOST_PLAIN = 200_000
"""From this many characters on a part of a page is compressed, which the page undoes by itself (`ready.js`)."""
_SHORT_NAMES = {"\n": "↵", "\t": "→", "\r": r"\r"}


@dataclass(frozen=True)
class PagePicture:
    """A picture of a page, or the problem why there is none. `name`: of its file.

    `chart`: what `chart_of` returns, which the page draws; without one it shows `png`.
    """

    title: str
    name: str
    png: bytes = b""
    problem: str = ""
    chart: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The picture as an address that holds all of it; empty for none."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}" if self.png else ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, which the PNG's header holds."""
        return struct.unpack(">II", self.png[16:24]) if len(self.png) > 24 else (0, 0)


def render(template: str, **content: Any) -> str:
    """Return a template of `templates/` with its content; every text in it is escaped."""
    return _environment().get_template(template).render(content)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number_text, "visible": token_markup, "short": short_fact, "percent": share_text,
        "embedded": embedded, "packed": packed, "data_script": data_script,
    }  # fmt: skip
    return environment


def embedded(content: Mapping[str, Any]) -> Markup:
    """Write plain data as JSON for a script element; no text in it can end the element or begin another."""
    text = strict_json(content, compact=True)
    # In a script element HTML's escapes mean nothing, but those of JSON keep `</script>` from ending it.
    return Markup(text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"))


def packed(markup: str) -> Markup:
    """Return the content of an element, or a script with it compressed where it is long, as of 10,000 rows."""
    if len(markup) < MOST_PLAIN:
        return Markup(markup)  # a filter block gets what its template has escaped
    return Markup('<script type="text/plain" data-packed>{}</script>').format(_compressed(markup))


def data_script(content: Mapping[str, Any], name: str) -> Markup:
    """Return a script element with plain data as JSON, compressed where it is long. `name`: its id."""
    text = embedded(content)
    long = len(text) >= MOST_PLAIN
    opening = Markup('<script type="application/json" id="{}"{}>').format(name, Markup(" data-packed" if long else ""))
    return opening + (_compressed(text) if long else text) + Markup("</script>")


def _compressed(text: str) -> str:
    # Without a time, so that equal results make equal pages.
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield `a.b` → text of a nested mapping, whatever its keys are."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flattened(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, number_text(value) if isinstance(value, float) else str(value)


def number_text(value: Any, signed: bool = False) -> str:
    """Write a number as a person would, nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float | int) or isinstance(value, bool):
        return str(value)
    whole = 1e4 <= abs(value) < 1e7  # .4g would write 12345 as 1.234e+04
    text = f"{value:{'+' if signed else ''}{'.0f' if whole else '.4g'}}"
    return text.replace("inf", "∞").replace("nan", "NaN").replace("-", "−")


def share_text(share: float | None) -> str:
    """Write a share of the budget, `87 %`; from ten times on as `12 ×`."""
    if share is None:
        return ""
    if not math.isfinite(share):
        return "∞"
    if share >= 10:
        return f"{share:,.0f} ×"
    return f"{100 * share:.0f} %" if share >= 0.1 or not share else f"{100 * share:.1f} %"


def short_fact(value: str) -> str:
    """Shorten a SHA-256 to its first digits, and an absolute path to one relative to the present folder."""
    digest = value.removeprefix("sha256:")
    if re.fullmatch(r"[0-9a-f]{40,}", digest):
        return digest[:12]
    return shown_path(Path(value)) if Path(value).is_absolute() else value


def token_markup(text: str) -> Markup:
    """Escape token text, with signs for invisible characters: spaces at its ends, control, format and direction."""
    start, stop = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    return Markup("").join(
        _sign("·") if character == " " and not start <= index < stop else _character_markup(character)
        for index, character in enumerate(text)
    )


def _character_markup(character: str) -> Markup:
    if character in _SHORT_NAMES:
        return _sign(_SHORT_NAMES[character])
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") or character == "\u00a0":
        code = ord(character)
        return _sign(f"\\x{code:02x}" if code < 0x100 else f"U+{code:04X}")
    return escape(character)


def _sign(text: str) -> Markup:
    return Markup('<span class="sign">{}</span>').format(text)


SURFACE_SIDE = 48
"""The most points along either side: 48 × 48 points turn smoothly on a phone and take 12 kB for each layer."""
MOST_LAYERS = 32


@dataclass(frozen=True)
class GallerySurface:
    """A surface that a reader can turn, under one of the headings. `data`: what `surface_data` returns."""

    heading: str
    name: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Gallery:
    """All that the page shows. `facts`: label → what was run. `sections`: heading → pictures. `layers`: the model's.

    `findings`: what the pictures show, in sentences. `readings`: heading → how to read its pictures.
    """

    title: str
    facts: Mapping[str, str]
    sections: Mapping[str, Sequence[PagePicture]]
    warnings: Sequence[str] = ()
    layers: Sequence[str] = ()
    files: Sequence[str] = field(default_factory=list)
    command: str = ""
    surfaces: Sequence[GallerySurface] = ()
    findings: Sequence[str] = ()
    readings: Mapping[str, str] = field(default_factory=dict)


def render_gallery(gallery: Gallery) -> str:
    """Return the page; nothing in it is fetched from anywhere, and all text is escaped."""
    return render("gallery.html.j2", gallery=gallery, session={})


def surface_data(
    maps: Mapping[str, NDArray[np.float32]], size: tuple[int, int], angle: Sequence[float]
) -> dict[str, Any]:
    """Return the data of a surface for each layer.

    `maps`: layer → [t, c] of |x|. `size`: the tokens and channels that a map stands for. `angle`: elevation and azimuth
    in degrees. Every peak is kept; NaN and Inf are drawn as 0 and counted as `holes`. Of more than 32 layers every n-th
    is taken, always with the last one.
    """
    names = list(maps)
    step = math.ceil(len(names) / MOST_LAYERS)
    # Counted from the end, so that the last layer is always among them.
    shown = sorted({*range(len(names) - 1, -1, -step)}) if names else []
    return {
        "tokens": size[0],
        "channels": size[1],
        "elevation": float(angle[0]),
        "azimuth": float(angle[1]),
        "left_out": len(names) - len(shown),
        "start": max(range(len(shown)), key=lambda at: contrast(maps[names[shown[at]]]), default=0),
        "layers": [{"layer": names[index], **_grid(maps[names[index]])} for index in shown],
    }


def contrast(values: NDArray[np.float32]) -> float:
    """Return how far the largest of a map stands out of it: what makes a layer worth to be looked at first."""
    finite = values[np.isfinite(values)]
    return float(finite.max() / max(float(np.median(finite)), 1e-30)) if finite.size else 0.0


def _grid(values: NDArray[np.float32]) -> dict[str, Any]:
    finite = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
    coarse = finite
    for axis in (0, 1):
        cell = cell_size(coarse.shape[axis], SURFACE_SIDE)
        # The largest of each cell, because a mean would hide the outliers that the picture is for.
        coarse = np.maximum.reduceat(coarse, np.arange(0, coarse.shape[axis], cell), axis=axis)
    return {
        "rows": coarse.shape[0],
        "values": [float(f"{value:.3g}") for value in coarse.ravel()],  # three digits: the page stays small
        "holes": int(values.size - np.isfinite(values).sum()),
    }

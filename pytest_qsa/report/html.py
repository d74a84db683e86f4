"""The templates of the HTML pages, and the filters that write numbers, shares, hashes and tokens in them."""

from __future__ import annotations

import base64
import functools
import json
import math
import re
import struct
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from ..common import shown_path
from .report import strict_json

_SHORT_NAMES = {"\n": "↵", "\t": "→", "\r": r"\r"}


@dataclass(frozen=True)
class PagePicture:
    """A picture of a page: its PNG, or the problem why there is none. `name`: of its file."""

    title: str
    name: str
    png: bytes = b""
    problem: str = ""

    @property
    def data(self) -> str:
        """The PNG as base64."""
        return base64.b64encode(self.png).decode("ascii")

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
        "embedded": embedded,
    }  # fmt: skip
    return environment


def embedded(content: Mapping[str, Any]) -> Markup:
    """Write plain data as JSON for a script element; no text in it can end the element or begin another."""
    # JSON.parse refuses NaN, which strict_json writes as a string; it also indents, which would cost bytes here.
    text = json.dumps(json.loads(strict_json(content)), ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"))


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

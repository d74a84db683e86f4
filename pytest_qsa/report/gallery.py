"""The page of an analysis: pictures by section, in one self-contained file."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .html import render


@dataclass(frozen=True)
class Shown:
    """A picture of the page: its PNG, or the problem that stopped it."""

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
        """Width and height in pixels."""
        width, height = struct.unpack(">II", self.png[16:24]) if len(self.png) > 24 else (0, 0)
        return width, height


@dataclass(frozen=True)
class Turning:
    """A surface that turns, under one of the headings. `data`: what `surface_data` makes."""

    heading: str
    name: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Gallery:
    """All that the page shows. `facts`: label → what was run; `sections`: heading → pictures."""

    title: str
    facts: Mapping[str, str]
    sections: Mapping[str, Sequence[Shown]]
    warnings: Sequence[str] = ()
    layers: Sequence[str] = ()
    files: Sequence[str] = field(default_factory=list)
    command: str = ""
    surfaces: Sequence[Turning] = ()


def render_gallery(gallery: Gallery) -> str:
    """Return the page; nothing in it is fetched from anywhere, and all text is escaped."""
    return render("gallery.html.j2", gallery=gallery, session={})

"""The rooms of the package, their order from the contracts in pyproject.toml, and their picture as an SVG."""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pytest_qsa"

WIDTH, GAP = 380, 6  # narrow enough to be read on a phone, where the picture is shown one to one
NAME, LINE, PAD = 19, 15, 8  # the height of a name, of a line of text, and of the space around them
CHARACTER = 6.6  # the width of a character of text, which is what lines are wrapped by
STYLE = """
  rect { fill: #f2f5f9; stroke: #94a3b8 }
  .engine { fill: #e3edff; stroke: #3b6fd4 }
  .part { fill: #ffffff; stroke: #3b6fd4 }
  text { fill: #1b2430; font: 12px system-ui, sans-serif }
  .name { font: bold 13px ui-monospace, monospace }
  .small { font: 12px ui-monospace, monospace; text-anchor: middle }
  @media (prefers-color-scheme: dark) {
    rect { fill: #1e2733; stroke: #5b6b80 }
    .engine { fill: #16243f; stroke: #6f9df0 }
    .part { fill: #0f1826; stroke: #6f9df0 }
    text { fill: #e6ebf2 }
  }
"""


@dataclass(frozen=True)
class Room:
    """A room, and the first sentence of its docstring."""

    name: str
    what: str


def layers(contract: str, container: str = PACKAGE) -> list[list[Room]]:
    """Return the rooms of a contract of import-linter, top to bottom; those of one layer stand side by side."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {found["id"]: found for found in settings["tool"]["importlinter"]["contracts"]}
    rows = [re.split(r" [:|] ", layer) for layer in contracts[contract]["layers"]]
    return [[_room(name.removeprefix(f"{PACKAGE}."), container) for name in row] for row in rows]


def _room(name: str, container: str) -> Room:
    folder = ROOT / container.replace(".", "/") / name
    module = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.partition("\n\n")[0].split())
    return Room(name, re.split(r"(?<=\.) (?=[A-Z])", sentence)[0].removesuffix("."))


def rooms_table(contract: str, container: str = PACKAGE) -> str:
    """List the rooms of a contract as a table of Markdown, top to bottom."""
    rooms = [room for row in layers(contract, container) for room in row]
    rows = [f"| `{room.name}` | {room.what} |" for room in rooms]
    return "\n".join(["| room | what is in it |", "|---|---|", *rows])


def rooms_picture() -> str:
    """Draw the rooms as boxes, top to bottom, and in the engine's box those of the engine."""
    drawn: list[str] = []
    y = GAP
    for row in layers("rooms"):
        width = (WIDTH - GAP * (len(row) + 1)) / len(row)
        wrapped = [textwrap.wrap(room.what.replace("`", ""), int((width - 2 * PAD) / CHARACTER)) for room in row]
        parts = layers("engine", f"{PACKAGE}.engine") if row[0].name == "engine" else []
        text_height = PAD + NAME + LINE * max(map(len, wrapped))
        height = text_height + len(parts) * (NAME + PAD + GAP) + PAD
        for place, (room, lines) in enumerate(zip(row, wrapped, strict=True)):
            x = GAP + place * (width + GAP)
            drawn += _box(x, y, width, height, "engine" if parts else "room")
            drawn.append(_text(x + PAD, y + PAD + 12, room.name, "name"))
            drawn += [_text(x + PAD, y + PAD + 12 + LINE * n, line, "") for n, line in enumerate(lines, 1)]
        drawn += _parts(parts, y + text_height)
        y += height + GAP
    size = f'viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
    title = f"<title>The rooms of {PACKAGE}: each imports only what is drawn below it</title>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{title}\n<style>{STYLE}</style>'
    return "\n".join([head, *drawn, "</svg>", ""])


def _parts(rows: list[list[Room]], y: float) -> Iterator[str]:
    """Draw the rooms of the engine inside its box."""
    for row in rows:
        width = (WIDTH - 2 * GAP - 2 * PAD - GAP * (len(row) - 1)) / len(row)
        for place, room in enumerate(row):
            x = GAP + PAD + place * (width + GAP)
            yield from _box(x, y, width, NAME + PAD, "part")
            yield _text(x + width / 2, y + NAME - 1, room.name, "small")
        y += NAME + PAD + GAP


def _box(x: float, y: float, width: float, height: float, kind: str) -> Iterator[str]:
    yield f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:.5g}" height="{height:g}" rx="5"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.5g}" y="{y:g}">{escape(text)}</text>'

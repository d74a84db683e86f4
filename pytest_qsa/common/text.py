"""Text for people: numbers, tables, escapes, Markdown that no name can break; and the log of a run."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TextIO

BOLD, FAINT, RED, GREEN = "1", "2", "31", "32"
"""Attributes of a terminal's text (ECMA-48, SGR)."""
_SIGNS = {"◆": RED, "★": GREEN, "SLIPPED THROUGH": RED}
"""What a cell says → its colour: out of bounds, best of its row, a fault that no assertion caught."""


class TableLine(str):
    """A line of a table, as plain text. `painted`: the same line with colours, for a terminal."""

    painted: str


def text_table(
    table: Iterable[Sequence[str]],
    *,
    right: Container[int] = (),
    indent: str = "",
    heads: bool = True,
    faint: Container[int] = (),
) -> Iterator[TableLine]:
    """Yield the rows of a table with aligned columns; its cells are made `visible`.

    `right`: the indices of the columns that are flush right. `heads`: the first row is one. `faint`: the columns that
    matter less.
    """
    rows = [[visible(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for index, row in enumerate(rows):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = TableLine(f"{indent}{'  '.join(cells)}".rstrip())
        styles = [BOLD if heads and not index else _style(cell, column in faint) for column, cell in enumerate(row)]
        line.painted = indent + "  ".join(map(painted, cells, styles))
        yield line


def _style(cell: str, faint: bool) -> str:
    return next((style for sign, style in _SIGNS.items() if sign in cell), FAINT if faint or cell == "–" else "")


_STARTS = {"FAILED": RED, "holds": GREEN, "note:": FAINT}


def for_terminal(line: str) -> str:
    """Return a line in colours: a table's, or one that begins with a word of ours; any other is made `visible`."""
    if isinstance(line, TableLine):
        return line.painted
    return painted(visible(line), next((style for word, style in _STARTS.items() if line.startswith(word)), ""))


def painted(text: str, style: str) -> str:
    """Return text with an attribute of a terminal around it; with none, the text."""
    return f"\x1b[{style}m{text}\x1b[0m" if style else text


def shows_colours(stream: TextIO) -> bool:
    """Say whether a stream is a terminal that shows colours, and nobody asked for none.

    `NO_COLOR` (no-color.org), `CI` and `TERM=dumb` ask for none; `FORCE_COLOR` asks for them anywhere.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM", "dumb") != "dumb"


def markdown_table(table: Iterable[Sequence[str]], *, plain: Container[int] = ()) -> Iterator[str]:
    """Yield the lines of a Markdown table; the first row is its head.

    `plain`: the indices of the columns that hold our own words and numbers; any other cell is a code span.
    """
    heads, *rows = table
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        cells = (escaped(cell) if column in plain else _in_cell(code_span(cell)) for column, cell in enumerate(row))
        yield f"| {' | '.join(cells)} |"


def html_table(table: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table of HTML, as notebooks show it; the first row is its head. Its cells are made `visible`."""
    heads, *rows = ([html.escape(visible(cell)) for cell in row] for row in table)
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<table><caption>{html.escape(visible(caption))}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _in_cell(span: str) -> str:
    # A pipe ends a cell in a code span as well, unless a backslash is before it that isn't escaped itself.
    return re.sub(r"(\\*)\|", r"\1\1\\|", span)


def code_span(text: str) -> str:
    """Write foreign text as a code span of Markdown, in which nothing is acted on; empty text stays empty.

    Its fence is longer than any run of backticks in the text (CommonMark 0.31, section 6.1).
    """
    text = visible(text)
    if not text.strip():
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[0] in " `" or text[-1] in " `" else ""  # CommonMark strips one space from either side
    return f"{fence}{space}{text}{space}{fence}"


def escaped(text: str) -> str:
    """Escape what Markdown or HTML would act on; a line stays a line."""
    text = "".join(f"\\{c}" if c in r"\`*_{}[]()#|~" else c for c in visible(text))
    # The zero-width space after an @ keeps a name from notifying the person on GitHub.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "@\u200b")


def fitted(text: str, most: int) -> str:
    """Cut a text at the end of a line to at most `most` bytes, and say that it was cut."""
    if len(text.encode()) <= most:
        return text
    # 60 bytes leave room for the last sentence; the cut may fall into a character, whose bytes are then
    # dropped.
    cut = text.encode()[: most - 60].decode("utf-8", "ignore").rpartition("\n")[0]
    return f"{cut}\n\n… cut; the report has all of it.\n"


LOG_COMMAND = r"##(?=\w*\[)|^ *:(?=:)"
"""What CI services take for the beginning of a command in a log."""


def visible(text: str) -> str:
    r"""Make any text one line that is safe in a terminal and in the log of a CI service; spaces stay.

    What would move the cursor, turn the text around or not show at all becomes an escape, `\x1b`: controls of C0 and
    C1, bidirectional controls, line ends. A space breaks what a service takes for a command: anywhere `##[`, `##vso[`
    (GitHub, Azure Pipelines) and `##teamcity[`, and `::` at the start (GitHub).
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return re.sub(LOG_COMMAND, lambda found: f"{found[0]} ", text) if "##" in text or "::" in text else text


def short_hash(digest: str) -> str:
    """Shorten `sha256:…` to its first digits, which tell two hashes apart."""
    name, _, value = digest.partition(":")
    return f"{name} {value[:12]}"


def size_text(value: float) -> str:
    """Write a number of an activation: 25,088 where `number` would write 2.509e+04."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else number(value)


def number(value: float, *, signed: bool = False) -> str:
    """Write a number as a person would: 3, 0.0123, 1.54e+04."""
    text = f"{value:+.4g}" if signed else f"{value:.4g}"
    return text.replace("-", "−") if signed else text


def counted(count: int, noun: str) -> str:
    """Write `1 sample`, `8 samples`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


logger = logging.getLogger("pytest_qsa")
"""Says at DEBUG what is hashed, whether a cached capture is used, why a pass starts again, and where the time goes.
`--log-cli-level=DEBUG` of pytest and `qsa -v` show it."""


def _visible_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible(record.getMessage()), ()
    return True


logger.addFilter(_visible_record)

"""Text for people: numbers, tables, escapes, Markdown that no name can break; and the log and the progress of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager


def text_table(table: Iterable[Sequence[str]], *, right: Container[int] = (), indent: str = "") -> Iterator[str]:
    """Yield the rows of a table with aligned columns. `right`: the indices of the columns that are flush right."""
    rows = list(table)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield f"{indent}{'  '.join(cells)}".rstrip()


def markdown_table(table: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table; the first row is its head, and the cells are escaped."""
    heads, *rows = table
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(map(escaped, row))} |" for row in rows)


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


def visible(text: str) -> str:
    """Escape what would move the cursor, turn the text around or not show at all; spaces stay."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def short_hash(digest: str) -> str:
    """Shorten `sha256:…` to its first digits, which tell two hashes apart."""
    name, _, value = digest.partition(":")
    return f"{name} {value[:12]}"


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

Progress = Callable[[int, int], None]
"""A callback that gets the samples done and the samples in all."""


@contextmanager
def progress_bar(name: str, *, disable: bool | None = None) -> Iterator[Progress]:
    """Show a bar of samples; yield the callback that moves it: `progress(done, total)`.

    `disable`: None shows the bar on a terminal only.
    """
    from tqdm import tqdm  # only a run that shows a bar pays for the import

    with tqdm(desc=f"qsa {name}", unit="sample", leave=False, disable=disable) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total  # known only once the data is loaded
            bar.update(done - bar.n)

        yield progress

"""Text for people: numbers, hashes, escapes, and Markdown that nothing in a name can break."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def table_lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table; the cells are escaped."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(map(escaped, row))} |" for row in rows)


def escaped(text: str) -> str:
    """Escape what Markdown or HTML would act on; a line stays a line."""
    text = "".join(f"\\{c}" if c in r"\`*_{}[]()#|~" else c for c in visible(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "@\u200b")


def fitted(text: str, most: int) -> str:
    """Cut a text at a line so that it has at most so many bytes, and say so."""
    if len(text.encode()) <= most:
        return text
    cut = text.encode()[: most - 60].decode("utf-8", "ignore").rpartition("\n")[0]
    return f"{cut}\n\n… cut; the report has all of it.\n"


def visible(text: str) -> str:
    """Escape what would move the cursor, turn the text around or not show at all; spaces stay."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def short_hash(digest: str) -> str:
    """Shorten `sha256:…` to what tells two of them apart."""
    name, _, value = digest.partition(":")
    return f"{name} {value[:12]}"


def number(value: float, *, signed: bool = False) -> str:
    """Write a number as a person would: 3, 0.0123, 1.54e+04."""
    text = f"{value:+.4g}" if signed else f"{value:.4g}"
    return text.replace("-", "−") if signed else text

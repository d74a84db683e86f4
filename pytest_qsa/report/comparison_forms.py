"""A comparison written out: for the terminal, in Markdown, as CSV, and as a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from ..common import code_span, counted, escaped, fitted, markdown_table, text_table
from .comparison import BEST, OUT, Comparison, Line
from .html import render

LEGEND = f"{BEST} best of its row, {OUT} out of bounds; of a metric of layers the worst one"
MOST_LAYERS = 1000
"""The most layers of a metric that the page lists; CSV has all."""
MOST_QUERY = 160
"""How much of a metric's query the terminal shows: a pattern may name every layer."""
MOST_MARKDOWN = 65_000
"""GitHub refuses a comment of more than 65,536 characters."""


def _texts(line: Line) -> list[str]:
    return [cell.text if cell else "–" for cell in line.cells]


def comparison_lines(comparison: Comparison, most: int) -> Iterator[str]:
    """Yield what the terminal shows. `most`: how many layers of a metric are listed."""
    right = range(1, len(comparison.columns) + 1)
    yield from (column.title for column in comparison.columns)
    yield ""
    yield from text_table(
        [["", *comparison.names], *([line.label, *_texts(line)] for line in comparison.lines)], right=right
    )
    for each in comparison.layers:
        yield ""
        text = each.line.text
        text = f"{text[:MOST_QUERY]}…" if len(text) > MOST_QUERY else text
        yield f"{each.line.label}, {counted(len(each.rows), 'layer')}: {text}"
        rows = ([line.name, *_texts(line)] for line in each.rows[:most])
        yield from text_table([["layer", *comparison.names], *rows], right=right, indent="  ")
        if len(each.rows) > most:
            yield f"  … and {len(each.rows) - most} more; --top {len(each.rows)}, or --format html or csv, has them all"
    yield ""
    yield LEGEND
    yield from (f"note: {note}" for note in comparison.notes)


def comparison_markdown(comparison: Comparison, most: int) -> str:
    """Return Markdown that a comment on GitHub has room for. `most`: how many layers of a metric are listed."""
    plain, heads = range(1, len(comparison.columns) + 1), [escaped(name) for name in comparison.names]
    rows = ([line.label, *_texts(line)] for line in comparison.lines)
    lines = [*markdown_table([["", *heads], *rows], plain=plain), "", LEGEND, ""]
    lines += [f"- {code_span(text)}" for text in (*(column.title for column in comparison.columns), *comparison.notes)]
    for each in comparison.layers:
        many = counted(len(each.rows), "layer") + (f", the worst {most}" if len(each.rows) > most else "")
        lines += ["", f"<details><summary>{escaped(each.line.label)}: {many}</summary>", ""]
        rows = ([line.name, *_texts(line)] for line in each.rows[:most])
        lines += [*markdown_table([["layer", *heads], *rows], plain=plain), "", "</details>"]
    return fitted("\n".join(lines) + "\n", MOST_MARKDOWN)


def comparison_csv(comparison: Comparison) -> str:
    """Return CSV: metric, unit, layer (empty for the model), a column a checkpoint, and the names of best and out."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["metric", "unit", "layer", *comparison.names, "best", "out"])
    for line in comparison.lines:
        writer.writerow([line.name, line.unit, "", *_values(line, comparison.names)])
    for each in comparison.layers:
        for row in each.rows:
            writer.writerow([each.line.name, each.line.unit, row.name, *_values(row, comparison.names)])
    return file.getvalue()


def _values(line: Line, names: Sequence[str]) -> Iterator[str]:
    yield from ("" if cell is None else cell.stopped or repr(cell.value) for cell in line.cells)
    for chosen in ("best", "out"):
        yield ";".join(name for name, cell in zip(names, line.cells, strict=True) if cell and getattr(cell, chosen))


def comparison_page(comparison: Comparison, command: str = "") -> str:
    """Return the comparison as one self-contained page. `command`: that made it."""
    return render("compare.html.j2", comparison=comparison, command=command, most=MOST_LAYERS, session={})

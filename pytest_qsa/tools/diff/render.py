"""A comparison as text: for the terminal, for a pull request's comment, and as a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from ...common import code_span, counted, fitted, markdown_table, text_table
from ...report import context_text, render
from .changes import Change, Diff, OutlierToken, relative_text

SUMMARY = ["measure", "layers", "moved", "median", "worst", "at"]
CHANGE = ["layer", "measure", "old", "new", "change"]
LEAST_MOVED = 0.01
"""The relative change from which on a layer counts as moved."""
STRONGEST = 0.2
"""The relative change that the page shows as the strongest heat."""

Failures = Sequence[tuple[str, Sequence[str]]]
"""The conditions in words, each with the lines of what breaks it: none if it holds."""


def moved(diff: Diff, least: float = LEAST_MOVED) -> list[Change]:
    """Return the changes larger than `least`, worst first."""
    return [change for change in diff.changes if change.size > least]


def summary_table(diff: Diff, least: float = LEAST_MOVED) -> list[list[str]]:
    """Return a row for each measure: how many layers it has, how many moved, the median and the largest change."""
    rows = []
    for measure in diff.measures:
        changes = [change for change in diff.changes if change.measure == measure]
        # The changes of a diff are sorted, the worst first.
        count, worst = sum(change.size > least for change in changes), changes[0]
        at = worst.layer if worst.size else "–"
        rows.append([str(measure), str(len(changes)), str(count), _median(changes), worst.text, at])
    return rows


def _median(changes: Sequence[Change]) -> str:
    middle = median(change.relative for change in changes)
    if math.isfinite(middle) or any(math.isnan(change.relative) for change in changes):
        return relative_text(middle)
    # How an infinite change is put into words depends on its two values, so the change itself is needed.
    return sorted(changes, key=lambda change: change.relative)[len(changes) // 2].text


def notes_of(diff: Diff) -> Iterator[str]:
    """Yield what a reader must know besides the numbers: layers and measures of one side only, unknown tokens."""
    for word, sides in (("appeared", diff.appeared), ("vanished", diff.vanished)):
        for measure, layers in sides.items():
            yield f"{len(layers)} layers {word} under {measure}: {_first_names(layers)}"
    if diff.skipped:
        skipped = sorted({str(measure) for measure in diff.skipped})
        yield f"on one side only, so not compared: {_first_names(skipped)}"
    # A reader would take the missing lists for empty ones.
    if not diff.outlier_tokens:
        yield "new and lost outlier tokens are known only between two captures of the same tokens"


def _first_names(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _moved_text(changes: Sequence[Change], least: float) -> str:
    return f"{len(changes)} numbers moved by more than {_share_text(least)}"


def _share_text(share: float) -> str:
    return relative_text(share).lstrip("+")


def diff_lines(diff: Diff, most: int, least: float = LEAST_MOVED) -> Iterator[str]:
    """Yield what the terminal shows. `most`: how many changes and tokens are listed."""
    yield f"old  {diff.old.title}"
    yield f"new  {diff.new.title}"
    yield ""
    yield from text_table([SUMMARY, *summary_table(diff, least)], right=range(1, 5), indent="  ")
    changes = moved(diff, least)
    yield ""
    yield _moved_text(changes, least) + (", worst first" if changes else "")
    if changes:
        yield from text_table([CHANGE, *(change.cells for change in changes[:most])], right=range(2, 5), indent="  ")
    if len(changes) > most:
        yield f"  … and {len(changes) - most} more; --top {len(changes)} or --html shows them all"
    for name, tokens in diff.outlier_tokens.items():
        yield ""
        yield f"{counted(len(tokens), f'{name} outlier token')} (above {diff.threshold:g} × the median)"
        yield from (f"  {token_text(token)}" for token in tokens[:most])
    notes = list(notes_of(diff))
    if notes:
        yield ""
        yield from (f"note: {note}" for note in notes)


def token_text(token: OutlierToken) -> str:
    """Write a token in its context."""
    channel = f", channel {token.channel}" if token.channel >= 0 else ""
    layers = f"{token.layers[0]} and {len(token.layers) - 1} more" if len(token.layers) > 1 else token.layers[0]
    where = f"sample {token.sample}, position {token.position}{channel}, {layers}"
    return f"{token.ratio:.0f} × median at {where}: {context_text(token.before, token.text, token.after)}"


def diff_markdown(diff: Diff, failures: Iterable[tuple[str, Sequence[str]]], most: int, least: float) -> str:
    """Return a comment for a pull request, below the 65,536 characters that GitHub takes."""
    broken = [(text, lines) for text, lines in failures if lines]
    changes = moved(diff, least)
    lines = [f"### {'❌' if broken else '✅'} {_moved_text(changes, least)}", ""]
    lines += [f"- {code_span(text)} is broken by {len(why)}: {code_span(why[0])}" for text, why in broken]
    lines += ["", f"old: {code_span(diff.old.title)}  ", f"new: {code_span(diff.new.title)}", ""]
    lines += [*markdown_table([SUMMARY, *summary_table(diff, least)], plain=range(1, 5)), ""]
    if changes:
        lines += [*markdown_table([CHANGE, *(change.cells for change in changes[:most])], plain={2, 3, 4}), ""]
    if len(changes) > most:
        lines += [f"… and {len(changes) - most} more.", ""]
    for name, tokens in diff.outlier_tokens.items():
        if tokens:
            lines += [f"**{len(tokens)} {name} outlier tokens**", ""]
            lines += [*(f"- {code_span(token_text(token))}" for token in tokens[:most]), ""]
    lines += [f"> {code_span(note)}" for note in notes_of(diff)]
    # `fitted` counts bytes and GitHub characters, of which there are never more.
    return fitted("\n".join(lines).rstrip() + "\n", 65_000)


def diff_page(diff: Diff, failures: Failures, least: float, red: Iterable[Change] = ()) -> str:
    """Return the comparison as one self-contained page. `red`: the changes that break a condition."""
    broken = {(change.measure, change.layer) for change in red}
    return render(
        "diff.html.j2",
        diff=diff,
        failures=failures,
        broken=[text for text, lines in failures if lines],
        moved=len(moved(diff, least)),
        states=["out" if (c.measure, c.layer) in broken else "moved" if c.size > least else "" for c in diff.changes],
        least_text=_share_text(least),
        strips=list(_strips(diff, least)),
        notes=list(notes_of(diff)),
        session={},
    )


def _strips(diff: Diff, least: float) -> Iterator[dict[str, Any]]:
    """Yield a heat strip for each measure, its layers in the model's order."""
    for measure in diff.measures:
        changes = sorted((c for c in diff.changes if c.measure == measure), key=lambda change: change.depth)
        yield {
            "measure": measure,
            "moved": sum(change.size > least for change in changes),
            "cells": [
                {
                    "heat": round(min(change.size / STRONGEST, 1.0), 3),
                    "title": f"{change.layer}: {' → '.join(change.cells[2:4])} ({change.text})",
                }
                for change in changes
            ],
        }

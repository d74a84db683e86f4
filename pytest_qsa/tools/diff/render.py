"""A comparison in words: for the terminal, for a pull request's comment, and as a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from ...common import escaped, fitted, markdown_table, text_table, visible
from .changes import Change, Comparison, OutlierToken
from .conditions import percent, told
from .measures import Measure

SUMMARY = ["measure", "layers", "moved", "median", "worst", "at"]
CHANGE = ["layer", "measure", "old", "new", "change"]
MOVED = 0.01
"""The relative change from which on a layer counts as moved."""


def moved(comparison: Comparison, least: float = MOVED) -> list[Change]:
    """Return the changes that are large enough to tell, worst first."""
    return [change for change in comparison.changes if change.size > least]


def summaries(comparison: Comparison, least: float = MOVED) -> Iterator[dict[str, Any]]:
    """Yield a line for each measure: how many layers it has, how many moved, the median and the largest change."""
    for measure in comparison.measures:
        changes = [change for change in comparison.changes if change.measure == measure]
        yield {
            "measure": str(measure),
            "layers": len(changes),
            "moved": sum(change.size > least for change in changes),
            "median": _median(changes),
            "worst": told(changes[0]),
            "where": changes[0].layer if changes[0].size else "–",
        }


def _median(changes: Sequence[Change]) -> str:
    middle = median(change.relative for change in changes)
    if math.isfinite(middle) or any(math.isnan(change.relative) for change in changes):
        return percent(middle)
    return told(sorted(changes, key=lambda change: change.relative)[len(changes) // 2])


def remarks(comparison: Comparison) -> Iterator[str]:
    """Yield what a reader must know beside the numbers: layers and measures of one side only, unknown tokens."""
    for word, sides in (("appeared", comparison.appeared), ("vanished", comparison.vanished)):
        for measure, layers in sides.items():
            yield f"{len(layers)} layers {word} under {measure}: {_some(layers)}"
    if comparison.skipped:
        yield f"on one side only, so not compared: {_some(sorted({str(measure) for measure in comparison.skipped}))}"
    if comparison.new_tokens is None:
        yield "new and lost outlier tokens are known only between two captures of the same tokens"


def _some(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def diff_text(comparison: Comparison, most: int, least: float = MOVED) -> str:
    """Return what the terminal shows."""
    return "\n".join(_lines(comparison, most, least))


def _lines(comparison: Comparison, most: int, least: float) -> Iterator[str]:
    yield f"old  {comparison.old.title}"
    yield f"new  {comparison.new.title}"
    yield ""
    yield from text_table([SUMMARY, *_summary_cells(comparison, least)], right=range(1, 5), indent="  ")
    changes = moved(comparison, least)
    yield ""
    yield f"{len(changes)} numbers moved by more than {percent(least).lstrip('+')}" + (
        ", worst first" if changes else ""
    )
    if changes:
        yield from text_table([CHANGE, *map(cells, changes[:most])], right=range(2, 5), indent="  ")
    if len(changes) > most:
        yield f"  … and {len(changes) - most} more; --top {len(changes)} or --html shows them all"
    for name, tokens in (("new", comparison.new_tokens), ("lost", comparison.lost_tokens)):
        if tokens is not None:
            yield ""
            noun = "token" if len(tokens) == 1 else "tokens"
            yield f"{len(tokens)} {name} outlier {noun} (above {comparison.threshold:g} × the median)"
            yield from (f"  {token_text(token)}" for token in tokens[:most])
    notes = list(remarks(comparison))
    if notes:
        yield ""
        yield from (f"note: {note}" for note in notes)


def _summary_cells(comparison: Comparison, least: float) -> list[list[str]]:
    return [[*map(str, line.values())] for line in summaries(comparison, least)]


def cells(change: Change) -> list[str]:
    """Return a change as the cells of a table."""
    measure = change.measure
    return [change.layer, str(measure), measure.text_of(change.old), measure.text_of(change.new), told(change)]


def token_text(token: OutlierToken) -> str:
    """Write a token in its context."""
    said = f"{visible(token.before)}⟦{visible(token.text)}⟧{visible(token.after)}" if token.text else "(no text kept)"
    channel = f", channel {token.channel}" if token.channel >= 0 else ""
    where = f"{token.layers[0]} and {len(token.layers) - 1} more" if len(token.layers) > 1 else token.layers[0]
    place = f"sample {token.sample}, position {token.position}"
    return f"{token.ratio:.0f} × median at {place}{channel}, {where}: {said}"


def markdown_of(comparison: Comparison, failures: Iterable[tuple[str, Sequence[str]]], most: int, least: float) -> str:
    """Return a comment for a pull request, below the 65,536 characters that GitHub takes."""
    broken = [(text, lines) for text, lines in failures if lines]
    changes = moved(comparison, least)
    verdict = "❌" if broken else "✅"
    lines = [f"### {verdict} {len(changes)} numbers moved by more than {percent(least).lstrip('+')}", ""]
    lines += [f"- **{escaped(text)}** is broken by {len(why)}: {escaped(why[0])}" for text, why in broken]
    lines += ["", f"old: {escaped(comparison.old.title)}  ", f"new: {escaped(comparison.new.title)}", ""]
    lines += [*markdown_table([SUMMARY, *_summary_cells(comparison, least)]), ""]
    if changes:
        lines += [*markdown_table([CHANGE, *map(cells, changes[:most])]), ""]
    if len(changes) > most:
        lines += [f"… and {len(changes) - most} more.", ""]
    for name, tokens in (("new", comparison.new_tokens), ("lost", comparison.lost_tokens)):
        if tokens:
            lines += [f"**{len(tokens)} {name} outlier tokens**", ""]
            lines += [*(f"- {escaped(token_text(token))}" for token in tokens[:most]), ""]
    lines += [f"> {escaped(note)}" for note in remarks(comparison)]
    return fitted("\n".join(lines).rstrip() + "\n", 65_000)


def page_of(comparison: Comparison, failures: Sequence[tuple[str, Sequence[str]]], least: float) -> str:
    """Return the comparison as one self-contained page."""
    from ...report import render

    rows = [
        {"layer": change.layer, "measure": str(change.measure), "old": change.old, "new": change.new,
         "change": told(change), "size": change.size, "moved": change.size > least,
         "heat": _heat(change), "depth": change.depth}
        for change in comparison.changes
    ]  # fmt: skip
    return render(
        "diff.html.j2", old=comparison.old, new=comparison.new, rows=rows, failures=failures, session={},
        broken=[text for text, lines in failures if lines], moved=len(moved(comparison, least)),
        least=percent(least).lstrip("+"), summaries=list(summaries(comparison, least)), notes=list(remarks(comparison)),
        strips=_strips(comparison), tokens=[("New", comparison.new_tokens), ("Lost", comparison.lost_tokens)],
        threshold=comparison.threshold,
    )  # fmt: skip


def _strips(comparison: Comparison) -> list[tuple[Measure, list[dict[str, Any]]]]:
    """Return a heat strip for each measure, its layers in the model's order; 20 % is the strongest."""
    strips = []
    for measure in comparison.measures:
        changes = sorted((c for c in comparison.changes if c.measure == measure), key=lambda change: change.depth)
        strips.append((measure, [
            {"heat": _heat(change), "title": f"{change.layer}: {change.measure.text_of(change.old)} → "
             f"{change.measure.text_of(change.new)} ({told(change)})"} for change in changes
        ]))  # fmt: skip
    return strips


def _heat(change: Change) -> float:
    return round(min(change.size / 0.2, 1.0), 3)

"""The outcome of a self-test as a table: in the terminal, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..report.plain import strict_json
from ..report.text import render
from .testing import Outcome, done_of, score_of

SCHEMA = "qsa-selftest/1"
MOST = 4
"""So many tests are named for a fault; the JSON has them all."""


def lines_of(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the table, a fault a line, and the score."""
    cells = [["fault", "layer", "strength", "caught by", "layer named", "smallest caught"], *map(_cells, outcomes)]
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(cells[0]))]
    for cell in cells:
        yield "  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip()
    yield score_line(outcomes)


def score_line(outcomes: Sequence[Outcome]) -> str:
    """Return the mutation score in a sentence."""
    done = done_of(outcomes)
    caught = [outcome for outcome in done if outcome.caught]
    skipped = len(outcomes) - len(done)
    text = f"mutation score {score_of(outcomes):.0%}: {len(caught)} of {len(done)} faults are caught"
    text += f", {sum(outcome.named for outcome in caught)} of them with their layer named"
    return text + (f"; {skipped} can't be done to this checkpoint" if skipped else "")


def _cells(outcome: Outcome) -> list[str]:
    if outcome.skipped:
        return [outcome.fault, outcome.layer or "–", "–", outcome.skipped, "", ""]
    caught = by_text(outcome) or "SLIPPED THROUGH"
    named = ("yes" if outcome.named else "no") if outcome.caught else ""
    return [outcome.fault, outcome.layer, strength_text(outcome), caught, named, smallest_text(outcome)]


def by_text(outcome: Outcome) -> str:
    """Name the tests that caught a fault; those that could only say that nothing loads are one."""
    tests = [catch.test for catch in outcome.caught if catch.kind != "INFRA"]
    loads = ["(does not load)"] if any(catch.kind == "INFRA" for catch in outcome.caught) else []
    shown = (tests + loads)[:MOST]
    more = len(tests + loads) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def strength_text(outcome: Outcome) -> str:
    """Write a strength with what it counts: `2 × scale`, `0.5 of the rows`."""
    return _counted(outcome.strength, outcome.unit) if outcome.unit else "–"


def _counted(strength: float, unit: str) -> str:
    if unit.startswith("of "):
        return f"{strength:.3g} {unit}" if strength < 1 else f"all {unit}"
    return f"{strength:.4g} {unit.removesuffix('s') if strength == 1 else unit}"


def smallest_text(outcome: Outcome) -> str:
    """Write the smallest strength that is known to be caught, or that even the strongest slips through."""
    if not outcome.unit:
        return ""
    if outcome.smallest is not None:
        return _counted(outcome.smallest, outcome.unit)
    return f"none up to {_counted(outcome.strongest, outcome.unit)}" if outcome.strongest is not None else ""


def write_outcomes(outcomes: Sequence[Outcome], folder: Path, session: dict[str, Any]) -> Path:
    """Write selftest.json and selftest.html into a folder; return the path of the page.

    Raises:
        OSError: the folder can't be written.
    """
    score = score_of(outcomes)
    rows = [asdict(outcome) | {"named": outcome.named} for outcome in outcomes]
    write_atomically(
        folder / "selftest.json", strict_json({"schema": SCHEMA, "session": session, "score": score, "faults": rows})
    )
    shown = [
        {
            "outcome": outcome, "by": by_text(outcome), "strength": strength_text(outcome),
            "smallest": smallest_text(outcome),
        }
        for outcome in outcomes
    ]  # fmt: skip
    done = done_of(outcomes)
    title = f"{sum(bool(outcome.caught) for outcome in done)} of {len(done)} faults are caught"
    page = folder / "selftest.html"
    write_atomically(
        page, render("selftest.html.j2", session=session, rows=shown, line=score_line(outcomes), title=title)
    )
    return page

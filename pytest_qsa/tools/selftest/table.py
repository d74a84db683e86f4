"""The outcomes of a self-test as a table: for the terminal, as JSON, as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...common import markdown_table, text_table, write_atomically
from ...report import render, strict_json
from .run import MAX_RATIO, Outcome, done_of, score_of

SCHEMA = "qsa-selftest/1"
MOST_TESTS = 4
"""A table names at most this many of the tests that caught a fault; the JSON has all of them."""


def lines_of(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the lines of the table, one for each fault, and the scores."""
    yield from text_table(_rows(outcomes))
    yield from _score_lines(outcomes)


def markdown_of(outcomes: Sequence[Outcome]) -> str:
    """Return the table and the scores in Markdown."""
    # layers and ids of tests are the checkpoint's and the suite's words
    table = markdown_table(_rows(outcomes), plain=(0, 2, 4, 5, 6))
    return "\n".join([*table, "", *(f"{line}." for line in _score_lines(outcomes))]) + "\n"


def _rows(outcomes: Sequence[Outcome]) -> Iterator[list[str]]:
    # Without such a gate its column would be empty.
    compared = any(outcome.perplexity for outcome in outcomes)
    heads = ["fault", "layer", "strength", "caught by", "layer named", "smallest caught"]
    yield heads + [f"perplexity (≤ {MAX_RATIO:g})"] * compared
    for outcome in outcomes:
        gate = outcome.perplexity
        yield _cells(outcome) + [str(gate) if gate else ""] * compared


def _score_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the mutation score, and the share of the same faults that a gate on perplexity catches, where one ran."""
    yield score_line(outcomes)
    # Of the same faults as the score, so that the two shares can be compared.
    gates = [outcome.perplexity for outcome in done_of(outcomes) if outcome.perplexity]
    if gates:
        caught = sum(gate.caught for gate in gates)
        yield (
            f"a gate on perplexity alone (at most {MAX_RATIO:g} × the unchanged checkpoint's) catches "
            f"{caught} of {len(gates)}, {caught / len(gates):.0%}"
        )


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
    caught = _tests(outcome) or "SLIPPED THROUGH"
    named = ("yes" if outcome.named else "no") if outcome.caught else ""
    return [outcome.fault, outcome.layer, _strength(outcome), caught, named, _smallest(outcome)]


def _tests(outcome: Outcome) -> str:
    """Return the names of the tests that caught a fault. All that failed because nothing loads count as one."""
    # Where nothing loads every test fails, so that their names say nothing of the fault.
    tests = [catch.test for catch in outcome.caught if catch.loaded]
    loads = ["(does not load)"] if any(not catch.loaded for catch in outcome.caught) else []
    shown = (tests + loads)[:MOST_TESTS]
    more = len(tests + loads) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _strength(outcome: Outcome) -> str:
    """Return a strength with its unit: `2 × scale`, `0.5 of the rows`."""
    return _counted(outcome.strength, outcome.unit) if outcome.unit else "–"


def _counted(strength: float, unit: str) -> str:
    if unit.startswith("of "):
        return f"{strength:.3g} {unit}" if strength < 1 else f"all {unit}"
    return f"{strength:.4g} {unit.removesuffix('s') if strength == 1 else unit}"


def _smallest(outcome: Outcome) -> str:
    """Return the smallest strength that is known to be caught, or that even the strongest slips through."""
    if not outcome.unit:
        return ""
    if outcome.smallest is not None:
        return _counted(outcome.smallest, outcome.unit)
    return f"none up to {_counted(outcome.strongest, outcome.unit)}" if outcome.strongest is not None else ""


def write_outcomes(outcomes: Sequence[Outcome], folder: Path, session: dict[str, Any]) -> Path:
    """Write selftest.json, selftest.md and selftest.html into a folder; return the path of the page.

    Raises:
        OSError: the folder can't be written.
    """
    score = score_of(outcomes)
    gates = [each.perplexity and {**asdict(each.perplexity), "caught": each.perplexity.caught} for each in outcomes]
    rows = [
        asdict(outcome) | {"named": outcome.named, "perplexity": gate}
        for outcome, gate in zip(outcomes, gates, strict=True)
    ]
    write_atomically(
        folder / "selftest.json", strict_json({"schema": SCHEMA, "session": session, "score": score, "faults": rows})
    )
    write_atomically(folder / "selftest.md", markdown_of(outcomes))
    shown = [
        {"outcome": each, "by": _tests(each), "strength": _strength(each), "smallest": _smallest(each)}
        for each in outcomes
    ]
    done = done_of(outcomes)
    title = f"{sum(bool(outcome.caught) for outcome in done)} of {len(done)} faults are caught"
    page = folder / "selftest.html"
    write_atomically(
        page,
        render("selftest.html.j2", session=session, rows=shown, lines=list(_score_lines(outcomes)), title=title),
    )
    return page

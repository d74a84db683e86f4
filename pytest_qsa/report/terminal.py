"""A verdict as text for the terminal: what broke, where, since when, and what to type next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..checkpoint import Finding
from ..common import number, text_table, visible
from ..verdicts import Row, TokenEvidence, Verdict

SHOWN_ROWS = 8
LABEL_WIDTH = 9
"""The least width of the labels of the facts."""


def failure_text(verdict: Verdict) -> str:
    """Return the whole text; its first line names the kind, the assertion and the numbers."""
    sections = (list(section(verdict)) for section in TEXT_SECTIONS)
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def summary_line(verdict: Verdict) -> str:
    """Return the line for pytest's short summary."""
    return f"{verdict.kind} {verdict.id}: {verdict.headline}"


def _headline(verdict: Verdict) -> Iterator[str]:
    yield summary_line(verdict)
    if verdict.query:
        yield f"  {verdict.query['text']}"


def _broken(verdict: Verdict) -> Iterator[str]:
    if verdict.findings:
        yield from findings_text(verdict.findings)
    elif verdict.failing_rows:
        yield from table(verdict.failing_rows, _noun(verdict))


def _tokens(verdict: Verdict) -> Iterator[str]:
    if not verdict.evidence:
        return
    worst = verdict.evidence[0]
    positions = f"positions: {verdict.positions or 'all'}; sinks: {verdict.sinks or 'none'}"
    which = "that stand out most" if worst.share is None else "with the largest error"
    yield f"the tokens {which} at {worst.layer} ({positions})"
    yield from (f"  {token_line(token)}" for token in verdict.evidence)


def _facts(verdict: Verdict) -> Iterator[str]:
    first = verdict.first_failing
    # The tasks of an eval have no order in which something could begin.
    begins = first is not None and len(verdict.rows) > 1 and _noun(verdict) == "layers"
    facts = [
        ("reason", verdict.reason),
        ("begins", f"{first.layer}, the first layer out of bounds in the model's order" if first and begins else None),
        *verdict.origin.items(),
        ("ran", verdict.run.summary(verdict.subject)),
        ("since", verdict.since),
        ("bound", f"{verdict.where}: {verdict.bound}" if verdict.bound else verdict.where and str(verdict.where)),
        *(("waiver", str(use)) for use in verdict.waivers),
        *(("next", hint) for hint in verdict.hints),
        ("again", verdict.command),
        ("accept", verdict.accept),
        *verdict.artefacts.items(),
    ]
    known = [(label, text) for label, text in facts if text]
    width = max([LABEL_WIDTH, *(len(label) + 1 for label, _ in known)])  # labels of an origin are longer than ours
    yield from (f"{label:<{width}}{text}" for label, text in known)


TEXT_SECTIONS = (_headline, _broken, _tokens, _facts)
"""The text from top to bottom: functions that yield the lines of a section, none where there is nothing to say."""


def _noun(verdict: Verdict) -> str:
    """Name what the rows are: layers, or the tasks of an eval."""
    return str(verdict.query.get("of", "layers"))


def table(rows: Sequence[Row], of: str) -> Iterator[str]:
    """Yield the worst rows as a table, and how many more there are. `of`: what the rows are, layers or tasks."""
    shown = rows[:SHOWN_ROWS]
    heads = [of.removesuffix("s"), "value", "allowed", "excess", ""]
    cells = [[row.layer, number(row.value), allowed(row), number(row.excess, signed=True), row.detail] for row in shown]
    # Most assertions have no baseline, and an empty column would only make the table wider.
    if any(row.baseline is not None for row in shown):
        heads.insert(1, "baseline")
        for cell, row in zip(cells, shown, strict=True):
            cell.insert(1, "–" if row.baseline is None else number(row.baseline))
    yield from text_table([heads, *cells], right=range(1, len(heads) - 1), indent="  ")
    if len(rows) > len(shown):
        yield f"  … and {len(rows) - len(shown)} more {of} out of bounds; the report has them all"


def findings_text(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the problems of static checks: the tensor and its file, the problem, the advice."""
    for finding in findings[:SHOWN_ROWS]:
        yield f"  {finding.tensor}{f' ({finding.file})' if finding.file else ''}"
        yield f"      {visible(finding.what)}"
        yield f"      → {visible(finding.advice)}"
    if len(findings) > SHOWN_ROWS:
        yield f"  … and {len(findings) - SHOWN_ROWS} more problems; the report has them all"


def allowed(row: Row) -> str:
    """Write the bounds of a row: `≤ 4`, `≥ 1`, `= 0`, `7.3 … 8.1`."""
    if row.low is None:
        return f"≤ {number(row.high)}" if row.high is not None else "any"
    if row.high is None:
        return f"≥ {number(row.low)}"
    return f"= {number(row.low)}" if row.low == row.high else f"{number(row.low)} … {number(row.high)}"


def token_line(token: TokenEvidence) -> str:
    """Write a token with its ratio, magnitude and position, in its context."""
    channel = f", channel {token.channel}" if token.channel >= 0 else ""
    call = f", call {token.call + 1}" if token.call else ""
    size = number(token.magnitude) if token.share is None else f"{token.of} {number(token.magnitude)}"
    details = f"{size}{channel}{', a sink' if token.sink else ''}"
    where = f"sample {token.sample}, position {token.position}{call}"
    context = context_text(token.before, token.text, token.after)
    return f"{part_of_error(token.share)}{token.ratio:.1f} × median ({details}) at {where}: {context}"


def context_text(before: str, text: str, after: str) -> str:
    """Write a token between its neighbours, control characters visible: `the ⟦cat⟧ sat`."""
    return f"{visible(before)}⟦{visible(text)}⟧{visible(after)}" if text else "(no text kept)"


def part_of_error(share: float | None) -> str:
    """Write a token's share of the error, where it is known: `31.4 % of the error, `."""
    return "" if share is None else f"{100 * share:.1f} % of the error, "

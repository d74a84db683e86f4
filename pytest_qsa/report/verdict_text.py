"""Verdicts as text: what broke, where, since when and what to type next, in the terminal; and what CI systems show.

JUnit, pytest-html, Allure and GitLab show it beside a test, GitHub at the suite's lines.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..captures import PositionRange
from ..checkpoint import Finding
from ..common import code_span, counted, fitted, markdown_table, number, text_table, visible
from ..verdicts import Row, TokenEvidence, Verdict

if TYPE_CHECKING:
    import pytest

    from .report import PlainVerdict


T = TypeVar("T")
SHOWN_ROWS = 8
SHOWN_ANSWERS = 5
"""The pairs of answers that a terminal and a summary show; the page has more."""
LABEL_WIDTH = 9
"""The least width of the labels of the facts."""


def failure_text(verdict: Verdict) -> str:
    """Return the whole text; its first line names the kind, the assertion and the numbers.

    It is all that there is where another test has told what stopped this one.
    """
    if verdict.told_by:
        return summary_line(verdict)
    sections = (list(map(visible, section(verdict))) for section in TEXT_SECTIONS)
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def summary_line(verdict: Verdict) -> str:
    """Return the line for pytest's short summary."""
    return visible(f"{verdict.kind} {verdict.id}: {verdict.headline}")


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
    if worst.answers:
        yield "the answers that lose most against the reference's"
        yield from (
            f"  {token_line(token)}"
            for token in _lost(verdict.evidence, (token.magnitude for token in verdict.evidence))
        )
        return
    if worst.decided:
        yield "where the reference writes another token, the clearest decision first"
        yield from (f"  {token_line(token)}" for token in verdict.evidence)
        return
    span = PositionRange.parse(verdict.positions or "all")
    where = span.text if span else f"positions: {verdict.positions or 'all'}"
    positions = f"{where}; sinks: {verdict.sinks or 'none'}"
    which = "that stand out most" if worst.share is None else "with the largest error"
    yield f"the tokens {which} at {worst.layer} ({positions})"
    yield from (f"  {token_line(token)}" for token in verdict.evidence)


def _lost(evidence: Sequence[T], losses: Iterable[float]) -> Sequence[T]:
    """Return the first of the answers that have lost something, by their losses; where none has, the first of all."""
    return ([token for token, loss in zip(evidence, losses, strict=True) if loss > 0] or evidence)[:SHOWN_ANSWERS]


def _actions(verdict: Verdict) -> Iterator[str]:
    first = verdict.first_failing
    # The tasks of an eval have no order in which something could begin.
    begins = first is not None and first is not verdict.failing_rows[0] and _noun(verdict) == "layers"
    yield from _labelled(
        ("reason", verdict.reason),
        ("begins", f"{first.layer}, the first layer out of bounds" if first and begins else None),
        *verdict.origin.items(),
        *(("waiver", str(use)) for use in verdict.waivers),
        *(("next", hint) for hint in verdict.hints),
        ("again", verdict.command),
        ("accept", verdict.accept),
        *verdict.artefacts.items(),
    )


def _provenance(verdict: Verdict) -> Iterator[str]:
    yield from _labelled(
        ("bound", f"{verdict.where}: {verdict.bound}" if verdict.bound else verdict.where and str(verdict.where)),
        ("since", verdict.since),
        ("ran", verdict.run.summary(verdict.subject)),
    )


def _labelled(*facts: tuple[str, object]) -> Iterator[str]:
    known = [(label, str(text)) for label, text in facts if text]
    width = max([LABEL_WIDTH, *(len(label) + 1 for label, _ in known)])  # labels of an origin are longer than ours
    yield from (f"{label:<{width}}{text}" for label, text in known)


TEXT_SECTIONS = (_headline, _broken, _tokens, _actions, _provenance)
"""The text from top to bottom: functions that yield the lines of a section, none where there is nothing to say."""


class StyledLine(NamedTuple):
    """A line of a failure with its styles, as pytest's terminal names them: `red`, `bold`, `light` (dim)."""

    text: str
    styles: tuple[str, ...] = ()


_DIM = re.compile(r"(bound|since|ran|begins|waiver|reason) +\S")
_TYPED = re.compile(r"(again|accept) +\S")


def styled_lines(lines: Sequence[str]) -> Iterator[StyledLine]:
    """Yield the lines of `failure_text` with their styles: the finding in red, what ran dim, what to type bold."""
    for index, line in enumerate(lines):
        if not index:
            yield StyledLine(line, ("red", "bold"))
        elif _TYPED.match(line):
            yield StyledLine(line, ("bold",))
        elif line.startswith(("      → ", "next ")):
            yield StyledLine(line, ("yellow",))
        elif _DIM.match(line) or index == 1:
            yield StyledLine(line, ("light",))
        else:
            # The rows of a table and the problems are what is out of bounds.
            yield StyledLine(line, ("red",) if line.startswith("  ") and "⟦" not in line else ())


def worst_layer(result: PlainVerdict) -> str:
    """Return the layer that a failure is about; empty where it is about none, or about all of them."""
    if not result["failed"] or not result["rows"] or result["query"].get("over"):
        return ""
    return str(next((row["layer"] for row in result["rows"] if row["excess"] and not row["waived"]), ""))


def shared_layers(results: Sequence[PlainVerdict]) -> Iterator[str]:
    """Yield a line for each layer that several failures of one subject are about: `files and drift both …`."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if layer := worst_layer(result):
            found.setdefault((result["subject"], layer), []).append(result["id"])
    for (subject, layer), ids in found.items():
        if len(ids) > 1:
            yield f"one layer, {len(ids)} failures: {layer} of {subject}: {', '.join(ids)}"


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
    """Yield the problems of static checks, then the notes: the tensor and its file, the problem, the advice."""
    for finding in findings[:SHOWN_ROWS]:
        yield f"  {'note: ' if finding.note else ''}{finding.tensor}{f' ({finding.file})' if finding.file else ''}"
        yield f"      {finding.what}"
        yield f"      → {finding.advice}"
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
    if token.answers:
        return answer_line(token.sample, token.position, token.answers)
    if token.decided:
        context = context_text(token.before, token.text, token.after)
        return f"{decision_text(token.decided)} at sample {token.sample}, position {token.position}, after {context}"
    channel = f", channel {token.channel}" if token.channel >= 0 else ""
    call = f", call {token.call + 1}" if token.call else ""
    size = number(token.magnitude) if token.share is None else f"{token.of} {number(token.magnitude)}"
    details = f"{size}{channel}{', a sink' if token.sink else ''}"
    where = f"sample {token.sample}, position {token.position}{call}"
    context = patch_text(token.patch) if token.patch else context_text(token.before, token.text, token.after)
    return f"{part_of_error(token.share)}{token.ratio:.1f} × median ({details}) at {where}: {context}"


def patch_text(patch: Sequence[int]) -> str:
    """Write which patch of a picture a token stands for; of `Patch`."""
    row, column, rows, columns = patch
    return f"the picture's patch in row {row + 1}, column {column + 1} of {rows} × {columns}"


def answer_line(prompt: int, position: int, answers: Sequence[str]) -> str:
    """Write how two answers to a prompt end. `position`: how many of their first tokens are equal."""
    reference, own = (visible(text) for text in answers)
    return f"prompt {prompt}, {counted(position, 'token')} alike: the reference ends ⟦{reference}⟧, the model ⟦{own}⟧"


def decision_text(decided: Sequence[str]) -> str:
    """Write what two models make of a position, of `TokenEvidence.decided`."""
    margin, token, own, other = decided
    return f"the reference writes ⟦{visible(token)}⟧ by {margin}, the model ⟦{visible(other)}⟧ by {own}"


def context_text(before: str, text: str, after: str) -> str:
    """Write a token between its neighbours, control characters visible: `the ⟦cat⟧ sat`."""
    return f"{visible(before)}⟦{visible(text)}⟧{visible(after)}" if text else "(no text kept)"


def part_of_error(share: float | None) -> str:
    """Write a token's share of the error, where it is known: `31.4 % of the error, `."""
    return "" if share is None else f"{100 * share:.1f} % of the error, "


MOST_ANNOTATIONS = 10
"""GitHub shows this many errors, and as many warnings, of one step and drops the others."""
SUMMARY_BYTES = 900_000
"""GitHub drops a summary of more than 1 MiB as a whole."""
COMMENT_BYTES = 60_000
"""GitHub refuses a comment of more than 65,536 characters."""
MOST_FINDINGS = 5
"""The most failures that a comment names above its table, which has all of them."""
_SUITE_ERROR = re.compile(r"^(?P<file>[^:\n]+\.ya?ml):(?P<line>\d+)(?::\d+)?: (?P<text>.+)", re.MULTILINE)
_SIGNS = {"REGRESSION": "❌", "ANOMALOUS": "❓", "INFRA": "🔧", "WARNED": "⚠️", "PASSED": "✅"}
_LEVELS = {"warning": "⚠️", "note": "note:"}


def properties_of(verdict: Verdict) -> list[tuple[str, str | float]]:
    """Return a verdict as the properties of a JUnit test case; builtins only, for pytest-xdist."""
    properties: list[tuple[str, str | float]] = [
        ("qsa_kind", str(verdict.kind)), ("qsa_verdict", verdict.headline), ("qsa_bound", verdict.bound),
        ("qsa_where", str(verdict.where or "")),
    ]  # fmt: skip
    if verdict.rows:
        worst = verdict.rows[0]
        properties += [("qsa_worst_layer", worst.layer), ("qsa_value", float(worst.value))]
        if worst.used is not None:
            properties.append(("qsa_used", float(worst.used)))
    properties += [("qsa_waiver", str(use)) for use in verdict.waivers]
    return [(name, visible(value) if isinstance(value, str) else value) for name, value in properties if value != ""]


def takes_pictures(config: pytest.Config) -> bool:
    """Whether another tool of this run shows the pictures of tests: pytest-html, Allure or GitLab."""
    allure = config.pluginmanager.hasplugin("allure_listener")
    return bool(config.getoption("htmlpath", None) or allure or os.environ.get("GITLAB_CI"))


def attach(item: pytest.Item, report: pytest.TestReport, results: Sequence[PlainVerdict]) -> None:
    """Attach the plots of a test in pytest-html, Allure and GitLab, where these are active."""
    config = item.config
    pictures = list(_pictures(config.invocation_params.dir, results))
    if not pictures:
        return
    if config.getoption("htmlpath", None):
        report.extras = [*getattr(report, "extras", ()), *(_extra(title, path) for title, path in pictures)]  # type: ignore[attr-defined]
    if config.pluginmanager.hasplugin("allure_listener"):
        # An optional plugin: imported only where it is active.
        import allure

        for title, path in pictures:
            allure.attach.file(str(path), name=title, attachment_type=allure.attachment_type.PNG)
    if os.environ.get("GITLAB_CI"):
        # pytest writes system-out from the report of the teardown, or of the call if it leaves out passing tests.
        line = f"[[ATTACHMENT|{_below(pictures[0][1], 'CI_PROJECT_DIR')}]]"
        report.sections.append(("Captured stdout call", line))
        item.add_report_section("call", "stdout", line)


def _pictures(folder: Path, results: Sequence[PlainVerdict]) -> Iterator[tuple[str, Path]]:
    for result in results:
        for title, path in result["artefacts"].items():
            if path.endswith(".png") and (folder / path).is_file():
                yield f"{result['id']}: {title}", folder / path


def _extra(title: str, path: Path) -> dict[str, str | None]:
    """Return a picture as pytest-html's plain values, which can cross from a worker of pytest-xdist."""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"name": title, "format_type": "image", "content": content, "mime_type": "image/png", "extension": "png"}


def _below(path: str | Path, variable: str) -> str:
    """Return a path relative to the folder that an environment variable names, unchanged if it is not below it.

    pytest may run in a folder below the repository, but GitHub and GitLab show paths from its root.
    """
    root = os.environ.get(variable)
    if root and Path(path).resolve().is_relative_to(Path(root).resolve()):
        return Path(path).resolve().relative_to(Path(root).resolve()).as_posix()
    return str(path)


def annotation_lines(results: Sequence[PlainVerdict], suite_errors: Sequence[str] = ()) -> Iterator[str]:
    """Yield GitHub's workflow commands that annotate the suites' lines: wrong suites, failures, warnings."""
    for text in suite_errors:
        # Other collection errors, of a Python test say, are none of a suite's.
        if match := _SUITE_ERROR.search(text):
            yield command("error", match["file"], match["line"], "wrong suite", match["text"])
    for level, chosen in (
        ("error", _failed(results)),
        ("warning", [result for result in results if result["kind"] == "WARNED"]),
    ):
        for result in chosen[:MOST_ANNOTATIONS]:
            file, _, line = result["where"].rpartition(":")
            message = "\n".join(text for text in (result["headline"], result["reason"], result["command"]) if text)
            title = f"{result['kind']} {result['id']}{_on(result, results)}"
            yield command(level, file or result["where"], line, title, message)


def _failed(results: Sequence[PlainVerdict]) -> list[PlainVerdict]:
    """Return what failed, those last that only name another's reason: a list that is cut shows the reasons."""
    return sorted((result for result in results if result["failed"]), key=lambda result: bool(result.get("told_by")))


def _on(result: PlainVerdict, results: Sequence[PlainVerdict]) -> str:
    """Return the subject of a result where there are several, as `on NAME`."""
    several = len({each["subject"] for each in results}) > 1
    return f" on {result['subject']}" if several and result["subject"] else ""


def command(level: str, file: str, line: str, title: str, message: str) -> str:
    """Return `::error file=…,line=…,title=…::message`; paths are relative to the repository, all is escaped."""
    properties = {"file": _below(file, "GITHUB_WORKSPACE"), "line": line if line.isdigit() else "", "title": title}
    known = ",".join(f"{name}={_property(value)}" for name, value in properties.items() if value)
    return f"::{level} {known}::{_data(message)}"


def _data(text: str) -> str:
    text = "".join(c if c == "\n" else visible(c) for c in text)  # %0A keeps lines; GitHub shows them
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    # In GitHub's commands a colon ends the properties, and a comma one of them.
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def append_summary(path: Path, results: Sequence[PlainVerdict], remarks: Sequence[tuple[str, str]] = ()) -> None:
    """Append the run to the step's summary, in which other tools may have written before.

    Raises:
        OSError: it can't be written.
    """
    written = path.stat().st_size if path.exists() else 0
    with path.open("a", encoding="utf-8") as file:
        # The limit is of the whole file, so what other tools have written counts.
        file.write(fitted(step_summary(results, remarks), max(SUMMARY_BYTES - written, 1000)))


def comment(
    results: Sequence[PlainVerdict], suite_errors: Sequence[str] = (), remarks: Sequence[tuple[str, str]] = ()
) -> str:
    """Return a run as the comment of a pull request: wrong suites, then the step's summary, cut to GitHub's limit."""
    wrong = [match for text in suite_errors if (match := _SUITE_ERROR.search(text))]
    lines = [f"- {code_span(match[0])}" for match in wrong]
    head = [f"## ❌ qsa: {counted(len(wrong), 'suite')} wrong", "", *lines, ""] if wrong else []
    return fitted("\n".join(head) + (step_summary(results, remarks) if results else ""), COMMENT_BYTES)


def step_summary(results: Sequence[PlainVerdict], remarks: Sequence[tuple[str, str]] = ()) -> str:
    """Return a run as Markdown: the verdict, what failed, a line for each assertion, and how to act on each failure.

    `remarks`: pairs of a level, "warning" or "note", and a text; they stand below what failed.
    """
    failed = _failed(results)
    order = list(_SIGNS)
    ordered = sorted(results, key=lambda result: order.index(result["kind"]))
    lines = [f"## {'❌' if failed else '✅'} qsa: {len(results) - len(failed)} of {len(results)} assertions hold", ""]
    first = [(f"{result['id']}{_on(result, results)}", result["headline"]) for result in failed[:MOST_FINDINGS]]
    lines += [f"- {code_span(name)}: {code_span(headline)}" for name, headline in first]
    lines += [f"- … and {len(failed) - MOST_FINDINGS} more"] if failed[MOST_FINDINGS:] else []
    lines += [""] if failed else []
    lines += [f"- {_LEVELS[level]} {code_span(text)}" for level, text in remarks] + [""] * bool(remarks)
    heads = ["", "assertion", "subject", "worst layer", "value", "bound", "used"]
    lines += markdown_table([heads, *map(_cells, ordered)], plain={0, 4, 6})
    lines.append("")
    for result in (result for result in ordered if result["failed"] or result["kind"] == "WARNED"):
        lines += _details(result)
    return "\n".join(lines) + "\n"


def _cells(result: PlainVerdict) -> list[str]:
    worst = result["rows"][0] if result["rows"] else None
    value = number(worst["value"]) if worst else ""
    used = f"{worst['used']:.0%}" if worst and worst["used"] is not None else ""
    sign = f"{_SIGNS[result['kind']]} {result['kind']}"
    return [sign, result["id"], result["subject"], worst["layer"] if worst else "", value, result["bound"], used]


def _details(result: PlainVerdict) -> Iterator[str]:
    yield f"<details><summary>{_html(result['id'])}: {_html(result['headline'])}</summary>"
    yield ""
    if result["reason"]:
        yield code_span(result["reason"])
        yield ""
    evidence = result["evidence"]
    if evidence and evidence[0].get("answers"):
        evidence = _lost(evidence, (token["magnitude"] for token in evidence))
    for token in evidence:
        context = code_span(context_text(token["before"], token["text"], token["after"]))
        where = f"sample {token['sample']}, position {token['position']}"
        if answers := token.get("answers"):
            yield f"- {code_span(answer_line(token['sample'], token['position'], answers))}"
            continue
        if decided := token.get("decided"):
            yield f"- {code_span(decision_text(decided))} at {where}, after {context}"
            continue
        yield f"- {part_of_error(token.get('share'))}{token['ratio']:.1f} × median at {where}: {context}"
    commands = [("bound", result["where"]), ("again", result["command"]), ("accept", result["accept"])]
    text = "\n".join(f"{name:<8}{visible(command)}" for name, command in commands if command)
    yield ""
    yield f"<pre>{html.escape(text)}</pre>"
    yield "</details>"
    yield ""


def _html(text: str) -> str:
    # In a block of HTML, Markdown's code spans mean nothing.
    return f"<code>{html.escape(visible(text))}</code>"

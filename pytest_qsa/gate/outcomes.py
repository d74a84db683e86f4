"""What becomes of verdicts in the process that runs a test: plots, the item, the failure, the report, the hooks."""

from __future__ import annotations

import ast
import hashlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ..captures import Capture, histograms_of
from ..common import QsaError, shown_path
from ..report import attach, failure_text, properties_of, to_plain
from ..suite import Place
from ..verdicts import Identity, Verdict, concluded, stopped
from .collection import QsaSuite
from .hookspecs import call_hook
from .options import Options
from .reporting import FIELD

PACKAGE = Path(__file__).parent.parent
VERDICTS = pytest.StashKey[list[Verdict]]()
"""On an item: the verdicts of the present attempt."""


class GateFailure(AssertionError):  # noqa: N818 - as pytest says it: a failure, not an error
    """Fails a test with a verdict; its text is what the terminal shows."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(failure_text(verdict))
        self.verdict = verdict


def record(item: pytest.Item, verdict: Verdict) -> None:
    """Keep a verdict on its item, for the report, the hooks and JUnit."""
    item.stash.setdefault(VERDICTS, []).append(verdict)
    item.user_properties.extend(properties_of(verdict))
    item.user_properties.extend(("qsa_waiver", str(use)) for use in verdict.waivers)


def with_plots(item: pytest.Item, verdict: Verdict, capture: Capture | None, options: Options) -> Verdict:
    """Add the plots and the path of the report to a verdict that the report shows."""
    reported = options.report == "always" or (options.report == "on-failure" and verdict.failed)
    if not reported or not verdict.rows:
        return verdict
    report = {"report": shown_path(options.output / "report.html")}
    if capture is None:
        return replace(verdict, artefacts=report)
    from ..report import draw  # matplotlib, only where something is drawn

    query = verdict.query
    layers = capture.select(query["layers"], query["site"], query["exclude"]).layers
    histograms = {layer: histograms_of(capture.sites[layer, query["site"]]) for layer in layers}
    # Before drawing: the report shows distributions also where a plot fails.
    verdict = replace(verdict, histograms=histograms)
    try:
        plots = draw(capture, verdict, options.output / "plots" / _slug(item.nodeid))
    except Exception as error:  # a picture must never turn a verdict into an error
        hint = f"the plots could not be drawn: {type(error).__name__}: {error}"
        return replace(verdict, hints=[*verdict.hints, hint])
    return replace(verdict, artefacts={title: shown_path(Path(path)) for title, path in plots.items()} | report)


def _slug(text: str) -> str:
    # The hash tells apart ids that end alike, or differ only in characters that a file's name can't have.
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
    return f"{plain[-80:]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def caller() -> Place | None:
    """Return the line of the test that compares."""
    # context=0: the source lines of the frames are not read.
    for frame in inspect.stack(context=0):
        if not frame.filename.startswith(str(PACKAGE)):
            return Place(Path(frame.filename), frame.lineno)
    return None


def describe(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Give a failed gate its own text, and put its verdicts on the report of its call."""
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        _describe_failure(item, call, report)
    if verdicts := item.stash.get(VERDICTS, None):
        if not report.failed:  # a comparison that the test itself took back, or an expected failure
            verdicts = [verdict for verdict in verdicts if not verdict.failed]
        for verdict in verdicts:
            call_hook("pytest_qsa_verdict", item.ihook, item.config, item.warn, item=item, verdict=verdict)
        results = [to_plain(verdict) | {"nodeid": item.nodeid} for verdict in verdicts]
        setattr(report, FIELD, results)
        attach(item, report, results)
        # pytest-rerunfailures runs the same item again: each attempt has verdicts of its own.
        item.stash[VERDICTS] = []


def _describe_failure(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    assert call.excinfo is not None
    error = call.excinfo.value
    recorded = item.stash.get(VERDICTS, None) or []
    if isinstance(error, GateFailure):
        verdict = error.verdict
    # A comparison that is false raises nothing itself: `assert` does, without our text.
    elif isinstance(error, AssertionError) and recorded and recorded[-1].failed and _asserts(call, recorded[-1].where):
        verdict = recorded[-1]
    elif isinstance(error, QsaError):
        verdict = _stopped(item, error)
    else:
        return
    representation = call.excinfo.getrepr(style="short", chain=False, tbfilter=lambda info: _users_frames(info, item))
    _replace_text(representation, failure_text(verdict))
    if representation.reprcrash is not None:
        frames = _users_frames(call.excinfo, item)
        if len(frames):
            representation.reprcrash.path, representation.reprcrash.lineno = str(frames[-1].path), frames[-1].lineno + 1
        # The short summary at the end of a run shows this line.
        representation.reprcrash.message = f"{verdict.kind}: {verdict.headline}"
    report.longrepr = representation


def _asserts(call: pytest.CallInfo[None], place: Place | None) -> bool:
    """Say whether the failed assert statement holds the comparison at `place`: the test may have gone on to another."""
    if call.excinfo is None or place is None:
        return False
    frame = call.excinfo.traceback[-1]
    line, at = place.line, frame.lineno + 1
    try:
        tree = ast.parse(Path(frame.path).read_bytes())
    except (OSError, SyntaxError):
        return line == at
    asserts = [n for n in ast.walk(tree) if isinstance(n, ast.Assert) and n.lineno <= at <= (n.end_lineno or at)]
    return any(node.lineno <= line <= (node.end_lineno or line) for node in asserts)


def _users_frames(info: Any, item: pytest.Item) -> Any:
    """Drop the frames of this package, which tell a user nothing; of a suite only the line of the bound is left."""
    if isinstance(item.parent, QsaSuite):
        return info.traceback[-1:]
    return info.traceback.cut(path=item.path).filter(lambda entry: PACKAGE not in Path(entry.path).parents)


def _replace_text(representation: Any, text: str) -> None:
    """Put the verdict's text in the place of the exception, whose class name means nothing to a reader."""
    entry = representation.reprtraceback.reprentries[-1]
    source = [line for line in entry.lines if not line.startswith("E ")]
    entry.lines = source + [f"E   {line}" for line in text.splitlines()]


def _stopped(item: pytest.Item, error: QsaError) -> Verdict:
    """Make the verdict of a Python test that an error stopped before it could compare."""
    place = Place(item.path, (item.location[1] or 0) + 1)
    verdict = concluded(stopped(error), Identity(item.name, place=lambda key: place))
    item.stash.setdefault(VERDICTS, []).append(verdict)
    return verdict

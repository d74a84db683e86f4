"""What becomes of a verdict: its plots, and where it stands on its test, in the failure, on pytest's report, in hooks.

A run without a gate imports this module as well: rooms are imported when they are used.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .. import common, suite
from .comparisons import PACKAGE, asserts
from .options import Options

if TYPE_CHECKING:
    from .. import captures, report, verdicts
    from ..captures import Capture
    from ..verdicts import Verdict
else:
    captures, report, verdicts = (common.Room(f"pytest_qsa.{name}") for name in ("captures", "report", "verdicts"))

VERDICTS: pytest.StashKey[list[Verdict]] = pytest.StashKey()
"""On an item: the verdicts of the present attempt."""
FIELD = "qsa_verdicts"
"""The attribute of a test report that carries verdicts as plain values; xdist passes it on."""
NO_OTHERS: Mapping[str, Capture | None] = {}
FLOOR = "the reference is a copy (model.reference_is_copy): this is the floor of the noise, and no difference"
"""The hint of every number of a run against itself."""


class GateFailure(AssertionError):  # noqa: N818 - as pytest says it: a failure, not an error
    """Fails a test with a verdict; its text is what the terminal shows."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(report.failure_text(verdict))
        self.verdict = verdict


def record(item: pytest.Item, verdict: Verdict) -> None:
    """Keep a verdict on its item, for the report, the hooks and JUnit."""
    item.stash.setdefault(VERDICTS, []).append(verdict)
    item.user_properties.extend(report.properties_of(verdict))


def with_plots(
    item: pytest.Item,
    verdict: Verdict,
    capture: Capture | None,
    options: Options,
    others: Mapping[str, Capture | None] = NO_OTHERS,
) -> Verdict:
    """Add the plots and the path of the report to a verdict that the report shows.

    `others`: captures whose distributions are drawn over those of `capture`, by what they are: `reference`.
    """
    reported = options.report == "always" or (options.report == "on-failure" and verdict.failed)
    if not reported or not verdict.rows:
        return verdict
    page = {"report": common.shown_path(options.output / "report.html")}
    if capture is None:
        return replace(verdict, artefacts=page)
    query = verdict.query
    layers = capture.select(query["layers"], query["site"], query["exclude"]).layers
    histograms = {layer: [*_histograms(capture, others, layer, query["site"])] for layer in layers}
    # Before drawing: the report shows distributions also where a plot fails.
    verdict = replace(verdict, histograms=histograms)
    try:
        verdict = replace(verdict, curves=report.curves_of(verdict, capture))
        # A file of a passed test is for other tools alone: to draw one takes longer than to judge the test.
        files = verdict.failed or report.takes_pictures(item.config)
        folder = options.run_folder / "plots" / _slug(item.nodeid)
        plots = report.draw(capture, verdict, folder, without=() if files else report.drawn_by_page(verdict))
    except Exception as error:  # a picture must never turn a verdict into an error
        hint = f"the plots could not be drawn: {type(error).__name__}: {error}"
        return replace(verdict, hints=[*verdict.hints, hint])
    return replace(verdict, artefacts={title: common.shown_path(Path(path)) for title, path in plots.items()} | page)


def _histograms(
    capture: Capture, others: Mapping[str, Capture | None], layer: str, site: captures.Site
) -> Iterator[Mapping[str, Any]]:
    """Yield the distributions of a layer, then those of other captures there, with `whose`."""
    yield from captures.histograms_of(capture.sites[layer, site])
    for whose, other in others.items():
        numbers = other.sites.get((layer, site)) if other is not None else None
        yield from (
            {**each, "whose": whose} for each in (captures.histograms_of(numbers) if numbers is not None else ())
        )


def _slug(text: str) -> str:
    # The hash tells apart ids that end alike, or differ only in characters that a file's name can't have.
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
    return f"{plain[-80:]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def describe(item: pytest.Item, call: pytest.CallInfo[None], outcome: pytest.TestReport) -> None:
    """Give a failed gate its own text, and put its verdicts on the report of its call."""
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        _describe_failure(item, call, outcome)
    if found := item.stash.get(VERDICTS, None):
        if not outcome.failed:  # a comparison that the test itself took back, or an expected failure
            found = [verdict for verdict in found if not verdict.failed]
        for verdict in found:
            call_hook("pytest_qsa_verdict", item.ihook, item.config, item.warn, item=item, verdict=verdict)
        results = [report.to_plain(verdict) | {"nodeid": item.nodeid} for verdict in found]
        setattr(outcome, FIELD, results)
        report.attach(item, outcome, results)
        # pytest-rerunfailures runs the same item again: each attempt has verdicts of its own.
        item.stash[VERDICTS] = []


def _describe_failure(item: pytest.Item, call: pytest.CallInfo[None], outcome: pytest.TestReport) -> None:
    assert call.excinfo is not None
    error = call.excinfo.value
    recorded = item.stash.get(VERDICTS, None) or []
    if isinstance(error, GateFailure):
        verdict = error.verdict
    # A comparison that is false raises nothing itself: `assert` does, without our text.
    elif isinstance(error, AssertionError) and recorded and recorded[-1].failed and asserts(call, recorded[-1].where):
        verdict = recorded[-1]
    elif isinstance(error, common.QsaError):
        verdict = _stopped(item, error)
    else:
        return
    representation = call.excinfo.getrepr(style="short", chain=False, tbfilter=lambda info: _users_frames(info, item))
    _replace_text(representation, report.failure_text(verdict))
    if verdict.told_by:
        representation.reprtraceback.reprentries = [_only_text(representation.reprtraceback.reprentries[-1])]
    if representation.reprcrash is not None:
        frames = _users_frames(call.excinfo, item)
        if len(frames):
            representation.reprcrash.path, representation.reprcrash.lineno = str(frames[-1].path), frames[-1].lineno + 1
        # The short summary at the end of a run shows this line.
        representation.reprcrash.message = common.visible(f"{verdict.kind}: {verdict.headline}")
    outcome.longrepr = representation


def require_reading(item: pytest.Function) -> None:
    """Check that a test which took `qsa` looked at a number: by a comparison, the values of a series, or the capture.

    Raises:
        AnomalyError: it did not.
    """
    if not getattr(item.funcargs.get("qsa"), "read", True) and item.get_closest_marker("xfail") is None:
        raise common.AnomalyError(
            "the test took qsa and looked at no number, so nothing is checked: assert a comparison, or leave it out"
        )


def _users_frames(info: Any, item: pytest.Item) -> Any:
    """Drop the frames of this package, which tell a user nothing; of a suite only the line of the bound is left."""
    from .collection import QsaSuite

    if isinstance(item.parent, QsaSuite):
        return info.traceback[-1:]
    return info.traceback.cut(path=item.path).filter(lambda entry: PACKAGE not in Path(entry.path).parents)


def _replace_text(representation: Any, text: str) -> None:
    """Put the verdict's text in the place of the exception, whose class name means nothing to a reader."""
    entry = representation.reprtraceback.reprentries[-1]
    source = [line for line in entry.lines if not line.startswith("E ")]
    entry.lines = source + [f"E   {line}" for line in text.splitlines()]


def _write_coloured(entry: Any, writer: Any) -> None:
    """Write the text of a verdict, coloured by what each line is: the finding red, what ran dim, what to type bold.

    `entry`, `writer`: pytest's `ReprEntry` and `TerminalWriter`, neither of which is public.
    """
    replace(entry, lines=[line for line in entry.lines if not line.startswith("E ")]).toterminal(writer)
    for line in report.styled_lines([line[4:] for line in entry.lines if line.startswith("E ")]):
        writer.write("E   ", red=True)
        writer.line(_linked(line.text) if writer.hasmarkup else line.text, **dict.fromkeys(line.styles, True))


def _linked(text: str) -> str:
    """Make the path at the end of a line one that terminals open, where it is that of a file (OSC 8)."""
    head, _, path = text.rpartition(" ")
    if path.endswith((".html", ".png")) and Path(path).is_file():
        return f"{head} \x1b]8;;{Path(path).resolve().as_uri()}\x1b\\{path}\x1b]8;;\x1b\\"
    return text


def colour(outcome: pytest.TestReport) -> None:
    """Give a failed gate its colours. Done on the controller: how an entry is written can't cross from a worker."""
    entries = getattr(getattr(outcome.longrepr, "reprtraceback", None), "reprentries", None)
    if entries and hasattr(entries[-1], "lines"):
        # Not an entry of another class: plugins that store reports know pytest's own by their name.
        entries[-1].toterminal = partial(_write_coloured, entries[-1])


def _only_text(entry: Any) -> Any:
    """Leave out where a test was stopped: that is not the reason."""
    entry.lines = [line for line in entry.lines if line.startswith("E ")]
    entry.reprfileloc = None
    return entry


def _stopped(item: pytest.Item, error: common.QsaError) -> Verdict:
    """Make the verdict of a Python test that an error stopped before it could compare."""
    place = suite.Place(item.path, (item.location[1] or 0) + 1)
    verdict = verdicts.concluded(verdicts.stopped(error), verdicts.Identity(item.name, place=lambda key: place))
    item.stash.setdefault(VERDICTS, []).append(verdict)
    return verdict


def call_hook(name: str, hooks: Any, config: pytest.Config, warn: Callable[[Warning], None], **arguments: Any) -> None:
    """Call each implementation of a hook by itself: one that raises leaves a warning, and the others still run.

    `hooks`: `config.hook`, or that of an item, which leaves out the conftests of other folders.
    """
    everyone = {implementation.plugin for implementation in getattr(config.hook, name).get_hookimpls()}
    # pluggy calls the implementation that was registered last first
    for implementation in reversed(getattr(hooks, name).get_hookimpls()):
        # subset_hook_caller takes the plugins to leave out: all but this one.
        caller = config.pluginmanager.subset_hook_caller(name, everyone - {implementation.plugin})
        try:
            caller(**arguments)
        except Exception as error:
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # made an error, the warning would end the session
                warn(common.QsaWarning(f"{name}: {type(error).__name__}: {error}"))

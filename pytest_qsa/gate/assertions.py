"""One assertion of a suite, judged: the body of its generated test."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from ..captures import Capture, ModelProvenance
from ..checkpoint import Files, problems_of
from ..common import QsaError, QsaWarning, SuiteError
from ..metrics import Series, blamed
from ..suite import Assertion, CheckpointAssertion, ExternalAssertion, Location, MeasuredAssertion
from ..verdicts import (
    Budget,
    Kind,
    Tolerance,
    Verdict,
    anomaly,
    apply_waivers,
    budget_of,
    detailed,
    joint_uses,
    judge_bounds,
    judge_problems,
    judge_scores,
    kept_release,
    limits_of,
    measured,
    previous_values,
    settled,
    softened,
)
from .collection import QsaSuite, raise_at
from .gate import Gate, GateFailure

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion


Waive = Callable[[Verdict], Verdict]


def run_assertion(request: pytest.FixtureRequest, suite: QsaSuite, index: int) -> None:
    """Judge one assertion of a suite; the body of its generated test.

    Raises:
        GateFailure: the verdict is red.
    """
    __tracebackhide__ = True
    gate: Gate = request.getfixturevalue("qsa_gate")
    assertion = suite.file.assertions[index]
    capture: Capture | None = None
    key: Location = ()
    try:
        waive = partial(apply_waivers, waivers=assertion.waivers, today=gate.options.today)
        if isinstance(assertion, CheckpointAssertion):
            verdict, key = _checked(assertion, gate.files_of(request), waive)
        elif isinstance(assertion, ExternalAssertion):
            verdict, key = _external(request, assertion, waive)
        else:
            assert isinstance(assertion, MeasuredAssertion)
            capture = gate.capture_of(request)
            decides, known = settled(assertion, capture)
            verdict, key = _judged(request, assertion, decides, waive)
            verdict = blamed(verdict, decides)
            verdict = detailed(verdict, known)
        verdict = softened(verdict, assertion.level)
    except QsaError as error:
        verdict = anomaly(error, assertion.query)
    place = suite.file.bound_place_of(index, key)
    if gate.options.ratchet:
        schemes, place_of = capture.schemes if capture else None, partial(suite.file.bound_place_of, index)
        floors, spare = _room(assertion)
        verdict = replace(verdict, limits=limits_of(assertion.stated, verdict.rows, schemes, place_of, floors, spare))
    verdict = replace(verdict, reason=assertion.reason)
    verdict = gate.complete(request, verdict, capture, where=str(place), name=assertion.id)
    _warn_unused(request, suite, index, verdict)
    if verdict.failed:
        raise_at(place, assertion.id, GateFailure(verdict))
    if verdict.kind is Kind.WARNED:
        request.node.warn(QsaWarning(f"{assertion.id}: {verdict.headline} ({place})"))


def _room(assertion: Assertion) -> tuple[Mapping[tuple[str, ...], float], Collection[tuple[str, ...]]]:
    """Return what calibration left beside the bounds: their floors, and which of them have room for one token more."""
    if assertion.noise is None:
        return {}, ()
    tokens = assertion.query.unit == "tokens"
    return assertion.noise.floors, {key for key in assertion.noise.steady if tokens and key[0] == "max"}


def _warn_unused(request: pytest.FixtureRequest, suite: QsaSuite, index: int, verdict: Verdict) -> None:
    """Warn of a waiver that has nothing to soften any more: it would hide the next excess."""
    many = isinstance(suite.file.assertions[index].waive, list)
    for number, use in enumerate(verdict.waivers):
        if use.state == "unused":
            place = suite.file.bound_place_of(index, ("waive", number) if many else ("waive",))
            request.node.warn(
                QsaWarning(
                    f"{verdict.id}: the waiver of {use.owner} until {use.until} waives nothing any more: no layer that "
                    f"'{use.layers}' finds is out of bounds; remove it ({place})"
                )
            )


def _checked(assertion: CheckpointAssertion, files: Files, waive: Waive) -> tuple[Verdict, Location]:
    """Judge a static assertion: from the checkpoint's files, before and without any pass."""
    series, found = problems_of(files, assertion.metric, assertion.layers, assertion.exclude, **assertion.parameters)
    series = series.folded(assertion.over)
    series.check()
    budget = budget_of(assertion.stated, series.layers, None)
    verdict = waive(judge_problems(series, found, budget.bounds, files, budget.text))
    return verdict, _exceeded(verdict, budget)


def _external(request: pytest.FixtureRequest, assertion: ExternalAssertion, waive: Waive) -> tuple[Verdict, Location]:
    """Judge what another program has measured: from its file, without any pass."""
    gate: Gate = request.getfixturevalue("qsa_gate")
    subject = gate.subject_of(request.node)
    assert subject is not None
    verdict, budget = judge_scores(assertion, subject.folder, subject.name)
    verdict = waive(replace(verdict, run=replace(verdict.run, model=ModelProvenance(subject.path))))
    return verdict, _exceeded(verdict, budget)


def _judged(
    request: pytest.FixtureRequest, assertion: MeasuredAssertion, capture: Capture, waive: Waive
) -> tuple[Verdict, Location]:
    """Return the verdict, and the keys of the assertion that lead to the bound that it is about."""
    series = measured(assertion, capture)
    bounded: tuple[Verdict, Location] | None = None
    if assertion.stated:
        previous = _previous(request, assertion, series, capture) if assertion.follows else None
        budget = budget_of(assertion.stated, series.layers, capture.schemes, previous)
        verdict = waive(judge_bounds(series, budget.bounds, budget.text))
        bounded = verdict, _exceeded(verdict, budget)
    kept = assertion.baseline
    if bounded is not None and (kept is None or bounded[0].failed):
        return bounded
    assert kept is not None
    tolerance = Tolerance(kept.rel, kept.abs, kept.direction)
    snapshot = baseline_snapshot(request)
    if kept.per is not None:
        _choose_class(request, series, tolerance, capture)
    verdict = waive(against_baseline(series, tolerance, capture, snapshot, per=kept.per))
    if bounded is None:
        return verdict, ("baseline",)
    uses = joint_uses(bounded[0], verdict)
    told = bounded if bounded[0].kind is Kind.WARNED and not verdict.failed else (verdict, ("baseline",))
    return replace(told[0], waivers=uses), told[1]


def _previous(
    request: pytest.FixtureRequest, assertion: MeasuredAssertion, series: Series, capture: Capture
) -> Mapping[str, float]:
    gate: Gate = request.getfixturevalue("qsa_gate")
    subject = gate.subject_of(request.node)
    assert subject is not None
    assert subject.model is not None
    assert subject.model.previous is not None
    return previous_values(
        series,
        capture.provenance.data.fingerprint,
        subject.model.previous,
        kept_release(subject, request.node.path),
        assertion.id,
        lambda release: measured(assertion, release),
        lambda: gate.previous_capture(request, subject),
    )


def _exceeded(verdict: Verdict, budget: Budget) -> Location:
    """Return the keys of the bound that the worst layer exceeded, or comes nearest to."""
    worst = (verdict.failing_rows or verdict.rows)[0]
    names = ("min", "equals", "max") if worst.excess < 0 else ("max", "equals", "min")
    return next(budget.keys[worst.layer, name] for name in names if (worst.layer, name) in budget.keys)


def _choose_class(request: pytest.FixtureRequest, series: Series, tolerance: Tolerance, capture: Capture) -> None:
    """Name the baseline of this run's class of devices."""
    from ..verdicts import HOME, NAME, name_for_class

    stash = request.node.stash
    made_with, data = capture.provenance.model, capture.provenance.data.fingerprint
    updating = bool(request.config.getoption("update_snapshots", False))
    shared = stash[HOME] / f"{stash[NAME]}.json"
    stash[NAME] = name_for_class(shared, series, tolerance, data, made_with, updating=updating)


def against_baseline(
    series: Series, tolerance: Tolerance, capture: Capture, snapshot: SnapshotAssertion, per: str | None = None
) -> Verdict:
    """Hold a series against the next baseline of a test.

    Raises:
        BaselineError: there is no baseline yet, or it can't be compared.
    """
    from ..verdicts import judge_against_baseline

    data = capture.provenance.data.fingerprint
    made_with = capture.provenance.model
    if per is None:  # a baseline of all devices names none
        made_with = replace(made_with, device_class=None)
    return judge_against_baseline(series, tolerance, snapshot, data, made_with)


def baseline_snapshot(request: pytest.FixtureRequest) -> SnapshotAssertion:
    """Return syrupy's fixture for this test, with our extension and our folder.

    Raises:
        SuiteError: syrupy is disabled, or another plugin's fixture has taken its name.
    """
    from ..verdicts import QsaBaselineExtension

    try:
        snapshot = request.getfixturevalue("snapshot")
    except pytest.FixtureLookupError:
        raise SuiteError("a baseline needs syrupy, which is disabled here: leave out -p no:syrupy") from None
    if not hasattr(snapshot, "use_extension"):
        raise SuiteError("the fixture 'snapshot' is not syrupy's: another plugin has taken its name; disable that one")
    return snapshot.use_extension(QsaBaselineExtension)  # type: ignore[no-any-return]

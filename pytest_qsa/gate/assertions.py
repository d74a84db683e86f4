"""One assertion of a suite, judged: the body of its generated test."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from ..captures import Capture
from ..common import QsaError, QsaWarning, SuiteError
from ..metrics import Series
from ..suite import Assertion, CheckpointAssertion, ExternalAssertion
from ..verdicts import (
    BASELINE_FOLDER,
    BASELINE_NAME,
    NO_LENIENCY,
    EvalFiles,
    Evidence,
    Judgement,
    Kind,
    Leniency,
    Measurement,
    QsaBaselineExtension,
    Release,
    Tolerance,
    Verdict,
    judge_against_baseline,
    judge_assertion,
    kept_release,
    name_for_class,
)
from .collection import QsaSuite, raise_at
from .gate import Gate
from .outcomes import GateFailure

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion


def run_assertion(request: pytest.FixtureRequest, suite: QsaSuite, index: int) -> None:
    """Judge one assertion of a suite; the body of its generated test.

    Raises:
        GateFailure: the verdict is red.
    """
    __tracebackhide__ = True
    gate: Gate = request.getfixturevalue("qsa_gate")
    assertion = suite.file.assertions[index]
    evidence: Evidence
    try:
        evidence = _evidence(gate, request, assertion)
    except QsaError as error:
        evidence = error
    test = gate.identity_of(request.node, assertion.id, partial(suite.file.bound_place_of, index))
    options = gate.options
    verdict = judge_assertion(assertion, evidence, test, options.today, ratchet=options.ratchet)
    capture = evidence.capture if isinstance(evidence, Measurement) else None
    verdict = gate.finish(request, verdict, capture)
    _warn_unused(request, suite, index, verdict)
    if verdict.failed:
        assert verdict.where is not None
        raise_at(verdict.where, assertion.id, GateFailure(verdict))
    # A warning that names the suite's line: pytest lists it, and the test passes.
    if verdict.kind is Kind.WARNED:
        request.node.warn(QsaWarning(f"{assertion.id}: {verdict.headline} ({verdict.where})"))


def _evidence(gate: Gate, request: pytest.FixtureRequest, assertion: Assertion) -> Evidence:
    """Return what an assertion is judged by; only a measured one needs a pass.

    Raises:
        QsaError: there is none.
    """
    if isinstance(assertion, CheckpointAssertion):
        return gate.files_of(request)
    subject = gate.subject_of(request.node)
    assert subject is not None
    if isinstance(assertion, ExternalAssertion):
        return EvalFiles(subject.folder, subject.name)
    capture = gate.capture_of(request)
    release = None
    if assertion.follows:
        assert subject.model is not None
        assert subject.model.previous is not None
        kept = kept_release(subject, request.node.path)
        release = Release(subject.model.previous, kept, partial(gate.previous_capture, request, subject))
    return Measurement(capture, partial(_against_own_baseline, request, capture), release)


def _warn_unused(request: pytest.FixtureRequest, suite: QsaSuite, index: int, verdict: Verdict) -> None:
    """Warn of waivers that soften nothing any more: they would hide the next excess."""
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


def _against_own_baseline(
    request: pytest.FixtureRequest,
    capture: Capture,
    series: Series,
    tolerance: Tolerance,
    per: str | None,
    leniency: Leniency,
) -> Judgement:
    """Hold a series against the baseline of a suite's assertion; as `HoldAgainstBaseline`.

    Raises:
        SuiteError: as `baseline_snapshot`.
    """
    snapshot = baseline_snapshot(request)
    if per is not None:
        stash, updating = request.node.stash, bool(request.config.getoption("update_snapshots", False))
        shared = stash[BASELINE_FOLDER] / f"{stash[BASELINE_NAME]}.json"
        made_with, data = capture.provenance.model, capture.provenance.data.fingerprint
        # syrupy asks the extension's class for the name, which finds it on the stash.
        stash[BASELINE_NAME] = name_for_class(shared, series, tolerance, data, made_with, updating=updating)
    return against_baseline(capture, snapshot, series, tolerance, per, leniency)


def against_baseline(
    capture: Capture,
    snapshot: SnapshotAssertion,
    series: Series,
    tolerance: Tolerance,
    per: str | None = None,
    leniency: Leniency = NO_LENIENCY,
) -> Judgement:
    """Hold a series of a capture against the next baseline of a test.

    Raises:
        BaselineError: there is no baseline yet, or it can't be compared.
    """
    made_with = capture.provenance.model
    if per is None:  # a baseline of all devices names none
        made_with = replace(made_with, device_class=None)
    return judge_against_baseline(series, tolerance, snapshot, capture.provenance.data.fingerprint, made_with, leniency)


def baseline_snapshot(request: pytest.FixtureRequest) -> SnapshotAssertion:
    """Return syrupy's fixture for this test, with our extension and our folder.

    Raises:
        SuiteError: syrupy is disabled, or another plugin's fixture has taken its name.
    """
    try:
        snapshot = request.getfixturevalue("snapshot")
    except pytest.FixtureLookupError:
        raise SuiteError("a baseline needs syrupy, which is disabled here: leave out -p no:syrupy") from None
    if not hasattr(snapshot, "use_extension"):
        raise SuiteError("the fixture 'snapshot' is not syrupy's: another plugin has taken its name; disable that one")
    return snapshot.use_extension(QsaBaselineExtension)  # type: ignore[no-any-return]

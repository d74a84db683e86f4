"""What a test judges: an assertion of a suite, in the body of its generated test; and the fixtures of tests in Python.

The fixtures `qsa` and `qsa_baseline` give the same engine, verdicts and report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from ..captures import LOGITS, Capture, Request, Site
from ..checkpoint import Files, Finding, examine, problems_of
from ..common import AnomalyError, QsaError, QsaWarning, SuiteError, phase, shown_path
from ..external import EvalFiles
from ..metrics import (
    METRICS,
    Bounds,
    Judge,
    NotMeasuredError,
    Parameters,
    Positions,
    Query,
    Reduce,
    Selection,
    Series,
    positions_of,
    query_of,
)
from ..suite import Assertion, CheckpointAssertion, ExternalAssertion, Subject, check_reference
from ..verdicts import (
    BASELINE_FOLDER,
    BASELINE_NAME,
    NO_LENIENCY,
    Budget,
    Evidence,
    Judgement,
    Kind,
    Leniency,
    Measurement,
    QsaBaselineExtension,
    Release,
    Tolerance,
    Verdict,
    concluded,
    judge_against_baseline,
    judge_assertion,
    judge_problems,
    kept_release,
    name_for_class,
    stopped,
    within_budget,
)
from .collection import EVERYTHING, QsaSuite, raise_at
from .comparisons import caller, unasserted
from .gate import Gate
from .reporting import GateFailure

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion


def run_assertion(request: pytest.FixtureRequest, suite: QsaSuite, index: int) -> None:
    """Judge one assertion of a suite; the body of its generated test.

    Raises:
        GateFailure: the verdict is red.
    """
    __tracebackhide__ = True
    gate: Gate = request.getfixturevalue("qsa_gate")
    assertion, subject = suite.file.assertions[index], gate.subject_of(request.node)
    with gate.status.of(subject.name if subject else suite.name):
        verdict = _verdict_on(gate, request, suite, index)
    _warn_unused(request, suite, index, verdict)
    if verdict.failed:
        assert verdict.where is not None
        raise_at(verdict.where, assertion.id, GateFailure(verdict))
    # A warning that names the suite's line: pytest lists it, and the test passes.
    if verdict.kind is Kind.WARNED:
        request.node.warn(QsaWarning(f"{assertion.id}: {verdict.headline} ({verdict.where})"))


def _verdict_on(gate: Gate, request: pytest.FixtureRequest, suite: QsaSuite, index: int) -> Verdict:
    assertion, options = suite.file.assertions[index], gate.options
    evidence: Evidence
    try:
        evidence = _evidence(gate, request, assertion)
    except QsaError as error:
        evidence = error
    phase(f"judging {assertion.id}")
    test = gate.identity_of(request.node, assertion.id, partial(suite.file.bound_place_of, index))
    verdict = judge_assertion(assertion, evidence, test, options.today, ratchet=options.ratchet)
    return gate.finish(request, verdict, evidence.capture if isinstance(evidence, Measurement) else None)


def _evidence(gate: Gate, request: pytest.FixtureRequest, assertion: Assertion) -> Evidence:
    """Return what an assertion is judged by; only a measured one needs a pass.

    Raises:
        QsaError: there is none.
    """
    subject = gate.subject_of(request.node)
    assert subject is not None
    if isinstance(assertion, CheckpointAssertion):
        return _files(gate, request, assertion.metric, assertion.parameters)
    if isinstance(assertion, ExternalAssertion):
        suite: QsaSuite = request.node.parent
        evals = EvalFiles(subject.folder, subject.name, subject.path, suite.file.boundary)
        with gate.told_once(request.node, f"the results of {subject.name} can't be read"):
            evals.check(assertion)
        return evals
    with gate.told_once(request.node, f"nothing was measured of {subject.name}"):
        capture = gate.capture_of(request)
    if subject.model is not None and METRICS[assertion.metric].against:
        check_reference(capture, subject.model, partial(gate.files_of, request))
    release = None
    if assertion.follows:
        assert subject.model is not None
        assert subject.model.previous is not None
        kept = kept_release(subject, request.node.path)
        release = Release(subject.model.previous, kept, partial(_previous_capture, gate, request, subject))
    return Measurement(capture, partial(_against_own_baseline, request, capture), release)


def _previous_capture(gate: Gate, request: pytest.FixtureRequest, subject: Subject) -> Capture:
    assert subject.model is not None
    with gate.told_once(request.node, f"nothing was measured of the last release, {subject.model.previous}"):
        return gate.previous_capture(request, subject)


def _files(gate: Gate, request: pytest.FixtureRequest, metric: str, parameters: Parameters) -> Files:
    """Return the files of a test's checkpoint, which its check has looked at.

    Raises:
        QsaError: they can't be read, or there are none.
    """
    subject = gate.subject_of(request.node)
    assert subject is not None
    with gate.told_once(request.node, f"the files of {subject.name} can't be read"):
        files = gate.files_of(request)
        examine(files, metric, **parameters)
    if metric in AGAINST and subject.model is not None and not subject.model.reference_is_copy:
        _check_other_folder(files)
    return files


AGAINST = ("checkpoint_settings", "checkpoint_unquantized")
"""The checks that do nothing but compare with the reference."""


def _check_other_folder(files: Files) -> None:
    own, reference = files.folder, files.reference
    same = reference is not None and (own.path.resolve(), own.gguf_file) == (
        reference.path.resolve(),
        reference.gguf_file,
    )
    if same and own.adapter_folder is None:
        raise AnomalyError(
            f"the reference, {shown_path(own.path)}, is the checkpoint itself: nothing is compared; name the original, "
            "or say with `models` which models of the run the assertion is for"
        )


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


class WatchedSeries(Series):
    """The series of a test, which calls `looked` when its values are read: a test has to look at some."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("values", "populations", "intervals", "problems"):
            vars(self).get("looked", bool)()
        return super().__getattribute__(name)


@dataclass(frozen=True)
class PlannedSelection(Selection):
    """A selection in a test: a second pass measures what no mark announced, and an error fails the test."""

    test: Qsa = field(kw_only=True)

    def series(
        self, metric: str, reduce: Reduce | None = None, positions: Positions | None = None, **parameters: Any
    ) -> Series:
        """Compute a metric; make another pass for a site that the first one left out."""
        capture = self.capture
        try:
            try:
                return self.test.watched(super().series(metric, reduce, positions, **parameters))
            except NotMeasuredError:
                needs = METRICS[metric].needs(self.site, positions_of(metric, self.site, positions), parameters)
                # With EVERYTHING, so that a second unannounced metric on this site needs no third pass.
                capture = self.test.recapture(Request(self.pattern, self.site, self.exclude, EVERYTHING | needs))
            selection = Selection(capture, self.pattern, self.site, self.exclude, self.test.judge_of(capture))
            return self.test.watched(selection.series(metric, reduce, positions, **parameters))
        except QsaError as error:
            where = positions_of(metric, self.site, positions)
            query = query_of(metric, self.site, self.pattern, self.exclude, parameters, where, reduce)
            raise self.test.stopped(error, query, capture) from None


class Qsa:
    """The fixture `qsa`: the subject's numbers. `qsa.output(regex).outlier_tokens() <= 1` is an assertion.

    `read`: the test has looked at a number.
    """

    def __init__(self, gate: Gate, request: pytest.FixtureRequest) -> None:
        self._gate = gate
        self._request = request
        self.read = False

    @property
    def capture(self) -> Capture:
        """The capture, with every number of the pass."""
        self.read = True
        return self.capture_at(None)

    def capture_at(self, site: Site | None) -> Capture:
        """Return the capture with the numbers of a site: those of weights may be in one of their own."""
        try:
            with self._gate.told_once(self._request.node, "nothing was measured"):
                return self._gate.capture_of(self._request, site)
        except QsaError as error:
            raise self.stopped(error) from None

    def watched(self, series: Series) -> Series:
        """Return a series that says when its values are looked at."""
        watched = WatchedSeries(**{each.name: getattr(series, each.name) for each in fields(series)})
        object.__setattr__(watched, "looked", partial(setattr, self, "read", True))
        return watched

    def recapture(self, need: Request) -> Capture:
        """Make another pass for what no mark announced."""
        return self._gate.recapture(self._request, need)

    def stopped(self, error: QsaError, query: Query | None = None, capture: Capture | None = None) -> GateFailure:
        """Make the failure of a test that an error stopped before it could compare."""
        return GateFailure(self._verdict(stopped(error, query), capture))

    def logits(self) -> Selection:
        """Select what the whole model predicts, for the metrics of its logits."""
        return self._select("", LOGITS, None)

    def input(self, layers: str, *, exclude: str | None = None) -> Selection:
        """Select the inputs of the layers that the regex finds."""
        return self._select(layers, "input", exclude)

    def output(self, layers: str, *, exclude: str | None = None) -> Selection:
        """Select the outputs of the layers that the regex finds."""
        return self._select(layers, "output", exclude)

    def weight(self, layers: str, *, exclude: str | None = None) -> Selection:
        """Select the weights of the layers that the regex finds."""
        return self._select(layers, "weight", exclude)

    @property
    def checkpoint(self) -> QsaCheckpoint:
        """The static checks, which read the checkpoint's files: `assert qsa.checkpoint.health() == 0`."""
        return QsaCheckpoint(self)

    def problems(self, metric: str, layers: str, exclude: str | None, parameters: Parameters) -> Series:
        """Run a static check; comparing its series judges it, without a pass."""
        try:
            files = _files(self._gate, self._request, metric, parameters)
            series, found = problems_of(files, metric, layers, exclude, **parameters)
        except QsaError as error:
            raise self.stopped(error) from None
        return self.watched(replace(series, judge=partial(self._judge_problems, found, files)))

    def _judge_problems(self, found: Sequence[Finding], files: Files, series: Series, bounds: Bounds) -> bool:
        __tracebackhide__ = True
        return self._finish(judge_problems(series, found, Budget.of(bounds, series.layers), files), None)

    def _select(self, layers: str, site: Site, exclude: str | None) -> Selection:
        capture = self.capture_at(site)
        return PlannedSelection(capture, layers, site, exclude, self.judge_of(capture), test=self)

    def judge_of(self, capture: Capture) -> Judge:
        """Return the function that judges the series of a capture."""
        return lambda series, bounds: self.conclude(
            lambda: within_budget(series, Budget.of(bounds, series.layers)), series, capture
        )

    def conclude(self, judge: Callable[[], Judgement], series: Series, capture: Capture) -> bool:
        """Judge, record, and say whether it passed.

        Raises:
            GateFailure: there is nothing sound to judge; such a comparison is never just false.
        """
        __tracebackhide__ = True
        subject, metric = self._gate.subject_of(self._request.node), METRICS.get(series.query.metric)
        try:
            if subject is not None and subject.model is not None and metric is not None and metric.against:
                check_reference(capture, subject.model, partial(self._gate.files_of, self._request))
            judgement = judge()
        except QsaError as error:
            judgement = stopped(error, series.query)
        return self._finish(judgement, capture)

    def _finish(self, judgement: Judgement, capture: Capture | None) -> bool:
        __tracebackhide__ = True
        self.read = True
        if problem := unasserted(caller()):
            judgement = stopped(AnomalyError(problem))
        verdict = self._verdict(judgement, capture)
        if verdict.failed and verdict.kind is not Kind.REGRESSION:
            raise GateFailure(verdict)
        return not verdict.failed

    def _verdict(self, judgement: Judgement, capture: Capture | None) -> Verdict:
        item, place = self._request.node, caller()
        test = self._gate.identity_of(item, item.name, lambda key: place)
        return self._gate.finish(self._request, concluded(judgement, test, capture), capture)


@dataclass(frozen=True)
class QsaCheckpoint:
    """The static checks of a test's subject. Each returns the number of problems of each layer."""

    test: Qsa

    def health(
        self,
        layers: str = ".",
        *,
        exclude: str | None = None,
        spread: float = 8.0,
        fused_equal: bool = False,
        tensor_parallel: int = 1,
    ) -> Series:
        """Count all that the other checks find; settings only where there is a reference."""
        parameters = {"spread": spread, "fused_equal": fused_equal, "tensor_parallel": tensor_parallel}
        return self.test.problems("checkpoint_health", layers, exclude, parameters)

    def scales(
        self, layers: str = ".", *, exclude: str | None = None, spread: float = 8.0, fused_equal: bool = False
    ) -> Series:
        """Count scales that are missing, unexpected, unsound or far from their siblings."""
        parameters = {"spread": spread, "fused_equal": fused_equal}
        return self.test.problems("checkpoint_scales", layers, exclude, parameters)

    def weights(self, layers: str = ".", *, exclude: str | None = None) -> Series:
        """Count quantized weights that are constant, and float tensors with NaN or Inf."""
        return self.test.problems("checkpoint_weights", layers, exclude, {})

    def formats(self, layers: str = ".", *, exclude: str | None = None, tensor_parallel: int = 1) -> Series:
        """Count layers that are quantized, or left, against the configuration, or that so many ranks can't share."""
        return self.test.problems("checkpoint_formats", layers, exclude, {"tensor_parallel": tensor_parallel})

    def keys(self, layers: str = ".", *, exclude: str | None = None) -> Series:
        """Count tensors that are missing or unexpected."""
        return self.test.problems("checkpoint_keys", layers, exclude, {})

    def settings(self, layers: str = ".", *, exclude: str | None = None) -> Series:
        """Count settings that differ from the reference's."""
        return self.test.problems("checkpoint_settings", layers, exclude, {})

    def unquantized(self, layers: str = ".", *, exclude: str | None = None, rel: float = 0.0) -> Series:
        """Count float tensors that differ from the reference's."""
        return self.test.problems("checkpoint_unquantized", layers, exclude, {"rel": rel})


class QsaBaseline:
    """What `qsa_baseline(rel=0.05)` returns: equal to a series that is within the tolerance of its baseline."""

    __hash__ = None  # type: ignore[assignment]
    # `Series.__eq__` leaves the comparison to an object with this attribute.
    judges_series = True

    def __init__(self, qsa: Qsa, tolerance: Tolerance, snapshot: SnapshotAssertion) -> None:
        self._qsa = qsa
        self._tolerance = tolerance
        self._snapshot = snapshot

    def __eq__(self, series: object) -> bool:
        if not isinstance(series, Series):
            return NotImplemented
        metric = METRICS.get(series.query.metric)
        if metric is not None and (problem := metric.allows_all(self._tolerance.abs)):
            raise AnomalyError(problem)
        capture = self._qsa.capture_at("weight" if series.query.site == "weight" else None)
        return self._qsa.conclude(
            lambda: against_baseline(capture, self._snapshot, series, self._tolerance), series, capture
        )

    def __repr__(self) -> str:
        return f"<{self._tolerance}>"

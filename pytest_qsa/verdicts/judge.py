"""An assertion and its evidence → a `Verdict`, for measured, static and external assertions alike. No pytest here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from ..captures import (
    CACHE_SITES,
    EXPERTS,
    GENERATED,
    Capture,
    ModelProvenance,
    Outline,
    Provenance,
    at_experts,
    match_layers,
)
from ..checkpoint import Files, Finding, by_kind, problems_of, suspicions_of
from ..common import AnomalyError, BaselineError, InfraError, QsaError, ToldError, counted, logger
from ..external import EvalFiles, eval_scores, widened_bounds
from ..metrics import METRICS, NO_BLOCKS, Query, Series, needs_sinks, no_experts
from ..suite import (
    Assertion,
    CheckpointAssertion,
    ExternalAssertion,
    Location,
    MeasuredAssertion,
    Place,
    Subject,
    name_problem,
)
from .baseline_file import BaselineFile, Tolerance, baseline_folder, check_comparable, read_baseline
from .budgets import Budget, budget_of, foresee_groups, limits_of
from .explainers import MOST_SUSPICIONS
from .judgement import (
    NO_LENIENCY,
    Judgement,
    Leniency,
    checked_series,
    joint_uses,
    settled,
    waiver_notes,
    within_budget,
)
from .tokens import sinks_behind
from .verdict import Kind, Limit, Verdict, failing


@dataclass(frozen=True)
class Release:
    """The last release. `name`: as `model.previous` writes it. `kept`: its capture, or its folder of baselines.

    `capture`: returns its capture, from the kept file or from a pass of its own; not called for baselines.
    """

    name: str
    kept: Path | None
    capture: Callable[[], Capture]

    def values(
        self, series: Series, data: str | None, id: str, measure: Callable[[Capture], Series]
    ) -> Mapping[str, float]:
        """Return layer → its value in the last release. `data`: the hash of the present tokens, or of the prompts.

        `id`: the assertion's, which names its baseline. `measure`: computes the same series of another capture.

        Raises:
            AnomalyError: it has no such number, or one of another definition, other tokens or other layers.
            InfraError: its capture can't be read or made.
        """
        if self.kept is not None and self.kept.is_dir():
            release, exact = self._baseline(self.kept / f"{id}.json"), None
        else:
            capture = self.capture()
            exact = measure(capture)
            release = BaselineFile.of(exact, _data_behind(exact, capture))
        try:
            check_comparable(series, release, data)
        except BaselineError as error:
            text = str(error).replace("the baseline", "the last release", 1)
            raise AnomalyError(f"model.previous '{self.name}': {text}") from None
        # a baseline holds rounded values; a capture gives exact ones
        return release.values if exact is None else dict(zip(exact.layers, exact.values.tolist(), strict=True))

    def _baseline(self, file: Path) -> BaselineFile:
        try:
            return read_baseline(file)
        except FileNotFoundError:
            raise AnomalyError(
                f"model.previous '{self.name}' has no baseline {file.name}: give the assertion a baseline and make "
                "that release's with --snapshot-update, or name its capture or checkpoint"
            ) from None
        except OSError as error:
            raise InfraError(f"model.previous '{self.name}': {file.name} can't be read: {error.strerror}") from None
        except BaselineError as error:
            raise AnomalyError(f"model.previous '{self.name}': {error}") from None


def kept_release(subject: Subject, suite: Path) -> Path | None:
    """Return where the last release's numbers are kept: a capture's file or a folder of baselines; None for neither."""
    assert subject.model is not None
    assert subject.model.previous is not None
    named = subject.folder / subject.model.previous
    # A checkpoint: its numbers take a pass of its own.
    if named.is_dir():
        return None
    if named.is_file():
        return named
    # As a name it is one of a subject: no other leads to its baselines.
    folder = baseline_folder(suite, replace(subject, name=subject.model.previous).baseline_name)
    return folder if name_problem(subject.model.previous) is None and folder.is_dir() else None


HoldAgainstBaseline = Callable[[Series, Tolerance, str | None, Leniency], Judgement]
"""Holds a series against the baseline of a test; the string names the class of devices that has its own baselines.

Raises `BaselineError` where there is no baseline yet, or where it can't be compared.
"""


@dataclass(frozen=True)
class Measurement:
    """Evidence for a measured assertion: a capture, and what it may be compared with.

    `release`: the last release, for bounds that follow it.
    """

    capture: Capture
    baseline: HoldAgainstBaseline
    release: Release | None = None


Evidence = Measurement | Files | EvalFiles | QsaError
"""What an assertion is judged by: numbers of a pass, a checkpoint's files, results of an eval, or why there is none."""


@dataclass(frozen=True)
class Identity:
    """What a verdict says of the test that it is about.

    `path`: the subject's. `command`: runs this test again. `place`: keys below an assertion → the line of the suite
    where that bound is set.
    """

    id: str = ""
    subject: str = ""
    path: str = ""
    command: str = ""
    place: Callable[[Location], Place | None] = lambda key: None


def judge_assertion(
    assertion: Assertion, evidence: Evidence, test: Identity, today: date, *, ratchet: bool = False
) -> Verdict:
    """Judge one assertion. What stops it, in the evidence or on the way, becomes a red verdict.

    `today`: the day for waivers. `ratchet`: whether to note the bounds that could be tighter.
    """
    try:
        judgement = _judgement(assertion, evidence, Leniency(assertion.waivers, today))
    except QsaError as error:
        judgement = stopped(error, assertion.query)
    if assertion.level == "warn" and judgement.kind is Kind.REGRESSION:  # one that saw nothing sound still fails
        judgement = replace(judgement, kind=Kind.WARNED)
    capture = evidence.capture if isinstance(evidence, Measurement) else None
    schemes = capture.schemes if capture else None
    limits = limits_of(assertion, judgement.rows, schemes, test.place) if ratchet else ()
    return concluded(judgement, test, capture, reason=assertion.reason, limits=limits)


def foresee(assertion: MeasuredAssertion, outline: Outline) -> None:
    """Check what an assertion asks for against the layers of its model, before a weight is read.

    Raises:
        AnomalyError: there would be nothing sound to judge; in the words of the judgement.
    """
    request, query = assertion.request, assertion.query
    layers = outline.find(request)
    if needs_sinks(assertion.metric, query.positions) and outline.blocks == ():
        raise AnomalyError(NO_BLOCKS)
    if EXPERTS in request.statistics and outline.mixtures is not None:
        apart = [layer for layer in layers if request.site != "input" or layer not in outline.mixtures]
        if apart:
            raise no_experts(request.site, apart[0])
    if METRICS[assertion.metric].per == "layer":
        # Where weights are asked for, or experts by themselves, some of the layers may have no number.
        measured = request.site != "weight" and not at_experts(request.site, request.statistics)
        foresee_groups(assertion.stated, layers, measured=measured)


def _judgement(assertion: Assertion, evidence: Evidence, leniency: Leniency) -> Judgement:
    """Judge by the type of the assertion: the one place that asks for it.

    Raises:
        QsaError: there is nothing sound to judge.
    """
    match assertion, evidence:
        # First: an error may come in the place of any evidence.
        case _, QsaError():
            raise evidence
        case CheckpointAssertion(), Files():
            return _of_files(assertion, evidence, leniency)
        case ExternalAssertion(), EvalFiles():
            return judge_evals(assertion, evidence, leniency)
        case MeasuredAssertion(), Measurement():
            return _of_measurement(assertion, evidence, leniency)
    raise TypeError(f"{type(assertion).__name__} can't be judged by {type(evidence).__name__}")


def concluded(
    judgement: Judgement,
    test: Identity,
    capture: Capture | None = None,
    *,
    reason: str | None = None,
    limits: Sequence[Limit] = (),
) -> Verdict:
    """Make the verdict of a test from what its numbers came to. `capture`: where the numbers come from, if from one."""
    return Verdict(
        id=test.id,
        subject=test.subject,
        kind=judgement.kind,
        headline=judgement.headline,
        query=judgement.query,
        rows=judgement.rows,
        bound=judgement.bound,
        where=test.place(judgement.key),
        reason=reason,
        positions=judgement.query.get("positions") if judgement.rows else None,
        sinks=sinks_behind(capture, judgement.query).summary() if capture else "",
        run=_run_of(judgement, test, capture),
        command=test.command,
        accept=f"{test.command} --snapshot-update" if judgement.updatable else "",
        updatable=judgement.updatable,
        since=judgement.since,
        findings=judgement.findings,
        waivers=judgement.waivers,
        limits=limits,
        told_by=judgement.told_by,
    )


def _run_of(judgement: Judgement, test: Identity, capture: Capture | None) -> Provenance:
    """Return where the numbers come from, with the model that the reference's come from."""
    if capture is not None and capture.reference is not None:
        theirs = capture.reference.provenance
        return replace(capture.provenance, reference=theirs.model, rows=theirs.rows)
    if capture is not None:
        return capture.provenance
    # Results of an eval name no model.
    return judgement.run if judgement.run.model.path else replace(judgement.run, model=ModelProvenance(test.path))


def stopped(error: QsaError, query: Query | None = None) -> Judgement:
    """Turn an error into the judgement of the assertion that it stopped."""
    kind = Kind(error.kind) if error.kind in Kind.__members__ else Kind.INFRA
    asked = query.plain() if query else {}
    # --snapshot-update mends what is wrong with a baseline, and no other error.
    told_by = error.by if isinstance(error, ToldError) else ""
    return Judgement(kind, str(error), asked, updatable=isinstance(error, BaselineError), told_by=told_by)


def _of_files(assertion: CheckpointAssertion, files: Files, leniency: Leniency) -> Judgement:
    series, found = problems_of(files, assertion.metric, assertion.layers, assertion.exclude, **assertion.parameters)
    series = series.folded(assertion.over)
    series.check()
    budget = budget_of(assertion.stated, series.layers, None)
    return judge_problems(series, found, budget, files, leniency)


def judge_problems(
    series: Series, found: Sequence[Finding], budget: Budget, files: Files, leniency: Leniency = NO_LENIENCY
) -> Judgement:
    """Hold the number of problems of each layer against a budget; the judgement carries the findings.

    Raises:
        AnomalyError: there is no layer.
    """
    judgement = within_budget(series, budget, leniency)
    notes = [finding for finding in found if finding.note]
    noted = f"; {counted(len(notes), 'note')}" if notes else ""
    headline = f"{len(series.layers)} layers without a problem{_not_checked(series, files)}{noted}"
    if problems := [finding for finding in found if not finding.note]:
        layers = {finding.layer for finding in problems}
        many = f"{counted(len(problems), 'problem')} in {len(layers)} of {len(series.layers)} layers"
        suspected = _suspected(series, layers, files)
        place = _placed(problems[0])
        if any(text.startswith(f"{problems[0].layer} ") for text in suspected):  # named already
            place = place.replace(f"{problems[0].layer}.", "its ", 1)
        first, counts = f"{place}: {problems[0].what}", f"{many} ({judgement.bound})"
        # What a reader needs stands first: pytest's summary and a list of tests cut the line.
        if suspected:
            headline = "; ".join([*suspected, counts, f"the first: {first}"])
        else:
            headline = f"{first}; {'the first of ' if len(problems) > 1 else ''}{counts}"
        out = [row for row in judgement.rows if row.excess]
        headline += waiver_notes(judgement.waivers, out, failing(out))
    return replace(judgement, headline=headline, findings=(*problems, *notes), run=_run_of_files(files))


def _placed(finding: Finding) -> str:
    """Name a finding's tensor, or the file and the key of a setting: `config.json: rms_norm_eps`."""
    own_file = finding.file.endswith(".json") and finding.file != finding.tensor
    return f"{finding.file}: {finding.tensor}" if own_file else finding.tensor


def _suspected(series: Series, layers: Collection[str], files: Files) -> list[str]:
    """Say what the weights of layers with problems are in the reference; else of which kinds many layers are."""
    try:
        found = [each.what for each in suspicions_of(files, layers)[:MOST_SUSPICIONS]]
    except QsaError as error:  # the findings say what is damaged
        logger.debug("no weight was looked for in the reference: %s", error)
        found = []
    return found or list(filter(None, [by_kind(layers, series.layers)]))


def _not_checked(series: Series, files: Files) -> str:
    """Say what a passed check did not look at."""
    notes = []
    if not files.format.name:
        notes.append(f"layers were only compared with their siblings, for the format {files.format.label} is not known")
    if series.query.metric == "checkpoint_health" and files.reference is None:
        notes.append("settings were not compared, for the suite names no model.reference")
    return "".join(f"; {note}" for note in notes)


def _run_of_files(files: Files) -> Provenance:
    """Return what the checks read: the folder, how many files and tensors, the declared format, the reference."""
    return Provenance(
        files.model,
        reference=ModelProvenance(str(files.reference.path)) if files.reference else None,
    )


def judge_evals(assertion: ExternalAssertion, evals: EvalFiles, leniency: Leniency) -> Judgement:
    """Judge what another program measured.

    Raises:
        InfraError: a file is missing.
        AnomalyError: there is nothing sound in it, or nothing that can be compared.
    """
    scores, read = eval_scores(assertion, evals)
    names = [each.score.name for each in scores]
    series = Series(names, np.array([each.value for each in scores]), assertion.query)
    series.check()
    budget = budget_of(assertion.stated, names, None)
    # The text has the bound as the suite states it, for the widened ones differ from task to task.
    text = budget.text + (f" ± {assertion.sigmas:g} standard errors" if assertion.sigmas else "")
    bounds = widened_bounds(budget.bounds, scores, assertion)
    details = {each.score.name: each.detail for each in scores}
    judgement = within_budget(series, replace(budget, bounds=bounds, text=text), leniency, details)
    return replace(judgement, run=Provenance(evals=read))


def _of_measurement(assertion: MeasuredAssertion, evidence: Measurement, leniency: Leniency) -> Judgement:
    capture, known = settled(assertion, evidence.capture)
    series = checked_series(assertion, capture)
    judgement = _held(assertion, series, capture, evidence, leniency, known)
    left_out = left_out_text(series.left_out) + _without_cache(assertion, evidence.capture)
    return replace(judgement, headline=f"{judgement.headline}{left_out}")


def _without_cache(assertion: MeasuredAssertion, capture: Capture) -> str:
    """Name the layers that an assertion asks for and that have no such site."""
    left = capture.uncached if assertion.site in CACHE_SITES else {}
    own = [name for name in capture.modules if name in left]  # which know their kinds
    if not (names := match_layers(own, assertion.layers, assertion.exclude)):
        return ""
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"; left out: {names[0]}{more}, for it {left[names[0]]}"


def left_out_text(layers: Sequence[str]) -> str:
    """Say which layers of a portable name have no number; empty for none."""
    if not layers:
        return ""
    more = f" (and {len(layers) - 1} more)" if layers[1:] else ""
    return f"; left out: {layers[0]}{more}, which the model never calls, or not with tokens"


def _held(
    assertion: MeasuredAssertion,
    series: Series,
    capture: Capture,
    evidence: Measurement,
    leniency: Leniency,
    known: str,
) -> Judgement:
    bounded = None
    if assertion.stated:
        previous = _previous(assertion, series, evidence) if assertion.follows else None
        budget = budget_of(assertion.stated, series.layers, capture.schemes, previous)
        bounded = within_budget(series, budget, leniency, dict.fromkeys(series.layers, known) if known else None)
    if assertion.baseline is None or (bounded is not None and bounded.failed):
        assert bounded is not None  # an assertion has a bound or a baseline
        return bounded
    kept = assertion.baseline
    compared = evidence.baseline(series, Tolerance(kept.rel, kept.abs, kept.direction), kept.per, leniency)
    if bounded is None:
        return compared
    # A waived excess of the bound must not hide a baseline that fails.
    shown = bounded if bounded.kind is Kind.WARNED and not compared.failed else compared
    return replace(shown, waivers=joint_uses(bounded, compared))


def _data_behind(series: Series, capture: Capture) -> str | None:
    """Return the hash of what a series was measured on: the tokens of the data, or the prompts that were answered."""
    data = capture.provenance.data
    return data.prompts if series.query.metric == GENERATED.name else data.fingerprint


def _previous(assertion: MeasuredAssertion, series: Series, evidence: Measurement) -> Mapping[str, float]:
    assert evidence.release is not None
    return evidence.release.values(
        series,
        _data_behind(series, evidence.capture),
        assertion.id,
        lambda release: checked_series(assertion, release),
    )

"""Checkpoints, captures and reports measured alike, for one table: `qsa compare`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from .. import engine
from ..captures import LOGITS, Capture, PartialSums, Request
from ..checkpoint import capture_weights, open_folder
from ..common import AnomalyError, InfraError, QsaError, SuiteError, UnloadableFormatError, shown_path, status
from ..external import EvalFiles
from ..metrics import METRICS, NotMeasuredError, Series
from ..report import Column, Size, read_report, to_plain
from ..suite import (
    ASSERTIONS,
    Anatomy,
    Assertion,
    Captures,
    Checkpoint,
    CheckpointAssertion,
    ExternalAssertion,
    MeasuredAssertion,
    Model,
    NamedSubject,
    SuiteFile,
    check_execution,
    check_reference,
    files_of,
    subject_on,
)
from ..verdicts import (
    Evidence,
    Identity,
    Measurement,
    Verdict,
    checked_series,
    concluded,
    judge_assertion,
    stopped,
    unbounded,
)
from .checkpoint_sizes import sizes_of
from .diff.sides import tokens_hash

OF_MODEL = ("kl_divergence", "margin_ratio", "overlap", "ln_ppl_ratio")
BLOCKS, WEIGHTS = "sqnr_of_blocks", "sqnr_of_weights"
"""What is compared where no suite says it: predictions, the outputs of blocks, and weights."""


@dataclass(frozen=True)
class Target:
    """One of the things that are compared. `name`: of its column; empty where the user gave none."""

    name: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `[NAME=]PATH`.

        Raises:
            SuiteError: it is a suite.
        """
        name, equals, path = text.partition("=")
        target = cls(name, path) if equals and not Path(text).exists() else cls("", text)
        if Path(target.path).suffix in (".yaml", ".yml"):
            raise SuiteError(f"{target.path} is a suite, and no TARGET: name the checkpoints, and give it with --suite")
        return target

    @property
    def is_capture(self) -> bool:
        """Whether it is the file of a capture."""
        return self.path.endswith(".qsa") and not Path(self.path).is_dir()

    @property
    def is_report(self) -> bool:
        """Whether it is a report."""
        return self.path.partition("::")[0].endswith(".json") and not Path(self.path).is_dir()

    @property
    def is_checkpoint(self) -> bool:
        """Whether it has to be measured: a folder, a GGUF file or a hub id."""
        return not self.is_capture and not self.is_report

    @property
    def label(self) -> str:
        """The name of its column."""
        path = Path(self.path)
        return self.name or (path.stem if path.suffix in (".qsa", ".gguf") else path.name) or self.path


@dataclass(frozen=True)
class Measurer:
    """Measures targets alike.

    `file`: the suite, or the sections alone where `stated` is false; None where no target needs one. `cache`: of
    captures. `more`: metrics of predictions that are measured beside the usual ones where no suite says what.
    """

    file: SuiteFile | None
    stated: bool
    cache: Path | None = None
    allow_code: bool = False
    more: tuple[str, ...] = ()

    def columns(self, targets: Sequence[Target]) -> Iterator[Column]:
        """Yield the column of each target, of a report one for each of its subjects.

        Raises:
            SuiteError: a file is no capture or report.
            InfraError: one can't be read.
            AnomalyError: there is nothing in one that could be compared.
        """
        for target in targets:
            if target.is_report:
                yield from report_columns(target)
            else:
                yield self._of_capture(target) if target.is_capture else self._of_checkpoint(target)

    def _of_checkpoint(self, target: Target) -> Column:
        """Return the column of a checkpoint; of one that can't even be opened a note says why, and the others go on."""
        try:
            return self._measured(target)
        except (InfraError, AnomalyError) as error:
            return Column(target.label, [], notes=[f"{target.label}: {error.kind}: {error}"], stopped=error.kind)

    def _of_capture(self, target: Target) -> Column:
        capture = Capture.load(target.path)
        provenance = capture.provenance
        data = replace(provenance.data, fingerprint=tokens_hash(capture))
        capture = replace(capture, provenance=replace(provenance, data=data))
        found = [
            _plain(assertion, capture, target.label)
            for assertion in self._assertions(_anatomy_of(capture))
            if isinstance(assertion, MeasuredAssertion)
            and assertion.is_for(target.label)
            and _holds(capture, assertion)
        ]
        if not found:
            wanted = "the suite measures" if self.stated else "is compared without a suite (give --suite)"
            raise AnomalyError(f"{shown_path(Path(target.path))} holds nothing that {wanted}")
        return Column(target.label, found)

    def _assertions(self, anatomy: Anatomy, compare: str = "layers") -> Sequence[Assertion]:
        """Return the assertions of the suite, or what is compared without one. `compare`: as `Relation.compare`."""
        if self.file is not None and self.stated:
            return self.file.assertions
        found = [_unbounded(name, name, site=LOGITS, layers="") for name in (*OF_MODEL, *self.more)]
        if compare != LOGITS and anatomy.blocks:
            found.append(_unbounded(BLOCKS, "sqnr", site="output", layers=anatomy.block_pattern))
        if compare == "layers" and anatomy.linears:
            found.append(_unbounded(WEIGHTS, "weight_sqnr", site="weight", layers=anatomy.linear_pattern))
        return found

    def _measured(self, target: Target) -> Column:
        assert self.file is not None
        subject = _subject(self.file, target)
        notes: list[str] = []
        assertions = self._of_subject(subject, target.label, notes)
        evidence = _Evidence(self, subject, assertions)
        results = [to_plain(evidence.verdict(assertion, target.label)) for assertion in assertions]
        size = size_of(subject.path, subject.model, subject.base)
        return Column(target.label, results, size, notes=notes)

    def _of_subject(self, subject: NamedSubject, name: str, notes: list[str]) -> list[Assertion]:
        """Return the assertions that make sense of a subject; a note says which don't."""
        same = isinstance(subject.reference, NamedSubject) and subject.reference.path == subject.path
        if self.stated:
            found = [each for each in self._assertions(Anatomy((), ())) if each.is_for(name)]
        else:
            compare = "layers"
            if isinstance(subject.reference, Path):
                # The file of a recorded reference holds no weights.
                compare = "blocks"
            elif isinstance(subject.reference, NamedSubject) and not same:
                relation = files_of(subject).relation
                compare = relation.compare
                left = {"blocks": "weights are not compared", "logits": "only predictions are compared"}
                notes += [f"{name}: {relation.why}: {left[compare]}"] if compare in left else []
            found = list(self._assertions(engine.anatomy(subject.model, subject.path, subject.base), compare))
        if not same or subject.model.reference_is_copy:
            return found
        notes.append(f"{name} is the reference: it isn't compared with itself")
        return [each for each in found if each.metric not in METRICS or not METRICS[each.metric].against]


def _unbounded(name: str, metric: str, **keys: Any) -> MeasuredAssertion:
    """Return an assertion without a bound, which validation would demand."""
    made = ASSERTIONS[metric].model_construct(id=name, metric=metric, **keys)
    assert isinstance(made, MeasuredAssertion)
    return made


def _anatomy_of(capture: Capture) -> Anatomy:
    """Return the blocks of a capture's model, and the layers in them whose weights were measured."""
    weights = [layer for layer, site in capture.sites if site == "weight"]
    inside = [layer for layer in weights if any(layer.startswith(f"{block}.") for block in capture.blocks)]
    return Anatomy(capture.blocks, inside or weights)


def _holds(capture: Capture, assertion: MeasuredAssertion) -> bool:
    """Say whether a capture can answer an assertion: any other number is no fault of the model's."""
    try:
        checked_series(assertion, capture)
    except NotMeasuredError:
        return False
    except QsaError:
        return assertion.site == LOGITS or any(site == assertion.site for _, site in capture.sites)
    return True


def _subject(file: SuiteFile, target: Target) -> NamedSubject:
    """Return a target as the subject of a suite. A GGUF file is its folder's model."""
    path = Path(os.path.expanduser(target.path))
    gguf = path.name if path.suffix == ".gguf" and path.is_file() else None
    checkpoint = Checkpoint.parse(f"{target.label}={path.parent if gguf else target.path}")
    subject = subject_on(file, checkpoint).named
    named = subject.model.gguf_file
    if gguf is None and named is not None and (Path(subject.path) / named).is_file():
        gguf = named
    return replace(subject, model=subject.model.model_copy(update={"gguf_file": gguf}))


def size_of(path: str, model: Model, base: str = "") -> Size | None:
    """Return the size of a checkpoint's files; None where they can't be read."""
    try:
        sizes = sizes_of(open_folder(path, model.revision, model.gguf_file, base), model)
    except QsaError:
        return None
    return Size(sizes.stored, sizes.parameters)


@dataclass(frozen=True)
class _Evidence:
    """What the assertions on a subject are judged by: captures, made when the first one needs them, and its files."""

    measurer: Measurer
    subject: NamedSubject
    assertions: Sequence[Assertion]
    _captures: dict[str, Capture | QsaError] = field(default_factory=dict)

    def verdict(self, assertion: Assertion, name: str) -> Verdict:
        """Return what an assertion comes to."""
        try:
            if isinstance(assertion, MeasuredAssertion):
                return judged_plainly(assertion, self._capture_of(assertion), name)
            return judge_assertion(assertion, self._files(assertion), Identity(assertion.id, name), date.today())
        except QsaError as error:
            return concluded(stopped(error, assertion.query), Identity(assertion.id, name, self.subject.path))

    def _files(self, assertion: Assertion) -> Evidence:
        file = self.measurer.file
        assert file is not None
        if isinstance(assertion, CheckpointAssertion):
            return files_of(self.subject, self.measurer.cache)
        assert isinstance(assertion, ExternalAssertion)
        return EvalFiles(self.subject.folder, self.subject.name, self.subject.path, file.boundary)

    def _capture_of(self, assertion: MeasuredAssertion) -> Capture:
        """Return the capture that answers an assertion.

        Raises:
            QsaError: there is none.
        """
        source = self.subject.sources([assertion.request])[-1][0].named
        try:
            capture = self._captured(source.key, source, self._needs_of(source))
        except UnloadableFormatError:
            if assertion.site != "weight":
                raise
            # not under the key of what is always read from the files, as weight_gain is: that asks for other numbers
            weights = [each for each in self._asked if each.site == "weight"]
            capture = self._captured(f"{source.key}, for no loader", self.subject.of_files, weights)
        if not source.files_only:
            check_execution(capture.provenance.execution, source.model)
        if METRICS[assertion.metric].against:
            check_reference(capture, source.model, partial(files_of, source, self.measurer.cache))
        return capture

    @property
    def _asked(self) -> list[Request]:
        return [each.request for each in self.assertions if isinstance(each, MeasuredAssertion)]

    def _needs_of(self, source: NamedSubject) -> list[Request]:
        sources = self.subject.sources(self._asked)
        return [need for each, needs in sources if each.key == source.key for need in needs]

    def _captured(self, key: str, source: NamedSubject, needs: Sequence[Request]) -> Capture:
        if key not in self._captures:
            try:
                self._captures[key] = self._made(key, source, needs)
            except QsaError as error:
                self._captures[key] = error
        found = self._captures[key]
        if isinstance(found, QsaError):
            raise found
        return found

    def _made(self, key: str, source: NamedSubject, needs: Sequence[Request]) -> Capture:
        def make(plan: Sequence[Request], sums: PartialSums | None) -> Capture:
            with status(source.name) as progress:
                if source.files_only:
                    return capture_weights(files_of(source), plan, progress=progress)
                share = engine.SampleShare(sums=sums)
                code = self.measurer.allow_code
                return engine.capture_subject(source, plan, allow_code=code, progress=progress, share=share)

        return Captures(cache=self.measurer.cache).get(key, source, needs, make)


def judged_plainly(assertion: MeasuredAssertion, capture: Capture, name: str) -> Verdict:
    """Judge an assertion by the numbers that it states; baselines and the last release are of one model alone."""
    test = Identity(assertion.id, name)
    if assertion.stated and not assertion.follows:
        alone = assertion.model_copy(update={"baseline": None})
        return judge_assertion(alone, Measurement(capture, _no_baseline), test, date.today())
    try:
        judgement = unbounded(checked_series(assertion, capture))
    except QsaError as error:
        judgement = stopped(error, assertion.query)
    return concluded(judgement, test, capture)


def _no_baseline(series: Series, *_: object) -> Any:
    raise InfraError(f"{series.query.metric} is held against no baseline here")


def _plain(assertion: MeasuredAssertion, capture: Capture, name: str) -> dict[str, Any]:
    return to_plain(judged_plainly(assertion, capture, name))


def report_columns(target: Target) -> list[Column]:
    """Return the subjects of a report as columns; `PATH::SUBJECT` picks one.

    Raises:
        SuiteError: it is no report, is of another version, or has no such subject.
        InfraError: it can't be read, or was changed after it was written.
    """
    name, _, wanted = target.path.partition("::")
    report = read_report(Path(name))
    if report is None:
        raise SuiteError(f"{shown_path(Path(name))}: no report.json of this program")
    try:
        by_subject: dict[str, list[Mapping[str, Any]]] = {}
        for result in report["results"]:
            by_subject.setdefault(str(result["subject"]), []).append(_known(result))
        if wanted and wanted not in by_subject:
            raise SuiteError(f"{shown_path(Path(name))} has no subject '{wanted}'; it has {', '.join(by_subject)}")
        chosen = {wanted: by_subject[wanted]} if wanted else by_subject
        sizes, machine = report["session"].get("sizes") or {}, str(report["session"].get("machine") or "")
        return [
            Column(
                target.name if target.name and len(chosen) == 1 else subject,
                results,
                Size(*sizes[subject]) if subject in sizes else None,
                machine,
            )
            for subject, results in chosen.items()
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, SuiteError):
            raise
        raise SuiteError(f"{shown_path(Path(name))}: a damaged report.json: {type(error).__name__}: {error}") from None


def _known(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a result that has what a comparison reads; a KeyError says what an old or damaged one lacks."""
    for row in result["rows"]:
        _ = row["layer"], row["depth"], float(row["value"])
    _ = result["id"], result["kind"], result["headline"], result["failed"], result["query"].get("metric")
    return result


def distinct(columns: Sequence[Column]) -> list[Column]:
    """Return the columns with names that are all different: of equal ones each gets a number."""
    names = [column.name for column in columns]
    found, seen = [], dict.fromkeys(names, 0)
    for column in columns:
        seen[column.name] += 1
        again = names.count(column.name) > 1
        found.append(replace(column, name=f"{column.name}.{seen[column.name]}") if again else column)
    return found

"""The gate of one pytest session: what the selected tests need, the captures that answer them, and their verdicts."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import shlex
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ..captures import COUNTS, UNKNOWN_RUN, Capture, ModelProvenance, PartialSums, Provenance, Request
from ..checkpoint import Files
from ..common import QsaUnplannedCaptureWarning, QsaWarning, SuiteError, progress_bar, shown_path
from ..metrics import METRICS
from ..report import failure_text, properties_of
from ..suite import (
    Captures,
    Checkpoint,
    Data,
    Memory,
    Model,
    Subject,
    SuiteFile,
    check_execution,
    files_of,
    load_suite,
    previous_of,
)
from ..verdicts import (
    Kind,
    Verdict,
    beside_reference,
    diagnosed,
    kept_release,
    provenance_of,
    sinks_behind,
    token_evidence,
)
from ._compat import fixture_source
from .collection import QsaSuite
from .needs import requests_of
from .options import Options

UNANNOUNCED = pytest.StashKey[set[tuple[str, str]]]()
"""On an item: the sites that it asked for without a mark, each warned of once."""
VERDICTS = pytest.StashKey[list[Verdict]]()


class GateFailure(AssertionError):  # noqa: N818 - as pytest says it: a failure, not an error
    """A verdict that fails its test; its text is what the terminal shows."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(failure_text(verdict))
        self.verdict = verdict


@dataclass
class Gate:
    """What lives as long as the pytest session."""

    config: pytest.Config
    options: Options
    captures: Captures
    _config_suite: SuiteFile | None = None
    _needs: dict[str, list[Request]] | None = None
    _fixtures: dict[str, Any] = field(default_factory=dict)
    _files: dict[str, Files] = field(default_factory=dict)
    _releases: dict[Path, Capture] = field(default_factory=dict)
    _origins: MutableMapping[Capture, dict[str, str]] = field(default_factory=weakref.WeakKeyDictionary)

    def subject_of(self, item: pytest.Item) -> Subject | None:
        """Return the subject that an item tests; None for an item that is no gate."""
        checkpoint = checkpoint_of(item)
        if isinstance(item.parent, QsaSuite):
            subject = _subject(item.parent.file, checkpoint)
            return subject if subject.model else replace(subject, fixture=fixture_source(item, "qsa_model"))
        if "qsa" not in getattr(item, "fixturenames", ()):
            return None
        suite = self.config_suite
        if suite is not None:
            return _subject(suite, checkpoint)
        model = Model(path=checkpoint.path) if checkpoint else None
        name = (checkpoint.name if checkpoint else None) or (model.id if model else "model")
        source = "" if model else fixture_source(item, "qsa_model")
        return Subject(name, model, Data(), Memory(), item.path.parent, checkpoint.path if checkpoint else None, source)

    @property
    def config_suite(self) -> SuiteFile | None:
        """The file of `--qsa-config`, which gives Python tests their subject."""
        if self._config_suite is None and self.options.config is not None:
            self._config_suite = load_suite(self.options.config, self.options.overrides)
        return self._config_suite

    def capture_of(self, request: pytest.FixtureRequest) -> Capture:
        """Return the capture for a test: one pass for all selected tests of its subject.

        Raises:
            QsaError: the pass could not be made.
        """
        subject = self.subject_of(request.node)
        assert subject is not None
        self._claim_baselines(request.node, subject)
        requests_of(request.node)
        if self._needs is None:
            self._needs = self._plan(request.session.items)
        key, needs = self._key(request, subject), self._needs.get(subject.key, [])
        capture = self.captures.get(key, subject, needs, lambda plan, sums: self._make(request, subject, plan, sums))
        if subject.model is not None:
            check_execution(capture.provenance.execution, subject.model)
        return capture

    def previous_capture(self, request: pytest.FixtureRequest, subject: Subject) -> Capture:
        """Return the capture of the last release: one file, or one pass, for all tests whose bounds follow it.

        Raises:
            QsaError: as `capture_of`.
        """
        assert self._needs is not None
        release = previous_of(subject)
        kept = kept_release(subject, request.node.path)
        if kept is not None:
            if kept not in self._releases:
                self._releases[kept] = Capture.load(kept)
            return self._releases[kept]
        needs = self._needs[release.key]
        return self.captures.get(
            release.key, release, needs, lambda plan, sums: self._make(request, release, plan, sums)
        )

    def files_of(self, request: pytest.FixtureRequest) -> Files:
        """Return the files of a test's checkpoint, for static checks; nothing is loaded.

        Raises:
            InfraError: there is no checkpoint here.
        """
        subject = self.subject_of(request.node)
        assert subject is not None
        self._claim_baselines(request.node, subject)
        key = f"{subject.key}:{subject.model.reference if subject.model else None}"
        if key not in self._files:
            self._files[key] = files_of(subject)
        return self._files[key]

    def _key(self, request: pytest.FixtureRequest, subject: Subject) -> str:
        """Return the name of the subject's capture: for a model of a fixture, of that very model and its batches."""
        if subject.model is not None:
            return subject.key
        model, batches = request.getfixturevalue("qsa_model"), request.getfixturevalue("qsa_batches")
        if model is None:
            raise SuiteError("there is no subject: give --qsa-config, --qsa-model, or a session fixture qsa_model")
        key = f"{subject.key}:{id(model)}:{id(batches)}"
        if key not in self._fixtures:
            self._fixtures[key] = batches
            with contextlib.suppress(TypeError):  # what is no module is told by the pass
                weakref.finalize(model, self._forget, key)
        return key

    def _forget(self, key: str) -> None:
        self._fixtures.pop(key, None)
        self.captures.forget(key)

    def _claim_baselines(self, item: pytest.Item, subject: Subject) -> None:
        """Tell the baseline extension where this item's baselines lie, whether it has one or has just lost it."""
        if self.options.refused_update:
            raise SuiteError(self.options.refused_update)
        from ..verdicts import HOME, NAME, baseline_folder

        item.stash[HOME] = baseline_folder(item.path, subject.name)
        item.stash[NAME] = plain_name(item)

    def _plan(self, items: Sequence[pytest.Item]) -> dict[str, list[Request]]:
        """Collect what all selected tests need, by subject; only now, so that every deselection is known."""
        needs: dict[str, list[Request]] = {}
        for _, subject, requests in self.planned(items):
            needs.setdefault(subject.key, []).extend(requests)
        return needs

    def planned(self, items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, Subject, list[Request]]]:
        """Yield what each test needs of its subject, and of the last release where a bound follows it."""
        for item in items:
            subject = self.subject_of(item)
            if subject is not None:
                with contextlib.suppress(SuiteError):  # a wrong mark fails its own test
                    requests = self._with_distributions(requests_of(item))
                    yield item, subject, requests
                    if follows_checkpoint(item, subject):
                        yield item, previous_of(subject), requests

    def _with_distributions(self, requests: Sequence[Request]) -> list[Request]:
        """Add the counts that a report which is always written shows for every layer."""
        more = {COUNTS} if self.options.report == "always" else set()
        return [replace(request, statistics=request.statistics | more) for request in requests]

    def recapture(self, request: pytest.FixtureRequest, need: Request) -> Capture:
        """Make the second pass that a Python test without a mark costs, and say how to avoid it."""
        subject = self.subject_of(request.node)
        assert subject is not None
        key = self._key(request, subject)
        warned = request.node.stash.setdefault(UNANNOUNCED, set())
        if (need.pattern, need.site) not in warned:
            warned.add((need.pattern, need.site))
            self._warn_unannounced(request, need)
        if known := self.captures.covering(key, [need]):
            return known
        return self.captures.extend(key, subject, [need], lambda plan, sums: self._make(request, subject, plan, sums))

    @staticmethod
    def _warn_unannounced(request: pytest.FixtureRequest, need: Request) -> None:
        request.node.warn(
            QsaUnplannedCaptureWarning(
                f"{request.node.name} asked for the {need.site} of '{need.pattern}' unannounced, "
                "which takes a second pass: "
                f"mark it with @pytest.mark.qsa(layers=r'{need.pattern}', site='{need.site}')"
            )
        )

    def _make(
        self, request: pytest.FixtureRequest, subject: Subject, plan: Sequence[Request], sums: PartialSums | None
    ) -> Capture:
        with self._progress(subject) as progress:
            if subject.model is not None and subject.model.logprobs_only:
                from ..external import capture_served

                return capture_served(subject, plan, allow_code=self.options.allow_code, progress=progress)
            from ..engine import Share, capture_loaded, capture_subject, loaded_from_fixture

            if subject.model is not None:
                code, share = self.options.allow_code, Share(sums=sums)
                capture = capture_subject(subject, plan, allow_code=code, progress=progress, share=share)
                self._warn_unpinned(request, subject, capture)
                return capture
            model = request.getfixturevalue("qsa_model")
            loaded = loaded_from_fixture(model, request.getfixturevalue("qsa_tokenizer"))
            batches, other = request.getfixturevalue("qsa_batches"), request.getfixturevalue("qsa_reference")
            reference = loaded_from_fixture(other, None, "qsa_reference") if other is not None else None
            return capture_loaded(subject, loaded, batches, plan, progress, reference=reference)

    @staticmethod
    def _warn_unpinned(request: pytest.FixtureRequest, subject: Subject, capture: Capture) -> None:
        """Warn of a hub id without a revision: it names other weights whenever their author pushes."""
        commit = capture.provenance.model.revision
        if commit and subject.model and subject.model.revision in (None, "main") and not Path(subject.path).is_dir():
            request.node.warn(
                QsaWarning(f"{subject.path} may be other weights tomorrow: pin what ran with model.revision: {commit}")
            )

    @contextlib.contextmanager
    def _progress(self, subject: Subject) -> Iterator[Any]:
        """Show a bar on a terminal, past pytest's capturing of output; nowhere else."""
        capturing = self.config.pluginmanager.getplugin("capturemanager")
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        if terminal is None or not terminal.isatty or hasattr(self.config, "workerinput"):
            yield None
            return
        shown = capturing.global_and_fixture_disabled() if capturing else contextlib.nullcontext()
        with shown, progress_bar(subject.name, disable=False) as progress:
            yield progress

    def complete(
        self, request: pytest.FixtureRequest, verdict: Verdict, capture: Capture | None, *, where: str, name: str
    ) -> Verdict:
        """Add to a verdict all that a reader needs, record it on the item, and draw it if it failed."""
        item = request.node
        subject = self.subject_of(item)
        verdict = replace(
            verdict, id=name, subject=subject.name if subject else "", where=where, command=self.command(item),
        )  # fmt: skip
        if capture is None and subject is not None:
            if verdict.run == UNKNOWN_RUN:
                verdict = replace(verdict, run=Provenance(ModelProvenance(subject.path)))
            if verdict.rows and self._reported(verdict):
                verdict = replace(verdict, artefacts={"report": shown_path(self.options.output / "report.html")})
        if capture is not None:
            verdict = diagnosed(verdict, capture, partial(self.files_of, request), self._origins)
            capture = capture.redacted() if self.options.redact else capture
            verdict = beside_reference(verdict, capture)
            verdict = replace(verdict, run=provenance_of(capture), sinks=sinks_behind(capture, verdict.query).summary())
            if verdict.rows and METRICS[verdict.query["metric"]].positional and verdict.kind is not Kind.PASSED:
                layers = [row.layer for row in verdict.failing_rows[:1]] if not verdict.query["over"] else []
                layers = (
                    layers
                    or capture.select(verdict.query["layers"], verdict.query["site"], verdict.query["exclude"]).layers
                )
                verdict = replace(verdict, evidence=token_evidence(capture, layers, verdict))
            verdict = self._drawn(item, verdict, capture)
        if verdict.updatable:
            verdict = replace(verdict, accept=f"{verdict.command} --snapshot-update")
        item.stash.setdefault(VERDICTS, []).append(verdict)
        item.user_properties.extend(properties_of(verdict))
        item.user_properties.extend(("qsa_waiver", str(use)) for use in verdict.waivers)
        return verdict

    def stopped(self, request: pytest.FixtureRequest, verdict: Verdict, capture: Capture | None) -> GateFailure:
        """Make the failure of a Python test that an error stopped before it could compare."""
        return GateFailure(self.complete(request, verdict, capture, where=caller(), name=request.node.name))

    def _drawn(self, item: pytest.Item, verdict: Verdict, capture: Capture) -> Verdict:
        if not self._reported(verdict) or not verdict.rows:
            return verdict
        from ..captures import histograms_of
        from ..report import draw

        query = verdict.query
        layers = capture.select(query["layers"], query["site"], query["exclude"]).layers
        verdict = replace(
            verdict, histograms={layer: histograms_of(capture.sites[layer, query["site"]]) for layer in layers}
        )
        folder = self.options.output / "plots" / _slug(item.nodeid)
        try:
            drawn = draw(capture, verdict, folder)
        except Exception as error:  # a picture must never turn a verdict into an error
            return replace(
                verdict, hints=[*verdict.hints, f"the plots could not be drawn: {type(error).__name__}: {error}"]
            )
        artefacts = {title: shown_path(Path(path)) for title, path in drawn.items()}
        return replace(verdict, artefacts=artefacts | {"report": shown_path(self.options.output / "report.html")})

    def _reported(self, verdict: Verdict) -> bool:
        return self.options.report == "always" or (self.options.report == "on-failure" and verdict.failed)

    def command(self, item: pytest.Item) -> str:
        """Return the shortest command that runs this one test again."""
        checkpoint = checkpoint_of(item)
        path = shown_path(item.path)
        test = item.nodeid.partition("::")[2]
        words = ["pytest", f"{path}::{test}", *self.options.as_arguments(checkpoint)]
        if not isinstance(item.parent, QsaSuite) and self.options.config is not None:
            words.append(f"--qsa-config={shown_path(self.options.config)}")
        return shlex.join(words)


def caller() -> str:
    """Return the file:line of the test that compares."""
    package = str(Path(__file__).parent.parent)
    for frame in inspect.stack(context=0):
        if not frame.filename.startswith(package):
            return f"{shown_path(Path(frame.filename))}:{frame.lineno}"
    return ""


def checkpoint_of(item: pytest.Item) -> Checkpoint | None:
    """Return the `--qsa-model` under which an item runs."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("qsa_checkpoint") if callspec else None


def follows_checkpoint(item: pytest.Item, subject: Subject) -> bool:
    """Say whether an assertion follows a release of which only the checkpoint is there."""
    suite = item.parent
    if not isinstance(suite, QsaSuite) or suite.assertion_of(item).follows is None:
        return False
    return kept_release(subject, suite.path) is None


def _subject(file: SuiteFile, checkpoint: Checkpoint | None) -> Subject:
    suite = file.suite
    name = (checkpoint.name if checkpoint else None) or (suite.model.id if suite.model else "model")
    model = suite.model
    if checkpoint is not None:
        base = model.model_dump(exclude={"factory", "path", "served", "logprobs"}) if model else {}
        model = Model(**base, path=checkpoint.path)
    return Subject(name, model, suite.data, suite.memory, file.path.parent, checkpoint.path if checkpoint else None)


def _slug(text: str) -> str:
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
    return f"{plain[-80:]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def plain_name(item: pytest.Item) -> str:
    """Return a test's name without the id that `--qsa-model` adds, so that every checkpoint meets the same baseline."""
    name = item.nodeid.partition("::")[2].replace("::", ".")
    callspec, checkpoint = getattr(item, "callspec", None), checkpoint_of(item)
    if callspec is not None and checkpoint is not None:
        others = f"-{callspec.id}-".replace(f"-{checkpoint.label}-", "-", 1).strip("-")
        base = name.removesuffix(f"[{callspec.id}]")
        name = f"{base}[{others}]" if others and base != name else base
    return "".join(c if c not in '/\\?*:|"<>' and c.isprintable() else f"%{ord(c):02X}" for c in name)

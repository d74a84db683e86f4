"""The gate of one pytest session: what the selected tests need, the captures that answer them, and their verdicts."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from .assertions import Kind, Verdict
from .captures import Capture
from .collection import QsaSuite
from .config import Data, Memory, Model, SuiteFile, load_suite
from .errors import QsaUnplannedCaptureWarning, SuiteError, shown_path
from .evidence import token_evidence
from .metrics import METRICS
from .needs import requests_of
from .options import Options
from .plan import Request
from .session import Captures
from .subjects import Checkpoint, Subject
from .terminal import failure_text

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

    def subject_of(self, item: pytest.Item) -> Subject | None:
        """Return the subject that an item tests; None for an item that is no gate."""
        checkpoint = checkpoint_of(item)
        if isinstance(item.parent, QsaSuite):
            return _subject(item.parent.file, checkpoint)
        if "qsa" not in getattr(item, "fixturenames", ()):
            return None
        suite = self.config_suite
        if suite is not None:
            return _subject(suite, checkpoint)
        model = Model(path=checkpoint.path) if checkpoint else None
        name = (checkpoint.name if checkpoint else None) or (model.id if model else "model")
        return Subject(name, model, Data(), Memory(), item.path.parent, checkpoint.path if checkpoint else None)

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
        if self._needs is None:
            self._needs = self._plan(request.session.items)
        return self.captures.get(subject, self._needs[subject.key], lambda plan: self._make(request, subject, plan))

    def _claim_baselines(self, item: pytest.Item, subject: Subject) -> None:
        """Tell the baseline extension where this item's baselines lie, whether it has one or has just lost it."""
        from .baselines import HOME, NAME, baseline_folder

        item.stash[HOME] = baseline_folder(item.path, subject.name)
        item.stash[NAME] = plain_name(item)

    def _plan(self, items: Sequence[pytest.Item]) -> dict[str, list[Request]]:
        """Collect what all selected tests need, by subject; only now, so that every deselection is known."""
        needs: dict[str, list[Request]] = {}
        for item in items:
            subject = self.subject_of(item)
            if subject is not None:
                needs.setdefault(subject.key, []).extend(requests_of(item))
        return needs

    def recapture(self, request: pytest.FixtureRequest, need: Request) -> Capture:
        """Make the second pass that a Python test without a mark costs, and say how to avoid it."""
        subject = self.subject_of(request.node)
        assert subject is not None
        request.node.warn(
            QsaUnplannedCaptureWarning(
                f"{request.node.name} asked for the {need.site} of '{need.pattern}' unannounced, "
                "which takes a second pass: "
                f"mark it with @pytest.mark.qsa(layers=r'{need.pattern}', site='{need.site}')"
            )
        )
        return self.captures.extend(subject, [need], lambda plan: self._make(request, subject, plan))

    def _make(self, request: pytest.FixtureRequest, subject: Subject, plan: Sequence[Request]) -> Capture:
        from .engine.running import capture_loaded, capture_subject, loaded_from_fixture

        with self._progress(subject) as progress:
            if subject.model is not None:
                return capture_subject(subject, plan, allow_code=self.options.allow_code, progress=progress)
            model = request.getfixturevalue("qsa_model")
            if model is None:
                raise SuiteError(
                    f"{request.node.name} has no subject: give --qsa-config, --qsa-model, "
                    "or a session fixture qsa_model"
                )
            loaded = loaded_from_fixture(model, request.getfixturevalue("qsa_tokenizer"))
            return capture_loaded(subject, loaded, request.getfixturevalue("qsa_batches"), plan, progress)

    @contextlib.contextmanager
    def _progress(self, subject: Subject) -> Iterator[Any]:
        """Show a bar on a terminal, past pytest's capturing of output; nowhere else."""
        capturing = self.config.pluginmanager.getplugin("capturemanager")
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        if terminal is None or not terminal.isatty or hasattr(self.config, "workerinput"):
            yield None
            return
        from tqdm import tqdm

        shown = capturing.global_and_fixture_disabled() if capturing else contextlib.nullcontext()
        with shown, tqdm(desc=f"qsa {subject.name}", unit="sample", leave=False) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

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
        if capture is not None:
            verdict = replace(verdict, run=capture.meta, sinks=capture.sinks.summary())
            if verdict.query and METRICS[verdict.query["metric"]].positional and verdict.kind is not Kind.PASSED:
                layers = [row.layer for row in verdict.failing_rows[:1]] if not verdict.query["over"] else []
                layers = (
                    layers
                    or capture.select(verdict.query["layers"], verdict.query["site"], verdict.query["exclude"]).layers
                )
                verdict = replace(verdict, evidence=token_evidence(capture, layers, verdict))
            verdict = self._drawn(verdict, capture)
        if verdict.updatable:
            verdict = replace(verdict, accept=f"{verdict.command} --snapshot-update")
        item.stash.setdefault(VERDICTS, []).append(verdict)
        item.user_properties.extend([("qsa_kind", str(verdict.kind)), ("qsa_verdict", verdict.headline)])
        return verdict

    def _drawn(self, verdict: Verdict, capture: Capture) -> Verdict:
        mode = self.options.report
        if mode == "never" or (mode == "on-failure" and verdict.kind is Kind.PASSED) or not verdict.rows:
            return verdict
        from .plots import draw

        folder = self.options.output / "plots" / _slug(f"{verdict.subject}-{verdict.id}")
        try:
            drawn = draw(capture, verdict, folder)
        except Exception as error:  # a picture must never turn a verdict into an error
            return replace(
                verdict, hints=[*verdict.hints, f"the plots could not be drawn: {type(error).__name__}: {error}"]
            )
        artefacts = {title: shown_path(Path(path)) for title, path in drawn.items()}
        return replace(verdict, artefacts=artefacts | {"report": shown_path(self.options.output / "report.html")})

    def command(self, item: pytest.Item) -> str:
        """Return the shortest command that runs this one test again."""
        checkpoint = checkpoint_of(item)
        path = shown_path(item.path)
        test = item.nodeid.partition("::")[2]
        words = ["pytest", f"{path}::{test}", *self.options.as_arguments(checkpoint)]
        return shlex.join(words)


def checkpoint_of(item: pytest.Item) -> Checkpoint | None:
    """Return the `--qsa-model` under which an item runs."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("qsa_checkpoint") if callspec else None


def _subject(file: SuiteFile, checkpoint: Checkpoint | None) -> Subject:
    suite = file.suite
    name = (checkpoint.name if checkpoint else None) or (suite.model.id if suite.model else "model")
    model = suite.model
    if checkpoint is not None:
        base = model.model_dump(exclude={"factory", "path"}) if model else {}
        model = Model(**base, path=checkpoint.path)
    return Subject(name, model, suite.data, suite.memory, file.path.parent, checkpoint.path if checkpoint else None)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)[:120]


def plain_name(item: pytest.Item) -> str:
    """Return a test's name without the id that `--qsa-model` adds, so that every checkpoint meets the same baseline."""
    callspec, checkpoint = getattr(item, "callspec", None), checkpoint_of(item)
    if callspec is None or checkpoint is None:
        return item.name
    others = f"-{callspec.id}-".replace(f"-{checkpoint.label}-", "-", 1).strip("-")
    base = item.name.removesuffix(f"[{callspec.id}]")
    return f"{base}[{others}]" if others and base != item.name else base

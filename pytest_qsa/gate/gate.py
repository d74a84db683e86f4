"""The gate of one pytest session: what the selected tests need, the captures that answer them, and their verdicts."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest

from .. import engine, external
from ..captures import COUNTS, Capture, Outline, PartialSums, Request, Site
from ..checkpoint import Files, capture_weights, weight_names
from ..common import (
    LOCK_TIMEOUT,
    AnomalyError,
    Patience,
    QsaError,
    QsaUnplannedCaptureWarning,
    QsaWarning,
    Status,
    SuiteError,
    ToldError,
    UnloadableFormatError,
    lasting_stderr,
    libraries_frozen,
    locked,
    logger,
    own_cores,
    phase,
)
from ..metrics import METRICS
from ..suite import (
    Captures,
    Location,
    MeasuredAssertion,
    OneTestError,
    Place,
    Subject,
    check_engine,
    check_execution,
    files_of,
    previous_of,
)
from ..verdicts import (
    BASELINE_FOLDER,
    BASELINE_NAME,
    Context,
    Identity,
    Verdict,
    baseline_folder,
    explain,
    foresee,
    kept_release,
    positions_needed,
)
from .collection import QsaSuite, Subjects, checkpoint_of, command_of, plain_name, requests_of
from .options import HASHES, Options
from .reporting import FLOOR, call_hook, record, with_plots

FindOutline = Callable[..., Outline | None]
"""Returns what is known of a model's layers before its weights are read; `as_loaded`: as loading changes them."""
UNANNOUNCED = pytest.StashKey[set[tuple[str, str]]]()
"""On an item: the sites that it asked for without a mark, each warned of once."""


@dataclass
class Gate:
    """The state of a pytest session: its plan, its captures and files, and what was found of them.

    `_fixtures` keeps the batches of each fixture's model alive: keys are made of their ids, which Python would give to
    other objects.
    """

    config: pytest.Config
    options: Options
    captures: Captures
    _needs: dict[str, list[Request]] | None = None
    _fixtures: dict[str, Any] = field(default_factory=dict)
    _foreseen: dict[str, Mapping[str, str]] = field(default_factory=dict)
    _files: dict[str, Files] = field(default_factory=dict)
    _releases: dict[Path, Capture] = field(default_factory=dict)
    _previous: dict[str, Capture] = field(default_factory=dict)  # by the key of the subject that follows it
    # Weak keys: to remember an origin must not keep a capture in memory.
    _origins: MutableMapping[Capture, dict[str, str]] = field(default_factory=weakref.WeakKeyDictionary)
    _redacted: MutableMapping[Capture, Capture] = field(default_factory=weakref.WeakKeyDictionary)

    def __post_init__(self) -> None:
        own_cores.watch()  # while torch is imported, if it is
        self.config.stash[HASHES] = self.captures.hashes
        self.captures.patience = Patience(self.options.lock_timeout or LOCK_TIMEOUT, self._tell)

    @cached_property
    def status(self) -> Status:
        """What the run does at the moment, shown past pytest's capturing of output."""
        with self._uncaptured():
            write, terminal = lasting_stderr()
        # Several workers of pytest-xdist would write their lines over one another.
        live = terminal and not hasattr(self.config, "workerinput")
        return Status(write if live else lambda text: write(f"\n{text}"), live=live)

    @cached_property
    def _subjects(self) -> Subjects:
        return Subjects(self.options)

    def subject_of(self, item: pytest.Item) -> Subject | None:
        """Return the subject that an item tests; None for an item that is no gate."""
        return self._subjects.of(item)

    def capture_of(self, request: pytest.FixtureRequest, site: Site | None = None) -> Capture:
        """Return the capture for a test: one pass for all selected tests of its subject, one reading of its files.

        `site`: where the numbers are looked for, if not at all sites that the test announces.

        Raises:
            QsaError: the pass could not be made, or the files can't be read.
        """
        subject = self.subject_of(request.node)
        assert subject is not None
        self._claim_baselines(request.node, subject)
        # A wrong mark fails its own test here; the plan leaves that test out.
        announced = requests_of(request.node)
        # At the first test, not at collection: only now every deselection (-k, -m, a tier) is known.
        if self._needs is None:
            self._needs = self._plan(request.session.items)
        capture = self._captured_at(request, subject, {site} if site else {each.site for each in announced})
        if subject.model is not None and capture.provenance.model.files is None:
            # For each test, not each pass: suites that share a pass may require different executions.
            check_execution(capture.provenance.execution, subject.model)
        return capture

    def _captured_at(self, request: pytest.FixtureRequest, subject: Subject, sites: Collection[Site]) -> Capture:
        """Return what a subject's pass left, or its files where all that is asked for is weights and they have them."""
        assert self._needs is not None
        only_weights = set(sites) == {"weight"}
        asked = [each for each in requests_of(request.node) if each.site == "weight"]
        of_pass, of_files = subject.divided(asked)
        answered = bool(of_files) and not of_pass
        if not asked:  # a test without a mark
            answered = subject.model is not None and subject.model.weights == "files"
        source = subject.of_files if only_weights and answered else subject
        needs = self._needs.get(source.key, [])
        try:
            return self._captured(request, self._key(request, source), source, needs)
        except UnloadableFormatError as error:
            if not only_weights:
                raise
            request.node.warn(QsaWarning(f"the weights were read from the files, for {error}"))
            source, needs = subject.of_files, [each for each in needs if each.site == "weight"]
            # not under the key of what is always read from the files, as weight_gain is: that asks for other numbers
            return self._captured(request, f"{source.key}, for no loader", source, needs)

    def previous_capture(self, request: pytest.FixtureRequest, subject: Subject) -> Capture:
        """Return the capture of the last release: one file, or one pass, for all tests whose bounds follow it.

        Raises:
            QsaError: as `capture_of`.
        """
        assert self._needs is not None
        release = previous_of(subject)
        kept = kept_release(subject, request.node.path)
        if kept is None:
            found = self._captured_at(request, release, {each.site for each in requests_of(request.node)})
        elif kept in self._releases:
            found = self._releases[kept]
        else:
            found = self._releases[kept] = Capture.load(kept)
            check_engine(found, subject.model)
        self._previous[subject.key] = found
        return found

    def _captured(
        self, request: pytest.FixtureRequest, key: str, subject: Subject, needs: Sequence[Request]
    ) -> Capture:
        def announce(capture: Capture, cached: bool) -> None:
            call_hook(
                # By config.hook, not an item's: a capture is of many tests, so the conftest of any folder may take it.
                "pytest_qsa_capture",
                self.config.hook,
                self.config,
                request.node.warn,
                subject=subject,
                capture=self._shown(capture),
                cached=cached,
            )

        self._check_foreseen(request, key)
        look_ahead = partial(self._look_ahead, request, key, subject, needs)
        make = partial(self._make, request, key, subject)
        with self.status.of(subject.name):
            return self.captures.get(key, subject, needs, make, announce, look_ahead)

    def _look_ahead(self, request: pytest.FixtureRequest, key: str, subject: Subject, needs: Sequence[Request]) -> None:
        """Check what the tests of a capture ask for against the layers of their model, before its weights are read.

        Raises:
            OneTestError: this test asks for what the model hasn't; the others' turn comes, and is told now.
            QsaError: the model can't be loaded, as far as that is known.
        """
        if key not in self._foreseen:
            phase("looking at the layers")
            find = partial(self._outline, request, subject, needs)
            self._foresee(request, key, subject, self.foreseen(request.session.items, subject, find))
            self._check_foreseen(request, key)

    def _check_foreseen(self, request: pytest.FixtureRequest, key: str) -> None:
        if problem := self._foreseen.get(key, {}).get(request.node.nodeid):
            raise OneTestError(problem)

    def _look_at_loaded(self, request: pytest.FixtureRequest, key: str, subject: Subject, outline: Outline) -> None:
        """Check what tests ask for against the layers of a model that only its code knows, now that it is loaded.

        Raises:
            OneTestError: none of the tests can be judged, so that there is nothing to run.
        """
        tests = self._tests_of(request.session.items, subject)
        found = _problems(tests, outline)
        self._foresee(request, key, subject, found)
        if not {item.nodeid for item, _ in tests} - found.keys():
            raise OneTestError(found[request.node.nodeid])

    def _foresee(self, request: pytest.FixtureRequest, key: str, subject: Subject, found: Mapping[str, str]) -> None:
        """Keep which tests can't be judged, and why; tell them where a pass follows, at whose end pytest shows them."""
        if self._foreseen.get(key) == found:  # a second pass, which a test without a mark takes
            return
        self._foreseen[key] = found
        if {item.nodeid for item, _ in self._tests_of(request.session.items, subject)} - found.keys():
            for nodeid, why in found.items():
                self._tell(f"{nodeid} fails: {why}")

    def _tests_of(self, items: Sequence[pytest.Item], subject: Subject) -> list[tuple[pytest.Item, list[Request]]]:
        """Return the tests that a subject's pass, or its files, answers, with what they ask for."""
        return [(item, asked) for item, source, asked in self.planned(items) if source.key == subject.key]

    def foreseen(self, items: Sequence[pytest.Item], subject: Subject, find: FindOutline) -> dict[str, str]:
        """Return which tests of a subject can't be judged, and why, by the names of its layers.

        `find`: returns them; the second time as loading would change them.
        """
        tests = self._tests_of(items, subject)
        found: dict[str, str] = {}
        for as_loaded in (False, True):
            outline = find(as_loaded=as_loaded)
            found = _problems(tests, outline) if outline is not None else {}
            if not found:
                break
        return found

    def positions_needed(self, items: Sequence[pytest.Item]) -> dict[str, tuple[int, str]]:
        """Return the fewest positions that could show each test's bound, by name, where that can be said beforehand.

        With each what it counts: positions, boundaries among them, or prompts.
        """
        found: dict[str, tuple[int, str]] = {}
        for item in items:
            assertion = item.parent.assertion_of(item) if isinstance(item.parent, QsaSuite) else None
            if isinstance(assertion, MeasuredAssertion) and (count := positions_needed(assertion)) is not None:
                found[plain_name(item)] = count, METRICS[assertion.metric].drawn_from(assertion.parameters)
        return found

    def outline_of(self, subject: Subject, needs: Sequence[Request], *, as_loaded: bool) -> Outline | None:
        """Return what is known of a subject's layers before its weights are read; None where only loading tells.

        Raises:
            QsaError: the files can't be read, or the model can't be loaded.
        """
        if subject.model is None or subject.model.logprobs_only:
            return None
        if subject.files_only:
            return Outline(weight_names(files_of(subject)))
        code = self.options.allow_code
        with libraries_frozen():
            return engine.look_ahead(subject.named, needs, allow_code=code, as_loaded=as_loaded)

    def _outline(
        self, request: pytest.FixtureRequest, subject: Subject, needs: Sequence[Request], *, as_loaded: bool
    ) -> Outline | None:
        if subject.model is not None:
            return self.outline_of(subject, needs, as_loaded=as_loaded)
        model = request.getfixturevalue("qsa_model")
        return engine.outline_of(engine.loaded_from_fixture(model, None).model)

    def _shown(self, capture: Capture) -> Capture:
        """Return a capture as hooks and reports may see it: without tokens under `--qsa-redact`."""
        if not self.options.redact:
            return capture
        if capture not in self._redacted:  # one for all verdicts, for their origin is remembered by capture
            self._redacted[capture] = capture.redacted()
        return self._redacted[capture]

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
            self._files[key] = files_of(subject, self.options.cache_folder)
        return self._files[key]

    @contextlib.contextmanager
    def told_once(self, item: pytest.Item, what: str) -> Iterator[None]:
        """Let the first test that meets an error tell it; any other names that test. `what`: "its files can't be read".

        Raises:
            QsaError: the error.
            ToldError: another test tells it.
        """
        try:
            yield
        except OneTestError:
            raise
        except QsaError as error:
            # Captures remember what failed: another attempt would meet the same.
            if item.config.pluginmanager.hasplugin("rerunfailures"):
                item.add_marker(pytest.mark.flaky(condition=False), append=False)
            # What an expected failure says is shown nowhere.
            if item.get_closest_marker("xfail") is not None:
                raise
            subject = self.subject_of(item)
            first = self.captures.told_by(error, subject.path if subject else "", item.nodeid)
            if first == item.nodeid:
                raise
            raise ToldError(f"could not be judged, for {what}; {first} has the reason", error.kind, first) from None

    def _key(self, request: pytest.FixtureRequest, subject: Subject) -> str:
        """Return the key of the subject's capture; for a fixture's model it names that very object and its batches."""
        if subject.model is not None:
            return subject.key
        model, batches = request.getfixturevalue("qsa_model"), request.getfixturevalue("qsa_batches")
        if model is None:
            raise SuiteError(
                "no model is named: add model.path to the suite, give --qsa-model, --qsa-config or a fixture qsa_model"
            )
        key = f"{subject.key}:{id(model)}:{id(batches)}"
        if key not in self._fixtures:
            self._fixtures[key] = batches
            with contextlib.suppress(TypeError):  # not a module: the pass will say so
                weakref.finalize(model, self._forget, key)
        return key

    def _forget(self, key: str) -> None:
        self._fixtures.pop(key, None)
        self.captures.forget(key)

    def _claim_baselines(self, item: pytest.Item, subject: Subject) -> None:
        """Tell the baseline extension where this item's baselines lie, also for an assertion that has none any more."""
        if self.options.refused_update:
            raise SuiteError(self.options.refused_update)
        item.stash[BASELINE_FOLDER] = baseline_folder(item.path, subject.baseline_name)
        item.stash[BASELINE_NAME] = plain_name(item)

    def _plan(self, items: Sequence[pytest.Item]) -> dict[str, list[Request]]:
        """Collect what all selected tests need, by subject; only now, when every deselection is known."""
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
                    subjects = [subject, previous_of(subject)] if follows_checkpoint(item, subject) else [subject]
                    for source, answered in (pair for each in subjects for pair in each.sources(requests)):
                        yield item, source, answered

    def _with_distributions(self, requests: Sequence[Request]) -> list[Request]:
        """Add the counts that a report which is always written shows for every layer."""
        more = {COUNTS} if self.options.report == "always" else set()
        return [replace(request, statistics=request.statistics | more) for request in requests]

    def recapture(self, request: pytest.FixtureRequest, need: Request) -> Capture:
        """Make a second pass for a Python test without a mark, and warn how to avoid it."""
        subject = self.subject_of(request.node)
        assert subject is not None
        [(subject, _)] = subject.sources([need])
        key = self._key(request, subject)
        warned = request.node.stash.setdefault(UNANNOUNCED, set())
        if (need.pattern, need.site) not in warned:
            warned.add((need.pattern, need.site))
            self._warn_unannounced(request, need)
        # An earlier test without a mark may have asked for the same.
        if known := self.captures.covering(key, [need]):
            return known
        return self.captures.extend(key, subject, [need], partial(self._make, request, key, subject))

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
        self,
        request: pytest.FixtureRequest,
        key: str,
        subject: Subject,
        plan: Sequence[Request],
        sums: PartialSums | None,
    ) -> Capture:
        with self.status.of(subject.name) as progress:
            if subject.model is not None and subject.model.logprobs_only:
                # torch is not loaded for a served model.
                return external.capture_served(subject, plan, allow_code=self.options.allow_code, progress=progress)
            if subject.files_only:
                return capture_weights(files_of(subject), plan, progress=progress)
            if subject.model is not None:
                code, share = self.options.allow_code, engine.SampleShare(sums=sums)
                look = partial(self._look_at_loaded, request, key, subject)
                with self._slot(subject), engine.threads_restored():
                    capture = engine.capture_subject(
                        subject, plan, allow_code=code, progress=progress, share=share, look_at_loaded=look
                    )
                self._warn_unpinned(request, subject, capture)
                return capture
            model = request.getfixturevalue("qsa_model")
            loaded = engine.loaded_from_fixture(model, request.getfixturevalue("qsa_tokenizer"))
            batches, other = request.getfixturevalue("qsa_batches"), request.getfixturevalue("qsa_reference")
            reference = engine.loaded_from_fixture(other, None, "qsa_reference") if other is not None else None
            return engine.capture_loaded(subject, loaded, batches, plan, progress, reference=reference)

    @contextlib.contextmanager
    def _slot(self, subject: Subject) -> Iterator[None]:
        """Wait until this machine has room for a pass: models that load at once may not fit, or slow one another."""
        slots = self.options.slots
        hint = f"; --qsa-jobs lets {len(slots)} pass{'es' if len(slots) > 1 else ''} run on this machine at once"
        with contextlib.ExitStack() as exits:
            try:
                slots[0].parent.mkdir(parents=True, exist_ok=True)
                exits.enter_context(locked(slots, subject.name, self.captures.patience, hint))
            except OSError as error:
                logger.debug("no slot of this machine is taken: %s", error)
            yield

    def _tell(self, text: str) -> None:
        """Write a line to the terminal at once, past pytest's capturing: a run that waits is not a run that hangs."""
        self.status.hide()
        with self._uncaptured():
            print(f"\nqsa: {text}", file=sys.stderr, flush=True)

    def _uncaptured(self) -> contextlib.AbstractContextManager[None]:
        capturing = self.config.pluginmanager.getplugin("capturemanager")
        return capturing.global_and_fixture_disabled() if capturing else contextlib.nullcontext()

    @staticmethod
    def _warn_unpinned(request: pytest.FixtureRequest, subject: Subject, capture: Capture) -> None:
        """Warn of a hub id without a revision: it names other weights whenever their author pushes."""
        commit = capture.provenance.model.revision
        if commit and subject.model and subject.model.revision in (None, "main") and not Path(subject.path).is_dir():
            request.node.warn(
                QsaWarning(f"{subject.path} may be other weights tomorrow: pin what ran with model.revision: {commit}")
            )

    def identity_of(self, item: pytest.Item, id: str, place: Callable[[Location], Place | None]) -> Identity:
        """Return what the verdicts of an item say of it. `place`: the keys of a bound → the line that sets it."""
        subject = self.subject_of(item)
        name, path = (subject.name, subject.path) if subject else ("", "")
        checkpoint = checkpoint_of(item)
        # Without NAME= another checkpoint meets the baselines of the suite's own model, and is not that model.
        if checkpoint is not None and checkpoint.name is None and checkpoint.label != name and name:
            name = f"{checkpoint.label}, held against {name}"
        return Identity(id, name, path, command_of(item, self.options), place)

    def finish(self, request: pytest.FixtureRequest, verdict: Verdict, capture: Capture | None) -> Verdict:
        """Explain a verdict, draw it, and keep it on its item. `capture`: where its numbers come from."""
        capture = self._shown(capture) if capture is not None else None
        metric, subject = METRICS.get(verdict.query.get("metric", "")), self.subject_of(request.node)
        if metric is not None and metric.against and subject and subject.model and subject.model.reference_is_copy:
            verdict = replace(verdict, hints=[*verdict.hints, FLOOR])
        if capture is not None:
            # On the redacted capture: what an explainer adds reaches the terminal and the report.
            verdict = explain(verdict, Context(capture, partial(self.files_of, request), self._origins))
        subject = self.subject_of(request.node)
        others = {
            "reference": capture.reference if capture else None,
            "last release": self._previous.get(subject.key) if subject else None,
        }
        verdict = with_plots(request.node, verdict, capture, self.options, others)
        record(request.node, verdict)
        return verdict


def _problems(tests: Sequence[tuple[pytest.Item, list[Request]]], outline: Outline) -> dict[str, str]:
    """Return the tests that can't be judged, and why, by the outline of their model."""
    found = {}
    for item, requests in tests:
        try:
            _foresee(item, requests, outline)
        except AnomalyError as error:
            found[item.nodeid] = str(error)
        except SuiteError:  # a pattern that takes too long, say: the judgement tells it
            continue
    return found


def _foresee(item: pytest.Item, requests: Sequence[Request], outline: Outline) -> None:
    """Check what a test asks for against the layers of its model.

    Raises:
        AnomalyError: there would be nothing to judge.
    """
    if isinstance(item.parent, QsaSuite):
        assertion = item.parent.assertion_of(item)
        if isinstance(assertion, MeasuredAssertion):
            foresee(assertion, outline)
        return
    # A test in Python may have marks for several models: one that fits is enough.
    errors = []
    for request in requests:
        try:
            outline.find(request)
        except AnomalyError as error:
            errors.append(error)
    if requests and len(errors) == len(requests):
        raise errors[0]


def follows_checkpoint(item: pytest.Item, subject: Subject) -> bool:
    """Say whether an assertion's bound follows a release whose numbers aren't kept, so that it needs a pass."""
    suite = item.parent
    if not isinstance(suite, QsaSuite) or suite.assertion_of(item).follows is None:
        return False
    return kept_release(subject, suite.path) is None

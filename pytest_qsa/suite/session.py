"""One capture for each subject of a pytest session: in memory, or, between xdist workers, in a file behind a lock.

Knows nothing of pytest: the plugin hands over what the selected tests need.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from ..captures import Capture, CaptureCache, PartialSums, Request, compares, merge_requests
from ..common import (
    AnomalyError,
    InfraError,
    Patience,
    QsaError,
    UnloadableFormatError,
    locked,
    logger,
    write_atomically,
)
from .fingerprint import FileHashes, fingerprint_of, identified, takes_long_to_hash, unhashed
from .subjects import Subject

MakeCapture = Callable[[Sequence[Request], PartialSums | None], Capture]
"""Makes a capture of what is requested; with the sums of an earlier pass that was stopped, it goes on from there."""

LookAhead = Callable[[], None]
"""Checks what is asked for before weights are hashed or read; what it raises fails the capture."""


class OneTestError(AnomalyError):
    """Stops one test and no other that shares its capture."""


Source = Literal["pass", "cache", "worker"]
"""Where a capture is from: a pass of this process, the cache of earlier runs, or another worker of xdist."""
Found = tuple[Capture, Source]
ERRORS: Mapping[str, type[QsaError]] = {kind.__name__: kind for kind in (AnomalyError, UnloadableFormatError)}
"""The errors of a capture that are told apart, by name; any other is an `InfraError`."""


@dataclass
class Captures:
    """The captures of a session. `shared`: the folder that all xdist workers of a run see; None without workers.

    `cache`: the folder of captures that outlive the run; None for none. `patience`: for what another process makes.
    """

    shared: Path | None = None
    cache: Path | None = None
    patience: Patience = field(default_factory=Patience)
    _memory: dict[str, Capture] = field(default_factory=dict)
    _failures: dict[str, QsaError] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)

    def get(
        self,
        key: str,
        subject: Subject,
        requests: Sequence[Request],
        make: MakeCapture,
        announce: Callable[[Capture, bool], None] = lambda capture, cached: None,
        look_ahead: LookAhead = lambda: None,
    ) -> Capture:
        """Return the capture of a key, made at most once in the session (once a run under xdist).

        `announce`: called with a capture that this process made or took from the cache (`cached`), before any other
        test gets it; not with one that another worker made. `look_ahead`: called where no kept capture answers.

        Raises:
            OneTestError: as `look_ahead`; another test may still have the capture made.
            QsaError: the capture failed; the same error again for every test that needs it, without another try.
        """
        if key in self._failures:
            # A copy, because the first one has the traceback of another test.
            raise type(self._failures[key])(str(self._failures[key]))
        if key not in self._memory:
            try:
                capture, source = self._make(subject, merge_requests(requests), make, look_ahead)
            except OneTestError:
                raise
            except QsaError as error:
                self._failures[key] = error
                raise
            self._memory[key] = capture
            # The worker that made it has announced it.
            if source != "worker":
                announce(capture, source == "cache")
        return self._memory[key]

    def forget(self, key: str) -> None:
        """Drop a capture whose model is gone."""
        self._memory.pop(key, None)
        self._failures.pop(key, None)

    def told_by(self, error: QsaError, path: str, test: str) -> str:
        """Return the test that tells an error, the first of the run that met it: `test` itself, or an earlier one.

        `path`: the subject's, for two checkpoints may fail in the same words.
        """
        text = f"{path}: {type(error).__name__}: {error}"
        if text not in self._told:
            shared = self.shared
            self._told[text] = test if shared is None else _first_of_workers(shared, text, test, self.patience)
        return self._told[text]

    def covering(self, key: str, requests: Sequence[Request]) -> Capture | None:
        """Return a capture of the key, the first or a later one, that has all that is asked for."""
        # Before a `+` stands the key; `extend` appends the plan of a later capture.
        captures = (capture for name, capture in self._memory.items() if name.partition("+")[0] == key)
        return next((capture for capture in captures if capture.covers(requests)), None)

    def extend(self, key: str, subject: Subject, requests: Sequence[Request], make: MakeCapture) -> Capture:
        """Capture again, for requests that nobody planned; the old capture stays."""
        plan = merge_requests(requests)
        name = f"{key}+{plan}"
        self._memory[name] = identified(make(plan, None), subject, self.hashes)
        return self._memory[name]

    @cached_property
    def hashes(self) -> FileHashes:
        """The hashes of the files that this session has met."""
        return FileHashes(self.cache / "hashes.json" if self.cache else None)

    def _make(self, subject: Subject, requests: Sequence[Request], make: MakeCapture, look_ahead: LookAhead) -> Found:
        # A fixture's model exists in its own process only, so that workers can't share its capture.
        if self.shared is None or subject.model is None:
            return self._through_cache(subject, requests, make, look_ahead)
        return _make_once(
            self.shared,
            subject,
            requests,
            lambda plan: self._through_cache(subject, plan, make, look_ahead),
            self.patience,
        )

    def _through_cache(
        self, subject: Subject, requests: Sequence[Request], make: MakeCapture, look_ahead: LookAhead
    ) -> Found:
        hashes, compared = self.hashes, compares(requests)
        source: Source = "cache"
        with suppress(QsaError, OSError):  # which `identified` tells
            hashes.begin(unhashed(subject, hashes, with_reference=compared))
        if self.cache is None or takes_long_to_hash(subject, hashes, with_reference=compared):
            look_ahead()
        fingerprint = fingerprint_of(subject, hashes, with_reference=compared) if self.cache else None

        def known(plan: Sequence[Request], sums: PartialSums | None) -> Capture:
            nonlocal source
            source = "pass"
            look_ahead()
            return identified(make(plan, sums), subject, hashes)

        if self.cache is None or fingerprint is None:
            reason = "no cache is used" if self.cache is None else "it has no fingerprint"
            logger.debug("%s: no cached capture is looked for, for %s", subject.name, reason)
            return known(requests, None), source
        cache = CaptureCache(self.cache, patience=self.patience)
        capture = cache.get_or_make(fingerprint, requests, known, subject.name)
        return identified(capture, subject, hashes), source  # the same bytes may have lain elsewhere


def _make_once(
    shared: Path,
    subject: Subject,
    requests: Sequence[Request],
    make: Callable[[Sequence[Request]], Found],
    patience: Patience,
) -> Found:
    """Make a capture in one of the workers that share a folder; the others wait for its file, or its failure.

    Raises:
        QsaError: the capture failed, here or in another worker: none tries again.
    """
    shared.mkdir(parents=True, exist_ok=True)
    # sorted, for a set's own order is another in each worker: they would not find one another's file
    wanted = [(each.pattern, each.site, each.exclude, sorted(map(str, each.statistics))) for each in requests]
    plan = hashlib.sha256(repr((subject.key, wanted)).encode()).hexdigest()[:32]
    file, failure = shared / f"{plan}.qsa", shared / f"{plan}.json"
    with locked([shared / f"{plan}.lock"], subject.name, patience):
        if failure.exists():
            recorded = json.loads(failure.read_text(encoding="utf-8"))
            # The class decides on the kind of the verdict, and on what is tried instead, so that all workers must
            # raise the same.
            raise ERRORS.get(recorded["class"], InfraError)(recorded["text"])
        if file.exists():
            logger.debug("%s: another worker has made the capture", subject.name)
            return Capture.load(file), "worker"
        try:
            capture, source = make(requests)
        except OneTestError:
            raise
        except QsaError as error:
            write_atomically(failure, json.dumps({"class": type(error).__name__, "text": str(error)}))
            raise
        capture.save(file)
        return capture, source


def _first_of_workers(shared: Path, text: str, test: str, patience: Patience) -> str:
    """Return the first test of any worker that asked with this text."""
    shared.mkdir(parents=True, exist_ok=True)
    file = shared / f"told-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    with locked([file.with_suffix(".lock")], test, patience):
        if not file.exists():
            write_atomically(file, test)
        return file.read_text(encoding="utf-8")

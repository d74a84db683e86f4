"""The selected tests → what each subject would have to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...captures import Capture, Request, merge_requests
from ...common import InfraError
from ...suite import FileHashes, Subject, fingerprint_of, local_folder, weight_files

HASHED_AT_ONCE = 2 << 30
"""Bytes of weights that a plan hashes to look for a capture; of larger ones it must have been done before."""


@dataclass
class Planned:
    """A subject with its tests: those that need the pass, with their requests, and those that read files alone."""

    subject: Subject
    measured: list[tuple[str, Request]] = field(default_factory=list)
    static: list[str] = field(default_factory=list)
    unannounced: list[str] = field(default_factory=list)

    @property
    def requests(self) -> tuple[Request, ...]:
        """What one pass would have to measure."""
        return merge_requests(request for _, request in self.measured)


def gathered(tests: Iterable[tuple[str, Subject, Sequence[Request], bool]]) -> list[Planned]:
    """Put the tests of a subject together. A test: id, subject, requests, and whether it reads files only."""
    found: dict[str, Planned] = {}
    for name, subject, requests, static in tests:
        planned = found.setdefault(subject.key, Planned(subject))
        planned.measured += [(name, request) for request in requests]
        if not requests:
            (planned.static if static else planned.unannounced).append(name)
    return list(found.values())


def kept(planned: Planned, cache: Path | None) -> tuple[bool, str]:
    """Say whether a kept capture answers all of it, and what is known of that."""
    if cache is None:
        return False, "nothing is kept between runs (--qsa-no-cache)"
    if not any(cache.glob("*.qsa")) and not any(cache.glob("*.partial")):
        return False, "no capture is kept yet"
    hashes = FileHashes(cache / "hashes.json")
    folder = local_folder(planned.subject)
    unknown = [file for file in weight_files(folder) if not hashes.remembers(file)] if folder else []
    if sum(file.stat().st_size for file in unknown) > HASHED_AT_ONCE:
        return False, "not known before the run has hashed the weights"
    fingerprint = fingerprint_of(planned.subject, hashes)
    if fingerprint is None:
        return False, "captures of it can't be kept"
    try:
        capture = Capture.load(cache / f"{fingerprint}.qsa")
    except InfraError:
        partial = (cache / f"{fingerprint}.partial").exists()
        return False, "the first samples of an interrupted pass" if partial else "no capture of it is kept"
    if capture.covers(planned.requests):
        return True, "a capture that answers all of it: nothing would be loaded"
    return False, "a capture that lacks something: the pass would run again"

"""Whether what ships is what passed: a report's manifest against the files of a checkpoint and of suites. No torch.

A checksum shows damage, not forgery: whoever can write the report can write another one. To prove it to others, sign
the statement.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common import InfraError, SuiteError, counted, shown_path, write_atomically
from ..report import read_report
from ..suite import TIERS, FileHashes, Roots, checkpoint_hashes, suite_hash, weight_order, weights_hash
from ..verdicts import baseline_hashes

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
"""The types of in-toto's attestation framework, github.com/in-toto/attestation/tree/main/spec."""
MOST_FILES = 10
"""How many files that differ are named."""
GOOD = "passed"


@dataclass
class Verification:
    """What came of it. `problems`: why the checkpoint isn't what passed, one a line; none where it is.

    `held`: what was found to hold, for the reader.
    """

    report: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    tests: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the run was of."""
        found: Mapping[str, Any] = self.report["session"]["manifest"]
        return found

    @property
    def warned(self) -> list[str]:
        """The ids of the tests that passed with a warning."""
        own = {test["nodeid"] for test in self.tests}
        kinds = ((result["nodeid"], result["kind"]) for result in self.report["results"])
        return sorted({nodeid for nodeid, kind in kinds if kind == "WARNED" and nodeid in own})


@dataclass(frozen=True)
class Demands:
    """What is demanded. `suites`: that must be those of the run. `base`: an adapter's, where it lies now.

    `tier`: the earliest that will do. `allow_waivers`: whether a waiver that was used is no override.
    """

    suites: Sequence[Path] = ()
    base: Path | None = None
    tier: str | None = None
    allow_waivers: bool = False
    roots: Roots = field(default_factory=Roots)


def verify(report: Path, checkpoint: Path, demands: Demands) -> Verification:
    """Hold a checkpoint's files against a report.

    Raises:
        InfraError: the report or the checkpoint can't be read, or the report was changed after it was written.
        SuiteError: the file is no report, or one without a manifest; a suite is wrong.
    """
    found = Verification(_read(report))
    if not checkpoint.is_dir():
        raise InfraError(f"{shown_path(checkpoint)}: there is no such folder")
    try:
        if (judged := _judged(found, checkpoint, demands)) is not None:
            _check_tests(found, judged)
            _check_numbers(found, judged)
        for suite in demands.suites:
            _check_suite(found, suite, demands.roots)
        _check_overrides(found, demands)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, SuiteError):
            raise
        raise SuiteError(f"{shown_path(report)}: a damaged report.json: {type(error).__name__}: {error}") from None
    return found


def _read(path: Path) -> Mapping[str, Any]:
    report = read_report(path)
    if report is None:
        raise SuiteError(f"{shown_path(path)}: no report.json of this program")
    if "checksum" not in report or "manifest" not in report.get("session", {}):
        raise SuiteError(
            f"{shown_path(path)}: an earlier version wrote it, without the files that it is of: run the gate again "
            "with --qsa-report=always"
        )
    return report


def _judged(found: Verification, checkpoint: Path, demands: Demands) -> Mapping[str, Any] | None:
    """Return the checkpoint of the run that has these very files; None, and what differs, where none has."""
    own = _hashes(checkpoint)
    known = [each for each in found.manifest["checkpoints"] if each["parts"]]
    same = [each for each in known if each["parts"][0]["files"] == own]
    if not known:
        found.problems.append("the run judged no checkpoint with files of its own")
        return None
    if not same:
        nearest = max(known, key=lambda each: _alike(each["parts"][0]["files"], own))
        found.problems += _differences(nearest["parts"][0]["files"], own, f"{shown_path(checkpoint)}: ")
        return None
    judged: Mapping[str, Any] = same[0]
    found.files |= own
    for part in judged["parts"][1:]:
        folder = demands.base or Path(part["folder"])
        base = _hashes(folder) if folder.is_dir() else {}
        found.problems += _differences(part["files"], base, f"the base {shown_path(folder)}: ")
        found.files |= {f"base/{name}": content for name, content in base.items()}
    if not found.problems:
        found.held.append(f"{counted(len(found.files), 'file')} of {shown_path(checkpoint)} are those that were judged")
    return judged


def _hashes(folder: Path) -> dict[str, str]:
    try:
        # Without the memory of earlier hashes: here every byte is read.
        return checkpoint_hashes(folder, FileHashes(None))
    except OSError as error:
        raise InfraError(f"{shown_path(folder)}: can't be read: {error.strerror}") from None


def _alike(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[int, int]:
    return sum(other.get(name) == content for name, content in one.items()), len(one.keys() & other.keys())


def _differences(judged: Mapping[str, str], own: Mapping[str, str], where: str) -> Iterator[str]:
    texts = []
    for name in sorted({*judged, *own}):
        if judged.get(name) != own.get(name):
            what = "is gone" if name not in own else "was not judged" if name not in judged else "is another one"
            texts.append(f"{where}{name} {what}")
    yield from texts[:MOST_FILES]
    if len(texts) > MOST_FILES:
        yield f"{where}{len(texts) - MOST_FILES} more files differ"


def _check_tests(found: Verification, judged: Mapping[str, Any]) -> None:
    found.tests = [test for test in found.manifest["tests"] if test["checkpoint"] == judged["path"]]
    failed = [test for test in found.tests if test["outcome"] != GOOD]
    found.problems += [f"{test['nodeid']}: {test['outcome']}" for test in failed]
    own = {test["nodeid"] for test in found.tests}
    # A test may go on after a verdict that failed; its gate has not passed.
    lost = {each["nodeid"] for each in found.report["results"] if each["failed"] and each["nodeid"] in own}
    found.problems += [f"{nodeid}: a verdict failed" for nodeid in sorted(lost - {test["nodeid"] for test in failed})]
    silent = own - {each["nodeid"] for each in found.report["results"]} - {test["nodeid"] for test in failed}
    found.problems += [f"{nodeid}: passed without a verdict" for nodeid in sorted(silent)]
    if not own:
        found.problems.append("no test of the run judged this checkpoint")
    elif not (failed or lost or silent):
        found.held.append(f"{counted(len(own), 'test')} of tier {found.report['session']['tier']} ran and passed")


def _check_numbers(found: Verification, judged: Mapping[str, Any]) -> None:
    """Check that the numbers of the run are of these weights: files may have been exchanged while it ran."""
    weights = weights_hash([weight_order(part["files"]) for part in judged["parts"]])
    runs = (result["run"]["model"] for result in found.report["results"] if result["run"])
    measured = {run.get("weights") for run in runs if run.get("path") == judged["path"]} - {None}
    if measured - {weights}:
        found.problems.append("the numbers are of other weights: the files changed while the gate ran")


def _check_suite(found: Verification, suite: Path, roots: Roots) -> None:
    content = suite_hash(suite, roots).removeprefix("sha256:")
    judged = next((each for each in found.manifest["suites"] if each["sha256"] == content), None)
    if judged is None:
        found.problems.append(f"{shown_path(suite)}: is no suite of the run, or is another one with what it extends")
        return
    if not any(test["suite"] == judged["path"] for test in found.tests) and found.tests:
        found.problems.append(f"{shown_path(suite)}: none of its tests judged this checkpoint")
    folders = {(suite.parent / name).parent for name in judged["baselines"]}
    own = {
        (folder / name).relative_to(suite.parent).as_posix(): content
        for folder in sorted(folders)
        for name, content in baseline_hashes(folder).items()
    }
    different = [*_differences(judged["baselines"], own, f"{shown_path(suite)}: the baseline ")]
    found.problems += different
    if not different:
        found.held.append(f"{shown_path(suite)} and {counted(len(own), 'baseline')} are those of the run")


def _check_overrides(found: Verification, demands: Demands) -> None:
    overrides = found.manifest["overrides"]
    tier = found.report["session"]["tier"]
    found.problems += [f"not collected: {text}" for text in found.manifest["errors"]]
    before = len(found.problems)
    found.problems += [f"--qsa-set {override}: a key of the suites was overridden" for override in overrides["set"]]
    found.problems += [f"{word}: not all tests were run" for word in overrides["selected"]]
    found.problems += [f"{nodeid}: {why}" for nodeid, why in overrides["deselected"].items()]
    if overrides["today"]:
        found.problems.append(f"--qsa-today {overrides['today']}: waivers were judged as on another day")
    if overrides["updated"]:
        found.problems.append("--snapshot-update: the run wrote the baselines that it was held against")
    if not demands.allow_waivers:
        found.problems += [f"a waiver was used: {text}" for text in overrides["waivers"]]
    if demands.tier is not None and TIERS.index(tier) < TIERS.index(demands.tier):
        found.problems.append(f"the run was of tier {tier}, and {demands.tier} is demanded")
    if len(found.problems) == before:
        found.held.append("nothing was overridden")


def write_statement(found: Verification, report: Path, file: Path) -> None:
    """Write an in-toto statement of the result, for a signer.

    Raises:
        OSError: the file can't be written.
    """
    suites = [{"name": suite["path"], "digest": {"sha256": suite["sha256"]}} for suite in found.manifest["suites"]]
    own = {"name": "report.json", "digest": {"sha256": hashlib.sha256(report.read_bytes()).hexdigest()}}
    warned = found.warned
    passed = sorted({test["nodeid"] for test in found.tests} - set(warned))
    content = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(found.files.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "result": "WARNED" if warned else "PASSED",
            "configuration": [*suites, own],
            "passedTests": passed,
            "warnedTests": warned,
            "failedTests": [],
        },
    }
    write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

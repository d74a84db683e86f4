"""What a run was of: the files of its checkpoints, its suites with their baselines, its tests, and all overrides.

`qsa verify` holds it against the files that are shipped. A worker of pytest-xdist collects the tests, and the process
that writes the report hashes the files.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ..common import QsaError, shown_path
from ..suite import (
    OTHER_MODEL,
    TIERS,
    FileHashes,
    Model,
    Subject,
    checkpoint_hashes,
    folders_of,
    library_versions,
    suite_hash,
)
from ..tools import size_of
from ..verdicts import baseline_folder, baseline_hashes
from .collection import QsaSuite, Subjects
from .options import HASHES, Options

Collected = dict[str, Any]
"""What `collected` returns, as builtins."""
NAMED = "not among those that were named"


def collected(items: Sequence[pytest.Item], options: Options, left: Mapping[str, str]) -> Collected:
    """Return the gates of a session, those that were left out among them, and where their files lie.

    `items`: what is to run. `left`: the id of each gate that was left out, with the later tier that it is of, or why.
    """
    subjects = Subjects(options)
    found: Collected = {"tests": [], "checkpoints": {}, "suites": {}, "left": dict(left)}
    gates = [item for item in items if "qsa_checkpoint" in getattr(item, "fixturenames", ())]
    for item in gates:
        subject = None
        with suppress(QsaError):  # its own test says what is wrong
            subject = subjects.of(item)
        path = subject.path if subject else ""
        if subject is not None and path not in found["checkpoints"]:
            found["checkpoints"][path] = _folders(subject)
        folders = found["suites"].setdefault(str(item.path), [])
        if subject is not None and (folder := str(baseline_folder(item.path, subject.baseline_name))) not in folders:
            folders.append(folder)
        found["tests"].append({"nodeid": item.nodeid, "checkpoint": path, "suite": shown_path(item.path)})
    if gates and options.config is not None:
        found["suites"].setdefault(str(options.config), [])
    found["left"] |= _not_collected(gates, left)
    return found


def _not_collected(gates: Iterable[pytest.Item], left: Iterable[str]) -> dict[str, str]:
    """Return the assertions of suites that pytest did not even collect: another one was named, or `--lf` was given."""
    suites = {item.parent for item in gates if isinstance(item.parent, QsaSuite)}
    ids = {f"{suite.nodeid}::{each.id}" for suite in suites for each in suite.file.assertions}
    return dict.fromkeys(sorted(ids - {_plain(nodeid) for nodeid in (*(item.nodeid for item in gates), *left)}), NAMED)


def _plain(nodeid: str) -> str:
    """Return a test's id without that of a checkpoint, or of a group of pytest-xdist."""
    file, colons, name = nodeid.rpartition("::")
    return f"{file}{colons}{name.partition('[')[0].partition('@')[0]}"


def _folders(subject: Subject) -> list[str]:
    """Return the folders of a subject's files, an adapter's base last; none for a fixture or a served model."""
    try:
        return list(map(str, folders_of(subject)))
    except QsaError:
        return []


def manifest_of(
    found: Collected, config: pytest.Config, options: Options, outcomes: Mapping[str, str], waivers: Iterable[str]
) -> dict[str, Any]:
    """Return the manifest for the report. `outcomes`: test → what became of it. `waivers`: those that were used."""
    kept = options.cache_folder / "hashes.json" if options.cache_folder else None
    hashes = config.stash.get(HASHES, None) or FileHashes(kept)
    words = [str(word) for word in config.args if "::" in str(word)]
    return {
        "checkpoints": [_checkpoint(path, folders, hashes) for path, folders in sorted(found["checkpoints"].items())],
        "suites": [_suite(Path(path), folders, options) for path, folders in sorted(found["suites"].items())],
        "tests": [{**test, "outcome": outcomes.get(test["nodeid"], "not run")} for test in found["tests"]],
        "overrides": {
            "set": list(options.overrides),
            "today": config.getoption("qsa_today"),
            "updated": bool(config.getoption("update_snapshots", False)),
            "selected": words + (["--lf"] if config.getoption("lf", False) else []),
            "deselected": {
                nodeid: why for nodeid, why in sorted(found["left"].items()) if why not in (*TIERS, OTHER_MODEL)
            },
            "waivers": sorted(set(waivers)),
            "models": list(options.models),
        },
        "versions": library_versions(("pytest",)),
    }


def sizes_of_subjects(results: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return subject → bytes and parameters of its files, for a report that puts several side by side; else nothing."""
    paths = {result["subject"]: path for result in results if (path := (result["run"].get("model") or {}).get("path"))}
    if len(paths) < 2:
        return {}
    sizes = {name: size_of(path, Model(path=path)) for name, path in paths.items() if Path(path).is_dir()}
    return {name: list(size) for name, size in sizes.items() if size is not None}


def this_machine() -> str:
    """Return what tells this machine from others, without its name: speeds of two are not compared."""
    facts = f"{platform.node()} {platform.machine()} {os.cpu_count()}"
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _checkpoint(path: str, folders: Sequence[str], hashes: FileHashes) -> dict[str, Any]:
    try:
        parts = [{"folder": folder, "files": checkpoint_hashes(Path(folder), hashes)} for folder in folders]
    except (OSError, QsaError):  # what can't be read was not judged either
        parts = []
    return {"path": path, "parts": parts}


def _suite(path: Path, folders: Sequence[str], options: Options) -> dict[str, Any]:
    baselines = {
        (Path(folder) / name).relative_to(path.parent).as_posix(): content
        for folder in folders
        for name, content in baseline_hashes(Path(folder)).items()
    }
    content = FileHashes(None).of(path) if path.suffix == ".py" else ""
    with suppress(QsaError):
        content = content or suite_hash(path, options.roots)
    return {"path": shown_path(path), "sha256": content.removeprefix("sha256:"), "baselines": baselines}

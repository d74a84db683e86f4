"""What the installed model classes take for settings that a config.json doesn't state, asked in another process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ..checkpoint import Folder, Resolved
from ..common import InfraError, checked_json, json_with_checksum, logger, write_atomically

PROGRAM = "pytest_qsa.engine.load.settings"
TIMEOUT = 300.0
"""In seconds; the classes take three to import, and a loaded machine many times that."""


def resolve_settings(folders: Sequence[Folder], cache: Path | None) -> list[Resolved | None]:
    """Return the settings of each folder as its class fills them in; None where no installed class reads them.

    They are remembered in the folder `cache` by the files' content and the version of transformers.
    """
    files = [folder.path / "config.json" for folder in folders]
    remembered = [cache / "settings" / f"{_key(file)}.json" if cache else None for file in files]
    found = [_read(file) for file in remembered]
    if any(entry is None for entry in found):
        answers = _ask(files)
        found = [{"resolved": answer} for answer in answers]
        for file, answer in zip(remembered, answers, strict=True):
            if file is not None:
                with suppress(OSError):  # a read-only cache: asked again the next time
                    write_atomically(file, json_with_checksum({"resolved": answer}))
    resolved = [entry["resolved"] if entry else None for entry in found]
    return [Resolved(each["name"], each["settings"]) if each else None for each in resolved]


def _key(file: Path) -> str:
    return hashlib.sha256(f"{metadata.version('transformers')}\n".encode() + file.read_bytes()).hexdigest()


def _read(file: Path | None) -> dict[str, Any] | None:
    with suppress(OSError, InfraError):  # not there, damaged, or of an earlier version
        content = checked_json(file.read_bytes()) if file else {}
        return content if "resolved" in content else None
    return None


def _ask(files: Sequence[Path]) -> list[Any]:
    """Run the program; where it fails, nothing is known of any file, and the log says why."""
    began = time.perf_counter()
    try:
        # -P: the folder in which the user stands may hold a module of the name of a library
        done = subprocess.run(
            [sys.executable, "-P", "-m", PROGRAM, *map(str, files)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )
        answers = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        logger.debug("what the model classes take for settings can't be asked: %s", error)
        return [None] * len(files)
    logger.debug("asking the model classes for their settings took %.2f s", time.perf_counter() - began)
    return answers if isinstance(answers, list) else [None] * len(files)

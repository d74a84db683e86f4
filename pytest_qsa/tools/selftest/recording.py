"""A pytest plugin for the runs of a self-test: it appends the verdicts of a run to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ...captures import ModelProvenance
from ...verdicts import Verdict

RESULTS = "QSA_SELFTEST_RESULTS"
"""The environment variable that names the file: JSON lines, one for each verdict."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the file, so that a run without a verdict differs from one that broke."""
    if RESULTS in os.environ:
        Path(os.environ[RESULTS]).touch()


def pytest_qsa_verdict(item: pytest.Item, verdict: Verdict) -> None:
    """Write what the self-test reads of a verdict."""
    layers = [row.layer for row in verdict.rows if row.excess]
    layers += [finding.layer for finding in verdict.findings if not finding.note]
    result = {
        "test": item.nodeid,
        "kind": verdict.kind,
        # of what can't be loaded, only the path is known
        "loaded": verdict.run.model != ModelProvenance(verdict.run.model.path),
        "failed": verdict.failed,
        "layers": layers,
        "value": verdict.rows[0].value if len(verdict.rows) == 1 else None,
    }
    if RESULTS in os.environ:
        # One appending write, because the workers of pytest-xdist write to the same file.
        with Path(os.environ[RESULTS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")

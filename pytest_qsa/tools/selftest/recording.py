"""A pytest plugin for the runs of a self-test: it leaves the verdicts of a run in a file, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

VERDICTS = "qsa_verdicts"
"""The attribute of a test report that carries its verdicts."""
RESULTS = "QSA_SELFTEST_RESULTS"
"""The environment variable that names the file."""


class Recorder:
    """Collects what the reports of a run carry."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep of each verdict what a self-test asks for."""
        for verdict in getattr(report, VERDICTS, ()):
            layers = [row["layer"] for row in verdict["rows"] if row["excess"]]
            layers += [finding["layer"] for finding in verdict["findings"]]
            self.results.append(
                {
                    "test": verdict["nodeid"], "kind": verdict["kind"], "failed": verdict["failed"],
                    "layers": layers, "value": verdict["rows"][0]["value"] if len(verdict["rows"]) == 1 else None,
                }
            )  # fmt: skip

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        if RESULTS in os.environ:
            Path(os.environ[RESULTS]).write_text(json.dumps(self.results), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Record from the process that sees all results."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(), "qsa-selftest-recorder")

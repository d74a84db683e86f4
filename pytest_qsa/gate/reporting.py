"""Verdicts on their way out: onto pytest's reports, into the HTML report, into the terminal's summary."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ..common import scrubbed
from ..suite import NOT_RUN, TIERS, WORKER_NOT_RUN, WORKER_PROBLEM
from .options import Options

FIELD = "qsa_verdicts"
"""The attribute of a test report that carries verdicts as plain values; xdist passes it on."""
MOST_NOT_RUN = 20


class Reporter:
    """Collects the verdicts of all processes, and writes the report at the end. Registered on the controller alone."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self.config = config
        self.options = options
        self.results: list[dict[str, Any]] = []
        self.started = time.time()
        self.written: str | None = None
        self.not_run: dict[str, str] = {}
        self.problem: str | None = None
        self.suite_errors: list[str] = []
        self.selected: list[pytest.Item] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what is wrong with a suite, for GitHub."""
        if report.failed:
            self.suite_errors.append(report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the verdicts off a report, whichever process made it."""
        if str(report.outcome) != "rerun":  # pytest-rerunfailures' own
            self.results += getattr(report, FIELD, ())

    # pytest-xdist's hook, which pluggy does not know where that isn't installed.
    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take what a worker's tier left out, or why it ran nothing; each worker collects all tests."""
        output = getattr(node, "workeroutput", {})
        self.not_run.update(output.get(WORKER_NOT_RUN, {}))
        self.problem = output.get(WORKER_PROBLEM, self.problem)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Take what the tier left out of a run without workers, and the tests of a plan."""
        self.selected = session.items if self.options.plan else []
        left_out: Mapping[str, str] = self.config.stash.get(NOT_RUN, {})
        self.not_run.update(left_out)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write report.json and report.html."""
        if self.problem:
            # As `plugin._stop` ends a run without workers.
            session.exitstatus = pytest.ExitCode.INTERRUPTED
        failed = any(result["failed"] for result in self.results)
        if not self.results or self.options.report == "never" or (self.options.report == "on-failure" and not failed):
            return
        from ..common import shown_path

        # Imported here: pytest imports this module in every run, gate or not.
        from ..report import write_report

        try:
            self.written = shown_path(write_report(self.results, self.options.output, self._session()))
        except Exception as error:  # the verdicts stand without it
            self.written = f"not written: {type(error).__name__}: {error}"

    def _session(self) -> dict[str, Any]:
        import shlex
        from datetime import UTC, datetime
        from importlib.metadata import version

        not_run = [{"nodeid": nodeid, "tier": tier} for nodeid, tier in sorted(self.not_run.items())]
        kinds = [result["kind"] for result in self.results]
        return {
            "command": scrubbed(shlex.join(["pytest", *map(str, self.config.invocation_params.args)])),
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "duration_s": round(time.time() - self.started, 1),
            "tier": self.options.tier,
            "not_run": not_run,
            "counts": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "version": version("pytest-qsa"),
        }

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say in one line how the gate stands and where the report lies."""
        if self.problem:
            terminalreporter.write_line(f"qsa: {self.problem}", red=True)
        for line in self._for_github():
            terminalreporter.write_line(line)
        if self.selected:
            self._plan(terminalreporter)
        if self.results:
            self._summarize(terminalreporter)
        if self.not_run:
            self._list_not_run(terminalreporter)
        if self.options.ratchet and self.results:
            self._propose(terminalreporter)

    def _plan(self, terminalreporter: Any) -> None:
        """Say what would run: sites, sizes, time, and the settings that fit."""
        from ..suite import Captures
        from ..tools import gathered, plan_lines
        from .collection import QsaSuite, plain_name
        from .gate import Gate

        def measured(dtype: str, weights: Path | None) -> Any:
            from ..engine import this_machine  # torch, only where a pass would run

            return this_machine(dtype, weights)

        # A gate of its own: with --collect-only no test has asked for the fixture.
        gate = Gate(self.config, self.options, Captures())
        planned = gate.planned(self.selected)
        tests = (
            (plain_name(item), subject, needs, isinstance(item.parent, QsaSuite)) for item, subject, needs in planned
        )
        terminalreporter.write_sep("-", "qsa: what would run; nothing was loaded")
        for line in plan_lines(gathered(tests), self.options.cache_folder, measured):
            terminalreporter.write_line(line)

    def _propose(self, terminalreporter: Any) -> None:
        """Show the patch that tightens budgets, and write it; it is applied by hand."""
        from ..common import shown_path, write_atomically
        from ..verdicts import patch_of, project_root

        limits = [limit for result in self.results for limit in result["limits"]]
        patch = patch_of(limits, project_root(self.config.rootpath))
        if not patch:
            terminalreporter.write_sep("-", "qsa: no budget can be tightened")
            return
        file = self.options.output / "ratchet.patch"
        terminalreporter.write_sep("-", "qsa: budgets that could be tighter")
        terminalreporter.write_line(patch)
        try:
            write_atomically(file, patch)
            terminalreporter.write_line(f"to accept, at the root of the repository: git apply {shown_path(file)}")
        except OSError as error:
            terminalreporter.write_line(f"not written: {error}")

    def _list_not_run(self, terminalreporter: Any) -> None:
        """List what a tier left out, later tiers last: a reader must not take it for checked."""
        title = f"qsa: {len(self.not_run)} of later tiers than {self.options.tier} did not run"
        terminalreporter.write_sep("-", title)
        ordered = sorted(self.not_run.items(), key=lambda entry: TIERS.index(entry[1]))
        for nodeid, tier in ordered[:MOST_NOT_RUN]:
            terminalreporter.write_line(f"{tier:<8} {nodeid}")
        if len(ordered) > MOST_NOT_RUN:
            terminalreporter.write_line(f"… and {len(ordered) - MOST_NOT_RUN} more")

    def _summarize(self, terminalreporter: Any) -> None:
        from ..captures import Provenance

        failed = [result for result in self.results if result["failed"]]
        warned = sum(result["kind"] == "WARNED" for result in self.results)
        kinds = ", ".join(sorted({result["kind"] for result in failed}))
        text = f"qsa: {len(self.results) - len(failed)} of {len(self.results)} assertions hold"
        text += f", {len(failed)} fail ({kinds})" if failed else ""
        text += f", {warned} of them with a warning" if warned else ""
        terminalreporter.write_sep("-", text)
        # Results are builtins here, for they may come from a worker of pytest-xdist.
        runs = {(result["subject"], Provenance.of(result["run"]).executed_as) for result in self.results}
        for subject, how in sorted(runs):
            if how:
                terminalreporter.write_line(f"{subject} was executed as {how}")
        waived = [(result, use) for result in self.results for use in result["waivers"] if use["state"] == "in force"]
        for result, use in waived:
            terminalreporter.write_line(f"waiver {use['text']}: {result['nodeid']}")
        if self.written:
            terminalreporter.write_line(f"report: {self.written}")

    def _for_github(self) -> list[str]:
        """Write the step's summary, and return the annotations, if this runs in GitHub Actions."""
        if os.environ.get("GITHUB_ACTIONS") != "true" or not (self.results or self.suite_errors):
            return []
        from ..report import annotation_lines, append_summary

        lines = list(annotation_lines(self.results, self.suite_errors))
        if self.results and (summary := os.environ.get("GITHUB_STEP_SUMMARY")):
            try:
                append_summary(Path(summary), self.results)
            except OSError as error:  # the verdicts stand without it
                lines.append(f"the step summary was not written: {error}")
        return lines

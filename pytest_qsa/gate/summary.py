"""The end of a run: verdicts of every process collected, the report and comments written, the terminal's summary.

A run without a gate imports this module as well: rooms are imported when they are used.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .. import common, suite
from ..suite import (
    DESELECTED,
    NOT_RUN,
    REMARKS,
    TIERS,
    WORKER_COLLECTED,
    WORKER_NOT_RUN,
    WORKER_PROBLEM,
    WORKER_REMARKS,
)
from .options import WORKER_ALLOWED, WORKER_RUN, Options
from .reporting import FIELD, FLOOR, colour

if TYPE_CHECKING:
    from .. import captures, engine, metrics, report, tools, verdicts
    from ..captures import Outline, Request
    from ..report import PlainVerdict
    from ..suite import Subject
    from .gate import Gate
else:
    captures, engine, metrics, report, tools, verdicts = (
        common.Room(f"pytest_qsa.{name}") for name in ("captures", "engine", "metrics", "report", "tools", "verdicts")
    )


MOST_NOT_RUN = 20
LONGEST_WAIVER = timedelta(days=366)


def always_within(result: Mapping[str, Any]) -> str:
    """Say what a metric never leaves, if all bounds of a passed assertion lie at its ends; empty where one can fail."""
    metric = metrics.METRICS.get(result["query"].get("metric", ""))
    if metric is None or not result["rows"]:
        return ""
    low, high = metric.reach(result["query"]["over"] or result["query"]["reduce"])
    for row in result["rows"]:
        sides = (row["low"] is None or row["low"] <= low, row["high"] is None or row["high"] >= high)
        if row["baseline"] is not None or not all(sides):
            return ""
    ends = (f"below {low:g}" if low > -math.inf else "", f"above {high:g}" if high < math.inf else "")
    return f"{metric.name} is never {' or '.join(filter(None, ends))}"


def _write(terminalreporter: pytest.TerminalReporter, line: str) -> None:
    """Write one line that may hold text of a suite or of a checkpoint."""
    terminalreporter.write_line(common.visible(line))


class Reporter:
    """Collects the verdicts of all processes, and writes the report at the end. Registered on the controller alone."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self.config = config
        self.options = options
        self.results: list[PlainVerdict] = []
        self.started = time.time()
        self.written: str | None = None
        self.unwritten: str | None = None
        self.not_run: dict[str, str] = {}
        self.problem: str | None = None
        self.suite_errors: list[str] = []
        self.selected: list[pytest.Item] = []
        self.outcomes: dict[str, str] = {}
        self.collected: dict[str, Any] | None = None
        self.remarks: dict[tuple[str, str], None] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what is wrong with a suite, for GitHub."""
        if report.failed:
            self.suite_errors.append(report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the verdicts off a report, whichever process made it, and colour its text."""
        if report.failed and getattr(report, FIELD, None):
            colour(report)
        if str(report.outcome) != "rerun":  # pytest-rerunfailures' own
            self.results += getattr(report, FIELD, ())
            self._note_outcome(report)

    def _note_outcome(self, report: pytest.TestReport) -> None:
        """Note what becomes of a test: any part of it that did not pass decides, an expected failure too."""
        outcome = "an expected failure" if hasattr(report, "wasxfail") else str(report.outcome)
        if outcome != "passed" or report.when == "call":
            known = self.outcomes.setdefault(report.nodeid, outcome)
            self.outcomes[report.nodeid] = outcome if known == "passed" else known

    # pytest-xdist's hooks, which pluggy does not know where that isn't installed.
    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker where plots go, and what the operator allows: the command line doesn't say who wrote a part."""
        node.workerinput[WORKER_RUN] = self.options.run
        python, arguments = self.options.vllm
        allowed = (self.options.allow_code, list(map(str, self.options.allowed)), python, list(arguments))
        node.workerinput[WORKER_ALLOWED] = allowed

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take what a worker's tier left out, or why it ran nothing; each worker collects all tests."""
        output = getattr(node, "workeroutput", {})
        self.not_run.update(output.get(WORKER_NOT_RUN, {}))
        self.remarks |= dict.fromkeys(output.get(WORKER_REMARKS, []))
        self.problem = output.get(WORKER_PROBLEM, self.problem)
        self.collected = output.get(WORKER_COLLECTED, self.collected)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Take what the tier left out of a run without workers, and the tests of a plan."""
        self.selected = session.items if self.options.plan else []
        left_out: Mapping[str, str] = self.config.stash.get(NOT_RUN, {})
        self.not_run.update(left_out)
        remarks: Sequence[tuple[str, str]] = self.config.stash.get(REMARKS, ())
        self.remarks |= dict.fromkeys(remarks)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write report.json and report.html. What a killed run left half written goes, whatever this one writes."""
        if self.problem:
            # As `plugin._stop` ends a run without workers.
            session.exitstatus = pytest.ExitCode.INTERRUPTED
        for folder in self.options.output.glob("**/"):
            common.remove_unfinished(folder)
        self._write_comment()
        failed = any(result["failed"] for result in self.results)
        if not self.results or self.options.report == "never" or (self.options.report == "on-failure" and not failed):
            return
        try:
            content = self._session() | self._compared() | {"manifest": self._manifest(session)}
            self.written = common.shown_path(report.write_run(self.results, self.options.run_folder, content))
        except Exception as error:  # the verdicts stand without it
            self.written = f"not written: {type(error).__name__}: {error}"

    def _write_comment(self) -> None:
        if self.options.markdown is None or not (self.results or self.suite_errors):
            return
        try:
            text = report.comment(self.results, self.suite_errors, self._remarks())
            common.write_atomically(self.options.markdown, text)
        except OSError as error:  # the verdicts stand without it
            self.unwritten = f"{common.shown_path(self.options.markdown)} was not written: {error}"

    def _compared(self) -> dict[str, Any]:
        """Return what comparisons need beside the results."""
        from . import manifest

        return {"machine": manifest.this_machine(), "sizes": manifest.sizes_of_subjects(self.results)}

    def _manifest(self, session: pytest.Session) -> dict[str, Any]:
        """Return what the run was of: its files by their hashes, its tests, and all that was overridden."""
        from . import manifest

        found = self.collected
        if found is None:
            left: dict[str, str] = self.config.stash.get(DESELECTED, {})
            found = manifest.collected(session.items, self.options, left)
        uses = [use for result in self.results for use in result["waivers"] if use["state"] == "in force"]
        made = manifest.manifest_of(found, self.config, self.options, self.outcomes, (use["text"] for use in uses))
        return made | {"errors": [text.strip().partition("\n")[0] for text in self.suite_errors]}

    def _session(self) -> dict[str, Any]:
        not_run = [{"nodeid": nodeid, "tier": tier} for nodeid, tier in sorted(self.not_run.items())]
        kinds = [result["kind"] for result in self.results]
        return {
            "command": common.scrubbed(shlex.join(["pytest", *map(str, self.config.invocation_params.args)])),
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "duration_s": round(time.time() - self.started, 1),
            "tier": self.options.tier,
            "not_run": not_run,
            "counts": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "version": version("pytest-qsa"),
        }

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say in one line how the gate stands and where the report lies."""
        if self.problem:
            terminalreporter.write_line(common.visible(f"qsa: {self.problem}"), red=True)
        for line in self._for_github():
            terminalreporter.write_line(line)  # the only lines that are to be commands
        if self.unwritten:
            _write(terminalreporter, f"qsa: {self.unwritten}")
        if self.selected:
            self._plan(terminalreporter)
        if self.results:
            self._summarize(terminalreporter)
        elif self.remarks:
            terminalreporter.write_sep("-", "qsa")
        for level, text in self._remarks():
            _write(terminalreporter, f"{level}: {text}")
        if self.results and self.written:
            _write(terminalreporter, f"report: {self.written}")
        if self.not_run:
            self._list_not_run(terminalreporter)
        if self.options.ratchet and self.results:
            self._propose(terminalreporter)

    def _plan(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what would run: sites, sizes, time, and the settings that fit."""
        from .collection import QsaSuite, plain_name
        from .gate import Gate

        # A gate of its own: with --collect-only no test has asked for the fixture.
        gate = Gate(self.config, self.options, suite.Captures())
        planned = gate.planned(self.selected)
        tests = (
            (plain_name(item), subject, needs, isinstance(item.parent, QsaSuite)) for item, subject, needs in planned
        )
        terminalreporter.write_sep("-", "qsa: what would run; nothing was loaded")
        # Not `engine.this_machine` itself: to name it loads torch, which only a plan with a pass needs.
        plans = tools.plan_lines(
            tools.gathered(tests, gate.positions_needed(self.selected)),
            self.options.cache_folder,
            lambda *a: engine.this_machine(*a),
            partial(self._foreseen, gate),
        )
        for line in plans:
            _write(terminalreporter, line)

    def _foreseen(
        self, gate: Gate, subject: Subject, needs: Sequence[Request], kept: Outline | None
    ) -> list[tuple[str, str]]:
        """Return the tests of a subject that could not be judged, and why; with one of them a plan isn't sound.

        `kept`: the layers by a capture that would answer; without it they are found by the model's configuration.
        """
        find = partial(gate.outline_of, subject, needs) if kept is None else lambda as_loaded: kept
        try:
            found = gate.foreseen(self.selected, subject, find)
        except common.QsaError as error:
            found = {"every test of it": str(error)}
        if found:
            self.selected[0].session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return list(found.items())

    def _propose(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the patch that tightens budgets, and write it; it is applied by hand."""
        limits = [limit for result in self.results for limit in result["limits"]]
        patch = verdicts.patch_of(limits, verdicts.project_root(self.config.rootpath))
        if not patch:
            terminalreporter.write_sep("-", "qsa: no budget can be tightened")
            return
        file = self.options.output / "ratchet.patch"
        terminalreporter.write_sep("-", "qsa: budgets that could be tighter")
        for line in patch.split("\n"):
            _write(terminalreporter, line)
        try:
            common.write_atomically(file, patch)
            _write(terminalreporter, f"to accept, at the root of the repository: git apply {common.shown_path(file)}")
        except OSError as error:
            _write(terminalreporter, f"not written: {error}")

    def _list_not_run(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List what a tier left out, later tiers last: a reader must not take it for checked."""
        tiers = list(self.not_run.values())
        counts = ", ".join(f"{tier}: {tiers.count(tier)}" for tier in TIERS if tier in tiers)
        title = f"qsa: {common.counted(len(tiers), 'assertion')} skipped by --qsa-tier={self.options.tier} ({counts})"
        terminalreporter.write_sep("-", title)
        ordered = sorted(self.not_run.items(), key=lambda entry: TIERS.index(entry[1]))
        for nodeid, tier in ordered[:MOST_NOT_RUN]:
            _write(terminalreporter, f"{tier:<8} {nodeid}")
        if len(ordered) > MOST_NOT_RUN:
            _write(terminalreporter, f"… and {len(ordered) - MOST_NOT_RUN} more")

    def _summarize(self, terminalreporter: pytest.TerminalReporter) -> None:
        failed = [result for result in self.results if result["failed"]]
        warned = sum(result["kind"] == "WARNED" for result in self.results)
        kinds = ", ".join(sorted({result["kind"] for result in failed}))
        text = f"qsa: {len(self.results) - len(failed)} of {len(self.results)} assertions hold"
        text += f", {len(failed)} fail ({kinds})" if failed else ""
        text += f", {warned} of them with a warning" if warned else ""
        terminalreporter.write_sep("-", text)
        # Results are builtins here, for they may come from a worker of pytest-xdist.
        known = [(result["subject"], captures.Provenance.of(result["run"])) for result in self.results]
        runs = {(subject, run.run_as) for subject, run in known}
        for line in report.shared_layers(self.results):
            _write(terminalreporter, line)
        for subject, how in sorted(runs):
            if how:
                _write(terminalreporter, f"executed: {subject} {how}")
        for subject, note in sorted({(subject, run.data.note) for subject, run in known if run.data.note}):
            _write(terminalreporter, f"data: {subject} ran on {note}")
        waived = [(result, use) for result in self.results for use in result["waivers"] if use["state"] == "in force"]
        for result, use in waived:
            _write(terminalreporter, f"waiver {use['text']}: {result['nodeid']}")

    def _remarks(self) -> list[tuple[str, str]]:
        """Return what a reader of a green run has to know: each text with its level, "warning" or "note"."""
        return [*self.remarks, *(("warning", text) for text in self._lenient())]

    def _lenient(self) -> Iterator[str]:
        """Yield what is more lenient than a waiver is meant to be: it has a near end, and names what it is for."""
        if self.results and self.options.today < datetime.now(UTC).date():
            yield f"--qsa-today {self.options.today} is over: waivers that have expired since count as in force"
        for subject in sorted({result["subject"] for result in self.results if FLOOR in result["hints"]}):
            yield f"{subject}: {FLOOR}"
        for result in self.results:
            if within := always_within(result):
                yield f"{result['nodeid']} holds whatever is measured: {within}, and its bound is {result['bound']}"
            for use in result["waivers"]:
                whose = f"the waiver of {use['owner']} until {use['until']}, {result['nodeid']},"
                if date.fromisoformat(use["until"]) - self.options.today > LONGEST_WAIVER:
                    yield f"{whose} ends in more than a year"
                # No layer has a name of this character alone: what finds it finds anything.
                if captures.match_layers(["\uffff"], use["layers"]):
                    yield f"{whose} is on everything: name the layers, so that the others are checked"

    def _for_github(self) -> list[str]:
        """Write the step's summary, and return the annotations, if this runs in GitHub Actions."""
        if os.environ.get("GITHUB_ACTIONS") != "true" or not (self.results or self.suite_errors):
            return []
        lines = list(report.annotation_lines(self.results, self.suite_errors))
        if self.results and (summary := os.environ.get("GITHUB_STEP_SUMMARY")):
            try:
                report.append_summary(Path(summary), self.results, self._remarks())
            except OSError as error:  # the verdicts stand without it
                lines.append(common.visible(f"the step summary was not written: {error}"))
        return lines

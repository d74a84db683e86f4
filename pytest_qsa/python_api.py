"""What the fixtures `qsa` and `qsa_baseline` give: the same engine, verdicts and report for tests in Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .assertions import Kind, Tolerance, Verdict, anomaly, judge_bounds
from .captures import Capture
from .errors import QsaError, shown_path
from .gate import Gate, GateFailure
from .judging import against_baseline
from .metrics import METRICS, Reduce
from .needs import EVERYTHING
from .plan import Request, Site
from .selection import NotMeasuredError, Positions, Selection, canonical_positions
from .series import Bounds, Series

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion


@dataclass(frozen=True)
class PlannedSelection(Selection):
    """A selection that fetches what nobody planned by a second pass."""

    gate: Gate | None = None
    request: pytest.FixtureRequest | None = None

    def series(
        self, metric: str, reduce: Reduce | None = None, positions: Positions = "all", **parameters: Any
    ) -> Series:
        """Compute a metric; on a site that the pass left out, pass again."""
        try:
            return super().series(metric, reduce, positions, **parameters)
        except NotMeasuredError:
            assert self.gate is not None
            assert self.request is not None
            needs = METRICS[metric].needs(self.site, canonical_positions(positions), parameters)
            capture = self.gate.recapture(
                self.request, Request(self.pattern, self.site, self.exclude, EVERYTHING | needs)
            )
            return Selection(capture, self.pattern, self.site, self.exclude, self.judge).series(
                metric, reduce, positions, **parameters
            )


class Qsa:
    """The fixture `qsa`: the subject's numbers. `qsa.output(regex).outlier_tokens() <= 1` is an assertion."""

    def __init__(self, gate: Gate, request: pytest.FixtureRequest) -> None:
        self._gate = gate
        self._request = request

    @property
    def capture(self) -> Capture:
        """The capture, with every number of the pass."""
        return self._gate.capture_of(self._request)

    def input(self, layers: str, *, exclude: str | None = None) -> Selection:
        """Select the inputs of the layers that the regex finds."""
        return self._select(layers, "input", exclude)

    def output(self, layers: str, *, exclude: str | None = None) -> Selection:
        """Select the outputs of the layers that the regex finds."""
        return self._select(layers, "output", exclude)

    def weight(self, layers: str, *, exclude: str | None = None) -> Selection:
        """Select the weights of the layers that the regex finds."""
        return self._select(layers, "weight", exclude)

    def _select(self, layers: str, site: Site, exclude: str | None) -> Selection:
        return PlannedSelection(self.capture, layers, site, exclude, self._judge, self._gate, self._request)

    def _judge(self, series: Series, bounds: Bounds) -> bool:
        return self.conclude(lambda: judge_bounds(series, bounds))

    def conclude(self, judge: Callable[[], Verdict]) -> bool:
        """Judge, record, and say whether it passed.

        Raises:
            GateFailure: there is nothing sound to judge; such a comparison is never just false.
        """
        __tracebackhide__ = True
        try:
            verdict = judge()
        except QsaError as error:
            verdict = anomaly(error)
        verdict = self._gate.complete(
            self._request, verdict, self.capture, where=_caller(), name=self._request.node.name
        )
        if verdict.failed and verdict.kind is not Kind.REGRESSION:
            raise GateFailure(verdict)
        return not verdict.failed


class QsaBaseline:
    """What `qsa_baseline(rel=0.05)` returns: equal to a series that is within the tolerance of its baseline."""

    __hash__ = None  # type: ignore[assignment]
    judges_series = True

    def __init__(self, qsa: Qsa, tolerance: Tolerance, snapshot: SnapshotAssertion) -> None:
        self._qsa = qsa
        self._tolerance = tolerance
        self._snapshot = snapshot

    def __eq__(self, series: object) -> bool:
        if not isinstance(series, Series):
            return NotImplemented
        return self._qsa.conclude(lambda: against_baseline(series, self._tolerance, self._qsa.capture, self._snapshot))

    def __repr__(self) -> str:
        return f"<{self._tolerance}>"


def _caller() -> str:
    """Return the file:line of the test that compares."""
    package = str(Path(__file__).parent)
    for frame in inspect.stack(context=0):
        if not frame.filename.startswith(package):
            return f"{shown_path(Path(frame.filename))}:{frame.lineno}"
    return ""

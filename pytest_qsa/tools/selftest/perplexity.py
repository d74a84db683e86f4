"""A gate on perplexity alone, as many teams have it: what it would have said of each fault, beside what the suite says.

Its number comes from the suite's own pass: a suite of one assertion on the same subject runs along.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...suite import MeasuredAssertion, SuiteFile, local_path, located

RATIO = 1.02
"""What such a gate allows. Of the unchanged checkpoint's perplexity, for that is what it passes today."""
NAME = "qsa-perplexity"
FILE = "perplexity.qsa.yaml"


@dataclass(frozen=True)
class PerplexityGate:
    """The verdict of the gate. `ratio`: to the unchanged copy's; None where `problem` says why there is no number."""

    ratio: float | None
    problem: str = ""

    @property
    def caught(self) -> bool:
        """Whether it would have failed: a ratio above `RATIO`, or no number at all."""
        return self.ratio is None or self.ratio > RATIO

    def __str__(self) -> str:
        """Write it in a cell: `× 1.31, caught`."""
        told = self.problem if self.ratio is None else f"× {self.ratio:.4g}"
        return f"{told}, {'caught' if self.caught else 'missed'}"


def makes_a_pass(file: SuiteFile) -> bool:
    """Say whether a suite runs its model, so that a perplexity costs no run of its own."""
    return any(isinstance(assertion, MeasuredAssertion) for assertion in file.assertions)


def suite_beside(file: SuiteFile) -> str:
    """Return the text of a suite on the same subject that asks for its perplexity; paths become absolute."""
    suite, folder = file.suite, file.path.parent
    assert suite.model is not None
    model, data = (part.model_dump(mode="json", exclude_unset=True) for part in (suite.model, suite.data))
    if suite.model.reference is not None:
        model["reference"] = located(folder, suite.model.reference)
    if (own := local_path(suite.data, folder)) is not None:
        data["source"] = f"custom:{own.resolve()}"
    assertion = {"id": NAME, "metric": "perplexity", "min": 0}
    memory = suite.memory.model_dump(mode="json", exclude_unset=True)
    return json.dumps({"model": model, "data": data, "memory": memory, "assertions": [assertion]}, indent=1)


def taken(results: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
    """Take the verdict on the perplexity out of a run's results; None where there is none."""
    results = list(results)
    own = [result for result in results if result["test"].partition("::")[2].partition("[")[0] == NAME]
    return [result for result in results if result not in own], own[0] if own else None


def judged(result: Mapping[str, Any] | None, healthy: float | None) -> PerplexityGate | None:
    """Say what the gate would have; None where nothing is known of the perplexity."""
    if result is None or healthy is None:
        return None
    if result["failed"]:
        return PerplexityGate(None, "does not run" if result["kind"] == "INFRA" else "not finite")
    return PerplexityGate(float(result["value"]) / healthy)

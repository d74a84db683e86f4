"""The self-test: each fault in a copy of its own, the suite on each copy through pytest, and what it says.

A run is a process of its own, as in CI: what is caught here is caught there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...captures import match_layers
from ...checkpoint import Folder
from ...common import InfraError, Scratch, SuiteError, did_you_mean, shown_path
from .copies import Mutant
from .faults import FAULTS, Fault
from .perplexity import FILE, PerplexityGate, judged, taken
from .recording import RESULTS

BISECTIONS = 4
"""So many runs between a strength that slips through and one that is caught."""


@dataclass(frozen=True)
class Catch:
    """A verdict that failed on a mutant: the test, its kind, and whether it names the layer of the fault."""

    test: str
    kind: str
    named: bool


@dataclass(frozen=True)
class Outcome:
    """What became of one fault. `caught`: by which tests; `smallest`: the smallest strength that is known to be caught.

    `skipped`: why it could not be done to this checkpoint; such a fault doesn't count. `perplexity`: what a gate on
    perplexity alone says of it, where that is known.
    """

    fault: str
    text: str
    layer: str = ""
    strength: float = 0.0
    unit: str = ""
    caught: tuple[Catch, ...] = ()
    smallest: float | None = None
    strongest: float | None = None
    skipped: str = ""
    perplexity: PerplexityGate | None = None

    @property
    def named(self) -> bool:
        """Whether a test that caught it names the layer."""
        return any(catch.named for catch in self.caught)


def done_of(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return those of the faults that could be done to the checkpoint."""
    return [outcome for outcome in outcomes if not outcome.skipped]


def score_of(outcomes: Sequence[Outcome]) -> float:
    """Return the mutation score: the share of the faults that were caught, of those that could be done.

    Raises:
        SuiteError: none could be done.
    """
    done = done_of(outcomes)
    if not done:
        raise SuiteError("none of the faults can be done to this checkpoint: there is nothing to score")
    return sum(bool(outcome.caught) for outcome in done) / len(done)


@dataclass(frozen=True)
class Selftest:
    """A suite under test. `arguments`: more arguments for pytest; `layers`: a regex of where faults may be put.

    `beside`: the text of a suite that asks for the perplexity of the same subject; empty to do without.
    """

    suite: Path
    folder: Folder
    arguments: tuple[str, ...] = ()
    layers: str | None = None
    first_only: bool = False
    bisect: str = "slipped"
    beside: str = ""

    def run(self, faults: Sequence[Fault], told: Callable[[str], None]) -> Iterator[Outcome]:
        """Yield the outcome of each fault, after the suite has passed on an unchanged copy.

        Raises:
            SuiteError: the suite fails on the checkpoint as it is, so that a failure would mean nothing.
            InfraError: pytest could not run.
        """
        with Scratch("qsa-selftest") as scratch:
            home = Path(scratch)
            told("the suite on an unchanged copy")
            healthy = self._healthy(home)
            for fault in faults:
                yield self._outcome(fault, home, healthy, told)

    def _healthy(self, home: Path) -> float | None:
        """Check that the suite passes on an unchanged copy; return its perplexity, where it has one."""
        if self.beside:
            (home / FILE).write_text(self.beside, encoding="utf-8")
        failed, perplexity = self._run(Mutant(self.folder), home, "", beside=bool(self.beside))
        if failed:
            raise SuiteError(
                f"{shown_path(self.suite)} fails on the checkpoint as it is ({failed[0].test}, {failed[0].kind}): "
                "mend that first, for a fault is caught by what fails because of it"
            )
        known = perplexity is not None and not perplexity["failed"]  # a model without logits has none
        return float(perplexity["value"]) if perplexity is not None and known else None

    def _outcome(self, fault: Fault, home: Path, healthy: float | None, told: Callable[[str], None]) -> Outcome:
        layer = self.target(fault)
        if layer is None:
            return Outcome(fault.name, fault.text, skipped="no layer of this checkpoint can have it")
        outcome = Outcome(fault.name, fault.text, layer, fault.default, fault.unit)
        told(f"{fault.name} at {layer}")
        mutant = self._mutant(fault, layer, fault.default)
        if not mutant.changed:
            return replace(outcome, skipped="it changes nothing here")
        caught, perplexity = self._run(mutant, home, layer, beside=healthy is not None)
        outcome = replace(outcome, caught=caught, perplexity=judged(perplexity, healthy))
        if not fault.graded or self.bisect == "none":
            return outcome
        if outcome.caught:
            low = fault.neutral
            smallest = self._smallest(fault, layer, low, fault.default, home, told) if self.bisect == "all" else None
            return replace(outcome, smallest=smallest or fault.default)
        return self._stronger(outcome, fault, home, told)

    def _stronger(self, outcome: Outcome, fault: Fault, home: Path, told: Callable[[str], None]) -> Outcome:
        """Look for the smallest strength that is caught of a fault that slipped through."""
        outcome = replace(outcome, strongest=fault.strongest)
        if fault.strongest == fault.default:
            return outcome
        told(f"{fault.name} × {fault.strongest:g} at {outcome.layer}")
        if not self._failures(self._mutant(fault, outcome.layer, fault.strongest), home, outcome.layer):
            return outcome
        smallest = self._smallest(fault, outcome.layer, fault.default, fault.strongest, home, told)
        return replace(outcome, smallest=smallest)

    def _smallest(
        self, fault: Fault, layer: str, low: float, high: float, home: Path, told: Callable[[str], None]
    ) -> float:
        """Bisect between a strength that slips through and one that is caught, by their geometric middle."""
        for _ in range(BISECTIONS):
            middle = middle_of(low, high, whole=fault.whole)
            if middle in (low, high):
                break
            told(f"{fault.name} {middle:.3g} at {layer}")
            if self._failures(self._mutant(fault, layer, middle), home, layer):
                high = middle
            else:
                low = middle
        return high

    def target(self, fault: Fault) -> str | None:
        """Return the layer that gets a fault: the middle one of those that can have it."""
        layers = list(fault.targets(self.folder))
        if self.layers is not None:
            layers = match_layers(layers, self.layers) or [layer for layer in layers if layer == "tokenizer"]
        return layers[len(layers) // 2] if layers else None

    def _mutant(self, fault: Fault, layer: str, strength: float) -> Mutant:
        mutant = Mutant(self.folder)
        fault.inject(mutant, layer, strength)
        return mutant

    def _failures(self, mutant: Mutant, home: Path, layer: str) -> tuple[Catch, ...]:
        return self._run(mutant, home, layer, beside=False)[0]

    def _run(
        self, mutant: Mutant, home: Path, layer: str, *, beside: bool
    ) -> tuple[tuple[Catch, ...], Mapping[str, Any] | None]:
        """Run the suite on a mutant, in a folder of ours that is gone afterwards.

        Return what failed, and the verdict on the perplexity, where it ran beside.
        """
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            copy = mutant.save(Path(scratch) / self.folder.path.name)
            suites = [self.suite, home / FILE] if beside else [self.suite]
            results, perplexity = taken(self._pytest(copy, Path(scratch) / "results.jsonl", suites))
        touched = {name.rpartition(".")[0] for name in mutant.changes} | {layer}
        failed = tuple(
            Catch(result["test"].partition("::")[2], result["kind"], bool(touched & set(result["layers"])))
            for result in results
            if result["failed"]
        )
        return failed, perplexity

    def _pytest(self, checkpoint: Path, file: Path, suites: Sequence[Path]) -> list[dict[str, Any]]:
        command = [
            sys.executable, "-m", "pytest", *map(str, suites), f"--qsa-model={checkpoint}", "--qsa-report=never",
            "--qsa-no-cache", "-q", "-p", "pytest_qsa.tools.selftest.recording", "-p", "no:cacheprovider",
            *(["-x"] if self.first_only else []), *self.arguments,
        ]  # fmt: skip
        environment = os.environ | {RESULTS: str(file)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1) or not file.exists():
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise InfraError(
                f"pytest ended with {done.returncode} on {shown_path(self.suite)}: {' | '.join(lines[-3:])}"
            )
        results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if done.returncode == 1 and not any(result["failed"] for result in results):
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            raise InfraError(f"a test failed that is no assertion of ours: {' | '.join(lines[-3:])}")
        return results


def middle_of(low: float, high: float, *, whole: bool) -> float:
    """Return the geometric middle of two strengths; the arithmetic one from 0; a whole number where only those are."""
    middle = (low * high) ** 0.5 if low > 0 else (low + high) / 2
    return float(round(middle)) if whole else middle


def chosen(names: Sequence[str]) -> list[Fault]:
    """Return the faults of these names; all of them for none.

    Raises:
        SuiteError: there is no fault of that name.
    """
    for name in names:
        if name not in FAULTS:
            raise SuiteError(f"there is no fault '{name}'{did_you_mean(name, FAULTS)}; they are {', '.join(FAULTS)}")
    return [FAULTS[name] for name in names] or list(FAULTS.values())

"""The self-test: each fault goes into a copy of its own, pytest runs the suite on each copy, and its verdicts are read.

A run is a process of its own, as in CI, so that what is caught here is caught there. A gate on perplexity alone, which
many teams have, can run along for comparison.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...captures import match_layers
from ...checkpoint import SETTING_LAYERS, Folder, format_of
from ...common import InfraError, Scratch, SuiteError, did_you_mean, shown_path, shown_time
from ...suite import ALLOW_PATH, MeasuredAssertion, Roots, SuiteFile, local_path, located
from . import recording
from .fault import Fault
from .faults import FAULTS
from .mutant import Mutant

BISECTIONS = 4
"""How many runs narrow down the smallest strength that is caught."""
MAX_RATIO = 1.02
"""What the gate on perplexity allows, relative to the unchanged checkpoint, which such a gate passes today."""
PERPLEXITY_ID = "qsa-perplexity"
PERPLEXITY_FILE = "perplexity.qsa.yaml"


@dataclass(frozen=True)
class PerplexityGate:
    """The verdict of a gate on perplexity alone.

    `ratio`: to the perplexity of the unchanged copy; None where `problem` says why there is no number.
    """

    ratio: float | None
    problem: str = ""

    @property
    def caught(self) -> bool:
        """Whether it would fail: the ratio is above `MAX_RATIO`, or there is no number."""
        return self.ratio is None or self.ratio > MAX_RATIO

    def __str__(self) -> str:
        """Return the text of a table's cell: `× 1.31, caught`."""
        ratio = self.problem if self.ratio is None else f"× {self.ratio:.4g}"
        return f"{ratio}, {'caught' if self.caught else 'missed'}"


@dataclass(frozen=True)
class Catch:
    """A test that failed on a mutant. `named`: it names the layer of the fault; `loaded`: something was measured."""

    test: str
    kind: str
    named: bool
    loaded: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of one fault.

    `caught`: by which tests. `smallest`: the smallest strength that is known to be caught. `strongest`: the strongest
    that was tried of a fault that slipped through. `skipped`: why the fault can't be put into this checkpoint; then it
    doesn't count. `perplexity`: the verdict of a gate on perplexity alone, where one ran.
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
        """Whether a test that caught the fault names its layer."""
        return any(catch.named for catch in self.caught)


def done_of(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of the faults that could be put into the checkpoint."""
    return [outcome for outcome in outcomes if not outcome.skipped]


def score_of(outcomes: Sequence[Outcome]) -> float:
    """Return the mutation score: the share of the faults in `done_of` that were caught.

    Raises:
        SuiteError: there are none.
    """
    done = done_of(outcomes)
    if not done:
        raise SuiteError("none of the faults can be done to this checkpoint: there is nothing to score")
    return sum(bool(outcome.caught) for outcome in done) / len(done)


@dataclass(frozen=True)
class Selftest:
    """A suite under test.

    `arguments`: more arguments for pytest. `layers`: a regex of the layers that may get a fault. `perplexity`: the text
    of a suite that measures the perplexity of the same subject; empty for none. `allowed`: where suites may read.
    """

    suite: Path
    folder: Folder
    arguments: tuple[str, ...] = ()
    allowed: tuple[Path, ...] = ()
    layers: str | None = None
    first_only: bool = False
    bisect: str = "slipped"
    perplexity: str = ""

    def run(self, faults: Sequence[Fault], say: Callable[[str], None]) -> Iterator[Outcome]:
        """Yield the outcome of each fault, after the suite has passed on an unchanged copy. `say` gets each step.

        Raises:
            SuiteError: the suite fails on the checkpoint as it is, so that a failure would mean nothing.
            InfraError: pytest could not run.
        """
        with Scratch("qsa-selftest") as scratch:
            home = Path(scratch)
            say("the suite on an unchanged copy")
            began = time.monotonic()
            healthy = self._healthy(home)
            for number, fault in enumerate(faults, 1):
                # With one run of each fault to go by; the strengths that are tried show in later estimates.
                left = (time.monotonic() - began) / number * (len(faults) - number + 1)
                place = f"[{number}/{len(faults)}, about {shown_time(left)} left] "
                yield self._outcome(fault, home, healthy, partial(_say_at, place, say))

    def _healthy(self, home: Path) -> float | None:
        """Check that the suite passes on an unchanged copy; return its perplexity, if it has one."""
        if self.perplexity:
            (home / PERPLEXITY_FILE).write_text(self.perplexity, encoding="utf-8")
        failed, perplexity = self._run(Mutant(self.folder), home, "", perplexity=bool(self.perplexity))
        if failed:
            raise SuiteError(
                f"{shown_path(self.suite)} fails on the checkpoint as it is ({failed[0].test}, {failed[0].kind}): "
                "mend that first, for a fault is caught by what fails because of it"
            )
        if perplexity is None or perplexity["failed"]:  # a model without logits has none
            return None
        return float(perplexity["value"])

    def _outcome(self, fault: Fault, home: Path, healthy: float | None, say: Callable[[str], None]) -> Outcome:
        layer = self.target(fault)
        if layer is None:
            return Outcome(fault.name, fault.text, skipped="no layer of this checkpoint can have it")
        outcome = Outcome(fault.name, fault.text, layer, fault.default, fault.unit)
        say(f"{fault.name} at {layer}")
        mutant = self._mutant(fault, layer, fault.default)
        if not mutant.changed:
            return replace(outcome, skipped="it changes nothing here")
        caught, perplexity = self._run(mutant, home, layer, perplexity=healthy is not None)
        outcome = replace(outcome, caught=caught, perplexity=judge_perplexity(perplexity, healthy))
        return self._graded(outcome, fault, home, say) if fault.graded and self.bisect != "none" else outcome

    def _graded(self, outcome: Outcome, fault: Fault, home: Path, say: Callable[[str], None]) -> Outcome:
        """Add the smallest strength that is caught, or the strongest that slips through."""

        def catches(strength: float) -> bool:
            say(f"{fault.name} {strength:.3g} at {outcome.layer}")
            mutant = self._mutant(fault, outcome.layer, strength)
            return bool(self._run(mutant, home, outcome.layer, perplexity=False)[0])

        if outcome.caught:
            smallest = fault.default
            if self.bisect == "all":
                smallest = smallest_caught(catches, fault.neutral, fault.default, whole=fault.whole)
            return replace(outcome, smallest=smallest)
        outcome = replace(outcome, strongest=fault.strongest)
        if fault.strongest == fault.default or not catches(fault.strongest):
            return outcome
        smallest = smallest_caught(catches, fault.default, fault.strongest, whole=fault.whole)
        return replace(outcome, smallest=smallest)

    def target(self, fault: Fault) -> str | None:
        """Return the layer that gets a fault, the middle one of those that can have it; None if there is none."""
        layers = list(fault.targets(self.folder))
        if self.layers is not None:
            # A file of settings is no layer, so that a regex of layers does not leave its fault out.
            layers = match_layers(layers, self.layers) or [layer for layer in layers if layer in SETTING_LAYERS]
        return layers[len(layers) // 2] if layers else None

    def _mutant(self, fault: Fault, layer: str, strength: float) -> Mutant:
        mutant = Mutant(self.folder)
        fault.inject(mutant, layer, strength)
        return mutant

    def _run(
        self, mutant: Mutant, home: Path, layer: str, *, perplexity: bool
    ) -> tuple[tuple[Catch, ...], Mapping[str, Any] | None]:
        """Run the suite on a mutant in a temporary folder.

        Return what failed, and the verdict on the perplexity if that was asked for.
        """
        # One copy at a time, removed after its run: a changed shard is as large as the original's.
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            copy = mutant.save(Path(scratch) / self.folder.path.name)
            suites = [self.suite, home / PERPLEXITY_FILE] if perplexity else [self.suite]
            results = self._pytest(copy, Path(scratch) / "results.jsonl", suites)
        on_perplexity = [each for each in results if each["test"].partition("::")[2].partition("[")[0] == PERPLEXITY_ID]
        # Some faults change several layers, and a test that names one of them has found it.
        touched = mutant.layers | {layer}
        stored = format_of(self.folder).layers_of
        failed = tuple(
            Catch(
                result["test"].partition("::")[2],
                result["kind"],
                bool(touched & {*result["layers"], *stored(result["layers"]).values()}),
                result["loaded"],
            )
            for result in results
            if result["failed"] and result not in on_perplexity
        )
        return failed, next(iter(on_perplexity), None)

    def _pytest(self, checkpoint: Path, file: Path, suites: Sequence[Path]) -> list[dict[str, Any]]:
        # No caches: pytest's own would lie in the user's folder, and a capture of each mutant would fill ours.
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", recording.__name__, "-p", "no:cacheprovider"]
        options = [f"--qsa-model={checkpoint}", "--qsa-report=never", "--qsa-no-cache"]
        # The suite of the perplexity lies in a folder of its own, and reads what the other one does.
        beside = [Roots().around(self.suite).repository] if len(suites) > 1 else []
        options += [f"{ALLOW_PATH}={path}" for path in (*self.allowed, *beside)]
        # The first that fails, in the suite's order: static checks come before the pass that they may save.
        options += ["-x", "-p", "no:randomly"] if self.first_only else []
        command = [*pytest, *map(str, suites), *options, *self.arguments]
        environment = os.environ | {recording.RESULTS: str(file)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        # pytest ends with 0 or 1 where tests ran; with any other code the verdicts are missing or incomplete.
        if done.returncode not in (0, 1) or not file.exists():
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise InfraError(
                f"pytest ended with {done.returncode} on {shown_path(self.suite)}: {' | '.join(lines[-3:])}"
            )
        results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        # A test of the user that fails on its own would count every fault as caught.
        if done.returncode == 1 and not any(result["failed"] for result in results):
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            raise InfraError(f"a test failed that is no assertion of ours: {' | '.join(lines[-3:])}")
        return results


def _say_at(place: str, say: Callable[[str], None], text: str) -> None:
    say(f"{place}{text}")


def smallest_caught(catches: Callable[[float], bool], low: float, high: float, *, whole: bool) -> float:
    """Bisect between a strength that slips through and one that is caught; return the smallest that is known caught."""
    for _ in range(BISECTIONS):
        middle = middle_of(low, high, whole=whole)
        if middle in (low, high):
            break
        if catches(middle):
            high = middle
        else:
            low = middle
    return high


def middle_of(low: float, high: float, *, whole: bool) -> float:
    """Return the geometric mean of two strengths, from 0 the arithmetic one; rounded where only whole ones exist."""
    # Strengths are mostly factors and span powers of ten, so that the middle is geometric.
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


def makes_a_pass(file: SuiteFile) -> bool:
    """Return whether a suite runs its model, so that the perplexity needs no pass of its own."""
    return any(isinstance(assertion, MeasuredAssertion) for assertion in file.assertions)


def perplexity_suite(file: SuiteFile) -> str:
    """Return the text of a suite that measures the perplexity of the same subject; its paths are absolute."""
    suite, folder = file.suite, file.path.parent
    assert suite.model is not None
    model, data = (part.model_dump(mode="json", exclude_unset=True) for part in (suite.model, suite.data))
    if suite.model.reference is not None:
        model["reference"] = located(folder, suite.model.reference)
    if (own := local_path(suite.data, folder)) is not None:
        data["source"] = f"custom:{own.resolve()}"
    assertion = {"id": PERPLEXITY_ID, "metric": "perplexity", "min": 0}
    memory = suite.memory.model_dump(mode="json", exclude_unset=True)
    return json.dumps({"model": model, "data": data, "memory": memory, "assertions": [assertion]}, indent=1)


def judge_perplexity(result: Mapping[str, Any] | None, healthy: float | None) -> PerplexityGate | None:
    """Return the verdict of a gate on perplexity; None where it has no number to compare with."""
    if result is None or healthy is None:
        return None
    if result["failed"]:
        return PerplexityGate(None, "no sound number" if result["loaded"] else "does not run")
    return PerplexityGate(float(result["value"]) / healthy)

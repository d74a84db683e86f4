"""The results of an eval → scores, compared with those of a reference: lm-eval's tasks, or a number of any JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..captures import match_layers
from ..common import AnomalyError, InfraError, did_you_mean, number, read_json, shown_path
from ..metrics import OVER, Bounds, Over
from ..suite import NAME_PLACEHOLDER, Boundary, ExternalAssertion
from .paired import Pairs, Samples, read_pairs

LATEST = "results_*.json"
"""The names of lm-eval's files; they hold the time of the run, so that the last name is the latest."""
DEFAULT_SAMPLES = "samples_TASK_*.jsonl"
"""The names of the files that lm-eval writes with --log_samples."""
RESULTS = "results; run the eval first"
"""What a missing file would be, for the text of its error."""
LOWER_IS_BETTER = re.compile(r"perplexity|ppl|bits_per_byte|loss|brier|(^|_)(wer|cer|ter)$")
"""Scores of which less is better, where the file doesn't say so."""
CONDITIONS = {"versions": "version", "n-shot": "n-shot", "n-samples": "samples"}
"""What lm-eval notes of each task, and two results must share to be compared."""
IMPLAUSIBLE_SIGMAS = 4.0
"""The standard errors by which a gain must exceed `implausible_gain` to be called implausible."""


@dataclass(frozen=True)
class Score:
    """One result. `stderr`: its standard error, None where the file has none. `higher`: more is better.

    `conditions`: under which it was measured. `key`: `metric,filter` of lm-eval.
    """

    name: str
    value: float
    stderr: float | None
    higher: bool
    conditions: Mapping[str, object] = field(default_factory=dict)
    key: str = ""

    def __str__(self) -> str:
        """Write the value with its standard error."""
        return number(self.value) + (f" ± {number(self.stderr)}" if self.stderr is not None else "")


@dataclass(frozen=True)
class Compared:
    """A score as it is judged. `noise`: the standard error of `value`, 0 where it isn't known. `detail`: in words.

    `pairs`: the samples of a paired comparison.
    """

    score: Score
    value: float
    noise: float
    detail: str
    reference: Score | None = None
    pairs: Pairs | None = None


@dataclass(frozen=True)
class EvalFiles:
    """Where results lie: paths are relative to `folder`. `name`, `path`: the subject's; `name` replaces `{name}`.

    `boundary`: the folders in which they may lie; None for any.
    """

    folder: Path
    name: str
    path: str = ""
    boundary: Boundary | None = None

    def at(self, named: str) -> Path:
        """Return the file, or the folder of lm-eval's results, that a suite names.

        Raises:
            InfraError: it, or the latest of the results in it, lies where nothing may be read.
        """
        path = self.checked(self.folder / named.replace(NAME_PLACEHOLDER, self.name))
        self.checked(_results_file(path))
        return path

    def checked(self, path: Path) -> Path:
        """Return a path as it is.

        Raises:
            InfraError: as `at`.
        """
        if self.boundary is not None:
            self.boundary.check(path)
        return path

    def check(self, assertion: ExternalAssertion) -> None:
        """Read the results that an assertion names.

        Raises:
            InfraError: a file is missing, or can't be read.
            AnomalyError: one is no JSON.
        """
        for named in filter(None, (assertion.file, assertion.reference)):
            read_json(_results_file(self.at(named)), RESULTS)


def eval_scores(assertion: ExternalAssertion, evals: EvalFiles) -> tuple[Sequence[Compared], Mapping[str, str]]:
    """Return the scores that an assertion judges, and what was read: the files, and the conditions of the runs.

    Raises:
        InfraError: a file is missing.
        AnomalyError: there is nothing sound in a file, or nothing that can be compared.
    """
    file = evals.at(assertion.file)
    other = evals.at(assertion.reference) if assertion.reference else None
    scores = read_scores(file, assertion)
    compared: Sequence[Compared] = [Compared(score, score.value, 0.0, str(score)) for score in scores]
    if other is not None:
        compared = compare_scores(scores, read_scores(other, assertion), assertion)
    if other is not None and assertion.compare == "paired":
        _check_model(_results_file(file), evals)
        files = _results_file(file), _results_file(other)
        compared = [_paired(each, *files, assertion, evals) for each in compared]
    compared = folded(compared, assertion.over)
    reference = {"reference": shown_path(other)} if other else {}
    return compared, {"file": shown_path(file), **shared_conditions([each.score for each in compared]), **reference}


def _check_model(file: Path, evals: EvalFiles) -> None:
    """Raise an `AnomalyError` where results are of another model than the subject, or don't say of which."""
    content = read_json(file, RESULTS)
    evaluated = content.get("model_name") if isinstance(content, dict) else None
    if not isinstance(evaluated, str) or not evaluated:
        raise AnomalyError(
            f"{shown_path(file)} doesn't say which model was evaluated (model_name, which lm-eval writes since 0.4.3)"
        )
    known = {name for full in (evals.name, evals.path) if full for name in (full, Path(full).name)}
    if known.isdisjoint((evaluated, Path(evaluated).name)):
        raise AnomalyError(
            f"{shown_path(file)} is of another model, {evaluated}, than the subject, {evals.path or evals.name}: "
            "evaluate the subject, or give it that name, model.name"
        )


def _paired(compared: Compared, file: Path, other: Path, assertion: ExternalAssertion, evals: EvalFiles) -> Compared:
    """Judge a task by the upper end of the interval of its drop, sample by sample."""
    score, pattern = compared.score, assertion.samples or DEFAULT_SAMPLES
    metric, _, filtered = score.key.partition(",")
    # The pattern finds them beside the results, where a link may lead anywhere.
    own, reference = (Samples(side, pattern, score.name) for side in (file, other))
    for side in (own, reference):
        evals.checked(side.path())
    pairs = read_pairs(own, reference, metric, filtered, score.higher)
    noted = score.conditions.get("samples")
    if isinstance(noted, int) and noted != pairs.count:
        raise AnomalyError(
            f"{score.name}: the results are of {noted} samples, {shown_path(own.path())} has {pairs.count}: "
            "they are of different runs"
        )
    return replace(compared, value=pairs.interval()[1], noise=0.0, detail=str(pairs), pairs=pairs)


def read_scores(path: Path, assertion: ExternalAssertion) -> list[Score]:
    """Read results, in the order of the file. A folder stands for the latest of lm-eval's files below it.

    Raises:
        InfraError: there is no such file, or it can't be read.
        AnomalyError: it is no JSON, has no such task, score or key, or what is there is no finite number.
    """
    file = _results_file(path)
    content = read_json(file, RESULTS)
    if assertion.pointer is not None:
        return [_pointed(content, assertion.pointer, assertion, file)]
    return _of_tasks(content, assertion, file)


def _results_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.rglob(LATEST), key=lambda file: file.name)
    if not files:
        raise InfraError(f"{shown_path(path)}: there is no {LATEST} of lm-eval below this folder")
    return files[-1]


def _of_tasks(content: object, assertion: ExternalAssertion, file: Path) -> list[Score]:
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not all(isinstance(task, dict) for task in results.values()):
        raise AnomalyError(
            f"{shown_path(file)} has no results of tasks as lm-eval writes them: of another JSON name the number's "
            "place, pointer: /scores/gsm8k"
        )
    tasks = match_layers(list(results), assertion.tasks, assertion.exclude)
    if not tasks:
        near, some = did_you_mean(assertion.tasks.strip("^$"), results), ", ".join(list(results)[:5])
        raise AnomalyError(
            f"{shown_path(file)} has no task that '{assertion.tasks}' finds{near}; it has {some or 'none'}"
        )
    return [_of_task(content, task, assertion, file) for task in tasks]


def _of_task(content: object, task: str, assertion: ExternalAssertion, file: Path) -> Score:
    results = _mapping(_mapping(content, "results"), task)
    key = _key(results, task, assertion.score or "", file)
    metric, _, kind = key.partition(",")
    error = results.get(f"{metric}_stderr,{kind}" if kind else f"{metric}_stderr")
    where = f"{shown_path(file)}: {task} {key}"
    stated = _mapping(_mapping(content, "higher_is_better"), task).get(metric)
    higher = _is_higher_better(metric, assertion, stated if isinstance(stated, bool) else None)
    noted = {name: _mapping(content, section).get(task) for section, name in CONDITIONS.items()}
    if isinstance(noted["samples"], dict):
        # `original` is the size of the data set, `effective` how much of it ran (lm-eval's --limit).
        noted["samples"] = noted["samples"].get("effective")
    conditions = {name: value for name, value in noted.items() if value is not None}
    return Score(task, _number(results[key], where), _stderr(error, where), higher, conditions, key)


def _is_higher_better(name: str, assertion: ExternalAssertion, stated: bool | None = None) -> bool:
    """Say whether more is better: by the suite, else by the file, else by the name of the score."""
    known = stated if assertion.higher_is_better is None else assertion.higher_is_better
    return not LOWER_IS_BETTER.search(name) if known is None else known


def _mapping(content: object, key: str) -> Mapping[str, object]:
    found = content.get(key) if isinstance(content, Mapping) else None
    return found if isinstance(found, dict) else {}


def _key(results: Mapping[str, object], task: str, score: str, file: Path) -> str:
    """Return the key of a score; `metric` alone stands for `metric,filter` where there is one filter."""
    keys = [key for key in results if key == score or key.partition(",")[0] == score]
    if score in keys:
        return score
    # lm-eval's `alias` is a text, not a score.
    known = [key for key, value in results.items() if "_stderr" not in key and not isinstance(value, str)]
    if not keys:
        hint = did_you_mean(score, known) or f"; it has {', '.join(known) or 'none'}"
        raise AnomalyError(f"{shown_path(file)}: {task} has no score '{score}'{hint}")
    if len(keys) > 1:
        raise AnomalyError(f"{shown_path(file)}: {task} has '{score}' by several filters: write {' or '.join(keys)}")
    return keys[0]


def _pointed(content: object, pointer: str, assertion: ExternalAssertion, file: Path) -> Score:
    value = _number(_at(content, pointer, file), f"{shown_path(file)}: {pointer}")
    error = None if assertion.stderr is None else _at(content, assertion.stderr, file)
    higher = _is_higher_better(pointer.rpartition("/")[2] or pointer, assertion)
    return Score(pointer, value, _stderr(error, f"{shown_path(file)}: {assertion.stderr}"), higher)


def _at(content: object, pointer: str, file: Path) -> object:
    """Follow a JSON Pointer (RFC 6901)."""
    here = content
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")  # in this order: `~01` stands for `~1`
        if isinstance(here, list) and key.isdecimal() and int(key) < len(here):
            here = here[int(key)]
        elif isinstance(here, dict) and key in here:
            here = here[key]
        else:
            keys: Sequence[str] = list(here) if isinstance(here, dict) else []
            hint = did_you_mean(key, keys) or (f"; there are {', '.join(keys[:5])}" if keys else "")
            raise AnomalyError(f"{shown_path(file)}: {pointer} leads nowhere: there is no '{key}'{hint}")
    return here


def _number(value: object, where: str) -> float:
    # bool is an int in Python: `true` must not pass for 1.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AnomalyError(f"{where} is no number: {json.dumps(value)[:60]}")
    if abs(value) > sys.float_info.max or not math.isfinite(value):
        raise AnomalyError(f"{where} is {str(value)[:60]}: the eval saw nothing sound")
    return float(value)


def _stderr(value: object, where: str) -> float | None:
    if value is None or value == "N/A":  # lm-eval writes N/A where it knows none
        return None
    error = _number(value, f"the standard error of {where}")
    if error < 0:
        raise AnomalyError(f"the standard error of {where} is negative: {error:g}")
    return error


def compare_scores(
    scores: Sequence[Score], references: Sequence[Score], assertion: ExternalAssertion
) -> list[Compared]:
    """Compare scores with those of the reference: `recovery` is value / reference, `drop` reference − value.

    For a score of which less is better, recovery is reference / value and drop value − reference: a larger drop is
    always worse.

    Raises:
        AnomalyError: one side lacks a score or was measured otherwise; a ratio to nothing; an implausible gain.
    """
    by_name = {score.name: score for score in references}
    missing = [score.name for score in scores if score.name not in by_name]
    if missing:
        raise AnomalyError(f"the reference has no score of {', '.join(missing[:3])}: nothing to compare with")
    lost = [name for name in by_name if name not in {score.name for score in scores}]
    if lost:
        raise AnomalyError(f"there is no score of {', '.join(lost[:3])}, which the reference has: run that as well")
    return [_compare(score, by_name[score.name], assertion) for score in scores]


def _compare(score: Score, reference: Score, assertion: ExternalAssertion) -> Compared:
    _check_conditions(score, reference)
    drop = (reference.value - score.value) * (1 if score.higher else -1)
    noise = noise_of_difference(score, reference)
    detail = f"{score} against {reference}"
    if noise is not None:
        detail += f", ± {number(noise)} of the difference"
    over, under = (score, reference) if score.higher else (reference, score)
    if assertion.compare == "recovery" and not (reference.value > 0 and under.value > 0):
        raise AnomalyError(
            f"{score.name}: {over.value:g} / {under.value:g} is no recovery, which is a ratio of positive scores: "
            "compare the drop"
        )
    _check_gain(score, reference, -drop, noise or 0.0, assertion.implausible_gain)
    if assertion.compare in ("drop", "paired"):
        return Compared(score, drop, noise or 0.0, detail, reference)
    return Compared(score, over.value / under.value, (noise or 0.0) / reference.value, detail, reference)


def noise_of_difference(score: Score, reference: Score) -> float | None:
    """Return the standard error of the difference of two scores; None where one of them has none.

    The errors of independent runs add in squares. The subject's counts at most as much as the reference's: what is
    broken is often uncertain as well, and must not gain tolerance by it (llm-compressor#1260).
    """
    if score.stderr is None or reference.stderr is None:
        return None
    return math.hypot(reference.stderr, min(score.stderr, reference.stderr))


def _check_conditions(score: Score, reference: Score) -> None:
    for name, own in score.conditions.items():
        # What only one side notes is no difference.
        other = reference.conditions.get(name, own)
        if own != other:
            raise AnomalyError(
                f"{score.name} can't be compared: {name} {own}, of the reference {other}; run both evals alike"
            )


def _check_gain(score: Score, reference: Score, gain: float, noise: float, implausible: float) -> None:
    if gain > implausible * abs(reference.value) + IMPLAUSIBLE_SIGMAS * noise:
        raise AnomalyError(
            f"{score.name} is implausibly better than the reference: {score} against {reference}; was it "
            f"another task, prompt or model? If it is meant so, raise implausible_gain ({implausible:g})"
        )


def widened_bounds(bounds: Sequence[Bounds], scores: Sequence[Compared], assertion: ExternalAssertion) -> list[Bounds]:
    """Widen each bound by the assertion's `sigmas`, in standard errors of the difference.

    Raises:
        AnomalyError: a score has no standard error, or the bound would be so wide that the worst score were within it;
            or a paired comparison has too few samples for its bound.
    """
    for own, score in zip(bounds, scores, strict=True):
        if score.pairs is not None and own.max is not None:
            score.pairs.check_reachable(own.max, score.score.name)
    if not assertion.sigmas:
        return list(bounds)
    return [_widened(own, score, assertion) for own, score in zip(bounds, scores, strict=True)]


def _widened(bounds: Bounds, compared: Compared, assertion: ExternalAssertion) -> Bounds:
    if bounds == Bounds():  # a group without a bound
        return bounds
    name, reference, sigmas = compared.score.name, compared.reference, assertion.sigmas
    if reference is None or compared.score.stderr is None or reference.stderr is None:
        raise AnomalyError(f"{name} has no standard error in both files, which sigmas needs: leave it out, or name it")
    low = None if bounds.min is None else bounds.min - sigmas * compared.noise
    high = None if bounds.max is None else bounds.max + sigmas * compared.noise
    if assertion.compare == "recovery":
        worthless = low is not None and low <= 0
    else:
        worthless = high is not None and compared.score.higher and high >= reference.value
    if worthless:
        raise AnomalyError(
            f"{name} has too few samples for this bound: with {sigmas:g} standard errors of the difference "
            f"({number(compared.noise)} each) the worst score of all would pass; evaluate more samples, or lower sigmas"
        )
    return Bounds(low, high)


def folded(scores: Sequence[Compared], over: Over | None) -> Sequence[Compared]:
    """Fold the tasks into one: their errors add in squares, as those of independent runs; a maximum has the largest."""
    if over is None:
        return scores
    label = f"{over} of {len(scores)} tasks"
    noises = np.array([score.noise for score in scores])
    joint = {"sum": np.linalg.norm(noises), "mean": np.linalg.norm(noises) / len(noises), "max": noises.max()}
    value = OVER[over](np.array([score.value for score in scores]))
    own = _folded([each.score for each in scores], label, over)
    references = [each.reference for each in scores if each.reference is not None]
    reference = _folded(references, label, over) if references else None
    return [Compared(own, value, float(joint[over]), label, reference)]


def _folded(scores: Sequence[Score], label: str, over: Over) -> Score:
    value = OVER[over](np.array([score.value for score in scores]))
    sure = all(score.stderr is not None for score in scores)
    return Score(label, value, 0.0 if sure else None, all(score.higher for score in scores))


def shared_conditions(scores: Sequence[Score]) -> Mapping[str, str]:
    """Return the conditions that all scores share, for a reader."""
    shared: dict[str, str] = {}
    for name in dict.fromkeys(name for score in scores for name in score.conditions):
        values = {str(score.conditions.get(name)) for score in scores}
        if len(values) == 1:
            shared[name] = values.pop()
    return shared

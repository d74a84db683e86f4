"""Samples of lm-eval, paired by question: how much worse the subject may be than its reference, in an interval of 95 %.

Both models answer the same questions, so that the difference is surer than two separate scores are: only the questions
that one of them got right, and the other wrong, tell them apart.
"""

from __future__ import annotations

import glob
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import MOST_TEXT, AnomalyError, InfraError, counted, number, parsed_json, refuse_special, shown_path
from ..metrics import newcombe, t_quantile

TASK = "TASK"
"""The place of the task's name in the pattern of the files of samples."""
FEWEST_SAMPLES = 2
"""The fewest samples of which a spread can be known."""


@dataclass(frozen=True)
class Samples:
    """Where one side's samples of a task lie: `file` is lm-eval's results, `pattern` the names beside it."""

    file: Path
    pattern: str
    task: str

    def path(self) -> Path:
        """Return the file of samples: that of the same run as the results, else the latest that the pattern finds.

        Raises:
            InfraError: there is none.
        """
        pattern = self.pattern.replace(TASK, glob.escape(self.task))
        found = sorted(self.file.parent.glob(pattern), key=lambda file: file.name)
        run = self.file.stem.removeprefix("results_")  # lm-eval writes the time of the run into both names
        same = [file for file in found if file.stem.endswith(run)]
        if not found:
            raise InfraError(
                f"{shown_path(self.file)}: there is no {self.pattern.replace(TASK, self.task)} beside it, which a "
                "paired comparison reads: run lm-eval with --log_samples, or name the files, samples: PATTERN"
            )
        return (same or found)[-1]


@dataclass(frozen=True)
class Pairs:
    """What both models scored on the same samples, more is better: `own` and `reference`, [n] float64."""

    own: NDArray[np.float64]
    reference: NDArray[np.float64]

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.own)

    @property
    def drop(self) -> float:
        """By how much the subject's mean is lower than the reference's."""
        return float(np.mean(self.reference - self.own))

    @cached_property
    def is_binary(self) -> bool:
        """Whether each sample is right or wrong, and nothing between."""
        return all(bool(np.isin(side, (0.0, 1.0)).all()) for side in (self.own, self.reference))

    @cached_property
    def table(self) -> tuple[int, int, int, int]:
        """How many samples both got right, only the reference (lost), only the subject (gained), and neither."""
        own, reference = self.own == 1, self.reference == 1
        both = int(np.sum(own & reference))
        lost, gained = int(np.sum(reference & ~own)), int(np.sum(own & ~reference))
        return both, lost, gained, self.count - both - lost - gained

    def interval(self) -> tuple[float, float]:
        """Return the ends of the interval of the drop: Newcombe's where samples are right or wrong, else Student's."""
        if self.is_binary:
            return newcombe(*self.table)
        differences = self.reference - self.own
        width = t_quantile(self.count - 1) * float(np.std(differences, ddof=1)) / math.sqrt(self.count)
        return self.drop - width, self.drop + width

    def check_reachable(self, margin: float, task: str) -> None:
        """Raise an `AnomalyError` where a subject that lost no sample at all would not be within `margin` either."""
        if not self.is_binary:
            return  # without a loss the differences are all 0, and so is the width of their interval
        right = int(self.reference.sum())
        if newcombe(right, 0, 0, self.count - right)[1] > margin:
            needed = samples_needed(right / self.count, margin)
            raise AnomalyError(
                f"{task}: {self.count:,} samples can't show a drop of at most {margin:g}, not even without one that "
                f"was lost: it takes about {needed:,}; evaluate more samples, or raise max"
            )

    def __str__(self) -> str:
        """Write the drop with its interval, what was lost and gained, and how likely chance alone gives that."""
        low, high = self.interval()
        text = f"drop {number(self.drop)}, 95 % interval {number(low)} to {number(high)}, of {self.count:,} samples"
        if not self.is_binary:
            return text
        _, lost, gained, _ = self.table
        return f"{text}: {lost:,} lost, {gained:,} gained, McNemar's exact p {mcnemar(lost, gained):.2g}"


def read_pairs(own: Samples, reference: Samples, metric: str, filtered: str, higher: bool) -> Pairs:
    """Read the samples of a task on both sides and join them by doc_id and the hash of the prompt.

    `metric`, `filtered`: the score and the filter as lm-eval names them. `higher`: more is better.

    Raises:
        InfraError: a file is missing or can't be read.
        AnomalyError: it is no JSONL of samples, a sample stands in it twice, has no such score or no partner, was asked
            with another prompt; both sides are one file; or there are too few.
    """
    files = own.path(), reference.path()
    if files[0].samefile(files[1]) or files[0].read_bytes() == files[1].read_bytes():
        raise AnomalyError(
            f"{own.task}: both sides have the same samples, {shown_path(files[0])} and {shown_path(files[1])}: "
            "that compares a model with itself"
        )
    mine, theirs = (_values(file, metric, filtered) for file in files)
    _check_joined(mine, theirs, own.task)
    sign = 1.0 if higher else -1.0
    pairs = Pairs(*(np.array([side[key] for key in theirs]) for side in (mine, theirs)))
    if pairs.is_binary and not higher:
        return Pairs(1 - pairs.own, 1 - pairs.reference)
    return Pairs(sign * pairs.own, sign * pairs.reference)


def _check_joined(mine: Mapping[tuple[str, str], float], theirs: Mapping[tuple[str, str], float], task: str) -> None:
    alone, missing = mine.keys() - theirs.keys(), theirs.keys() - mine.keys()
    asked_alike = {doc for doc, _ in alone} & {doc for doc, _ in missing}
    if asked_alike:
        raise AnomalyError(
            f"{task}: {counted(len(asked_alike), 'sample')} had another prompt than the reference's, such as doc_id "
            f"{min(asked_alike)}: run both evals with the same shots, template and instructions"
        )
    for keys, side in ((missing, "the subject's"), (alone, "the reference's")):
        if keys:
            raise AnomalyError(
                f"{task}: {counted(len(keys), 'sample')} missing in {side} file, such as doc_id {min(keys)[0]}: "
                "run both evals over the same samples"
            )
    if len(mine) < FEWEST_SAMPLES:
        raise AnomalyError(f"{task}: there are too few samples to compare: {len(mine)}")


def _values(file: Path, metric: str, filtered: str) -> dict[tuple[str, str], float]:
    """Return (doc_id, hash of the prompt) → score of the samples of one filter."""
    values: dict[tuple[str, str], float] = {}
    for line, sample in _lines(file):
        where = f"{shown_path(file)}:{line}"
        if sample.get("filter", filtered) != filtered:
            continue
        key = str(sample.get("doc_id")), str(sample.get("prompt_hash"))
        if "doc_id" not in sample or "prompt_hash" not in sample:
            raise AnomalyError(f"{where}: is no sample of lm-eval, for it has no doc_id and prompt_hash")
        if key in values:
            raise AnomalyError(f"{where}: doc_id {key[0]} stands in this file twice: it was written by several runs")
        values[key] = _score(sample.get(metric), f"{where}: {metric}")
    if not values:
        raise AnomalyError(f"{shown_path(file)} has no sample with the filter '{filtered}'")
    return values


def _lines(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    refuse_special(file, MOST_TEXT)
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number_, line in enumerate(stream, start=1):
                if line.strip():
                    sample = parsed_json(line)
                    if not isinstance(sample, dict):
                        raise ValueError(f"line {number_} is no object")
                    yield number_, sample
    except OSError as error:
        raise InfraError(f"{shown_path(file)}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise AnomalyError(f"{shown_path(file)}: is no JSON Lines: {str(error)[:120]}") from None


def _score(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:  # a bool is an int: right or wrong
        raise AnomalyError(f"{where} is {json.dumps(value)[:60]}, not the score of one sample: compare: drop instead")
    return float(value)


def samples_needed(share: float, margin: float) -> int:
    """Return about how many samples can show a drop of at most `margin` where none is lost. `share`: of right ones."""

    def enough(count: int) -> bool:
        right = round(share * count)
        return newcombe(right, 0, 0, count - right)[1] <= margin

    many = 1
    while not enough(many):
        many *= 2
    few = many // 2
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact p of McNemar's test, two-sided: how likely chance alone splits the differing samples so far."""
    differing = lost + gained
    tail = sum(math.comb(differing, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(2 * tail / 2**differing))

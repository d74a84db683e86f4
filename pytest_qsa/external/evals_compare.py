"""Scores beside those of a reference: what is kept or lost, how sure that is, and what is too good to be true."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..common import AnomalyError, number
from ..metrics import OVER, Bounds, Over
from .evals import Score

Comparison = Literal["value", "recovery", "drop"]
COMPARISONS: tuple[Comparison, ...] = get_args(Comparison)
SURE = 4.0
"""So many standard errors beyond what is believed a gain has to be before it is called implausible."""


@dataclass(frozen=True)
class Compared:
    """A score as it is judged. `noise`: one standard error of `value`, 0 where it isn't known. `detail`: in words."""

    score: Score
    value: float
    noise: float
    detail: str
    reference: Score | None = None


def compared(
    scores: Sequence[Score], references: Sequence[Score] | None, comparison: Comparison, *, implausible_gain: float
) -> list[Compared]:
    """Hold scores beside those of the reference: `recovery` is value / reference, `drop` reference − value.

    Of a score of which less is better, recovery is reference / value and drop value − reference: more of a drop is
    always worse.

    Raises:
        AnomalyError: the reference lacks a score or was measured otherwise; a ratio to nothing; an implausible gain.
    """
    if references is None:
        return [Compared(score, score.value, 0.0, _told(score)) for score in scores]
    by_name = {score.name: score for score in references}
    missing = [score.name for score in scores if score.name not in by_name]
    if missing:
        raise AnomalyError(f"the reference has no score of {', '.join(missing[:3])}: nothing to compare with")
    lost = [name for name in by_name if name not in {score.name for score in scores}]
    if lost:
        raise AnomalyError(f"there is no score of {', '.join(lost[:3])}, which the reference has: run that as well")
    return [_beside(score, by_name[score.name], comparison, implausible_gain) for score in scores]


def _beside(score: Score, reference: Score, comparison: Comparison, implausible_gain: float) -> Compared:
    _check_conditions(score, reference)
    drop = (reference.value - score.value) * (1 if score.higher else -1)
    noise = noise_of_difference(score, reference)
    told = f"{_told(score)} against {_told(reference)}"
    if noise is not None:
        told += f", ± {number(noise)} of the difference"
    over, under = (score, reference) if score.higher else (reference, score)
    if comparison == "recovery" and not (reference.value > 0 and under.value > 0):
        raise AnomalyError(
            f"{score.name}: {over.value:g} / {under.value:g} is no recovery, which is a ratio of positive scores: "
            "compare the drop"
        )
    _check_gain(score, reference, -drop, noise or 0.0, implausible_gain)
    if comparison == "drop":
        return Compared(score, drop, noise or 0.0, told, reference)
    return Compared(score, over.value / under.value, (noise or 0.0) / reference.value, told, reference)


def noise_of_difference(score: Score, reference: Score) -> float | None:
    """Return the standard error of the difference of two scores; None where one of them has none.

    The errors of independent runs add in squares. The subject's counts at most as much as the reference's: what has
    gone wrong is often uncertain as well, and must not gain tolerance by it (llm-compressor#1260).
    """
    if score.stderr is None or reference.stderr is None:
        return None
    return math.hypot(reference.stderr, min(score.stderr, reference.stderr))


def _check_conditions(score: Score, reference: Score) -> None:
    for name, own in score.conditions.items():
        other = reference.conditions.get(name, own)
        if own != other:
            raise AnomalyError(
                f"{score.name} can't be compared: {name} {own}, of the reference {other}; run both evals alike"
            )


def _check_gain(score: Score, reference: Score, gain: float, noise: float, implausible: float) -> None:
    if gain > implausible * abs(reference.value) + SURE * noise:
        raise AnomalyError(
            f"{score.name} is implausibly better than the reference: {_told(score)} against {_told(reference)}; was it "
            f"another task, prompt or model? If it is meant so, raise implausible_gain ({implausible:g})"
        )


def _told(score: Score) -> str:
    return number(score.value) + (f" ± {number(score.stderr)}" if score.stderr is not None else "")


def widened(
    bounds: Sequence[Bounds], scores: Sequence[Compared], comparison: Comparison, sigmas: float
) -> list[Bounds]:
    """Let each bound out by so many standard errors of the difference.

    Raises:
        AnomalyError: a score has none, or the bound would be so wide that a score of nothing would be within it.
    """
    if not sigmas:
        return list(bounds)
    return [_widened(own, score, comparison, sigmas) for own, score in zip(bounds, scores, strict=True)]


def _widened(bounds: Bounds, compared: Compared, comparison: Comparison, sigmas: float) -> Bounds:
    name, reference = compared.score.name, compared.reference
    if reference is None or compared.score.stderr is None or reference.stderr is None:
        raise AnomalyError(f"{name} has no standard error in both files, which sigmas needs: leave it out, or name it")
    low = None if bounds.min is None else bounds.min - sigmas * compared.noise
    high = None if bounds.max is None else bounds.max + sigmas * compared.noise
    if comparison == "recovery":
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


def conditions_of(scores: Sequence[Score]) -> Mapping[str, str]:
    """Return the conditions that all scores share, for a reader."""
    shared: dict[str, str] = {}
    for name in dict.fromkeys(name for score in scores for name in score.conditions):
        values = {str(score.conditions.get(name)) for score in scores}
        if len(values) == 1:
            shared[name] = values.pop()
    return shared

"""The scores of an eval against a budget → a Verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..captures import Provenance
from ..common import shown_path
from ..external import Compared, Wanted, compared, conditions_of, folded, read_scores, widened
from ..metrics import Series
from ..suite import NAME_PLACEHOLDER, ExternalAssertion
from .budgets import Budget, budget_of
from .verdict import Verdict, judge_bounds


def judge_scores(assertion: ExternalAssertion, folder: Path, name: str) -> tuple[Verdict, Budget]:
    """Judge an eval. `folder`: what its paths are relative to; `name`: of the subject.

    Raises:
        InfraError: a file is missing or no JSON.
        AnomalyError: there is nothing sound in it, or nothing that can be compared.
    """
    file = folder / assertion.file.replace(NAME_PLACEHOLDER, name)
    other = folder / assertion.reference.replace(NAME_PLACEHOLDER, name) if assertion.reference else None
    scores = _scores(assertion, file, other)
    values = np.array([score.value for score in scores])
    series = Series([score.score.name for score in scores], values, assertion.query)
    series.check()
    budget = budget_of(assertion.stated, series.layers, None)
    bounds = widened(budget.bounds, scores, assertion.compare, assertion.sigmas)
    text = budget.text + (f" ± {assertion.sigmas:g} standard errors" if assertion.sigmas else "")
    verdict = judge_bounds(series, bounds, text)
    details = {score.score.name: score.detail for score in scores}
    rows = [replace(row, detail=details[row.layer]) for row in verdict.rows]
    headline = f"{verdict.headline} ({rows[0].detail})"
    return replace(verdict, rows=rows, headline=headline, run=provenance(file, other, scores)), budget


def _scores(assertion: ExternalAssertion, file: Path, other: Path | None) -> Sequence[Compared]:
    wanted = Wanted(
        assertion.tasks, assertion.exclude, assertion.score, assertion.pointer, assertion.stderr,
        assertion.higher_is_better,
    )  # fmt: skip
    scores = read_scores(file, wanted)
    references = read_scores(other, wanted) if other else None
    gain = assertion.implausible_gain
    return folded(compared(scores, references, assertion.compare, implausible_gain=gain), assertion.over)


def provenance(file: Path, reference: Path | None, scores: Sequence[Compared]) -> Provenance:
    """Return what was read: the files, and under which conditions the scores were measured."""
    conditions = conditions_of([each.score for each in scores])
    evals = {"file": shown_path(file), **conditions} | ({"reference": shown_path(reference)} if reference else {})
    return Provenance(evals=evals)

"""Verdicts without pytest: a series or an assertion judged by plain calls."""

from __future__ import annotations

from datetime import date

from pytest_qsa.metrics.series import Bounds
from pytest_qsa.verdicts.budgets import Budget
from pytest_qsa.verdicts.explainers import Context, explain
from pytest_qsa.verdicts.judge import Identity, concluded, judge_assertion
from pytest_qsa.verdicts.judgement import within_budget

TODAY = date(2027, 1, 31)


def judge_bounds(series, bounds: Bounds):
    """Return the verdict on a series whose layers all have the same bounds."""
    return concluded(within_budget(series, Budget.of(bounds, series.layers)), Identity())


def judged(assertion, evidence, *, today=TODAY, **keywords):
    """Return the verdict on an assertion of a suite."""
    return judge_assertion(assertion, evidence, Identity(assertion.id), today, **keywords)


def explained(verdict, capture, files=None, origins=None):
    """Return a verdict with what explains it. `files`: returns the checkpoint's."""
    return explain(verdict, Context(capture, files, {} if origins is None else origins))

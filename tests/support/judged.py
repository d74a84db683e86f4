"""Verdicts without pytest: a series or an assertion judged by plain calls."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np

from pytest_qsa import Capture
from pytest_qsa.captures.sites import SiteNumbers
from pytest_qsa.common import InfraError
from pytest_qsa.metrics.series import Bounds
from pytest_qsa.suite.load import load_suite
from pytest_qsa.suite.yaml_source import YamlSource
from pytest_qsa.verdicts.budgets import Budget
from pytest_qsa.verdicts.explainers import Context, explain
from pytest_qsa.verdicts.judge import Identity, concluded, judge_assertion
from pytest_qsa.verdicts.judgement import within_budget
from support.captures import statistics

TODAY = date(2027, 1, 31)


def judge_bounds(series, bounds: Bounds):
    """Return the verdict on a series whose layers all have the same bounds."""
    return concluded(within_budget(series, Budget.of(bounds, series.layers)), Identity())


def judged(assertion, evidence, *, today=TODAY, **keywords):
    """Return the verdict on an assertion of a suite."""
    return judge_assertion(assertion, evidence, Identity(assertion.id), today, **keywords)


def explained(verdict, capture, files=None, origins=None):
    """Return a verdict with what explains it. `files`: returns the checkpoint's; without it there are none."""
    return explain(verdict, Context(capture, files or no_files, {} if origins is None else origins))


def no_files():
    """Raise as a model of a fixture does, which has no files."""
    raise InfraError("no files")


def assertion_of(**keys):
    """Return an assertion as a suite has it."""
    model = {"path": "int8", "reference": "original", "previous": "v1"}
    return load_suite(YamlSource(Path("a.qsa.yaml"), {"model": model, "assertions": [{"id": "a", **keys}]})).assertions[
        0
    ]


def capture_of(values, pieces=None):
    """Return a capture of the outputs of blocks: layer i saw one sample, whose token-wise maxima are `values[i]`."""
    layers = tuple(f"layers.{index}" for index in range(len(values)))
    sites = {(layer, "output"): _numbers(np.array(row, np.float32)) for layer, row in zip(layers, values, strict=True)}
    tokens = (np.arange(len(values[0]), dtype=np.int32),)
    return Capture(sites, layers, layers, tokens, pieces or {})


def _numbers(tokens):
    one, peaks = np.zeros(1, np.int32), np.argsort(-tokens)[None, :4].astype(np.int32)
    arrays = {"token_max": tokens, "peaks": peaks, "peak_channels": np.full_like(peaks, 5)}
    lengths = np.array([len(tokens)])
    return SiteNumbers("float32", (len(tokens), 8), True, statistics("tokens", "sinks"), one, one, lengths, arrays)

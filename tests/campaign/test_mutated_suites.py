"""Suites that were damaged by a seed: each is refused in one line, or runs; none hangs, or runs code."""

from __future__ import annotations

import re
import time

import pytest
import yaml

from pytest_qsa.common import SuiteError
from pytest_qsa.suite import load_suite
from support.mutations import damaged_text, damaged_tree, draws
from support.projects import Project

CHUNK = 50
SLOW = 5.0
TRACES = re.compile(
    r"INTERNALERROR|Traceback \(most recent|pytest_qsa/[\w/]+\.py:\d+: |^E   \w*(Error|Exception)\b", re.MULTILINE
)
CANARY = "from pathlib import Path\nPath(__file__).with_name('canary').touch()\n"


def base_of(llama, int8):
    """Return the tree of a suite that uses most of the language."""
    blocks, linears = r"layers\.\d$", r"(q|down)_proj$"
    waiver = {"layers": r"layers\.1$", "until": "2099-01-01", "reason": "x", "owner": "me"}
    return {
        "model": {"name": "int8", "path": str(int8), "reference": str(llama), "dtype": "float32"},
        "data": {"source": "sample", "num_samples": 2, "seq_len": 16, "seed": 0},
        "memory": {"device": "cpu"},
        "defaults": {"layers": blocks, "site": "output"},
        "assertions": [
            {"id": "peaks", "metric": "absmax", "max": 100, "reason": "why", "tier": "pr"},
            {"id": "near", "metric": "sqnr", "layers": linears, "min": 5},
            {"id": "drift", "metric": "rms", "baseline": {"rel": 0.1, "abs": 0.01}},
            {"id": "tokens", "metric": "outlier_tokens", "threshold": 6, "positions": "no_sink", "max": 3},
            {"id": "weights", "metric": "rms", "site": "weight", "layers": linears, "max": 10, "min": 0},
            {"id": "words", "metric": "kl_divergence", "layers": None, "site": "logits", "max": 1},
            {"id": "files", "metric": "checkpoint_health"},
            {"id": "waived", "metric": "absmax", "max": 0, "waive": [waiver]},
            {"id": "bounds", "metric": "absmax", "max": {"default": 9, "first": 100}, "exclude": "layers.3"},
        ],
    }


def mutated(rng, tree):
    """Return the text of a suite that was damaged as a tree, as text, or both."""
    way = rng.random()
    if way < 0.7:
        tree = damaged_tree(rng, tree, edits=rng.choice((1, 1, 3)))
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)
    return damaged_text(rng, text) if way > 0.6 else text


def lacks_assertions(file):
    """Say whether a suite can be read and checks nothing."""
    try:
        return not load_suite(file).assertions
    except SuiteError:
        return False


@pytest.fixture(scope="module")
def tree(llama, int8_llama):
    return base_of(llama, int8_llama)


def test_a_damaged_suite_is_refused_in_one_line_of_its_file(tree, tmp_path):
    wrong, loaded = [], 0
    file = tmp_path / "a.qsa.yaml"
    for number, rng in draws("suites", 60, 2000):
        file.write_text(mutated(rng, tree), encoding="utf-8", errors="surrogatepass")
        began = time.process_time()
        try:
            load_suite(file)
            loaded += 1
        except SuiteError as error:
            wrong += [(number, str(error))] if "\n" in str(error) or not str(error).startswith(str(file)) else []
        except BaseException as error:
            wrong.append((number, repr(error)))
        if (took := time.process_time() - began) > SLOW:
            wrong.append((number, f"{took:.1f} s"))
    assert wrong == []
    assert loaded  # else nothing of what follows a load was tried


@pytest.mark.process
def test_a_damaged_suite_ends_in_verdicts_and_runs_nothing(tree, tmp_path):
    wrong = []
    numbered = list(draws("suites", 12, 2000))
    for first in range(0, len(numbered), CHUNK):
        project = Project(tmp_path / f"p{first}")
        project.write("canary.py", CANARY)
        project.write("good.qsa.yaml", yaml.safe_dump(tree))
        for number, rng in numbered[first : first + CHUNK]:
            file = project.folder / f"s{number}.qsa.yaml"
            file.write_text(mutated(rng, tree), encoding="utf-8", errors="surrogatepass")
            if lacks_assertions(file):  # which ends the run of all others, and has a test of its own
                file.unlink()
        run = project.pytest("--continue-on-collection-errors", "--qsa-report=always", "--junitxml=j.xml")
        wrong += [
            (first, run.out[max(0, found.start() - 700) : found.end() + 200]) for found in TRACES.finditer(run.out)
        ]
        wrong += [(first, f"exit code {run.code}: {run.out[-500:]}")] if run.code not in (0, 1) else []
        wrong += [(first, "it ran code")] if (project.folder / "canary").exists() else []
        assert "good.qsa.yaml::peaks" in run.reports
    assert wrong == []

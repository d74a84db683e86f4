"""Evals compared sample by sample: the interval of what was lost, and files that can't be paired."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pytest_qsa.common.errors import AnomalyError, InfraError, SuiteError
from pytest_qsa.external.evals import EvalFiles
from pytest_qsa.external.paired import Pairs, mcnemar, newcombe, samples_needed, t_quantile
from pytest_qsa.metrics import wilson
from pytest_qsa.suite import load_suite
from pytest_qsa.verdicts.judge import judge_evals
from pytest_qsa.verdicts.judgement import NO_LENIENCY
from support.projects import Project

RUN = "2026-11-01T10-00-00.000000"


class PairedEvals:
    """A project with lm-eval's results and samples of a subject `int8` and its original `base`."""

    def __init__(self, folder):
        self.project = Project(folder)

    def write(self, name, scores, *, metric="acc", higher=True, model=None, prompts=None, **more):
        values = [float(value) for value in scores]
        self.project.write(
            f"{name}/results_{RUN}.json",
            json.dumps(
                {
                    "results": {"quiz": {f"{metric},none": float(np.mean(values)), f"{metric}_stderr,none": "N/A"}},
                    "higher_is_better": {"quiz": {metric: higher}},
                    "n-samples": {"quiz": {"original": 9999, "effective": more.get("effective", len(values))}},
                    "model_name": model or f"checkpoints/{name}",
                }
            ),
        )
        prompts = prompts or [f"p{index}" for index in range(len(values))]
        lines = [
            {"doc_id": index, "prompt_hash": prompts[index], "filter": "none", "metrics": [metric], metric: value}
            for index, value in enumerate(values)
        ]
        self.samples(name, lines[:: more.get("order", 1)])

    def samples(self, name, lines, run=RUN):
        self.project.write(f"{name}/samples_quiz_{run}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def judge(self, keys="", *, bound="max: 0.02", score="acc", reference="base"):
        entry = (
            f"{{id: a, metric: external, file: '{{name}}', reference: {reference}, score: {score}, compare: paired"
            f"{', ' + bound if bound else ''}{', ' + keys if keys else ''}}}"
        )
        suite = self.project.write("gate.qsa.yaml", f"assertions:\n  - {entry}\n")
        (assertion,) = load_suite(suite).assertions
        return judge_evals(assertion, EvalFiles(self.project.folder, "int8", "checkpoints/int8"), NO_LENIENCY)


@pytest.fixture
def evals(tmp_path):
    return PairedEvals(tmp_path / "project")


def outcomes(both, lost, gained, neither):
    """Return the scores of the subject and of the reference, 1 for right."""
    own = [1] * both + [0] * lost + [1] * gained + [0] * neither
    return own, [1] * (both + lost) + [0] * (gained + neither)


def test_the_interval_is_newcombes_of_the_example_in_his_paper():
    # Statistics in Medicine 17 (1998), 2635, table: 36, 12, 2, 0 by method 10
    low, high = newcombe(36, 12, 2, 0)
    assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)


def test_the_parts_of_the_statistics_are_those_of_tables():
    # Student's t, 0.975: 12.706, 4.303, 2.228, 1.984
    assert [round(t_quantile(degrees), 3) for degrees in (1, 2, 10, 100)] == [12.706, 4.303, 2.228, 1.984]
    assert np.round(wilson(0, 20), 4).tolist() == [0.0, 0.1611]  # Newcombe 1998, 17, 857, method 3
    assert np.round(wilson(81, 263), 4).tolist() == [0.2553, 0.3662]
    assert mcnemar(1, 10) == pytest.approx(2 * (1 + 11) / 2**11)
    assert mcnemar(5, 5) == 1.0


def test_the_upper_end_of_the_drop_is_judged_and_what_was_lost_is_printed(evals):
    own, base = outcomes(600, 40, 24, 336)
    evals.write("int8", own)
    evals.write("base", base)
    low, high = newcombe(600, 40, 24, 336)
    verdict = evals.judge(bound=f"max: {high - 1e-6:.9f}")
    assert verdict.failed
    assert verdict.rows[0].value == pytest.approx(high)
    p = sum(math.comb(64, k) for k in range(25)) * 2 / 2**64
    for text in ("drop 0.016", f"{low:.4g} to {high:.4g}", "of 1,000 samples: 40 lost, 24 gained", f"exact p {p:.2g}"):
        assert text in verdict.headline
    assert not evals.judge(bound=f"max: {high + 1e-6:.9f}").failed


def test_a_score_between_right_and_wrong_gets_the_paired_t_interval(evals):
    rng = np.random.default_rng(0)
    base = rng.random(200)
    own = base - 0.01 + 0.05 * rng.standard_normal(200)
    evals.write("int8", own, metric="f1")
    evals.write("base", base, metric="f1")
    differences = base - own
    end = differences.mean() + 1.971956544 * differences.std(ddof=1) / math.sqrt(200)  # t of 199 degrees
    assert evals.judge(score="f1", bound="max: 1").rows[0].value == pytest.approx(end, abs=1e-7)


def test_where_less_is_better_more_is_a_drop_and_much_less_is_implausible(evals):
    evals.write("base", np.full(50, 1.0), metric="wer", higher=False)
    evals.write("int8", np.full(50, 1.25), metric="wer", higher=False)
    assert evals.judge(score="wer").rows[0].value == pytest.approx(0.25)
    evals.write("int8", np.full(50, 0.75), metric="wer", higher=False)
    with pytest.raises(AnomalyError, match="implausibly better"):
        evals.judge(score="wer")


def test_samples_are_joined_whatever_their_order_in_the_file(evals):
    own, base = outcomes(500, 30, 20, 300)
    evals.write("base", base)
    evals.write("int8", own)
    straight = evals.judge().rows[0].value
    evals.write("int8", own, order=-1)
    assert evals.judge().rows[0].value == straight


def test_too_few_samples_are_anomalous_and_say_how_many_it_takes(evals):
    own, base = outcomes(30, 0, 1, 19)
    evals.write("int8", own)
    evals.write("base", base)
    needed = samples_needed(0.6, 0.005)
    with pytest.raises(AnomalyError, match=f"50 samples can't show a drop of at most 0.005.* about {needed:,}"):
        evals.judge(bound="max: 0.005")
    right = round(0.6 * needed)
    assert newcombe(right, 0, 0, needed - right)[1] <= 0.005
    assert newcombe(round(0.6 * (needed // 2)), 0, 0, needed // 2 - round(0.6 * (needed // 2)))[1] > 0.005


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (
            "none",
            InfraError,
            "there is no samples_quiz_*.jsonl beside it, which a paired comparison reads: run lm-eval",
        ),
        ("other model", AnomalyError, "is of another model, org/else, than the subject, checkpoints/int8"),
        ("no model", AnomalyError, "doesn't say which model was evaluated"),
        ("same file", AnomalyError, "both sides have the same samples"),
        (
            "twice",
            AnomalyError,
            f"samples_quiz_{RUN}.jsonl:101: doc_id 3 stands in this file twice",
        ),
        ("prompt", AnomalyError, "1 sample had another prompt than the reference's, such as doc_id 7"),
        ("missing", AnomalyError, "1 sample missing in the subject's file, such as doc_id 99"),
        ("count", AnomalyError, "the results are of 90 samples"),
        ("no samples", AnomalyError, "has no sample with the filter 'none'"),
        ("no score", AnomalyError, "acc is null, not the score of one sample"),
        ("no json", AnomalyError, "is no JSON Lines"),
        ("no doc", AnomalyError, "is no sample of lm-eval"),
    ],
)
def test_samples_that_cannot_be_paired_are_told_in_one_line(evals, change, kind, said):
    own, base = outcomes(60, 2, 1, 37)
    evals.write("base", base)
    rows = [
        {"doc_id": index, "prompt_hash": f"p{index}", "filter": "none", "acc": float(value)}
        for index, value in enumerate(own)
    ]
    match change:
        case "other model":
            evals.write("int8", own, model="org/else")
        case "count":
            evals.write("int8", own, effective=90)
            evals.write("base", base, effective=90)
        case _:
            evals.write("int8", own)
    results = evals.project.folder / f"int8/results_{RUN}.json"
    samples = evals.project.folder / f"int8/samples_quiz_{RUN}.jsonl"
    match change:
        case "none":
            samples.unlink()
        case "no model":
            results.write_text(results.read_text().replace("model_name", "model"))
        case "same file":
            evals.write("int8", base)
        case "twice":
            evals.samples("int8", [*rows, rows[3]])
        case "prompt":
            evals.samples("int8", [row | {"prompt_hash": "x"} if row["doc_id"] == 7 else row for row in rows])
        case "missing":
            evals.samples("int8", rows[:-1])
        case "no samples":
            evals.samples("int8", [row | {"filter": "strict"} for row in rows])
        case "no score":
            evals.samples("int8", [row | {"acc": None} for row in rows])
        case "no json":
            evals.project.write(f"int8/samples_quiz_{RUN}.jsonl", "{]\n")
        case "no doc":
            evals.samples("int8", [{"acc": 1.0}])
    with pytest.raises(kind) as error:
        evals.judge(bound="max: 0.2")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_samples_of_the_same_run_are_read_and_others_by_the_pattern_that_is_named(evals):
    own, base = outcomes(500, 10, 10, 480)
    evals.write("base", base)
    evals.write("int8", own)
    evals.samples("int8", [], run="2027-01-01T00-00-00.000000")  # later than the results, and empty
    assert evals.judge("").rows[0].value == pytest.approx(newcombe(500, 10, 10, 480)[1])
    for side in ("int8", "base"):
        folder = evals.project.folder / side
        (folder / f"samples_quiz_{RUN}.jsonl").rename(folder / "quiz.jsonl")
    assert evals.judge("samples: TASK.jsonl").rows[0].value == pytest.approx(newcombe(500, 10, 10, 480)[1])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("compare: paired, min: 0", "a paired comparison needs one bound"),
        ("compare: paired", "an assertion on an eval needs a bound"),
        ("compare: paired, max: 0.1, sigmas: 2", "takes no sigmas"),
        ("compare: paired, max: 0.1, over: mean", "takes no over"),
        ("compare: drop, max: 0.1, samples: x.jsonl", "for compare: paired"),
        ("compare: paired, max: 0.1, samples: ../x.jsonl", "samples are files beside the results"),
    ],
)
def test_a_key_that_a_paired_comparison_does_not_take_is_told_with_its_line(tmp_path, keys, said):
    suite = tmp_path / "gate.qsa.yaml"
    suite.write_text(f"assertions:\n  - {{id: a, metric: external, file: f, reference: g, score: acc, {keys}}}\n")
    with pytest.raises(SuiteError, match=r"gate\.qsa\.yaml:2: ") as error:
        load_suite(suite)
    assert said in str(error.value)


def test_the_interval_holds_the_true_drop_in_about_95_of_100_trials():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        base = rng.random(400) < 0.6
        own = np.where(rng.random(400) < 0.05, ~base, base)  # of 0.6 right ones 5 % are lost, of the others gained
        low, high = Pairs(own.astype(float), base.astype(float)).interval()
        held += low <= 0.05 * 0.6 - 0.05 * 0.4 <= high
    assert 925 <= held <= 980

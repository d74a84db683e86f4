"""One assertion and its evidence → one verdict, by plain calls: no pytest around it and no torch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import pytest

from pytest_qsa import Capture
from pytest_qsa.captures import GENERATION, LOGITS
from pytest_qsa.captures.provenance import DataProvenance, ModelProvenance, Provenance
from pytest_qsa.checkpoint import Files, Folder
from pytest_qsa.common.errors import AnomalyError, BaselineError, InfraError, SuiteError
from pytest_qsa.external.evals import EvalFiles
from pytest_qsa.metrics import Answer, answered
from pytest_qsa.suite.yaml_source import Place
from pytest_qsa.verdicts.baseline_file import BaselineFile
from pytest_qsa.verdicts.baselines import within_baseline
from pytest_qsa.verdicts.judge import Identity, Measurement, Release, concluded, judge_assertion
from pytest_qsa.verdicts.judgement import Judgement, checked_series
from pytest_qsa.verdicts.verdict import Kind
from support.checkpoints import edited
from support.judged import TODAY, assertion_of, capture_of, judged

PEAKS = {"metric": "magnitude", "stat": "top1", "layers": "layers", "site": "output"}
VALUES = [[1, 2, 1, 1], [1, 1, 8, 1], [1, 1, 1, 4]]
WAIVED = {"layers": "layers.1", "owner": "me", "reason": "known", "until": "2027-01-31"}


def no_baseline(series, tolerance, per, leniency):
    raise BaselineError("there is no baseline yet")


def baseline_of(values):
    """Return what holds a series against the baseline of other values."""

    def hold(series, tolerance, per, leniency):
        baseline = BaselineFile(
            dict(zip(series.layers, values, strict=True)), BaselineFile.of(series, None).query, None
        )
        return within_baseline(series, baseline, tolerance, None, ModelProvenance(), leniency)

    return hold


def verdict_of(evidence=None, **keys):
    """Return the verdict on the values, or on other evidence."""
    return judged(assertion_of(**PEAKS | keys), evidence or Measurement(capture_of(VALUES), no_baseline))


def test_a_bound_that_holds_says_what_came_nearest():
    verdict = verdict_of(max=10)
    assert verdict.kind is Kind.PASSED
    assert verdict.headline == "3 layers within max 10; nearest layers.1: 8 (80% of what is allowed)"
    assert [row.layer for row in verdict.rows] == ["layers.1", "layers.2", "layers.0"]


def test_of_layers_with_bounds_of_their_own_the_nearest_has_used_most_of_its_own():
    verdict = verdict_of(
        Measurement(capture_of([[0, 90], [0, 0.5]]), no_baseline), max={r"layers\.0$": 100, "default": 1}
    )
    assert verdict.headline.endswith("nearest layers.0: 90 (90% of what is allowed)")


def test_an_exceeded_bound_names_the_worst_layer_and_the_first_one():
    verdict = verdict_of(max=3)
    assert verdict.kind is Kind.REGRESSION
    assert verdict.headline == "layers.1: 8 (max 3); 2 of 3 layers are out of bounds"
    assert verdict.first_failing.layer == "layers.1"


def test_level_warn_softens_an_excess_and_nothing_else():
    assert verdict_of(max=3, level="warn").kind is Kind.WARNED
    assert verdict_of(AnomalyError("nothing was seen"), max=3, level="warn").kind is Kind.ANOMALOUS


@pytest.mark.parametrize(
    ("error", "kind", "updatable"),
    [
        (AnomalyError("x"), Kind.ANOMALOUS, False),
        (BaselineError("x"), Kind.ANOMALOUS, True),
        (InfraError("x"), Kind.INFRA, False),
        (SuiteError("x"), Kind.INFRA, False),
    ],
)
def test_an_error_instead_of_evidence_is_a_verdict_of_its_kind(error, kind, updatable):
    verdict = verdict_of(error, max=3)
    assert (verdict.kind, verdict.headline, verdict.updatable) == (kind, "x", updatable)
    assert verdict.query["metric"] == "magnitude"
    assert bool(verdict.accept) == updatable


def test_a_layer_that_nothing_matches_is_anomalous():
    assert verdict_of(layers="nowhere", max=3).kind is Kind.ANOMALOUS


def test_the_wrong_evidence_is_a_mistake_of_ours():
    with pytest.raises(TypeError, match="Magnitude can't be judged by EvalFiles"):
        verdict_of(EvalFiles(Path(), "m"), max=3)


def test_a_verdict_has_the_identity_of_its_test_and_the_line_of_the_bound_that_it_is_about():
    capture = capture_of(VALUES)
    test = Identity(
        "a", "int8", "folder", "pytest x", lambda key: Place(Path("a.qsa.yaml"), {"max": 7, "min": 8}[key[0]])
    )
    found = [
        judge_assertion(assertion_of(**PEAKS, **bounds, reason="why"), Measurement(capture, no_baseline), test, TODAY)
        for bounds in ({"max": 3, "min": 1}, {"min": 3, "max": 99})
    ]
    assert [str(verdict.where) for verdict in found] == ["a.qsa.yaml:7", "a.qsa.yaml:8"]
    assert {(v.id, v.subject, v.command, v.reason) for v in found} == {("a", "int8", "pytest x", "why")}


def test_the_run_is_the_capture_s_with_the_model_of_its_reference_and_else_the_subject_s_path():
    def run_of(path, reference=None):
        return Capture({}, provenance=Provenance(ModelProvenance(path)), reference=reference)

    capture = run_of("int8", run_of("original"))
    run = concluded(Judgement(Kind.PASSED, ""), Identity(path="elsewhere"), capture).run
    assert (run.model.path, run.reference.path) == ("int8", "original")
    assert concluded(Judgement(Kind.PASSED, ""), Identity(path="elsewhere")).run.model.path == "elsewhere"


def test_both_a_bound_and_a_baseline_must_hold():
    near = baseline_of([2, 8, 4])
    keys = {"max": 10, "baseline": {"rel": 0.1}}

    def judge(hold, **more):
        return judged(assertion_of(**PEAKS | keys | more), Measurement(capture_of(VALUES), hold))

    assert judge(near).bound == "baseline ± 10 %"
    drifted = judge(baseline_of([2, 6, 4]))
    assert (drifted.kind, drifted.updatable) == (Kind.REGRESSION, True)
    assert judge(no_baseline, max=3).bound == "max 3"  # an exceeded bound says it all
    assert judge(no_baseline).kind is Kind.ANOMALOUS


def test_a_waived_bound_is_shown_where_the_baseline_holds():
    keys = {"max": 7, "baseline": {"rel": 0.1}, "waive": WAIVED}
    verdict = judged(assertion_of(**PEAKS | keys), Measurement(capture_of(VALUES), baseline_of([2, 8, 4])))
    assert (verdict.kind, verdict.bound) == (Kind.WARNED, "max 7")
    assert [use.state for use in verdict.waivers] == ["in force"]


def test_an_expired_waiver_softens_nothing():
    keys = PEAKS | {"max": 7, "waive": WAIVED}
    evidence = Measurement(capture_of(VALUES), no_baseline)
    verdict = judged(assertion_of(**keys), evidence, today=date(2027, 2, 1))
    assert verdict.kind is Kind.REGRESSION
    assert verdict.headline.endswith("; the waiver of me expired on 2027-01-31")


@pytest.mark.parametrize(("times", "kind"), [(1.0, Kind.REGRESSION), (2.0, Kind.PASSED)])
def test_a_bound_that_follows_the_last_release_takes_its_numbers_layer_by_layer(times, kind):
    before = capture_of([[1, 2, 1, 1], [1, 1, 7, 1], [1, 1, 1, 4]])
    evidence = Measurement(capture_of(VALUES), no_baseline, Release("v1", None, lambda: before))
    verdict = judged(assertion_of(**PEAKS, max={"times": times, "of": "previous"}), evidence)
    assert verdict.kind is kind
    assert {row.layer: row.high for row in verdict.rows} == {
        "layers.0": 2 * times,
        "layers.1": 7 * times,
        "layers.2": 4 * times,
    }


def test_a_kept_release_is_read_from_its_baselines(tmp_path):
    series = checked_series(assertion_of(**PEAKS, max=3), capture_of(VALUES))
    (tmp_path / "a.json").write_text(BaselineFile.of(series, "tokens").dump())
    release = Release("v1", tmp_path, pytest.fail)
    assert release.values(series, "tokens", "a", pytest.fail) == {"layers.0": 2, "layers.1": 8, "layers.2": 4}
    with pytest.raises(AnomalyError, match=r"^model.previous 'v1': the last release was made on other tokens"):
        release.values(series, "others", "a", pytest.fail)
    with pytest.raises(AnomalyError, match=r"^model.previous 'v1' has no baseline b.json: give"):
        release.values(series, "tokens", "b", pytest.fail)
    (tmp_path / "c.json").mkdir()
    with pytest.raises(InfraError, match=r"^model.previous 'v1': c.json can't be read: "):
        release.values(series, "tokens", "c", pytest.fail)


def test_the_ratchet_notes_what_comes_nearest_to_a_bound_and_the_bound_itself_where_nothing_was_seen():
    assertion = assertion_of(**PEAKS, max={"layers.1": 20, "default": 5}, min=0.5)
    test = Identity(place=lambda key: Place(Path("a.qsa.yaml"), 3))

    def limits(evidence, **keywords):
        verdict = judge_assertion(assertion, evidence, test, TODAY, **keywords)
        return {limit.key: (limit.side, limit.bound, limit.nearest) for limit in verdict.limits}

    measured = Measurement(capture_of(VALUES), no_baseline)
    assert limits(measured) == {}
    assert limits(measured, ratchet=True) == {
        "layers.1": ("max", 20, 8),
        "default": ("max", 5, 4),
        "min": ("min", 0.5, 2),
    }
    assert limits(AnomalyError("x"), ratchet=True)["default"] == ("max", 5, 5)


def test_data_of_the_evidence_is_compared_with_that_of_a_release():
    def on(tokens):
        return replace(capture_of(VALUES), provenance=Provenance(data=DataProvenance(fingerprint=tokens)))

    evidence = Measurement(on("one"), no_baseline, Release("v1", None, lambda: on("other")))
    verdict = judged(assertion_of(**PEAKS, max={"times": 2, "of": "previous"}), evidence)
    assert verdict.kind is Kind.ANOMALOUS
    assert "other tokens (other, now one)" in verdict.headline


def test_answers_follow_the_last_release_on_the_same_prompts_whatever_its_text():
    def on(prompts, text):
        numbers = answered([Answer([1], "", ended) for ended in [True] * 7 + [False] * 2], [Answer([1], "", True)] * 9)
        data = DataProvenance(fingerprint=text, prompts=prompts)
        return replace(Capture({(GENERATION, LOGITS): numbers}), provenance=Provenance(data=data))

    assertion = assertion_of(metric="generation", min={"times": 1, "of": "previous", "plus": -0.3})
    for before, kind in ((on("p", "another"), Kind.PASSED), (on("q", "text"), Kind.ANOMALOUS)):
        evidence = Measurement(on("p", "text"), no_baseline, Release("v1", None, partial(deepcopy, before)))
        verdict = judged(assertion, evidence)
        assert verdict.kind is kind
    assert "the last release has answers to other prompts (q, now p)" in verdict.headline


def test_a_passed_check_of_an_unknown_format_says_how_little_it_looked_at(int8_llama, tmp_path):
    def declare(config):
        config["quantization_config"] = {"quant_method": "aqlm"}

    folder = edited(int8_llama, tmp_path / "unknown", config=declare)
    asked = assertion_of(metric="checkpoint_weights")
    notes = [judged(asked, Files(Folder(path))).headline for path in (folder, int8_llama)]
    assert "only compared with their siblings, for the format aqlm is not known" in notes[0]
    assert "siblings" not in notes[1]


UNDECLARED = {
    "compresed-tensors": (Kind.INFRA, "is not known here (did you mean 'compressed-tensors'?): correct it"),
    "nobodys": (
        Kind.INFRA,
        "config.json: quantization_config declares quant_method 'nobodys', which is not known here",
    ),
    None: (Kind.ANOMALOUS, "config.json: quantization_config names no quant_method"),
}


@pytest.mark.parametrize("method", UNDECLARED)
def test_a_format_that_nobody_knows_passes_no_check(int8_llama, tmp_path, method):
    def declare(config):
        config["quantization_config"] = {"bits": 4} | ({"quant_method": method} if method else {})

    folder = edited(int8_llama, tmp_path / "unknown", config=declare)
    for metric in ("checkpoint_weights", "checkpoint_health"):
        verdict = judged(assertion_of(metric=metric), Files(Folder(folder)))
        kind, said = UNDECLARED[method]
        assert verdict.kind is kind
        assert said in verdict.headline

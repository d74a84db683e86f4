"""What explains a verdict, by plain calls: the loader, the design, the reference's values, the tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pytest_qsa import Capture
from pytest_qsa.captures import Request
from pytest_qsa.captures.sites import SiteNumbers
from pytest_qsa.checkpoint import Files, Relation, capture_weights, open_folder
from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.metrics import Bounds, Query, Series
from pytest_qsa.verdicts.verdict import Kind
from support.captures import statistics
from support.checkpoints import edited
from support.judged import assertion_of, capture_of, explained, judge_bounds, judged, no_files

VALUES = [[1, 2, 1, 1], [1, 1, 8, 1], [1, 1, 1, 4]]


def loaded(gain):
    """Return a capture of one weight that the loader multiplied, and the verdict on how far it is from its file."""
    one = np.zeros(1, np.int32)
    stored = {"stored": np.array([4.0, 4.0 * (gain - 1) ** 2, 4.0 * gain, 4.0 * gain**2])}
    numbers = SiteNumbers("float32", (2, 2), False, statistics("stored"), one, one, np.zeros(1, np.int64), stored)
    capture = Capture({("q", "weight"): numbers}, ("q",))
    return capture, judge_bounds(capture.weight("q").loaded_weights(), Bounds(max=0))


def test_a_weight_that_differs_from_its_file_is_the_loader_s():
    capture, verdict = loaded(0.5)
    verdict = explained(verdict, capture)
    assert verdict.rows[0].detail == "the loader made it × 0.5"
    assert verdict.headline.endswith("; the loader made it × 0.5")
    assert "the loader is at fault" in verdict.hints[0]


def test_a_weight_that_is_as_in_its_file_is_said_to_be_and_no_advice_is_given():
    capture, verdict = loaded(1.0)
    verdict = explained(verdict, capture)
    assert (verdict.kind, verdict.rows[0].detail, verdict.hints) == (Kind.PASSED, "as in the file", ())


def compared(values, high):
    """Return a capture with a reference, and the verdict on a metric against it with these values."""
    capture = replace(capture_of(VALUES), reference=capture_of(VALUES))
    query = Query("sqnr", "sqnr/1", "output", "layers", positions="all")
    return capture, judge_bounds(Series(list(capture.modules), np.array(values), query), Bounds(max=high))


def files(relation, by_gptq=""):
    folder = SimpleNamespace(by_gptq=by_gptq)
    return lambda: SimpleNamespace(relation=relation, reference=None, folder=folder)


SMOOTHED, ROTATED = (Relation(kind, (), f"it is {kind}") for kind in ("smoothed", "rotated"))


@pytest.mark.parametrize(
    ("relation", "blocks", "kind"),
    [
        (Relation("same"), True, Kind.REGRESSION),
        (SMOOTHED, True, Kind.REGRESSION),
        (SMOOTHED, False, Kind.ANOMALOUS),
        (ROTATED, True, Kind.ANOMALOUS),
    ],
    ids=["same", "blocks of a smoothed one", "layers of a smoothed one", "blocks of a rotated one"],
)
def test_what_differs_by_design_is_no_regression(relation, blocks, kind):
    capture, verdict = compared([1.0, 2.0, 3.0], high=2)
    capture = capture if blocks else replace(capture, blocks=())
    verdict = explained(verdict, capture, files(relation))
    assert verdict.kind is kind
    assert verdict.headline.startswith("by design ") == (kind is Kind.ANOMALOUS)
    assert len(verdict.hints) == (kind is Kind.ANOMALOUS)


def test_a_softened_excess_stays_softened_when_it_is_by_design():
    capture, verdict = compared([1.0, 2.0, 3.0], high=2)
    verdict = explained(replace(verdict, kind=Kind.WARNED), capture, files(ROTATED))
    assert verdict.kind is Kind.WARNED
    assert verdict.headline.startswith("by design ")


def test_without_files_nothing_is_by_design_and_what_passed_is_not_asked():
    capture, verdict = compared([1.0, 2.0, 3.0], high=2)
    assert explained(verdict, capture, no_files).kind is Kind.REGRESSION
    capture, verdict = compared([1.0, 2.0, 3.0], high=9)
    assert explained(verdict, capture, pytest.fail).kind is Kind.PASSED


def test_damaged_files_leave_the_verdict_as_it_is_and_a_hint():
    capture, verdict = compared([1.0, 2.0, 3.0], high=2)

    def damaged():
        raise AnomalyError("config.json is no JSON")

    told = explained(verdict, capture, damaged)
    assert (told.kind, told.headline) == (Kind.REGRESSION, verdict.headline)
    assert told.hints == ["whether layers differ by design can't be said: config.json is no JSON"]


def test_the_origin_is_looked_for_once_a_capture():
    capture, verdict = compared([1.0, 2.0, 3.0], high=2)
    known = {capture: {"adds most": "layers.2"}}
    assert explained(verdict, capture, no_files, known).origin == {"adds most": "layers.2"}


@pytest.mark.parametrize(
    ("metric", "site", "named"),
    [("weight_sqnr", "weight", False), ("local_sqnr", "output", False), ("sqnr", "output", True)],
)
def test_a_layer_within_its_bounds_is_no_origin_of_an_error_that_another_one_has_by_itself(metric, site, named):
    capture, _ = compared([1.0, 2.0, 3.0], high=2)
    query = Query(metric, f"{metric}/1", site, "layers", positions="all")
    verdict = judge_bounds(Series(list(capture.modules), np.array([1.0, 2.0, 3.0]), query), Bounds(max=2))
    within, out = ({capture: {"adds most": f"layers.{index}: its sqnr is 1 dB"}} for index in (0, 2))
    assert ("adds most" in explained(verdict, capture, no_files, within).origin) == named
    assert explained(verdict, capture, no_files, out).origin == out[capture]


@pytest.mark.parametrize(("said", "hints"), [("recipe.yaml", 1), ("", 0)])
def test_weights_by_gptq_that_are_far_from_the_original_point_to_a_suite_of_their_own_kind(said, hints):
    capture, _ = compared([1.0, 2.0, 3.0], high=2)
    query = Query("weight_sqnr", "weight_sqnr/1", "weight", "layers")
    verdict = judge_bounds(Series(list(capture.modules), np.array([1.0, 2.0, 3.0]), query), Bounds(min=2))
    told = explained(verdict, capture, files(Relation("same"), by_gptq=said))
    assert (told.kind, len(told.hints)) == (Kind.REGRESSION, hints)
    assert all(hint.startswith("GPTQ made it (recipe.yaml)") for hint in told.hints)
    scaled = {capture: {"adds most": "layers.0: its sqnr is 1 dB", "suspect": "it is 2 × the reference's: a scale"}}
    assert not explained(verdict, capture, files(Relation("same"), by_gptq=said), scaled).hints


def test_a_metric_of_the_model_alone_shows_what_the_reference_has_there():
    other = capture_of([[1, 3, 1, 1], [1, 1, 5, 1], [1, 1, 1, 7]])
    capture = replace(capture_of(VALUES), reference=other)
    verdict = explained(judge_bounds(capture.output(".").magnitude("top1"), Bounds(max=99)), capture)
    assert {row.layer: row.reference for row in verdict.rows} == {"layers.0": 3, "layers.1": 5, "layers.2": 7}
    folded = judge_bounds(capture.output(".").magnitude("top1").folded("max"), Bounds(max=99))
    assert explained(folded, capture).rows[0].reference is None


def test_the_tokens_of_the_worst_layer_are_shown_in_their_context():
    capture = capture_of(VALUES, pieces=dict(enumerate("abcd")))
    verdict = judge_bounds(capture.output(".").outlier_tokens(threshold=3), Bounds(max=0))
    (token,) = explained(verdict, capture).evidence
    assert (token.layer, token.position, token.before, token.text, token.after) == ("layers.1", 2, "ab", "c", "d")
    assert (token.magnitude, token.ratio, token.channel) == (8, 8, 5)
    assert explained(verdict, capture.redacted()).evidence[0].text == ""


def test_a_pass_shows_no_tokens_and_an_error_explains_nothing():
    capture = capture_of(VALUES)
    assert not explained(judge_bounds(capture.output(".").outlier_tokens(), Bounds(max=9)), capture).evidence
    stopped = replace(judge_bounds(capture.output(".").outlier_tokens(), Bounds(max=0)), kind=Kind.ANOMALOUS, rows=())
    assert explained(stopped, capture) == stopped


def test_a_failure_begins_with_what_its_weights_are_in_the_reference(llama, tmp_path):
    def exchanged(weights):
        for layer in range(4):
            gate, up = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
            weights[gate], weights[up] = weights[up].clone(), weights[gate].clone()

    files = Files(open_folder(edited(llama, tmp_path / "exchanged", exchanged)), open_folder(llama))
    told = "4 of 4 gate_proj and 4 of 4 up_proj, nothing else: exchanged, each is the reference's other one"
    found = capture_weights(files, [Request("_proj$", "weight", None, statistics("error"))])
    verdict = explained(judge_bounds(found.weight("_proj$").weight_sqnr(), Bounds(min=20)), found, lambda: files)
    assert verdict.headline.startswith(f"{told}; model.layers.")
    assert verdict.headline.endswith("; 8 of 28 layers are out of bounds")
    assert verdict.origin == {"suspect": told}
    unquantized = judged(assertion_of(metric="checkpoint_unquantized", max=0), files)
    assert unquantized.headline.startswith(f"{told}; 8 problems in 8 of ")


def test_a_failure_says_what_the_files_say_of_its_worst_layer(int8_llama, tmp_path):
    scale = "model.layers.2.mlp.down_proj.weight_scale"

    def doubled(weights):
        weights[scale] = weights[scale] * 50

    files = Files(open_folder(edited(int8_llama, tmp_path / "scaled", doubled)))
    found = capture_weights(files, [Request("down_proj$", "weight", None, statistics("moments"))])
    verdict = explained(judge_bounds(found.weight("down_proj$").rms(), Bounds(max=1)), found, lambda: files)
    assert verdict.headline.endswith("; 1 of 4 layers is out of bounds; the files say so too")
    assert verdict.origin["files"].startswith(f"{scale}: the median scale is 50 ×")
    healthy = judge_bounds(found.weight("layers.1.mlp.down_proj$").rms(), Bounds(max=0))
    assert "files" not in explained(healthy, found, lambda: files).headline


def test_a_number_of_the_model_alone_is_red_by_a_weight_that_stands_elsewhere_in_the_files(llama, tmp_path):
    moved = edited(llama, tmp_path / "moved", lambda weights: weights["model.layers.1.mlp.up_proj.weight"].mul_(3))
    files = Files(open_folder(moved), open_folder(llama))
    capture = capture_of(VALUES)
    verdict = explained(judge_bounds(capture.output(".").magnitude("top1"), Bounds(max=1)), capture, lambda: files)
    told = "model.layers.1.mlp.up_proj is 3 × the reference's and otherwise the same"
    assert verdict.headline.startswith(f"{told}; ")
    assert verdict.origin == {"suspect": told}
    weights = capture_weights(files, [Request("up_proj$", "weight", None, statistics("moments"))])
    verdict = explained(
        judge_bounds(weights.weight("layers.1.mlp.up_proj$").rms(), Bounds(max=0)), weights, lambda: files
    )
    assert verdict.headline.startswith(f"{told}; measured: 0.")
    assert verdict.headline.count("model.layers.1.mlp.up_proj") == 1


def test_what_is_not_finite_begins_with_the_first_layer_and_a_dtype_that_is_too_narrow():
    def counted(dtype):
        one = np.zeros(1, np.int32)
        arrays = [{"moments": np.array([[8.0, 0, 0, 0, 1, 0, count]])} for count in (0, 2, 7)]
        sites = {
            (f"layers.{i}", "output"): SiteNumbers(dtype, (1, 8), False, statistics("moments"), one, one, one, array)
            for i, array in enumerate(arrays)
        }
        return Capture(sites, tuple(name for name, _ in sites))

    for dtype, cause in (("float16", ", in float16, whose largest number is 65504"), ("bfloat16", "")):
        capture = counted(dtype)
        verdict = explained(judge_bounds(capture.output(".").nonfinite(), Bounds(max=0)), capture)
        assert verdict.headline.startswith(f"NaN or Inf from layers.1 on{cause}; ")

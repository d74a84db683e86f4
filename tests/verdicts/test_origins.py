"""Where a difference from the original comes from: the layer that was damaged is named, and how it was."""

import copy
import re

import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.checkpoint.checks.health import Files
from pytest_qsa.checkpoint.folder import open_folder
from pytest_qsa.metrics.series import Bounds
from pytest_qsa.verdicts.origins import origin_of
from support import models
from support.checkpoints import edited, save_llama
from support.judged import explained, judge_bounds
from support.models import damaged
from support.projects import Project, suite

LAYER = "model.layers.2.mlp.down_proj"
BLOCKS, LINEAR = r"layers\.\d+$", r"_proj$"
SITES = {
    "blocks alone": [(BLOCKS, "output")],
    "weights": [(BLOCKS, "output"), (LINEAR, "weight")],
    "layers": [(LINEAR, "output")],
}


def with_weight(model, change):
    other = damaged(model, 0.002)
    weight = other.get_submodule(LAYER).weight
    with torch.no_grad():
        weight.copy_(change(weight.clone()))
    return other


def one_channel(weight):
    weight[7] *= 9
    return weight


FAULTS = {
    "2 × the reference's and otherwise the same": lambda weight: 2 * weight,
    "0.5 × the reference's and otherwise the same": lambda weight: 0.5 * weight,
    "unrelated to the reference's": lambda weight: weight.flip(0),
    "all zeros": torch.zeros_like,
    "of its error is in 7 of 32; channel 7 is 9 × the reference's": one_channel,
}


@pytest.fixture(scope="module")
def original():
    return models.llama(num_hidden_layers=4)


def compared(original, other, sites):
    names = ["sqnr", "local_sqnr"] if sites == "layers" else ["sqnr"]
    names += ["weight_sqnr"] if sites == "weights" else []
    return capture(other, [models.token_batch(2, 24)], sites=SITES[sites], statistics=names, reference=original)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_damaged_layer_is_named_with_what_is_wrong_of_its_weight(original, fault):
    told = origin_of(compared(original, with_weight(original, FAULTS[fault]), "weights"))
    assert told["adds most"].startswith(f"{LAYER}: the sqnr of its weight is ")
    assert told["suspect"].startswith(f"the weight of {LAYER} is ")
    assert fault in told["suspect"]


def test_a_layer_is_found_by_its_own_error_where_weights_were_not_compared(original):
    told = origin_of(compared(original, with_weight(original, lambda weight: 3 * weight), "layers"))
    assert told["adds most"].startswith(f"{LAYER}: on the reference's input its sqnr is -6.0")
    assert told["suspect"].startswith(f"what {LAYER} makes of the reference's input is 3 × ")


def test_the_block_where_the_error_grows_most_is_named_where_nothing_else_was_compared(original):
    told = origin_of(compared(original, with_weight(original, lambda weight: weight.flip(0)), "blocks alone"))
    assert told["adds most"].startswith("model.layers.2: the error at its output grows from ")
    assert "suspect" not in told


def test_of_many_layers_that_are_as_bad_none_is_singled_out(original):
    other = damaged(original, 0.002)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "k_proj" in name:
                weight.copy_(weight.flip(0))
    told = origin_of(compared(original, other, "weights"))
    assert told["adds most"].startswith("4 of 4 k_proj alike: the sqnr of their weights is -")
    assert "suspect" not in told


def test_the_ordinary_growth_of_error_from_block_to_block_names_no_block():
    other = models.llama(num_hidden_layers=12)
    told = origin_of(compared(other, damaged(other, 0.01), "blocks alone"))
    assert told == {}


def test_noise_alone_makes_nobody_a_suspect(original):
    told = origin_of(compared(original, damaged(original, 0.01), "weights"))
    assert "suspect" not in told


def test_identical_models_have_no_origin(original):
    assert origin_of(compared(original, copy.deepcopy(original), "weights")) == {}


def test_settings_that_cannot_be_read_hide_no_scale_that_is_off(original, int8_llama, llama, tmp_path):
    folder = edited(int8_llama, tmp_path / "broken", lambda weights: weights[f"{LAYER}.weight_scale"].mul_(4))
    (folder / "tokenizer.json").write_text("{")
    found = compared(original, with_weight(original, lambda weight: 2 * weight), "weights")
    verdict = judge_bounds(found.weight(LINEAR).weight_sqnr(), Bounds(min=99))
    files = Files(open_folder(folder), open_folder(llama))
    told = explained(verdict, found, lambda: files).origin
    assert f"; {LAYER}.weight_scale: the median scale is 4 × that of its 4 siblings" in told["suspect"]


COUNTED = """\
import pytest_qsa.verdicts.explainers as diagnosis
looked = diagnosis.origin_of
def counting(*arguments):
    with open("looks.txt", "a") as file:
        file.write("look\\n")
    return looked(*arguments)
diagnosis.origin_of = counting
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """Gate a copy of a checkpoint with one weight tripled against it."""
    folder = tmp_path_factory.mktemp("origin")
    kept = save_llama(folder / "original")
    broken = save_llama(folder / "broken", lambda weights: weights["model.layers.1.mlp.up_proj.weight"].mul_(3))
    project = Project(folder / "project")
    text = suite(
        broken,
        "id: predictions, metric: kl_divergence, max: 0",
        r"id: own, metric: local_sqnr, layers: _proj$, min: 99",
    )
    project.write("a.qsa.yaml", text.replace(f"path: {broken}", f"path: {broken}, reference: {kept}"))
    project.write("conftest.py", COUNTED)
    project.run = project.pytest("--qsa-report=always")
    return project


@pytest.mark.process
def test_a_failure_of_what_the_model_predicts_names_the_layer(failed):
    said = failed.run.labelled("::predictions")
    assert said["adds"][0].startswith("most model.layers.1.mlp.up_proj: on the reference's input")
    assert "3 × the reference's" in said["suspect"][0]
    assert "against " in said["ran"][0]


@pytest.mark.process
def test_an_estimate_stands_in_its_interval(failed):
    assert "95 %: -6.0" in failed.run.text("::own")


@pytest.mark.process
def test_the_tokens_with_the_largest_error_are_shown_in_the_terminal_and_the_report(failed):
    text = failed.run.text("::own")
    assert "the tokens with the largest error at model.layers.1.mlp.up_proj (positions: no_sink; sinks: " in text
    assert re.search(
        r"^E +\d+\.\d % of the error, \d+\.\d × median \(‖x − x̂‖ [\d.]+\) at sample \d, ", text, re.MULTILINE
    )
    assert re.search(r"% of the error, [\d.]+ × median</strong> · ‖x − x̂‖ ", failed.read("qsa-results/report.html"))


@pytest.mark.process
def test_the_report_says_so_as_well(failed):
    page = failed.read("qsa-results/report.html")
    assert "on the reference&#39;s input its sqnr is" in page


@pytest.mark.process
def test_what_fails_of_one_pass_is_explained_by_one_look(failed):
    assert {failed.run.outcomes[f"a.qsa.yaml::{name}"] for name in ("predictions", "own")} == {"failed"}
    assert failed.read("looks.txt").split() == ["look"]

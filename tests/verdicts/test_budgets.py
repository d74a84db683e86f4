"""Bounds by group: which layer gets which number, and where the bound that a failure names stands."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pytest_qsa import Capture
from pytest_qsa.common.errors import AnomalyError, SuiteError
from pytest_qsa.engine.formats.format import schemes_of
from pytest_qsa.metrics import Series, query_of
from pytest_qsa.suite import load_suite
from pytest_qsa.verdicts.budgets import budget_of, scheme_of
from pytest_qsa.verdicts.judgement import within_budget
from support import models
from support.projects import Project, peaks

LAYERS = [f"model.layers.{n}" for n in range(4)]
SCHEMES = {
    "model.layers.0.mlp.down_proj": "w8a8_int",
    "model.layers.0.mlp.up_proj": "w8a8_int",
    "model.layers.1.mlp.down_proj": "w8a8_fp",
    "model.layers.2.mlp.down_proj": "w4a16_int",
    "model.layers.2.mlp.up_proj": "w8a8_int",
}


def highs(groups, schemes=SCHEMES, layers=LAYERS):
    return [bounds.high for bounds in budget_of({"max": groups}, layers, schemes).bounds]


def test_the_first_group_that_fits_counts_and_default_is_the_rest():
    assert highs({"default": 1.0, r"layers\.[01]$": 2.0, r"layers\.[12]$": 3.0}) == [2, 2, 3, 1]


def test_a_scheme_is_that_of_the_layer_or_of_what_is_in_it():
    assert highs({"scheme:w8a8": 1.0, "scheme:mixed": 2.0, "scheme:none": 3.0}) == [1, 1, 2, 3]
    assert highs({"scheme:w8a8_int": 1.0, "scheme:w8a8_fp": 2.0, "default": 9.0}) == [1, 2, 9, 9]
    assert scheme_of("model.layers.2.mlp.down_proj", SCHEMES) == "w4a16_int"
    assert scheme_of("model.layers.2.mlp", SCHEMES) == "mixed"
    assert scheme_of("model.layers.2", {"model.layers.22.x": "w8a8_int"}) == "none"


def test_an_empty_pattern_is_a_group_of_all_layers():
    assert highs({"": 1.0}) == [1.0] * len(LAYERS)


def test_the_groups_of_several_bounds_are_independent():
    budget = budget_of({"max": {"layers.0$": 5.0, "default": 4.0}, "min": 1.0}, LAYERS, None)
    assert [(bounds.low, bounds.high) for bounds in budget.bounds] == [(1, 5), (1, 4), (1, 4), (1, 4)]
    assert budget.keys["model.layers.0", "max"] == ("max", "layers.0$")
    assert budget.keys["model.layers.0", "min"] == ("min",)
    assert budget.text == "min 1, max {layers.0$: 5, default: 4}"


@pytest.mark.parametrize(
    ("groups", "schemes", "said"),
    [
        ({"layers.[0-2]$": 1.0}, {}, "model.layers.3 is in no group of max (layers.[0-2]$): add the group `default`"),
        ({"layers.9$": 1.0, "default": 2.0}, {}, "the group 'layers.9$' of max matches none of the 4 layers"),
        ({"scheme:w4a16": 1.0, "default": None}, SCHEMES, "max checks nothing: all layers are in its group `default`"),
        ({"scheme:none": 1.0, "default": 2.0}, None, "nothing says how the layers of this checkpoint are quantized"),
    ],
)
def test_what_would_check_nothing_is_anomalous(groups, schemes, said):
    with pytest.raises(AnomalyError, match=re.escape(said)):
        highs(groups, schemes)


def test_a_default_of_null_leaves_the_other_layers_without_a_bound():
    budget = budget_of(
        {"max": {"layers.0$": 5.0, "default": None}, "min": {"layers.[01]$": 1.0, "default": None}}, LAYERS, None
    )
    assert [(bounds.low, bounds.high) for bounds in budget.bounds] == [(1, 5), (1, None), (None, None), (None, None)]
    query = query_of("absmax", "output", ".", None, {}, "all", None)
    judged = within_budget(Series(LAYERS, np.array([2.0, 0.5, -9.0, 9e9]), query), budget)
    assert [(row.layer, row.excess) for row in judged.rows] == [(LAYERS[1], -0.5), (LAYERS[0], 0)]
    assert judged.headline.endswith("1 of 2 layers is out of bounds; 2 more have no bound")
    assert "default: no bound" in budget.text


def test_a_suite_without_a_bound_for_the_rest_takes_out_that_of_its_base(tmp_path):
    keys = "metric: absmax, site: output, layers: x"
    (tmp_path / "_base.yaml").write_text(f"assertions:\n  - {{id: a, {keys}, max: {{q_proj: 3, default: 5}}}}\n")
    path = tmp_path / "a.qsa.yaml"
    path.write_text("extends: _base.yaml\nassertions:\n  a: {max: {default: null}}\n")
    assert load_suite(path).assertions[0].max == {"default": None, "q_proj": 3.0}


@pytest.mark.parametrize(
    ("keys", "line", "said"),
    [
        ("max: {'x(': 1}", 6, "'x('"),
        ("max:\n      default: null", 6, "no group has a bound, so nothing would be checked"),
        ("max:\n      a: null\n      default: 1", 6, "'a' has no number: only `default: null` means no bound"),
        ("max: {}", 6, "max: Dictionary should have at least 1 item"),
        ("max: {default: many}", 6, "default: should be a valid number, not 'many'"),
        ("max:\n      default: 1\n      'scheme:int8': 3", 6, "'scheme:int8' names no scheme: write scheme:w8a8,"),
        ("max:\n      default: 1\n      a: true", 8, "a: should be a valid number"),
        ("max: [1]", 6, "max: should be a valid number"),
        ("max: {default: 1}\n    over: sum", 6, "over makes one number of all layers, so max can't go by group"),
    ],
)
def test_a_wrong_group_is_told_at_its_line(tmp_path, monkeypatch, keys, line, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.qsa.yaml"
    path.write_text(f"assertions:\n  - id: a\n    metric: absmax\n    layers: layers\n    site: output\n    {keys}\n")
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"a.qsa.yaml:{line}: {said}")


def test_the_schemes_of_a_compressed_checkpoint_are_those_of_its_groups():
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model = models.llama()
    groups = {
        "down": preset_name_to_scheme("W4A16", ["re:.*down_proj$"]),
        "up": preset_name_to_scheme("FP8_DYNAMIC", ["re:.*up_proj$"]),
        "attention": preset_name_to_scheme("W8A8", ["re:.*q_proj$"]),
    }
    config = QuantizationConfig(config_groups=groups, ignore=["re:.*layers.1.*"])
    apply_quantization_config(model, config, show_progress=False)
    found = {name: scheme for name, scheme in schemes_of(model).items() if "layers.1." not in name}
    assert found == schemes_of(model)
    assert {name.rpartition(".")[2]: scheme for name, scheme in found.items()} == {
        "q_proj": "w8a8_int", "up_proj": "w8a8_fp", "down_proj": "w4a16_int",
    }  # fmt: skip


class FP8Linear(torch.nn.Linear):
    """Stands for what a quantizer puts in the place of a linear layer."""


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 8}, "w8a16_int"),
        ({"quant_method": "awq"}, "w4a16_int"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "w8a8_fp"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "w8a8_int"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "w4a16_fp"),
        ({"quant_method": "gguf"}, None),
    ],
)
def test_a_quantizer_that_replaces_layers_has_one_scheme_for_all_that_it_replaced(settings, scheme):
    model = torch.nn.Sequential(FP8Linear(2, 2), torch.nn.Linear(2, 2))
    model.config = SimpleNamespace(quantization_config=settings)
    assert schemes_of(model) == (None if scheme is None else {"0": scheme})


def test_a_model_that_is_not_quantized_has_no_schemes():
    assert schemes_of(models.llama()) == {}


def test_schemes_outlive_the_file_of_a_capture(tmp_path):
    for schemes in ({"a": "w8a8_int"}, {}, None):
        Capture({}, schemes=schemes).save(tmp_path / "a.qsa")
        assert Capture.load(tmp_path / "a.qsa").schemes == schemes


@pytest.fixture(scope="module")
def grouped(tmp_path_factory, llama):
    """Run bounds by group that stand in a base and in the suite that extends it."""
    project = Project(tmp_path_factory.mktemp("grouped") / "project")
    project.write(
        "_base/b.qsa.yaml",
        f"model: {{path: {llama}}}\ndata: {{num_samples: 2, seq_len: 32}}\nassertions:\n"
        f"  - {{{peaks('max: {default: 1}')}}}\n",
    )
    project.write(
        "a.qsa.yaml",
        "extends: _base/b.qsa.yaml\nassertions:\n  peaks:\n    max:\n      'layers\\.[012]$': 100\n"
        "  own:\n    metric: absmax\n    layers: layers\\.\\d$\n    site: output\n    max:\n      default: 100\n"
        "      layers\\.2$: 2\n"
        "  schemes:\n    metric: absmax\n    layers: layers\\.\\d$\n    site: output\n    max:\n"
        "      default: 100\n      scheme:none: 2\n",
    )
    return project.pytest("--qsa-report=never")


@pytest.mark.process
def test_a_failure_stands_at_the_group_whose_bound_was_exceeded(grouped):
    assert grouped.first_line("::peaks").endswith("; 1 of 4 layers is out of bounds")
    assert grouped.labelled("::peaks")["bound"][0].startswith("_base/b.qsa.yaml:4: max {")
    assert grouped.text("::own").startswith("a.qsa.yaml:12: in own\n    layers\\.2$: 2\n")
    assert grouped.first_line("::own").endswith(": 9.493 (max 2); 1 of 4 layers is out of bounds")


@pytest.mark.process
def test_layers_that_are_not_quantized_are_in_the_group_none(grouped):
    assert grouped.first_line("::schemes").endswith("; 4 of 4 layers are out of bounds")

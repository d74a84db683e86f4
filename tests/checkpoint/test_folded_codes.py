"""optimum-quanto and HQQ, whose codes of whole groups share a byte: files and numbers of the libraries themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError
from support.checkpoints import edited

ROOT = Path(__file__).parent / "fixtures"
FIXTURES = sorted(folder for kind in ("quanto", "hqq") for folder in (ROOT / kind).iterdir() if folder.is_dir())
DOWN = "model.layers.2.mlp.down_proj"
NAMES = {"codes": ("W_q", "weight._data", "weight._data._data"), "scale": ("scale", "weight._scale")}


@pytest.fixture(params=FIXTURES, ids=lambda folder: folder.name)
def made(request):
    return request.param


def findings(folder):
    return [(f.tensor, f.what) for f in problems_of(Files(open_folder(folder)), "checkpoint_health")[1]]


def test_a_healthy_checkpoint_has_no_problem(made):
    assert findings(made) == []


def test_rows_are_what_the_library_dequantizes_to(made):
    form = format_of(open_folder(made))
    for layer, expected in load_file(f"{made}.expected.safetensors").items():
        rows = form.rows(layer)
        np.testing.assert_array_equal(rows.astype(np.float32), expected)
        np.testing.assert_array_equal(form.rows(layer, slice(1, 8, 3)), rows[1:8:3])


def part(weights, kind):
    return next(weights[f"{DOWN}.{name}"] for name in NAMES[kind] if f"{DOWN}.{name}" in weights)


def constant(weights):
    part(weights, "codes").view(torch.uint8).fill_(0)


FAULTS = {
    "scale": (lambda weights: part(weights, "scale").mul_(4), "the median scale is "),
    "NaN": (lambda weights: part(weights, "scale").view(-1)[:1].fill_(float("nan")), " are NaN, the first at 0"),
    "constant": (constant, "all of it is one value"),
    "lost": (lambda weights: weights.pop(next(n for n in weights if n.startswith(DOWN) and "scale" in n)), "missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_layer_named(made, tmp_path, fault):
    edit, text = FAULTS[fault]
    found = findings(edited(made, tmp_path / "faulty", edit))
    assert any(tensor.startswith(DOWN) and text in what for tensor, what in found), found


@pytest.mark.parametrize("name", ["quanto/qint4", "hqq/3-bits-float16", "hqq/4-bits-as-bfloat16"])
def test_zero_points_that_are_off_are_found(tmp_path, name):
    def shift(weights):
        if name.startswith("hqq"):
            weights[f"{DOWN}.zero"] += 1
        else:
            weights[f"{DOWN}.weight._shift"] += 2 * weights[f"{DOWN}.weight._scale"]

    found = findings(edited(ROOT / name, tmp_path / "faulty", shift))
    assert [tensor.startswith(DOWN) for tensor, what in found if "with them the mean weight" in what] == [True]


@pytest.mark.parametrize("name", ["quanto/qint4", "hqq/3-bits-float16"])
def test_codes_that_are_cut_short_give_no_number(tmp_path, name):
    def cut(weights):
        key = next(key for key in weights if key.startswith(DOWN) and weights[key] is part(weights, "codes"))
        weights[key] = weights[key][:-1].clone()

    with pytest.raises(AnomalyError, match="too few for a weight"):
        format_of(open_folder(edited(ROOT / name, tmp_path / "cut", cut))).rows(DOWN)


def test_an_activation_scale_of_quanto_that_calibration_never_set_is_found(tmp_path):
    def reset(weights):
        for name in weights:
            if name.endswith("input_scale"):
                weights[name].fill_(1)

    found = findings(edited(ROOT / "quanto/qint8-activations", tmp_path / "reset", reset))
    assert (f"{DOWN}.input_scale", "1, as every scale of the 4 siblings model.layers.*.mlp.down_proj.input_scale: "
            "the initial value") in found  # fmt: skip


def test_a_grouped_layer_whose_rows_nothing_says_is_never_read_as_numbers(tmp_path):
    def change(config):
        config["hidden_size"] = 96

    folder = edited(ROOT / "quanto/qint4", tmp_path / "other", config=change)
    form = format_of(open_folder(folder))
    assert form.rows("model.layers.1.self_attn.q_proj") is None
    assert "how many of its groups make a row" in form.refusal("model.layers.1.self_attn.q_proj")


def test_a_map_that_lacks_a_quantized_layer_is_a_problem(tmp_path):
    folder = edited(ROOT / "quanto/qint8-activations", tmp_path / "other")
    content = json.loads((folder / "quanto_qmap.json").read_text())
    del content[DOWN]
    (folder / "quanto_qmap.json").write_text(json.dumps(content))
    found = dict(findings(folder))
    assert found[f"{DOWN}.weight._data"] == "quantized, though the configuration leaves it out"


def test_a_packing_of_hqq_that_is_not_known_is_named_and_never_read(tmp_path):
    def rename(weights):
        weights[f"{DOWN}.packing"] = torch.tensor(list(b"5bit_64"), dtype=torch.uint8)

    folder = edited(ROOT / "hqq/2-bits-axis-0", tmp_path / "other", rename)
    assert (f"{DOWN}.W_q", "packed as '5bit_64', which is not known here") in findings(folder)
    assert format_of(open_folder(folder)).rows(DOWN) is None
    assert "HQQ's packing '5bit_64' is not known" in format_of(open_folder(folder)).refusal(DOWN)

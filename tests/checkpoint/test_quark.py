"""Quark's exports: files and numbers of amd-quark itself, and by hand as it lays them out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError
from support.checkpoints import edited

EXPORTS = sorted(folder for folder in (Path(__file__).parent / "fixtures/quark").iterdir() if folder.is_dir())
UINT4 = next(folder for folder in EXPORTS if folder.name == "uint4-groups")
DOWN = "model.layers.2.mlp.down_proj"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(params=EXPORTS, ids=lambda folder: folder.name)
def made(request):
    return request.param


def findings(folder):
    return [(f.tensor, f.what) for f in problems_of(Files(open_folder(folder)), "checkpoint_health")[1]]


def test_a_healthy_export_has_no_problem(made):
    assert findings(made) == []


def test_rows_are_what_quark_rounds_to(made):
    form = format_of(open_folder(made))
    for layer, expected in load_file(f"{made}.expected.safetensors").items():
        rows = form.rows(layer)
        np.testing.assert_array_equal(rows.astype(np.float32), expected)
        np.testing.assert_array_equal(form.rows(layer, slice(3, 13, 4)), rows[3:13:4])


FAULTS = {
    "scale": (lambda w: w[f"{DOWN}.weight_scale"].mul_(4), "the median scale is "),
    "NaN": (lambda w: w[f"{DOWN}.weight_scale"].view(-1)[:1].fill_(float("nan")), " are NaN, the first at 0"),
    "constant": (lambda w: w[f"{DOWN}.weight"].fill_(0x33333333), "all of it is one value"),
    "lost": (lambda w: w.pop(f"{DOWN}.weight_scale"), "missing, though the scheme "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_layer_named(made, tmp_path, fault):
    edit, text = FAULTS[fault]
    found = findings(edited(made, tmp_path / "faulty", edit))
    assert any(tensor.startswith(DOWN) and text in what for tensor, what in found), found


def test_zero_points_that_a_symmetric_scheme_can_not_have_are_found(tmp_path):
    def shift(weights):
        weights[f"{DOWN}.weight_zero_point"].fill_(0x11111111)

    source = next(folder for folder in EXPORTS if folder.name.startswith("int4"))
    found = findings(edited(source, tmp_path / "faulty", shift))
    assert (f"{DOWN}.weight_zero_point", "64 of 64 aren't 0, as a symmetric scheme has them, the first is 1") in found


def test_zero_points_that_are_off_are_found_by_the_mean(tmp_path):
    def shift(weights):
        weights[f"{DOWN}.weight_zero_point"] += 0x11111111

    found = findings(edited(UINT4, tmp_path / "faulty", shift))
    assert [tensor for tensor, what in found if "with them the mean weight" in what] == [f"{DOWN}.weight_zero_point"]


def grouped_int8(weight):
    groups = weight.reshape(len(weight), -1, 16)
    scale = groups.abs().amax(dim=-1) / 127
    codes = (groups / scale[..., None]).round().reshape(weight.shape)
    parts = {"weight": codes.to(torch.int8).T, "weight_scale": scale.T}
    return parts, codes * scale.repeat_interleave(16, dim=1)


def fp8(weight):
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": scale.clone()}, codes.float() * scale


def mxfp4(weight):
    groups = weight.reshape(len(weight), -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(dim=-1))) - 2
    scaled = groups / 2.0 ** exponent[..., None]
    codes = (scaled[..., None] - E2M1).abs().argmin(dim=-1).reshape(weight.shape).to(torch.uint8)
    parts = {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": (exponent + 127).to(torch.uint8)}
    return parts, E2M1[codes.long()] * (2.0**exponent).repeat_interleave(32, dim=1)


SPECS = {
    "int8": (grouped_int8, {"dtype": "int8", "qscheme": "per_group", "group_size": 16, "symmetric": True}),
    "fp8": (fp8, {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "symmetric": True}),
    "mxfp4": (mxfp4, {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}),
}


def exported(source, folder, kind, **settings):
    """Store every projection as Quark does; return what it stands for, by layer."""
    make, spec = SPECS[kind]
    expected = {}

    def quantize(weights):
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            layer = name.removesuffix(".weight")
            parts, expected[layer] = make(weights.pop(name))
            weights |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}

    def declare(config):
        stated = {"quant_method": "quark", "global_quant_config": {"weight": spec}, "exclude": ["lm_head"]}
        config["quantization_config"] = stated | settings

    edited(source, folder, quantize, config=declare)
    return expected


@pytest.mark.parametrize("kind", SPECS)
def test_other_types_are_read_and_a_healthy_checkpoint_has_no_problem(llama, tmp_path, kind):
    expected = exported(llama, tmp_path / "made", kind)
    form = format_of(open_folder(tmp_path / "made"))
    np.testing.assert_allclose(form.rows(DOWN), expected[DOWN].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(form.rows(DOWN, slice(3, 9)), form.rows(DOWN)[3:9])
    assert findings(tmp_path / "made") == []


def test_the_names_of_older_exports_are_read_alike(llama, tmp_path):
    expected = exported(llama, tmp_path / "made", "int8")

    def rename(weights):
        for name in [name for name in weights if name.endswith("weight_scale")]:
            weights[name.replace("weight_scale", "weight_quantizer.scale")] = weights.pop(name)

    folder = edited(tmp_path / "made", tmp_path / "older", rename)
    np.testing.assert_allclose(format_of(open_folder(folder)).rows(DOWN), expected[DOWN].numpy(), rtol=1e-6)
    assert findings(folder) == []


def test_a_single_layer_may_have_settings_of_its_own(llama, tmp_path):
    exported(llama, tmp_path / "made", "int8", layer_quant_config={"*.mlp.down_proj": {"weight": {"dtype": "mx6"}}})
    form = format_of(open_folder(tmp_path / "made"))
    assert form.rows(DOWN) is None
    assert "Quark's mx6 is not read here" in form.refusal(DOWN)
    assert form.rows(DOWN.replace("down", "up")) is not None


def test_scales_that_are_lost_give_no_number(tmp_path):
    folder = edited(UINT4, tmp_path / "lost", lambda weights: weights.pop(f"{DOWN}.weight_scale"))
    with pytest.raises(AnomalyError, match="weight_scale is missing"):
        format_of(open_folder(folder)).rows(DOWN)


FP8_OUTPUT = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
K, V = ("model.layers.2.self_attn.k_proj", "model.layers.2.self_attn.v_proj")


def with_scales(part, layers):
    """Return a change that gives layers a scale of their inputs or outputs."""

    def change(weights):
        for index, layer in enumerate(sorted({name.rpartition(".")[0] for name in weights})):
            if layer.endswith(layers):
                weights[f"{layer}.{part}"] = torch.tensor(0.02 + 0.001 * (index * 7 % 11))

    return change


def test_static_scales_of_inputs_are_demanded_and_dynamic_ones_are_not(llama, tmp_path):
    static = {"weight": SPECS["fp8"][1], "input_tensors": FP8_OUTPUT}
    exported(llama, tmp_path / "made", "fp8", global_quant_config=static)
    whole = edited(tmp_path / "made", tmp_path / "whole", with_scales("input_scale", "_proj"))
    assert findings(whole) == []
    lost = edited(whole, tmp_path / "lost", lambda weights: weights.pop(f"{DOWN}.input_scale"))
    ((tensor, what),) = findings(lost)
    assert (tensor, "missing, though the scheme fp8_e4m3 needs it" in what) == (f"{DOWN}.input_scale", True)
    dynamic = {"weight": SPECS["fp8"][1], "input_tensors": FP8_OUTPUT | {"is_dynamic": True}}
    exported(llama, tmp_path / "dynamic", "fp8", global_quant_config=dynamic)

    def drop(weights):
        for name in [name for name in weights if name.endswith("input_scale")]:
            weights.pop(name)

    assert findings(edited(tmp_path / "dynamic", tmp_path / "none", drop)) == []
    assert len(findings(edited(tmp_path / "made", tmp_path / "all", drop))) == 28


@pytest.mark.parametrize("part", ["output_scale", "output_quantizer.scale"])
def test_scales_of_a_kv_cache_group_are_demanded_in_every_layer_and_told_once(llama, tmp_path, part):
    own = {"weight": SPECS["fp8"][1], "output_tensors": FP8_OUTPUT}
    exported(
        llama, tmp_path / "made", "fp8", export={"kv_cache_group": ["*k_proj", "*v_proj"]},
        layer_quant_config={"*k_proj": own, "*v_proj": own},
    )  # fmt: skip
    whole = edited(tmp_path / "made", tmp_path / "whole", with_scales(part, ("k_proj", "v_proj")))
    assert findings(whole) == []
    ((tensor, what),) = findings(edited(whole, tmp_path / "lost", lambda weights: weights.pop(f"{V}.{part}")))
    assert tensor == f"{V}.{part}"
    assert "though kv_cache_group is *k_proj, *v_proj: a server takes k_scale's value" in what
    none = findings(tmp_path / "made")
    assert len(none) == 4
    assert "a server runs its KV cache at 1.0" in none[0][1]


def test_a_dynamic_kv_cache_group_needs_no_scales(llama, tmp_path):
    own = {"weight": SPECS["fp8"][1], "output_tensors": FP8_OUTPUT | {"is_dynamic": True}}
    exported(
        llama, tmp_path / "made", "fp8", export={"kv_cache_group": ["*k_proj"]}, layer_quant_config={"*k_proj": own}
    )
    assert findings(tmp_path / "made") == []

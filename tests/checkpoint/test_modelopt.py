"""ModelOpt's FP8, NVFP4 and MXFP8: packed here by the formula, in float64, for no loader of theirs is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError, InfraError
from support.checkpoints import edited, fused_with

DOWN = "model.layers.2.mlp.down_proj"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
FP8 = torch.float8_e4m3fn


def fp8(weight):
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(FP8), "weight_scale": scale.float(), "input_scale": torch.tensor(0.02)}


def fp8_channel(weight):
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return {"weight": (weight / scale).to(FP8), "weight_scale": scale[:, 0].float()}


def mxfp8(weight):
    groups = weight.reshape(len(weight), -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(dim=-1))) - 8
    codes = (groups / 2.0 ** exponent[..., None]).clamp(-448, 448).to(FP8)
    return {"weight": codes.reshape(weight.shape), "weight_scale": (exponent + 127).to(torch.uint8)}


def nvfp4(weight, peak=None):
    whole = ((weight.abs().max() if peak is None else peak) / (448 * 6)).float()
    groups = weight.reshape(len(weight), -1, 16)
    scale = (groups.abs().amax(dim=-1) / 6 / whole).to(FP8)
    scaled = groups / (scale.double() * whole.double())[..., None]
    codes = (scaled[..., None] - E2M1).abs().argmin(dim=-1).reshape(weight.shape).to(torch.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    input_scale = torch.tensor(0.01)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": input_scale}


def nvfp4_awq(weight, peak):
    smoothing = torch.linspace(0.5, 2, weight.shape[1], dtype=torch.float64)
    return {**nvfp4(weight / smoothing, 2 * peak), "pre_quant_scale": smoothing.to(torch.bfloat16)}


def int8(weight):
    scale = weight.abs().amax(dim=1) / 127
    return {"weight": (weight / scale[:, None]).round().to(torch.int8), "weight_scale": scale.float()}


def int8_smoothed(weight):
    smoothing = torch.linspace(0.5, 2, weight.shape[1], dtype=torch.float64)
    return {**int8(weight / smoothing), "pre_quant_scale": smoothing, "input_scale": torch.tensor(0.02)}


def int4(weight):
    groups = weight.reshape(len(weight), -1, 16)
    scale = groups.abs().amax(dim=-1) / 7
    codes = (groups / scale[..., None]).round().reshape(weight.shape).to(torch.int8).view(torch.uint8) & 15
    return {"weight": codes[::2] | codes[1::2] << 4, "weight_scale": scale.float()}


def mxfp4(weight):
    groups = weight.reshape(len(weight), -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(dim=-1))) - 2
    codes = (groups / 2.0 ** exponent[..., None]).clamp(-6, 6)[..., None] - E2M1
    codes = codes.abs().argmin(dim=-1).reshape(weight.shape).to(torch.uint8)
    return {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": (exponent + 127).to(torch.uint8)}


ALGORITHMS = {
    "FP8": fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": fp8_channel,
    "MXFP8": mxfp8,
    "NVFP4": nvfp4,
    "NVFP4_AWQ": nvfp4_awq,
    "W8A16": int8,
    "W8A8_SQ_PER_CHANNEL": int8_smoothed,
    "W4A16_AWQ": int4,
    "W4A8_MXFP4_FP8": mxfp4,
}


def exported(source, folder, algorithm, *, config=None, **settings):
    """Pack the projections of a checkpoint, and declare it as ModelOpt does; attention of block 1 is left out."""

    def quantize(weights):
        names = [name for name in weights if name.split(".")[-2] in PROJECTIONS and "1.self_attn" not in name]
        peaks = {name: max(weights[each].abs().max().double() for each in fused_with(name)) for name in names}
        for name in names:
            shared = [peaks[name]] if algorithm.startswith("NVFP4") else []
            packed = ALGORITHMS[algorithm](weights.pop(name).double(), *shared)
            if "input_scale" in packed:
                packed["input_scale"] *= 1 + int(name.split(".")[2]) / 8  # calibrated scales differ
            stem = name.removesuffix("weight")
            weights.update({f"{stem}{part}": tensor.contiguous() for part, tensor in packed.items()})

    edited(source, folder, quantize, config=config or (lambda settings: None))
    declared = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "*.1.self_attn*"]}
    content = {"producer": {"name": "modelopt", "version": "0.39.0"}, "quantization": declared | settings}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module", params=ALGORITHMS)
def healthy(request, llama, tmp_path_factory):
    return exported(llama, tmp_path_factory.mktemp("modelopt") / "exported", request.param)


@pytest.fixture(scope="module")
def four(llama, tmp_path_factory):
    return exported(llama, tmp_path_factory.mktemp("modelopt") / "four", "NVFP4")


def findings(folder):
    return [(f.tensor, f.what) for f in problems_of(Files(open_folder(folder)), "checkpoint_health")[1]]


def test_a_healthy_checkpoint_has_no_problem(healthy):
    assert findings(healthy) == []


def by_formula(parts):
    raw = {part: torch.from_numpy(np.array(tensor.raw())) for part, tensor in parts.items()}
    weight, scale = raw["weight"], raw["weight_scale"]
    dtype = parts["weight"].dtype
    if dtype == "U8" and scale.dtype == torch.float32:  # two outputs a byte
        weight = torch.stack([weight & 15, weight >> 4], dim=1).reshape(-1, 64).double()
        weight = torch.where(weight > 7, weight - 16, weight)
    elif dtype == "U8" and parts["weight_scale"].dtype == "U8":
        weight = E2M1[torch.stack([weight & 15, weight >> 4], dim=-1).reshape(len(weight), -1).long()]
        scale = 2.0 ** (scale.double() - 127)
    elif dtype == "I8":
        weight, scale = weight.double(), scale.double()
    elif "weight_scale_2" in raw:
        weight = E2M1[torch.stack([weight & 15, weight >> 4], dim=-1).reshape(len(weight), -1).long()]
        scale = scale.view(FP8).double() * raw["weight_scale_2"].double()
    else:
        weight = weight.view(FP8).double()
        scale = 2.0 ** (scale.double() - 127) if scale.dtype == torch.uint8 else scale.double()
    if scale.dim() == 2:
        scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    weight = weight * (scale[:, None] if scale.dim() == 1 else scale)
    smoothing = parts["pre_quant_scale"].values() if "pre_quant_scale" in parts else 1.0
    return weight.numpy() * smoothing


def test_rows_follow_the_formula_and_come_near_the_original(healthy, llama):
    form, original = format_of(open_folder(healthy)), open_folder(llama).tensors[f"{DOWN}.weight"].values()
    rows = form.rows(DOWN)
    np.testing.assert_allclose(rows, by_formula(form.parts(DOWN)), rtol=1e-14)
    np.testing.assert_array_equal(form.rows(DOWN, slice(3, 9)), rows[3:9])
    assert ((rows - original) ** 2).sum() < 0.02 * (original**2).sum()


EXPORTS = sorted(folder for folder in (Path(__file__).parent / "fixtures/modelopt").iterdir() if folder.is_dir())


@pytest.mark.parametrize("folder", EXPORTS, ids=lambda folder: folder.name)
def test_what_its_own_exporter_writes_is_read_as_its_own_quantizers_round(folder):
    form = format_of(open_folder(folder))
    assert findings(folder) == []
    for layer, expected in load_file(f"{folder}.expected.safetensors").items():
        rows = form.rows(layer)
        # it rounds each of its three products to float32
        np.testing.assert_allclose(rows, expected, rtol=0, atol=2.0**-22 * np.abs(expected).max())
        np.testing.assert_allclose(form.rows(layer, slice(3, 9)), rows[3:9], rtol=1e-14)


def test_matrices_of_low_rank_that_are_lost_are_a_problem_and_give_no_number(tmp_path):
    part = f"{DOWN}.weight_quantizer._svdquant_lora_a"
    source = next(folder for folder in EXPORTS if "SVD" in folder.name)
    folder = edited(source, tmp_path / "lost", lambda weights: weights.pop(part))
    assert (part, "missing, though the scheme NVFP4_SVD needs it") in findings(folder)
    with pytest.raises(AnomalyError, match="_svdquant_lora_a is missing"):
        format_of(open_folder(folder)).rows(DOWN)


def test_a_smoothing_that_a_norm_has_taken_is_no_problem(llama, tmp_path):
    folder = exported(llama, tmp_path / "exported", "NVFP4_AWQ")
    fused = edited(
        folder, tmp_path / "fused", lambda w: [w.pop(name) for name in [*w] if name.endswith("pre_quant_scale")]
    )
    assert findings(fused) == []


def test_a_config_json_that_leaves_the_group_size_out_does_not_contradict(llama, tmp_path):
    def config(settings):
        ignored = ["lm_head", "*.1.self_attn*"]
        settings["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ignored}

    folder = exported(llama, tmp_path / "two", "W4A16_AWQ", config=config, group_size=16)
    assert findings(folder) == []
    (folder / "hf_quant_config.json").unlink()
    assert findings(folder) == []


def change(part, edit):
    return lambda weights: edit(weights[f"{DOWN}.{part}"])


def another_whole_scale(weights):
    """Store a layer as with a scale of the whole tensor that is 16 times its own."""
    scales = weights[f"{DOWN}.weight_scale"]
    weights[f"{DOWN}.weight_scale"] = (scales.float() / 16).to(scales.dtype)
    weights[f"{DOWN}.weight_scale_2"].mul_(16)


FAULTS_OF_FILES = {
    "another's scale": (
        another_whole_scale,
        "it isn't that of its own weights: the largest scale of their blocks is 28",
    ),
    "NaN": (change("weight_scale", lambda t: t.view(torch.uint8)[0, :1].fill_(127)), "1 of 128 are NaN"),
    "scale": (change("weight_scale_2", lambda t: t.mul_(4)), "the median scale is "),
    "constant": (change("weight", lambda t: t.fill_(0x33)), "all of it is one value"),
    "lost": (lambda w: w.pop(f"{DOWN}.weight_scale_2"), "missing, though the scheme NVFP4 needs it"),
    "shape": (lambda w: w.update({f"{DOWN}.weight_scale": torch.ones(32, 2).to(FP8)}), "shape 32×2, but group-wise"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_FILES)
def test_a_fault_is_found_and_its_layer_named(four, tmp_path, fault):
    edit, text = FAULTS_OF_FILES[fault]
    found = findings(edited(four, tmp_path / "faulty", edit))
    assert any(tensor.startswith(DOWN) and text in what for tensor, what in found), found


def test_a_layer_that_lacks_a_scale_is_never_read_as_numbers(four, tmp_path):
    form = format_of(open_folder(edited(four, tmp_path / "lost", lambda w: w.pop(f"{DOWN}.weight_scale_2"))))
    with pytest.raises(AnomalyError, match="weight_scale_2 is missing"):
        form.rows(DOWN)


@pytest.mark.parametrize("algorithm", ["FP8_PB_WO", "INT2_SOMETHING"])
def test_an_algorithm_that_is_not_read_is_refused_by_name(llama, tmp_path, algorithm):
    folder = exported(llama, tmp_path / "other", "NVFP4", quant_algo=algorithm)
    with pytest.raises(InfraError, match=f"quant_algo {algorithm} is not known here"):
        findings(folder)


def test_mixed_precision_is_read_layer_by_layer(four, tmp_path, llama):
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in open_folder(four).layers if "_proj" in name}
    layers = {name: each for name, each in layers.items() if "1.self_attn" not in name}
    folder = exported(llama, tmp_path / "mixed", "NVFP4", quant_algo="MIXED_PRECISION", quantized_layers=layers)
    form = format_of(open_folder(folder))
    assert form.rows(DOWN) is not None
    assert form.scheme_of("model.layers.1.self_attn.q_proj") is None


def test_two_configurations_that_disagree_are_a_finding(llama, tmp_path):
    def config(settings):
        settings["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}

    found = dict(findings(exported(llama, tmp_path / "two", "NVFP4", config=config)))
    assert found[f"{DOWN}.weight"] == "hf_quant_config.json declares NVFP4, config.json FP8"
    assert "lm_head.weight" not in found


def unshared(part, factor, layer="model.layers.2.self_attn.k_proj"):
    def change(weights):
        weights[f"{layer}.{part}"] *= factor

    return change


@pytest.mark.parametrize(
    ("part", "factor", "told"),
    [
        ("weight_scale_2", 0.8, "vLLM takes the largest for all: k_proj's weights become × 1.25"),
        ("input_scale", 0.5, "vLLM takes the largest for all: k_proj's inputs are rounded with a scale × 2"),
        ("weight_scale_2", 1.5, "vLLM takes the largest for all: q_proj's weights become × 1.5"),
    ],
)
def test_scales_of_whole_tensors_that_differ_where_loaders_fuse_are_found_with_their_effect(
    four, tmp_path, part, factor, told
):
    found = findings(edited(four, tmp_path / "faulty", unshared(part, factor)))
    assert len(found) == 1
    name, what = found[0]
    assert name == f"model.layers.2.self_attn.{told.split(': ')[1].split(chr(39))[0]}.{part}"
    assert what.endswith(told)


def test_scales_of_whole_tensors_that_differ_in_every_block_are_found_too(four, tmp_path):
    def change(weights):
        for index in range(4):
            unshared("weight_scale_2", 0.7, f"model.layers.{index}.mlp.up_proj")(weights)

    found = findings(edited(four, tmp_path / "faulty", change))
    assert [name for name, _ in found] == [f"model.layers.{index}.mlp.up_proj.weight_scale_2" for index in range(4)]


def test_scales_of_whole_tensors_that_differ_by_rounding_alone_are_no_problem(four, tmp_path):
    assert findings(edited(four, tmp_path / "healthy", unshared("weight_scale_2", 1 - 2.0**-11))) == []

"""Fine-grained FP8 under each of the names and dtypes that its scales have in released checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from support.checkpoints import edited

DOWN = "model.layers.2.mlp.down_proj"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK = 8
EXPONENTS = {torch.uint8: lambda x: (torch.log2(x) + 127).to(torch.uint8), torch.float8_e8m0fnu: lambda x: x.float()}
VARIANTS = {
    "weight_scale_inv": ("weight_scale_inv", torch.float32, {}),
    "DeepSeek-V3, bfloat16": ("weight_scale_inv", torch.bfloat16, {}),
    "DeepSeek-V4": ("scale", torch.float8_e8m0fnu, {"scale_fmt": "ue8m0"}),
    "exponents as bytes": ("weight_scale_inv", torch.uint8, {"scale_fmt": "ue8m0"}),
    "exponents in float32": ("weight_scale_inv", torch.float32, {"scale_fmt": "ue8m0"}),
    "Mistral Large 4": ("qscale_weight", torch.float32, {}),
}


def packed(source, folder, part, dtype, settings):
    """Store every projection in FP8, with a scale a block of 8 × 8 under the name `part`."""

    def quantize(weights):
        for name in [name for name in weights if name.split(".")[-2] in PROJECTIONS]:
            out, columns = weights[name].shape
            # without rows of other sizes every power of two would be the same in these small matrices
            weight = weights[name] * 2.0 ** (torch.arange(out) // BLOCK)[:, None]
            blocks = weight.reshape(out // BLOCK, BLOCK, columns // BLOCK, BLOCK).double()
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            if settings:
                scale = 2.0 ** torch.ceil(torch.log2(scale))
            scale = EXPONENTS.get(dtype, lambda x: x)(scale).to(dtype)
            codes = blocks / numbers(scale)[:, None, :, None]
            weights[name] = codes.clamp(-448, 448).reshape(out, columns).to(torch.float8_e4m3fn)
            weights[f"{name.removesuffix('weight')}{part}"] = scale

    def declare(config):
        config["quantization_config"] = {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK], **settings,
        }  # fmt: skip

    return edited(source, folder, quantize, config=declare)


def numbers(scale):
    return 2.0 ** (scale.double() - 127) if scale.dtype == torch.uint8 else scale.double()


@pytest.fixture(scope="module", params=VARIANTS)
def healthy(request, llama, tmp_path_factory):
    return VARIANTS[request.param][0], packed(llama, tmp_path_factory.mktemp("fp8") / "fp8", *VARIANTS[request.param])


def findings(folder):
    return [(f.tensor, f.what) for f in problems_of(Files(open_folder(folder)), "checkpoint_health")[1] if not f.note]


def test_a_healthy_checkpoint_has_no_problem(healthy):
    assert findings(healthy[1]) == []


def test_rows_are_codes_times_the_scale_of_their_block(healthy, llama):
    from safetensors.torch import load_file

    part, folder = healthy
    weights = load_file(folder / "model.safetensors")
    scale = numbers(weights[f"{DOWN}.{part}"]).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    expected = (weights[f"{DOWN}.weight"].double() * scale).numpy()
    rows = format_of(open_folder(folder)).rows(DOWN)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(format_of(open_folder(folder)).rows(DOWN, slice(14, 19)), expected[14:19])
    original = open_folder(llama).tensors[f"{DOWN}.weight"].values() * 2.0 ** (np.arange(32) // BLOCK)[:, None]
    assert ((rows - original) ** 2).sum() < 0.002 * (original**2).sum()


@pytest.mark.parametrize("fault", ["NaN", "lost", "shape"])
def test_a_fault_is_found_and_its_layer_named(healthy, tmp_path, fault):
    part, folder = healthy

    def change(weights):
        scale = weights[f"{DOWN}.{part}"]
        if fault == "NaN":
            scale.view(-1)[1:2] = 255 if scale.dtype == torch.uint8 else float("nan")
        elif fault == "lost":
            del weights[f"{DOWN}.{part}"]
        else:
            weights[f"{DOWN}.{part}"] = scale[:, :2].clone()

    text = {"NaN": "1 of 32 are NaN, the first at 1", "lost": "missing", "shape": "shape 4×2, but block-wise"}[fault]
    found = findings(edited(folder, tmp_path / "faulty", change))
    assert any(tensor.startswith(DOWN) and text in what for tensor, what in found), found


def test_scales_that_are_no_powers_of_two_contradict_ue8m0(llama, tmp_path):
    folder = packed(llama, tmp_path / "fp8", *VARIANTS["exponents in float32"])
    found = findings(edited(folder, tmp_path / "faulty", lambda w: w[f"{DOWN}.weight_scale_inv"][0].mul_(1.25)))
    assert found == [(f"{DOWN}.weight_scale_inv", "8 of 32 are no powers of two, though scale_fmt is ue8m0")]


def test_the_scale_of_inputs_is_not_taken_for_that_of_the_weight(llama, tmp_path):
    folder = packed(llama, tmp_path / "fp8", *VARIANTS["weight_scale_inv"])
    static = edited(folder, tmp_path / "static", lambda w: w.update({f"{DOWN}.activation_scale": torch.tensor(0.5)}))
    assert format_of(open_folder(static)).weight_scale_of(DOWN).part == "weight_scale_inv"


def tensorwise(source, folder, input_scale):
    """Store every projection in FP8 with one scale, and one of its inputs, under `quant_method: fp8`."""

    def quantize(weights):
        for name in [name for name in weights if name.split(".")[-2] in PROJECTIONS]:
            scale = weights[name].abs().max() / 448
            weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale"] = scale
            weights[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(input_scale)

    def declare(config):
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}

    return edited(source, folder, quantize, config=declare)


def test_fp8_with_a_scale_a_tensor_is_read_and_a_scale_of_inputs_that_is_set_by_hand_is_no_problem(llama, tmp_path):
    folder = tensorwise(llama, tmp_path / "fp8", 0.02)
    assert findings(folder) == []
    original = open_folder(llama).tensors[f"{DOWN}.weight"].values()
    rows = format_of(open_folder(folder)).rows(DOWN)
    assert ((rows - original) ** 2).sum() < 0.002 * (original**2).sum()


def test_a_scale_of_inputs_that_is_1_everywhere_is_the_initial_value(llama, tmp_path):
    found = findings(tensorwise(llama, tmp_path / "fp8", 1.0))
    assert {tensor.rpartition(".")[2] for tensor, _ in found} == {"input_scale"}
    assert len(found) == 28
    assert all(what.startswith("1, as every scale of the 4 siblings") for _, what in found)


def test_a_scale_of_the_weight_that_is_the_same_in_every_block_is_the_initial_value(llama, tmp_path):
    def reset(weights):
        for name in [name for name in weights if name.endswith("down_proj.weight_scale")]:
            weights[name] = torch.tensor(0.5)

    found = findings(edited(tensorwise(llama, tmp_path / "fp8", 0.02), tmp_path / "reset", reset))
    assert [what.startswith("0.5, as every scale") for _, what in found] == [True] * 4

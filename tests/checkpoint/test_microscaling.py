"""4-bit floats and microscaling: the small dtypes of safetensors, and compressed-tensors' NVFP4, MXFP4 and MXFP8."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.checkpoint.tensors import decoded, encoded, tensors_of
from pytest_qsa.common import InfraError
from pytest_qsa.engine.formats.format import engine_format_of
from support.checkpoints import edited, save_quantized_moe

EXPERT = "model.layers.1.mlp.experts.2.down_proj"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_float4_is_read_with_the_first_number_in_the_low_half(tmp_path):
    save_file({"x": torch.tensor([[0x21, 0xF7]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, tmp_path / "f")
    (tensor,) = tensors_of(tmp_path / "f")
    assert (tensor.dtype, tensor.shape) == ("F4", (1, 4))
    np.testing.assert_array_equal(tensor.values(), [[0.5, 1, 6, -6]])
    np.testing.assert_array_equal(decoded(np.arange(16, dtype=np.uint8), "F4")[::2], E2M1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_fnuz_is_written_as_it_is_read(tmp_path, dtype):
    values = torch.tensor([0.0, -1.5, 96.0, float("nan")])
    save_file({"x": values.to(dtype)}, tmp_path / "f")
    (tensor,) = tensors_of(tmp_path / "f")
    np.testing.assert_array_equal(tensor.values(), values.numpy())
    np.testing.assert_array_equal(encoded(tensor.values(), tensor.dtype), tensor.raw())


def test_a_dtype_that_is_not_read_is_refused_by_name(tmp_path):
    save_file({"x": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "f")
    (tensor,) = tensors_of(tmp_path / "f")
    with pytest.raises(InfraError, match="x has the dtype C64, which isn't known here"):
        tensor.values()


def test_a_weight_of_a_dtype_that_is_not_read_is_no_number_and_passes_no_check(tmp_path):
    name, header = (
        "model.layers.0.mlp.down_proj.weight",
        {"dtype": "F6_E2M3", "shape": [4, 32], "data_offsets": [0, 96]},
    )
    text = json.dumps({name: header}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(96))
    (tmp_path / "config.json").write_text("{}")
    form = format_of(open_folder(tmp_path))
    assert form.rows("model.layers.0.mlp.down_proj") is None
    assert "F6_E2M3 isn't read here" in form.refusal("model.layers.0.mlp.down_proj")
    with pytest.raises(InfraError, match=f"{name} has the dtype F6_E2M3, which isn't known here"):
        findings(tmp_path)


@pytest.fixture(scope="module", params=["NVFP4A16", "MXFP4A16", "MXFP8A16"])
def healthy(request, tmp_path_factory):
    return save_quantized_moe(tmp_path_factory.mktemp("mx") / "moe", request.param)


def findings(folder):
    return [(f.tensor, f.what) for f in problems_of(Files(open_folder(folder)), "checkpoint_health")[1]]


def test_a_healthy_checkpoint_has_no_problem(healthy):
    assert findings(healthy) == []


def by_hand(parts):
    """Return codes × scales of a layer in float64, as the formats' own documents define them."""
    raw = {part: np.array(tensor.raw()) for part, tensor in parts.items()}
    if "weight_packed" in raw:
        low_first = np.stack([raw["weight_packed"] % 16, raw["weight_packed"] // 16], axis=-1)
        codes = E2M1[low_first.reshape(len(low_first), -1)]
    else:
        codes = torch.from_numpy(raw["weight"]).view(torch.float8_e4m3fn).double().numpy()
    if "weight_global_scale" in raw:
        scales = torch.from_numpy(raw["weight_scale"]).view(torch.float8_e4m3fn).double().numpy()
        scales = scales / raw["weight_global_scale"].astype(np.float64)
    else:
        scales = 2.0 ** (raw["weight_scale"].astype(np.float64) - 127)
    return codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


def test_rows_are_codes_times_scales_and_what_the_library_reads(healthy):
    form = format_of(open_folder(healthy))
    rows = form.rows(EXPERT)
    np.testing.assert_allclose(rows, by_hand(form.parts(EXPERT)), rtol=1e-15)
    np.testing.assert_array_equal(form.rows(EXPERT, slice(2, 9)), rows[2:9])
    theirs = engine_format_of(form).stored_weight(form, EXPERT).double().numpy()
    np.testing.assert_allclose(rows, theirs, rtol=2.0**-7)  # the library rounds to bfloat16 on the way
    original = open_folder(healthy.with_name("moe-float")).tensors[f"{EXPERT}.weight"].values()
    assert ((rows - original) ** 2).sum() < 0.02 * (original**2).sum()


def scales_of(weights):
    name = next(name for name in weights if name.startswith(EXPERT) and name.endswith("weight_scale"))
    return name, weights[name]


def not_a_number(weights):
    scales_of(weights)[1].view(torch.uint8).view(-1)[3] = 255  # NaN in E8M0 and in E4M3


def four_times(weights):
    _, scales = scales_of(weights)
    whole = weights.get(f"{EXPERT}.weight_global_scale")
    if whole is None:
        scales.add_(2)
    else:
        whole.div_(4)


def constant(weights):
    for part in ("weight", "weight_packed"):
        if f"{EXPERT}.{part}" in weights:
            weights[f"{EXPERT}.{part}"].view(torch.uint8).fill_(0x33)


def lost(weights):
    weights.pop(scales_of(weights)[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (not_a_number, "are NaN, the first at 3"),
        (four_times, "scale is|mean of its scales is"),
        (constant, "all of it is one value"),
        (lost, "missing, though"),
    ],
)
def test_a_fault_is_found_and_its_layer_named(healthy, tmp_path, change, text):
    found = findings(edited(healthy, tmp_path / "faulty", change))
    assert any(tensor.startswith(EXPERT) and re.search(text, what) for tensor, what in found), found
    assert all(tensor.startswith(EXPERT) for tensor, _ in found)


def test_an_expert_whose_gate_and_up_have_two_scales_is_found_with_what_a_server_makes_of_it(tmp_path):
    healthy = save_quantized_moe(tmp_path / "moe", "NVFP4A16")
    name = "model.layers.1.mlp.experts.2.up_proj.weight_global_scale"
    found = findings(edited(healthy, tmp_path / "faulty", lambda weights: weights[name].mul_(2)))
    assert [tensor for tensor, _ in found] == [name]
    assert found[0][1].endswith("vLLM takes gate_proj's for all: up_proj's weights become × 2")

"""bitsandbytes in 8 bits: checked and read from the files, and read off a loaded module."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError
from pytest_qsa.engine.formats.format import dequantized, is_quantized, schemes_of
from pytest_qsa.engine.formats.stored import StoredWeights
from pytest_qsa.tools.selftest.faults import FAULTS
from support.checkpoints import edited

DOWN = "model.layers.2.mlp.down_proj"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def declare(config):
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def quantize(weights):
    """Quantize every projection as the library does: the code 127 is the largest |w| of a row."""
    for name in [name for name in weights if name.split(".")[-2] in PROJECTIONS]:
        largest = weights[name].abs().amax(dim=1)
        stem = name.removesuffix("weight")
        weights[name] = (weights[name] * (127 / largest)[:, None]).round().to(torch.int8)
        weights[f"{stem}SCB"] = largest
        weights[f"{stem}weight_format"] = torch.tensor(0, dtype=torch.uint8)


@pytest.fixture(scope="module")
def int8(llama, tmp_path_factory):
    """Return the small Llama in the layout that transformers saves bitsandbytes' int8 in."""
    return edited(llama, tmp_path_factory.mktemp("bnb") / "int8", quantize, config=declare)


def findings(folder):
    return [(f.tensor, f.what) for f in problems_of(Files(open_folder(folder)), "checkpoint_health")[1]]


def test_a_healthy_checkpoint_has_no_problem(int8):
    assert findings(int8) == []


FAULTS_OF_FILES = {
    "NaN": (lambda w: w[f"{DOWN}.SCB"].__setitem__(3, float("nan")), "SCB", "1 of 32 are NaN, the first at 3"),
    "scale": (lambda w: w[f"{DOWN}.SCB"].mul_(16), "SCB", "the median scale is "),
    "lost": (lambda w: w.pop(f"{DOWN}.SCB"), "SCB", "missing, though the scheme int8 needs it"),
    "shape": (lambda w: w.update({f"{DOWN}.SCB": torch.ones(7)}), "SCB", "shape 7, but channel-wise scales"),
    "constant": (lambda w: w[f"{DOWN}.weight"].fill_(3), "weight", "all of it is one value"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_FILES)
def test_a_fault_is_found_and_its_layer_named(int8, tmp_path, fault):
    change, part, text = FAULTS_OF_FILES[fault]
    found = findings(edited(int8, tmp_path / "faulty", change))
    assert any(tensor == f"{DOWN}.{part}" and text in what for tensor, what in found), found


def test_rows_of_the_files_are_codes_times_scales_over_127(int8, llama):
    form, original = format_of(open_folder(int8)), open_folder(llama).tensors[f"{DOWN}.weight"].values()
    rows = form.rows(DOWN, slice(5, 9))
    parts = form.parts(DOWN)
    codes, scales = (parts[part].values() for part in ("weight", "SCB"))
    np.testing.assert_allclose(rows, (codes * scales[:, None] / 127)[5:9], rtol=2e-7)
    np.testing.assert_allclose(rows, original[5:9], atol=scales.max() / 254 * 1.001)


def loaded_linear(form, *, after_forward):
    """Return a module as bitsandbytes leaves one: its scales on the weight, or in the state after a forward."""
    parts = form.parts(DOWN)
    module = nn.Linear(64, 32, bias=False)
    codes = torch.from_numpy(np.array(parts["weight"].raw()))
    scales = torch.from_numpy(np.array(parts["SCB"].raw()))
    module.weight = nn.Parameter(codes, requires_grad=False)
    module.state = SimpleNamespace(SCB=scales if after_forward else None)
    if not after_forward:
        module.weight.SCB = scales
    return module


@pytest.mark.parametrize("after_forward", [False, True])
def test_a_loaded_module_multiplies_by_what_the_files_hold(int8, after_forward):
    files = Files(open_folder(int8))
    module = loaded_linear(files.format, after_forward=after_forward)
    assert is_quantized(module)
    np.testing.assert_array_equal(dequantized(module).double().numpy(), files.format.rows(DOWN))
    powers = StoredWeights(files, {DOWN: module}).powers(DOWN, module)
    assert powers[0] > 0
    assert powers[1] == 0
    module.weight.data.neg_()
    assert StoredWeights(files, {DOWN: module}).powers(DOWN, module)[1] > 0


def test_the_scheme_is_that_of_the_configuration():
    class Linear8bitLt(nn.Module):
        pass

    model = nn.Sequential(Linear8bitLt())
    model.config = SimpleNamespace(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert schemes_of(model) == {"0": "w8a8_int"}


@pytest.mark.parametrize("fault", ["scale_layer", "zero_scale", "nan_scale", "rows_permuted", "layer_unquantized"])
def test_faults_of_the_self_test_can_be_put_into_it(int8, fault):
    assert DOWN in FAULTS[fault].targets(open_folder(int8))


def test_four_bits_are_not_read_as_eight(int8, tmp_path):
    def four(config):
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    form = format_of(open_folder(edited(int8, tmp_path / "four", config=four)))
    with pytest.raises(AnomalyError, match="its quant_state is missing"):
        form.rows(DOWN)


def test_the_library_itself_reads_the_same_numbers(int8):
    from bitsandbytes import functional

    parts = format_of(open_folder(int8)).parts(DOWN)
    codes, scales = (torch.from_numpy(np.array(parts[part].raw())) for part in ("weight", "SCB"))
    theirs = functional.int8_vectorwise_dequant(codes, scales).double().numpy()
    np.testing.assert_array_equal(format_of(open_folder(int8)).rows(DOWN), theirs)

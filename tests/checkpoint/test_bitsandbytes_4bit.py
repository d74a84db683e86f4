"""bitsandbytes in 4 bits: files that the library itself packs are checked, and read as the library reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError
from pytest_qsa.engine.formats.format import dequantized, is_quantized
from pytest_qsa.engine.formats.stored import StoredWeights
from pytest_qsa.tools.selftest.faults import FAULTS
from support.checkpoints import edited

DOWN = "model.layers.2.mlp.down_proj"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS = {
    "nf4": {"quant_type": "nf4"},
    "fp4": {"quant_type": "fp4"},
    "nested": {"quant_type": "nf4", "compress_statistics": True},
    "nested fp4": {"quant_type": "fp4", "compress_statistics": True},
    "stored as bfloat16": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
}


def packed(source, folder, dtype=torch.bfloat16, **options):
    """Pack every projection of a checkpoint with the library, and save its state as transformers does."""

    def quantize(weights):
        for name in [name for name in weights if name.split(".")[-2] in PROJECTIONS]:
            codes, state = functional.quantize_4bit(weights[name].to(dtype), **options)
            weights[name] = codes
            weights.update({f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()})

    def declare(config):
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": options["quant_type"],
        }

    return edited(source, folder, quantize, config=declare)


@pytest.fixture(scope="module", params=VARIANTS)
def healthy(request, llama, tmp_path_factory):
    return packed(llama, tmp_path_factory.mktemp("bnb") / "four", **VARIANTS[request.param])


@pytest.fixture(scope="module")
def nf4(llama, tmp_path_factory):
    return packed(llama, tmp_path_factory.mktemp("bnb") / "nf4", **VARIANTS["nf4"])


@pytest.fixture(scope="module")
def nested(llama, tmp_path_factory):
    return packed(llama, tmp_path_factory.mktemp("bnb") / "nested", **VARIANTS["nested"])


def findings(folder):
    return [(f.tensor, f.what) for f in problems_of(Files(open_folder(folder)), "checkpoint_health")[1]]


def loaded(folder, layer):
    """Return a module as the library makes it of the files."""
    form = format_of(open_folder(folder))
    tensors = {
        part: torch.from_numpy(np.array(tensor.raw()))
        for part, tensor in form.parts(layer).items()
        if part.startswith("weight.")
    }
    codes = torch.from_numpy(np.array(form.codes_of(layer).raw()))
    out, columns = form.weight_shape(layer)
    module = Linear4bit(columns, out, bias=False)
    module.weight = Params4bit.from_prequantized(codes, tensors, device="cpu", module=module)
    return module


def test_a_healthy_checkpoint_has_no_problem(healthy):
    assert findings(healthy) == []


# rows of whole blocks: in others of an even length the CPU kernel of bitsandbytes 0.50 takes scales of wrong blocks
@pytest.mark.parametrize("layer", [DOWN, "model.layers.0.mlp.down_proj"])
def test_the_library_itself_reads_the_same_numbers(healthy, layer):
    weight = loaded(healthy, layer).weight
    theirs = functional.dequantize_4bit(weight.data, weight.quant_state).double().numpy()
    form = format_of(open_folder(healthy))
    np.testing.assert_array_equal(form.rows(layer), theirs)
    np.testing.assert_array_equal(form.rows(layer, slice(3, 12, 2)), theirs[3:12:2])


def test_a_weight_in_float32_and_rows_of_an_odd_length_are_read_as_the_library_reads_them(llama, tmp_path):
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))

    def odd(weights):
        weights[f"{DOWN}.weight"] = weight

    source = edited(llama, tmp_path / "odd", odd)
    folder = packed(source, tmp_path / "four", torch.float32, quant_type="nf4")
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4")).double().numpy()
    np.testing.assert_array_equal(format_of(open_folder(folder)).rows(DOWN, slice(1, 6)), theirs[1:6])


def test_a_loaded_module_multiplies_by_what_the_files_hold(healthy):
    files, module = Files(open_folder(healthy)), loaded(healthy, DOWN)
    assert is_quantized(module)
    np.testing.assert_array_equal(dequantized(module).double().numpy(), files.format.rows(DOWN))
    module(torch.ones(1, 64))  # a forward on a CPU may pack the codes anew
    powers = StoredWeights(files, {DOWN: module}).powers(DOWN, module)
    assert powers[0] > 0
    assert powers[1] == 0


@pytest.mark.parametrize("nested", [False, True])
def test_codes_that_a_cpu_moved_are_read_in_order_and_left_where_they_are(nested):
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    module = nn.Linear(192, 64, bias=False)
    module.weight = Params4bit(codes, requires_grad=False, quant_state=state, bnb_quantized=True)
    before = dequantized(module)
    # what the first forward does on a CPU with AVX512-BF16
    module.weight.data, module.weight.quant_state = functional._convert_weight_packed_for_cpu(codes, state)
    moved, packed = module.weight.quant_state, module.weight.data.clone()
    for _ in range(2):
        torch.testing.assert_close(dequantized(module).float(), before.float(), rtol=2**-7, atol=0)
    assert moved.packing_format_for_cpu
    assert torch.equal(module.weight.data, packed)
    if not nested:  # of a weight in bfloat16 the scales are bfloat16 too
        assert torch.equal(dequantized(module), before)


STATE = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"


def restated(**changes):
    def change(weights):
        state = json.loads(bytes(weights[STATE].tolist())) | changes
        weights[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def of_weight(part, change):
    return lambda weights: change(weights[f"{DOWN}.{part}"])


FAULTS_OF_FILES = {
    "NaN": (of_weight("weight.absmax", lambda t: t.__setitem__(3, float("nan"))), "1 of 32 are NaN, the first at 3"),
    "scale": (of_weight("weight.absmax", lambda t: t.mul_(4)), "the median scale is "),
    "constant": (of_weight("weight", lambda t: t.fill_(0x33)), "all of it is one value"),
    "a row": (of_weight("weight", lambda t: t.view(-1)[32:64].fill_(0x33)), "row 1 is one code throughout"),
    "table": (of_weight("weight.quant_map", lambda t: t.mul_(1.01)), "isn't the table of values of nf4"),
    "lost": (lambda weights: weights.pop(f"{DOWN}.weight.absmax"), "missing, though the scheme nf4 needs it"),
    "stateless": (lambda weights: weights.pop(STATE), "missing, though the scheme nf4 needs it"),
    "shape": (restated(shape=[32, 48]), "1024 elements, but a weight (32, 48) in blocks of 64 has 768"),
    "blocks": (restated(blocksize=128), "32 elements, but a weight (32, 64) in blocks of 128 has 16"),
    "kind": (restated(quant_type="fp4"), "its quant_state is of fp4, and its name says nf4"),
    "no JSON": (lambda weights: weights[STATE].fill_(32), "its quant_state can't be read: JSONDecodeError"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_FILES)
def test_a_fault_is_found_and_its_layer_named(nf4, tmp_path, fault):
    change, text = FAULTS_OF_FILES[fault]
    found = findings(edited(nf4, tmp_path / "faulty", change))
    assert any(tensor.startswith(f"{DOWN}.weight") and text in what for tensor, what in found), found
    assert all(tensor.startswith(DOWN) for tensor, _ in found)


FAULTS_OF_NESTED = {
    "NaN": (of_weight("weight.nested_absmax", lambda t: t.fill_(float("nan"))), "is NaN"),
    "scale": (of_weight("weight.nested_absmax", lambda t: t.mul_(4)), "scales that are stored in it are negative"),
    "table": (of_weight("weight.nested_quant_map", lambda t: t.neg_()), "isn't the table of values of nf4"),
    "lost": (lambda w: w.pop(f"{DOWN}.weight.nested_absmax"), "missing, though absmax is stored in codes"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_NESTED)
def test_a_fault_of_nested_scales_is_found(nested, tmp_path, fault):
    change, text = FAULTS_OF_NESTED[fault]
    found = findings(edited(nested, tmp_path / "faulty", change))
    assert any(tensor.startswith(f"{DOWN}.weight.nested") and text in what for tensor, what in found), found


def test_a_layer_without_its_state_is_never_read_as_numbers(nf4, tmp_path):
    form = format_of(open_folder(edited(nf4, tmp_path / "lost", lambda weights: weights.pop(STATE))))
    with pytest.raises(AnomalyError, match=f"{DOWN} don't fit one another: its quant_state is missing"):
        form.rows(DOWN)


@pytest.mark.parametrize("fault", ["scale_layer", "nan_scale", "weights_constant", "nibbles_swapped", "scale_dropped"])
def test_faults_of_the_self_test_can_be_put_into_it(healthy, fault):
    assert DOWN in FAULTS[fault].targets(open_folder(healthy))


def test_rows_of_a_weight_whose_scales_are_lost_are_refused_in_one_line(nf4, tmp_path):
    folder = open_folder(edited(nf4, tmp_path / "lost", lambda weights: weights.pop(f"{DOWN}.weight.absmax")))
    with pytest.raises(AnomalyError, match=rf"model\.safetensors: {DOWN} has no weight\.absmax"):
        format_of(folder).stored_rows(DOWN)

"""The torch half of a format: which module it owns, and that each half has its other."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationMethod

from pytest_qsa.checkpoint import Files, open_folder
from pytest_qsa.checkpoint.formats.format import FORMATS
from pytest_qsa.common import AnomalyError, InfraError
from pytest_qsa.engine.formats.format import (
    ENGINE_FORMATS,
    EngineFormat,
    bits_of,
    dequantized,
    is_quantized,
    owner_of,
    scheme_name,
    schemes_of,
)
from pytest_qsa.engine.formats.stored import StoredWeights
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.suite import Memory, Model
from support.checkpoints import edited


def test_a_plain_module_belongs_to_no_format():
    assert owner_of(nn.Linear(2, 2)) is None
    assert owner_of(nn.SiLU()) is None
    assert not is_quantized(nn.Embedding(2, 2))


@pytest.mark.parametrize(
    ("form", "owner"),
    [("int8", "compressed-tensors"), ("int4", "compressed-tensors"), ("torchao int4", "torchao"), ("float", None)],
)
def test_every_linear_layer_of_a_loaded_model_belongs_to_its_format(quantized, form, owner):
    folder = str(quantized[form])
    model = load_model(Model(path=folder), folder, Memory(device="cpu"), allow_code=False).model
    owners = {owner_of(layer) for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)}
    assert {own.name if own else None for own in owners} == {owner}


def test_the_scheme_of_kernels_is_read_off_the_configuration():
    class QuantLinear(nn.Module):
        pass

    class Config:
        quantization_config = {"quant_method": "gptq", "bits": 4}  # noqa: RUF012

    model = nn.Sequential(QuantLinear(), nn.Linear(2, 2))
    model.config = Config()
    assert schemes_of(model) == {"0": "w4a16_int"}
    Config.quantization_config = {"quant_method": QuantizationMethod.BITS_AND_BYTES, "load_in_8bit": True}
    assert schemes_of(model) == {"0": "w8a8_int"}
    Config.quantization_config = {"quant_method": "somebodys"}
    assert schemes_of(model) is None
    Config.quantization_config = None
    assert schemes_of(model) == {}


def test_a_scheme_name_says_its_bits():
    assert [bits_of(scheme_name(4, 16, floats=floats)) for floats in (True, False)] == [(4, 16), (4, 16)]


class Doubled(nn.Linear):
    """A module of a quantizer that nobody here knows: its bytes are half of the weight."""


def test_a_module_of_a_format_of_one_s_own_is_dequantized_by_it():
    module = Doubled(3, 2, bias=False)
    module.weight = nn.Parameter(torch.arange(6, dtype=torch.int8).reshape(2, 3), requires_grad=False)

    class DoubledFormat(EngineFormat):
        name = "doubled"

        def owns(self, module):
            return isinstance(module, Doubled)

        def weight(self, module):
            return module.weight * 2.0

    try:
        assert torch.equal(dequantized(module), torch.arange(6.0).reshape(2, 3) * 2)
        assert is_quantized(module)
    finally:
        ENGINE_FORMATS._known.pop("doubled")


def test_the_scales_that_torchao_multiplies_inputs_by_belong_to_the_weight():
    from torchao.quantization import Int8Tensor, PerRow

    module, inputs = nn.Linear(64, 32, bias=False), torch.randn(4, 64)
    scales = torch.linspace(0.5, 2, 64)
    quantized = Int8Tensor.from_hp(module.weight.detach(), PerRow(), act_pre_scale=scales)
    module.weight = nn.Parameter(quantized, requires_grad=False)
    torch.testing.assert_close(inputs @ dequantized(module).T, module(inputs), rtol=1e-5, atol=1e-6)


class Rounding(nn.Module):
    """A quantizer of Quark: codes or inputs on a grid of a half."""

    def forward(self, values):
        return (values.float() * 2).round() / 2


def test_a_module_of_quark_is_dequantized_and_rounds_its_inputs_by_its_own_quantizers():
    kind = type("QParamsLinear", (nn.Linear,), {"__module__": "quark.torch.export.nn.modules.qparamslinear"})
    module = kind(3, 2, bias=False)
    module.weight = nn.Parameter(torch.arange(6, dtype=torch.int32).reshape(2, 3), requires_grad=False)
    module.weight_quantizer, module.input_quantizer = Rounding(), Rounding()
    dtypes = {"weight": SimpleNamespace(dtype=SimpleNamespace(value="fp8_e4m3"))}
    module._quant_config = SimpleNamespace(**dtypes, input_tensors=SimpleNamespace(dtype="int8"))
    form = owner_of(module)
    assert (form.name, form.scheme(module), form.emulates(module)) == ("quark", "w8a8_fp", True)
    assert torch.equal(dequantized(module), torch.arange(6.0).reshape(2, 3))
    assert torch.equal(form.rounded_inputs(module, torch.tensor([0.3, 0.9])), torch.tensor([0.5, 1.0]))
    module.input_quantizer, module._quant_config.input_tensors = None, None
    assert form.rounded_inputs(module, torch.ones(1)) is None
    assert form.scheme(module) == "w8a16_fp"


def test_formats_whose_modules_are_read_have_both_halves():
    stored = {kind.name for kind in FORMATS.built_in()}
    assert {kind.name for kind in ENGINE_FORMATS.built_in()} - stored <= {"bitsandbytes"}


class Wrapped(torch.Tensor):
    """A float dtype outside, and codes inside: what quantizers make of a parameter."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default
        return Wrapped(args[0])


def with_packed_bytes_in_bfloat16():
    module = nn.Linear(4, 2, bias=False, dtype=torch.bfloat16)
    module.weight.quant_state = {"quant_type": "int3"}
    return module, r"Linear holds weight \(Parameter bfloat16 2×4\), weight.quant_state \(dict\)"


def with_another_library_s_tensor():
    module = nn.Linear(4, 2, bias=False)
    module.weight = nn.Parameter(Wrapped(torch.zeros(2, 4, dtype=torch.uint8)), requires_grad=False)
    return module, r"Linear holds weight \(Wrapped bfloat16 2×4\)"


def with_codes_for_a_kernel():
    module = nn.Module()
    module.register_buffer("qweight", torch.zeros(1, 2, dtype=torch.int32))
    return module, r"Module holds qweight \(Tensor int32 1×2\)"


def with_a_scale_beside_a_float():
    module = nn.Linear(4, 2, bias=False)
    module.register_buffer("weight_scale", torch.ones(()))
    return module, r"Linear holds weight \(Parameter float32 2×4\), weight_scale \(Tensor float32 scalar\)"


@pytest.mark.parametrize(
    "make",
    [
        with_packed_bytes_in_bfloat16,
        with_another_library_s_tensor,
        with_codes_for_a_kernel,
        with_a_scale_beside_a_float,
    ],
)
def test_what_lies_beside_a_weight_shows_that_it_is_quantized_whatever_its_dtype(make):
    module, held = make()
    assert is_quantized(module)
    with pytest.raises(InfraError, match=f"{held} in a format that is not known"):
        dequantized(module)


def test_a_library_that_can_not_undo_its_own_tensor_is_named():
    class Stubborn(EngineFormat):
        name = "stubborn"

        def owns(self, module):
            return isinstance(module, Doubled)

        def weight(self, module):
            raise NotImplementedError("no kernel for the CPU")

    try:
        with pytest.raises(InfraError, match=r"Doubled holds .*stubborn can't dequantize here .*no kernel for the CPU"):
            dequantized(Doubled(3, 2))
    finally:
        ENGINE_FORMATS._known.pop("stubborn")


@pytest.mark.parametrize("name", ["weight_g", "embed_scale", "logit_scale"])
def test_a_healthy_module_with_a_scale_of_another_meaning_is_plain(name):
    module = nn.Embedding(4, 2)
    module.register_buffer(name, torch.ones(1))
    assert not is_quantized(module)


DOWN = "model.layers.2.mlp.down_proj"


def stored(folder):
    """Unpack the down projection of layer 2 from the files, as for a plain module of its shape."""
    module = nn.Linear(64, 32, bias=False)
    return StoredWeights(Files(open_folder(folder)), {DOWN: module}).powers(DOWN, module)


def test_a_layer_that_lacks_a_tensor_can_not_be_unpacked_by_its_own_fault(int8_llama, tmp_path):
    def lose(weights):
        del weights[f"{DOWN}.weight_scale"]

    with pytest.raises(AnomalyError, match=r"down_proj can't be unpacked from .*weight_scale .*: missing, though"):
        stored(edited(int8_llama, tmp_path / "lost", lose))


def test_a_package_that_is_not_installed_is_named_with_what_to_type(int8_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors", None)
    with pytest.raises(InfraError, match=r"can't be unpacked from .*; pip install compressed-tensors$"):
        stored(int8_llama)


def test_a_library_that_fails_on_sound_files_is_named_with_its_error(int8_llama, monkeypatch):
    from compressed_tensors.compressors import BaseCompressor

    def fail(form):
        raise KeyError(form)

    monkeypatch.setattr(BaseCompressor, "get_value_from_registry", fail)
    with pytest.raises(InfraError, match=r"can't be unpacked from .*: KeyError: 'int-quantized'"):
        stored(int8_llama)


def test_a_lack_of_memory_is_not_called_a_format(int8_llama, monkeypatch):
    from compressed_tensors.compressors import BaseCompressor

    def fail(form):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(BaseCompressor, "get_value_from_registry", fail)
    with pytest.raises(torch.OutOfMemoryError):
        stored(int8_llama)


def test_a_format_that_nothing_knows_is_named(int8_llama, tmp_path):
    def declare(config):
        config["quantization_config"] = {"quant_method": "somebodys"}

    with pytest.raises(InfraError, match="its format, somebodys, is not known here"):
        stored(edited(int8_llama, tmp_path / "unknown", config=declare))

"""Checkpoints of each quantizer, made by the real library: their weights, and what is really run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pytest_qsa.captures import COUNTS, MOMENTS, Request
from pytest_qsa.common.errors import InfraError
from pytest_qsa.engine.formats.format import dequantized
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.subject import capture_subject
from pytest_qsa.suite import Data, Memory, Model, Subject
from support.checkpoints import FORMATS, TORCHAO
from support.projects import Project, suite

DOWN = "model.layers.2.mlp.down_proj"
ROWS, COLUMNS = 32, 64
LOADABLE = [form for form in FORMATS if form != "int4 with zero points"]


def loaded(folder):
    return load_model(Model(path=str(folder)), str(folder), Memory(device="cpu"), allow_code=False)


def captured(folder, *requests, **memory):
    data = Data(num_samples=1, seq_len=16)
    subject = Subject("llama", Model(path=str(folder)), data, Memory(device="cpu", **memory), folder.parent)
    return capture_subject(subject, requests)


def weight_in(folder):
    """Compute the down projection of layer 2 from its file in float64: codes × scales, [rows, columns]."""
    file = load_file(folder / "model.safetensors")
    parts = {name.removeprefix(f"{DOWN}."): tensor for name, tensor in file.items() if name.startswith(f"{DOWN}.")}
    if "_weight_qdata" in parts:
        codes, scale = parts["_weight_qdata"].double().numpy(), parts["_weight_scale"]
    elif "weight_packed" in parts:
        bits = 32 * parts["weight_packed"].shape[1] // COLUMNS
        words = parts["weight_packed"].numpy().view(np.uint32)
        codes = np.stack([words >> bits * i & (1 << bits) - 1 for i in range(32 // bits)], axis=-1).astype(float)
        codes, scale = codes.reshape(ROWS, COLUMNS) - 2 ** (bits - 1), parts["weight_scale"]
    else:
        codes, scale = parts["weight"].double().numpy(), parts.get("weight_scale", torch.ones(1))
    scales = scale.double().numpy().reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1)
    return codes * np.repeat(scales, COLUMNS // scales.shape[1], axis=1)


@pytest.mark.parametrize("form", [*LOADABLE, *TORCHAO, "float"])
def test_the_dequantized_weight_of_a_format_is_codes_times_scales(quantized, form):
    model = loaded(quantized[form]).model
    module = model.get_submodule(DOWN)
    want = weight_in(quantized[form])
    before = dequantized(module)
    with torch.no_grad():
        model(torch.arange(8)[None])
    for weight in (before, dequantized(module)):
        assert weight.is_floating_point()
        assert type(weight) is torch.Tensor
        np.testing.assert_allclose(weight.double().numpy(), want, rtol=1e-6)


MEASURED = [
    ("int8", "cpu"), ("fp8 by channel", "cpu"), ("torchao int4", "cpu"),
    ("int4", "disk"), ("int8 weights", "disk"), ("fp8 with static inputs", "disk"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "device"), MEASURED)
def test_all_sites_of_a_quantized_module_are_measured(quantized, form, device):
    sites = [Request("down_proj$", site, None, frozenset({MOMENTS, COUNTS})) for site in ("input", "output", "weight")]
    cap = captured(quantized[form], *sites, offload_device=device)
    want = weight_in(quantized[form])
    alone = captured(quantized[form], sites[2], offload_device=device)
    for capture in (cap, alone):
        got = capture.weight(DOWN.replace(".", r"\."))
        np.testing.assert_allclose(got.absmax().values, [np.abs(want).max()], rtol=1e-6)
        np.testing.assert_allclose(got.rms().values, [np.sqrt(np.mean(want**2))], rtol=1e-6)
    assert len(cap.input("down_proj$").rms().layers) == len(cap.output("down_proj$").rms().layers) == 4


def test_a_weight_that_is_rounded_in_the_forward_is_measured_rounded(llama):
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model = loaded(llama).model
    scheme = preset_name_to_scheme("FP8_DYNAMIC", targets=["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}), show_progress=False)
    module = model.get_submodule(DOWN)
    kept = module.weight.detach().clone()
    module.weight_scale.data.fill_(0.01)
    np.testing.assert_array_equal(dequantized(module), (kept / 0.01).to(torch.float8_e4m3fn).float() * 0.01)
    assert torch.equal(module.weight, kept)


def test_block_wise_fp8_is_scaled_block_by_block():
    codes = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    module = torch.nn.Linear(6, 5)
    module.weight = torch.nn.Parameter(codes, requires_grad=False)
    module.weight_scale_inv = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    module.block_size = (2, 3)
    scales = np.repeat(np.repeat([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], 2, axis=0)[:5], 3, axis=1)
    np.testing.assert_array_equal(dequantized(module), codes.double().numpy() * scales)


def test_the_last_block_of_fp8_is_smaller_where_the_stated_size_says_so():
    codes = torch.ones(576, 128).to(torch.float8_e4m3fn)
    module = torch.nn.Linear(128, 576)
    module.weight = torch.nn.Parameter(codes, requires_grad=False)
    module.weight_scale_inv = torch.nn.Parameter(torch.arange(1.0, 6.0)[:, None], requires_grad=False)
    for contradicting in (None, (64, 128)):
        module.block_size = contradicting
        with pytest.raises(InfraError, match="5 scales for 576 weights, and no block size that fits"):
            dequantized(module)
    module.block_size = (128, 128)
    np.testing.assert_array_equal(dequantized(module)[:, 0], np.repeat(np.arange(1.0, 6.0), 128)[:576])


def test_codes_of_an_unknown_format_are_no_weight():
    module = torch.nn.Linear(6, 5)
    module.weight = torch.nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InfraError, match=r"Linear holds weight \(Parameter int8 5×6\) in a format that is not known"):
        dequantized(module)


def test_a_tensor_that_the_loader_makes_no_place_for_is_named(quantized):
    text = r"layers\.0\.mlp\.down_proj\.weight_zero_point is \[4, 4\], and LlamaForCausalLM as it is loaded.*\[32, 4\]"
    with pytest.raises(InfraError, match=text):
        loaded(quantized["int4 with zero points"])


WAYS = {
    "int8": "W8A8 emulated", "int8 weights": "W8A16 weights only", "int4": "W4A16 weights only",
    "fp8 with static inputs": "W8A8 FP emulated", "fp8 by channel": "W8A8 FP emulated",
    "torchao int8 by group": "W8A16 weights only", "torchao int4 by 32": "W4A16 weights only",
}  # fmt: skip
"""The formats that are gated from a suite to its verdicts → what each is executed as."""


@pytest.fixture(scope="module")
def gated(quantized, tmp_path_factory):
    """Gate a checkpoint of each format against its original, in one run."""
    project = Project(tmp_path_factory.mktemp("formats") / "project")
    assertions = (
        "id: files, metric: checkpoint_health",
        "id: loads, metric: loaded_weights, max: 0",
        "id: weights, metric: weight_sqnr, layers: _proj$, min: 15",
        "id: alone, metric: local_sqnr, layers: _proj$, min: 10",
        "id: peaks, metric: absmax, layers: _proj$, site: input, max: 100",
    )
    for form, way in WAYS.items():
        keys = f"reference: {quantized['float']}, require: {{executed_as: {way}}}, name"
        text = suite(quantized[form], *assertions).replace("{name", f"{{{keys}")
        project.write(f"{form.replace(' ', '-')}.qsa.yaml", text)
    return project.pytest("--qsa-report=never")


@pytest.mark.process
@pytest.mark.parametrize("form", WAYS)
def test_a_checkpoint_of_each_format_is_gated_from_its_files_to_its_activations(gated, form):
    name = f"{form.replace(' ', '-')}.qsa.yaml"
    found = {test.partition("::")[2]: result for test, result in gated.outcomes.items() if test.startswith(name)}
    assert found == dict.fromkeys(("files", "loads", "weights", "alone", "peaks"), "passed"), gated.out

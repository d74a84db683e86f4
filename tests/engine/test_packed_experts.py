"""Weights of experts that lie packed in one tensor, against those that each expert multiplies by."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qsa import Capture, capture
from pytest_qsa.captures import ERROR, MOMENTS, STORED, LocalError, Request
from pytest_qsa.captures.merging import merge
from pytest_qsa.checkpoint import format_of, open_folder
from pytest_qsa.common.errors import AnomalyError, BaselineError, InfraError
from pytest_qsa.engine.formats.format import dequantized
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.modules import Expert, layers_of, with_experts
from pytest_qsa.engine.reference.pair_statistics import drawn_rows
from pytest_qsa.engine.subject import capture_loaded
from pytest_qsa.suite import Data, Memory, Model, Subject
from pytest_qsa.tools.selftest.faults import FAULTS
from pytest_qsa.tools.selftest.mutant import Mutant
from pytest_qsa.verdicts.baseline_file import BaselineFile, check_comparable
from support import models
from support.captures import differing
from support.checkpoints import save_quantized_moe

EXPERT = r"experts\.\d+\."
BATCH = [models.token_batch(1, 4)]
HOLDER = {"llama4": "model.layers.1.feed_forward.experts"}
PER_EXPERT = ("mixtral", "qwen3", "deepseek")
"""The kinds whose files have a tensor for each expert, as transformers saves them."""


@pytest.fixture(scope="module", params=models.MIXTURES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return models.mixture(kind)


def holder_of(kind):
    return HOLDER.get(kind, "model.layers.1.mlp.experts")


def weights_of(model, pattern=EXPERT, **options):
    return capture(model, BATCH, sites=[(pattern, "weight")], **options).weight(pattern)


def product(module, index, x):
    """Return what an expert makes of tokens, [T, C]: by the module's own forward, where every token goes to it."""
    with torch.no_grad():
        if "Llama4" in type(module).__name__:
            return module(x.repeat(4, 1))[index * len(x) : (index + 1) * len(x)]
        chosen = torch.full((len(x), 1), index)
        return module(x, chosen, torch.ones(len(x), 1))


def gated(module, gate, up):
    if "GptOss" not in type(module).__name__:
        return module.act_fn(gate) * up
    gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
    return (up + 1) * gate * torch.sigmoid(gate * module.alpha)


def test_an_expert_multiplies_by_the_weights_that_its_sites_have(kind, model):
    module = model.get_submodule(holder_of(kind))
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    layers = with_experts(layers_of(model))
    x = torch.randn(5, models.WIDTH, generator=torch.Generator().manual_seed(0))
    for index in range(4):
        gate, up, down = (
            dequantized(layers[f"{holder_of(kind)}.{index}.{part}"]) for part in ("gate_proj", "up_proj", "down_proj")
        )
        with torch.no_grad():
            made = gated(module, x @ gate.T, x @ up.T) @ down.T
        torch.testing.assert_close(made, product(module, index, x), rtol=1e-4, atol=1e-5)


def test_the_numbers_of_an_expert_are_those_of_its_own_tensor_in_files(kind, model, tmp_path):
    """From files with a tensor for each expert, and from packed ones: equal bits."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    own = weights_of(model, statistics=["rms", "absmax", "magnitude"])
    if kind in PER_EXPERT:
        names = {name: name.replace("mlp", "block_sparse_moe") if kind == "mixtral" else name for name in own.layers}
        ends = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if kind == "mixtral" else {}
        for name, rms in zip(own.layers, own.rms().values, strict=True):
            front, _, end = names[name].rpartition(".")
            weight = saved[f"{front}.{ends.get(end, end)}.weight"].double().numpy()
            np.testing.assert_allclose(rms, np.sqrt(np.mean(np.square(weight))), rtol=1e-12)
        packed = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(packed, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    form = format_of(open_folder(tmp_path / "saved"))
    assert list(own.layers) == list(form.experts)
    layers = with_experts(layers_of(model))
    for name in form.experts:
        expected = dequantized(layers[name]).double().numpy()
        np.testing.assert_array_equal(form.rows(name), expected)
        np.testing.assert_array_equal(form.rows(name, slice(3, 20, 2)), expected[3:20:2])
    loaded = weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32))
    np.testing.assert_array_equal(loaded.rms().values, own.rms().values)
    np.testing.assert_array_equal(loaded.absmax().values, own.absmax().values)


def test_names_follow_the_module_and_are_no_sites_of_the_forward(kind, model):
    found = capture(model, BATCH, sites=[("", "weight"), ("", "output")], statistics=["absmax"])
    experts = [name for name, layer in with_experts(layers_of(model)).items() if isinstance(layer, Expert)]
    assert [layer for layer in found.weight(".").layers if layer in set(experts)] == experts
    after = found.modules.index(holder_of(kind)) + 1
    assert found.modules[after : after + 3] == tuple(
        f"{holder_of(kind)}.0.{part}" for part in ("gate_proj", "up_proj", "down_proj")
    )
    assert set(found.output("mlp|feed_forward").layers).isdisjoint(experts)
    with pytest.raises(AnomalyError, match="no layer matches"):
        found.output(EXPERT).absmax()
    again = Capture.from_bytes(found.to_bytes())
    assert again.to_bytes() == found.to_bytes()
    assert again.weight(EXPERT).layers == found.weight(EXPERT).layers


def test_the_router_has_its_weight(kind, model):
    router = r"\.(gate|router)$"
    layers = weights_of(model, router).layers
    want = [np.abs(model.get_submodule(layer).weight.detach().numpy()).max() for layer in layers]
    np.testing.assert_array_equal(weights_of(model, router).absmax().values, want)
    assert len(layers) == (1 if kind == "deepseek" else 2)


def test_one_wrong_expert_is_the_one_that_is_named(kind, model):
    changed = models.mixture(kind)
    module = changed.get_submodule(holder_of(kind))
    with torch.no_grad():
        row = module.down_proj[3][:, 5] if kind in ("gpt_oss", "llama4") else module.down_proj[3][5]
        row.mul_(1.5)
    series = weights_of(changed, statistics=["weight_sqnr"], reference=model).weight_sqnr(by="channel")
    wrong = [name for name, value in zip(series.layers, series.values, strict=True) if np.isfinite(value)]
    assert wrong == [f"{holder_of(kind)}.3.down_proj"]
    # 1.5 w against w: an error of w / 2
    np.testing.assert_allclose(series.values[list(series.layers).index(wrong[0])], 20 * np.log10(2), atol=1e-4)


LOCAL_BATCHES = [models.token_batch(2, 9), models.padded_batch([7, 4]), models.padded_batch([5, 6], "left")]
ROWS = 8
"""Of a sample for one layer: 2 for each of 4 experts."""


def local_powers_of(model, reference, batches, name):
    """Return Σy² and Σ(y − ŷ)² of a layer in float64, on the drawn tokens of what the reference's module gets."""
    layers, others = with_experts(layers_of(model)), with_experts(layers_of(reference))
    holder, index, part = name.rsplit(".", 2)
    module, seen = reference.get_submodule(holder), []
    bias = {key: getattr(module, f"{key}_bias", None) for key in ("gate_up_proj", "down_proj")}
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    signal = noise = 0.0
    for number, batch in enumerate(batches):
        ids, mask = (batch["input_ids"], batch["attention_mask"]) if isinstance(batch, dict) else (batch, None)
        with torch.no_grad():
            reference(ids, attention_mask=mask)
        for row, tokens in enumerate(seen.pop().reshape(*ids.shape, -1)):
            kept = None if mask is None or mask[row].all() else mask[row].nonzero().flatten()
            x = tokens.double()[drawn_rows(2 * number + row, len(tokens), kept, ROWS // 4)]
            if part == "down_proj":
                one, two = (others[f"{holder}.{index}.{each}"] for each in ("gate_proj", "up_proj"))
                gate, up = (x @ dequantized(each).double().T for each in (one, two))
                if bias["gate_up_proj"] is not None:
                    gate = gate + bias["gate_up_proj"][int(index)][0::2].double()
                    up = up + bias["gate_up_proj"][int(index)][1::2].double()
                x = gated(module, gate, up)
            added = 0.0
            if bias["down_proj"] is not None:
                own = bias["down_proj" if part == "down_proj" else "gate_up_proj"][int(index)].double()
                added = {"gate_proj": own[0::2], "up_proj": own[1::2], "down_proj": own}[part]
            y, own_y = (x @ dequantized(each[name]).double().T + added for each in (others, layers))
            signal += float(y.square().sum().detach())
            noise += float((y - own_y).square().sum().detach())
    handle.remove()
    return signal, noise


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek"])
def test_the_local_error_of_an_expert_is_that_of_its_layers_on_tokens_of_the_reference(kind):
    reference = models.mixture(kind)
    if kind == "gpt_oss":
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if name.endswith("proj_bias"):
                    parameter.normal_()
    model = models.damaged(reference, 0.02)
    if kind == "gpt_oss":  # the biases are those of the original
        own = dict(model.named_parameters())
        for name, parameter in reference.named_parameters():
            if name.endswith("proj_bias"):
                own[name].data.copy_(parameter)
    found = capture(
        model, LOCAL_BATCHES, sites=[("_proj$", "output")], statistics=[("local_sqnr", {"rows": ROWS})],
        reference=reference,
    )  # fmt: skip
    series = found.output(EXPERT).local_sqnr(rows=ROWS)
    assert len(series.layers) == (12 if kind == "deepseek" else 24)
    for name, value in zip(series.layers, series.values, strict=True):
        signal, noise = local_powers_of(model, reference, LOCAL_BATCHES, name)
        np.testing.assert_allclose(value, 10 * np.log10(signal / noise), atol=2e-3, err_msg=name)
    # beside the layers that the forward calls
    assert "model.layers.0.self_attn.o_proj" in found.output("_proj$").local_sqnr(rows=ROWS).layers
    again = Capture.from_bytes(found.to_bytes()).output(EXPERT).local_sqnr(rows=ROWS)
    np.testing.assert_array_equal(again.values, series.values)


def test_the_local_error_of_a_router_is_measured():
    reference = models.mixture("mixtral")
    model = models.damaged(reference, 0.05, names=("gate.weight",))
    found = capture(
        model, LOCAL_BATCHES, sites=[(r"mlp\.gate$", "output")], statistics=["local_sqnr"], reference=reference
    )
    series = found.output(r"gate$").local_sqnr()
    assert len(series.layers) == 2
    want = capture(model, BATCH, sites=[(r"mlp\.gate$", "weight")], statistics=["weight_sqnr"], reference=reference)
    np.testing.assert_allclose(series.values, want.weight("gate$").weight_sqnr().values, atol=3)


def test_experts_that_can_not_be_run_alone_are_left_out_and_an_assertion_on_them_alone_says_why():
    reference = models.mixture("llama4")
    model = models.damaged(reference, 0.05)
    found = capture(model, BATCH, sites=[("_proj$", "output")], statistics=["local_sqnr"], reference=reference)
    layers = found.output("_proj$").local_sqnr().layers
    assert "model.layers.0.feed_forward.shared_expert.up_proj" in layers
    assert not [layer for layer in layers if ".experts." in layer]
    with pytest.raises(AnomalyError, match=r"24 layers of packed experts .*can't be run by themselves.*weight_sqnr"):
        found.output(EXPERT).local_sqnr()


def test_captures_of_disjoint_samples_keep_the_experts(model):
    parts = [
        capture(model, [batch], sites=[(EXPERT, "weight"), ("mlp$|feed_forward$", "output")], statistics=["absmax"])
        for batch in (models.token_batch(1, 5), models.token_batch(1, 7, seed=1))
    ]
    merged = merge(parts)
    np.testing.assert_array_equal(merged.weight(EXPERT).absmax().values, parts[0].weight(EXPERT).absmax().values)


def test_a_baseline_from_before_experts_had_weights_says_so_and_how_to_accept_them():
    model = models.mixture("qwen3")
    series = weights_of(model, r"_proj$").absmax()
    whole = BaselineFile.of(series, None)
    older = replace(whole, values={name: value for name, value in whole.values.items() if "experts" not in name})
    with pytest.raises(BaselineError) as caught:
        check_comparable(series, older, None)
    assert "older than pytest-qsa 0.1.0, since which packed experts have weights of their own: 24 layers" in str(
        caught.value
    )
    assert f"{len(older.values)}; look at their numbers and accept them with --snapshot-update" in str(caught.value)
    other = replace(older, values=dict(list(older.values.items())[1:]))
    with pytest.raises(BaselineError, match=r"the layers differ from the baseline's: 25 appeared"):
        check_comparable(series, other, None)
    check_comparable(series, whole, None)


def test_selftest_puts_a_fault_into_one_expert_of_a_packed_tensor(tmp_path):
    model = models.mixture("gpt_oss")
    model.save_pretrained(tmp_path / "model")
    folder = open_folder(tmp_path / "model")
    fault = FAULTS["expert_reinitialised"]
    layers = list(fault.targets(folder))
    assert layers == list(format_of(folder).experts)
    name = "model.layers.1.mlp.experts.2.up_proj"
    mutant = Mutant(folder)
    fault.inject(mutant, name, 1.0)
    broken = format_of(open_folder(mutant.save(tmp_path / "broken")))
    changed = [each for each in layers if not np.array_equal(broken.rows(each), format_of(folder).rows(each))]
    assert changed == [name]
    assert abs(broken.rows(name).std() - 0.02) < 0.002


class Fp8Experts(torch.nn.Module):
    """As transformers keeps them on a GPU: float8 with a scale for each block of an expert's matrix."""

    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.block_size = (block, block)
        shapes = {"gate_up_proj": (3, 48, 32), "down_proj": (3, 32, 24)}
        self.plain = {}
        for name, (count, outputs, inputs) in shapes.items():
            codes = torch.randn(count, outputs, inputs).to(torch.float8_e4m3fn)
            scales = torch.rand(count, -(-outputs // block), -(-inputs // block)) + 0.5
            setattr(self, name, torch.nn.Parameter(codes, requires_grad=False))
            setattr(self, f"{name}_scale_inv", torch.nn.Parameter(scales, requires_grad=False))
            spread = np.repeat(np.repeat(scales.numpy(), block, 1), block, 2)[:, :outputs, :inputs]
            self.plain[name] = codes.float().numpy() * spread


def test_experts_in_fp8_are_dequantized_one_by_one():
    module = Fp8Experts(16)
    layers = with_experts({"experts": module})
    for index in range(3):
        weights = [dequantized(layers[f"experts.{index}.{part}"]).numpy() for part in ("gate_proj", "up_proj")]
        np.testing.assert_array_equal(np.concatenate(weights), module.plain["gate_up_proj"][index])
        down = dequantized(layers[f"experts.{index}.down_proj"]).numpy()
        np.testing.assert_array_equal(down, module.plain["down_proj"][index])


def test_packed_codes_of_an_unknown_format_are_refused_by_name():
    module = Fp8Experts(16)
    module.register_parameter("gate_up_proj_scale_inv", None)
    with pytest.raises(InfraError, match=r"Fp8Experts holds weight .*float8.* in a format that is not known"):
        dequantized(with_experts({"experts": module})["experts.1.up_proj"])


def test_tensors_that_do_not_fit_as_experts_are_no_experts():
    module = torch.nn.Module()
    module.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 48, 32))
    module.down_proj = torch.nn.Parameter(torch.zeros(3, 31, 24))
    assert list(with_experts({"a": module})) == ["a"]


def test_a_pass_does_not_copy_the_experts():
    """The weight of an expert is a view: its memory is that of the packed tensor."""
    model = models.mixture("gpt_oss")
    layers = with_experts(layers_of(model))
    packed = model.get_submodule("model.layers.0.mlp.experts").gate_up_proj
    view = dequantized(layers["model.layers.0.mlp.experts.2.up_proj"])
    assert view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
def test_weights_that_stream_from_disk_have_the_same_numbers(kind, tmp_path):
    """From files with a tensor for each expert, which transformers packs on disk, and from packed ones."""
    original = models.mixture(kind)
    models.damaged(original, names=("experts",)).save_pretrained(tmp_path / "model")
    original.save_pretrained(tmp_path / "original")
    requests = [Request(EXPERT, "weight", None, frozenset({ERROR, MOMENTS}))]
    requests.append(Request(EXPERT, "output", None, frozenset({LocalError(ROWS)})))
    found = []
    for memory in (Memory(device="cpu"), Memory(device="cpu", offload_device="disk")):
        spec = Model(path=str(tmp_path / "model"), reference=str(tmp_path / "original"), dtype="float32")
        subject = Subject("x", spec, Data(num_samples=1, seq_len=8), memory, tmp_path)
        own, other = (load_model(spec, str(tmp_path / n), memory, allow_code=False) for n in ("model", "original"))
        with closing(own) as loaded, closing(other) as reference:
            assert (loaded.stream is not None) == (memory.offload_device == "disk")
            found.append(capture_loaded(subject, loaded, BATCH, requests, reference=reference))
    assert differing(*found) == []
    assert np.isfinite(found[0].weight(EXPERT).weight_sqnr().values).all()
    assert len(found[0].weight(EXPERT).layers) == 24
    assert np.isfinite(found[0].output(EXPERT).local_sqnr(rows=ROWS, positions="all").values).all()


@pytest.mark.parametrize("site", ["experts", "each expert"])
def test_loaded_weights_see_the_expert_that_a_loader_gets_wrong(site, tmp_path):
    """On a quantized checkpoint with a tensor for each expert; the module has the worst of its experts."""
    folder = save_quantized_moe(tmp_path / "moe", "W4A16", group_size=16)
    layers = r"mlp\.experts$" if site == "experts" else EXPERT
    memory = Memory(device="cpu")
    spec = Model(path=str(folder))
    subject = Subject("x", spec, Data(num_samples=1, seq_len=8), memory, tmp_path)
    with closing(load_model(spec, str(folder), memory, allow_code=False)) as loaded:
        requests = [Request(layers, "weight", None, frozenset({STORED}))]
        sound = capture_loaded(subject, loaded, BATCH, requests).weight(layers).loaded_weights()
        np.testing.assert_array_equal(sound.values, 0)
        with torch.no_grad():
            loaded.model.get_submodule("model.layers.1.mlp.experts").down_proj[2] *= 1.5
        series = capture_loaded(subject, loaded, BATCH, requests).weight(layers).loaded_weights()
    wrong = [name for name, value in zip(series.layers, series.values, strict=True) if value > 0]
    end = "" if site == "experts" else ".2.down_proj"
    assert wrong == [f"model.layers.1.mlp.experts{end}"]
    np.testing.assert_allclose(series.values.max(), 0.5, rtol=1e-6)

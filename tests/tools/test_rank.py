"""`qsa rank`: what quantizing each unit costs, and which to keep in 16 bits for a budget."""

import json
import re
from fnmatch import fnmatchcase
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from safetensors.torch import load_file

from pytest_qsa import engine
from pytest_qsa.checkpoint import Files, open_folder
from pytest_qsa.cli import main
from pytest_qsa.common import AnomalyError, InfraError
from pytest_qsa.engine.modules import Expert, layers_of, with_experts
from pytest_qsa.engine.substitution import Substitution
from pytest_qsa.metrics import Estimate
from pytest_qsa.suite import Data, Memory, Model, Subject
from pytest_qsa.tools.ignore_lists import ignore_list
from pytest_qsa.tools.rank import QuantizedUnits, Ranked, Ranking, Unit, estimated, mean_of, ranking_of
from support.checkpoints import edited, save_gguf, save_quantized_llama, save_quantized_moe
from support.models import llama as small_llama, mixtral, token_batch

DOWN = "model.layers.2.mlp.down_proj"
QKV = "model.layers.2.self_attn.{q,k,v}_proj"


def units_of(checkpoint, reference, **options):
    names = [name for name, *_ in engine.outline(Model(path=str(reference)), str(reference))]
    return QuantizedUnits(Files(open_folder(checkpoint, **options), open_folder(reference)), names)


@pytest.fixture(scope="module")
def measured(quantized, llama):
    """Measure an int4 Llama on eight windows of 24 tokens: its units, the windows, and what came of each unit."""
    units = units_of(quantized["int4"], llama)
    data = Data(num_samples=8, seq_len=24)
    model = Model(path=str(quantized["int4"]), reference=str(llama))
    subject = Subject("int4", model, data, Memory(device="cpu"), llama).named
    with engine.substitution_of(subject, units.weight) as substitution:
        ranking = ranking_of(substitution, units, seconds=1e9, progress=lambda done, total: None)
        alone = dict(substitution.alone({name: units.layers[name] for name in (QKV, DOWN)}))
        batches = substitution._batches
    return units, ranking, alone, batches


def divergences(model, reference, batches):
    """Return the KL divergence of each position, computed in float64."""
    found = []
    with torch.no_grad():
        for batch in batches:
            q, p = (each(**batch).logits[0].double().log_softmax(1) for each in (model, reference))
            found.append((p.exp() * (p - q)).sum(1).numpy())
    return found


@pytest.mark.parametrize("unit", [QKV, DOWN])
def test_a_unit_alone_costs_what_its_dequantized_weights_cost_in_the_original(unit, measured, quantized, llama):
    units, ranking, alone, batches = measured
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference, changed = (load(llama, dtype=torch.float32) for _ in range(2))
    stored = load_file(quantized["int4"] / "model.safetensors")
    for layer in units.layers[unit]:
        packed, scale, shape = (stored[f"{layer}.weight_{part}"] for part in ("packed", "scale", "shape"))
        codes = unpack_from_int32(packed, 4, torch.Size(shape.tolist()))
        spread = scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
        changed.get_submodule(layer).weight.data.copy_(codes.float() * spread)
    expected = divergences(changed, reference, batches)
    np.testing.assert_allclose(np.concatenate(alone[unit]), np.concatenate(expected), rtol=2e-3, atol=1e-9)
    found = next(each for each in ranking.ranked if each.unit.name == unit)
    assert found.kl.value == pytest.approx(np.concatenate(expected).mean(), rel=1e-3)


def test_the_whole_is_all_units_together_and_the_first_saves_most_for_its_bits(measured):
    units, ranking, _, _ = measured
    assert {each.unit.name for each in ranking.ranked} == set(units.units)
    saved = [each.kl.value / (16 * each.unit.weights - each.unit.bits) for each in ranking.ranked]
    assert saved == sorted(saved, reverse=True)
    assert max(each.kl.value for each in ranking.ranked) < ranking.whole.value
    assert all(each.kl.low < each.kl.value < each.kl.high for each in ranking.ranked)


def test_a_forward_begins_behind_the_blocks_before_the_unit_and_the_weights_come_back():
    model, batches = small_llama().eval(), [token_batch(2, 8), token_batch(2, 8, seed=1)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
        original = block.mlp.forward
        block.mlp.forward = lambda *args, original=original, index=index: (
            calls.append(f"mlp {index}") or original(*args)
        )
    last = len(model.model.layers) - 1
    layer = f"model.layers.{last}.mlp.down_proj"
    weight = np.zeros(model.get_submodule(layer).weight.shape, dtype=np.float32)
    with torch.no_grad():
        substitution = Substitution(model, batches, lambda name: weight)
        substitution.run_reference()
        calls.clear()
        ((_, windows),) = substitution.alone({"last": [layer]})
    # Each block runs once a batch, to know its output, and once for each block before it, to see that this is enough.
    assert [calls.count(f"mlp {index}") for index in range(last)] == [2 + index for index in range(last)]
    assert calls.count(f"mlp {last}") == 2 + last
    assert len(windows) == 4
    assert np.concatenate(windows).min() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Sidelong(torch.nn.Module):
    """Blocks that hand on a second tensor, of which a forward that begins in the middle would know nothing."""

    class Block(torch.nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.proj = torch.nn.Linear(8, 8)
            self.whole = [whole]

        def forward(self, x):
            self.whole[0].beside = self.whole[0].beside + self.proj(x)
            return x

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(16, 8)
        self.blocks = torch.nn.ModuleList([self.Block(self) for _ in range(3)])
        self.beside = 0.0

    def forward(self, ids):
        x, self.beside = self.embed(ids), 0.0
        for block in self.blocks:
            x = block(x)
        return self.beside


def test_a_model_whose_blocks_hand_on_more_than_one_tensor_is_run_as_a_whole():
    model, batch = Sidelong().eval(), torch.arange(8)[None]
    with torch.no_grad():
        substitution = Substitution(model, [batch], lambda name: np.zeros((8, 8), dtype=np.float32))
        substitution.run_reference()
        ((_, (found,)),) = substitution.alone({"last": ["blocks.2.proj"]})
        p = model(batch)[0].double().log_softmax(1)
        model.blocks[2].proj.weight.zero_()
        q = model(batch)[0].double().log_softmax(1)
    np.testing.assert_allclose(found, (p.exp() * (p - q)).sum(1).numpy(), rtol=1e-4)


def test_a_tied_head_that_is_stored_apart_leaves_the_embeddings_as_they_are():
    model = small_llama(tie_word_embeddings=True).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    zeros = np.zeros(model.lm_head.weight.shape, dtype=np.float32)
    with torch.no_grad():
        substitution = Substitution(model, [token_batch(1, 8)], lambda name: zeros)
        substitution.run_reference()
        substitution.untie_head({"lm_head"})
        (found,) = substitution.together(["lm_head"])
        p = model(token_batch(1, 8)).logits[0].double().log_softmax(1)
    flat = np.log(p.shape[1]) + (p.exp() * p).sum(1).numpy()  # against logits of zeros
    np.testing.assert_allclose(found, flat, rtol=1e-4)


def test_what_servers_fuse_is_one_unit_and_so_are_the_experts_of_a_block(quantized, llama, tmp_path):
    dense = units_of(quantized["int4"], llama).units
    ends = ["self_attn.{q,k,v}_proj", "self_attn.o_proj", "mlp.{gate,up}_proj", "mlp.down_proj"]
    assert sorted(dense) == sorted(f"model.layers.{block}.{end}" for block in range(4) for end in ends)
    moe = save_quantized_moe(tmp_path / "moe", "W4A16", group_size=16)
    experts = units_of(moe, tmp_path / "moe-float").units["model.layers.0.mlp.experts"]
    assert len(experts.layers) == 4 * 3
    assert experts.weights == 4 * 3 * 32 * 32


def test_the_bits_of_a_unit_are_those_of_its_codes_and_scales(quantized, llama, tmp_path):
    units = units_of(quantized["int8"], llama)
    down = units.units[DOWN]  # 32 × 64 in int8, with a scale in bfloat16 or float32 a row
    assert down.weights == 32 * 64
    assert down.bits in (8 * (32 * 64 + 2 * 32), 8 * (32 * 64 + 4 * 32))
    save_gguf(tmp_path / "gguf", llama, "Q8_0")
    gguf = units_of(tmp_path / "gguf", llama, gguf_file="model.gguf")
    assert gguf.units[DOWN].bits == 8.5 * 32 * 64
    np.testing.assert_allclose(gguf.weight(DOWN), units.weight(DOWN), atol=0.02)


def ranked(name, kl, weights=1000, bits=4000, half=0.0):
    return Ranked(Unit(name, (name,), weights, bits), Estimate(kl, kl - half, kl + half, 8))


def test_units_within_the_intervals_of_one_another_are_ties():
    halves = {"a": (1.0, 0.1), "b": (0.95, 0.06), "c": (0.89, 0.3), "d": (0.6, 0.3), "e": (0.5, 0.01)}
    units = [ranked(name, kl, half=half) for name, (kl, half) in halves.items()]
    # c reaches a, and a doesn't reach c; d and c reach one another; d reaches e, and e doesn't reach c.
    assert Ranking(units, Estimate(3.0, 2.9, 3.1, 8), 8).places == [1, 1, 3, 3, 5]
    unknown = [ranked("a", 1.0, half=float("nan")), ranked("b", 1.0)]
    assert Ranking(unknown, Estimate(3.0, 2.9, 3.1, 8), 2).places == [1, 2]


def test_a_budget_of_bits_is_filled_in_order_with_what_still_fits():
    units = [ranked("a", 1.0), ranked("wide", 0.9, weights=4000, bits=16000), ranked("c", 0.1)]
    ranking = Ranking(units, Estimate(2.0, 2.0, 2.0, 8), 8)
    assert ranking.bits() == 4.0
    kept = ranking.within_bits(8.0)  # 24,000 + 12,000 · 2 of 48,000 bits; the wide one would add 48,000
    assert [unit.name for unit in kept] == ["a", "c"]
    assert ranking.bits(kept) == 8.0


@pytest.mark.parametrize(("most", "count", "left"), [(3.0, 0, 2.0), (2.0, 0, 2.0), (1.5, 1, 1.5), (0.2, 9, 0.0)])
def test_a_budget_of_kl_is_met_by_the_fewest_units_as_measured(most, count, left):
    ranking = Ranking([ranked(str(index), 1.0) for index in range(9)], Estimate(2.0, 1.9, 2.1, 8), 8)
    asked = []

    def measure(kept):
        asked.append(len(kept))
        value = 2.0 - 0.5 * len(kept) if len(kept) < 2 else 1.0 - 0.01 * len(kept)
        return Estimate(value, value, value, 8)

    kept, kl = ranking.within_kl(most, measure)
    assert (len(kept), kl.value) == (count, left)
    assert len(asked) <= 4


def test_what_is_not_measured_is_estimated_from_its_local_error_and_the_measured_of_its_kind():
    names = [f"model.layers.{index}.o_proj" for index in range(5)]
    errors = {name: 0.1 * (index + 1) for index, name in enumerate(names)}
    true = {name: error * 2.0**index for index, (name, error) in enumerate(errors.items())}
    found = estimated(names, {name: true[name] for name in (names[0], names[4])}, errors)
    assert found == pytest.approx({name: true[name] for name in names[1:4]})


def test_too_little_time_leaves_part_of_the_units_estimated(quantized, llama):
    units = units_of(quantized["int4"], llama)
    model = Model(path=str(quantized["int4"]), reference=str(llama))
    subject = Subject("int4", model, Data(num_samples=2, seq_len=16), Memory(device="cpu"), llama).named
    with engine.substitution_of(subject, units.weight) as substitution:
        ranking = ranking_of(substitution, units, seconds=1e-9, progress=lambda done, total: None)
    assert (
        sum(each.estimated for each in ranking.ranked) == 8
    )  # of each of the four kinds the first and last is measured
    assert all(np.isfinite(each.kl.value) and each.kl.value > 0 for each in ranking.ranked)


# --- ignore lists


UNITS = [
    Unit("model.layers.1.self_attn.{q,k,v}_proj", tuple(f"model.layers.1.self_attn.{x}_proj" for x in "qkv"), 1, 1),
    Unit("model.layers.1.mlp.experts", ("model.layers.1.mlp.experts.0.up_proj",), 1, 1),
]
KEPT = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.7.down_proj", "lm_head")
OTHERS = (
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.expertsX.0.up_proj",
)


def test_llm_compressor_leaves_out_the_layers_and_all_experts():
    from compressed_tensors.utils.match import match_name

    names = yaml.safe_load(ignore_list("llm-compressor", UNITS, ["lm_head"]))["ignore"]
    assert all(any(match_name(layer, name) for name in names) for layer in KEPT)
    assert not any(match_name(layer, name) for name in names for layer in OTHERS)


def test_modelopt_disables_the_quantizers_of_the_layers():
    entries = json.loads(ignore_list("modelopt", UNITS, ["lm_head"]))
    assert all(entry["enable"] is False for entry in entries)
    found = [
        [
            any(fnmatchcase(f"{layer}.weight_quantizer", entry["quantizer_name"]) for entry in entries)
            for layer in layers
        ]
        for layers in (KEPT, OTHERS)
    ]
    assert found == [[True] * 3, [False] * 3]


def test_gptq_leaves_out_the_layers_and_servers_their_fused_ones():
    dynamic = json.loads(ignore_list("gptq", UNITS, ["lm_head"]))
    patterns = [key.removeprefix("-:") for key in dynamic]
    assert all(override == {} for override in dynamic.values())
    kept = (*KEPT, "model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.experts")
    assert all(any(re.match(pattern, layer) for pattern in patterns) for layer in kept)
    assert not any(re.match(pattern, layer) for pattern in patterns for layer in OTHERS)


# --- the command


def test_the_command_says_what_to_keep_and_writes_it(quantized, llama, tmp_path, capsys):
    output = tmp_path / "keep.yaml"
    words = ["--reference", str(llama), "--target-kl", "0.05", "-o", str(output), "--data.num_samples", "8"]
    assert main(["rank", str(quantized["int4"]), *words, "--data.seq_len", "24", "--memory.device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"all quantized together: 0\.\d+", text)
    kept, after = re.search(r"keep (\d+) units in 16 bits: .*→ (0\.0\d+) ", text).groups()
    assert float(after) <= 0.05
    listed = yaml.safe_load(output.read_text())["ignore"]
    assert listed[0] == "lm_head"  # which the checkpoint leaves out
    assert len(listed) > int(kept)
    assert f"written for llm-compressor: {output}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name it, --reference ORIGINAL"),
        (["--reference", "{int4}"], "is quantized itself"),
        (["--reference", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
        (["--reference", "{llama}", "--target-bits", "2"], "bits a weight already"),
    ],
)
def test_what_cannot_be_ranked_is_told_in_one_line(words, message, quantized, llama, capsys):
    words = [word.format(int4=quantized["int4"], llama=llama) for word in words]
    assert main(["rank", str(quantized["int4"]), *words, "--data.seq_len", "8"]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_unquantized_checkpoint_has_nothing_to_rank(llama):
    with pytest.raises(InfraError, match="stores no quantized layer"):
        units_of(llama, llama)


def test_another_model_is_no_reference(quantized, llama, tmp_path):
    def other(weights):
        torch.manual_seed(1)
        weights |= {name: torch.randn(tensor.shape) for name, tensor in weights.items() if tensor.dim() == 2}

    reference = edited(llama, tmp_path / "other", other)
    units = units_of(quantized["int4"], reference)
    model = Model(path=str(quantized["int4"]), reference=str(reference))
    subject = Subject("int4", model, Data(num_samples=1, seq_len=8), Memory(device="cpu"), llama).named
    with (
        engine.substitution_of(subject, units.weight) as substitution,
        pytest.raises(AnomalyError, match="no rounding"),
    ):
        ranking_of(substitution, units, seconds=1.0, progress=lambda done, total: None)


def test_a_reference_that_does_not_fit_into_memory_is_refused_before_it_is_loaded(quantized, llama, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    units = units_of(quantized["int4"], llama)
    model = Model(path=str(quantized["int4"]), reference=str(llama))
    subject = Subject("int4", model, Data(), Memory(device="cpu"), llama).named
    refused = pytest.raises(InfraError, match=r"in float32, twice, would take 0\.0 GB, .* a machine with more memory$")
    with refused, engine.substitution_of(subject, units.weight):
        pass


def test_weights_that_are_not_finite_are_refused():
    model = small_llama().eval()
    layer = "model.layers.0.mlp.down_proj"
    weight = np.full(model.get_submodule(layer).weight.shape, np.nan, dtype=np.float32)
    with torch.no_grad(), pytest.raises(AnomalyError, match=rf"weight of {layer} holds NaN"):
        Substitution(model, [token_batch(1, 8)], lambda name: weight).together([layer])


def test_a_mean_is_over_all_positions_and_few_windows_have_no_interval():
    assert mean_of([np.array([1.0, 2.0]), np.array([6.0])]).value == 3.0
    assert np.isnan(mean_of([np.ones(4)]).low)


def test_the_units_of_a_smoothed_checkpoint_cost_what_rounding_costs(llama, tmp_path):
    def smooth(weights):
        for index in range(4):
            factors = torch.rand(32, generator=torch.Generator().manual_seed(index)) * 3 + 0.3
            weights[f"model.layers.{index}.input_layernorm.weight"] /= factors
            for name in ("q_proj", "k_proj", "v_proj"):
                weights[f"model.layers.{index}.self_attn.{name}.weight"] *= factors

    changed = edited(llama, tmp_path / "changed", smooth)
    int8 = save_quantized_llama(tmp_path / "int8", changed, "W8A16", strategy="channel", group_size=None)
    units = units_of(int8, llama)
    subject = Subject(
        "int8",
        Model(path=str(int8), reference=str(llama)),
        Data(num_samples=1, seq_len=16),
        Memory(device="cpu"),
        llama,
    )
    with engine.substitution_of(subject.named, units.weight) as substitution:
        (found,) = substitution.together(units.modules)
        batches = substitution._batches
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference, whole = load(llama, dtype=torch.float32), load(changed, dtype=torch.float32)
    for layer in units.modules:  # what the checkpoint itself computes, its norms and weights as they are
        whole.get_submodule(layer).weight.data.copy_(torch.from_numpy(units._stored(layer)))
    (expected,) = divergences(whole, reference, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-9)


def test_packed_experts_are_replaced_one_by_one_and_come_back():
    model = mixtral().eval()
    experts = {name: each for name, each in with_experts(layers_of(model)).items() if isinstance(each, Expert)}
    shapes = {name: each.shape for name, each in experts.items() if name.startswith("model.layers.1.")}
    packed = {name: tensor for name, tensor in model.named_parameters() if ".1.mlp.experts." in name}
    before = {name: tensor.detach().clone() for name, tensor in packed.items()}
    batch = token_batch(2, 8)
    with torch.no_grad():
        substitution = Substitution(model, [batch], lambda name: np.full(shapes[name], 0.01, dtype=np.float32))
        substitution.run_reference()
        ((_, found),) = substitution.alone({"experts": list(shapes)})
        assert all(torch.equal(tensor, before[name]) for name, tensor in packed.items())
        p = model(batch).logits.double().log_softmax(2)
        for tensor in packed.values():
            tensor.fill_(0.01)
        q = model(batch).logits.double().log_softmax(2)
    np.testing.assert_allclose(np.stack(found), (p.exp() * (p - q)).sum(2).numpy(), rtol=1e-3, atol=1e-9)

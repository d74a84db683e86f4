"""The sites key and value, latent and rope_key: what attention hands to the KV cache, in any architecture."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import Cache, DynamicCache

from pytest_qsa import capture
from pytest_qsa.captures import AGREEMENT, CACHE_SCALE, COUNTS, ERROR, MOMENTS, SCORES, Capture, Request
from pytest_qsa.common.errors import AnomalyError, SuiteError
from pytest_qsa.engine import capture_subject
from pytest_qsa.engine.reference.live import LiveReference
from pytest_qsa.engine.run import kv_cache
from pytest_qsa.engine.run.kv_cache import watched
from pytest_qsa.engine.run.rounded_cache import RoundedCache, cache_rounded
from pytest_qsa.engine.run.run_pass import run_pass
from pytest_qsa.metrics import METRICS
from pytest_qsa.suite import Data, Memory, Model, Subject
from pytest_qsa.verdicts.judge import Measurement
from support import models, oracle
from support.judged import assertion_of, judged

ATTENTION = r"self_attn$"
_SIZES = {
    "vocab_size": models.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip


def deepseek():
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = {**_SIZES, **experts, **latent, "num_key_value_heads": 4, "moe_intermediate_size": 16}
    return models._build(("DeepseekV3ForCausalLM", config), "DeepseekV3")


def gemma3n():
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    streams = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "laurel_rank": 4}
    config = {
        **_SIZES, **layers, **streams, "num_hidden_layers": 4, "intermediate_size": [64] * 4, "sliding_window": 8,
        "num_key_value_heads": 2, "head_dim": 8, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2,
    }  # fmt: skip
    return models._build(("Gemma3nForCausalLM", config), "Gemma3nText")


def cached(model, batch):
    """Return what transformers' own cache holds after a forward: for each layer keys and values, [B, H, T, D]."""
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    return [(layer.keys.double().numpy(), layer.values.double().numpy()) for layer in cache.layers]


@pytest.fixture(scope="module")
def small():
    return models.llama()


@pytest.fixture(scope="module")
def padded():
    return models.padded_batch([17, 24, 9])


@pytest.fixture(scope="module")
def found(small, padded) -> Capture:
    metrics = ["absmax", "rms", "outlier_tokens", "channel_band"]
    rounded = [("quantization_sqnr", {"scheme": s, "by": b}) for s, b in GRIDS]
    grouped = ("quantization_sqnr", {"scheme": "int4", "by": "group", "group_size": 4})
    sites = [(ATTENTION, "key"), (ATTENTION, "value")]
    return capture(small, [padded], sites=sites, statistics=[*((m, {}) for m in metrics), *rounded, grouped])


GRIDS = [("int8", "token_head"), ("int4", "token_head"), ("fp8_e4m3", "token_head"), ("int4", "channel")]


def rows_of(small, padded, layer, side):
    """Return the tokens of each sample that are no padding, [T, H, D]."""
    states = cached(small, padded)[layer][side]
    mask = padded["attention_mask"].numpy().astype(bool)
    return [np.moveaxis(sample, 0, 1)[kept] for sample, kept in zip(states, mask, strict=True)]


@pytest.mark.parametrize(("side", "site"), [(0, "key"), (1, "value")])
def test_the_numbers_are_those_of_the_states_in_the_models_own_cache(small, padded, found, side, site):
    series = {name: getattr(found.select(ATTENTION, site), name)() for name in ("absmax", "rms", "outlier_tokens")}
    for layer in range(4):
        samples = rows_of(small, padded, layer, side)
        every = np.concatenate([sample.ravel() for sample in samples])
        assert series["absmax"].values[layer] == np.float32(np.abs(every).max())
        assert series["rms"].values[layer] == pytest.approx(np.sqrt((every**2).mean()), rel=1e-6)
        tokens = max(oracle.outlier_tokens(sample.reshape(len(sample), -1)) for sample in samples)
        assert series["outlier_tokens"].values[layer] == tokens


def nearest(scheme, values):
    """Return the nearest numbers of a grid whose largest is that of the scheme."""
    if scheme != "fp8_e4m3":
        return np.rint(values)
    return torch.from_numpy(values).to(torch.float8_e4m3fn).double().numpy()


@pytest.mark.parametrize(("scheme", "by"), [*GRIDS, ("int4", "group")])
def test_a_scale_for_each_token_and_head_block_or_channel_gives_the_error_of_numpy(small, padded, found, scheme, by):
    size = {"group_size": 4} if by == "group" else {}
    own = found.select(ATTENTION, "key").quantization_sqnr(scheme=scheme, by=by, **size)
    largest = {"int8": 127, "int4": 7, "fp8_e4m3": 448}[scheme]
    for layer in range(4):
        signal = error = 0.0
        for x in rows_of(small, padded, layer, 0):
            x = x.reshape(*x.shape[:2], -1, 4) if by == "group" else x
            scale = np.abs(x).max(axis=0 if by == "channel" else -1, keepdims=True) / largest
            signal, error = signal + (x**2).sum(), error + ((x - nearest(scheme, x / scale) * scale) ** 2).sum()
        assert own.values[layer] == pytest.approx(10 * np.log10(signal / error), abs=0.02)


def test_the_error_against_a_reference_is_that_of_the_two_caches(small, padded):
    other = models.llama(seed=0)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    found = capture(other, [padded], sites=[(ATTENTION, "key")], statistics=["sqnr"], reference=small)
    values = found.select(ATTENTION, "key").sqnr(positions="all").values
    assert values[0] == np.inf
    x, y = (np.concatenate([t.ravel() for t in rows_of(m, padded, 1, 0)]) for m in (small, other))
    assert values[1] == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), abs=1e-3)


def test_latent_attention_has_the_sites_latent_and_rope_key_and_says_so(padded):
    model = deepseek()
    batch = {"input_ids": padded["input_ids"]}
    found = capture(model, [batch], sites=[(ATTENTION, "latent"), (ATTENTION, "rope_key")], statistics=["absmax"])
    for layer, states in enumerate(cached(model, batch)):
        for site, state in zip(("latent", "rope_key"), states, strict=True):
            assert found.select(ATTENTION, site).absmax().values[layer] == np.float32(np.abs(state).max())
    keys = capture(model, [batch], sites=[(ATTENTION, "key")], statistics=["absmax"])
    with pytest.raises(AnomalyError, match=r"model.layers.0.self_attn has the sites latent and rope_key"):
        keys.select(ATTENTION, "key").absmax()


def test_layers_that_read_anothers_cache_are_left_out_by_name(padded):
    found = capture(gemma3n(), [padded["input_ids"][:1]], sites=[(ATTENTION, "value")], statistics=["absmax", "rms"])
    assert found.select(ATTENTION, "value").layers == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert [*found.uncached] == [f"model.layers.{i}.self_attn" for i in (2, 3)]
    # A verdict that holds says which layers it isn't about.
    assertion = assertion_of(metric="rms", layers=ATTENTION, site="value", max=100)
    verdict = judged(assertion, Measurement(found, lambda *_: pytest.fail("no baseline")))
    assert not verdict.failed
    assert "; left out: model.layers.2.self_attn and 1 more, for it fills no KV cache: it reads" in verdict.headline
    again = Capture.from_bytes(found.to_bytes())
    assert again.uncached == found.uncached
    assert again.select(ATTENTION, "value").layers == found.select(ATTENTION, "value").layers


def test_a_decoder_caches_itself_and_the_encoder_whose_own_attention_caches_nothing():
    ids = models.token_batch(2, 12)
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    found = capture(models.t5(), [batch], sites=[("Attention$", "key")], statistics=["absmax"])
    shapes = {layer: numbers.shape[0] for (layer, site), numbers in found.sites.items() if site == "key"}
    assert {n.rpartition(".")[2]: t for n, t in shapes.items()} == {"SelfAttention": 5, "EncDecAttention": 12}
    assert [*found.uncached] == [f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)]


def test_a_model_without_a_cache_is_refused_in_one_line(padded):
    found = capture(models.bert(), [padded["input_ids"]], sites=[("self$", "key")], statistics=["absmax"])
    with pytest.raises(AnomalyError, match=r"has a key: encoder.layer.0.attention.self fills no KV cache"):
        found.select("self$", "key").absmax()
    with pytest.raises(AnomalyError, match="the model has no layer that fills a KV cache"):
        capture(models.ConvNet(), [torch.zeros(1, 3, 8, 8)], sites=[("conv", "key")])


def test_a_scale_by_token_and_head_is_of_the_cache_alone(small):
    statistics = [("quantization_sqnr", {"by": "token_head"})]
    with pytest.raises(SuiteError, match="by: token_head is of the KV cache"):
        capture(small, [models.token_batch(1, 8)], sites=[(ATTENTION, "output")], statistics=statistics)


def test_watching_the_cache_changes_no_other_number_and_leaves_transformers_as_it_was(small, padded):
    update, sites = Cache.update, [("self_attn$|layers", "output"), ("", "logits")]
    plain = capture(small, [padded], sites=sites)
    both = capture(small, [padded], sites=[*sites, (ATTENTION, "key"), (ATTENTION, "value")])
    assert Cache.update is update
    for site in plain.sites:
        one, other = plain.sites[site].to_arrays()[0], both.sites[site].to_arrays()[0]
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def captured(model, batch, grid, scales=None, sites=((ATTENTION, "value"), ("", "logits"))):
    """Capture a model whose cache is rounded, against itself without that."""
    statistics = frozenset({ERROR, MOMENTS, AGREEMENT, SCORES})
    requests = [Request(layers, site, None, statistics) for layers, site in sites]
    return run_pass(
        model, [batch], requests, [RoundedCache(grid, scales or {}, None), LiveReference(copy.deepcopy(model))]
    )


class Rounding(DynamicCache):
    """A cache that rounds what it is given, for a model that is called with it."""

    def __init__(self, rounding):
        super().__init__()
        self.rounding = rounding

    def update(self, keys, values, layer_idx, *args, **kwargs):
        return super().update(self.rounding(keys, 0), self.rounding(values, 1), layer_idx, *args, **kwargs)


def kl(original, other, mask):
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (original, other))
    return (p.exp() * (p - q)).sum(-1)[mask.bool()].mean().item()


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.01, 0.003)])
def test_the_whole_model_runs_with_every_state_rounded_to_the_checkpoints_scales(small, padded, scales):
    def to_fp8(state, side):
        x = (state / scales[side]).clamp(-448, 448)
        return (x.to(torch.float8_e4m3fn).float() * scales[side]).to(state.dtype)

    named = {f"model.layers.{i}.self_attn": scales for i in range(4)}
    found = captured(small, padded, "fp8_e4m3", named)
    with torch.no_grad():
        plain, own = small(**padded).logits, small(**padded, past_key_values=Rounding(to_fp8)).logits
    expected = kl(plain, own, padded["attention_mask"])
    assert expected > 1e-7
    assert found.logits().kl_divergence().values[0] == pytest.approx(expected, rel=1e-3)
    # The first layer is given what it was given before; a later one is given what rounded states have changed.
    errors = found.select(ATTENTION, "value").sqnr(positions="all").values
    assert errors[0] == np.inf
    assert np.isfinite(errors[1:]).all()


def test_finer_grids_lose_less(small, padded):
    model = models.llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    losses = [captured(model, padded, g).logits().kl_divergence().values[0] for g in ("q8_0", "fp8_e4m3", "q4_0")]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_a_model_without_a_cache_is_not_compared_with_itself():
    with pytest.raises(AnomalyError, match=r"model\.kv_cache: the model has no layer that fills a KV cache"):
        captured(models.bert(), models.token_batch(1, 8), "fp8_e4m3", sites=[("layer", "output")])


def test_tokens_that_come_one_at_a_time_are_rounded_as_those_of_one_forward(small):
    ids = models.token_batch(1, 9)
    with torch.no_grad(), cache_rounded(small, "int8_per_token_head", {}):
        whole = small(ids, use_cache=True).logits
        cache, parts = None, []
        for token in ids[0]:
            made = small(token[None, None], past_key_values=cache, use_cache=True)
            cache, parts = made.past_key_values, [*parts, made.logits]
        assert torch.allclose(whole, torch.cat(parts, 1), atol=1e-4)
        plain = small(ids, use_cache=False).logits
    assert not torch.allclose(whole, plain, atol=1e-4)


def test_latents_and_rope_keys_have_the_scale_of_keys(padded):
    model, batch = deepseek(), {"input_ids": padded["input_ids"]}
    seen = {}

    def note(sites, states):
        seen.update(zip(sites, states, strict=True))
        return states

    first, scales = model.model.layers[0].self_attn, {"model.layers.0.self_attn": (0.002, 9.0)}
    rounding = cache_rounded(model, "fp8_e4m3", scales)
    with torch.no_grad(), rounding, watched({"first": first}, {"first": note}, last=True):
        model(**batch, use_cache=True)
    for state in seen.values():
        codes = (state / 0.002).to(torch.float8_e4m3fn).float()
        assert torch.allclose(codes * 0.002, state, rtol=1e-5)


@pytest.fixture(scope="module")
def scaled(int8_llama, tmp_path_factory):
    """Return the small Llama with a static KV cache in FP8 declared, which compressed-tensors rounds as it runs."""
    folder = tmp_path_factory.mktemp("scaled") / "llama"
    shutil.copytree(int8_llama, folder)
    (weights,) = folder.glob("*.safetensors")
    own = {
        f"model.layers.{i}.self_attn.{part}": torch.tensor([0.001]) for i in range(4) for part in ("k_scale", "v_scale")
    }
    save_file(load_file(weights) | own, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded_capture(folder, requests, **model):
    spec = Model.model_validate({"path": str(folder), **model})
    subject = Subject("x", spec, Data(num_samples=2, seq_len=24), Memory(device="cpu"), folder.parent)
    return capture_subject(subject, requests)


def test_the_checkpoints_own_scales_give_the_error_of_numpy_and_the_count_of_what_is_clipped(scaled, monkeypatch):
    states = []
    monkeypatch.setattr(kv_cache._Running, "enter", recording(states, kv_cache._Running.enter))
    # A range of positions as well, of which only the counts are of these tokens.
    within = {"from": 4, "to": 20}
    ranged = METRICS["cache_clipping"].needs("value", "range:4:20", {})
    needs = frozenset({COUNTS, CACHE_SCALE, MOMENTS}) | ranged
    found = loaded_capture(scaled, [Request(ATTENTION, "value", None, needs)], dtype="bfloat16")
    own = found.select(ATTENTION, "value")
    parts = own.cache_clipping(positions=within).values
    errors, clipped = own.quantization_sqnr(scheme="fp8_e4m3", by="checkpoint").values, own.cache_clipping().values
    for layer in range(4):
        x = np.concatenate([value.double().numpy().ravel() for _, value in states[layer::4]])
        codes = torch.from_numpy(np.clip(x / 0.001, -448, 448)).to(torch.float8_e4m3fn).double().numpy()
        assert errors[layer] == pytest.approx(10 * np.log10((x**2).sum() / ((x - codes * 0.001) ** 2).sum()), abs=0.05)
        assert clipped[layer] == np.count_nonzero(np.abs(x) > 0.448)
        some = np.concatenate([value[:, :, 4:20].double().numpy().ravel() for _, value in states[layer::4]])
        assert parts[layer] == np.count_nonzero(np.abs(some) > 0.448)
    assert clipped.sum() > 0


def recording(states, enter):
    def recorded(running, own):
        if running.takes:  # not what compressed-tensors has rounded of it
            states.append(own)
        return enter(running, own)

    return recorded


def test_a_declared_cache_is_emulated_by_neither_side_where_a_grid_is_named(scaled):
    needs = METRICS["kl_divergence"].needs("logits", "all", {}) | METRICS["sqnr"].needs("value", "all", {})
    requests = [Request("", "logits", None, needs), Request(ATTENTION, "value", None, frozenset({ERROR}))]
    coarse, fine = (
        loaded_capture(scaled, requests, kv_cache=g, reference="self") for g in ("fp8_e4m3", "int8_per_token_head")
    )
    # The declared scales clip; a scale for each token and head doesn't, which the emulation on top would hide.
    assert coarse.logits().kl_divergence().values[0] > 10 * fine.logits().kl_divergence().values[0] > 0
    assert coarse.provenance.model.kv_cache == "fp8_e4m3"
    assert coarse.reference.provenance.model.kv_cache is None


def test_a_scale_for_each_head_rounds_each_by_its_own_and_is_no_scale_of_the_layer(scaled, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(scaled, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors, config = load_file(weights), json.loads((folder / "config.json").read_text())
    heads = config["num_key_value_heads"]
    wide = torch.linspace(0.001, 0.5, heads)[:, None, None]
    scales = {name: wide.clone() for name in tensors if name.endswith(("k_scale", "v_scale"))}
    save_file(tensors | scales, weights, metadata={"format": "pt"})
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
    (folder / "config.json").write_text(json.dumps(config))
    divergence = METRICS["kl_divergence"].needs("logits", "all", {})
    keys = Request(ATTENTION, "key", None, frozenset({COUNTS, CACHE_SCALE}))
    requests = [Request("", "logits", None, divergence), keys]
    found = loaded_capture(folder, requests, kv_cache="fp8_e4m3", reference="self")
    assert found.sites["model.layers.0.self_attn", "key"].arrays["cache_scale"].shape == (heads,)
    narrow = loaded_capture(scaled, requests[:1], kv_cache="fp8_e4m3", reference="self")
    # The first head alone is clipped.
    assert 0 < found.logits().kl_divergence().values[0] < narrow.logits().kl_divergence().values[0]
    with pytest.raises(AnomalyError, match=rf"has {heads} scales, one for each head of model.layers.0.self_attn"):
        found.select(ATTENTION, "key").cache_clipping()


def test_scales_are_asked_of_a_model_with_files_alone(small):
    found = capture(small, [models.token_batch(1, 8)], sites=[(ATTENTION, "key")], statistics=["cache_clipping"])
    with pytest.raises(AnomalyError, match="the scales of a KV cache are in a checkpoint's files"):
        found.select(ATTENTION, "key").cache_clipping()

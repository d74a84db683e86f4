"""The sites key and value, latent and rope_key: what attention hands to the KV cache, in any architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.captures import Capture
from pytest_qsa.common.errors import AnomalyError, SuiteError
from support import models, oracle

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
def llama():
    return models.llama()


@pytest.fixture(scope="module")
def padded():
    return models.padded_batch([17, 24, 9])


@pytest.fixture(scope="module")
def found(llama, padded) -> Capture:
    metrics = ["absmax", "rms", "outlier_tokens", "channel_band"]
    rounded = [("quantization_sqnr", {"scheme": s, "by": b}) for s, b in GRIDS]
    grouped = ("quantization_sqnr", {"scheme": "int4", "by": "group", "group_size": 4})
    sites = [(ATTENTION, "key"), (ATTENTION, "value")]
    return capture(llama, [padded], sites=sites, statistics=[*((m, {}) for m in metrics), *rounded, grouped])


GRIDS = [("int8", "token_head"), ("int4", "token_head"), ("fp8_e4m3", "token_head"), ("int4", "channel")]


def rows_of(llama, padded, layer, side):
    """Return the tokens of each sample that are no padding, [T, H, D]."""
    states = cached(llama, padded)[layer][side]
    mask = padded["attention_mask"].numpy().astype(bool)
    return [np.moveaxis(sample, 0, 1)[kept] for sample, kept in zip(states, mask, strict=True)]


@pytest.mark.parametrize(("side", "site"), [(0, "key"), (1, "value")])
def test_the_numbers_are_those_of_the_states_in_the_models_own_cache(llama, padded, found, side, site):
    series = {name: getattr(found.select(ATTENTION, site), name)() for name in ("absmax", "rms", "outlier_tokens")}
    for layer in range(4):
        samples = rows_of(llama, padded, layer, side)
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
def test_a_scale_for_each_token_and_head_block_or_channel_gives_the_error_of_numpy(llama, padded, found, scheme, by):
    size = {"group_size": 4} if by == "group" else {}
    own = found.select(ATTENTION, "key").quantization_sqnr(scheme=scheme, by=by, **size)
    largest = {"int8": 127, "int4": 7, "fp8_e4m3": 448}[scheme]
    for layer in range(4):
        signal = error = 0.0
        for x in rows_of(llama, padded, layer, 0):
            x = x.reshape(*x.shape[:2], -1, 4) if by == "group" else x
            scale = np.abs(x).max(axis=0 if by == "channel" else -1, keepdims=True) / largest
            signal, error = signal + (x**2).sum(), error + ((x - nearest(scheme, x / scale) * scale) ** 2).sum()
        assert own.values[layer] == pytest.approx(10 * np.log10(signal / error), abs=0.02)


def test_the_error_against_a_reference_is_that_of_the_two_caches(llama, padded):
    other = models.llama(seed=0)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    found = capture(other, [padded], sites=[(ATTENTION, "key")], statistics=["sqnr"], reference=llama)
    values = found.select(ATTENTION, "key").sqnr(positions="all").values
    assert values[0] == np.inf
    x, y = (np.concatenate([t.ravel() for t in rows_of(m, padded, 1, 0)]) for m in (llama, other))
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
    found = capture(gemma3n(), [padded["input_ids"][:1]], sites=[(ATTENTION, "value")], statistics=["absmax"])
    assert found.select(ATTENTION, "value").layers == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert [*found.uncached] == [f"model.layers.{i}.self_attn" for i in (2, 3)]
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


def test_a_scale_by_token_and_head_is_of_the_cache_alone(llama):
    statistics = [("quantization_sqnr", {"by": "token_head"})]
    with pytest.raises(SuiteError, match="by: token_head is of the KV cache"):
        capture(llama, [models.token_batch(1, 8)], sites=[(ATTENTION, "output")], statistics=statistics)


def test_watching_the_cache_changes_no_other_number_and_leaves_transformers_as_it_was(llama, padded):
    from transformers.cache_utils import Cache

    update, sites = Cache.update, [("self_attn$|layers", "output"), ("", "logits")]
    plain = capture(llama, [padded], sites=sites)
    both = capture(llama, [padded], sites=[*sites, (ATTENTION, "key"), (ATTENTION, "value")])
    assert Cache.update is update
    for site in plain.sites:
        one, other = plain.sites[site].to_arrays()[0], both.sites[site].to_arrays()[0]
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)

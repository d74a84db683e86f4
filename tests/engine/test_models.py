"""Real architectures: what stands for a token in each, whose padding is whose, and what a net without tokens knows."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.common.errors import AnomalyError
from support import models, oracle

TOKEN_METRICS = [
    ("outlier_tokens", {"threshold": 1.3, "reduce": "sum"}),
    ("outlier_ratio", {"reduce": "mean"}),
    ("magnitude", {"stat": "median", "reduce_dim": -1}),
    ("magnitude", {"stat": "top2", "reduce_dim": -2}),
]
ELEMENT_METRICS = [
    ("magnitude", {"stat": "top1", "reduce_dim": None}),
    ("absmax", {}),
    ("rms", {}),
    ("std", {}),
    ("kurtosis", {}),
    ("crest_factor", {}),
    ("zero_fraction", {}),
    ("quantile", {"q": 1.0}),
    ("headroom", {"dtype": "float16"}),
    ("nonfinite", {}),
]


def check(cap, layer, site, populations, metrics):
    selection = cap.select(rf"^{layer.replace('.', chr(92) + '.')}$", site)
    for name, parameters in metrics:
        got = getattr(selection, name)(**parameters)
        assert got.layers == [layer]
        how = parameters.get("reduce")
        rest = {key: value for key, value in parameters.items() if key != "reduce"}
        np.testing.assert_allclose(
            got.values, [oracle.metric(name, populations, how, **rest)], 1e-5, 1e-9, err_msg=f"{layer} {site} {name}"
        )


@cache
def built(kind):
    return getattr(models, kind)()


# Mixture of experts: rows and tokens on one axis.


@pytest.mark.parametrize("rows", [1, 3])
def test_the_router_of_a_mixture_of_experts_counts_tokens_sample_by_sample(rows):
    model, batches = built("mixtral"), [models.token_batch(rows, 10)]
    layer = "model.layers.0.mlp.gate"
    cap = capture(model, batches, sites=[("gate$", "input"), ("gate$", "output"), ("experts$", "output")])
    for site in ("input", "output"):
        populations = models.record(model, batches, layer, site, tokens=10)
        assert len(populations) == rows
        assert cap.sites[layer, site].token_axis
        check(cap, layer, site, populations, TOKEN_METRICS + ELEMENT_METRICS)
    populations = models.record(model, batches, "model.layers.1.mlp.experts", "output", tokens=10)
    check(cap, "model.layers.1.mlp.experts", "output", populations, TOKEN_METRICS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_where_rows_and_tokens_share_an_axis(side):
    model, batches = built("mixtral"), [models.padded_batch([9, 4, 6], side)]
    layer = "model.layers.0.mlp.gate"
    cap = capture(model, batches, sites=[("gate$", "input")])
    populations = models.record(model, batches, layer, "input", tokens=9, mask="attention_mask")
    assert [len(x) for x in populations] == [9, 4, 6]
    check(cap, layer, "input", populations, TOKEN_METRICS + ELEMENT_METRICS)


def test_a_fused_expert_buffer_is_no_weight_of_a_layer_without_one():
    cap = capture(built("mixtral"), [models.token_batch(1, 4)], sites=[("experts$|gate$", "weight")])
    assert cap.weight("experts$|gate$").absmax().layers == [f"model.layers.{i}.mlp.gate" for i in (0, 1)]


# Encoders.


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_is_measured_like_a_decoder(side):
    model, batches = built("bert"), [models.padded_batch([9, 5], side), models.padded_batch([7, 7], side, seed=5)]
    layer = "encoder.layer.1.output.dense"
    cap = capture(
        model, batches, sites=[(r"layer\.1\.output\.dense$", "input"), (r"layer\.1\.output\.dense$", "output")]
    )
    for site in ("input", "output"):
        populations = models.record(model, batches, layer, site, mask="attention_mask")
        check(cap, layer, site, populations, TOKEN_METRICS + ELEMENT_METRICS)


def test_a_pooler_has_one_vector_a_sample_and_no_tokens():
    model, batches = built("bert"), [models.padded_batch([9, 5])]
    cap = capture(model, batches, sites=[("pooler.dense", "output")])
    check(cap, "pooler.dense", "output", models.record(model, batches, "pooler.dense", "output"), ELEMENT_METRICS)
    with pytest.raises(AnomalyError, match=r"needs a token axis.*output of pooler\.dense \(shape 32\)"):
        cap.output("pooler.dense").outlier_tokens()


def test_each_call_of_a_layer_that_is_called_three_times_is_a_population():
    model, batches = built("albert"), [models.padded_batch([8, 5]), models.padded_batch([6], seed=3)]
    layer = "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    cap = capture(model, batches, sites=[("ffn$", "input"), ("ffn$", "output"), (r"albert_layers\.0$", "output")])
    for name, site in ((layer, "input"), (layer, "output"), (layer.removesuffix(".ffn"), "output")):
        recorded = models.record(model, batches, name, site, mask="attention_mask")  # by call, then by row
        populations = [recorded[index] for index in (0, 2, 4, 1, 3, 5, 6, 7, 8)]
        numbers = cap.sites[name, site]
        assert numbers.sample.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert numbers.call.tolist() == [0, 1, 2] * 3
        check(cap, name, site, populations, TOKEN_METRICS + ELEMENT_METRICS)


def test_a_vision_transformer_has_patches_for_tokens():
    model = built("vit")
    batches = [{"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}]
    cap = capture(model, batches, sites=[(r"layers\.1\.mlp\.fc2$", "input"), ("projection", "output")])
    layer = "layers.1.mlp.fc2"
    check(cap, layer, "input", models.record(model, batches, layer, "input"), TOKEN_METRICS + ELEMENT_METRICS)
    with pytest.raises(AnomalyError, match="needs a token axis"):
        cap.output("projection").outlier_ratio()
    name = "embeddings.patch_embeddings.projection"
    check(cap, name, "output", models.record(model, batches, name, "output"), ELEMENT_METRICS)


# Encoder and decoder: two lengths, two masks.


def t5_batch(encoder, decoder, side="right"):
    one, two = models.padded_batch(encoder, side), models.padded_batch(decoder, "right", seed=7)
    return {
        **one,
        "decoder_input_ids": two["input_ids"],
        "decoder_attention_mask": two["attention_mask"],
    }


T5_LAYERS = [
    ("encoder.block.1.layer.1.DenseReluDense.wo", "input", "attention_mask"),
    ("encoder.block.1", "output", "attention_mask"),
    ("decoder.block.1.layer.2.DenseReluDense.wo", "input", "decoder_attention_mask"),
    ("decoder.block.1", "output", "decoder_attention_mask"),
    ("decoder.block.0.layer.1.EncDecAttention.q", "input", "decoder_attention_mask"),
    ("decoder.block.0.layer.1.EncDecAttention.k", "input", "attention_mask"),
    ("decoder.block.0.layer.1.EncDecAttention.v", "output", "attention_mask"),
    ("lm_head", "input", "decoder_attention_mask"),
]


@pytest.mark.parametrize(
    "lengths", [([9, 6], [5, 7]), ([9, 6], [6, 9]), ([8, 8], [8, 3])], ids=["shorter", "as long", "no padding"]
)
@pytest.mark.parametrize(("layer", "site", "mask"), T5_LAYERS, ids=[layer for layer, *_ in T5_LAYERS])
def test_an_encoder_and_a_decoder_have_their_own_tokens_and_padding(layer, site, mask, lengths):
    model, batches = built("t5"), [t5_batch(*lengths)]
    cap = capture(model, batches, sites=[(rf"^{layer}$", site)])
    populations = models.record(model, batches, layer, site, mask=mask)
    check(cap, layer, site, populations, TOKEN_METRICS + ELEMENT_METRICS)


def test_a_decoder_without_a_mask_has_no_padding():
    model, batch = built("t5"), t5_batch([9, 6], [9, 9])
    del batch["decoder_attention_mask"]
    cap = capture(model, [batch], sites=[(r"decoder\.block\.1$", "output")])
    populations = models.record(model, [batch], "decoder.block.1", "output")
    check(cap, "decoder.block.1", "output", populations, TOKEN_METRICS + ELEMENT_METRICS)


# Nets without tokens.


@pytest.mark.parametrize("site", ["input", "output"])
@pytest.mark.parametrize("layer", ["first", "act", "second"])
def test_a_perceptron_is_measured_by_its_elements(layer, site):
    model, batches = models.Mlp(), [torch.randn(5, 8), torch.randn(2, 8)]
    cap = capture(model, batches, sites=[(layer, site)])
    assert cap.sites[layer, site].sample.tolist() == list(range(7))
    check(cap, layer, site, models.record(model, batches, layer, site), ELEMENT_METRICS)


@pytest.mark.parametrize("site", ["input", "output"])
@pytest.mark.parametrize("layer", ["conv", "norm", "act", "head"])
def test_a_convolutional_net_is_measured_by_its_elements(layer, site):
    model, batches = models.ConvNet().eval(), [torch.randn(4, 3, 8, 8)]
    cap = capture(model, batches, sites=[(layer, site)])
    check(cap, layer, site, models.record(model, batches, layer, site), ELEMENT_METRICS)


@pytest.mark.parametrize("ask", [
    lambda s: s.outlier_tokens(),
    lambda s: s.outlier_ratio(),
    lambda s: s.sink_tokens(),
    lambda s: s.magnitude("median"),
    lambda s: s.magnitude("top1", reduce_dim=-2),
    lambda s: s.absmax(positions={"skip_first": 1}),
], ids=["outlier_tokens", "outlier_ratio", "sink_tokens", "tokens", "channels", "positions"])  # fmt: skip
@pytest.mark.parametrize(("net", "batch", "layer", "shape"), [
    (models.Mlp, (5, 8), "first", "16"), (models.ConvNet, (4, 3, 8, 8), "conv", r"6×8×8|384"),
])  # fmt: skip
def test_a_question_about_tokens_to_a_net_without_them_says_what_works(ask, net, batch, layer, shape):
    cap = capture(net(), [torch.randn(*batch)], sites=[(layer, "output")])
    with pytest.raises(AnomalyError, match=rf"needs a token axis.*output of {layer} \(shape ({shape})\).*elementwise"):
        ask(cap.output(layer))


def test_the_weight_of_a_convolution_is_seen_as_outputs_by_the_rest():
    model = models.ConvNet()
    cap = capture(model, [torch.randn(1, 3, 8, 8)], sites=[("conv|norm", "weight")])
    flat = [model.conv.weight.detach().double().numpy().reshape(6, -1)]
    for dim in (-1, -2, None):
        check(cap, "conv", "weight", flat, [("magnitude", {"stat": "top1", "reduce_dim": dim})])
    check(cap, "norm", "weight", [model.norm.weight.detach().double().numpy()], [("absmax", {}), ("rms", {})])
    with pytest.raises(AnomalyError, match="weight of norm"):
        cap.weight("norm").magnitude("top1")


# Batching a real model: the arithmetic may differ in its last bits, the definitions may not.


@pytest.mark.parametrize("kind", ["llama", "mixtral", "bert", "albert"])
def test_batches_of_another_size_give_the_same_numbers(kind):
    model = built(kind)
    whole = models.padded_batch([9, 5, 7, 9], "right")
    pattern = {"llama": "down_proj$", "mixtral": "gate$", "bert": r"output\.dense$", "albert": "ffn$"}[kind]
    caps = [
        capture(
            model,
            [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, 4, size)],
            sites=[(pattern, "input")],
        )
        for size in (1, 2, 4)
    ]
    for name, parameters in TOKEN_METRICS + ELEMENT_METRICS:
        one, *others = (getattr(cap.input(pattern), name)(**parameters).values for cap in caps)
        for other in others:
            np.testing.assert_allclose(other, one, 2e-4, 1e-6, err_msg=name)


def test_every_layer_of_a_model_can_be_asked_for_at_once():
    cap = capture(built("llama"), [models.token_batch(2, 6)], sites=[(".", "output"), (".", "input")])
    assert ("lm_head", "output") in cap.sites
    assert cap.output(r"layers\.\d+$").absmax().layers == [f"model.layers.{i}" for i in range(4)]

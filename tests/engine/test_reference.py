"""A model against its reference: every number from raw activations of two forwards, in float64."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pytest_qsa import Capture, capture
from pytest_qsa.captures.provenance import UNKNOWN_MODEL
from pytest_qsa.captures.sinks import Sink, Sinks
from pytest_qsa.common.errors import AnomalyError, InfraError, SuiteError
from pytest_qsa.engine.reduce.pairs import powers_of, scores_of
from pytest_qsa.metrics.series import Bounds
from pytest_qsa.report.plots.figures import value_figure
from pytest_qsa.verdicts.baseline_file import BaselineFile, Tolerance
from pytest_qsa.verdicts.baselines import within_baseline
from pytest_qsa.verdicts.judge import Identity, concluded
from pytest_qsa.verdicts.tokens import token_evidence
from support import models
from support.judged import explained, judge_bounds
from support.models import BLOCKS, LINEAR, damaged

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCHES = [models.token_batch(2, 24), models.token_batch(1, 24, seed=5)]
ALL = [(BLOCKS, "output"), (LINEAR, "input"), (LINEAR, "output"), (LINEAR, "weight"), ("", "logits")]


def raw(model, batches=BATCHES):
    """Return site → the tensors [tokens, C] of each sample, by plain hooks, in float64; and the logits."""
    found, handles = {}, []

    def keep(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            for site, tensor in (("input", args[0] if args else None), ("output", output)):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    rows = [row.double().numpy() for row in tensor]
                    found.setdefault((name, site), []).extend(rows)

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(keep(name)))
    with torch.no_grad():
        logits = [row for batch in batches for row in model(batch).logits.double()]
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.fixture(scope="module")
def pair():
    model = models.llama(num_hidden_layers=3)
    other = damaged(model)
    return capture(other, BATCHES, sites=ALL, reference=model), raw(model), raw(other)


def decibels(x, y):
    return 10 * np.log10(np.sum(x**2) / np.sum((x - y) ** 2))


FORMULAS = {
    "sqnr": decibels,
    "nmse": lambda x, y: np.sum((x - y) ** 2) / np.sum(x**2),
    "relative_l2": lambda x, y: np.linalg.norm(x - y) / np.linalg.norm(x),
    "cosine": lambda x, y: np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y),
    "max_abs_diff": lambda x, y: np.abs(x - y).max(),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("pattern", "site"), [(BLOCKS, "output"), (LINEAR, "input"), (LINEAR, "output")])
def test_a_layer_is_compared_as_its_formula_says(pair, name, pattern, site):
    cap, (reference, _), (own, _) = pair
    series = getattr(cap.select(pattern, site), name)(positions="all")
    assert len(series.layers) == {BLOCKS: 3, LINEAR: 21}[pattern]
    for layer, value in zip(series.layers, series.values, strict=True):
        x, y = (np.concatenate(side[layer, site]) for side in (reference, own))
        if not np.array_equal(x, y):
            np.testing.assert_allclose(value, FORMULAS[name](x, y), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_other_tools_and_float64_say_the_same(dtype):
    """torch.ao.ns' functions; Polygraphy's distance metric, written out here; KL as torch.nn.functional defines it."""
    from torch.ao.ns.fx.utils import compute_cosine_similarity, compute_sqnr

    model = models.llama(dtype, num_hidden_layers=3)
    other = damaged(model)
    cap = capture(other, BATCHES, sites=[(BLOCKS, "output"), (LINEAR, "output"), ("", "logits")], reference=model)
    (reference, logits), (own, own_logits) = raw(model), raw(other)
    for layer in cap.output(f"{BLOCKS}|{LINEAR}").sqnr(positions="all").layers:
        x, y = (np.concatenate(side[layer, "output"]).ravel() for side in (reference, own))
        if np.array_equal(x, y):
            continue
        a, b = torch.from_numpy(x).float(), torch.from_numpy(y).float()
        selected = cap.output(f"^{layer}$")
        polygraphy = np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y))
        for found, others in (
            (selected.sqnr(positions="all"), [compute_sqnr(a, b), decibels(x, y)]),
            (selected.cosine(positions="all"), [compute_cosine_similarity(a, b), polygraphy]),
        ):
            for value in others:
                np.testing.assert_allclose(found.values, [float(value)], rtol=1e-5, err_msg=layer)
    p, q = (torch.cat(side).log_softmax(1) for side in (logits, own_logits))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    np.testing.assert_allclose(cap.logits().kl_divergence().values, [float(kl)], rtol=1e-5)


def test_identical_tensors_have_infinite_sqnr_and_pass_any_minimum():
    model = models.llama()
    cap = capture(copy.deepcopy(model), BATCHES, sites=[(BLOCKS, "output")], reference=model)
    series = cap.output(BLOCKS).sqnr(positions="all")
    assert np.isposinf(series.values).all()
    assert series >= 300


@pytest.mark.parametrize(("direction", "kinds"), [("both", "PR"), ("down", "PR"), ("up", "PP")])
def test_a_baseline_at_infinity_is_valid_json_and_nothing_finite_is_near_it(direction, kinds):
    model = models.llama()
    alike, other = (
        capture(each, BATCHES, sites=[(BLOCKS, "output")], reference=model).output(BLOCKS).sqnr(positions="all")
        for each in (copy.deepcopy(model), damaged(model))
    )
    text = BaselineFile.of(alike, "tokens").dump()
    json.loads(text, parse_constant=pytest.fail)
    baseline = BaselineFile.parse(text)
    assert list(baseline.values.values()) == [np.inf] * len(alike.layers)
    tolerance = Tolerance(rel=0.5, abs=10, direction=direction)
    judgements = [within_baseline(series, baseline, tolerance, "tokens", UNKNOWN_MODEL) for series in (alike, other)]
    verdicts = [concluded(judgement, Identity()) for judgement in judgements]
    assert "".join(str(verdict.kind)[0] for verdict in verdicts) == kinds
    assert verdicts[0].rows[0].used == 0
    assert "nan" not in verdicts[1].headline
    for verdict in verdicts:
        value_figure(verdict, Capture({})).canvas.draw()


def test_the_worst_token_and_channel_are_those_of_the_tensor(pair):
    cap, (reference, _), (own, _) = pair
    layer = "model.layers.1"
    x, y = (np.concatenate(side[layer, "output"]) for side in (reference, own))
    tokens = cap.output(f"{layer}$").sqnr("token", positions="all").values
    np.testing.assert_allclose(tokens, min(decibels(a, b) for a, b in zip(x, y, strict=True)), rtol=1e-5)
    model = models.llama(num_hidden_layers=3)
    other = damaged(model)
    cap = capture(other, BATCHES, sites=[(BLOCKS, "output")], statistics=[("sqnr", {"by": "channel"})], reference=model)
    channels = cap.output(f"{layer}$").sqnr("channel", positions="all").values
    np.testing.assert_allclose(channels, min(decibels(a, b) for a, b in zip(x.T, y.T, strict=True)), rtol=1e-5)


def test_weights_are_compared_without_a_forward(pair):
    model = models.llama(num_hidden_layers=3)
    other = damaged(model)
    other.forward = None
    cap = capture(other, BATCHES, sites=[(LINEAR, "weight")], statistics=["weight_sqnr"], reference=model)
    for name, by in (("tensor", decibels), ("channel", lambda a, b: min(map(decibels, a, b)))):
        series = cap.weight(LINEAR).weight_sqnr(name)
        for layer, value in zip(series.layers, series.values, strict=True):
            x, y = (side.get_submodule(layer).weight.detach().double().numpy() for side in (model, other))
            np.testing.assert_allclose(value, by(x, y), rtol=1e-5)


def test_local_error_is_that_of_the_layer_on_the_references_input(pair):
    _, (reference, _), _ = pair
    model = models.llama(num_hidden_layers=3)
    other = damaged(model)
    cap = capture(
        other, BATCHES, sites=[(LINEAR, "output")], statistics=[("local_sqnr", {"rows": 24})], reference=model
    )
    series = cap.output(LINEAR).local_sqnr(24, positions="all")
    for layer, value in zip(series.layers, series.values, strict=True):
        inputs, outputs = (np.concatenate(reference[layer, site]) for site in ("input", "output"))
        own = inputs @ other.get_submodule(layer).weight.detach().double().numpy().T
        np.testing.assert_allclose(value, decibels(outputs, own), rtol=1e-4)
        low, high, count = series.intervals[layer]
        assert low < value < high
        assert count == 72
    few = (
        capture(other, BATCHES, sites=[(LINEAR, "output")], statistics=[("local_sqnr", {"rows": 8})], reference=model)
        .output(LINEAR)
        .local_sqnr(8, positions="all")
    )
    inside = [few.intervals[layer][0] <= value <= few.intervals[layer][1] for layer, value in
              zip(series.layers, series.values, strict=True)]  # fmt: skip
    assert sum(inside) >= 17  # 95 of 100 intervals hold the number of all tokens


def test_local_errors_of_several_numbers_of_rows_are_kept_apart(pair):
    layer, model = "model.layers.1.mlp.down_proj", models.llama(num_hidden_layers=3)
    other = damaged(model)

    def captured(*rows):
        asked = [("local_sqnr", {"rows": count}) for count in rows]
        return capture(other, BATCHES, sites=[(layer, "output")], statistics=asked, reference=model)

    both = captured(8, 24, 16)
    for rows in (8, 16, 24):
        alone = captured(rows).output(layer).local_sqnr(rows, positions="all")
        found = both.output(layer).local_sqnr(rows, positions="all")
        np.testing.assert_array_equal(found.values, alone.values)
        assert found.intervals == alone.intervals
        shown = [(token.sample, token.position) for token in evidence(both, layer, found)]
        assert shown == [(token.sample, token.position) for token in evidence(captured(rows), layer, alone)]
    saved = Capture.from_bytes(both.to_bytes()).output(layer)
    np.testing.assert_array_equal(saved.local_sqnr(8).values, both.output(layer).local_sqnr(8).values)


def test_a_layer_that_mixes_tokens_has_no_local_error():
    model = models.llama()
    with pytest.raises(AnomalyError, match=r"layers\.0\.self_attn needs more than that"):
        capture(damaged(model), BATCHES, sites=[("self_attn$", "output")], statistics=["local_sqnr"], reference=model)


def test_predictions_are_compared_over_the_whole_vocabulary(pair):
    cap, (_, reference), (_, own) = pair
    p, q = (torch.cat(side).log_softmax(-1).numpy() for side in (reference, own))
    kl = np.sum(np.exp(p) * (p - q), axis=1)
    for stat, expected in (("mean", kl.mean()), ("median", np.median(kl)), ("max", kl.max()),
                           ("p99", np.percentile(kl, 99))):  # fmt: skip
        np.testing.assert_allclose(cap.logits().kl_divergence(stat).values, [expected], rtol=1e-6)
    np.testing.assert_allclose(cap.logits().same_top().values, [np.mean(p.argmax(1) == q.argmax(1))])
    same = (p.argmax(1) == q.argmax(1)).astype(float)
    low, high, count = cap.logits().same_top().intervals["logits"]
    np.testing.assert_allclose(
        [low, high], same.mean() + np.array([-1.96, 1.96]) * same.std(ddof=1) / count**0.5, rtol=1e-4
    )
    tokens = [row for batch in BATCHES for row in batch.tolist()]
    came = [(s * 24 + t, ids[t + 1]) for s, ids in enumerate(tokens) for t in range(23)]
    nll_p, nll_q = (np.array([-side[at] for at in came]) for side in (p, q))
    np.testing.assert_allclose(cap.logits().perplexity().values, [np.exp(nll_q.mean())], rtol=1e-9)
    np.testing.assert_allclose(cap.logits().ln_ppl_ratio().values, [np.mean(nll_q - nll_p)], rtol=1e-6)
    low, high, count = cap.logits().ln_ppl_ratio().intervals["logits"]
    error = np.std(nll_q - nll_p, ddof=1) / np.sqrt(count)
    np.testing.assert_allclose([low, high], np.mean(nll_q - nll_p) + np.array([-1.96, 1.96]) * error, rtol=1e-4)
    difference = np.exp(-nll_q) - np.exp(-nll_p)
    np.testing.assert_allclose(cap.logits().delta_p().values, [np.sqrt(np.mean(difference**2))], rtol=1e-6)
    np.testing.assert_allclose(cap.logits().delta_p("p95").values, [np.percentile(difference, 95)], rtol=1e-6)


def test_perplexity_needs_no_reference():
    model = models.llama()
    cap = capture(model, BATCHES, sites=[("", "logits")])
    with torch.no_grad():
        loss = [float(model(row[None], labels=row[None]).loss) for batch in BATCHES for row in batch]
    np.testing.assert_allclose(cap.logits().perplexity().values, [np.exp(np.mean(loss))], rtol=1e-5)


def test_padding_counts_nowhere():
    model = models.llama(num_hidden_layers=2)
    other = damaged(model)
    ids = models.token_batch(2, 24)
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    padded = capture(other, [{"input_ids": ids, "attention_mask": mask}], sites=ALL, reference=model)
    plain = capture(other, [ids[:1], ids[1:, :16]], sites=ALL, reference=model)
    for series in (lambda c: c.output(BLOCKS).sqnr(positions="all"), lambda c: c.logits().kl_divergence(),
                   lambda c: c.logits().ln_ppl_ratio(), lambda c: c.logits().same_top()):  # fmt: skip
        np.testing.assert_allclose(series(padded).values, series(plain).values, rtol=1e-4)


def test_new_and_lost_outliers_are_told_apart():
    model = models.llama(num_hidden_layers=2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight[7] *= 300
    batch = torch.arange(2, 26)[None]
    sites = [(BLOCKS, "output")]
    cap = capture(other, [batch], sites=sites, reference=model)
    back = capture(model, [batch], sites=sites, reference=other)
    assert cap.output(BLOCKS).new_outliers(10, positions="all").values[0] == 1
    assert cap.output(BLOCKS).lost_outliers(10, positions="all").values[0] == 0
    assert back.output(BLOCKS).lost_outliers(10, positions="all").values[0] == 1


def test_what_the_reference_has_stands_beside_the_models_numbers_where_the_pass_kept_it():
    model = models.llama(num_hidden_layers=2)
    other = damaged(model)
    sites = [(BLOCKS, "output")]
    cap = capture(other, BATCHES, sites=sites, reference=model)
    alone = capture(model, BATCHES, sites=sites).output(BLOCKS)
    own = cap.output(BLOCKS)
    verdict = explained(judge_bounds(own.magnitude("top1"), Bounds(max=1e9)), cap)
    assert {row.layer: row.reference for row in verdict.rows} == dict(
        zip(alone.layers, alone.magnitude("top1").values.tolist(), strict=True)
    )
    assert any(row.reference != row.value for row in verdict.rows)
    for series in (own.sqnr(), own.kurtosis()):  # a distance; and what the pass did not keep of the reference
        rows = explained(judge_bounds(series, Bounds(max=1e9)), cap).rows
        assert [row.reference for row in rows] == [None] * 2


def test_outliers_may_be_all_that_is_asked_for():
    model = models.llama(num_hidden_layers=2)
    cap = capture(damaged(model), BATCHES, sites=[(BLOCKS, "output")], statistics=["new_outliers"], reference=model)
    assert cap.output(BLOCKS).new_outliers(1.1, positions="all").values.sum() > 0


def test_sinks_of_the_reference_are_left_out_by_default():
    model = models.llama(num_hidden_layers=3, sink=True)
    other = damaged(model)
    batch = models.token_batch(1, 33, bos=True)
    cap = capture(other, [batch], sites=[(BLOCKS, "output")], reference=model)
    assert {sink.position for sink in cap.reference.sinks.found} == {0}
    (reference, _), (own, _) = raw(model, [batch]), raw(other, [batch])
    x, y = (side["model.layers.1", "output"][0] for side in (reference, own))
    chosen = cap.output(r"layers\.1$")
    np.testing.assert_allclose(chosen.sqnr().values, decibels(x[1:], y[1:]), rtol=1e-4)
    np.testing.assert_allclose(chosen.sqnr(positions="sink").values, decibels(x[:1], y[:1]), rtol=1e-4)
    np.testing.assert_allclose(chosen.sqnr(positions={"skip_first": 5}).values, decibels(x[5:], y[5:]), rtol=1e-4)
    by_channel = capture(
        other, [batch], sites=[(BLOCKS, "output")], statistics=[("sqnr", {"by": "channel"})], reference=model
    )
    worst = min(decibels(a, b) for a, b in zip(x[1:].T, y[1:].T, strict=True))
    np.testing.assert_allclose(by_channel.output(r"layers\.1$").sqnr("channel").values, worst, rtol=1e-4)


def test_a_capture_keeps_the_comparison(pair, tmp_path):
    cap, *_ = pair
    cap.save(tmp_path / "a.qsa")
    again = Capture.load(tmp_path / "a.qsa")
    same = again.to_bytes() == cap.to_bytes()
    assert same
    np.testing.assert_array_equal(again.output(BLOCKS).sqnr().values, cap.output(BLOCKS).sqnr().values)


def test_batches_change_no_number():
    model = models.llama(num_hidden_layers=2)
    other = damaged(model)
    rows = [row[None] for batch in BATCHES for row in batch]
    whole = capture(other, BATCHES, sites=ALL, reference=model)
    single = capture(other, rows, sites=ALL, reference=model)
    np.testing.assert_allclose(whole.output(LINEAR).sqnr().values, single.output(LINEAR).sqnr().values, rtol=1e-5)
    np.testing.assert_allclose(whole.logits().kl_divergence().values, single.logits().kl_divergence().values, rtol=1e-3)


def test_a_reference_of_another_shape_is_told():
    with pytest.raises(InfraError, match="is 24×32 here and 24×16 in the reference"):
        capture(models.llama(), BATCHES, sites=[(BLOCKS, "output")], reference=models.llama(hidden_size=16))
    with pytest.raises(AnomalyError, match="the reference has no layer"):
        capture(
            models.llama(num_hidden_layers=3),
            BATCHES,
            sites=[(BLOCKS, "output")],
            reference=models.llama(num_hidden_layers=2),
        )


def test_metrics_against_a_reference_need_one():
    with pytest.raises(SuiteError, match="give reference="):
        capture(models.llama(), BATCHES, sites=[(BLOCKS, "output")], statistics=["sqnr"])


def test_a_model_without_logits_predicts_nothing():
    model = models.llama().model
    with pytest.raises(AnomalyError, match="returns no logits"):
        capture(model, BATCHES, sites=[("", "logits")])


# The kernels, against torch's operators in float64.

ROWS = st.integers(0, 2**31 - 1)


@settings(max_examples=25, deadline=None)
@given(seed=ROWS, shape=st.tuples(st.integers(1, 7), st.integers(1, 70)), dtype=st.sampled_from(DTYPES))
def test_the_kernel_of_powers_agrees_with_the_operators(seed, shape, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    y = (x.float() + torch.randn(shape, generator=generator) * 0.1).to(dtype)
    torch.testing.assert_close(powers_of(x, y, None), powers_of(x, y, None, fused=False), rtol=2e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(seed=ROWS, shape=st.tuples(st.integers(1, 5), st.integers(1, 1200)), dtype=st.sampled_from(DTYPES))
def test_the_kernel_of_scores_agrees_with_the_operators(seed, shape, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 5).to(dtype)
    y = (x.float() + torch.randn(shape, generator=generator) * 0.1).to(dtype)
    following = torch.randint(-1, shape[1], shape[:1], generator=generator)
    for reference in (x, None):
        fused, plain = (scores_of(y, reference, following, fused=how) for how in (True, False))
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(poison):
    x, y = torch.randn(3, 40), torch.randn(3, 40)
    y[1, 7] = poison
    for fused in (True, False):
        assert (~powers_of(x, y, None, fused=fused)[:, 1].isfinite()).tolist() == [False, True, False]
        scores = scores_of(y, x, torch.tensor([0, 1, 2]), fused=fused)
        assert (~scores[:, 2].isfinite()).tolist() == [False, True, False]


SIZES = {
    "sqnr": ("‖x − x̂‖", lambda x, y: np.linalg.norm(x - y, axis=1)),
    "cosine": ("‖x − x̂‖", lambda x, y: np.linalg.norm(x - y, axis=1)),
    "sqnr by token": ("‖x − x̂‖ / ‖x‖", lambda x, y: np.linalg.norm(x - y, axis=1) / np.linalg.norm(x, axis=1)),
    "max_abs_diff": ("max |x − x̂|", lambda x, y: np.abs(x - y).max(axis=1)),
}


def evidence(cap, layer, series):
    """Return what a verdict on some numbers shows of the tokens at a layer."""
    return token_evidence(cap, [layer], judge_bounds(series, Bounds(min=1e9)))


@pytest.mark.parametrize("name", SIZES)
def test_a_failure_shows_the_tokens_with_the_largest_error(pair, name):
    cap, (reference, _), (own, _) = pair
    layer, (metric, _, by) = "model.layers.1.mlp.down_proj", name.partition(" by ")
    parameters = {"by": by} if by else {}
    shown = evidence(cap, layer, cap.output(f"^{layer}$").series(metric, None, "all", **parameters))
    of, size_of = SIZES[name]
    sides = list(zip(reference[layer, "output"], own[layer, "output"], strict=True))
    sizes = {(sample, at): size for sample, (x, y) in enumerate(sides) for at, size in enumerate(size_of(x, y))}
    whole = sum(np.sum((x - y) ** 2) for x, y in sides)
    largest = sorted(sizes, key=lambda place: -sizes[place])[:5]
    assert [(token.sample, token.position) for token in shown] == largest
    for token in shown:
        x, y = (side[token.position] for side in sides[token.sample])
        size, middle = sizes[token.sample, token.position], sorted(sizes.values())[(len(sizes) - 1) // 2]
        assert (token.of, token.channel) == (of, -1)
        np.testing.assert_allclose(
            [token.magnitude, token.ratio, token.share], [size, size / middle, np.sum((x - y) ** 2) / whole], rtol=1e-4
        )


def test_a_failure_of_a_layers_own_error_shows_the_drawn_tokens_that_have_most_of_it(pair):
    _, (reference, _), _ = pair
    layer, model = "model.layers.1.mlp.down_proj", models.llama(num_hidden_layers=3)
    other = damaged(model)
    asked = [("local_sqnr", {"rows": 8})]
    cap = capture(other, BATCHES, sites=[(layer, "output")], statistics=asked, reference=model)
    shown = evidence(cap, layer, cap.output(layer).local_sqnr(8, positions="all"))
    weight = other.get_submodule(layer).weight.detach().double().numpy()
    errors = [
        np.linalg.norm(inputs @ weight.T - outputs, axis=1)
        for inputs, outputs in zip(reference[layer, "input"], reference[layer, "output"], strict=True)
    ]
    drawn = cap.sites[layer, "output"].local_rows
    places = [(sample, at) for sample, rows in enumerate(drawn.tolist()) for at in rows if at >= 0]
    largest = sorted(places, key=lambda place: -errors[place[0]][place[1]])[:5]
    assert [(token.sample, token.position) for token in shown] == largest


def test_outliers_are_still_shown_by_what_makes_them_one(pair):
    cap = pair[0]
    shown = evidence(cap, "model.layers.1", cap.output(BLOCKS).new_outliers(positions="all"))
    assert {(token.of, token.share) for token in shown} == {("|x|", None)}
    maxima = cap.sites["model.layers.1", "output"].tokens_of(shown[0].sample)
    assert shown[0].magnitude == maxima[shown[0].position]


def test_sinks_of_the_reference_are_no_evidence_where_they_do_not_count(pair):
    cap = pair[0]
    worst = evidence(cap, "model.layers.1", cap.output(BLOCKS).sqnr(positions="all"))[0]
    sink = Sink("model.layers", worst.sample, worst.position, 0, (), 99.0)
    reference = dataclasses.replace(cap.reference)
    vars(reference)["sinks"] = Sinks((sink,), searched=True, trunks=("model.layers",))
    cap = dataclasses.replace(cap, reference=reference)
    places = {
        positions: (shown[0].sample, shown[0].position, shown[0].sink)
        for positions in ("all", "no_sink")
        if (shown := evidence(cap, "model.layers.1", cap.output(BLOCKS).sqnr(positions=positions)))
    }
    assert places["all"] == (worst.sample, worst.position, True)
    assert places["no_sink"][:2] != (worst.sample, worst.position)
    assert not places["no_sink"][2]

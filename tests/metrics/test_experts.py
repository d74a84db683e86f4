"""Tokens routed to each expert, against the indices that plain hooks on the routers see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_qsa import Capture, capture
from pytest_qsa.captures.merging import merge
from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.metrics.series import Bounds
from support import models
from support.judged import judge_bounds

EXPERTS = r"mlp\.experts$"
BATCHES = [models.token_batch(2, 9), models.padded_batch([7, 4]), models.padded_batch([5, 6], "left")]


def routed(model, batches, layer, experts=4):
    """Return [samples, experts] from the third output of the router, [B · T, k], without padding."""
    seen = []
    gate = model.get_submodule(layer.replace("experts", "gate"))
    handle = gate.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    rows = []
    for batch in batches:
        ids, mask = (batch["input_ids"], batch["attention_mask"]) if isinstance(batch, dict) else (batch, None)
        with torch.no_grad():
            model(ids, attention_mask=mask)
        for index, choice in enumerate(seen.pop().reshape(len(ids), ids.shape[1], -1).numpy()):
            kept = choice if mask is None else choice[mask[index].numpy().astype(bool)]
            rows.append(np.bincount(kept.ravel(), minlength=experts))
    handle.remove()
    return np.array(rows)


def tokens_of(model, batches=BATCHES, sites=EXPERTS, statistics=("expert_tokens",)):
    return capture(model, batches, sites=[(sites, "input")], statistics=list(statistics)).input(EXPERTS)


@pytest.mark.parametrize("reduce", ["sum", "max", "mean"])
def test_every_expert_has_the_tokens_that_its_router_sent(reduce):
    model = models.mixtral()
    series = tokens_of(model).expert_tokens(reduce=reduce)
    want = [
        getattr(np, reduce)(routed(model, BATCHES, f"model.layers.{index}.mlp.experts"), axis=0) for index in (0, 1)
    ]
    np.testing.assert_array_equal(series.values, np.concatenate(want))
    assert series.layers[5] == "model.layers.1.mlp.experts[1]"


@pytest.mark.parametrize("statistics", ["all", ["expert_tokens", "rms"]], ids=str)
def test_the_router_that_reads_the_same_tokens_does_not_take_them_from_the_experts(statistics):
    model = models.mixtral()
    sites = [(r"mlp(\.gate|\.experts)?$", "input")]
    chosen = capture(model, BATCHES, sites=sites, statistics=statistics).input(EXPERTS)
    np.testing.assert_array_equal(chosen.expert_tokens().values, tokens_of(model).expert_tokens().values)
    record = models.record(model, BATCHES[:1], "model.layers.0.mlp.experts", "input", tokens=9)
    first = capture(model, BATCHES[:1], sites=sites, statistics=statistics).input(EXPERTS)
    np.testing.assert_allclose(first.rms().values[0], np.sqrt(np.mean(np.square(record))), rtol=1e-5)


def test_an_expert_without_tokens_is_named():
    model = models.mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[2] = 0
            layer.mlp.gate.weight[0] = -10 * layer.mlp.gate.weight[3]
    unused = np.flatnonzero(routed(model, BATCHES, "model.layers.1.mlp.experts").sum(axis=0) == 0)
    ids = BATCHES if unused.size else [models.token_batch(1, 2)]
    series = tokens_of(model, ids).expert_tokens()
    verdict = judge_bounds(series, Bounds(min=1))
    dead = [name for name, value in zip(series.layers, series.values, strict=True) if value == 0]
    assert dead
    assert {row.layer for row in verdict.failing_rows} == set(dead)
    assert dead[0] in verdict.headline
    many = "is" if len(dead) == 1 else "are"
    assert f"; {len(dead)} of {len(series.layers)} experts {many} out of bounds" in verdict.headline
    assert verdict.query["of"] == "experts"


def test_captures_of_disjoint_samples_add_their_tokens():
    model = models.mixtral()
    parts = [tokens_of(model, [batch]).capture for batch in BATCHES]
    merged = merge(parts)
    assert merged.to_bytes() == tokens_of(model).capture.to_bytes()


def test_the_counts_survive_the_file(tmp_path):
    chosen = tokens_of(models.mixtral())
    chosen.capture.save(tmp_path / "a.qsa")
    again = Capture.load(tmp_path / "a.qsa").input(EXPERTS).expert_tokens()
    np.testing.assert_array_equal(again.values, chosen.expert_tokens().values)


def test_a_layer_without_experts_is_an_error_that_says_where_they_are():
    cap = capture(models.llama(), [models.token_batch(1, 4)], sites=[("mlp$", "input")], statistics=["expert_tokens"])
    with pytest.raises(AnomalyError, match=r"the input of model\.layers\.0\.mlp has no experts.*mlp\\.experts\$"):
        cap.input("mlp$").expert_tokens()

"""A range of positions: every metric of it is that of a text which has these tokens alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.captures import Capture, merge
from pytest_qsa.common.errors import AnomalyError, SuiteError
from pytest_qsa.metrics import METRICS, canonical_positions
from support import models, oracle

FROM, TO = 3, 8
RANGE = {"from": FROM, "to": TO}
LAYERS = r"layers\.\d$"
OF_ONE = {
    "outlier_tokens": {"threshold": 1.2}, "outlier_ratio": {}, "magnitude": {}, "absmax": {}, "rms": {}, "mean": {},
    "std": {}, "kurtosis": {}, "crest_factor": {}, "zero_fraction": {}, "nonfinite": {}, "headroom": {},
    "quantile": {"q": 0.9}, "quantization_sqnr": {}, "channel_band": {"stat": "p99"},
    "massive_activations": {"abs": 1.0, "ratio": 1.5}, "int8_outlier_features": {"abs": 1.5, "position_share": 0.2},
}  # fmt: skip
MORE = [
    ("magnitude", {"reduce_dim": -2, "stat": "median"}), ("magnitude", {"reduce_dim": None, "stat": "median"}),
    ("quantile", {"signed": True}), ("quantization_sqnr", {"by": "token"}), ("quantization_sqnr", {"by": "channel"}),
]  # fmt: skip
AGAINST = [
    ("sqnr", {}), ("sqnr", {"by": "token"}), ("sqnr", {"by": "channel"}), ("nmse", {}), ("relative_l2", {}),
    ("cosine", {}), ("max_abs_diff", {}), ("new_outliers", {"threshold": 1.3}), ("lost_outliers", {"threshold": 1.3}),
]  # fmt: skip


def script(dtype, *, seed=0, length=12):
    rng = np.random.default_rng(seed)
    return [torch.as_tensor(rng.normal(0, 1, (2, length, 6)).astype(np.float32)).to(dtype) for _ in range(3)]


def captured(values, asked, mask=None, other=None):
    model = models.Scripted(*values)
    ids = models.numbered(model)
    batch = ids if mask is None else {"input_ids": ids, "attention_mask": torch.as_tensor(mask)}
    reference = None if other is None else models.Scripted(*other)
    return capture(model, [batch], sites=[(LAYERS, "output")], statistics=[asked], reference=reference)


def numbers(values, name, parameters, positions, **more):
    asked = (name, {**parameters, "positions": positions})
    return getattr(captured(values, asked, **more).output(LAYERS), name)(**parameters, positions=positions).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "parameters"), [*OF_ONE.items(), *MORE], ids=str)
def test_a_metric_of_a_range_is_that_of_its_tokens(name, parameters, dtype):
    values = script(dtype)
    found = numbers(values, name, parameters, RANGE)
    alone = numbers([x[:, FROM:TO].clone() for x in values], name, parameters, "all")
    np.testing.assert_allclose(found, alone, rtol=1e-6)
    whole = numbers(values, name, parameters, "all")
    assert METRICS[name].unit in ("tokens", "elements", "channels") or name == "zero_fraction" or (found != whole).any()


@pytest.mark.parametrize(("name", "parameters"), AGAINST, ids=str)
def test_so_is_one_against_the_reference(name, parameters):
    values, other = script(torch.float32), script(torch.float32, seed=1)
    found = numbers(values, name, parameters, RANGE, other=other)
    cut = [[x[:, FROM:TO].clone() for x in side] for side in (values, other)]
    alone = numbers(cut[0], name, parameters, "all", other=cut[1])
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_every_metric_of_tensors_with_tokens_takes_a_range():
    taken = {name: METRICS[name] for name in METRICS if METRICS[name].of_tokens and not METRICS[name].origin}
    refused = {n: m.refuses(m.sites[0], "range:2:4", {}) for n, m in taken.items()}
    assert {name: why for name, why in refused.items() if why} == {}
    assert {*METRICS} - {*taken} == {"loaded_weights", "weight_sqnr", "weight_gain", "generation", "embedding"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side):
    values, mask = script(torch.float32), np.ones((2, 12), dtype=int)
    mask[0, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    real = [values[0][0, mask[0].astype(bool)], values[0][1]]
    for name, of in (("rms", oracle.rms), ("absmax", oracle.absmax)):
        found = numbers(values, name, {}, RANGE, mask=mask)
        np.testing.assert_allclose(found[0], of([x[FROM:TO].numpy() for x in real]), rtol=1e-6)


@pytest.mark.parametrize("name", ["rms", "magnitude", "quantile"])
def test_a_sample_that_is_too_short_does_not_count_and_none_at_all_is_an_anomaly(name):
    values, mask = script(torch.float32), np.ones((2, 12), dtype=int)
    mask[0, 5:] = 0
    found = numbers(values, name, {}, {"from": 6}, mask=mask)
    alone = numbers([x[1:, 6:].clone() for x in values], name, {}, "all")
    np.testing.assert_allclose(found, alone, rtol=1e-6)
    with pytest.raises(AnomalyError, match=r"no sample has positions from 99 on: the longest has 12 tokens"):
        numbers(values, name, {}, {"from": 99}, mask=mask)


def test_sinks_of_a_range_can_be_left_out():
    values = script(torch.float32)
    for x in values:
        x[:, 4, 2] = 900.0
    within = numbers(values, "absmax", {}, RANGE)
    without = numbers(values, "absmax", {}, {**RANGE, "sinks": "out"})
    assert within.tolist() == [900.0] * 3
    left = [x[:, [3, 5, 6, 7]].abs().max().item() for x in values]
    np.testing.assert_allclose(without, left, rtol=1e-6)
    with pytest.raises(SuiteError, match=r"rms is summed up before the sinks are known"):
        numbers(values, "rms", {}, {**RANGE, "sinks": "out"})


def test_predictions_count_the_positions_that_were_read():
    model, other = models.llama(seed=0), models.damaged(models.llama(seed=0))
    batch = models.padded_batch([10, 7], side="left")
    cap = capture(
        other, [batch], sites=[("", "logits")], statistics=["kl_divergence", "flips", "overlap"], reference=model
    )
    with torch.no_grad():
        p, q = (m(**batch).logits.double().log_softmax(-1) for m in (model, other))
    divergences = (p.exp() * (p - q)).sum(-1).numpy()
    shares = torch.minimum(p.exp(), q.exp()).sum(-1).numpy()
    rows = [(0, slice(4, 9)), (1, slice(3 + 4, 3 + 9))]  # the second sample has three tokens of padding in front
    want = np.concatenate([divergences[row, at] for row, at in rows])
    found = cap.logits().kl_divergence(positions={"from": 4, "to": 9})
    np.testing.assert_allclose(found.values, [want.mean()], rtol=1e-5)
    assert next(iter(found.intervals.values()))[2] == len(want) == 8
    want = np.concatenate([shares[row, at] for row, at in rows])
    np.testing.assert_allclose(cap.logits().overlap(positions={"from": 4, "to": 9}).values, [want.mean()], rtol=1e-5)
    assert "positions from 4 to 9" in str(found.query)
    with pytest.raises(SuiteError, match="a sink's prediction is one like any other"):
        cap.logits().kl_divergence(positions={"from": 4, "sinks": "out"})
    with pytest.raises(AnomalyError, match="no sample has positions from 10 on"):
        cap.logits().flips(positions={"from": 10})


def test_parts_of_a_pass_that_a_range_does_not_reach_merge_to_the_whole(tmp_path):
    values, mask = script(torch.float32), np.ones((2, 12), dtype=int)
    mask[0, 5:] = 0
    model, ids, mask = models.Scripted(*values), models.numbered(models.Scripted(*values)), torch.as_tensor(mask)
    asked = [("quantile", {"positions": {"from": 6}}), ("rms", {"positions": {"from": 6}})]

    def part(rows):
        batch = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        return capture(model, [batch], sites=[(LAYERS, "output")], statistics=asked)

    whole, merged = part(slice(0, 2)), merge([part(slice(0, 1)), part(slice(1, 2))])
    merged.save(tmp_path / "merged.qsa")
    for cap in (merged, Capture.load(tmp_path / "merged.qsa")):
        for name in ("quantile", "rms"):
            got, want = (getattr(each.output(LAYERS), name)(positions={"from": 6}).values for each in (cap, whole))
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("positions", "what"),
    [
        ({"from": 4, "to": 4}, "to 4 is not above from 4"),
        ({"from": -1}, "from is a number of tokens"),
        ({"from": 1, "to": "x"}, "to is a number of tokens"),
        ({"from": True}, "from is a number of tokens"),
        ({"from": 1, "sinks": "no"}, "sinks is in or out"),
        ({"from": 1, "skip_first": 2}, "a range has from, to and sinks"),
        ({"form": 1}, "one of all"),
        ("range:4:2", "one of all"),
    ],
)
def test_a_range_that_means_nothing_is_refused(positions, what):
    with pytest.raises(ValueError, match=what):
        canonical_positions(positions)


def test_a_range_has_one_text():
    assert canonical_positions({"to": 8}) == "range:0:8"
    assert canonical_positions({"from": 4, "sinks": "out"}) == "range:4::no_sink"
    assert canonical_positions("range:4:8") == "range:4:8"

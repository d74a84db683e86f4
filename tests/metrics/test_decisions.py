"""`margin_ratio` and `flips`: their margins against float64 logits of the same hidden states, and their intervals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.captures import Request
from pytest_qsa.common import AnomalyError, SuiteError
from pytest_qsa.engine.heads import Head
from pytest_qsa.engine.reduce.margins import FEW, Margins, RowLogits, candidates
from pytest_qsa.engine.reference.record import RecordOptions, record_model
from pytest_qsa.engine.reference.reference_file import ReferenceFile
from pytest_qsa.engine.reference.replay import ReplayedReference
from pytest_qsa.engine.run.run_pass import run_pass
from pytest_qsa.metrics.intervals import mean_by_window, quantile_by_window, share_by_window, t_quantile
from support import models
from support.captures import statistics
from support.models import BLOCKS, damaged

SITES = [("", "logits")]
BATCHES = [models.padded_batch([24, 17]), models.token_batch(8, 16, seed=4)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def pair(request):
    model = models.llama(num_hidden_layers=2)
    return model.to(request.param), damaged(model).to(request.param)


def exact(model, batch):
    """Return the logits [B, T, V] float64 of a model's last hidden states, and which positions count [B, T]."""
    inputs = batch if isinstance(batch, dict) else {"input_ids": batch}
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        made = (hidden.double() @ model.lm_head.weight.double().T).numpy()
    return made, inputs.get("attention_mask", torch.ones(made.shape[:2])).bool().numpy()


def expected(pair, batches=BATCHES):
    """Return m and m̂ of every position that counts, and the number of its sample, all by numpy."""
    rows, windows, first = [], [], 0
    for batch in batches:
        (z, counts), (own, _) = (exact(model, batch) for model in pair)
        token = z.argmax(axis=2)
        for sample, position in zip(*np.nonzero(counts), strict=True):
            t = token[sample, position]
            rows.append([side[sample, position, t] - np.delete(side[sample, position], t).max() for side in (z, own)])
            windows.append(first + sample)
        first += len(z)
    return np.array(rows), np.array(windows)


@pytest.fixture(scope="module")
def measured(pair):
    return capture(pair[1], BATCHES, sites=SITES, statistics=["margin_ratio", "same_top"], reference=pair[0])


def test_margins_are_those_of_float64_logits_whatever_the_dtype(pair, measured):
    values = measured.sites["logits", "logits"].arrays["margins"]
    known = ~np.isnan(values).any(axis=1)
    margins, _ = expected(pair)
    assert known.sum() == len(margins) == 24 + 17 + 8 * 16
    np.testing.assert_allclose(values[known, :2], margins, rtol=1e-9, atol=1e-9)


def test_the_ratio_is_of_clear_decisions_and_never_below_zero(pair, measured):
    margins, _ = expected(pair)
    clear = margins[margins[:, 0] >= 0.5]
    assert 0 < len(clear) < len(margins)
    ratios = np.maximum(0, clear[:, 1]) / clear[:, 0]
    for stat, value in (("median", np.median(ratios)), ("mean", ratios.mean()), ("p10", np.percentile(ratios, 10))):
        found = measured.logits().margin_ratio(stat=stat)
        np.testing.assert_allclose(found.values, [value], rtol=1e-6)
        assert found.intervals["logits"][2] == len(clear)


@pytest.mark.parametrize("bounds", [{}, {"margin_from": 0.2}, {"margin_from": 0.1, "margin_to": 0.6}])
def test_flips_are_a_share_of_the_positions_in_a_range_of_margins(pair, measured, bounds):
    margins, _ = expected(pair)
    least, below = bounds.get("margin_from", 0), bounds.get("margin_to", np.inf)
    inside = margins[(margins[:, 0] >= least) & (margins[:, 0] < below)]
    found = measured.logits().flips(**bounds)
    np.testing.assert_allclose(found.values, [(inside[:, 1] < 0).mean()], rtol=1e-12)
    assert found.intervals["logits"][2] == len(inside)


def test_flips_from_zero_on_are_what_same_top_leaves_but_for_ties(pair, measured):
    flipped, same = measured.logits().flips().values, measured.logits().same_top().values
    if pair[0].dtype is torch.float32:
        np.testing.assert_allclose(flipped, 1 - same, rtol=1e-12)
    else:  # logits in 16 bits tie, which `same_top` counts as the same
        assert flipped >= 1 - same


def test_a_model_loses_no_decision_to_itself(pair):
    found = capture(pair[0], BATCHES, sites=SITES, statistics=["margin_ratio"], reference=pair[0]).logits()
    assert found.margin_ratio().values == [1.0]
    assert found.flips().values == [0.0]


def test_a_kept_reference_gives_the_margins_of_a_live_one(tmp_path):
    model = models.llama(torch.bfloat16, num_hidden_layers=2)
    requests = (Request("", "logits", None, statistics("scores", "agreement", "margins")),)
    path = tmp_path / "ref.qsa"
    path.write_bytes(record_model(model, BATCHES, requests, RecordOptions(with_head=True)).content.to_bytes())
    replayed = ReplayedReference(ReferenceFile.open(path), torch.device("cpu"))
    kept = run_pass(damaged(model), BATCHES, requests, [replayed])
    live = capture(damaged(model), BATCHES, sites=SITES, statistics=["margin_ratio"], reference=model)
    margins = [each.sites["logits", "logits"].arrays["margins"] for each in (kept, live)]
    np.testing.assert_allclose(*margins, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", [{"logit_scale": 0.25}, {}])
def test_a_scaled_head_is_found_out_by_its_logits(scaling):
    z = torch.randn(6, 40, dtype=torch.float64) * 4
    head = Head(torch.eye(40, dtype=torch.float64), None, {})
    heads = [head, replace(head, scaling={"logit_scale": 0.25})]
    logits = (z * scaling.get("logit_scale", 1.0)).bfloat16()
    found = Margins().of(RowLogits(logits, z, heads), RowLogits(logits, z, heads)).numpy()
    top = np.sort(z.numpy(), axis=1)[:, ::-1] * scaling.get("logit_scale", 1.0)
    np.testing.assert_allclose(found[:, 0], top[:, 0] - top[:, 1], rtol=1e-12)


def test_logits_that_no_head_makes_count_as_they_are():
    logits, states = torch.randn(5, 30).bfloat16(), torch.randn(5, 8).bfloat16()
    rows = RowLogits(logits, states, [Head(torch.randn(30, 8).bfloat16(), None, {})])
    found = Margins().of(rows, rows).numpy()
    top = np.sort(logits.double().numpy(), axis=1)[:, ::-1]
    np.testing.assert_allclose(found[:, 0], top[:, 0] - top[:, 1], rtol=1e-12)
    np.testing.assert_allclose(found[:, 1], found[:, 0], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_candidates_of_a_row_hold_its_two_largest_and_all_that_may_be(dtype):
    logits = (torch.randn(7, 1500, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    logits[3] = 1.0  # all tie: every token may be the likeliest
    logits[5, 9] = float("nan")
    rows, ids = candidates(logits)
    wide = logits.double()
    for row in range(7):
        found, top = ids[rows == row].tolist(), wide[row].sort(descending=True)
        if row == 5:
            assert found == []
            continue
        room = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}.get(dtype, 2.0**-16) * top.values[:2].abs().max()
        assert found == sorted(torch.nonzero(wide[row] >= top.values[1] - room)[:, 0].tolist())
    assert (rows == 3).sum() == 1500 > FEW


def test_nan_gives_no_margin():
    logits = torch.randn(3, 20)
    broken = logits.clone()
    broken[1, 4] = float("nan")
    found = Margins().of(RowLogits(broken, None, ()), RowLogits(logits, None, ())).numpy()
    assert np.isnan(found[1]).all()
    assert not np.isnan(found[[0, 2]]).any()


def test_what_can_not_be_asked_is_told(measured):
    with pytest.raises(SuiteError, match="margin_from is 0 or more and below margin_to, not 3"):
        measured.logits().flips(margin_from=3, margin_to=2)
    with pytest.raises(AnomalyError, match="no position has a margin from 1000 to inf"):
        measured.logits().flips(margin_from=1000)
    with pytest.raises(SuiteError, match="logits"):
        measured.output(BLOCKS).flips()


def spread(count, size, seed):
    """Return numbers whose windows differ, [count · size], and the window of each."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0, 0.5, (count, 1)) + generator.normal(0, 0.1, (count, size))
    return values.ravel(), np.repeat(np.arange(count), size)


def test_the_interval_of_a_mean_is_as_wide_as_its_windows_differ():
    values, windows = spread(20, 64, 1)
    found = mean_by_window(values, windows)
    # Of windows of one size the linearised variance is that of the windows' means.
    means = values.reshape(20, 64).mean(axis=1)
    half = 2.093024 * means.std(ddof=1) / np.sqrt(20)  # t of 19 degrees, a table's
    np.testing.assert_allclose([found.low, found.high], [values.mean() - half, values.mean() + half], rtol=1e-6)
    assert found.high - found.low > 5 * 2 * 1.96 * values.std() / np.sqrt(len(values))


def test_the_intervals_hold_the_true_value_in_95_of_100_runs():
    held = {"mean": 0, "median": 0, "share": 0}
    for seed in range(400):
        values, windows = spread(16, 32, seed)
        mean, median = mean_by_window(values, windows), quantile_by_window(values, windows, 0.5)
        share = share_by_window(values > 0, windows)
        for name, found, true in (("mean", mean, 0), ("median", median, 0), ("share", share, 0.5)):
            held[name] += found.low <= true <= found.high
    assert all(0.90 <= count / 400 <= 0.98 for count in held.values()), held


def test_a_share_of_none_is_known_as_well_as_its_number_allows():
    found = share_by_window(np.zeros(265, dtype=bool), np.arange(265) % 10)
    assert found.value == found.low == 0
    np.testing.assert_allclose(found.high, 0.0143, atol=1e-4)  # Wilson: z² / (n + z²)
    full = share_by_window(np.ones(265, dtype=bool), np.arange(265) % 10)
    np.testing.assert_allclose([full.low, full.high], [1 - found.high, 1.0])


def test_fewer_than_eight_windows_give_no_interval():
    values, windows = spread(7, 10, 3)
    for found in (mean_by_window(values, windows), share_by_window(values > 0, windows)):
        assert np.isnan([found.low, found.high]).all()
        assert found.count == 70


def test_students_t_is_a_tables():
    for degrees, value in ((1, 12.706205), (7, 2.364624), (30, 2.042272)):
        np.testing.assert_allclose(t_quantile(degrees), value, rtol=1e-6)

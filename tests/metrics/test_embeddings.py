"""The metric `embedding`: the order of neighbours, recall and cosines against plain arithmetic over all pairs."""

import itertools

import numpy as np
import pytest

from pytest_qsa import Capture
from pytest_qsa.captures import Pooled, Request, SiteNumbers
from pytest_qsa.common import AnomalyError

RANDOM = np.random.default_rng(3)
REFERENCE = RANDOM.normal(size=(12, 16))
OWN = REFERENCE + 0.6 * RANDOM.normal(size=REFERENCE.shape)


def output_of(reference, own, pool="mean", calls=1):
    statistic, count = Pooled(pool), len(own)
    sample, call = np.divmod(np.arange(count, dtype=np.int32), np.int32(calls))
    arrays = {statistic.key: np.stack([reference, own], axis=1)}
    kept = SiteNumbers("float32", (1, 16), True, frozenset({statistic}), sample, call, np.ones(count, int), arrays)
    plan = (Request("layer", "output", None, frozenset({statistic})),)
    return Capture({("layer", "output"): kept}, ("layer",), plan=plan, reference=Capture({})).output("layer")


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def neighbours(rows, sample):
    """Return the other samples, the nearest first."""
    others = [other for other in range(len(rows)) if other != sample]
    return sorted(others, key=lambda other: -cosine(rows[sample], rows[other]))


def concordance(first, second):
    """Spearman's coefficient as 1 − 6 Σ d² / (m (m² − 1)) of the positions of m samples without ties."""
    gaps = [(first.index(each) - second.index(each)) ** 2 for each in first]
    return 1 - 6 * sum(gaps) / (len(gaps) * (len(gaps) ** 2 - 1))


def test_order_is_the_mean_of_spearmans_coefficients_over_samples():
    series = output_of(REFERENCE, OWN).embedding()
    expected = [concordance(neighbours(REFERENCE, each), neighbours(OWN, each)) for each in range(12)]
    assert series.values[0] == pytest.approx(np.mean(expected), abs=1e-12)
    half = 2.2009851 * np.std(expected, ddof=1) / np.sqrt(12)  # Student's t with 11 degrees
    low, high, count = series.intervals["layer"]
    np.testing.assert_allclose([low, high], np.mean(expected) + np.array([-half, half]), atol=1e-6)
    assert count == 12


@pytest.mark.parametrize("k", [1, 3])
def test_recall_counts_the_nearest_that_stay_the_nearest(k):
    expected = [len({*neighbours(REFERENCE, each)[:k]} & {*neighbours(OWN, each)[:k]}) / k for each in range(12)]
    assert output_of(REFERENCE, OWN).embedding("recall", k=k).values[0] == pytest.approx(np.mean(expected))
    assert 0 < np.mean(expected) < 1


def test_cosine_is_that_of_each_sample_with_its_own_reference():
    expected = [cosine(*pair) for pair in zip(REFERENCE, OWN, strict=True)]
    assert output_of(REFERENCE, OWN).embedding("cosine").values[0] == pytest.approx(np.mean(expected), abs=1e-12)


def test_scale_changes_nothing_and_equal_cosines_share_their_rank():
    assert output_of(REFERENCE, 3 * REFERENCE).embedding().values[0] == pytest.approx(1, abs=1e-12)
    corners = np.array(list(itertools.product([1.0, -1.0], repeat=2)))  # each is as near to two of the others
    moved = corners + np.array([[0.2, 0.0], [0, 0], [0, 0], [0, 0]])
    ranks = {0: ([1.5, 1.5, 0], [2, 1, 0]), 1: ([1.5, 0, 1.5], [2, 0, 1]), 2: ([1.5, 0, 1.5], [1, 0, 2])}
    ranks[3] = ([0, 1.5, 1.5], [0, 1.5, 1.5])
    expected = np.mean([np.corrcoef(*pair)[0, 1] for pair in ranks.values()])
    assert output_of(corners, moved).embedding().values[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reference", "own", "options", "says"),
    [
        (REFERENCE[:3], OWN[:3], {}, "3 samples have no order of neighbours to keep: 4 or more"),
        (REFERENCE[:6], OWN[:6], {"stat": "recall"}, "6 samples have no order of neighbours to keep: 7 or more"),
        (np.ones((5, 16)), OWN[:5], {}, "a sample is equally near to all others"),
        (REFERENCE, OWN * np.nan, {}, "NaN or Inf"),
    ],
)
def test_where_there_is_no_order_nothing_passes(reference, own, options, says):
    with pytest.raises(AnomalyError, match=says):
        _ = output_of(reference, own).embedding(**options).values


def test_of_equally_near_samples_the_first_are_the_nearest_in_both_models():
    alike = np.zeros((40, 4))
    alike[:, 0] = 1
    alike[0, 1] = alike[1, 3] = 0.5  # all others are equally near to one another
    turned = alike.copy()
    turned[20, 2] = 3  # which was among no sample's nearest, and has the first ones as its own
    assert output_of(alike, turned).embedding("recall", k=5).values[0] == 1


def test_of_many_equal_cosines_the_first_samples_count():
    # Directions of eight only: each sample is equally near to dozens of others, in another order in both models.
    pairs = RANDOM.integers(-1, 2, size=(120, 2, 2)).astype(float)
    reference, own = np.moveaxis(pairs[pairs.any(axis=2).all(axis=1)], 1, 0)

    def nearest(rows, sample):
        others = [other for other in range(len(rows)) if other != sample]
        return {*sorted(others, key=lambda other: (-round(cosine(rows[sample], rows[other]), 9), other))[:10]}

    shares = [len(nearest(reference, each) & nearest(own, each)) / 10 for each in range(len(own))]
    assert output_of(reference, own).embedding("recall", k=10).values[0] == pytest.approx(np.mean(shares), abs=1e-12)


def test_several_calls_for_a_sample_leave_it_without_a_single_embedding():
    with pytest.raises(AnomalyError, match="it is called several times for a sample"):
        _ = output_of(REFERENCE, OWN, calls=2).embedding().values


def test_the_interval_of_a_share_ends_at_one():
    turned = np.concatenate([-REFERENCE[:1], REFERENCE[1:]])
    series = output_of(REFERENCE, turned).embedding("cosine")
    assert series.values[0] == pytest.approx(10 / 12)
    assert series.intervals["layer"][1] == 1


def test_a_model_that_makes_all_samples_alike_has_lost_the_order():
    assert output_of(REFERENCE, np.ones_like(OWN)).embedding().values[0] == 0

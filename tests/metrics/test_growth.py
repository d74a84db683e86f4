"""`growth` of scores that are written down: which positions are the second and the last quarter of a sample."""

import numpy as np
import pytest

from pytest_qsa import Capture
from pytest_qsa.captures import LOGITS, Request, SiteNumbers
from pytest_qsa.common import AnomalyError
from support.captures import statistics

ASKED = statistics("agreement")


def predictions_of(divergences):
    """Return the logits of a capture whose samples have these KL divergences, NaN where nothing is predicted."""
    lengths, count = np.array([len(each) for each in divergences]), len(divergences)
    scores = np.full((lengths.sum(), 4), 1.0)
    scores[:, 2] = np.concatenate(divergences)
    numbers = SiteNumbers(
        "float32", (), True, ASKED, np.arange(count, dtype=np.int32), np.zeros(count, np.int32), lengths,
        {"scores": scores},
    )  # fmt: skip
    plan = (Request("", LOGITS, None, ASKED),)
    return Capture({(LOGITS, LOGITS): numbers}, plan=plan, reference=Capture({})).logits()


@pytest.mark.parametrize("unknown", [0, 1, 3])
def test_quarters_are_of_the_positions_with_a_prediction_whatever_their_number(unknown):
    random = np.random.default_rng(unknown)
    samples = [random.uniform(0.5, 2, size=8 + index % 5) for index in range(40)]
    second = [value for each in samples for value in each[len(each) // 4 : 2 * (len(each) // 4)]]
    last = [value for each in samples for value in each[len(each) - len(each) // 4 :]]
    series = predictions_of([np.append(each, [np.nan] * unknown) for each in samples]).growth()
    assert series.values[0] == pytest.approx(np.mean(last) / np.mean(second), abs=1e-12)
    assert series.intervals[series.layers[0]][2] == len(last) + len(second)


def test_samples_without_four_predictions_have_no_quarters():
    with pytest.raises(AnomalyError, match=r"no sample has four positions, a quarter each: raise data\.seq_len"):
        _ = predictions_of([np.ones(3)] * 40).growth().values

"""`overlap`: what two models' predictions have in common, from their raw logits in float64."""

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.common import AnomalyError, SuiteError
from support import models
from support.models import BLOCKS, damaged

SITES = [("", "logits")]


@pytest.fixture(scope="module")
def pair():
    model = models.llama(num_hidden_layers=2)
    return model, damaged(model)


def raw(pair, batch):
    """Return the probabilities of the reference and of the model, [B, T, V] float64."""
    with torch.no_grad():
        return [model(**batch).logits.double().softmax(-1).numpy() for model in pair]


def test_the_overlap_is_a_mean_over_all_positions_but_padding(pair):
    lengths = [24, 17, 9, 30, 12, 5, 21, 16]
    batch = models.padded_batch(lengths)
    p, q = raw(pair, batch)
    values = np.minimum(p, q).sum(axis=2)[batch["attention_mask"].bool().numpy()]
    series = capture(pair[1], [batch], sites=SITES, statistics=["overlap"], reference=pair[0]).logits().overlap()
    np.testing.assert_allclose(series.values, [values.mean()], rtol=1e-6)
    low, high, count = series.intervals["logits"]
    assert count == len(values) == 134
    # By window: of the ratio of two sums, the overlaps of a window and its tokens; t of 7 degrees from a table.
    windows = np.repeat(np.arange(8), lengths)
    apart = [(values[windows == window] - values.mean()).sum() for window in range(8)]
    half = 2.364624 * np.sqrt(8 / 7 * np.square(apart).sum()) / 134
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], rtol=1e-5)


def test_a_model_overlaps_wholly_with_itself(pair):
    batches = [models.token_batch(2, 16)]
    found = capture(pair[0], batches, sites=SITES, statistics=["overlap"], reference=pair[0]).logits().overlap()
    np.testing.assert_allclose(found.values, [1.0], rtol=1e-12)


def test_it_needs_a_reference_and_the_logits(pair):
    batches = [models.token_batch(1, 8)]
    with pytest.raises(SuiteError, match="reference"):
        capture(pair[0], batches, sites=SITES, statistics=["overlap"])
    cap = capture(pair[1], batches, sites=[*SITES, (BLOCKS, "output")], reference=pair[0])
    with pytest.raises(SuiteError, match="logits"):
        cap.output(BLOCKS).overlap()
    with pytest.raises(AnomalyError, match="overlap"):
        cap.logits().overlap()  # it is kept only where it is asked for

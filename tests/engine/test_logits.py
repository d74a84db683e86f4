"""What is kept of two models' predictions, row by row, against numpy in float64."""

import numpy as np
import pytest
import torch

from pytest_qsa.engine.reduce.pairs import ROWS_AT_ONCE, compared_logits, comparison_of, scores_of


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)  # no kernel takes float64
@pytest.mark.parametrize("rows", [1, ROWS_AT_ONCE, ROWS_AT_ONCE + 3])
def test_the_overlap_of_a_row_is_the_sum_of_the_smaller_probabilities(dtype, rows):
    own, reference = (torch.randn(rows, 50, generator=torch.Generator().manual_seed(s)).to(dtype) * 3 for s in (1, 2))
    p, q = (softmax(logits.double().numpy()) for logits in (reference, own))
    found = compared_logits("overlap", own, reference).numpy()
    np.testing.assert_allclose(found, np.minimum(p, q).sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(found, 1 - np.abs(p - q).sum(axis=1) / 2, rtol=1e-9)  # 1 − the total variation


@pytest.mark.parametrize("width", [50, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_overlap_beside_the_scores_changes_neither(dtype, width):
    own, reference = (torch.randn(5, width, generator=torch.Generator().manual_seed(s)).to(dtype) * 3 for s in (1, 2))
    following = torch.tensor([4, 0, -1, 49, 7])
    found = comparison_of(own, reference, following, ["overlap"])
    assert torch.equal(found[:, :4].nan_to_num(-1.0), scores_of(own, reference, following).nan_to_num(-1.0))
    p, q = (softmax(logits.double().numpy()) for logits in (reference, own))
    np.testing.assert_allclose(found[:, 4].numpy(), np.minimum(p, q).sum(axis=1), rtol=1e-10)


def test_equal_predictions_overlap_wholly_and_disjoint_ones_not_at_all():
    certain = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 1000.0, 0.0]])
    assert compared_logits("overlap", certain, certain).tolist() == [1.0, 1.0]
    assert compared_logits("overlap", certain, certain.flip(0)).tolist() == pytest.approx([0.0, 0.0], abs=1e-300)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_without_probabilities_has_no_overlap(value):
    sound, broken = torch.randn(2, 9), torch.randn(2, 9)
    broken[1, 4] = value
    for one, other in ((sound, broken), (broken, sound)):
        found = compared_logits("overlap", one, other)
        assert torch.isnan(found).tolist() == [False, True]


@pytest.mark.parametrize("offset", [0.0, 290.0, 310.0, 1000.0, -310.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_exact_wherever_the_logits_lie(dtype, offset):
    own, reference = (torch.randn(5, 1300, generator=torch.Generator().manual_seed(s)) * 3 for s in (1, 2))
    reference, own = (reference + offset).to(dtype), own.to(dtype)  # one of them may be far from zero, or both
    following = torch.tensor([4, 0, 1299, 49, 7])
    for y, x in ((own, reference), (reference, reference.roll(1, 1))):
        p, q = (softmax(logits.double().numpy()) for logits in (x, y))
        apart = np.log(p) - np.log(q)
        found = comparison_of(y, x, following, ["overlap"]).numpy()
        rows = np.arange(5)
        np.testing.assert_allclose(found[:, 0], -np.log(q[rows, following]), rtol=1e-10)
        np.testing.assert_allclose(found[:, 1], -np.log(p[rows, following]), rtol=1e-10)
        np.testing.assert_allclose(found[:, 2], (p * apart).sum(1), rtol=1e-9)
        np.testing.assert_array_equal(found[:, 3], q[rows, p.argmax(1)] == q.max(1))
        np.testing.assert_allclose(found[:, 4], np.minimum(p, q).sum(1), rtol=1e-10)
        np.testing.assert_allclose(scores_of(y, None, following).numpy()[:, 0], found[:, 0], rtol=1e-12)

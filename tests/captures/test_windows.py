"""By how much windows of one text are shifted against each other: found by their tokens alone."""

import numpy as np
import pytest

from pytest_qsa.captures import shifts_of

TEXT = np.random.default_rng(0).permutation(200).astype(np.int32)


def windows(stride, count=3, length=40, front=(), back=()):
    rows = [TEXT[at * stride : at * stride + length] for at in range(count)]
    return [np.array([*front, *row, *back], dtype=np.int32) for row in rows]


@pytest.mark.parametrize(("front", "back"), [((), ()), ((901,), ()), ((), (902,)), ((901, 903), (902, 904))])
@pytest.mark.parametrize("stride", [1, 7, 36])
def test_windows_are_shifted_by_their_stride_whatever_special_tokens_are_around_each(stride, front, back):
    assert shifts_of(windows(stride, front=front, back=back)).tolist() == [stride, stride, 0]


@pytest.mark.parametrize("stride", [37, 40, 60])
def test_windows_with_fewer_than_four_tokens_in_common_share_none(stride):
    assert shifts_of(windows(stride)).tolist() == [0, 0, 0]


def test_a_few_equal_tokens_are_no_overlap_where_the_text_goes_on_otherwise():
    one, other = TEXT[:40].copy(), TEXT[100:140].copy()
    other[:6] = one[20:26]
    assert shifts_of([one, other]).tolist() == [0, 0]

"""The fused kernels against torch's operators, which the other tests hold against numpy."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from pytest_qsa.captures import ALL_STATISTICS
from pytest_qsa.engine.reduce import storage
from pytest_qsa.engine.reduce.observer import Reducers, StreamObserver
from pytest_qsa.engine.reduce.pairs import powers_of
from support import models
from support.captures import statistics
from support.processes import forking

STATISTICS = ALL_STATISTICS | statistics("massive:1:4", "quantized:fp8_e4m3:group:16", "features:1.5", "channel_counts")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def numbers_of(fused, x, keep, statistics=STATISTICS):
    observer = StreamObserver(statistics, Reducers(fused))
    observer.add(x, keep, list(range(len(x))), 0, token_axis=x.dim() == 3)
    observer.add(x.flip(1), [None] * len(x), list(range(len(x), 2 * len(x))), 0, token_axis=x.dim() == 3)
    return observer.numbers(statistics).to_arrays()[0]


def assert_same(x, keep, statistics=STATISTICS):
    kernels, operators = numbers_of(True, x, keep, statistics), numbers_of(False, x, keep, statistics)
    assert kernels.keys() == operators.keys()
    for name, array in kernels.items():
        assert (array.dtype, array.shape) == (operators[name].dtype, operators[name].shape), name
        rtol, atol = (2e-5, 1e-9) if name == "moments" else (0, 0)
        np.testing.assert_allclose(array, operators[name], rtol, atol, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", models.SPECIAL)
def test_the_kernels_keep_the_same_numbers_as_the_operators(dtype, special):
    x = models.special_rows(3, special)
    keep = [None] * 3 if x.dim() == 2 else [None, torch.arange(1, x.shape[1]), torch.tensor([0])]
    assert_same(x.to(dtype), keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [("tokens",), ("tokens", "moments"), ("tokens", "moments", "channels")], ids=str)
def test_samples_that_lie_in_one_tensor_have_the_bits_of_each_alone(dtype, names):
    lengths = (40, 1, 33, 40)
    x = (torch.randn(sum(lengths) + 3, 24, generator=torch.Generator().manual_seed(1)) ** 3).to(dtype)
    x[40] = 0.0
    x[45, 3], x[50, 2] = float("nan"), float("-inf")
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        wanted = statistics(*names)
        packed, alone = StreamObserver(wanted, Reducers()), StreamObserver(wanted, Reducers())
        for call in (0, 1):
            packed.add_packed(x, lengths, [3, 0, 1, 2], call)
            for sample, rows in zip([3, 0, 1, 2], x[:-3].split(lengths), strict=True):
                alone.add(rows[None], [None], [sample], call, token_axis=True)
        found, expected = packed.numbers(wanted), alone.numbers(wanted)
        assert found.shape == expected.shape
        arrays, known = found.to_arrays()[0], expected.to_arrays()[0]
        assert {name: array.tobytes() for name, array in arrays.items()} == {
            name: array.tobytes() for name, array in known.items()
        }
    torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    statistics=st.sets(st.sampled_from(sorted(STATISTICS)), min_size=1),
    scale=st.integers(-20, 10),
    seed=st.integers(0, 99),
)
def test_any_choice_of_statistics_comes_out_the_same(shape, dtype, statistics, scale, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**scale
    assert_same(x.to(dtype), [None] * shape[0], frozenset(statistics))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asked", [("tokens",), ("tokens", "counts")], ids=str)
@pytest.mark.parametrize("in_turns", [False, True])
def test_whole_samples_of_a_site_come_out_as_the_operators_have_them(dtype, asked, in_turns):
    """They go by their addresses, or in turns with others; each reaches further, so that the window has to grow."""
    wanted, generator = statistics(*asked), torch.Generator().manual_seed(7)
    rows = [(torch.randn((1, 33, 20), generator=generator) * scale).to(dtype) for scale in (1, 100, 1e-4, 3, 1e-3)]
    rows[2][0, 4:9], rows[3][0, 5, 7], rows[4][0, 2, 3] = 0, float("nan"), float("inf")
    rows.append(rows[0])  # within the window that was there before it grew
    fast, slow = (StreamObserver(wanted, Reducers(fused)) for fused in (True, False))
    for sample, row in enumerate(rows):
        if in_turns and sample % 2:
            fast.add(row, [None], [sample], 0, token_axis=True)
        else:
            assert fast.repeat(row, sample, 0)
        slow.add(row, [None], [sample], 0, token_axis=True)
    found, expected = (each.numbers(wanted).to_arrays()[0] for each in (fast, slow))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_magnitude_is_zero_once_a_further_sample_has_a_zero(dtype):
    wanted, x = statistics("tokens", "counts"), torch.linspace(3, 1, 48).reshape(1, 8, 6).to(dtype)
    largest, observer = x.max().item(), StreamObserver(wanted)
    assert observer.repeat(x, 0, 0)
    assert observer.numbers(wanted).extremes[1] == x.min()
    x[0, 3, 5] = 0
    assert observer.repeat(x, 1, 0)
    assert observer.numbers(wanted).extremes[:2].tolist() == [largest, 0]


def test_what_no_kernel_does_by_its_address_is_left_to_the_others():
    observer, x = StreamObserver(statistics("tokens", "counts")), torch.randn(1, 8, 6)
    others = [x[0], x[:, :0], x.expand(2, 8, 6), torch.randn(1, 6, 8).mT, nn.Parameter(x), x.to("meta")]
    for _ in range(2):
        assert not any(observer.repeat(other, 1, 0) for other in others)
        assert not observer.repeat(x, None, 0)
        assert observer.repeat(x, 0, 0)
    assert len(observer.owners) == 6
    for other in (StreamObserver(statistics("moments")), StreamObserver(statistics("tokens"), channels_first=True)):
        assert not other.repeat(x, 0, 0)
    assert not StreamObserver(statistics("tokens")).repeat(x.double(), 0, 0)


@pytest.mark.parametrize("lengths", [(40, 7, 7, 40), (7, 7, 7, 7), (9, 9, 9, 9)], ids=str)
def test_whole_samples_of_any_lengths_keep_their_own_in_the_order_of_their_numbers(lengths, monkeypatch):
    monkeypatch.setattr(storage, "SIZE", 4096)  # so that they lie in several maps
    wanted, x = statistics("tokens", "counts"), torch.randn(1, 40, 6).bfloat16()
    fast, slow = (StreamObserver(wanted, Reducers(fused)) for fused in (True, False))
    for sample, length in zip((2, 0, 3, 1), lengths, strict=True):
        part = (x[:, :length] * (sample + 1)).contiguous()
        assert fast.repeat(part, sample, 0)
        slow.add(part, [None], [sample], 0, token_axis=True)
    found, expected = (each.numbers(wanted).to_arrays()[0] for each in (fast, slow))
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


@pytest.mark.parametrize("shape", [(1, 511, 577), (1, 37, 129), (1, 1000, 3), (1, 1, 7)], ids=str)
def test_the_powers_of_rounding_have_the_bits_of_the_operators_in_tensors_of_any_size_on_any_threads(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)) ** 3
    x[0, 0], x[0, -1, -1] = 0.0, 900.0
    scales = ("token:128", "channel:128", "group:32", "group:100")
    keys = [f"quantized:{scheme}:{by}" for scheme in ("int8", "int4", "fp8_e4m3") for by in scales]
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same(x, [None], statistics(*keys))
    torch.set_num_threads(before)


def test_a_capture_leaves_the_number_of_torchs_threads_alone():
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        numbers_of(True, torch.randn(1, 64, 64), [None])
        assert torch.get_num_threads() == count
    torch.set_num_threads(before)


def compare_on_one_thread():
    """Exit with the number of torch's threads after the first kernel of a process, one for two tensors, on one."""
    torch.set_num_threads(1)
    powers_of(torch.randn(4, 8), torch.randn(4, 8), None)
    sys.exit(torch.get_num_threads())


@pytest.mark.process
def test_a_comparison_leaves_the_number_of_torchs_threads_alone():
    process = forking().Process(target=compare_on_one_thread)
    process.start()
    process.join(60)
    assert process.exitcode == 1

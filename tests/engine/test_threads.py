"""A model runs on as many threads as cores are free; a number that the user has set is kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pytest_qsa.common import own_cores
from pytest_qsa.engine import threads


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads of torch, of which this process has chosen none yet, and no variable of the user's."""
    for name in threads.SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_chosen", [])
    with threads.threads_restored():
        torch.set_num_threads(2)
        yield


def with_free(monkeypatch: pytest.MonkeyPatch, free: float | None) -> None:
    monkeypatch.setattr(own_cores, "free", lambda: free)


@pytest.mark.parametrize(("free", "used"), [(0.1, 1), (1.5, 1), (1.8, 2), (64.0, 2), (None, 2)])
def test_torch_has_as_many_threads_as_cores_are_free(
    free: float | None, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, free)
    threads.use_free_cores()
    assert torch.get_num_threads() == used
    assert threads.threads_text() == (f"{used} of 2" if used < 2 else "2")


def test_a_number_that_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 0.1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.use_free_cores()
    assert torch.get_num_threads() == 2


def test_it_is_chosen_once_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 0.1)
    with threads.threads_restored():
        threads.use_free_cores()
        with_free(monkeypatch, 2.0)
        threads.use_free_cores()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2

"""The captures of a session: each is made once, in one process, among workers and between runs; so is each failure."""

import numpy as np
import pytest

from pytest_qsa.captures import COUNTS, MOMENTS, TOKENS, Capture, Request
from pytest_qsa.common import AnomalyError, InfraError
from pytest_qsa.suite import Captures, Data, Memory, Model, Subject

TOKEN_REQUESTS = [Request("a", "output", None, frozenset({TOKENS}))]
MORE_REQUESTS = [Request("a", "input", None, frozenset({COUNTS, MOMENTS}))]


class Passes:
    """Stands in for the pass: notes what it was asked for, or fails."""

    def __init__(self, error=None):
        self.plans, self.error = [], error

    def __call__(self, plan, sums):
        self.plans.append(tuple(plan))
        if self.error is not None:
            raise self.error
        return Capture(sites={}, modules=("a",), plan=tuple(plan), tokens=(np.arange(3, dtype=np.int32),))


@pytest.fixture
def subject(llama, tmp_path):
    return Subject("llama", Model(path=str(llama)), Data(), Memory(), tmp_path)


def test_a_capture_is_made_once_for_all_that_was_planned(subject):
    captures, passes = Captures(), Passes()
    found = [captures.get("key", subject, [*TOKEN_REQUESTS, *MORE_REQUESTS], passes) for _ in range(2)]
    assert found[0] is found[1]
    assert [len(plan) for plan in passes.plans] == [2]
    captures.forget("key")
    captures.get("key", subject, TOKEN_REQUESTS, passes)
    assert len(passes.plans) == 2


def test_a_failure_is_met_once_and_told_by_every_test(subject):
    captures, passes = Captures(), Passes(AnomalyError("no layer"))
    errors = []
    for _ in range(2):
        with pytest.raises(AnomalyError, match="no layer") as caught:
            captures.get("key", subject, TOKEN_REQUESTS, passes)
        errors.append(caught.value)
    assert len(passes.plans) == 1
    assert errors[0] is not errors[1]


def test_what_nobody_planned_is_captured_beside_the_first(subject):
    captures, passes = Captures(), Passes()
    first = captures.get("key", subject, TOKEN_REQUESTS, passes)
    assert captures.covering("key", TOKEN_REQUESTS) is first
    assert captures.covering("key", MORE_REQUESTS) is None
    later = captures.extend("key", subject, MORE_REQUESTS, passes)
    assert captures.covering("key", MORE_REQUESTS) is later
    assert captures.covering("key", TOKEN_REQUESTS) is first
    assert captures.covering("other", TOKEN_REQUESTS) is None


def test_workers_share_one_capture_and_one_failure(subject, tmp_path):
    first, second = Captures(shared=tmp_path / "run"), Captures(shared=tmp_path / "run")
    passes, others, told = Passes(), Passes(), []
    mine = first.get("key", subject, TOKEN_REQUESTS, passes, lambda capture, cached: told.append(("first", cached)))
    theirs = second.get("key", subject, TOKEN_REQUESTS, others, lambda capture, cached: told.append(("second", cached)))
    assert mine.to_bytes() == theirs.to_bytes()
    assert (len(passes.plans), len(others.plans), told) == (1, 0, [("first", False)])
    with pytest.raises(InfraError, match="no such thing"):
        first.get("more", subject, MORE_REQUESTS, Passes(InfraError("no such thing")))
    with pytest.raises(InfraError, match="no such thing"):
        second.get("more", subject, MORE_REQUESTS, others)
    assert others.plans == []


def test_a_later_run_takes_the_capture_from_the_cache_and_says_so(subject, tmp_path):
    told = []
    for _ in range(2):
        captures, passes = Captures(cache=tmp_path / "cache"), Passes()
        captures.get("key", subject, TOKEN_REQUESTS, passes, lambda capture, cached: told.append(cached))
    assert told == [False, True]
    assert passes.plans == []


def test_a_subject_that_no_hash_covers_is_never_taken_from_the_cache(tmp_path):
    subject = Subject("x", Model(factory="a:b"), Data(), Memory(), tmp_path)
    for _ in range(2):
        passes = Passes()
        Captures(cache=tmp_path / "cache").get("key", subject, TOKEN_REQUESTS, passes)
        assert len(passes.plans) == 1

"""What the garbage collector leaves alone, and what it still frees."""

from __future__ import annotations

import gc
import sys

import pytest

from pytest_qsa.common import collector, earlier_objects_frozen, libraries_frozen, uncollected
from support.projects import Project

CYCLE = """
import atexit, gc, sys, types, weakref

class Cycle:
    def __init__(self):
        self.self = self

atexit.register(lambda: print("at exit", gc.get_freeze_count()))  # runs last
from pytest_qsa.common import libraries_frozen, uncollected

with uncollected():
    pass  # a room that is imported before
before, imported, after = Cycle(), None, None
garbage = weakref.ref(before)
del before
with libraries_frozen():
    print("collects", gc.isenabled())
    imported = Cycle()
{more}
print("collects", gc.isenabled(), "garbage", garbage() is not None)
print("frozen", all(each is not imported for each in gc.get_objects()))
after = weakref.ref(Cycle())
gc.collect()
print("freed", after() is None)
"""
NANOBIND = 'Reports = type("Reports", (type,), {"__module__": "nanobind"})'


@pytest.mark.process
@pytest.mark.parametrize("more", ["", NANOBIND])
def test_what_a_gate_imports_is_looked_through_no_more_and_what_comes_later_is_freed(tmp_path, more):
    done = Project(tmp_path / "project").program(sys.executable, "-c", CYCLE.replace("{more}", more))
    *lines, exit = done.stdout.splitlines()
    assert lines == ["collects False", "collects True garbage False", "frozen True", "freed True"], done.stderr
    # A library that prints at the exit what wasn't freed has everything freed.
    assert (exit == "at exit 0") is bool(more)


def test_where_torch_is_there_already_a_model_of_somebody_else_can_still_be_freed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    model = [[]]
    with libraries_frozen():
        assert gc.isenabled()
    assert any(each is model for each in gc.get_objects())  # which leaves out what is frozen


@pytest.fixture
def thawed(monkeypatch):
    """Begin as a user's process does; tests/conftest.py has frozen what was there before all tests."""
    monkeypatch.setattr(collector, "_frozen", False)
    gc.unfreeze()
    yield
    gc.freeze()


def test_an_error_inside_leaves_nothing_frozen(thawed):
    with pytest.raises(KeyError), earlier_objects_frozen():
        raise KeyError
    assert gc.get_freeze_count() == 0
    with earlier_objects_frozen():
        assert gc.get_freeze_count() > 0


def test_only_the_outer_one_thaws(thawed):
    with earlier_objects_frozen():
        with earlier_objects_frozen():
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_frozen(thawed):
    gc.freeze()
    with earlier_objects_frozen():
        pass
    assert gc.get_freeze_count() > 0


def test_imports_thaw_nothing_that_was_frozen_after_earlier_imports(thawed):
    with uncollected():
        pass
    gc.freeze()
    with uncollected():
        pass
    assert gc.get_freeze_count() > 0

"""`earlier_objects_frozen`: the garbage collector looks at all objects again afterwards, unless somebody else froze."""

import gc

import pytest

from pytest_qsa.common import earlier_objects_frozen, imports


@pytest.fixture(autouse=True)
def thawed(monkeypatch):
    """Begin as a user's process does; tests/conftest.py has frozen what was there before all tests."""
    monkeypatch.setattr(imports, "_frozen", False)
    gc.unfreeze()
    yield
    gc.freeze()


def test_an_error_inside_leaves_nothing_frozen():
    with pytest.raises(KeyError), earlier_objects_frozen():
        raise KeyError
    assert gc.get_freeze_count() == 0
    with earlier_objects_frozen():
        assert gc.get_freeze_count() > 0


def test_only_the_outer_one_thaws():
    with earlier_objects_frozen():
        with earlier_objects_frozen():
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_frozen():
    gc.freeze()
    with earlier_objects_frozen():
        pass
    assert gc.get_freeze_count() > 0


def test_imports_thaw_nothing_that_was_frozen_after_earlier_imports():
    with imports.uncollected():
        pass
    gc.freeze()
    with imports.uncollected():
        pass
    assert gc.get_freeze_count() > 0

"""Numbers that a pass keeps in pages of its own, against lists of what was put there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_qsa.engine.reduce import storage as keeping
from pytest_qsa.engine.reduce.storage import Arena, Column


def no_maps(monkeypatch):
    monkeypatch.setattr(keeping, "_maps", lambda: False)


def no_advice(monkeypatch):
    monkeypatch.setattr(keeping, "POPULATE_WRITE", 1 << 20)


@pytest.mark.parametrize("system", [None, no_maps, no_advice], ids=["linux", "without maps", "an older kernel"])
@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["token_max", "moments", "experts", "massive"]), st.integers(0, 9000)), max_size=20
    )
)
def test_rows_of_several_columns_are_read_back_as_they_were_put(monkeypatch, system, puts):
    monkeypatch.setattr(keeping, "SIZE", 1 << 15)  # some rows don't fit in what is left of a map, some in no map
    monkeypatch.setattr(keeping, "AHEAD", 1 << 13)
    if system is not None:
        system(monkeypatch)
    store, rng = Arena(), np.random.default_rng(len(puts))
    shapes = {"token_max": (1,), "moments": (7,), "experts": (1, 3), "massive": ()}
    dtypes = {"token_max": np.uint16, "moments": np.float64, "experts": np.int64, "massive": np.int64}
    columns = {name: Column(store, dtypes[name], shapes[name]) for name in shapes}
    want = {name: [] for name in shapes}
    for name, length in puts:
        shape = {"token_max": (length,), "experts": (length // 8, 3)}.get(name, shapes[name])
        values = rng.integers(0, 60000, shape).astype(dtypes[name])
        columns[name].append(values)
        want[name].append(values)
    for name, rows in want.items():
        assert len(columns[name]) == len(rows)
        for index, row in enumerate(rows):
            found = columns[name][index]
            assert found.dtype == row.dtype
            np.testing.assert_array_equal(found, row)


def test_what_is_taken_is_zero_and_nobody_elses():
    store = Arena()
    first, second = store.zeros((3, 5), np.uint32), store.zeros((4,), np.float64)
    first[:] = 7
    assert second.tolist() == [0, 0, 0, 0]
    second[:] = 1
    assert (first == 7).all()

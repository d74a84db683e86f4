"""A model that does not fit where it should run is placed by accelerate, and measured the same."""

from types import SimpleNamespace

import numpy as np
import pytest

from pytest_qsa.captures import MOMENTS, TOKENS, Request
from pytest_qsa.common.errors import InfraError
from pytest_qsa.engine.load import models
from pytest_qsa.engine.subject import capture_subject
from pytest_qsa.suite import Data, Memory, Model, Subject

REQUESTS = [
    Request("down_proj$", site, None, frozenset({TOKENS, MOMENTS} if site != "weight" else {MOMENTS}))
    for site in ("input", "output", "weight")
]


def captured(llama, **memory):
    data = Data(num_samples=2, seq_len=32)
    subject = Subject("llama", Model(path=str(llama)), data, Memory(device="cpu", **memory), llama.parent)
    return capture_subject(subject, REQUESTS)


@pytest.fixture
def little_memory(llama, monkeypatch):
    """Pretend that two thirds of the model's bytes are free."""
    size = (llama / "model.safetensors").stat().st_size
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: SimpleNamespace(available=size * 2 // 3))


def test_a_model_larger_than_memory_is_offloaded_and_its_numbers_are_the_same(llama, little_memory, monkeypatch):
    placed = []
    loading = models._placement
    monkeypatch.setattr(models, "_placement", lambda *args: placed.append(loading(*args)) or placed[-1])
    offloaded = captured(llama)
    monkeypatch.undo()
    whole = captured(llama)
    assert placed[0]["device_map"] == "auto"
    assert set(offloaded.sites) == set(whole.sites)
    for site, numbers in whole.sites.items():
        np.testing.assert_array_equal(offloaded.sites[site].moments, numbers.moments, err_msg=str(site))


def test_what_was_offloaded_to_disk_is_removed_after_the_pass(llama, little_memory, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    captured(llama)
    assert list(tmp_path.iterdir()) == []


def test_what_was_offloaded_is_removed_where_the_model_lacks_the_part_that_is_asked_for(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spec, memory = Model(path=str(llama), submodule="thinker"), Memory(device="cpu", offload_device="disk")
    with pytest.raises(InfraError, match="'thinker' does not exist"):
        models.load_model(spec, str(llama), memory, allow_code=False)
    assert list(tmp_path.iterdir()) == []


def test_offloading_can_be_forbidden(llama, little_memory):
    assert models._placement(str(llama), Memory(device="cpu", auto_offload=False)) == {}
    assert models._placement(str(llama), Memory(device="cpu"))["device_map"] == "auto"

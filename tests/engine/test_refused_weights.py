"""A weight that no format claims has no number; what doesn't need it is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pytest_qsa import Capture, capture
from pytest_qsa.captures import MOMENTS, STORED, Request
from pytest_qsa.captures.merging import merge
from pytest_qsa.common.errors import InfraError
from pytest_qsa.engine.formats.stored import StoredWeights
from pytest_qsa.engine.load.models import Loaded
from pytest_qsa.engine.subject import capture_loaded, capture_subject
from pytest_qsa.suite import Data, Memory, Model, Subject
from support import models

SITES = [(r"layers\.\d+$", "output"), ("_proj$", "weight")]
LAYER = "model.layers.1.mlp.down_proj"
BATCHES = [models.token_batch(1, 8, seed=seed) for seed in range(2)]
REFUSED = f"the weight of {LAYER} can't be read: Linear holds weight .*absmax .*in a format that is not known"


def model():
    """Return a model of which one layer has the tensors of an unknown quantizer, and runs all the same."""
    made = models.llama(num_hidden_layers=2)
    made.get_submodule(LAYER).register_buffer("absmax", torch.ones(4))
    return made


@pytest.fixture(scope="module")
def measured():
    return capture(model(), BATCHES, sites=SITES)


def test_only_what_needs_the_weight_is_refused(measured):
    with pytest.raises(InfraError, match=REFUSED):
        measured.weight("down_proj$").absmax()
    plain = capture(models.llama(num_hidden_layers=2), BATCHES, sites=SITES)
    for ask in (lambda c: c.output(r"layers\.\d+$").rms(), lambda c: c.weight("_proj$", exclude="down_proj").absmax()):
        np.testing.assert_array_equal(ask(measured).values, ask(plain).values)
        assert ask(measured).layers == ask(plain).layers


def test_a_file_without_refusals_has_the_header_of_before():
    assert b"refused" not in capture(models.llama(num_hidden_layers=2), BATCHES, sites=SITES).to_bytes()


@pytest.mark.parametrize(
    "kept",
    [
        lambda c: Capture.from_bytes(c.to_bytes()),
        Capture.redacted,
        lambda c: merge([capture(models.llama(num_hidden_layers=2), BATCHES[:1], sites=SITES), c]),
    ],
    ids=["file", "redacted", "merged"],
)
def test_a_refusal_is_kept_with_the_numbers(measured, kept):
    assert kept(measured).refused == measured.refused
    with pytest.raises(InfraError, match=REFUSED):
        kept(measured).weight("down_proj$").absmax()


def test_a_weight_that_the_reference_refuses_is_not_compared():
    compared = capture(models.llama(num_hidden_layers=2), BATCHES, sites=SITES, reference=model())
    with pytest.raises(InfraError, match=f"the weight of {LAYER} can't be compared: Linear holds weight"):
        compared.weight("down_proj$").weight_sqnr()
    # The subject's own weight needs no reference.
    assert len(compared.weight("down_proj$").absmax().layers) == 2
    assert np.isposinf(compared.weight("up_proj$").weight_sqnr().values).all()


def test_a_layer_without_a_weight_is_no_refusal():
    cap = capture(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), [torch.ones(1, 2, 4)], sites=[(".", "weight")])
    assert cap.refused == {}
    assert cap.weight(".").absmax().layers == ["0"]


def test_a_layer_that_can_not_be_held_against_the_files_stops_only_loaded_weights(quantized, monkeypatch):
    def powers(self, name, module, known=StoredWeights.powers):
        if name == LAYER:
            raise InfraError("its format, somebodys, is not known here")
        return known(self, name, module)

    monkeypatch.setattr(StoredWeights, "powers", powers)
    folder = quantized["int8"]
    subject = Subject("llama", Model(path=str(folder)), Data(num_samples=1, seq_len=16), Memory(device="cpu"), folder)
    asked = [Request("down_proj$", "weight", None, frozenset({STORED, MOMENTS})), Request("norm$", "output")]
    cap = Capture.from_bytes(capture_subject(subject, asked).to_bytes())
    with pytest.raises(InfraError, match=f"what the loader made of {LAYER} can't be told: its format, somebodys"):
        cap.weight("down_proj$").loaded_weights()
    assert cap.weight("down_proj$", exclude=r"layers\.1").loaded_weights().values.max() == 0
    assert LAYER in cap.weight("down_proj$").rms().layers
    assert cap.output("norm$").rms().layers


def test_a_model_without_files_can_be_gated_on_all_but_loaded_weights():
    subject = Subject("fixture", None, Data(), Memory(device="cpu"), Path())
    asked = [Request("down_proj$", "weight", None, frozenset({STORED})), Request("norm$", "output")]
    cap = capture_loaded(subject, Loaded(models.llama(num_hidden_layers=2), None), BATCHES, asked)
    with pytest.raises(InfraError, match=r"down_proj \(and 1 more\) can't be told: this reads a checkpoint's"):
        cap.weight("down_proj$").loaded_weights()
    assert cap.output("norm$").rms().layers


def test_packed_experts_beside_scales_of_an_unknown_quantizer_are_refused_one_by_one():
    made = models.mixture("qwen3")
    experts = next(module for name, module in made.named_modules() if name.endswith("layers.1.mlp.experts"))
    experts.register_buffer("gate_up_proj_scale", torch.ones(len(experts.gate_up_proj), 1, 1))
    cap = capture(made, BATCHES, sites=[(r"experts\.\d+\.\w+_proj$", "weight")])
    with pytest.raises(InfraError, match=r"layers\.1\.mlp\.experts\.0\.gate_proj .*can't be read: .*weight_scale"):
        cap.weight(r"layers\.1\.mlp\.experts\.\d+\.gate_proj$").absmax()
    assert len(cap.weight(r"layers\.1\.mlp\.experts\.\d+\.down_proj$").absmax().layers) == len(experts.gate_up_proj)

"""Disjoint parts of the data, one load: each is what a pass over those samples gives, and weights are taken once."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from pytest_qsa.captures import Request
from pytest_qsa.common import InfraError
from pytest_qsa.engine import SampleShare, capture_parts, capture_subject
from pytest_qsa.engine.load.outline import check_layers
from pytest_qsa.suite import Data, Memory, Model, Subject
from support import models
from support.captures import statistics

REQUESTS = [
    Request(r"layers\.\d$", "output", None, statistics("tokens", "moments")),
    Request("down_proj$", "weight", None, statistics("moments")),
]


def subject_of(folder, **model):
    return Subject(
        "llama", Model(path=str(folder), **model), Data(num_samples=2, seq_len=24), Memory(), folder.parent
    ).named


def peaks(capture):
    return capture.output(r"layers\.\d$").absmax().values


def test_each_part_is_the_pass_over_its_own_samples_and_a_further_pass_that_of_the_first(llama):
    subject, steps = subject_of(llama), []
    parts, again = capture_parts(subject, REQUESTS, 3, 2, progress=lambda done, total: steps.append((done, total)))
    whole = replace(subject, data=subject.data.model_copy(update={"num_samples": 6}))
    for index, part in enumerate(parts):
        alone = capture_subject(whole, REQUESTS, share=SampleShare(samples=(2 * index, 2 * index + 2)))
        np.testing.assert_array_equal(peaks(part), peaks(alone))
        np.testing.assert_array_equal(part.weight("down_proj$").rms().values, alone.weight("down_proj$").rms().values)
    assert not np.array_equal(peaks(parts[0]), peaks(parts[1]))
    assert [peaks(capture).tolist() for capture in again] == [peaks(parts[0]).tolist()]
    assert steps[-1] == (8, 8)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_too_little_text_for_the_parts_is_told(llama, tmp_path):
    (tmp_path / "little.txt").write_text("one two three four five six seven eight nine ten " * 2)
    subject = replace(
        subject_of(llama), folder=tmp_path, data=Data(source="custom:little.txt", seq_len=24, num_samples=1)
    )
    with pytest.raises(InfraError, match="for 9 parts"):
        capture_parts(subject, REQUESTS, 9, 1)


def test_a_reference_that_was_kept_cannot_see_other_parts_of_the_text(llama):
    kept = llama.parent / "kept.qsa"
    kept.write_bytes(b"")
    requests = [Request(r"layers\.\d$", "output", None, statistics("error"))]
    with pytest.raises(InfraError, match=r"kept\.qsa was kept on its own tokens"):
        capture_parts(subject_of(llama, reference="kept.qsa"), requests, 2, 1)


def test_the_original_of_a_model_has_its_blocks_and_widths():
    model = models.llama()
    check_layers(model, copy.deepcopy(model))
    with pytest.raises(InfraError, match=r"the reference has 3 blocks .* and the model 4 blocks"):
        check_layers(model, models.llama(num_hidden_layers=3))
    with pytest.raises(InfraError, match=r"mlp\.\w+ is 32→64 here and 32→48 in the reference"):
        check_layers(model, models.llama(intermediate_size=48))
    fused = copy.deepcopy(model)
    fused.model.layers[1].self_attn.q_proj = torch.nn.Identity()
    del fused.model.layers[2].mlp.up_proj
    with pytest.raises(InfraError, match=r"the model has no layer model\.layers\.2\.mlp\.up_proj"):
        check_layers(fused, model)

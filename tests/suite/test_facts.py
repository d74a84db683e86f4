"""The patterns of a model's blocks and linear layers, which a first suite has."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pytest_qsa.captures import Capture, ModelProvenance, Provenance, SiteNumbers
from pytest_qsa.common import InfraError
from pytest_qsa.suite import Anatomy, Model, check_engine


def test_the_patterns_find_blocks_and_linears_of_any_trunk():
    one = Anatomy(["transformer.h.0", "transformer.h.1"], ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"])
    assert one.block_pattern == r"^transformer\.h\.\d+$"
    assert one.linear_pattern == r"\.(c_attn|c_fc)$"
    two = Anatomy(["encoder.block.0", "decoder.block.0"], [])
    assert two.block_pattern == r"^(encoder\.block|decoder\.block)\.\d+$"


def test_the_kinds_of_linear_layers_are_groups_in_model_order():
    linears = [f"layers.{block}.{kind}_proj" for block in range(2) for kind in ("q", "down")]
    anatomy = Anatomy(["layers.0", "layers.1"], linears)
    assert anatomy.linear_groups == [r"\.q_proj$", r"\.down_proj$"]
    assert all(re.search(anatomy.linear_pattern, name) for name in linears)
    assert not any(re.search(anatomy.block_pattern, name) for name in linears)


@pytest.mark.parametrize(("made_on", "engine"), [("cpu", "vllm"), ("vllm-cpu", "transformers")])
def test_a_release_that_another_engine_ran_is_nothing_to_be_held_against(made_on, engine):
    numbers = SiteNumbers("float32", (1,), False, frozenset(), *(np.zeros(1, int) for _ in range(3)))
    release = Capture({("a", "output"): numbers}, provenance=Provenance(ModelProvenance(device_class=made_on)))
    with pytest.raises(InfraError, match=r"capture the last release with the same model\.engine"):
        check_engine(release, Model(path="x", engine=engine, previous="last.qsa"))
    check_engine(release, Model(path="x", engine="vllm" if engine == "transformers" else "transformers"))

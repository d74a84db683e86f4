"""What the tests share: small checkpoints on disk, and projects that use them."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test reaches out
from checkpoint_folders import Project, save_llama, save_quantized_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Return the folder of a small Llama with its tokenizer."""
    return save_llama(tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.fixture(scope="session")
def changed_llama(tmp_path_factory):
    """Return the same Llama with the down projection of its layer 2 three times as large."""

    def change(weights):
        weights["model.layers.2.mlp.down_proj.weight"] *= 3

    return save_llama(tmp_path_factory.mktemp("checkpoints") / "changed", change)


@pytest.fixture(scope="session")
def int8_llama(tmp_path_factory, llama):
    """Return the small Llama in int8 by compressed-tensors: a scale a row, activations quantized as they come."""
    return save_quantized_llama(tmp_path_factory.mktemp("checkpoints") / "int8", llama)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a user's empty project, one for the module."""
    return Project(tmp_path_factory.mktemp("project") / "project")


@pytest.fixture
def own_project(tmp_path):
    """Return a user's empty project for one test."""
    return Project(tmp_path / "project")

"""Keys: which tensors are missing, unexpected or renamed by the index, the configuration, or the sibling blocks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_qsa.checkpoint import INDEX, Files, open_folder, problems_of

BLOCK = ("attn.q.weight", "attn.k.weight", "attn.o.weight", "mlp.up.weight", "mlp.down.weight", "norm.weight")
LAYERS = [f"model.layers.{index}.{part}" for index in range(4) for part in BLOCK]
MISSING = "missing: 3 sibling blocks have it"
UNEXPECTED = "unexpected: none of 3 sibling blocks has it"


def renamed(names, old, new):
    return [new if name == old else name for name in names]


def without(names, *lost):
    return [name for name in names if not name.startswith(lost)]


VISION = [f"vision.blocks.{index}.norm.weight" for index in range(2)]
EXPERTS = [f"{name.rpartition('.mlp')[0]}.mlp.experts.{e}.up.weight" for name in LAYERS[3::6] for e in range(3)]
CASES = {
    # case: (names, configuration, tensor → what is wrong with it)
    "whole": (LAYERS, {}, {}),
    "one is lost": (without(LAYERS, "model.layers.2.mlp.up"), {}, {"model.layers.2.mlp.up.weight": MISSING}),
    "one too many": ([*LAYERS, "model.layers.1.attn.q.bias"], {}, {"model.layers.1.attn.q.bias": UNEXPECTED}),
    "one is renamed": (
        renamed(LAYERS, "model.layers.0.norm.weight", "model.layers.0.ln.weight"), {},
        {"model.layers.0.norm.weight": MISSING, "model.layers.0.ln.weight": UNEXPECTED},
    ),
    "a block in the middle is lost": (
        without(LAYERS, "model.layers.1."), {}, {"model.layers.1": "missing: 3 of 4 members of model.layers are there"},
    ),
    "the last block is lost, and the configuration counts it": (
        without(LAYERS, "model.layers.3."), {"num_hidden_layers": 4},
        {"model.layers.3": "missing: 3 of 4 members of model.layers are there"},
    ),
    "the last block is lost, and nothing counts it": (without(LAYERS, "model.layers.3."), {}, {}),
    "the configuration counts the trunk and not the vision tower": (
        [*LAYERS, *VISION], {"num_hidden_layers": 4}, {},
    ),
    "the count of the text model in a multimodal one": (
        without(LAYERS, "model.layers.3."), {"text_config": {"num_hidden_layers": 4}},
        {"model.layers.3": "missing: 3 of 4 members of model.layers are there"},
    ),
    "the configuration counts fewer blocks than there are": (
        LAYERS, {"num_hidden_layers": 3},
        {"model.layers.3": "unexpected: num_hidden_layers is 3, and model.layers has 4 members"},
    ),
    "a head of several tokens behind the last block": (
        [*LAYERS, *(f"model.layers.3.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "head.norm"))],
        {"num_hidden_layers": 3}, {},
    ),
    "a decoder that is shorter than the encoder beside it": (
        [*(name.replace("model", "model.encoder") for name in LAYERS),
         *(name.replace("model", "model.decoder") for name in LAYERS[:12])],
        {"num_hidden_layers": 4, "decoder_layers": 2}, {},
    ),
    "an expert is lost": (
        without([*LAYERS, *EXPERTS], "model.layers.1.mlp.experts.1."), {},
        {
            "model.layers.1.mlp.experts.1": "missing: 2 of 3 members of model.layers.1.mlp.experts are there",
            "model.layers.1.mlp.experts.1.up.weight": MISSING,
        },
    ),
    "two blocks are too few to say which is wrong": (
        without(LAYERS, "model.layers.2.", "model.layers.3.", "model.layers.1.norm"), {}, {},
    ),
    "a head that ties don't replace is lost": (
        ["model.embed_tokens.weight"], {"architectures": ["XForCausalLM"], "tie_word_embeddings": False},
        {"lm_head.weight": "missing, though tie_word_embeddings is false"},
    ),
    "a head that ties replace": (
        ["model.embed_tokens.weight"], {"architectures": ["XForCausalLM"], "tie_word_embeddings": True}, {},
    ),
    "fewer embeddings than tokens": (
        ["model.embed_tokens.weight"], {"vocab_size": 9},
        {"model.embed_tokens.weight": "2 rows, but the vocabulary has 9 tokens"},
    ),
}  # fmt: skip


def keys(folder, names, config, index=None):
    folder.mkdir(exist_ok=True)
    save_file({name: np.ones((2, 2), np.float32) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    findings = problems_of(Files(open_folder(folder)), "checkpoint_keys")[1]
    return {finding.tensor: finding.what for finding in findings}


@pytest.mark.parametrize("case", CASES)
def test_keys_that_are_missing_or_unexpected_are_named(tmp_path, case):
    names, config, wrong = CASES[case]
    assert keys(tmp_path, names, config) == wrong


INDEXES = {
    "whole": ({}, {}),
    "a tensor that its file lacks": (
        {"model.norm.weight": "model.safetensors"},
        {"model.norm.weight": "the index says model.safetensors, which lacks it"},
    ),
    "a file that is not there": (
        {"model.norm.weight": "other.safetensors"},
        {"other.safetensors": "the file is not there (1 tensor)"},
    ),
    "a tensor that it does not name": (
        {"model.layers.0.norm.weight": None}, {"model.layers.0.norm.weight": f"not in {INDEX}"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXES)
def test_shards_are_held_against_their_index(tmp_path, case):
    changes, wrong = INDEXES[case]
    index = {name: file for name, file in (dict.fromkeys(LAYERS, "model.safetensors") | changes).items() if file}
    assert keys(tmp_path, LAYERS, {}, index) == wrong

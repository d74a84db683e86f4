"""Keys that a loader drops or fills with random numbers: by the index, the number of blocks, siblings and shapes."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_qsa.checkpoint import Files, open_folder, problems_of

BLOCK = ("norm.weight", "up.weight", "down.weight", "gate.weight")
CAUSAL = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "vocab_size": 10}
TABLE = {"model.embed_tokens.weight": (10, 4), "lm_head.weight": (10, 4)}


def blocks(*numbers, at="model.layers", keys=BLOCK, without=(), more=()):
    """Return the keys of numbered blocks, some left out or added."""
    names = {f"{at}.{number}.{key}" for number in numbers for key in keys}
    return dict.fromkeys(sorted(names - set(without) | set(more)), (4,))


KEYS = {
    # case: (tensors with their shapes, configuration, what is missing, what is unexpected)
    "nothing lost": (blocks(0, 1, 2, 3), {"num_hidden_layers": 4}, [], []),
    "a block in the middle": (blocks(0, 1, 3), {}, ["model.layers.2"], []),
    "the last blocks, by the configuration": (
        blocks(0, 1), {"num_hidden_layers": 4}, ["model.layers.2", "model.layers.3"], [],
    ),
    "the last blocks of a text model in a larger one": (
        blocks(0, 1), {"text_config": {"num_hidden_layers": 3}}, ["model.layers.2"], [],
    ),
    "the first block": (blocks(1, 2), {}, ["model.layers.0"], []),
    "a list of one member": (blocks(3), {}, [], []),
    "a vision tower of its own depth": (
        blocks(0, 1, at="vision.layers") | blocks(0, 1, 2), {"num_hidden_layers": 3}, [], [],
    ),
    "a block of a vision tower": (blocks(0, 2, at="vision.layers"), {}, ["vision.layers.1"], []),
    "an expert": (
        blocks(0, 1, 3, at="model.layers.0.mlp.experts", keys=("up.weight",)), {}, ["model.layers.0.mlp.experts.2"], [],
    ),
    "a key of one block": (
        blocks(0, 1, 2, 3, without=["model.layers.1.up.weight"]), {}, ["model.layers.1.up.weight"], [],
    ),
    "a key that one block alone has": (
        blocks(0, 1, 2, 3, more=["model.layers.1.up.weigth"]), {}, [], ["model.layers.1.up.weigth"],
    ),
    "a key of another name": (
        blocks(0, 1, 2, 3, keys=(*BLOCK, "q.weight", "k.weight"), without=["model.layers.1.up.weight"],
               more=["model.layers.1.upp.weight"]),
        {}, ["model.layers.1.up.weight"], ["model.layers.1.upp.weight"],
    ),
    "two blocks that differ": (blocks(0, 1, without=["model.layers.1.up.weight"]), {}, [], []),
    "a kind of block of its own": (
        blocks(1, 2, 3) | blocks(0, keys=("norm.weight", "mamba.weight", "conv.weight")), {}, [], [],
    ),
    "an output head": ({"model.embed_tokens.weight": (10, 4)}, CAUSAL, ["lm_head.weight"], []),
    "an output head that is tied": (
        {"model.embed_tokens.weight": (10, 4)}, CAUSAL | {"tie_word_embeddings": True}, [], [],
    ),
    "a model without a head": (
        {"model.embed_tokens.weight": (10, 4)}, CAUSAL | {"architectures": ["LlamaModel"]}, [], [],
    ),
    "a head by the name of its files": ({"wte.weight": (10, 4), "output.weight": (10, 4)}, CAUSAL, [], []),
}  # fmt: skip


@pytest.fixture
def found(tmp_path):
    """Return a function that writes a checkpoint of zeros and returns the problems of its keys."""

    def found(tensors, config, index=None):
        save_file(
            {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, tmp_path / "model.safetensors"
        )
        (tmp_path / "config.json").write_text(json.dumps(config))
        if index is not None:
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return problems_of(Files(open_folder(tmp_path), None), "checkpoint_keys")[1]

    return found


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_are_missing_or_unexpected_are_named(found, case):
    tensors, config, missing, unexpected = KEYS[case]
    problems = found(tensors, config)
    assert [problem.tensor for problem in problems if problem.what.startswith("missing")] == missing
    assert [problem.tensor for problem in problems if problem.what.startswith("unexpected")] == unexpected
    assert len(problems) == len(missing) + len(unexpected)


@pytest.mark.parametrize(
    ("rows", "problems"),
    [(10, []), (12, []), (9, [("model.embed_tokens.weight", "9 rows, but the vocabulary has 10")])],
)
def test_embeddings_have_a_row_for_each_token_at_least(found, rows, problems):
    told = found(TABLE | {"model.embed_tokens.weight": (rows, 4)}, CAUSAL)
    assert [(problem.tensor, problem.what.removesuffix(" tokens")) for problem in told] == problems


FILE = "model.safetensors"
INDEXES = {
    # case: (what the index says, what is said of each tensor)
    "all of them": (dict.fromkeys(TABLE, FILE), {}),
    "a tensor that the file lacks": (
        dict.fromkeys([*TABLE, "gone"], FILE), {"gone": f"the index says {FILE}, which lacks it"},
    ),
    "a file that is not there": (
        {**dict.fromkeys(TABLE, FILE), "gone": "2.safetensors"},
        {"gone": "the index says 2.safetensors, which is not there"},
    ),
    "a tensor that the index lacks": (
        {"lm_head.weight": FILE}, {"model.embed_tokens.weight": "not in model.safetensors.index.json"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXES)
def test_the_index_and_the_files_name_the_same_tensors(found, case):
    index, said = INDEXES[case]
    assert {problem.tensor: problem.what for problem in found(TABLE, CAUSAL, index)} == said

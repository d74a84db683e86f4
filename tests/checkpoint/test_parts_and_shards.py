"""Parts of a model that are gone as a whole, and files of which loaders read different bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_qsa.checkpoint.checks.health import Files, problems_of
from pytest_qsa.checkpoint.folder import INDEX, open_folder
from pytest_qsa.common.errors import AnomalyError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BLOCK = ("norm.weight", "attn.q_proj.weight", "attn.k_proj.weight", "mlp.up_proj.weight")
CORE = {"model.embed_tokens.weight": 4, "model.norm.weight": 4}


def model(blocks=3, extra=(), without=()):
    """Return the tensors of a small model by name, each of other numbers."""
    names = [*CORE, *(f"model.layers.{i}.{part}" for i in range(blocks) for part in BLOCK), *extra]
    tensors = {name: np.arange(16, dtype=np.float32).reshape(4, 4) + index for index, name in enumerate(names)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(without) or ("-",))}


def saved(folder, files, *, index=None, **config):
    """Write a checkpoint: file → tensors, an index (name → file) and a configuration."""
    folder.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def single(folder, tensors, **config):
    return saved(folder, {"model.safetensors": tensors}, **config)


def sharded(folder, tensors, change=lambda one, two, index: None, **files):
    names = sorted(tensors)
    one, two = ({name: tensors[name] for name in part} for part in (names[: len(names) // 2], names[len(names) // 2 :]))
    index = {**dict.fromkeys(one, ONE), **dict.fromkeys(two, TWO)}
    change(one, two, index)
    return saved(folder, {ONE: one, TWO: two, **files}, index=index)


def keys(folder, reference=None, metric="checkpoint_keys", notes=False):
    files = Files(open_folder(folder), open_folder(reference) if reference else None)
    return {each.tensor: each.what for each in problems_of(files, metric)[1] if each.note == notes}


MTP = ("mtp.fc.weight", "mtp.layers.0.attn.q_proj.weight")
DEEPSEEK_MTP = tuple(f"model.layers.3.{part}" for part in (*BLOCK, "eh_proj.weight", "enorm.weight"))
GONE = {
    "a head of several tokens": (MTP, ("mtp",), "mtp", "gone, the reference has its 2 layers: a server's speculative"),
    "DeepSeek's, a block behind the last": (
        DEEPSEEK_MTP, ("model.layers.3",), "model.layers.3", "gone, the reference has its 6 layers: a server's spec",
    ),
    "a vision tower": (
        ("vision_tower.blocks.0.fc.weight", "vision_tower.blocks.1.fc.weight"), ("vision_tower",),
        "vision_tower", "gone, the reference has its 2 layers",
    ),
    "a projector": (("projector.fc.weight",), ("projector",), "projector", "gone, the reference has its 1 layer"),
    "the final norm": ((), ("model.norm",), "model.norm", "gone, the reference has it"),
    "the output head": (("lm_head.weight",), ("lm_head",), "lm_head", "gone, the reference has it"),
    "a norm of each block": (
        (), tuple(f"model.layers.{i}.norm" for i in range(3)), "model.layers.*.norm", "gone, the reference has its 3",
    ),
    "each router": (
        tuple(f"model.layers.{i}.mlp.gate.weight" for i in range(3)),
        tuple(f"model.layers.{i}.mlp.gate" for i in range(3)),
        "model.layers.*.mlp.gate", "gone, the reference has its 3 layers",
    ),
    "what a module holds beside its members": (
        tuple(f"model.layers.{i}.attn.sinks" for i in range(3)),
        tuple(f"model.layers.{i}.attn.sinks" for i in range(3)),
        "model.layers.*.attn.sinks", "gone, the reference has its 3 layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("metric", ["checkpoint_keys", "checkpoint_unquantized"])
@pytest.mark.parametrize("case", GONE)
def test_a_part_that_the_reference_has_and_that_is_gone_is_named_once(tmp_path, case, metric):
    extra, without, part, said = GONE[case]
    reference = single(tmp_path / "reference", model(extra=extra), num_hidden_layers=3)
    folder = single(tmp_path / "own", model(extra=extra, without=without), num_hidden_layers=3)
    found = keys(folder, reference, metric)
    assert list(found) == [part]
    assert found[part].startswith(said)
    assert keys(reference, reference, metric) == {}


def test_an_expert_or_a_block_of_a_tower_is_no_head_of_several_tokens(tmp_path):
    extra = [f"{part}.{i}.fc.weight" for part in ("model.layers.0.mlp.experts", "visual.blocks") for i in range(5)]
    reference = single(tmp_path / "reference", model(extra=extra), num_hidden_layers=3)
    lost = ("model.layers.0.mlp.experts.4", "visual.blocks.4")
    folder = single(tmp_path / "own", model(extra=extra, without=lost), num_hidden_layers=3)
    assert keys(folder, reference) == dict.fromkeys(lost, "gone, the reference has its 1 layer")
    tower = single(tmp_path / "tower", model(extra=["vision_tower.layers.4.fc.weight"]), num_hidden_layers=3)
    (tower / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "num_nextn_predict_layers": 1}))
    assert list(keys(tower)) == ["model.layers.3"]


def test_a_part_that_the_reference_lacks_is_a_note_and_an_adapter_that_was_not_merged_a_problem(tmp_path):
    reference = single(tmp_path / "reference", model(), num_hidden_layers=3)
    mask = "model.layers.0.attn.rotary_emb.inv_freq"
    folder = single(tmp_path / "own", model(extra=(*MTP, "lm_head.weight", mask)), num_hidden_layers=3)
    assert keys(folder, reference) == {}
    assert keys(folder, reference, notes=True) == {"mtp": "added (2 layers), the reference has none"}
    adapted = [f"model.layers.0.attn.q_proj.lora_{side}.weight" for side in "AB"]
    left = keys(single(tmp_path / "left", model(extra=adapted), num_hidden_layers=3), reference)
    said = "of an adapter that wasn't merged (2 such layers): loaders leave it out"
    assert left == {"model.layers.0.attn.q_proj.lora_A": said}


def test_what_was_renamed_fused_tied_or_can_be_computed_is_not_gone(tmp_path):
    extra = ("lm_head.weight", "model.layers.0.attn.rotary_emb.inv_freq", "model.layers.0.mlp.experts.up_proj")
    reference = single(tmp_path / "reference", model(extra=extra), tie_word_embeddings=True)
    fused = model()
    for index in range(3):
        for part in ("q_proj", "k_proj"):
            del fused[f"model.layers.{index}.attn.{part}.weight"]
        fused[f"model.layers.{index}.attn.qkv_proj.weight"] = np.ones((4, 4), np.float32)
    fused["model.layers.0.mlp.experts.0.up_proj.weight"] = np.ones((4, 4), np.float32)
    folder = single(tmp_path / "own", fused, tie_word_embeddings=True)
    assert not any("gone" in what for what in keys(folder, reference).values())
    assert not any("added" in what for what in keys(folder, reference, notes=True).values())
    masks = {
        "model.layers.0.attn.bias": np.ones((1, 1, 4, 4), "f4"),
        "model.layers.0.attn.masked_bias": np.ones((), "f4"),
    }
    older = single(tmp_path / "older", model() | masks, num_hidden_layers=3)  # GPT-2's causal mask
    assert keys(single(tmp_path / "newer", model(), num_hidden_layers=3), older) == {}


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"num_nextn_predict_layers": 1}, "model.layers.3"),
        ({"mtp_num_hidden_layers": 1}, "mtp"),
        ({"vision_config": {"a": 1}}, "vision_config"),
        ({"audio_config": {"a": 1}}, "audio_config"),
        ({"thinker_config": {"audio_config": {"a": 1}}}, "audio_config"),
    ],
)
def test_a_part_that_the_configuration_promises_is_missed_without_a_reference(tmp_path, config, part):
    folder = single(tmp_path / "own", model(), num_hidden_layers=3, **config)
    assert list(keys(folder)) == [part]
    extra = (*MTP, "visual.fc.weight", "audio_tower.fc.weight")
    assert keys(single(tmp_path / "whole", model(extra=extra), num_hidden_layers=3, **config)) == {}
    # what the original lacks as well was never there
    assert keys(folder, single(tmp_path / "reference", model(), num_hidden_layers=3, **config)) == {}


def test_a_router_that_is_quantized_is_a_note_that_names_the_practice(tmp_path):
    names = [f"model.layers.{i}.mlp.gate.weight" for i in range(3)]
    reference = single(tmp_path / "reference", model(extra=names))
    codes = {name: np.arange(16, dtype=np.int8).reshape(4, 4) for name in names}
    scales = {f"{name}_scale": np.ones((4, 1), np.float32) for name in names}
    folder = single(tmp_path / "own", model() | codes | scales)
    found = keys(folder, reference, "checkpoint_formats", notes=True)
    assert list(found) == ["model.layers.*.mlp.gate"]
    assert found["model.layers.*.mlp.gate"].startswith("quantized (3 such layers); a router is kept in 16 bits")


def test_a_tied_head_that_is_written_in_codes_is_a_problem(tmp_path):
    head = {"lm_head.weight": np.arange(16, dtype=np.int8).reshape(4, 4), "lm_head.weight_scale": np.ones((4, 1), "f4")}
    quantization = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {}}
    folder = single(tmp_path / "own", model() | head, tie_word_embeddings=True, quantization_config=quantization)
    assert keys(folder, metric="checkpoint_formats")["lm_head.weight"].startswith(
        "quantized, though it is tied to model.emb"
    )


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])  # one in each shard
def test_a_tensor_in_two_files_is_named_with_the_file_that_the_index_means(tmp_path, name):
    def stale(one, two, index):
        home, other = (one, two) if name in one else (two, one)
        other[name] = home[name] * 4

    folder = sharded(tmp_path / "own", model(), stale)
    home = json.loads((folder / INDEX).read_text())["weight_map"][name]
    found = keys(folder)
    assert list(found) == [name]
    assert f"the index names {home}" in found[name]
    assert open_folder(folder).tensors[name].file == home

    def copied(one, two, index):
        home, other = (one, two) if name in one else (two, one)
        other[name] = home[name]

    same = sharded(tmp_path / "same", model(), copied)
    assert keys(same) == {}
    assert list(keys(same, notes=True)) == [name]


def test_an_index_that_names_another_shard_than_the_one_which_holds_a_tensor_is_told(tmp_path):
    def moved(one, two, index):
        index["model.embed_tokens.weight"] = TWO

    found = keys(sharded(tmp_path / "own", model(), moved))
    said = f"the index says {TWO}, which lacks it; {ONE} has it: loaders that go by the index don't find it"
    assert found == {"model.embed_tokens.weight": said}


def test_a_single_file_beside_shards_is_named_with_who_reads_which(tmp_path):
    old = {name: tensor * (3 if name == "model.norm.weight" else 1) for name, tensor in model().items()}
    found = keys(sharded(tmp_path / "own", model(), **{"model.safetensors": old}))
    assert list(found) == ["model.safetensors"]
    for text in (
        "transformers reads this file, vLLM and SGLang the shards",
        "1 of 14 tensors differ, as model.norm",
    ):
        assert text in found["model.safetensors"]
    damaged = {**model(), "model.embed_tokens.weight": np.full((4, 4), np.nan, np.float32)}
    both = sharded(tmp_path / "both", damaged, **{"model.safetensors": old})
    assert list(keys(both, metric="checkpoint_health")) == ["model.safetensors", "model.embed_tokens.weight"]
    same = sharded(tmp_path / "same", model(), **{"model.safetensors": model()})
    assert keys(same) == {}
    assert list(keys(same, notes=True)) == ["model.safetensors"]


def test_a_stale_copy_beside_a_single_file_that_the_index_names_is_found(tmp_path):
    index = dict.fromkeys(model(), "model.safetensors")
    stale = {"model.norm.weight": model()["model.norm.weight"] * 4}
    folder = saved(tmp_path / "own", {"model.safetensors": model(), "other.safetensors": stale}, index=index)
    assert "the index names model.safetensors" in keys(folder)["model.norm.weight"]


def test_the_shards_of_an_index_are_checked_where_a_single_file_hides_them(tmp_path):
    def damaged(one, two, index):
        (one if "model.norm.weight" in one else two)["model.norm.weight"] = np.full((4, 4), np.nan, np.float32)

    folder = sharded(tmp_path / "own", model(), damaged, **{"model.safetensors": model()})
    assert "model.norm.weight" in keys(folder, metric="checkpoint_weights")


def test_a_shard_that_is_not_there_is_one_line(tmp_path):
    folder = sharded(tmp_path / "own", model())
    (folder / TWO).unlink()
    assert keys(folder) == {TWO: "shard 2 of 2 is not there (7 tensors)"}
    (folder / INDEX).unlink()
    assert keys(folder) == {TWO: "shard 2 of 2 is not there"}


def test_a_shard_of_an_older_export_is_a_leftover_and_promises_no_others(tmp_path):
    old = {"model.norm.weight": model()["model.norm.weight"] * 4}
    folder = sharded(tmp_path / "own", model(), **{"model-00001-of-00003.safetensors": old})
    found = keys(folder)
    assert list(found) == ["model.norm.weight"]
    assert "model-00001-of-00003.safetensors" in found["model.norm.weight"]
    (folder / ONE).unlink()
    assert keys(folder) == {ONE: "shard 1 of 2 is not there (7 tensors)"}


def test_shards_without_an_index_and_a_file_that_no_index_names_are_told(tmp_path):
    folder = sharded(tmp_path / "own", model())
    (folder / INDEX).unlink()
    assert keys(folder) == {INDEX: "there is none, and the tensors lie in shards: transformers finds no weights"}
    more = sharded(tmp_path / "more", model(), **{"extra.safetensors": {"model.extra.weight": np.ones((4, 4), "f4")}})
    assert list(keys(more)) == ["extra.safetensors"]
    assert "does not name this file (1 tensor, as model.extra.weight)" in keys(more)["extra.safetensors"]


@pytest.mark.parametrize("name", ["consolidated", "consolidated.00", "optimizer", "training_state", "rng_state_0"])
def test_files_that_are_no_part_of_the_model_are_left_alone(tmp_path, name):
    other = {"layers.0.attention.wq.weight": np.full((4, 4), np.nan, np.float32)}
    folder = sharded(tmp_path / "own", model(), **{f"{name}.safetensors": other})
    for metric in ("checkpoint_keys", "checkpoint_weights"):
        assert keys(folder, metric=metric) == {}


HEALTHY = {
    "T5 shares its bias in the first block": (("model.layers.0.attn.relative_attention_bias.weight",), ()),
    "RWKV has a norm before the first block": (("model.layers.0.pre_ln.weight",), ()),
    "a sequence with an activation between": (("visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"), ()),
    "ModernBERT's first block has no norm of its own": (
        tuple(f"model.layers.{i}.attn_norm.weight" for i in (1, 2)), (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEALTHY)
def test_blocks_that_differ_by_design_are_healthy(tmp_path, case):
    extra, without = HEALTHY[case]
    assert keys(single(tmp_path / "own", model(extra=extra, without=without))) == {}


def test_a_block_that_is_as_odd_in_the_reference_is_healthy(tmp_path):
    odd = model(blocks=4, without=("model.layers.2.norm",))
    reference = single(tmp_path / "reference", odd)
    folder = single(tmp_path / "own", odd)
    assert keys(folder) == {"model.layers.2.norm.weight": "missing: 3 sibling blocks have it"}
    assert keys(folder, reference) == {}


def test_a_shard_that_is_cut_short_is_told_with_its_tensor(tmp_path):
    folder = sharded(tmp_path / "own", model())
    with (folder / TWO).open("rb+") as file:
        file.truncate((folder / TWO).stat().st_size - 5)
    with pytest.raises(AnomalyError, match="cut short"):
        keys(folder)

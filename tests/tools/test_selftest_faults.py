"""The faults of `qsa selftest` in order, parts, files and settings: what each changes, and that it is found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qsa.checkpoint.checks.health import Files, problems_of
from pytest_qsa.checkpoint.folder import open_folder
from pytest_qsa.checkpoint.formats.format import format_of
from pytest_qsa.tools.selftest.faults import FAULTS
from pytest_qsa.tools.selftest.mutant import Mutant
from support.checkpoints import edit_json, edited, save_quantized_llama, save_quantized_moe, save_words
from support.paths import ROOT

FORMATS = ROOT / "tests" / "checkpoint" / "fixtures" / "formats"
IN_FILES = sorted(folder.name for folder in FORMATS.iterdir() if folder.is_dir() and not folder.name.startswith("gguf"))
GPTQ = ("gptq_v2", "gptq_by_auto-round", "gptq_desc_act", "gptq_3_bits_by_auto-round")


def broken(source, target, fault, layer=None):
    """Put a fault into a copy; return its folder, and the layers that it touches."""
    folder = open_folder(source)
    targets = list(FAULTS[fault].targets(folder))
    assert layer is None or layer in targets
    layer = layer or targets[len(targets) // 2]
    mutant = Mutant(folder)
    FAULTS[fault].inject(mutant, layer, FAULTS[fault].default)
    assert mutant.changed
    return mutant.save(target), mutant.layers | {layer}


def problems(folder, reference=None, check="checkpoint_health"):
    files = Files(open_folder(folder), reference and open_folder(reference))
    return [found for found in problems_of(files, check)[1] if not found.note]


def named(found, layers):
    return [each for each in found if each.layer in layers]


def weights(folder):
    return load_file(folder / "model.safetensors")


def rows(folder, layer):
    return format_of(open_folder(folder)).stored_rows(layer)


@pytest.mark.parametrize("name", IN_FILES)
def test_a_stale_copy_in_another_shard_is_found_in_every_format(tmp_path, name):
    copy, layers = broken(FORMATS / name, tmp_path / "copy", "stale_duplicate")
    (found,) = problems(copy, FORMATS / name)
    assert found.layer in layers
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = (load_file(copy / file) for file in sorted(set(index.values())))
    assert set(first) & set(second) == {found.tensor}
    assert set(index) == set(first) | set(second)
    stated, stale = (first, second) if index[found.tensor].startswith("model-00001") else (second, first)
    original = open_folder(FORMATS / name).tensors[found.tensor].values()
    np.testing.assert_array_equal(stated[found.tensor].double().numpy().ravel(), original.ravel())
    assert not torch.equal(stale[found.tensor], stated[found.tensor])


@pytest.mark.parametrize("name", GPTQ)
def test_the_other_version_of_zero_points_is_found_where_they_are_symmetric(tmp_path, name):
    copy, layers = broken(FORMATS / name, tmp_path / "copy", "zero_point_version")
    assert named(problems(copy), layers)
    layer = next(iter(layers))
    step = rows(copy, layer) - rows(FORMATS / name, layer)
    assert np.abs(step).min() > 0  # every weight is off by one code


def test_a_block_that_repeats_the_one_before_it_is_wholly_that(int8_llama, tmp_path):
    copy, layers = broken(int8_llama, tmp_path / "copy", "layer_copied", "model.layers.2")
    before, after = weights(int8_llama), weights(copy)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name.replace("layers.2.", "layers.1.")])
    assert "model.layers.2.mlp.down_proj" in layers
    assert not any(".1." in layer for layer in layers)


@pytest.mark.parametrize("preset", ["W8A8", "W4A16", "FP8", "NVFP4", "MXFP4"])
def test_rows_in_the_other_layout_of_the_rope_are_the_same_rows_with_their_scales(tmp_path, preset):
    changes = {"group_size": 16} if preset in ("W4A16", "NVFP4") else {}
    healthy = save_quantized_moe(tmp_path / "healthy", preset, **changes)
    copy, layers = broken(healthy, tmp_path / "copy", "rope_interleaved")
    assert len(layers) == 4  # q and k of two blocks
    for layer in sorted(layers):
        mine, theirs = rows(copy, layer), rows(healthy, layer)
        by_head = theirs.reshape(-1, 2, 4, theirs.shape[1])  # head, half, pair
        np.testing.assert_array_equal(mine, np.stack([by_head[:, 0], by_head[:, 1]], 2).reshape(theirs.shape))


WORDS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False},
    "gptq of 8 bits": {"quant_method": "gptq", "bits": 8, "group_size": 16, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
}


@pytest.mark.parametrize("form", [*WORDS, "compressed-tensors"])
def test_rows_whose_zero_points_lie_in_shared_words_are_moved_with_them(llama, tmp_path, form):
    if form in WORDS:
        healthy = save_words(llama, tmp_path / "healthy", WORDS[form])
    else:
        healthy = save_quantized_llama(tmp_path / "healthy", llama, "W4A16", group_size=16, symmetric=False)
    copy, layers = broken(healthy, tmp_path / "copy", "rope_interleaved")
    assert len(layers) == 8  # q and k of four blocks
    for layer in sorted(layers):
        mine, theirs = rows(copy, layer), rows(healthy, layer)
        assert not np.array_equal(mine, theirs)
        by_head = theirs.reshape(-1, 2, 4, theirs.shape[1])  # head, half, pair
        np.testing.assert_array_equal(mine, np.stack([by_head[:, 0], by_head[:, 1]], 2).reshape(theirs.shape))


def test_rows_of_bitsandbytes_in_four_bits_are_moved_with_the_largest_of_their_blocks(tmp_path):
    chance, tensors = np.random.default_rng(0), {}
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [16, 64]}).encode()
    for name in ("q_proj", "k_proj"):
        stem = f"model.layers.0.self_attn.{name}.weight"
        tensors[stem] = chance.integers(0, 256, (16 * 32, 1)).astype(np.uint8)
        tensors[f"{stem}.absmax"] = chance.uniform(0.5, 1, 16).astype(np.float32)
        tensors[f"{stem}.quant_map"] = np.linspace(-1, 1, 16, dtype=np.float32)
        tensors[f"{stem}.quant_state.bitsandbytes__nf4"] = np.frombuffer(state, np.uint8)
    healthy = tmp_path / "healthy"
    healthy.mkdir()
    save_file(
        {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, healthy / "model.safetensors"
    )
    declared = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = {"num_attention_heads": 2, "hidden_size": 64, "head_dim": 8, "quantization_config": declared}
    (healthy / "config.json").write_text(json.dumps(config))
    copy, layers = broken(healthy, tmp_path / "copy", "rope_interleaved")
    assert len(layers) == 2
    for layer in sorted(layers):
        mine, theirs = rows(copy, layer), rows(healthy, layer)
        by_head = theirs.reshape(-1, 2, 4, theirs.shape[1])  # head, half, pair
        np.testing.assert_array_equal(mine, np.stack([by_head[:, 0], by_head[:, 1]], 2).reshape(theirs.shape))


def test_experts_in_another_order_are_whole_experts(tmp_path):
    healthy = save_quantized_moe(tmp_path / "moe", "W8A8")
    copy, layers = broken(healthy, tmp_path / "copy", "experts_permuted", "model.layers.1.mlp.experts")
    before, after = weights(healthy), weights(copy)
    for name, tensor in after.items():
        if (stem := "model.layers.1.mlp.experts.") in name:
            number, _, rest = name.removeprefix(stem).partition(".")
            assert torch.equal(tensor, before[f"{stem}{(int(number) - 1) % 4}.{rest}"])
        else:
            assert torch.equal(tensor, before[name])
    assert "model.layers.1.mlp.experts.2.up_proj" in layers


def test_twelve_experts_are_sorted_as_text(tmp_path):
    stem = "model.layers.0.mlp.experts"
    save_file({f"{stem}.{i}.up_proj.weight": torch.full((4, 4), float(i)) for i in range(12)},
              tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    copy, _ = broken(tmp_path, tmp_path / "copy", "experts_permuted")
    found = [int(weights(copy)[f"{stem}.{i}.up_proj.weight"][0, 0]) for i in range(12)]
    assert found == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_packed_experts_in_another_order_are_named_by_expert(tmp_path):
    copy, layers = broken(FORMATS / "mxfp4_gpt-oss", tmp_path / "copy", "experts_permuted")
    block = next(layer for layer in layers if layer.endswith(".experts"))
    before, after = weights(FORMATS / "mxfp4_gpt-oss"), weights(copy)
    moved = {name for name in before if not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))}
    assert moved
    for name in moved:
        assert name.startswith(block)
        assert torch.equal(after[name], before[name].roll(1, 0))
    assert any(layer.endswith(".experts.1.down_proj") for layer in layers)


def with_kv_scales(source, target):
    def scales(tensors):
        for block in range(4):
            for part in ("k_scale", "v_scale"):
                tensors[f"model.layers.{block}.self_attn.{part}"] = torch.tensor([0.05 + 0.01 * block])

    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    return edited(
        source, target, scales, config=lambda config: config["quantization_config"].update(kv_cache_scheme=scheme)
    )


def test_scales_of_the_kv_cache_are_one_or_lost(int8_llama, tmp_path):
    healthy = with_kv_scales(int8_llama, tmp_path / "healthy")
    assert not problems(healthy)
    copy, layers = broken(healthy, tmp_path / "ones", "kv_scales_one")
    assert named(problems(copy), layers)
    assert {float(tensor) for name, tensor in weights(copy).items() if name.endswith(("k_scale", "v_scale"))} == {1.0}
    lost, _ = broken(healthy, tmp_path / "lost", "kv_scales_lost")
    assert set(weights(healthy)) - set(weights(lost)) == {
        f"model.layers.{block}.self_attn.{part}" for block in range(4) for part in ("k_scale", "v_scale")
    }
    assert not list(FAULTS["kv_scales_one"].targets(open_folder(int8_llama)))


def test_a_global_scale_of_its_own_leaves_the_weight_and_is_found(tmp_path):
    healthy = edited(save_quantized_moe(tmp_path / "apart", "NVFP4"), tmp_path / "healthy", one_scale)
    layer = "model.layers.1.mlp.experts.2.up_proj"
    copy, layers = broken(healthy, tmp_path / "copy", "global_scale_unfused", layer)
    assert layers == {layer}
    np.testing.assert_array_equal(rows(copy, layer), rows(healthy, layer))
    whole = f"{layer}.weight_global_scale"
    assert torch.equal(weights(copy)[whole], weights(healthy)[whole] / 2)
    assert named(problems(copy), {layer})


def one_scale(tensors):
    """Give the members of each fused group the global scale of the first."""
    for name in [name for name in tensors if name.endswith("weight_global_scale")]:
        first = name.replace("up_proj", "gate_proj").replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        tensors[name] = tensors[first].clone()


@pytest.mark.parametrize("several", ["mtp", "model.layers.4"])
def test_a_head_of_several_tokens_is_lost_under_either_name(llama, int8_llama, tmp_path, several):
    def add(tensors):
        tensors[f"{several}.self_attn.q_proj.weight"] = torch.ones(32, 32)
        tensors[f"{several}.norm.weight"] = torch.ones(32)

    healthy, original = (edited(each, tmp_path / each.name, add) for each in (int8_llama, llama))
    copy, layers = broken(healthy, tmp_path / "copy", "mtp_lost")
    assert several in layers
    assert {name for name in weights(healthy) if name not in weights(copy)} == {
        f"{several}.self_attn.q_proj.weight", f"{several}.norm.weight",
    }  # fmt: skip
    assert named(problems(copy, original, "checkpoint_unquantized"), layers)


@pytest.mark.parametrize("preset", ["W8A8", "FP8"])
def test_a_tied_head_is_written_in_codes_of_the_embedding(llama, tmp_path, preset):
    def tie(tensors):
        del tensors["lm_head.weight"]

    apart = save_quantized_llama(tmp_path / "apart", llama, preset)
    healthy = edited(apart, tmp_path / "healthy", tie, config=lambda config: config.update(tie_word_embeddings=True))
    copy, layers = broken(healthy, tmp_path / "copy", "tied_head_quantized")
    assert layers == {"lm_head"}
    written = weights(copy)
    values = written["lm_head.weight"].double() * written["lm_head.weight_scale"].double()
    embedding = written["model.embed_tokens.weight"].double()
    assert (values - embedding).norm() / embedding.norm() < 0.04
    assert named(problems(copy), layers)


@pytest.mark.parametrize("form", [*WORDS, "W4A16", "NVFP4"])
def test_a_tied_head_in_few_bits_has_the_rows_of_another_layer(llama, tmp_path, form):
    def tie(tensors):
        del tensors["lm_head.weight"]

    if form in WORDS:
        apart = save_words(llama, tmp_path / "apart", WORDS[form])
    else:
        apart = save_quantized_llama(tmp_path / "apart", llama, form, **({"group_size": 16} if form == "W4A16" else {}))
    healthy = edited(apart, tmp_path / "healthy", tie, config=lambda config: config.update(tie_word_embeddings=True))
    copy, layers = broken(healthy, tmp_path / "copy", "tied_head_quantized")
    assert layers == {"lm_head"}
    parts = open_folder(copy).layers
    # the first with as many inputs as the head
    first = "model.layers.0.self_attn.k_proj" if form in WORDS else "model.layers.0.mlp.gate_proj"
    head, like, times = parts["lm_head"], parts[first], 320 // rows(healthy, first).shape[0]
    assert head.keys() == like.keys()
    for part, tensor in head.items():
        mine, theirs = tensor.raw(), like[part].raw()
        if mine.size != theirs.size:
            axis = int(form in WORDS)  # where the outputs are
            np.testing.assert_array_equal(mine, np.concatenate([theirs] * times, axis))
    assert named(problems(copy), layers)


def test_settings_files_are_broken_and_found(llama, tmp_path):
    healthy = tmp_path / "healthy"
    edited(llama, healthy, config=lambda config: config.update(rms_norm_eps=1e-5))
    (healthy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    copy, _ = broken(healthy, tmp_path / "stop", "stop_token_changed")
    assert json.loads((copy / "generation_config.json").read_text())["eos_token_id"] == 1
    assert [each.layer for each in problems(copy, healthy)] == ["generation_config.json"]
    copy, _ = broken(healthy, tmp_path / "cut", "truncation_saved")
    assert [each.layer for each in problems(copy, healthy)] == ["tokenizer"]
    copy, _ = broken(healthy, tmp_path / "absent", "setting_absent")
    before, after = (json.loads((each / "config.json").read_text()) for each in (healthy, copy))
    assert {key: value for key, value in before.items() if key not in after} == {"rms_norm_eps": 1e-5}
    # a setting that has the class's own default can be left out
    edit_json(healthy / "config.json", lambda config: config.update(rms_norm_eps=1e-6))
    assert not list(FAULTS["setting_absent"].targets(open_folder(healthy)))


def test_the_row_of_the_stop_token_is_scaled_in_the_head_or_in_the_embedding_tied_to_it(llama, tmp_path):
    for tied in (False, True):
        healthy = tmp_path / f"healthy{tied}"
        edited(llama, healthy, config=lambda config, tied=tied: config.update(tie_word_embeddings=tied))
        (healthy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
        head = "lm_head" if "lm_head" in open_folder(healthy).layers else "model.embed_tokens"
        copy, layers = broken(healthy, tmp_path / f"copy{tied}", "stop_row_scaled")
        assert layers == {head}
        own, made = (open_folder(each).tensors[f"{head}.weight"].values() for each in (healthy, copy))
        np.testing.assert_allclose(made[3], own[3] * 0.9, rtol=1e-2)
        np.testing.assert_array_equal(np.delete(made, 3, axis=0), np.delete(own, 3, axis=0))
    (healthy / "generation_config.json").unlink()
    edit_json(healthy / "config.json", lambda config: config.pop("eos_token_id", None))
    assert list(FAULTS["stop_row_scaled"].targets(open_folder(healthy))) == []


def test_what_a_file_of_blocks_cannot_have_is_not_put_into_it():
    folder = open_folder(FORMATS / "gguf_Q8_0", gguf_file="model.gguf")
    for fault in ("mtp_lost", "stale_duplicate", "tied_head_quantized", "setting_absent", "rope_interleaved"):
        assert list(FAULTS[fault].targets(folder)) == []


def test_the_tensors_of_a_copy_in_shards_are_those_of_the_original(int8_llama, tmp_path):
    copy, _ = broken(int8_llama, tmp_path / "copy", "stale_duplicate")
    assert not (copy / "model.safetensors").exists()
    assert Path(copy / "tokenizer.json").is_symlink()
    after = open_folder(copy).tensors
    for name, tensor in open_folder(int8_llama).tensors.items():
        np.testing.assert_array_equal(after[name].raw(), tensor.raw())

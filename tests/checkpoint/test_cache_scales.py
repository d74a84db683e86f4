"""Scales of inputs and of a KV cache: demanded where they are declared, and noted where all are one number."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from pytest_qsa.checkpoint import Files, open_folder, problems_of, scales_of_cache
from pytest_qsa.common.errors import InfraError

BLOCKS = 5
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
K_PROJ, MLA = ("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def calibrated(index):
    return 0.05 + 0.003 * (index * 7 % 11)


def checkpoint(folder, scales, config=None, *, projections=K_PROJ, algorithm=None, version="0.43.0", **quantization):
    """Write blocks of an attention in FP8, with `scales`: (block, k or v) → the scale of its cache, None for none."""
    torch.manual_seed(0)
    weights = {}
    for index in range(BLOCKS):
        for name in projections:
            layer = f"model.layers.{index}.self_attn.{name}"
            weights[f"{layer}.weight"] = (torch.randn(8, 16) * 100).to(torch.float8_e4m3fn)
            weights[f"{layer}.weight_scale"] = torch.rand(()) + 1
        for side in "kv":
            name = f"model.layers.{index}.self_attn.{f'{side}_proj.' if algorithm else ''}{side}_scale"
            if (scale := scales(index, side)) is not None:
                weights[name] = torch.tensor(scale if isinstance(scale, list) else [scale])
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    stated = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }
    settings = {"num_hidden_layers": BLOCKS, **(config or {})}
    if algorithm:
        declared = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "kv_cache_quant_algo": algorithm}
        (folder / "hf_quant_config.json").write_text(
            json.dumps({"producer": {"name": "modelopt", "version": version}, "quantization": declared})
        )
    else:
        settings["quantization_config"] = stated | quantization
    (folder / "config.json").write_text(json.dumps(settings))
    return Files(open_folder(folder))


def found(files, *, notes=False):
    findings = problems_of(files, "checkpoint_health")[1]
    return [f for f in findings if f.note == notes and "_scale" in f.tensor and "weight" not in f.tensor]


def test_a_cache_whose_scales_are_all_there_has_no_finding(tmp_path):
    files = checkpoint(tmp_path / "c", lambda index, side: calibrated(index), kv_cache_scheme=CACHE)
    assert (found(files), found(files, notes=True)) == ([], [])


def test_a_cache_that_is_declared_and_has_no_scale_is_found_in_every_layer(tmp_path):
    told = found(checkpoint(tmp_path / "c", lambda index, side: None, kv_cache_scheme=CACHE))
    assert [each.layer for each in told] == [f"model.layers.{index}.self_attn" for index in range(BLOCKS)]
    assert told[0].tensor == "model.layers.0.self_attn.k_scale"
    assert told[0].what == (
        "missing with v_scale, as in every layer, though kv_cache_scheme declares a static cache: "
        "a server runs its KV cache at 1.0"
    )


def test_the_layer_that_lacks_one_of_its_two_scales_is_named(tmp_path):
    lacking = checkpoint(
        tmp_path / "c", lambda i, side: None if (i, side) == (3, "v") else calibrated(i), kv_cache_scheme=CACHE
    )
    (told,) = found(lacking)  # once, though the keys of its siblings show it too
    assert told.tensor == "model.layers.3.self_attn.v_scale"
    assert "a server takes k_scale's value" in told.what
    assert len(problems_of(lacking, "checkpoint_keys")[1]) == 1


def test_a_layer_that_lacks_both_of_its_scales_is_one_problem(tmp_path):
    lacking = checkpoint(tmp_path / "c", lambda i, side: None if i == 3 else calibrated(i), kv_cache_scheme=CACHE)
    assert [each.tensor for each in found(lacking)] == ["model.layers.3.self_attn.k_scale"]


@pytest.mark.parametrize("scheme", [None, {**CACHE, "dynamic": True}])
def test_a_cache_that_declares_no_static_scales_needs_none(tmp_path, scheme):
    assert found(checkpoint(tmp_path / "c", lambda index, side: None, kv_cache_scheme=scheme)) == []


def test_only_layers_with_a_cache_need_scales(tmp_path):
    kinds = ["linear_attention", "full_attention", "sliding_attention", "linear_attention", "full_attention"]

    def scales(index, side):
        return None if index in (0, 2, 3) else calibrated(index)

    files = checkpoint(tmp_path / "c", scales, {"layer_types": kinds}, kv_cache_scheme=CACHE)
    assert [each.layer for each in found(files)] == ["model.layers.2.self_attn"]


def test_blocks_that_read_the_cache_of_others_need_no_scales(tmp_path):
    files = checkpoint(
        tmp_path / "c", lambda i, side: calibrated(i) if i < 3 else None, {"num_kv_shared_layers": 2},
        kv_cache_scheme=CACHE,
    )  # fmt: skip
    assert [each for each in found(files) if "though" in each.what] == []


def test_a_latent_cache_has_one_scale(tmp_path):
    one = checkpoint(
        tmp_path / "c", lambda i, side: calibrated(i) if side == "k" else None, projections=MLA, kv_cache_scheme=CACHE
    )
    assert found(one) == []
    none = checkpoint(tmp_path / "none", lambda i, side: None, projections=MLA, kv_cache_scheme=CACHE)
    assert len(found(none)) == BLOCKS


def test_scales_that_are_all_1_are_the_initial_value_or_the_writer_s_clamp(tmp_path):
    initial = found(checkpoint(tmp_path / "c", lambda index, side: 1.0, kv_cache_scheme=CACHE))
    assert len(initial) == 2 * BLOCKS
    assert "the initial value" in initial[0].what
    clamped = checkpoint(tmp_path / "modelopt", lambda index, side: 1.0, algorithm="FP8")
    assert found(clamped) == []
    (note,) = found(clamped, notes=True)
    assert "the writer clamps them at 1.0" in note.what


def test_scales_that_are_all_one_other_number_are_a_note(tmp_path):
    files = checkpoint(tmp_path / "c", lambda i, side: 0.03 if side == "k" else calibrated(i), kv_cache_scheme=CACHE)
    assert found(files) == []
    (note,) = found(files, notes=True)
    assert note.what.startswith("0.03, as every scale of the 5 siblings")


@pytest.mark.parametrize("version", ["0.33.1", "0.42.0", "unknown"])
def test_a_cache_of_modelopt_that_wrote_scales_always_needs_them(tmp_path, version):
    told = found(checkpoint(tmp_path / "c", lambda index, side: None, algorithm="FP8", version=version))
    assert len(told) == BLOCKS
    assert "as in every layer, though kv_cache_quant_algo is FP8: a server runs its KV cache at 1.0" in told[0].what


def test_a_cache_of_modelopt_without_scales_is_a_note_and_one_that_lacks_some_a_problem(tmp_path):
    cast = checkpoint(tmp_path / "cast", lambda index, side: None, algorithm="FP8")
    assert found(cast) == []
    (note,) = found(cast, notes=True)
    assert "kv_cache_quant_algo is FP8: a server runs the KV cache at 1.0" in note.what
    some = checkpoint(tmp_path / "some", lambda i, side: None if i == 1 else 2 + calibrated(i), algorithm="FP8")
    told = [each for each in found(some) if "a server runs" in each.what]
    assert [(each.layer, each.tensor) for each in told] == [
        ("model.layers.1.self_attn", "model.layers.1.self_attn.k_proj.k_scale")
    ]


def test_nvfp4_with_static_inputs_needs_their_scale_in_every_layer(tmp_path):
    from support.checkpoints import edited, save_quantized_moe

    folder = save_quantized_moe(tmp_path / "moe", "NVFP4")
    name = "model.layers.1.mlp.experts.2.down_proj.input_global_scale"
    (told,) = found(Files(open_folder(edited(folder, tmp_path / "lost", lambda weights: weights.pop(name)))))
    assert told.tensor == name
    assert "missing, though the scheme nvfp4-pack-quantized needs it" in told.what


def test_an_engine_takes_the_scales_of_each_layer_whoever_wrote_them(tmp_path):
    by_ct = checkpoint(tmp_path / "ct", lambda i, side: 0.1 * (i + 1) + (side == "v"), kv_cache_scheme=CACHE)
    by_modelopt = checkpoint(tmp_path / "mo", lambda i, side: 0.1 * (i + 1) + (side == "v"), algorithm="FP8")
    names = [f"language_model.layers.{i}.self_attn" for i in range(BLOCKS)]  # as a loader may name them
    for files in (by_ct, by_modelopt):
        scales = scales_of_cache(files.folder, names)
        assert [scales[name] for name in names] == [pytest.approx((0.1 * (i + 1), 0.1 * (i + 1) + 1)) for i in range(5)]


def test_a_lost_scale_has_the_others_value_and_a_layer_without_any_is_left_out(tmp_path):
    some = checkpoint(tmp_path / "c", lambda i, side: 0.5 if (i, side) in ((0, "v"), (1, "k"), (1, "v")) else None)
    found = scales_of_cache(some.folder, [f"model.layers.{i}.self_attn" for i in range(BLOCKS)])
    assert found == {f"model.layers.{i}.self_attn": (0.5, 0.5) for i in (0, 1)}


def test_each_head_has_its_own_scale_where_the_configuration_says_so(tmp_path):
    files = checkpoint(
        tmp_path / "c", lambda i, side: [[[0.5]], [[0.25]]], kv_cache_scheme=CACHE | {"strategy": "attn_head"}
    )
    (found,) = scales_of_cache(files.folder, ["model.layers.0.self_attn"]).values()
    assert found == ((0.5, 0.25), (0.5, 0.25))


@pytest.mark.parametrize(("scale", "said"), [(0.0, "is 0,"), (float("nan"), "is nan,"), ([1.0, 2.0], "is 2 numbers,")])
def test_a_scale_that_no_engine_could_take_is_refused_by_name(tmp_path, scale, said):
    files = checkpoint(tmp_path / "c", lambda i, side: scale)
    with pytest.raises(InfraError, match=rf"model.layers.0.self_attn.k_scale {said} where a KV cache in FP8"):
        scales_of_cache(files.folder, ["model.layers.0.self_attn"])

"""Every preset of the installed compressed-tensors: read from the files as its own compressor reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import save_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError, InfraError
from support.checkpoints import packed_parts

LAYERS = [f"model.layers.{index}.mlp.down_proj" for index in range(4)]
DOWN = LAYERS[2]
SHAPE = (128, 256)
PRESETS = [name for name in PRESET_SCHEMES if name != "UNQUANTIZED"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Return a function: preset → the folder of four layers, and what the library makes of each."""
    made = {}

    def make(preset):
        if preset not in made:
            torch.manual_seed(0)
            scheme, tensors, expected = preset_name_to_scheme(preset, targets=["Linear"]), {}, {}
            for layer in LAYERS:
                form, parts = packed_parts(torch.randn(SHAPE) * 0.05, scheme)
                expected[layer] = BaseCompressor.get_value_from_registry(form).decompress(parts, scheme)["weight"]
                tensors |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
                # as a calibration that saw data leaves them
                inputs = [part for part in parts if part.startswith("input")]
                tensors |= {f"{layer}.{part}": torch.rand(1) + 0.5 for part in inputs}
            folder = tmp_path_factory.mktemp("preset")
            save_file(tensors, folder / "model.safetensors")
            scheme.format = None
            stated = QuantizationConfig(config_groups={"g": scheme}, ignore=["lm_head"], format=form)
            stated = {**stated.model_dump(mode="json"), "quant_method": "compressed-tensors"}
            (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "quantization_config": stated}))
            made[preset] = folder, expected, tensors
        return made[preset]

    return make


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_are_what_the_library_decompresses(quantized, preset):
    folder, expected, _ = quantized(preset)
    form = format_of(open_folder(folder))
    rows = form.rows(DOWN)
    # in its own dtype: the library unpacks 4- and 6-bit floats to bfloat16
    assert torch.equal(torch.from_numpy(rows).to(expected[DOWN].dtype), expected[DOWN])
    np.testing.assert_array_equal(form.rows(DOWN, slice(3, 40, 5)), rows[3:40:5])
    assert form.weight_shape(DOWN) == SHAPE


@pytest.mark.parametrize("preset", PRESETS)
def test_a_healthy_file_has_no_problem_and_one_constant_row_is_found(quantized, preset, tmp_path):
    folder, _, tensors = quantized(preset)
    assert problems_of(Files(open_folder(folder)), "checkpoint_health")[1] == []
    name = next(name for name in (f"{DOWN}.weight_packed", f"{DOWN}.weight") if name in tensors)
    codes = format_of(open_folder(folder))
    broken = {key: value.clone() for key, value in tensors.items()}
    bits = codes.code_bits(DOWN, open_folder(folder).tensors[name])
    # one code other than zero throughout, written bit by bit as the library packs: the lowest bits first
    stream = np.tile(np.array([1] + [0] * (bits - 1), np.uint8), SHAPE[1])
    row = torch.from_numpy(np.packbits(stream, bitorder="little")).view(broken[name].dtype)
    broken[name][5] = row
    save_file(broken, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = problems_of(Files(open_folder(tmp_path)), "checkpoint_weights")[1]
    assert [(each.tensor, each.what) for each in found] == [(name, "row 5 is one code throughout")]


@pytest.mark.parametrize("part", ["weight_scale", "weight_global_scale"])
def test_a_layer_that_lacks_a_scale_is_never_read_as_numbers(quantized, part, tmp_path):
    folder, _, tensors = quantized("NVFP4")
    save_file({key: value for key, value in tensors.items() if key != f"{DOWN}.{part}"}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(AnomalyError, match=f"{part} is missing"):
        format_of(open_folder(tmp_path)).rows(DOWN)


@pytest.mark.parametrize("preset", ["MXFP4", "MXFP6A8", "MXFP8"])
def test_an_exponent_that_was_never_written_is_found(quantized, preset, tmp_path):
    folder, _, tensors = quantized(preset)
    broken = {key: value.clone() for key, value in tensors.items()}
    broken[f"{DOWN}.weight_scale"][7, 2:5] = 0
    broken[f"{LAYERS[1]}.weight_scale"][9, 0] = 0
    codes = next(broken[name] for name in (f"{LAYERS[1]}.weight_packed", f"{LAYERS[1]}.weight") if name in broken)
    codes.view(torch.uint8)[9, : codes.shape[1] // 8] = 0  # a group of zeros, whose exponent means nothing
    save_file(broken, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = problems_of(Files(open_folder(tmp_path)), "checkpoint_scales")[1]
    lost = [(each.tensor, each.what) for each in found if "are 0, and their weights aren't" in each.what]
    assert lost == [(f"{DOWN}.weight_scale", "3 of 1024 are 0, and their weights aren't")]


def test_a_format_of_earlier_versions_that_is_packed_otherwise_is_not_read(quantized, tmp_path):
    folder, _, tensors = quantized("W4A16")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = "marlin-24"
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    form = format_of(open_folder(tmp_path))
    assert form.rows(DOWN) is None
    assert "marlin-24 is not read here" in form.refusal(DOWN)
    assert problems_of(Files(open_folder(tmp_path)), "checkpoint_health")[1] == []


SPOILED = {
    "a column less": lambda t: t[..., :-1],
    "a row less": lambda t: t[:-1],
    "no columns": lambda t: t[..., :0],
    "no rows": lambda t: t[:0],
    "in a row": lambda t: t.reshape(-1),
    "one number": lambda t: t.flatten()[0],
    "other axes": lambda t: t.T if t.dim() > 1 else t,
    "another axis": lambda t: t[None],
    "booleans": lambda t: t.float().bool(),
}


@pytest.mark.parametrize("preset", ["W4A16_ASYM", "FP8_BLOCK", "NVFP4", "MXFP6A16"])
def test_tensors_of_another_shape_are_told_in_one_line(quantized, preset, tmp_path):
    folder, _, tensors = quantized(preset)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    told = {}
    for name in (name for name in tensors if name.startswith(f"{DOWN}.weight")):
        for how, spoil in SPOILED.items():
            spoiled = spoil(tensors[name]).contiguous()
            if spoiled.shape == tensors[name].shape and spoiled.dtype == tensors[name].dtype:
                continue
            save_file({**tensors, name: spoiled}, tmp_path / "model.safetensors")
            opened, said = open_folder(tmp_path), []
            try:
                said += [str(each) for each in problems_of(Files(opened), "checkpoint_health")[1]]
                rows = format_of(opened).rows(DOWN)
                said += [] if rows is not None else [format_of(opened).refusal(DOWN)]
            except (AnomalyError, InfraError) as error:
                said.append(str(error))
            assert not any("\n" in line for line in said)
            told[name.rpartition(".")[2], how] = bool(said)
    # a narrower weight is a whole one to a format that states no width, and an axis of one changes no number
    fits = {"a column less", "a row less", "another axis", "in a row", "one number"}
    assert [case for case, one in told.items() if not one and case[1] not in fits] == []
    assert all(told[part, how] for part, how in told if "scale" in part and how in ("a column less", "no rows"))


def with_whole_scale(tensors, layer, factor):
    """Quantize a layer as with a scale of the whole tensor that is too large: its scales of blocks are smaller."""
    broken = {key: value.clone() for key, value in tensors.items()}
    scales = broken[f"{layer}.weight_scale"]
    broken[f"{layer}.weight_scale"] = (scales.float() / factor).to(scales.dtype)
    broken[f"{layer}.weight_global_scale"] /= factor
    return broken


@pytest.mark.parametrize(("factor", "said"), [(10, "56 at least"), (2.5, "448 in its siblings"), (1.9, "")])
def test_a_scale_of_the_whole_tensor_that_is_another_tensor_s_is_found(quantized, factor, said, tmp_path):
    folder, _, tensors = quantized("NVFP4")
    save_file(with_whole_scale(tensors, DOWN, factor), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = problems_of(Files(open_folder(tmp_path)), "checkpoint_scales")[1]
    found = [each.what for each in found if each.tensor == f"{DOWN}.weight_global_scale" and "own weights" in each.what]
    assert [what.endswith(said) for what in found] == ([True] if said else []), found


def test_a_scale_of_the_whole_tensor_that_is_zero_makes_numbers_that_are_counted(quantized, tmp_path):
    folder, _, tensors = quantized("NVFP4")
    broken = tensors | {f"{DOWN}.weight_global_scale": torch.zeros(1)}
    save_file(broken, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = problems_of(Files(open_folder(tmp_path)), "checkpoint_scales")[1]
    assert f"{DOWN}.weight_global_scale" in {each.tensor for each in found}
    assert not np.isfinite(format_of(open_folder(tmp_path)).stored_rows(DOWN)).any()


def test_the_largest_scale_of_a_fused_group_is_what_counts(quantized, tmp_path):
    folder, _, tensors = quantized("NVFP4")
    wide, narrow = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
    parts = {part: tensors[f"{DOWN}.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale")}
    pair = {f"{layer}.{part}": value.clone() for layer in (wide, narrow) for part, value in parts.items()}
    pair |= {f"{layer}.input_global_scale": torch.rand(1) for layer in (wide, narrow)}
    save_file(with_whole_scale(pair, narrow, 16), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = problems_of(Files(open_folder(tmp_path)), "checkpoint_scales")[1]
    assert not [each for each in found if "own weights" in each.what]


def test_scales_of_a_kv_cache_are_known_and_checked(quantized, tmp_path):
    folder, _, tensors = quantized("FP8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = [f"model.layers.{index}.self_attn.{part}" for index in range(4) for part in ("k_scale", "v_scale")]
    cache = {name: torch.tensor([0.03 if name.endswith("k_scale") else 0.02]).bfloat16() for name in names}

    def found(**changed):
        save_file(tensors | cache | {f"model.layers.2.self_attn.{k}": v for k, v in changed.items()}, file)
        problems = problems_of(Files(open_folder(tmp_path)), "checkpoint_health")[1]
        notes = {each.tensor.rpartition(".")[2] for each in problems if each.note}
        assert notes <= {"k_scale", "v_scale"}  # that they are constant
        return [(each.tensor.rpartition(".")[2], each.what.partition(" × ")[0]) for each in problems if not each.note]

    file = tmp_path / "model.safetensors"
    assert found() == []
    assert found(k_scale=torch.tensor([float("nan")]).bfloat16()) == [("k_scale", "is NaN")]
    assert found(v_scale=torch.tensor([2.0]).bfloat16()) == [("v_scale", "the median scale is 99.9")]

"""Tensors are read as numbers only where they and the declaration agree; else what is refused says why."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_qsa.checkpoint import Files, Folder, format_of, problems_of

LAYER = "model.layers.0.mlp.down_proj"
FLOAT = np.arange(32, dtype=np.float16).reshape(4, 8)
CODES = np.arange(32, dtype=np.int8).reshape(4, 8)
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}},
}


def form(path, parts, quantization=None, layer=LAYER):
    """Write a checkpoint with one layer; return it as it is read."""
    save_file({f"{layer}.{part}": array for part, array in parts.items()}, path / "model.safetensors")
    config = {"quantization_config": quantization} if quantization else {}
    (path / "config.json").write_text(json.dumps(config))
    return format_of(Folder(path))


SCALE = np.ones((4, 1), np.float32)
CONTRADICTIONS = {
    "bytes stored as floats": (
        {"weight": FLOAT, "weight.absmax": SCALE, "weight.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)},
        None,
        "weight.absmax shows that it is quantized",
    ),
    "a float beside a scale": ({"weight": FLOAT, "weight_scale": SCALE}, INT8, "weight_scale shows that"),
    "a float beside zero points": ({"weight": FLOAT, "weight_zero_point": CODES}, None, "weight_zero_point shows"),
    "columns that a declared format scales": (
        {"weight": FLOAT, "pre_quant_scale": SCALE},
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["*"]},
        "pre_quant_scale shows",
    ),
    "codes that are declared unquantized": (
        {"weight": CODES, "weight_scale": SCALE},
        {**INT8, "ignore": ["re:.*down_proj"]},
        "compressed-tensors is declared, but not of this layer",
    ),
    "codes of another dtype than is declared": (
        {"weight": CODES.view(np.uint8), "weight_scale": SCALE},
        INT8,
        "int-quantized is declared, which is stored as I8",
    ),
    "a declaration that nobody knows": ({"weight": FLOAT}, {"quant_method": "somebodys"}, "somebodys, is not known"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_tensors_that_contradict_the_declaration_are_no_numbers(tmp_path, case):
    parts, quantization, why = CONTRADICTIONS[case]
    read = form(tmp_path, parts, quantization)
    assert read.rows(LAYER) is None
    assert re.match(rf"the files hold .*weight \([FIU]\d+ 4×8\).* of {LAYER}: ", read.refusal(LAYER))
    assert why in read.refusal(LAYER)


def test_what_agrees_is_read(tmp_path):
    read = form(tmp_path, {"weight": CODES, "weight_scale": SCALE * 2}, INT8)
    np.testing.assert_array_equal(read.rows(LAYER), CODES * 2.0)


@pytest.mark.parametrize("part", ["bias", "input_scale", "scale", "weight_g"])
def test_a_healthy_float_layer_is_read_whatever_else_it_has(tmp_path, part):
    read = form(tmp_path, {"weight": FLOAT, part: np.ones(4, np.float32)})
    np.testing.assert_array_equal(read.rows(LAYER), FLOAT.astype(np.float64))
    assert not list(read.findings(LAYER))


def test_a_norm_beside_unknown_layers_is_read(tmp_path):
    read = form(tmp_path, {"weight": FLOAT[0]}, {"quant_method": "somebodys"}, "model.layers.0.input_layernorm")
    np.testing.assert_array_equal(read.rows("model.layers.0.input_layernorm"), FLOAT[0].astype(np.float64))


def test_packed_bytes_in_a_float_dtype_are_a_finding_where_nothing_is_declared(tmp_path):
    read = form(tmp_path, {"weight": FLOAT, "weight.absmax": SCALE})
    (found,) = problems_of(Files(read.folder), "checkpoint_scales")[1]
    assert found.tensor == f"{LAYER}.weight"
    assert found.what == (
        "weight.absmax beside it shows that it is quantized, and config.json has no quantization_config"
    )

"""What a quantization_config declares: the format, the scheme of each layer, and the layers that are left out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_qsa.checkpoint import LayerScheme, format_of, matches, open_folder

Q = "model.layers.3.self_attn.q_proj"
UP = "model.layers.3.mlp.up_proj"
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
BLOCK = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64]}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def group(weights, form, **others):
    return {"weights": weights, "targets": ["Linear"], "format": form, **others}


def groups(*members, **settings):
    return {"quant_method": "compressed-tensors", "config_groups": dict(enumerate(members)), **settings}


def parts(*names):
    return tuple((name,) for name in names)


STATIC = {"input_activations": {"num_bits": 8, "dynamic": False}}
LOCAL = {"input_activations": {"num_bits": 4, "dynamic": "local"}}
CASES = {
    # case: (quantization_config, layer, form, bits, strategy, group, required parts); None for a layer left out
    "int8": (groups(group(INT8, "int-quantized")), Q, "int-quantized", 8, "channel", None, ("weight", "weight_scale")),
    "int4": (
        groups(group(INT4, "pack-quantized")), Q, "pack-quantized", 4, "group", 32,
        ("weight_packed", "weight_scale", "weight_shape"),
    ),
    "zero points": (
        groups(group(INT4 | {"symmetric": False}, "pack-quantized")), Q, "pack-quantized", 4, "group", 32,
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    ),
    "order of activations": (
        groups(group(INT4 | {"actorder": "group"}, "pack-quantized")), Q, "pack-quantized", 4, "group", 32,
        ("weight_packed", "weight_scale", "weight_shape", "weight_g_idx"),
    ),
    "static inputs": (
        groups(group(FP8, "float-quantized", **STATIC)), Q, "float-quantized", 8, "tensor", None,
        ("weight", "weight_scale", "input_scale"),
    ),
    "blocks": (
        groups(group(BLOCK, "float-quantized")), Q, "float-quantized", 8, "block", (128, 64),
        ("weight", "weight_scale"),
    ),
    "nvfp4 with local input scales": (
        groups(group(NVFP4, "nvfp4-pack-quantized", **LOCAL)), Q, "nvfp4-pack-quantized", 4, "tensor_group", 16,
        ("weight_packed", "weight_scale", "weight_global_scale"),
    ),
    "the format of the whole, where a group has none": (
        groups({"weights": INT8, "targets": ["Linear"]}, format="int-quantized"), Q, "int-quantized", 8, "channel",
        None, ("weight", "weight_scale"),
    ),
    "config groups without a method": (
        {"config_groups": {"0": group(INT8, "int-quantized")}}, Q, "int-quantized", 8, "channel", None,
        ("weight", "weight_scale"),
    ),
    "the first group that targets a layer": (
        groups(
            group(INT8, "int-quantized") | {"targets": ["re:.*self_attn.*"]}, group(INT4, "pack-quantized"),
        ), Q, "int-quantized", 8, "channel", None, ("weight", "weight_scale"),
    ),
    "the second group, where the first targets others": (
        groups(
            group(INT8, "int-quantized") | {"targets": ["re:.*self_attn.*"]}, group(INT4, "pack-quantized"),
        ), UP, "pack-quantized", 4, "group", 32, ("weight_packed", "weight_scale", "weight_shape"),
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Q, "gptq", 4, "group", 128,
             ("qweight", "qzeros", "scales")),
    "gptq by column": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, Q, "gptq", 8, "channel", None,
                       ("qweight", "qzeros", "scales")),
    "awq": ({"quant_method": "awq", "w_bit": 4, "group_size": 64}, Q, "awq", 4, "group", 64,
            ("qweight", "qzeros", "scales")),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Q, "fp8", 8, "block", (128, 128),
            ("weight", "weight_scale_inv")),
    "fp8 with static inputs": ({"quant_method": "fp8", "activation_scheme": "static"}, Q, "fp8", 8, "any", None,
                               ("weight", "weight_scale_inv", "input_scale")),
}  # fmt: skip

LEFT_OUT = {
    "ignored by name": (groups(group(INT8, "int-quantized"), ignore=["lm_head"]), "lm_head"),
    "ignored by regex": (groups(group(INT8, "int-quantized"), ignore=["re:.*up_proj$"]), UP),
    "ignored under another front": (
        groups(group(INT8, "int-quantized"), ignore=["language_model.lm_head"]), "lm_head",
    ),
    "no group targets it": (groups(group(INT8, "int-quantized") | {"targets": ["re:.*self_attn.*"]}), UP),
    "a group without weights": (groups({"weights": None, "targets": ["Linear"]}), Q),
    "the head of gptq": ({"quant_method": "gptq", "bits": 4}, "lm_head"),
    "skipped by dynamic": ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*up_proj": {}}}, UP),
    "not converted by awq": ({"quant_method": "awq", "modules_to_not_convert": ["up_proj"]}, UP),
    "not converted by fp8": ({"quant_method": "fp8", "modules_to_not_convert": ["up_proj"]}, UP),
    "torchao names no layers": ({"quant_method": "torchao"}, Q),
    "nothing is declared": (None, Q),
}  # fmt: skip


def declared(folder, config, **tensors):
    """Return the format of a folder with a configuration, and tensors where they matter."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    save_file(tensors or {"x": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return format_of(open_folder(folder))


@pytest.mark.parametrize("case", CASES)
def test_a_declaration_gives_a_layer_its_scheme(tmp_path, case):
    config, layer, form, bits, strategy, size, required = CASES[case]
    scheme = declared(tmp_path, config).scheme_of(layer)
    assert scheme is not None
    assert (scheme.form, scheme.bits, scheme.strategy, scheme.group) == (form, bits, strategy, size)
    assert tuple(choice[0] for choice in scheme.required) == required


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_declaration_leaves_a_layer_out(tmp_path, case):
    config, layer = LEFT_OUT[case]
    assert declared(tmp_path, config).scheme_of(layer) is None


FORMATS = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptq",
    "awq": "awq",
    "fp8": "fp8",
    "torchao": "torchao",
    "somebody's": "somebody's",
}


@pytest.mark.parametrize("method", FORMATS)
def test_a_format_is_called_as_the_configuration_calls_it(tmp_path, method):
    assert declared(tmp_path, {"quant_method": method}).label == FORMATS[method]


def test_settings_of_gptq_that_lie_beside_an_old_config_json_are_read(tmp_path):
    declared(tmp_path, None)
    (tmp_path / "quantize_config.json").write_text('{"bits": 3, "group_size": 64}')
    form = format_of(open_folder(tmp_path))
    assert form.label == "gptq"
    assert (form.scheme_of(Q).bits, form.scheme_of(Q).group) == (3, 64)


@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round"])
def test_the_words_of_one_output_are_a_row_whatever_the_packing(tmp_path, method):
    """GPTQ [in / 8, out] and AWQ [in, out / 8] of 16 outputs and 8 inputs: the code of an output is its number."""
    outputs = np.arange(16, dtype=np.uint32) % 8
    words = sum(outputs << np.uint32(4 * lane) for lane in range(8))[None]  # 8 inputs in a word
    if method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of a word, from its lowest bits
        nibbles = [outputs.reshape(2, 8)[:, output] << np.uint32(4 * i) for i, output in enumerate(order)]
        words = np.repeat(sum(nibbles)[None], 8, axis=0)
    tensors = {f"{Q}.qweight": words.view(np.int32), f"{Q}.scales": np.ones((1, 16), np.float16)}
    form = declared(tmp_path, {"quant_method": method, "bits": 4, "group_size": 8}, **tensors)
    found, step = form.words(Q, form.codes_of(Q))
    assert (found.shape[0], step) == (16, 1)
    assert [int(word) & 15 for word in found[:, 0]] == outputs.tolist()
    assert form.weight_shape(Q) == (16, 8)


def test_a_configuration_that_names_layers_decides_for_all_of_them(tmp_path):
    names_layers = {
        method: declared(tmp_path / method, {"quant_method": method}).declaration.names_layers
        for method in ("compressed-tensors", "gptq", "awq", "fp8", "torchao", "somebodys")
    }
    some = declared(tmp_path / "some", {"quant_method": "gptq", "modules_in_block_to_quantize": [["q_proj"]]})
    assert [method for method, all_of_them in names_layers.items() if all_of_them] == [
        "compressed-tensors", "gptq", "awq", "fp8",
    ]  # fmt: skip
    assert not some.declaration.names_layers


@pytest.mark.parametrize(
    ("layer", "pattern", "same"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("my_lm_head", "lm_head", False),
        ("model.layers.1.q_proj", "re:.*q_proj", True),
        ("model.layers.1.q_proj", "re:q_proj", False),
        ("model.layers.1.q_proj", "re:.*q_proj.weight", False),
    ],
)
def test_a_layer_is_matched_as_compressed_tensors_does(layer, pattern, same):
    assert matches(layer, pattern) is same


@pytest.mark.parametrize(
    ("strategy", "group", "count"),
    [
        ("tensor", None, 1),
        ("channel", None, 6),
        ("group", 4, 18),
        ("group", None, None),
        ("tensor_group", 5, 12),
        ("block", (4, 8), 4),
        ("block", None, None),
        ("any", None, None),
    ],
)
def test_a_scheme_knows_how_many_scales_a_weight_of_6_by_10_has(strategy, group, count):
    assert LayerScheme("x", 8, strategy, group).scale_count(6, 10) == count


def test_a_layer_that_lacks_what_its_scheme_needs_and_has_what_it_does_not_know_is_told_of_both(tmp_path):
    tensors = {
        f"{Q}.weight": np.ones((4, 8), np.int8),
        f"{Q}.weight_scale_2": np.ones(1, np.float32),
        f"{UP}.weight": np.ones((4, 8), np.int8),
        f"{UP}.weight_scale": np.ones((3, 1), np.float32),
    }
    form = declared(tmp_path, groups(group(INT8, "int-quantized")), **tensors)
    assert [finding.what for finding in form.findings(Q)] == [
        "missing, though the scheme int-quantized needs it",
        "unexpected: the scheme int-quantized has no weight_scale_2",
        "shape 1, but channel-wise scales of a weight (4, 8) are 4",
    ]
    assert [finding.what for finding in form.findings(UP)] == [
        "shape 3×1, but channel-wise scales of a weight (4, 8) are 4"
    ]

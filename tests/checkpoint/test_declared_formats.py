"""What a configuration declares, held against the tensors of a layer: the parts of each scheme, and their shapes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of

ROWS, COLUMNS = 16, 64
INT8, INT32, UINT8, FP8 = torch.int8, torch.int32, torch.uint8, torch.float8_e4m3fn


def compressed(form, **weights):
    """Return the configuration of compressed-tensors with one group. `static`: inputs have a fixed scale."""
    static = weights.pop("static", False)
    group = {"targets": ["Linear"], "weights": weights}
    if static:
        group["input_activations"] = {"num_bits": 8, "dynamic": False}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


SCHEMES = {
    # scheme: (configuration, the parts that it needs with dtype and shape, the words for its scales)
    "int8 by channel": (
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        {"weight": (INT8, ROWS, COLUMNS), "weight_scale": (None, ROWS, 1)}, "channel-wise scales",
    ),
    "int8 with zero points": (
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        {"weight": (INT8, ROWS, COLUMNS), "weight_scale": (None, ROWS, 1), "weight_zero_point": (INT8, ROWS, 1)},
        "channel-wise scales",
    ),
    "int4 by group": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        {"weight_packed": (INT32, ROWS, COLUMNS // 8), "weight_scale": (None, ROWS, 2), "weight_shape": None},
        "group-wise scales",
    ),
    "int4 in an order of its own": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, actorder="group"),
        {
            "weight_packed": (INT32, ROWS, COLUMNS // 8), "weight_scale": (None, ROWS, 2), "weight_shape": None,
            "weight_g_idx": (INT32, COLUMNS),
        },
        "group-wise scales",
    ),
    "fp8 with static inputs": (
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor", static=True),
        {"weight": (FP8, ROWS, COLUMNS), "weight_scale": (None, 1), "input_scale": (None, 1)}, "tensor-wise scales",
    ),
    "fp8 by block": (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[8, 32]),
        {"weight": (FP8, ROWS, COLUMNS), "weight_scale": (None, 2, 2)}, "block-wise scales",
    ),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        {
            "weight_packed": (UINT8, ROWS, COLUMNS // 2), "weight_scale": (FP8, ROWS, 4),
            "weight_global_scale": (None, 1),
        },
        "tensor_group-wise scales",
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        {"qweight": (INT32, COLUMNS // 8, ROWS), "qzeros": (INT32, 2, ROWS // 8), "scales": (None, 2, ROWS)},
        "group-wise scales",
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        {"qweight": (INT32, COLUMNS, ROWS // 8), "qzeros": (INT32, 2, ROWS // 8), "scales": (None, 2, ROWS)},
        "group-wise scales",
    ),
    "block fp8 of its own method": (
        {"quant_method": "fp8", "weight_block_size": [8, 32], "activation_scheme": "static"},
        {"weight": (FP8, ROWS, COLUMNS), "weight_scale_inv": (None, 2, 2), "input_scale": (None, 1)},
        "block-wise scales",
    ),
}  # fmt: skip
LAYERS = [f"model.layers.{index}.mlp.down_proj" for index in range(4)]


def tensor(seed, dtype, *shape):
    torch.manual_seed(seed)
    if dtype in (INT8, INT32, UINT8):
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, shape, dtype=dtype)
    values = torch.rand(*shape) * 0.001 + 0.01
    return values if dtype is None else torch.randn(*shape).abs().add(1).mul(100).clamp(max=448).to(dtype)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a checkpoint of four layers; `change` edits the tensors of the layer 2."""

    def write(scheme, change=lambda parts: None, **settings):
        config, parts, _ = SCHEMES[scheme]
        weights = {}
        for index, layer in enumerate(LAYERS):
            tensors = {
                part: torch.tensor([ROWS, COLUMNS]) if shape is None else tensor(index, *shape)
                for part, shape in parts.items()
            }
            if "weight_g_idx" in tensors:
                tensors["weight_g_idx"] = torch.randperm(COLUMNS, dtype=INT32) // 32
            if index == 2:
                change(tensors)
            weights |= {f"{layer}.{part}": value for part, value in tensors.items()}
        save_file(weights, tmp_path / "model.safetensors")
        stated = {"model_type": "llama", "num_hidden_layers": 4, "quantization_config": config | settings}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        return open_folder(tmp_path)

    return write


def found(folder, metric):
    return [(finding.tensor, finding.what) for finding in problems_of(Files(folder, None), metric)[1]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_with_all_parts_of_its_scheme_is_sound(write, scheme):
    folder = write(scheme)
    assert [found(folder, metric) for metric in ("checkpoint_scales", "checkpoint_formats")] == [[], []]


CODES = ("weight", "weight_packed", "qweight")
NEEDED = [(scheme, part) for scheme, (_, parts, _) in SCHEMES.items() for part in parts if part not in CODES]


@pytest.mark.parametrize(("scheme", "part"), NEEDED)
def test_a_part_that_the_scheme_needs_is_missed(write, scheme, part):
    folder = write(scheme, lambda parts: parts.pop(part))
    (problem,) = [(name, what) for name, what in found(folder, "checkpoint_scales") if "needs it" in what]
    assert problem[0] == f"{LAYERS[2]}.{part}"
    assert problem[1].startswith("missing")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scale_that_the_scheme_does_not_know_is_unexpected(write, scheme):
    folder = write(scheme, lambda parts: parts.update(odd_scale=torch.rand(1)))
    (problem,) = [name for name, what in found(folder, "checkpoint_scales") if what.startswith("unexpected")]
    assert problem == f"{LAYERS[2]}.odd_scale"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_of_another_number_are_told_by_what_the_scheme_asks_for(write, scheme):
    name = next(part for part in ("weight_scale", "weight_scale_inv", "scales") if part in SCHEMES[scheme][1])

    def change(parts):
        parts[name] = torch.cat([parts[name].float()] * 3).to(parts[name].dtype)

    (problem,) = [what for tensor, what in found(write(scheme, change), "checkpoint_scales") if "shape" in what]
    assert SCHEMES[scheme][2] in problem
    assert f"({ROWS}, {COLUMNS})" in problem


@pytest.mark.parametrize("scheme", ["int8 by channel", "fp8 with static inputs", "block fp8 of its own method"])
def test_a_layer_in_floating_point_is_told_where_the_configuration_quantizes_it(write, scheme):
    folder = write(scheme, lambda parts: parts.update(weight=torch.randn(ROWS, COLUMNS)))
    (problem,) = found(folder, "checkpoint_formats")
    assert problem[0] == f"{LAYERS[2]}.weight"
    assert problem[1].startswith("left in F32")


IGNORED = {
    # how the configuration leaves a layer out: (scheme, settings)
    "the whole name": ("int8 by channel", {"ignore": ["model.layers.2.mlp.down_proj"]}),
    "the end of the name": ("int8 by channel", {"ignore": ["layers.2.mlp.down_proj"]}),
    "a name with more in front": ("int8 by channel", {"ignore": ["language_model.model.layers.2.mlp.down_proj"]}),
    "a regex": ("int8 by channel", {"ignore": ["re:.*layers[.]2[.].*"]}),
    "a name of AWQ": ("awq", {"modules_to_not_convert": ["model.layers.2.mlp"]}),
    "a pattern of GPTQ": ("gptq", {"dynamic": {"-:.*layers\\.2\\..*": {}}}),
    "a name of FP8": ("block fp8 of its own method", {"modules_to_not_convert": ["layers.2.mlp"]}),
    "another name of FP8": ("block fp8 of its own method", {"ignored_layers": ["layers.2.mlp"]}),
}


def test_a_bias_by_position_is_no_linear_layer(write):
    """T5's relative_attention_bias, an embedding [buckets, heads] of the first block."""
    bias = {"model.layers.0.attn.relative_attention_bias.weight": torch.randn(ROWS, COLUMNS)}
    path = write("int8 by channel").path
    save_file(load_file(path / "model.safetensors") | bias, path / "model.safetensors")
    assert not found(open_folder(path), "checkpoint_formats")


@pytest.mark.parametrize("case", IGNORED)
def test_a_layer_that_the_configuration_leaves_out_is_not_to_be_quantized(write, case):
    scheme, settings = IGNORED[case]
    layers = [name.rpartition(".")[0] for name, what in found(write(scheme, **settings), "checkpoint_formats")]
    assert layers == [LAYERS[2]]


@pytest.mark.parametrize("pattern", ["re:layers[.]2[.].*", "mlp.down", "down_proj.", "re:.*[.]2$"])
def test_a_pattern_matches_whole_names_and_a_regex_from_the_start(write, pattern):
    assert found(write("int8 by channel", ignore=[pattern]), "checkpoint_formats") == []


def spread(scales, rows, columns):
    """Return a scale for each element of [ROWS, COLUMNS]."""
    return np.repeat(np.repeat(scales, ROWS // rows, axis=0), COLUMNS // columns, axis=1)


@pytest.mark.parametrize(
    ("scheme", "scales"),
    [("int8 by channel", (ROWS, 1)), ("int8 with zero points", (ROWS, 1)), ("int4 by group", (ROWS, 2)),
     ("fp8 with static inputs", (1, 1)), ("fp8 by block", (2, 2)), ("block fp8 of its own method", (2, 2))],
)  # fmt: skip
def test_rows_are_the_codes_times_their_scales(write, scheme, scales):
    kept = {}
    folder = write(scheme, kept.update)
    name = "weight_scale_inv" if "weight_scale_inv" in kept else "weight_scale"
    if "weight_packed" in kept:
        words = kept["weight_packed"].numpy().view(np.uint32).astype(np.uint64)
        codes = (
            np.stack([(words >> (4 * at)) & 15 for at in range(8)], axis=-1).reshape(ROWS, COLUMNS).astype(float) - 8
        )
    else:
        codes = kept["weight"].float().double().numpy()
    if "weight_zero_point" in kept:
        codes = codes - spread(kept["weight_zero_point"].double().numpy(), *scales)
    expected = codes * spread(kept[name].double().numpy().reshape(scales), *scales)
    rows = slice(5, 12)
    np.testing.assert_array_equal(format_of(folder).rows(LAYERS[2], rows), expected[rows])


UNEVEN = {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [12, 48]}


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("fp8 by block", {"config_groups": {"group_0": {"targets": ["Linear"], "weights": UNEVEN}}}),
        ("block fp8 of its own method", {"weight_block_size": [12, 48]}),
    ],
)
def test_the_last_block_of_a_weight_may_be_smaller(write, scheme, settings):
    kept = {}
    rows = format_of(write(scheme, kept.update, **settings)).rows(LAYERS[2])
    codes, scales = (kept[part].double().numpy() for part in kept if part.startswith("weight"))
    np.testing.assert_array_equal(rows, codes * np.repeat(np.repeat(scales, [12, 4], axis=0), [48, 16], axis=1))


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [("gptq", {"checkpoint_format": "marlin"}), ("awq", {"version": "gemv_fast"})],
)
def test_rows_of_a_packing_that_is_not_known_are_none(write, scheme, settings):
    assert format_of(write(scheme, **settings)).rows(LAYERS[2], slice(0, 4)) is None

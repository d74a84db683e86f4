"""GPTQ, AWQ and AutoRound from the files: rows against a packing that is written out here, zero points, faults."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError, InfraError
from pytest_qsa.tools.selftest import faults
from pytest_qsa.tools.selftest.mutant import Mutant

OUT, IN, SIZE = 64, 128, 32
GROUPS = IN // SIZE
LAYERS = [f"model.layers.{index}.mlp.down_proj" for index in range(6)]
DOWN = LAYERS[2]


def packed(codes, bits):
    """Write codes [rows, n] into words [rows, n · bits / 32] one bit after another, the lowest first."""
    words = np.zeros((len(codes), codes.shape[1] * bits // 32), np.uint32)
    for index in range(codes.shape[1]):
        for bit in range(bits):
            word, place = divmod(index * bits + bit, 32)
            words[:, word] |= ((codes[:, index].astype(np.uint32) >> np.uint32(bit)) & np.uint32(1)) << np.uint32(place)
    return words.view(np.int32)


def interleaved(codes):
    """Put 8 outputs into the nibbles of a word in AWQ's order: the even ones first."""
    return codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(codes), -1)


def quantized(index, bits, symmetric):
    """Quantize a random weight [OUT, IN]; return codes, zero points, scales [OUT, GROUPS] and values."""
    weight = np.random.default_rng(index).normal(size=(OUT, GROUPS, SIZE)) * 0.02
    low, high = np.minimum(weight.min(axis=2), 0), np.maximum(weight.max(axis=2), 0)
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scales = ((high - low) / top).astype(np.float16)
    zeros = np.full_like(low, middle) if symmetric else np.clip(np.round(-low / scales), 1, top)
    codes = np.clip(np.round(weight / scales[..., None]) + zeros[..., None], 0, top)
    values = (codes - zeros[..., None]) * scales.astype(np.float64)[..., None]
    return codes.reshape(OUT, IN), zeros, scales, values.reshape(OUT, IN)


def gptq(codes, zeros, scales, bits, offset=1):
    return {"qweight": packed(codes, bits).T, "qzeros": packed(zeros.T - offset, bits), "scales": scales.T}


def gptq_v2(codes, zeros, scales, bits):
    return gptq(codes, zeros, scales, bits, offset=0)


def gemm(codes, zeros, scales, bits):
    return {"qweight": packed(interleaved(codes.T), 4), "qzeros": packed(interleaved(zeros.T), 4), "scales": scales.T}


def gemv(codes, zeros, scales, bits):
    """Pad scales and zero points of a row to four words of 8, as AutoAWQ does for groups of 32."""
    padding = ((0, 0), (0, 32 - GROUPS))
    return {"qweight": packed(codes, 4), "qzeros": packed(np.pad(zeros, padding), 4), "scales": np.pad(scales, padding)}


PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def planes(codes, bits):
    """Write codes [rows, n] as GPTQModel's `gptq_p`: of every 32 the lowest bits first, then the higher ones."""
    parts = []
    for group in np.split(codes.astype(np.uint32), codes.shape[1] // 32, axis=1):
        low = 0
        for width in PLANES[bits]:
            parts.append(packed((group >> np.uint32(low)) & np.uint32((1 << width) - 1), width))
            low += width
    return np.concatenate(parts, axis=1)


def gptq_p(codes, zeros, scales, bits):
    return {"qweight": planes(codes, bits).T, "qzeros": planes(zeros.T, bits), "scales": scales.T}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": SIZE, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": SIZE, "sym": False}
CASES = {
    # case: (quantization_config, bits, how its layers are packed)
    **{f"gptq in {bits} bits": (GPTQ | {"bits": bits}, bits, gptq) for bits in (2, 3, 4, 8)},
    "symmetric gptq": (GPTQ | {"sym": True}, 4, gptq),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, 4, gptq_v2),
    "symmetric gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2", "sym": True}, 4, gptq_v2),
    "awq": (AWQ | {"version": "gemm"}, 4, gemm),
    "awq by row": (AWQ | {"version": "GEMV"}, 4, gemv),
    **{
        f"gptq in planes of {bits} bits": (GPTQ | {"bits": bits, "checkpoint_format": "gptq_p"}, bits, gptq_p)
        for bits in PLANES
    },
    "auto-round of its own": (ROUND | {"packing_format": "auto_round"}, 4, gptq_v2),
    "auto-round for gptqmodel": (ROUND | {"packing_format": "auto_round:gptqmodel"}, 4, gptq_v2),
    "auto-round": (ROUND | {"packing_format": "auto_round:auto_gptq"}, 4, gptq),
    "auto-round for awq": (ROUND | {"packing_format": "auto_round:auto_awq"}, 4, gemm),
}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes six layers; `change` edits the tensors of the layer 2, `every` all tensors."""

    def write(case, change=lambda parts: None, *, layers=LAYERS, every=lambda tensors: None, **settings):
        config, bits, pack = (CASES | FAST)[case]
        tensors, values = {}, {}
        for index, layer in enumerate(layers):
            codes, zeros, scales, values[layer] = quantized(index, bits, config.get("sym"))
            parts = pack(codes, zeros, scales, bits)
            if index == 2:
                change(parts)
            tensors |= {f"{layer}.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
        every(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        stated = {"model_type": "llama", "num_hidden_layers": len(layers), "quantization_config": config | settings}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        return open_folder(tmp_path), values

    return write


def found(folder, metric="checkpoint_health"):
    return [(finding.tensor, finding.what) for finding in problems_of(Files(folder), metric)[1]]


@pytest.mark.parametrize("case", CASES)
def test_rows_are_codes_less_zero_points_times_scales(write, case):
    folder, values = write(case)
    form = format_of(folder)
    assert form.weight_shape(DOWN) == (OUT, IN)
    for rows in (slice(None), slice(5, 22), slice(3, None, 7)):
        np.testing.assert_array_equal(form.rows(DOWN, rows), values[DOWN][rows])


@pytest.mark.parametrize("case", CASES)
def test_a_healthy_checkpoint_has_no_problem(write, case):
    assert found(write(case)[0]) == []


def add_to_zero_points(parts, bits=4):
    """Add one to every zero point, without a carry into its neighbour."""
    words = parts["qzeros"].view(np.uint32)
    codes = sum(
        ((((words >> np.uint32(at)) + np.uint32(1)) & np.uint32((1 << bits) - 1)) << np.uint32(at))
        for at in range(0, 32, bits)
    )
    parts["qzeros"] = codes.astype(np.uint32).view(np.int32)


def spoil(parts):
    parts["scales"] = parts["scales"].copy()
    parts["scales"][1, 3] = np.nan


def level(parts):
    parts["qweight"] = np.full_like(parts["qweight"], 0x33333333)


FAULTS = {
    "zero points + 1": (add_to_zero_points, "qzeros", "zero_points"),
    "scales × 4": (lambda parts: parts.update(scales=parts["scales"] * np.float16(4)), "scales", "the median scale"),
    "a scale is NaN": (spoil, "scales", "are NaN"),
    "codes are constant": (level, "qweight", "all of it is one value"),
    "zero points are lost": (lambda parts: parts.pop("qzeros"), "qzeros", "missing"),
    "zero points of another shape": (lambda p: p.update(qzeros=p["qzeros"][:-1]), "qzeros", "but zero points of 4"),
}
FOUR_BITS = ["gptq in 4 bits", "symmetric gptq", "symmetric gptq v2", "gptq v2", "awq", "awq by row", "auto-round"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", FOUR_BITS)
def test_a_fault_is_found_in_its_layer_and_nowhere_else(write, case, fault):
    change, part, text = FAULTS[fault]
    if text == "zero_points":
        text = "as a symmetric scheme" if "symmetric" in case else "siblings"
    problems = found(write(case, change)[0])
    assert {name.rpartition(".")[0] for name, _ in problems} == {DOWN}
    assert any(name == f"{DOWN}.{part}" and text in what for name, what in problems), problems


@pytest.mark.parametrize(("declared", "odd"), [("gptq", 9), ("gptq_v2", 7)])
def test_a_symmetric_checkpoint_that_claims_the_other_version_is_off_by_one_throughout(write, declared, odd):
    case = "symmetric gptq v2" if declared == "gptq" else "symmetric gptq"
    problems = found(write(case, checkpoint_format=declared)[0])
    assert problems == [
        (f"{layer}.qzeros", f"256 of 256 aren't 8, as a symmetric scheme has them, the first is {odd}")
        for layer in LAYERS
    ]


def test_a_zero_point_that_readers_of_v1_take_for_another_is_out_of_range(write):
    def change(parts):
        parts["qzeros"] = parts["qzeros"].copy()
        parts["qzeros"].view(np.uint32)[0, 0] |= np.uint32(0xF)

    assert found(write("gptq in 4 bits", change)[0]) == [
        (f"{DOWN}.qzeros", "1 of 256 aren't within 0 … 15, the first is 16")
    ]


def permuted(parts):
    parts["g_idx"] = np.random.default_rng(0).permutation(np.arange(IN) // SIZE).astype(np.int32)


def signed(tensors, layers):
    """Turn the sign of every second group of some layers, as AutoRound does where the largest weight is positive."""
    for layer in layers:
        tensors[f"{layer}.scales"] = tensors[f"{layer}.scales"].copy()
        tensors[f"{layer}.scales"][::2] *= -1


def test_scales_that_have_a_sign_in_every_layer_are_no_fault(write):
    folder, values = write("symmetric gptq", every=lambda tensors: signed(tensors, LAYERS))
    expected = values[DOWN].reshape(OUT, GROUPS, SIZE) * np.array([-1, 1, -1, 1])[:, None]
    np.testing.assert_array_equal(format_of(folder).rows(DOWN), expected.reshape(OUT, IN))
    assert found(folder) == []


def test_scales_that_have_a_sign_in_one_layer_alone_are_a_fault(write):
    folder, _ = write("symmetric gptq", every=lambda tensors: signed(tensors, [DOWN]))
    assert found(folder) == [(f"{DOWN}.scales", "128 of 256 are negative, the first at 0")]


@pytest.mark.parametrize("case", ["gptq in 4 bits", "gptq in 3 bits", "awq", "awq by row"])
@pytest.mark.parametrize("fault", ["rows_permuted", "zero_point_shifted", "weights_constant"])
def test_faults_of_the_self_test_are_faults_of_outputs_and_of_single_zero_points(write, tmp_path, case, fault):
    folder, values = write(case)
    mutant = Mutant(folder)
    faults.FAULTS[fault].inject(mutant, DOWN, 1.0)
    rows = format_of(open_folder(mutant.save(tmp_path / "faulty"))).rows(DOWN)
    width = 8 if case == "awq" else 1  # outputs in one word
    scales = format_of(folder).scale_values(DOWN, "scales").T.repeat(SIZE, axis=1)
    if fault == "zero_point_shifted":
        steps = (values[DOWN] - rows) / scales
        np.testing.assert_allclose(steps, np.where(steps > 0, 1, 1 - 2 ** CASES[case][1]), atol=1e-9)
    elif fault == "rows_permuted":
        zeros = format_of(folder).zero_point_values(DOWN).T.repeat(SIZE, axis=1)
        codes = values[DOWN] / scales + zeros
        np.testing.assert_allclose(rows, (np.roll(codes, width, axis=0) - zeros) * scales, atol=1e-9)
    else:
        zeros = format_of(folder).zero_point_values(DOWN).T.repeat(SIZE, axis=1)
        codes = np.round(rows / scales + zeros)
        assert (codes == codes[:, :1]).all() if 32 % CASES[case][1] else len(np.unique(codes, axis=1).T) <= 8


def test_inputs_in_an_order_of_their_own_take_scales_by_g_idx(write):
    kept = {}

    def change(parts):
        permuted(parts)
        kept.update(parts)

    folder, _ = write("gptq in 4 bits", change, desc_act=True)
    codes, zeros, scales, _ = quantized(2, 4, symmetric=False)
    expected = (codes - zeros[:, kept["g_idx"]]) * scales.astype(np.float64)[:, kept["g_idx"]]
    np.testing.assert_array_equal(format_of(folder).rows(DOWN), expected)
    assert [what for _, what in found(folder) if "sibling" not in what] == []


def test_an_order_that_is_not_declared_is_found(write):
    problems = found(write("gptq in 4 bits", permuted)[0], "checkpoint_scales")
    assert problems == [(f"{DOWN}.g_idx", "input 0 isn't in its group of 32, as without desc_act it must be")]


def test_groups_of_unequal_sizes_are_found_in_an_order_that_is_declared(write):
    def change(parts):
        permuted(parts)
        parts["g_idx"][np.flatnonzero(parts["g_idx"] == 1)[0]] = 0

    problems = found(write("gptq in 4 bits", change, desc_act=True)[0], "checkpoint_scales")
    assert problems == [(f"{DOWN}.g_idx", "its groups don't have 32 inputs each")]


def test_dynamic_overrides_the_bits_of_single_layers(write):
    def change(parts):
        codes, zeros, scales, _ = quantized(2, 8, symmetric=False)
        parts.update(gptq(codes, zeros, scales, 8))

    folder, _ = write("gptq in 4 bits", change, dynamic={r"+:model\.layers\.2\.": {"bits": 8}})
    np.testing.assert_array_equal(format_of(folder).rows(DOWN), quantized(2, 8, symmetric=False)[3])
    assert [what for _, what in found(folder) if "sibling" not in what] == []


def test_the_first_pattern_of_dynamic_that_matches_decides(write):
    dynamic = {r"+:.*\.2\.": {"bits": 8}, "-:.*down_proj": {}, ".*": {"bits": 2}}
    form = format_of(write("gptq in 4 bits", dynamic=dynamic)[0])
    schemes = [form.scheme_of(layer) for layer in (DOWN, LAYERS[1], "up_proj", "lm_head")]
    assert [scheme and scheme.bits for scheme in schemes] == [8, None, 2, None]


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("gptq in 4 bits", {"dynamic": {"+:layers.(2": {"bits": 8}}}),
        ("gptq in 4 bits", {"dynamic": {"-:layers.(2": {}}}),
        ("awq", {"modules_to_not_convert": ["layers.(2"]}),
    ],
)
def test_a_pattern_that_is_no_regular_expression_is_told(write, case, settings):
    with pytest.raises(AnomalyError, match=r"names layers by .*layers\.\(2.*, which is no regular expression"):
        found(write(case, **settings)[0])


def test_the_settings_of_single_layers_of_auto_round_are_read(write):
    def change(parts):
        codes, zeros, scales, _ = quantized(2, 8, symmetric=False)
        parts.update(gptq(codes, zeros, scales, 8))

    folder, _ = write("auto-round", change, extra_config={DOWN: {"bits": 8}})
    np.testing.assert_array_equal(format_of(folder).rows(DOWN), quantized(2, 8, symmetric=False)[3])


CONTRADICTIONS = {
    "other bits": ("gptq in 4 bits", {"bits": 8}),
    "another group size": ("gptq in 4 bits", {"group_size": 64}),
    "another packing": ("awq", {"version": "gemv"}),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_declaration_that_contradicts_the_tensors_gives_no_numbers(write, case):
    packing, settings = CONTRADICTIONS[case]
    folder, _ = write(packing, **settings)
    with pytest.raises(AnomalyError, match=rf"the tensors of {DOWN} don't fit one another"):
        format_of(folder).rows(DOWN)
    assert {name.rpartition(".")[0] for name, _ in found(folder, "checkpoint_scales")} == set(LAYERS)


def test_rows_without_zero_points_name_what_is_lost(write):
    folder, _ = write("awq", lambda parts: parts.pop("qzeros"))
    with pytest.raises(AnomalyError, match=rf"{DOWN} has no qzeros"):
        format_of(folder).rows(DOWN)


@pytest.mark.parametrize(
    ("layer", "key", "disagree"),
    [
        ("mlp.gate_proj", "gate", True),  # a part of the name, and no whole part
        ("mlp.gate_proj", "gate_proj", False),
        ("mlp.gate_proj", "model.layers.0.mlp", False),
        ("mlp.gate_proj", "model.layers.0.*", True),  # a regex, and no part of a name
        ("mlp.gate_proj", "up_proj", False),
    ],
)
def test_a_name_that_readers_of_awq_understand_differently_is_found(write, layer, key, disagree):
    layers = [f"model.layers.{index}.{layer}" for index in range(6)]
    problems = found(write("awq", layers=layers, modules_to_not_convert=[key])[0], "checkpoint_scales")
    assert bool(problems) is disagree
    assert all("modules_to_not_convert leaves it out for" in what for _, what in problems)


PLACES = [8 * column + row for row in range(8) for column in range(4)]
"""The input, of 32, in each place of `gemv_fast`, as AutoAWQ's and llm-awq's own packer puts numbers from 0 to 31."""


def gemv_fast(name):
    """Return a packing of four outputs × 64 inputs in 64 words of 16 bits, with zero points times negative scales."""

    def pack(codes, zeros, scales, bits):
        words = np.zeros((OUT // 4, IN), np.uint16)
        for output in range(OUT):
            for block in range(IN // 64):
                for place in range(64):
                    code = int(codes[output, block * 64 + place // 32 * 32 + PLACES[place % 32]])
                    word, nibble = divmod(output % 4 * 64 + place, 4)
                    words[output // 4, block * 64 + word] |= np.uint16(code << 4 * nibble)
        products = (-(scales.astype(np.float32) * zeros)).astype(np.float16)
        padding = ((0, 32 - GROUPS), (0, 0))
        return {
            "qweight": words.view(np.int16),
            "scales": np.pad(scales.T, padding),
            name: np.pad(products.T, padding),
        }

    return pack


FAST = {
    "awq gemv_fast": (AWQ | {"version": "gemv_fast"}, 4, gemv_fast("qzeros")),
    "llm-awq": (AWQ | {"version": "llm-awq"}, 4, gemv_fast("scaled_zeros")),
}


@pytest.mark.parametrize("case", FAST)
def test_tiles_of_four_outputs_are_read_as_their_writers_define_them(write, case):
    folder, _ = write(case)
    form = format_of(folder)
    codes, zeros, scales, _ = quantized(2, 4, symmetric=False)
    products = (-(scales.astype(np.float32) * zeros)).astype(np.float16).astype(np.float64)
    expected = codes * scales.astype(np.float64).repeat(SIZE, axis=1) + products.repeat(SIZE, axis=1)
    for rows in (slice(None), slice(5, 22), slice(3, None, 7)):
        np.testing.assert_array_equal(form.rows(DOWN, rows), expected[rows])
    np.testing.assert_array_equal(form.zero_point_values(DOWN), zeros.T)
    assert form.weight_shape(DOWN) == (OUT, IN)
    assert found(folder) == []


@pytest.mark.parametrize("case", FAST)
@pytest.mark.parametrize("fault", ["scale_layer", "nan_scale", "weights_constant", "zero_point_shifted"])
def test_a_fault_in_tiles_is_found_in_its_layer(write, tmp_path, case, fault):
    folder, _ = write(case)
    mutant = Mutant(folder)
    faults.FAULTS[fault].inject(mutant, DOWN, 4.0 if fault == "scale_layer" else 1.0)
    problems = found(open_folder(mutant.save(tmp_path / "faulty")))
    assert {name.rpartition(".")[0] for name, _ in problems} == {DOWN}, problems


@pytest.mark.parametrize(
    ("case", "settings", "said"),
    [
        ("gptq in 4 bits", {"checkpoint_format": "marlin"}, "the packing marlin isn't read in 4 bits"),
        ("gptq in 4 bits", {"bits": 5}, "the packing gptq isn't read in 5 bits"),
        (
            "auto-round",
            {"packing_format": "auto_round:mlx"},
            "auto_round:mlx isn't read in 4 bits",
        ),
    ],
)
def test_a_packing_that_is_not_read_is_named(write, case, settings, said):
    form = format_of(write(case, **settings)[0])
    assert form.rows(DOWN) is None
    assert said in form.refusal(DOWN)


SPOILED = {
    "a column less": lambda array: array[..., :-1],
    "a row less": lambda array: array[:-1],
    "no columns": lambda array: array[..., :0],
    "in a row": lambda array: array.reshape(-1),
    "one number": lambda array: array.reshape(-1)[0],
    "other axes": lambda array: array.T,
    "booleans": lambda array: array.astype(bool),
}


@pytest.mark.parametrize("case", ["gptq in 3 bits", "gptq in planes of 5 bits", "awq", "awq by row", "awq gemv_fast"])
def test_tensors_of_another_shape_are_told_in_one_line(write, tmp_path, case):
    write(case)
    tensors, untold = load_file(tmp_path / "model.safetensors"), []
    for name in (name for name in tensors if name.startswith(DOWN)):
        for how, spoil in SPOILED.items():
            save_file({**tensors, name: np.ascontiguousarray(spoil(tensors[name]))}, tmp_path / "model.safetensors")
            folder, said = open_folder(tmp_path), []
            try:
                said += [what for _, what in found(folder)]
                said += [] if format_of(folder).rows(DOWN) is not None else [format_of(folder).refusal(DOWN)]
            except (AnomalyError, InfraError) as error:
                said.append(str(error))
            assert not any("\n" in line for line in said)
            untold += [] if said else [(name, how)]
    # fewer inputs are a whole weight, and the padding of some packings may be narrower
    assert {how for _, how in untold} <= {"a row less", "a column less"}, untold


@pytest.mark.parametrize("settings", [{"group_size": [128, 128]}, {"bits": "four"}])
def test_sizes_that_are_no_whole_numbers_are_told_in_one_line(write, settings):
    folder, _ = write("gptq in 4 bits", **settings)
    with pytest.raises(AnomalyError, match=r"group_size .* and bits .* in quantization_config aren't whole numbers"):
        format_of(folder).rows(DOWN)

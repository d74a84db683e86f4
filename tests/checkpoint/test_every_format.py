"""Each format as its own library has saved it: read as the library reads it, without an alarm, every damage found.

The files in `fixtures/formats/` are small: of each block one projection, or the experts. `benchmarks/formats.py` made
them, and runs the same on whole models. The libraries' own reading of a layer lies beside each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from pytest_qsa.captures import ERROR, GAIN, Request
from pytest_qsa.checkpoint import (
    NEAREST as ROUNDED,
    Files,
    capture_weights,
    encoded,
    format_of,
    open_folder,
    problems_of,
)
from pytest_qsa.tools.draft import GAIN_BOUNDS
from pytest_qsa.tools.selftest.faults import FAULTS
from pytest_qsa.tools.selftest.mutant import Mutant

ROOT = Path(__file__).parent / "fixtures" / "formats"
ORIGINALS = ("llama", "gpt-oss")
MADE = sorted(folder.name for folder in ROOT.iterdir() if folder.is_dir() and folder.name not in ORIGINALS)
DAMAGES = {
    "scale × 4": ("scale_layer", 4.0),
    "NaN scale": ("nan_scale", 1.0),
    "constant codes": ("weights_constant", 1.0),
    "zero point + 1": ("zero_point_shifted", 1.0),
    "rows rolled": ("rows_permuted", 1.0),
    "two rows exchanged": ("rows_permuted", 0.0),
}
NOT_IN_THE_FILES = ("zero point + 1", "rows rolled", "two rows exchanged")
"""The damages that only a comparison with the original shows, but for zero points of 4 bits and fewer."""
FAR_APART = ("ct_FP8", "modelopt_FP8_DEFAULT", "modelopt_INT8_SMOOTHQUANT", "fp8_tensor", "fp8_blocks_ue8m0")
"""The formats whose one or two scales, or smoothed ones, differ so much from block to block that × 4 is not far."""
EVERY = r"(v_proj|\.experts\.\d+\.\w+)$"


def opened(path):
    return open_folder(path, gguf_file="model.gguf" if (path / "model.gguf").exists() else None)


def original(name):
    return open_folder(ROOT / ("gpt-oss" if "gpt-oss" in name else "llama"))


def alarms(folder):
    return {(found.layer, found.what) for found in problems_of(Files(folder), "checkpoint_health")[1]}


def sqnr(folder, name):
    """Return {(layer, by): dB} of every layer, by the names of the original's."""
    files = Files(folder, original(name))
    modules = list(original(name).layers) if folder.gguf_file else ()
    capture = capture_weights(files, [Request(EVERY, "weight", None, frozenset({ERROR}))], modules=modules)
    assert not capture.refused
    found = {by: capture.select(EVERY, "weight").weight_sqnr(by=by) for by in ("tensor", "channel")}
    return {(layer, by): value for by, s in found.items() for layer, value in zip(s.layers, s.values, strict=True)}


def is_damaged(layer):
    """Say whether a layer of the files or a site is of the one layer that is damaged, in block 3."""
    return "3" in layer.split(".")[1:3] and layer.endswith(("v_proj", "attn_v", "experts.down_proj", "down_proj"))


@pytest.mark.parametrize("name", MADE)
def test_a_healthy_checkpoint_has_no_alarm_and_is_near_the_original(name):
    folder = opened(ROOT / name)
    assert alarms(folder) == set()
    values = [value for (_, by), value in sqnr(folder, name).items() if by == "tensor" and value < np.inf]
    assert min(values) > (1 if "TQ" in name else 12)
    assert max(values) - min(values) < 6


NEAREST = [
    name
    for name in MADE
    if name.startswith(("ct_", "fp8_", "bnb_int8", "gptq_v2", "awq_gemv", "torchao_int", "modelopt_FP8", "modelopt_NV"))
]
"""The formats whose libraries round to nearest here, in a scheme that is known as numbers."""


@pytest.mark.parametrize("name", NEAREST)
def test_the_original_rounded_to_nearest_is_as_near_as_what_the_library_saved(name):
    request = Request(EVERY, "weight", None, frozenset({ERROR}))
    files = Files(opened(ROOT / name), original(name))
    own, rounded = (capture_weights(files, [request], again=each).weight(EVERY) for each in (None, ROUNDED))
    # of powers of two one rule clips where another doesn't, 1.6 dB of a row; a wrong number of bits is 6 dB
    np.testing.assert_allclose(rounded.weight_sqnr().values, own.weight_sqnr().values, atol=2)


@pytest.mark.parametrize("name", MADE)
def test_no_scale_group_of_a_healthy_checkpoint_is_out_of_its_room(name):
    files = Files(opened(ROOT / name), original(name))
    modules = list(original(name).layers) if files.folder.gguf_file else ()
    capture = capture_weights(files, [Request(EVERY, "weight", None, frozenset({GAIN}))], modules=modules)
    series = capture.select(EVERY, "weight").weight_gain()
    bits = {files.format.weight_bits(files.format.layers_of(series.layers)[layer]) for layer in series.layers}
    assert series.values.max() < GAIN_BOUNDS.get(min(bits), 1)


BITS = {"gptq_3": 3, "TQ2": 2, "Q6_K": 6, **dict.fromkeys(("FP8", "fp8", "int8", "INT8", "W8A8", "Q8_0"), 8)}
"""What a fixture's name says of the bits of a weight; all others have 4."""


@pytest.mark.parametrize("name", MADE)
def test_the_bits_of_a_weight_are_those_of_its_codes(name):
    form = Files(opened(ROOT / name)).format
    every = [layer for layer in form.folder.layers if form.codes_of(layer)] + [*form.experts]
    assert {form.weight_bits(layer) for layer in every} == {next((n for of, n in BITS.items() if of in name), 4)}


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.expected.safetensors")), ids=lambda file: file.name[:-21])
def test_rows_in_float32_are_what_the_library_dequantizes(file):
    form = format_of(opened(ROOT / file.name.removesuffix(".expected.safetensors")))
    with safe_open(file, framework="np") as content:
        names = list(content.keys())
    assert names
    for tensor in (tensor for tensor in expected_tensors(file) if tensor.name in names):
        layer = tensor.name.removesuffix(".weight")
        rows = form.rows(form.layers_of([layer, *original(file.name).layers])[layer]).reshape(tensor.shape)
        rounded = rows.astype(np.float32).astype(np.float64)
        same = encoded(rounded, tensor.dtype) == np.asarray(tensor.raw())
        # a library that multiplies codes, scales and the scale of scales in float32 rounds twice
        assert same.all() or (np.abs(rounded - tensor.values()) <= 2.0**-23 * np.abs(rounded)).all()


def expected_tensors(file):
    from pytest_qsa.checkpoint import tensors_of

    return tensors_of(file)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", MADE)
def test_a_damage_is_found_and_its_layer_named(name, damage, tmp_path):
    folder, (fault, strength) = opened(ROOT / name), DAMAGES[damage]
    layer = next(filter(is_damaged, FAULTS[fault].targets(folder)), None)
    if layer is None:
        assert damage == "zero point + 1"  # the other parts every format has
        return
    mutant = Mutant(folder)
    FAULTS[fault].inject(mutant, layer, strength)
    damaged = opened(mutant.save(tmp_path / "damaged"))
    found = {named for named, _ in alarms(damaged)}
    if not found:
        assert damage in NOT_IN_THE_FILES or (damage == "scale × 4" and name in FAR_APART)
        before = sqnr(folder, name)
        after = sqnr(damaged, name)
        found = {site for (site, by), value in before.items() if not after[site, by] >= value - 1}
    assert found
    assert [named for named in found if not is_damaged(named)] == []

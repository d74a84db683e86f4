"""Every quantized type of GGUF: its blocks against the package gguf, and damages of each found in the file alone."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.checkpoint.gguf_file import BLOCKS
from pytest_qsa.common import AnomalyError, InfraError
from pytest_qsa.tools.selftest.faults import FAULTS
from pytest_qsa.tools.selftest.mutant import Mutant

ROWS, INPUTS, BLOCKS_OF_MODEL = 24, 512, 5
DOWN = "blk.2.ffn_down"


def written(folder, name, tensors, arch="llama", **extra):
    """Write tensors of raw bytes of one type, and float ones, as llama.cpp's own writer does."""
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", arch)
    writer.add_block_count(BLOCKS_OF_MODEL)
    writer.add_head_count(4)
    for key, raw in tensors.items():
        writer.add_tensor(key, raw, raw_dtype=gguf.GGMLQuantizationType[name])
    for key, values in extra.items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def opened(folder):
    return open_folder(folder, gguf_file="model.gguf")


def tensors_of(name, kind="ffn_down", shape=(ROWS,)):
    """Return random blocks for one matrix in every block of a model, without scales."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    random = np.random.default_rng(3)
    shape = (*shape, INPUTS // weights * size)
    names = [f"blk.{index}.{kind}.weight" for index in range(BLOCKS_OF_MODEL)]
    return {name: random.integers(0, 256, shape, dtype=np.uint8) for name in names}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Return a function: type → folder of a file with random codes and sound scales."""
    made = {}

    def make(name):
        if name not in made:
            folder = written(tmp_path_factory.mktemp("gguf") / "sound", name, tensors_of(name))
            mutant = Mutant(opened(folder))
            for key in mutant.source.tensors:
                with mutant.edit_values(key) as scales:
                    scales[...] = np.random.default_rng(1).choice([0.5, 1.0], scales.shape)
            made[name] = opened(mutant.save(folder.parent / "healthy"))
        return made[name]

    return make


def as_the_library_reads(folder, layer):
    """Return a weight as the package gguf dequantizes it; the two types that it doesn't read by their definition."""
    reader = gguf.GGUFReader(folder.path / "model.gguf")
    entry = next(entry for entry in reader.tensors if entry.name == f"{layer}.weight")
    if entry.tensor_type.name not in ("Q1_0", "Q8_K"):
        return gguf.quants.dequantize(entry.data, entry.tensor_type)
    values = []
    for block in entry.data.reshape(-1, BLOCKS[entry.tensor_type.name].size):
        if entry.tensor_type.name == "Q8_K":  # ggml-common.h: float d, then 256 int8
            values += [float(block[:4].view("<f4")[0]) * int(code) for code in block[4:260].view(np.int8)]
        else:  # float16 d, then a bit a weight: + d where it is set, else - d
            d = float(block[:2].view("<f2")[0])
            values += [d if block[2 + index // 8] >> (index % 8) & 1 else -d for index in range(128)]
    return np.array(values).reshape(ROWS, INPUTS)


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_are_those_of_the_library_bit_for_bit(healthy, name):
    folder = healthy(name)
    form, expected = format_of(folder), as_the_library_reads(folder, DOWN)
    np.testing.assert_array_equal(form.rows(DOWN), expected)
    np.testing.assert_array_equal(form.rows(DOWN, slice(3, 20, 4)), expected[3:20:4])
    assert form.weight_shape(DOWN) == (ROWS, INPUTS)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_scales_of_a_block_are_where_the_library_reads_them(healthy, name, tmp_path):
    folder = healthy(name)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (BLOCKS[name].weights, BLOCKS[name].size) == size
    mutant = Mutant(folder)
    FAULTS["scale_layer"].inject(mutant, DOWN, 4.0)
    copy = opened(mutant.save(tmp_path / "copy"))
    np.testing.assert_array_equal(as_the_library_reads(copy, DOWN), 4 * as_the_library_reads(folder, DOWN))
    other = "blk.3.ffn_down"
    np.testing.assert_array_equal(as_the_library_reads(copy, other), as_the_library_reads(folder, other))


def found(folder):
    return [(each.tensor, each.what) for each in problems_of(Files(folder), "checkpoint_health")[1]]


DAMAGES = {
    "scale_layer": (4.0, "the median rms of a row is "),
    "nan_scale": (1.0, "blocks have a scale that is NaN or infinite"),
    "weights_constant": (1.0, "all of it is one value"),
    "some rows": (0.1, "rows are one code throughout, the first row 0"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_damage_is_found_in_the_file_and_its_layer_named(healthy, name, tmp_path):
    assert found(healthy(name)) == []
    for damage, (strength, text) in DAMAGES.items():
        mutant = Mutant(healthy(name))
        fault = "weights_constant" if damage == "some rows" else damage
        FAULTS[fault].inject(mutant, DOWN, strength)
        problems = found(opened(mutant.save(tmp_path / damage)))
        assert {tensor for tensor, _ in problems} == {f"{DOWN}.weight"}, (damage, problems)
        assert any(text in what for _, what in problems), (damage, problems)


def edited(folder, target, edit):
    """Save a copy whose raw bytes of one layer are changed in place."""
    mutant = Mutant(folder)
    with mutant.edit(f"{DOWN}.weight") as raw:
        edit(raw)
    return opened(mutant.save(target))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ2_S", "MXFP4", "NVFP4"])
def test_a_pruned_row_is_no_fault(healthy, name, tmp_path):
    def prune(raw):
        raw[5] = 0

    assert found(edited(healthy(name), tmp_path / "pruned", prune)) == []


def test_exponents_that_were_never_written_are_found(healthy, tmp_path):
    def lose(raw):
        raw.reshape(-1, 17)[:7, 0] = 0

    problems = found(edited(healthy("MXFP4"), tmp_path / "lost", lose))
    assert problems == [(f"{DOWN}.weight", "7 of 384 scales are 0, and their weights aren't")]


def test_a_scale_of_the_whole_tensor_multiplies_its_blocks(healthy, tmp_path):
    tensors = {key: tensor.raw() for key, tensor in healthy("NVFP4").tensors.items()}
    scales = {f"blk.{i}.ffn_down.scale": np.full(1, 0.5 if i == 2 else 0.25, np.float32) for i in range(5)}
    folder = opened(written(tmp_path / "scaled", "NVFP4", tensors, **scales))
    np.testing.assert_array_equal(format_of(folder).rows(DOWN), as_the_library_reads(folder, DOWN) * 0.5)
    assert format_of(folder).rows("blk.1.ffn_down").max() == as_the_library_reads(folder, "blk.1.ffn_down").max() / 4
    assert {tensor for tensor, _ in found(folder)} == {f"{DOWN}.scale", f"{DOWN}.weight"}


def test_experts_are_read_one_below_the_other(healthy, tmp_path):
    packed = tensors_of("Q8_0", "ffn_down_exps", (3, 8))
    random = np.random.default_rng(2)
    for raw in packed.values():
        raw[...] = gguf.quants.quantize(random.normal(size=(3, 8, INPUTS)).astype("f4"), gguf.GGMLQuantizationType.Q8_0)
    form = format_of(opened(written(tmp_path / "experts", "Q8_0", packed)))
    layer = "blk.2.ffn_down_exps"
    expected = gguf.quants.dequantize(packed[f"{layer}.weight"], gguf.GGMLQuantizationType.Q8_0)
    assert form.weight_shape(layer) == (24, INPUTS)
    np.testing.assert_array_equal(form.rows(layer), expected.reshape(24, INPUTS))
    np.testing.assert_array_equal(form.rows(layer, slice(8, 16)), expected[1])


def test_rows_of_a_llama_s_queries_are_in_the_order_of_transformers(tmp_path):
    raw = tensors_of("Q8_0", "attn_q")
    values = np.arange(ROWS * INPUTS, dtype=np.float32).reshape(ROWS, INPUTS)
    halves = values.reshape(4, 2, ROWS // 8, INPUTS).swapaxes(1, 2).reshape(ROWS, INPUTS)  # as its converter writes
    kind = gguf.GGMLQuantizationType.Q8_0
    raw["blk.0.attn_q.weight"] = gguf.quants.quantize(halves, kind)
    form = format_of(opened(written(tmp_path / "queries", "Q8_0", raw)))
    expected = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    np.testing.assert_array_equal(form.rows("blk.0.attn_q"), expected)
    np.testing.assert_array_equal(form.rows("blk.0.attn_q", slice(5, 9)), expected[5:9])


def test_a_type_that_is_not_read_is_never_read_as_numbers(tmp_path):
    folder = opened(written(tmp_path / "q8_1", "Q8_1", tensors_of("Q8_1")))
    assert format_of(folder).rows(DOWN) is None


def test_a_type_that_the_package_does_not_know_is_named(tmp_path):
    folder = written(tmp_path / "newer", "Q8_0", tensors_of("Q8_0"))
    content = bytearray((folder / "model.gguf").read_bytes())
    at = content.index(b"blk.2.ffn_down.weight") + len("blk.2.ffn_down.weight") + 4 + 2 * 8
    assert content[at] == gguf.GGMLQuantizationType.Q8_0
    content[at] = 99
    (folder / "model.gguf").write_bytes(content)
    with pytest.raises(InfraError, match="tensors of the type 99, which the installed gguf doesn't know: upgrade it"):
        found(opened(folder))


def test_a_file_that_was_cut_short_is_damaged(healthy, tmp_path):
    content = (healthy("Q4_K").path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:-1000])
    with pytest.raises(AnomalyError, match="can't be read as GGUF"):
        found(opened(tmp_path))


@pytest.mark.parametrize(("arch", "added"), [("llama", 0.0), ("gemma2", 1.0)])
@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_floats_are_the_reference_s_as_the_converter_names_and_changes_them(tmp_path, arch, added, factor):
    """It writes the norms of Gemma with 1 added, and interleaves the rows of llama's queries, so their biases too."""
    norm, bias = np.linspace(-0.5, 2, INPUTS, dtype=np.float32), np.arange(16, dtype=np.float32)
    own = {"blk.0.attn_norm.weight": factor * norm + added, "output_norm.weight": norm + added}
    own |= {"blk.0.attn_q.bias": bias.reshape(4, 2, 2).swapaxes(1, 2).ravel()} if arch == "llama" else {}
    gguf_folder = written(tmp_path / "gguf", "F32", {}, arch, **{key: np.float32(each) for key, each in own.items()})
    (tmp_path / "original").mkdir()
    original = {"model.layers.0.input_layernorm.weight": norm, "model.norm.weight": norm}
    save_file(original | {"model.layers.0.self_attn.q_proj.bias": bias}, tmp_path / "original" / "model.safetensors")
    (tmp_path / "original" / "config.json").write_text("{}")
    found = problems_of(Files(opened(gguf_folder), open_folder(tmp_path / "original")), "checkpoint_unquantized")[1]
    assert [each.tensor for each in found] == ["blk.0.attn_norm.weight"] * (factor != 1)

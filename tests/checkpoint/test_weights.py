"""The weights of a checkpoint's files as a capture, against an independent reading of the same files."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from pytest_qsa.captures import Capture, FilesProvenance, ModelProvenance, Request
from pytest_qsa.checkpoint import Files, Folder, capture_weights, open_folder, weights as module
from pytest_qsa.common import AnomalyError, InfraError
from support.captures import statistics
from support.checkpoints import save_adapter, save_gguf

DOWN = "model.layers.2.mlp.down_proj"


def captured(folder, *wanted, reference=None, layers=".", **options):
    files = Files(Folder(folder), Folder(reference) if reference else None)
    return capture_weights(files, [Request(layers, "weight", None, statistics(*wanted))], **options)


def float_weights(folder):
    """Return the plain float tensors named `weight`, by layer, in float64."""
    tensors = load_file(folder / "model.safetensors")
    return {
        name.removesuffix(".weight"): x.astype(np.float64) for name, x in tensors.items() if name.endswith("weight")
    }


def dequantized(folder, layer):
    tensors = load_file(folder / "model.safetensors")
    return tensors[f"{layer}.weight"].astype(np.float64) * tensors[f"{layer}.weight_scale"].astype(np.float64)


def changed(source, folder, change):
    """Copy a checkpoint with other tensors."""
    from safetensors.numpy import save_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_weight_of_the_files_is_a_site_in_natural_order(llama):
    found = captured(llama, "moments")
    weights = float_weights(llama)
    layers = [layer for layer, site in found.sites if site == "weight"]
    assert sorted(layers) == sorted(weights)
    blocks = [layer for layer in layers if layer.startswith("model.layers")]
    assert blocks == sorted(blocks, key=lambda name: int(name.split(".")[2]))


def test_metrics_of_float_weights_are_those_of_numpy(llama):
    found = captured(llama, "moments", "counts", "elements")
    weights = float_weights(llama)
    for metric, of in (
        ("rms", lambda x: np.sqrt(np.mean(x**2))), ("absmax", lambda x: np.abs(x).max()), ("mean", np.mean),
        ("zero_fraction", lambda x: np.mean(x == 0)),
    ):  # fmt: skip
        series = found.weight(".").series(metric)
        expected = [of(weights[layer]) for layer in series.layers]
        np.testing.assert_allclose(series.values, expected, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("at_once", [64, 1 << 19])
def test_the_error_of_a_quantized_weight_is_that_of_numpy_however_many_rows_are_read(
    int8_llama, llama, monkeypatch, at_once
):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    found = captured(int8_llama, "error", reference=llama, layers="_proj$").weight("_proj$")
    original = float_weights(llama)
    whole, worst = found.weight_sqnr(), found.weight_sqnr(by="channel")
    for layer, value, row in zip(whole.layers, whole.values, worst.values, strict=True):
        x, error = original[layer], original[layer] - dequantized(int8_llama, layer).astype(np.float32)
        assert value == pytest.approx(10 * np.log10(np.sum(x**2) / np.sum(error**2)), abs=1e-4)
        assert row == pytest.approx(np.min(10 * np.log10(np.sum(x**2, 1) / np.sum(error**2, 1))), abs=1e-4)


def test_a_checkpoint_compared_with_itself_has_no_error(int8_llama):
    assert (captured(int8_llama, "error", reference=int8_llama).weight(".").weight_sqnr().values == np.inf).all()


def test_a_scale_that_is_off_is_seen_at_its_layer_alone(int8_llama, llama, tmp_path):
    def scale(tensors):
        tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"] * 4

    folder = changed(int8_llama, tmp_path / "scaled", scale)
    series = captured(folder, "error", reference=llama, layers="_proj$").weight("_proj$").weight_sqnr()
    assert [layer for layer, value in zip(series.layers, series.values, strict=True) if value < 20] == [DOWN]


def test_two_rows_that_are_exchanged_are_the_worst_channels(int8_llama, llama, tmp_path):
    def exchange(tensors):
        for part in ("weight", "weight_scale"):
            tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"][[1, 0, *range(2, 32)]]

    folder = changed(int8_llama, tmp_path / "exchanged", exchange)
    series = captured(folder, "error", reference=llama, layers="_proj$").weight("_proj$").weight_sqnr(by="channel")
    assert [layer for layer, value in zip(series.layers, series.values, strict=True) if value < 10] == [DOWN]


def test_a_scale_that_is_no_number_makes_no_number(int8_llama, llama, tmp_path):
    def spoil(tensors):
        tensors[f"{DOWN}.weight_scale"][3] = np.nan

    folder = changed(int8_llama, tmp_path / "spoilt", spoil)
    found = captured(folder, "error", "moments", reference=llama, layers="_proj$").weight("_proj$")
    assert np.isnan(found.weight_sqnr().values).sum() == np.isnan(found.rms().values).sum() == 1
    assert found.nonfinite().values.sum() == 64


def test_names_of_a_model_stand_for_those_of_the_files(int8_llama):
    modules = ["model.layers.0", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.act_fn"]
    found = captured(int8_llama, "moments", modules=modules)
    assert list(found.sites) == [("model.layers.0.mlp.down_proj", "weight")]
    assert list(found.modules) == modules


def test_a_tied_head_is_compared_with_the_embedding(llama, tmp_path):
    def untie(tensors):
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].copy()

    def tie(tensors):
        del tensors["lm_head.weight"]

    whole = changed(llama, tmp_path / "whole", untie)
    tied = changed(whole, tmp_path / "tied", tie)
    with pytest.raises(AnomalyError, match=r"the reference has no layer lm_head: is model\.reference the original"):
        captured(whole, "error", reference=tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert captured(whole, "error", reference=tied).weight("lm_head").weight_sqnr().values == np.inf


def test_a_comparison_without_a_reference_is_refused(llama):
    with pytest.raises(InfraError, match=r"nothing to compare with: name .* model\.reference"):
        captured(llama, "error")


def test_a_weight_of_another_shape_stops_its_own_comparison_alone(llama, tmp_path):
    def shorten(tensors):
        tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"][:, :-1]

    found = captured(changed(llama, tmp_path / "short", shorten), "error", "moments", reference=llama)
    assert len(found.weight("layers.1.mlp").weight_sqnr().layers) == 3
    assert len(found.weight("down_proj").rms().layers) == 4
    with pytest.raises(InfraError, match=rf"{DOWN} can't be compared: it is 32×63 here and 32×64 in the reference"):
        found.weight("down_proj").weight_sqnr()


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_plain_floats_are_counted_in_the_dtype_of_the_file(llama, tmp_path, stored):
    import torch
    from safetensors.torch import load_file as load, save_file as save

    shutil.copytree(llama, tmp_path / stored)
    tensors = {name: x.to(getattr(torch, stored)) for name, x in load(llama / "model.safetensors").items()}
    save(tensors, tmp_path / stored / "model.safetensors")
    found = captured(tmp_path / stored, "counts", layers=DOWN)
    assert found.sites[DOWN, "weight"].dtype == stored
    exact = np.quantile(np.abs(tensors[f"{DOWN}.weight"].double().numpy()), 0.5)
    assert found.weight(DOWN).quantile(0.5).values == pytest.approx(exact, rel=2**-8 if stored == "float32" else 1e-12)


def test_a_gguf_file_is_compared_with_an_original_that_names_its_layers_otherwise(llama, tmp_path):
    folder = save_gguf(tmp_path / "gguf", llama)
    files = Files(Folder(folder, "model.gguf"), Folder(llama))
    found = capture_weights(files, [Request(".", "weight", None, statistics("error"))])
    series = found.weight(r"^blk\.\d+\.").weight_sqnr()
    assert "blk.2.attn_q" in series.layers  # whose rows llama.cpp has in another order
    assert series.values.min() > 40


def test_an_adapter_is_part_of_the_weights_that_are_read(llama, tmp_path):
    merged = save_adapter(tmp_path / "adapter", llama)
    files = Files(open_folder(tmp_path / "adapter", base=str(llama)))
    found = capture_weights(files, [Request("_proj$", "weight", None, statistics("moments"))])
    series = found.weight("_proj$").rms()
    for layer, value in zip(series.layers, series.values, strict=True):
        expected = merged[f"{layer}.weight"].double().square().mean().sqrt() if f"{layer}.weight" in merged else value
        assert value == pytest.approx(float(expected), rel=1e-6)
    assert "LoRA" in found.provenance.summary("adapted")
    assert {numbers.dtype for numbers in found.sites.values()} == {"float32"}


def test_where_the_numbers_come_from_is_kept_with_them(int8_llama, tmp_path):
    found = captured(int8_llama, "moments")
    found.save(tmp_path / "weights.qsa")
    again = Capture.load(tmp_path / "weights.qsa")
    assert again.provenance == found.provenance
    assert "weights read from the files (" in again.provenance.summary("llama")
    # A hash of the weights, which is another key, is no sign of it.
    read = ModelProvenance("x", files=FilesProvenance(1, 2, "none"), weights="sha256:0")
    assert ModelProvenance.of(read.plain()) == read

"""The factor of each scale group against the original: healthy quantizations keep it, a scale that is off does not."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pytest_qsa import capture
from pytest_qsa.captures import GAIN, Request
from pytest_qsa.checkpoint import Files, Folder, capture_weights
from pytest_qsa.common import SuiteError
from support import models
from support.checkpoints import edited, save_llama, save_quantized_llama
from support.projects import suite

DOWN = "model.layers.2.mlp.down_proj"
GROUP = 32


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "llama", width=64)


@pytest.fixture(scope="module")
def int4(original, tmp_path_factory):
    """int4 in groups of 32."""
    folder = tmp_path_factory.mktemp("int4") / "int4"
    return save_quantized_llama(folder, original, "W4A16", group_size=GROUP)


def gains(folder, original, stat="room"):
    files = Files(Folder(folder), Folder(original))
    found = capture_weights(files, [Request("_proj$", "weight", None, frozenset({GAIN}))])
    series = found.weight("_proj$").weight_gain(stat=stat)
    return dict(zip(series.layers, series.values.tolist(), strict=True))


def scaled(factor, *at):
    def change(weights):
        weights[f"{DOWN}.weight_scale"][at] *= factor

    return change


def rows_of(folder, layer):
    return Files(Folder(folder)).format.rows(layer)


def test_the_factor_is_that_of_numpy_and_its_room_is_eight_sigmas_of_rounding(original, int4):
    w0, w = rows_of(original, DOWN), rows_of(int4, DOWN)
    signal, product = ((x.reshape(len(w), -1, GROUP)).sum(-1) for x in (w0 * w0, w0 * w))
    factors = product / signal
    nmse, carrying = np.sum((w - w0) ** 2) / np.sum(w0**2), signal**2 / (w0**4).reshape((*signal.shape, GROUP)).sum(-1)
    rooms = np.maximum(8 * np.sqrt(nmse / GROUP), 4 * np.sqrt(nmse / carrying))
    groups = w0.reshape(*signal.shape, GROUP)
    scales = np.abs(groups).max(-1, keepdims=True) / 7.5
    nearest = (np.clip(np.rint(groups / scales), -8, 7) * scales * groups).sum(-1) / signal
    nearest[np.abs(nearest - 1) <= 0.01] = 1
    shares = np.maximum(0, np.maximum(np.minimum(nearest, 1) - factors, factors - np.maximum(nearest, 1))) / rooms
    assert 0.05 < rooms.min() < rooms.max() < 0.2
    assert gains(int4, original)[DOWN] == pytest.approx(shares.max(), rel=1e-5)
    assert gains(int4, original, "factor")[DOWN] == pytest.approx(factors.flat[shares.argmax()], rel=1e-5)


@pytest.mark.parametrize("group", [16, GROUP])
def test_groups_whose_largest_weight_is_clipped_are_where_round_to_nearest_puts_them(original, tmp_path, group):
    """A group's largest weight, where it is positive, becomes 7/7.5 of itself: alone in its group it is the factor."""

    def spiked(weights):
        weights[f"{DOWN}.weight"][3, :GROUP] *= 0.02
        weights[f"{DOWN}.weight"][3, 0] = weights[f"{DOWN}.weight"].abs().max()

    spike = edited(original, tmp_path / "spiked", spiked)
    int4 = save_quantized_llama(tmp_path / "int4", spike, "W4A16", group_size=group)
    assert gains(int4, spike)[DOWN] < 0.5
    layer = edited(int4, tmp_path / "scaled", scaled(1.4, 3, 0))
    assert gains(layer, spike)[DOWN] > 1


def test_a_healthy_quantization_is_within_the_room(original, int4, tmp_path):
    int8 = save_quantized_llama(tmp_path / "int8", original)
    for folder in (int4, int8):
        assert max(gains(folder, original).values()) < 1


def test_one_group_a_quarter_too_large_is_out_alone(original, int4, tmp_path):
    folder = edited(int4, tmp_path / "scaled", scaled(1.25, 5, 1))
    found = gains(folder, original)
    assert [layer for layer, value in found.items() if value > 1] == [DOWN]


def test_a_group_that_carries_the_errors_of_others_as_by_gptq_is_within_the_room_and_a_scale_of_it_is_not(
    original, int4, tmp_path
):
    """GPTQ adds to later columns what rounding takes from earlier ones, in directions that the weights don't have."""

    def carrying(weights):
        group = weights[f"{DOWN}.weight"][5, GROUP : 2 * GROUP]
        group += group.square().mean().sqrt() * np.sqrt(2) * torch.sin(torch.arange(GROUP) * 1.3)

    corrected = edited(original, tmp_path / "corrected", carrying)
    gptq = save_quantized_llama(tmp_path / "gptq", corrected, "W4A16", group_size=GROUP)
    assert abs(gains(gptq, original, "factor")[DOWN] - 1) > 0.01
    assert gains(gptq, original)[DOWN] < 1
    folder = edited(int4, tmp_path / "scaled", scaled(1.25, 5, 1))
    assert gains(folder, original)[DOWN] > 1


def test_a_layer_whose_scales_are_all_a_quarter_too_large_is_out(original, int4, tmp_path):
    folder = edited(int4, tmp_path / "all", scaled(1.25, Ellipsis))
    assert gains(folder, original, "factor")[DOWN] > 1.2
    assert gains(folder, original)[DOWN] > 1


def test_groups_that_are_lost_below_the_rounding_error_do_not_count(original, int4, tmp_path):
    """A row whose weights are a thousandth of the others': its scale may have been rounded to nothing."""

    def shrink(weights):
        weights[f"{DOWN}.weight"][7] *= 1e-3

    small = edited(original, tmp_path / "small", shrink)
    lost = edited(int4, tmp_path / "lost", scaled(0, 7))
    assert gains(lost, small)[DOWN] < 1
    assert gains(lost, original)[DOWN] > 1


def test_a_group_in_the_order_of_desc_act_is_found_by_its_own_columns(original, tmp_path):
    folder = tmp_path / "order"
    save_quantized_llama(folder, original, "W4A16", group_size=GROUP)
    tensors = load_file(folder / "model.safetensors")
    inputs = tensors[f"{DOWN}.weight_shape"].tolist()[1]
    order = np.arange(inputs, dtype=np.int32) % (inputs // GROUP)
    tensors[f"{DOWN}.weight_g_idx"] = order
    tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["actorder"] = "group"
    (folder / "config.json").write_text(json.dumps(config))
    groups = Files(Folder(folder)).format.scale_groups(DOWN, (64, inputs))
    np.testing.assert_array_equal(np.sort(order), order[groups.order])
    assert groups.columns == GROUP


@pytest.mark.process
def test_the_verdict_names_the_rows_and_columns_of_the_group_also_where_the_suite_runs_the_model(
    original, int4, tmp_path, project
):
    folder = edited(int4, tmp_path / "scaled", scaled(1.25, 5, 1))
    lines = [
        "id: groups, metric: weight_gain, layers: _proj$, site: weight, max: 1",
        "id: close, metric: weight_sqnr, layers: _proj$, site: weight, min: 5",
    ]
    project.write("gate.qsa.yaml", suite(f"{folder}, reference: {original}", *lines))
    run = project.pytest("gate.qsa.yaml", "--qsa-report=never")
    assert run.kind("groups") == "REGRESSION"
    assert DOWN in run.first_line("groups")
    assert "row 5, columns 32–63: × 1.2" in run.first_line("groups")
    assert [outcome for test, outcome in run.outcomes.items() if test.endswith("close")] == ["passed"]


def test_a_model_in_memory_has_no_scale_groups():
    model = models.llama()
    with pytest.raises(SuiteError, match="weight_gain reads the files"):
        capture(model, [models.token_batch(1, 8)], sites=[("_proj$", "weight")], statistics=["weight_gain"],
                reference=model)  # fmt: skip

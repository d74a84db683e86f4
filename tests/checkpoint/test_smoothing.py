"""Checkpoints whose scales were moved between layers, or turned: told from broken ones, and compared as can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pytest_qsa.checkpoint import Smoothing, compare_norms
from pytest_qsa.checkpoint.checks.health import problems_of
from pytest_qsa.checkpoint.files import Files
from pytest_qsa.checkpoint.folder import open_folder
from pytest_qsa.checkpoint.formats.format import format_of
from pytest_qsa.checkpoint.suspicions import suspicions_of
from pytest_qsa.engine.formats.format import dequantized
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.suite import Memory, Model
from support.checkpoints import FORMATS, TORCHAO, edited, save_quantized_llama, save_torchao_llama
from support.projects import Project, suite

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
DOWN = "model.layers.2.mlp.down_proj"
ODD = (DOWN, "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.3.mlp.gate_proj")
FORGOTTEN = "model.layers.2.mlp.gate_proj"
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def smooth(weights):
    """Divide every norm by scales of its channels, and multiply the columns that read it by the same (SmoothQuant)."""
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        for norm, readers in READERS.items():
            scales = torch.rand(32, generator=generator) * 3 + 0.3
            weights[f"model.layers.{index}.{norm}.weight"] /= scales
            for reader in readers:
                weights[f"model.layers.{index}.{reader}.weight"] *= scales


def rotate(weights):
    """Fold every norm into what reads it, and turn the residual stream by one orthogonal matrix (QuaRot)."""
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    weights["model.embed_tokens.weight"] = (weights["model.embed_tokens.weight"].double() @ turn).float()
    read = {
        f"model.layers.{i}.{norm}": [f"model.layers.{i}.{r}" for r in of]
        for i in range(4)
        for norm, of in READERS.items()
    }
    for norm, readers in {**read, "model.norm": ["lm_head"]}.items():
        gains = weights[f"{norm}.weight"].double()
        for reader in readers:
            weights[f"{reader}.weight"] = (weights[f"{reader}.weight"].double() * gains @ turn).float()
        weights[f"{norm}.weight"] = torch.ones(32)
    for index in range(4):
        for writer in WRITERS:
            name = f"model.layers.{index}.{writer}.weight"
            weights[name] = (turn.T @ weights[name].double()).float()


def learned(weights):
    """Give norms weights that are not 1, as training does."""
    generator = torch.Generator().manual_seed(2)
    for name in weights:
        if "norm" in name:
            weights[name] = torch.rand(32, generator=generator) + 0.5


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory):
    """Return a Llama with learned norms, and what was made of it without changing what it computes."""
    base = tmp_path_factory.mktemp("smoothing")
    original = edited(llama, base / "original", learned)
    made = {"original": original, "smoothed": edited(original, base / "smoothed", smooth)}
    made["rotated"] = edited(original, base / "rotated", rotate)
    for form in ("int8", "int4"):
        preset, changes = FORMATS[form]
        made[f"smoothed {form}"] = save_quantized_llama(base / f"smoothed-{form}", made["smoothed"], preset, **changes)
    made["smoothed torchao"] = save_torchao_llama(base / "smoothed-torchao", made["smoothed"], *TORCHAO["torchao int4"])
    made["int8"] = save_quantized_llama(base / "int8", original)
    return made


def relation(folders, name):
    return compare_norms(open_folder(folders[name]), open_folder(folders["original"]))


@pytest.mark.parametrize("name", ["smoothed", "rotated"])
def test_the_models_of_these_tests_compute_what_the_original_does(folders, name):
    ids = torch.arange(32)[None]
    one, other = (
        load_model(Model(path=str(f)), str(f), Memory(device="cpu"), allow_code=False).model(ids).logits.detach()
        for f in (folders[name], folders["original"])
    )
    np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("name", ["smoothed", "smoothed int8", "smoothed int4", "smoothed torchao"])
def test_norms_whose_change_the_next_layers_undo_are_a_smoothing(folders, name):
    found = relation(folders, name)
    assert (found.kind, found.compare, len(found.norms)) == ("smoothed", "blocks", 8)
    assert "the weights of 8 norms differ (model.layers.0.input_layernorm.weight, …)" in found.why


def test_embeddings_as_long_as_before_that_point_elsewhere_are_a_rotation(folders):
    found = relation(folders, "rotated")
    assert (found.kind, found.compare) == ("rotated", "logits")
    assert "the rows of model.embed_tokens are as long as the original's and point elsewhere" in found.why


def test_a_transform_config_declares_a_rotation(folders, tmp_path):
    def declare(config):
        config["quantization_config"]["transform_config"] = {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}

    folder = edited(folders["int8"], tmp_path / "declared", config=declare)
    found = compare_norms(open_folder(folder), open_folder(folders["original"]))
    assert (found.kind, found.compare) == ("rotated", "logits")


@pytest.mark.parametrize("name", ["original", "int8"])
def test_an_ordinary_checkpoint_is_compared_layer_by_layer(folders, name):
    assert (relation(folders, name).kind, relation(folders, name).compare) == ("same", "layers")


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.02, torch.linspace(0.5, 2, 32)])
def test_a_norm_that_nothing_makes_up_for_is_no_smoothing(folders, tmp_path, factor):
    def change(weights):
        weights["model.layers.2.input_layernorm.weight"] *= factor

    found = compare_norms(
        open_folder(edited(folders["int8"], tmp_path / "x", change)), open_folder(folders["original"])
    )
    assert (found.kind, found.compare) == ("changed", "layers")
    assert found.why.endswith("no layer that reads them makes up for it")


@pytest.mark.parametrize(
    "form", ["float", "int8", "int8 weights", "int4", "fp8 by channel", "torchao int8", "torchao int4"]
)
def test_rows_of_a_file_are_the_dequantized_weights_of_the_model(quantized, form):
    folder, layer = quantized[form], DOWN
    model = load_model(Model(path=str(folder)), str(folder), Memory(device="cpu"), allow_code=False).model
    want = dequantized(model.get_submodule(layer)).double().numpy()
    got = format_of(open_folder(folder)).rows(layer, slice(None, None, 3))
    np.testing.assert_allclose(got, want[::3], rtol=1e-6)


def test_fp8_rows_are_scaled_block_by_block(tmp_path, llama):
    name = f"{DOWN}.weight"

    def change(weights):
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    def declare(config):
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 32]}

    undeclared = edited(llama, tmp_path / "undeclared", change)
    assert format_of(open_folder(undeclared)).rows(DOWN) is None  # codes that nothing declares are never numbers
    folder = edited(llama, tmp_path / "fp8", change, config=declare)
    codes = load_file(folder / "model.safetensors")[name].double().numpy()
    want = codes * np.repeat(np.repeat([[1.0, 2.0], [3.0, 4.0]], 16, axis=0), 32, axis=1)
    np.testing.assert_array_equal(format_of(open_folder(folder)).rows(DOWN, slice(5, 20)), want[5:20])


LAYERS = "id: layers, metric: weight_sqnr, layers: q_proj$, min: 20"
BLOCKS = "id: blocks, metric: sqnr, layers: 'layers.\\d$', min: {bound}"


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """Hold smoothed, rotated and broken models against the original, in one run."""
    project = Project(tmp_path_factory.mktemp("smoothed") / "project")

    def halve(weights):
        weights["model.layers.2.self_attn.q_proj.weight_scale"] /= 2

    broken = edited(folders["int8"], project.folder.parent / "broken", halve)
    close, closer = BLOCKS.format(bound=10), BLOCKS.format(bound=200).replace("id: blocks", "id: closer")
    for name, (folder, *assertions) in {
        "smoothed": (folders["smoothed int8"], LAYERS, close, closer),
        "warned": (folders["smoothed int8"], f"{LAYERS}, level: warn"),
        "rotated": (folders["rotated"], LAYERS, close, "id: same, metric: same_top, min: 0.9"),
        "broken": (broken, LAYERS),
    }.items():
        text = suite(folder, *assertions)
        project.write(f"{name}.qsa.yaml", text.replace("{name", f"{{reference: {folders['original']}, name"))
    return project.pytest("--qsa-report=never")


@pytest.mark.process
def test_single_layers_of_a_smoothed_model_are_not_held_against_the_original(run):
    text = run.first_line("smoothed.qsa.yaml::layers")
    assert text.startswith(
        "ANOMALOUS layers: by design single layers can't be held against model.reference: the weights of"
    )
    assert "columns of the layers that read them make up for it" in text
    assert any("compare whole blocks" in hint for hint in run.labelled("smoothed.qsa.yaml::layers")["next"])


@pytest.mark.process
def test_whole_blocks_of_a_smoothed_model_are_compared_as_ever(run):
    assert run.outcomes["smoothed.qsa.yaml::blocks"] == "passed"
    assert run.first_line("smoothed.qsa.yaml::closer").startswith("REGRESSION closer")


@pytest.mark.process
def test_a_warning_says_so_as_well_and_stays_one(run):
    assert run.outcomes["warned.qsa.yaml::layers"] == "passed"
    assert any("by design single layers" in warning["text"] for warning in run.warnings)


@pytest.mark.process
def test_of_a_rotated_model_only_predictions_are_compared(run):
    for test in ("layers", "blocks"):
        assert "point elsewhere" in run.first_line(f"rotated.qsa.yaml::{test}")
    assert run.outcomes["rotated.qsa.yaml::same"] == "passed"


@pytest.mark.process
def test_a_broken_layer_of_an_ordinary_checkpoint_is_still_a_regression(run):
    text = run.first_line("broken.qsa.yaml::layers")
    assert text.startswith("REGRESSION")
    assert "model.layers.2.self_attn.q_proj" in text


def test_a_layer_whose_size_the_next_one_makes_up_for_has_no_finding(llama, tmp_path):
    """AWQ divides the rows of up_proj by what it multiplies the columns of down_proj by (arXiv 2306.00978)."""

    def fold(weights, *, back=True):
        weights["model.layers.2.mlp.up_proj.weight"] *= 8
        if back:
            weights[f"{DOWN}.weight"] /= 8

    folded = save_quantized_llama(tmp_path / "int8", edited(llama, tmp_path / "folded", fold))
    assert problems_of(Files(open_folder(folded)), "checkpoint_scales")[1] == []
    half = edited(llama, tmp_path / "half", lambda weights: fold(weights, back=False))
    found = problems_of(Files(open_folder(save_quantized_llama(tmp_path / "odd", half))), "checkpoint_scales")[1]
    assert {each.layer for each in found} == {"model.layers.2.mlp.up_proj"}


def fold_up(weights):
    """Take factors out of the rows of up_proj into the columns of down_proj, as AWQ does, most of all in layer 2."""
    generator = torch.Generator().manual_seed(3)
    for index in range(4):
        factors = (torch.rand(64, generator=generator) * 3 + 0.3) * (0.1 if index == 2 else 1)
        weights[f"model.layers.{index}.mlp.up_proj.weight"] /= factors[:, None]
        weights[f"model.layers.{index}.mlp.down_proj.weight"] *= factors


def fold_values(weights):
    """Take factors out of the rows of v_proj into the columns of o_proj; two heads read each head of values."""
    generator = torch.Generator().manual_seed(4)
    for index in range(4):
        factors = (torch.rand(2, 1, 8, generator=generator) * 3 + 0.3) * (0.1 if index == 2 else 1)
        weights[f"model.layers.{index}.self_attn.v_proj.weight"] /= factors.reshape(-1, 1)
        weights[f"model.layers.{index}.self_attn.o_proj.weight"] *= factors.expand(2, 2, 8).reshape(-1)


def cross(weights):
    """Divide the rows of k_proj by what those of q_proj are multiplied by, alike for both channels that rope mixes."""
    generator = torch.Generator().manual_seed(5)
    for index in range(4):
        factors = (torch.rand(2, 1, 1, 4, generator=generator) * 3 + 0.3) * (0.1 if index == 2 else 1)
        weights[f"model.layers.{index}.self_attn.k_proj.weight"] /= factors.expand(2, 1, 2, 4).reshape(-1, 1)
        weights[f"model.layers.{index}.self_attn.q_proj.weight"] *= factors.expand(2, 2, 2, 4).reshape(-1, 1)


@pytest.mark.parametrize("folded", [False, True])
def test_the_weights_of_a_smoothed_checkpoint_are_known_without_the_smoothing(folders, tmp_path, folded):
    def change(weights):
        smooth(weights)
        if folded:
            fold_up(weights)

    original = open_folder(folders["original"])
    changed = edited(folders["original"], tmp_path / "changed", change)
    folder = open_folder(save_quantized_llama(tmp_path / "int8", changed, "W8A16", group_size=None, strategy="channel"))
    own, theirs = format_of(folder), format_of(original)
    found = Smoothing(
        (folder, original), compare_norms(folder, original).norms, own.rows, theirs.rows, theirs.weight_shape
    )
    layers = [reader for readers in READERS.values() for reader in readers] + list(WRITERS)
    for layer in (f"model.layers.2.{each}" for each in layers):
        expected = theirs.rows(layer)
        error = np.square(found.undone(layer) - expected).sum() / np.square(expected).sum()
        assert error < 3e-4, layer  # that of 8 bits, whose scales are of the smoothed rows
        moved = layer.endswith(("down_proj", "o_proj")) and not (folded and layer.endswith("down_proj"))
        assert np.array_equal(found.undone(layer), own.rows(layer)) == moved, layer


def smooth_everywhere(weights):
    for change in (smooth, fold_up, fold_values, cross):
        change(weights)


@pytest.fixture(scope="module")
def everywhere(folders, tmp_path_factory):
    return edited(folders["original"], tmp_path_factory.mktemp("everywhere") / "float", smooth_everywhere)


def found_in(folder, original):
    """Return the layers in which `files` finds a problem."""
    files = Files(open_folder(folder), open_folder(original))
    return {each.layer for each in problems_of(files, "checkpoint_health")[1] if not each.note}


def test_factors_that_were_moved_in_every_place_change_nothing(everywhere, folders):
    ids = torch.arange(32)[None]
    one, other = (
        load_model(Model(path=str(f)), str(f), Memory(device="cpu"), allow_code=False).model(ids).logits.detach()
        for f in (everywhere, folders["original"])
    )
    np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_no_scale_of_a_smoothed_checkpoint_is_odd_but_one_that_nothing_makes_up_for(
    everywhere, folders, form, tmp_path
):
    preset, changes = FORMATS[form]
    sound = save_quantized_llama(tmp_path / "sound", everywhere, preset, **changes)
    assert found_in(sound, folders["original"]) == set()

    def shrink(weights):
        for layer in ODD:
            weights[f"{layer}.weight"] *= 0.55

    odd = save_quantized_llama(tmp_path / "odd", edited(everywhere, tmp_path / "shrunk", shrink), preset, **changes)
    assert found_in(odd, folders["original"]) == set(ODD)


@pytest.mark.parametrize("change", [fold_up, fold_values, cross])
def test_a_smoothing_that_changes_no_norm_is_one(folders, tmp_path, change):
    preset, changes = FORMATS["int4"]
    smoothed = edited(folders["original"], tmp_path / "float", change)
    folder = save_quantized_llama(tmp_path / "int4", smoothed, preset, **changes)
    found = compare_norms(open_folder(folder), open_folder(folders["original"]))
    assert (found.kind, found.compare) == ("smoothed", "blocks")
    assert "of 4" in found.why
    assert found_in(folder, folders["original"]) == set()


def test_a_smoothing_of_few_channels_is_one(folders, tmp_path):
    def change(weights):
        for index in range(4):
            weights[f"model.layers.{index}.input_layernorm.weight"][5] /= 20
            for reader in READERS["input_layernorm"]:
                weights[f"model.layers.{index}.{reader}.weight"][:, 5] *= 20

    folder = save_quantized_llama(tmp_path / "int8", edited(folders["original"], tmp_path / "float", change))
    assert compare_norms(open_folder(folder), open_folder(folders["original"])).kind == "smoothed"
    assert found_in(folder, folders["original"]) == set()


def turn_heads(weights, layers=("v_proj", "o_proj")):
    """Turn the values of each head by a matrix of its own, and turn them back in o_proj (SpinQuant's R2)."""
    generator = torch.Generator().manual_seed(6)
    for index in range(4):
        turns = torch.linalg.qr(torch.randn(2, 8, 8, generator=generator))[0]
        values, output = (f"model.layers.{index}.self_attn.{each}.weight" for each in ("v_proj", "o_proj"))
        if "v_proj" in layers:
            weights[values] = (turns @ weights[values].reshape(2, 8, 32)).reshape(16, 32)
        if "o_proj" in layers:
            outward = weights[output].reshape(32, 2, 2, 8)
            weights[output] = torch.einsum("oghc,gdc->oghd", outward, turns).reshape(32, 32).contiguous()


def test_values_that_were_turned_in_each_head_and_back_are_by_design(folders, tmp_path):
    turned = edited(folders["original"], tmp_path / "float", turn_heads)
    folder = save_quantized_llama(tmp_path / "int8", turned)
    found = compare_norms(open_folder(folder), open_folder(folders["original"]))
    assert (found.kind, found.compare) == ("rotated heads", "blocks")
    assert "in 4 of 4 blocks the heads of v_proj point elsewhere, and o_proj turns them back" in found.why
    assert found_in(folder, folders["original"]) == set()

    def shrink(weights):
        weights[f"{DOWN}.weight_scale"] *= 0.55

    assert found_in(edited(folder, tmp_path / "odd", shrink), folders["original"]) == {DOWN}


def test_values_that_nothing_turns_back_are_no_design(folders, tmp_path):
    turned = edited(folders["original"], tmp_path / "float", lambda weights: turn_heads(weights, ["v_proj"]))
    assert compare_norms(open_folder(turned), open_folder(folders["original"])).kind == "same"


def test_a_layer_that_shares_factors_is_named_with_the_one_it_has_them_from(everywhere, folders, tmp_path):
    def shrink(weights):
        weights["model.layers.2.mlp.up_proj.weight"] *= 0.55

    odd = save_quantized_llama(tmp_path / "odd", edited(everywhere, tmp_path / "shrunk", shrink))
    (found,) = problems_of(Files(open_folder(odd), open_folder(folders["original"])), "checkpoint_scales")[1]
    assert (found.layer, "0.55 × the size of the reference's" in found.what) == (DOWN, True)
    assert "it or model.layers.2.mlp.up_proj" in found.what


def test_only_a_scale_that_is_wrong_is_a_problem_of_a_rotated_checkpoint(folders, tmp_path):
    """Its norms went into the matrices, so that its scales are not those of siblings: here all the less in layer 2."""

    def learned_more(weights):
        weights["model.layers.2.post_attention_layernorm.weight"] *= 0.02

    original = edited(folders["original"], tmp_path / "original", learned_more)
    folder = save_quantized_llama(tmp_path / "int8", edited(original, tmp_path / "float", rotate))
    assert found_in(folder, original) == set()
    files = Files(open_folder(folder), open_folder(original))
    assert suspicions_of(files, files.folder.layers) == []

    def double(weights):
        weights["model.layers.2.mlp.gate_proj.weight_scale"] *= 2

    odd = edited(folder, tmp_path / "odd", double)
    (found,) = problems_of(Files(open_folder(odd), open_folder(original)), "checkpoint_scales")[1]
    assert found.layer == "model.layers.2.mlp.gate_proj"
    assert "2 × the size of the reference's" in found.what


@pytest.mark.parametrize("head", ["rotated", "random"])
def test_a_head_that_a_rotation_unties_is_a_fault_only_where_it_is_another(folders, tmp_path, head):
    def tie(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def untied(weights):
        tie(weights)
        rotate(weights)
        if head == "random":
            weights["lm_head.weight"] = torch.rand(320, 32)

    def tied(config):
        config["tie_word_embeddings"] = True

    original = edited(
        folders["original"], tmp_path / "original", lambda weights: weights.pop("lm_head.weight"), config=tied
    )
    whole = edited(folders["original"], tmp_path / "whole", untied)
    files = Files(open_folder(whole), open_folder(original))
    found = {each.tensor: each.note for each in problems_of(files, "checkpoint_settings")[1]}
    assert found["tie_word_embeddings"] == (head == "rotated")


def test_a_layer_in_floats_that_a_smoothing_forgot_is_named(folders, tmp_path):
    """As a router, which reads the norm that was divided for the experts, and is in no list of theirs."""

    def forget(weights):
        weights[f"{FORGOTTEN}.weight"] = load_file(folders["original"] / "model.safetensors")[f"{FORGOTTEN}.weight"]

    def keep(weights):
        del weights[f"{FORGOTTEN}.weight_scale"]
        forget(weights)

    def ignore(config):
        config["quantization_config"]["ignore"].append(FORGOTTEN)

    smoothed = edited(folders["smoothed int8"], tmp_path / "forgotten", keep, config=ignore)
    (found,) = problems_of(Files(open_folder(smoothed), open_folder(folders["original"])), "checkpoint_scales")[1]
    assert found.layer == FORGOTTEN
    assert found.what.startswith("the weight is 0.")

"""What broke quantized checkpoints in the field, put into a small real model: a gate catches each and names the layer.

Vacuous passes have tests of their own: patterns and hooks in test_collection.py and test_capture.py, experts without a
token in test_experts.py, bounds below the noise in test_calibrate.py; what a baseline was made with is in
test_baselines.py.
"""

import copy

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.checkpoint.checks.health import Files, problems_of
from pytest_qsa.checkpoint.folder import open_folder
from pytest_qsa.metrics import Bounds, Query, Series
from pytest_qsa.verdicts.verdict import Kind
from support import models
from support.checkpoints import edited, save_tokenizer
from support.judged import judge_bounds
from support.projects import Project, suite

DOWN, UP = "model.layers.2.mlp.down_proj", "model.layers.0.mlp.up_proj"
VALUE, OUT = "model.layers.1.self_attn.v_proj", "self_attn.o_proj"
BLOCKS = [f"model.layers.{index}" for index in range(4)]
EVERY = "28 of 28 layers are out of bounds"
ASSERTIONS = (
    "id: files, metric: checkpoint_health",
    "id: weights, metric: weight_sqnr, layers: _proj$, min: 35",
    "id: rows, metric: weight_sqnr, by: channel, layers: _proj$, min: 30",
    "id: alone, metric: local_sqnr, layers: _proj$, min: 30",
    "id: close, metric: kl_divergence, max: 0.02",
)


def scaled(layer, factor):
    return lambda weights: weights[f"{layer}.weight_scale"].mul_(factor)


def constant(weights):
    for block in BLOCKS[2:]:
        weights[f"{block}.{OUT}.weight"].fill_(17)


def renamed(weights):
    weights[f"{DOWN}.scale_of_the_weight"] = weights.pop(f"{DOWN}.weight_scale")


def with_nan(weights):
    weights[f"{DOWN}.weight_scale"][3] = float("nan")


def initial(weights):
    for name in weights:
        if name.endswith("weight_scale"):
            weights[name].fill_(1.0)


def unquantized(weights):
    codes, scale = weights.pop(f"{DOWN}.weight"), weights.pop(f"{DOWN}.weight_scale")
    weights[f"{DOWN}.weight"] = (codes.double() * scale).bfloat16()


def all_off(weights):
    for name in weights:
        if name.endswith("weight_scale"):
            weights[name].mul_(1.05)


def shifted(weights):
    weights[f"{UP}.weight"] = (weights[f"{UP}.weight"].int() + 2).clamp(max=127).to(torch.int8)


def unsigned(weights):
    weights[f"{DOWN}.weight"] = weights[f"{DOWN}.weight"].clamp(min=-127).abs()


def several(weights):
    """Put in what a gate has to tell apart by the layer."""
    constant(weights)
    scaled(VALUE, 3.0)(weights)
    shifted(weights)
    unsigned(weights)


IN_THE_FILES = {
    "constant packed weights": (constant, [f"{block}.{OUT}" for block in BLOCKS[2:]]),
    "scales dropped as unexpected": (renamed, [DOWN]),
    "NaN in a scale": (with_nan, [DOWN]),
    "calibration that never ran": (initial, BLOCKS),
    "a layer left unquantized": (unquantized, [DOWN]),
}
"""What happened → the fault, and the layers that the static check has to name."""
IN_THE_PASS = {
    "constant packed weights": ("several", {"rows": [f"{block}.{OUT}" for block in BLOCKS[2:]]}),
    "one slot of a fused scale uninitialised": ("several", {"weights": [VALUE], "alone": [VALUE]}),
    "zero point shifted": ("several", {"weights": [UP], "alone": [UP]}),
    "signs lost": ("several", {"weights": [DOWN], "alone": [DOWN], "close": ["logits"]}),
    "a conversion that is off everywhere": ("all-off", {"weights": [BLOCKS[0], EVERY], "alone": [BLOCKS[0], EVERY]}),
}
"""What happened → the checkpoint that has it, and which assertion has to name which layers."""


def gate(project, checkpoint, reference, *models):
    """Run the suite on models by name; return the run."""
    text = suite(checkpoint, *ASSERTIONS).replace("}\ndata", f", reference: {reference}}}\ndata", 1)
    project.write("gate.qsa.yaml", text)
    words = [f"--qsa-model={name}={folder}" for name, folder in models]
    return project.pytest("gate.qsa.yaml", "--qsa-report=never", *words)


@pytest.fixture(scope="module")
def gated(tmp_path_factory, int8_llama, llama):
    """Run one suite on the sound int8 Llama and on copies with faults."""
    folder = tmp_path_factory.mktemp("incidents")
    faults = {"several": several, "all-off": all_off}
    broken = [(name, edited(int8_llama, folder / name, change)) for name, change in faults.items()]
    return gate(Project(folder / "project"), int8_llama, llama, ("sound", int8_llama), *broken)


@pytest.mark.process
def test_the_sound_checkpoint_passes(gated):
    assert {name: how for name, how in gated.outcomes.items() if "[sound]" in name and how != "passed"} == {}
    assert sum("[sound]" in name for name in gated.outcomes) == len(ASSERTIONS)


@pytest.mark.process
@pytest.mark.parametrize("incident", IN_THE_PASS)
def test_what_broke_in_the_field_is_caught_at_its_layer(gated, incident):
    checkpoint, named = IN_THE_PASS[incident]
    for assertion, layers in named.items():
        test = f"::{assertion}[{checkpoint}]"
        assert gated.report(test)["outcome"] == "failed", gated.out
        assert [layer for layer in layers if layer not in gated.text(test)] == []


@pytest.mark.parametrize("incident", IN_THE_FILES)
def test_what_broke_in_the_field_is_caught_in_the_files_at_its_layer(int8_llama, tmp_path, incident):
    change, layers = IN_THE_FILES[incident]
    broken = edited(int8_llama, tmp_path / "broken", change)
    found = {finding.layer for finding in problems_of(Files(open_folder(broken)), "checkpoint_health")[1]}
    assert [layer for layer in layers if not any(name.startswith(layer) for name in found)] == []
    if layers is not BLOCKS:
        assert found == set(layers)


@pytest.mark.process
def test_nibbles_in_the_wrong_order_are_caught_at_their_layer(tmp_path, quantized, llama):
    def swapped(weights):
        packed = weights[f"{DOWN}.weight_packed"].view(torch.uint8)
        weights[f"{DOWN}.weight_packed"] = (packed >> 4 | packed << 4).view(torch.int32)

    broken = edited(quantized["int4"], tmp_path / "broken", swapped)
    run = gate(Project(tmp_path / "project"), quantized["int4"], llama, ("broken", broken))
    for assertion in ("weights", "alone"):
        worst, _, value = run.first_line(f"::{assertion}").partition(f"{assertion}: ")[2].partition(": ")
        assert worst == DOWN, run.out
        assert value.startswith("-"), value


@pytest.mark.process
def test_experts_that_no_loader_maps_are_named(tmp_path, own_project):
    """The checkpoint holds them packed under names of their own, and the loader fills them with random numbers."""
    from safetensors.torch import load_file, save_file

    models.mixtral().save_pretrained(tmp_path / "moe")
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    renamed = {name.replace(".experts.", ".packed."): tensor for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "moe" / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tmp_path / "moe")
    own_project.write(
        "a.qsa.yaml", suite(tmp_path / "moe", "id: a, metric: absmax, layers: layers, site: output, max: 99")
    )
    run = own_project.pytest("a.qsa.yaml", "--qsa-report=never")
    assert run.code == 1
    told = "weights of MixtralForCausalLM, which would be random numbers: model.layers.0.mlp.experts."
    assert told in run.first_line("::a")


def test_a_kernel_that_computes_garbage_of_sound_weights_is_caught_at_its_layer():
    """The same checkpoint gave gibberish on one version of CUDA and not on another: no file shows that."""
    original = models.llama(num_hidden_layers=3)
    other = copy.deepcopy(original)
    module = other.model.layers[1].mlp.up_proj
    plain = module.forward
    module.forward = lambda x: plain(x).roll(1, -1)
    batch, up = [models.token_batch(2, 24)], [("up_proj$", "output")]
    cap = capture(other, batch, sites=[("_proj$", "weight"), ("", "logits")], reference=original)
    alone = capture(other, batch, sites=up, statistics=["local_sqnr"], reference=original)
    alone = alone.output("up_proj$").local_sqnr(positions="all")
    assert [layer for layer, value in zip(alone.layers, alone.values, strict=True) if value < 100] == [
        "model.layers.1.mlp.up_proj"
    ]
    assert np.isposinf(cap.weight("_proj$").weight_sqnr().values).all()
    assert cap.logits().kl_divergence().values[0] > 0


def test_garbage_does_not_pass_by_its_own_large_error():
    """A tolerance of the suspect's own standard error lets garbage pass: a bound is held against the value."""
    query = Query("ln_ppl_ratio", "1", "logits", "")
    series = Series(["logits"], np.array([0.9]), query, intervals={"logits": (-0.3, 2.1, 64)})
    assert judge_bounds(series, Bounds(max=0.05)).kind is Kind.REGRESSION

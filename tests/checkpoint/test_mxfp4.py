"""MXFP4 of gpt-oss: the files are checked and read, and compared with what transformers makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError
from pytest_qsa.engine.formats.stored import StoredWeights
from pytest_qsa.engine.modules import with_experts
from pytest_qsa.tools.selftest.faults import FAULTS
from pytest_qsa.tools.selftest.mutant import Mutant
from support.checkpoints import E2M1, edited, save_gpt_oss

EXPERTS = "model.layers.2.mlp.experts"
DOWN = f"{EXPERTS}.down_proj"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return save_gpt_oss(tmp_path_factory.mktemp("mxfp4") / "gpt-oss")


def findings(folder):
    return [(f.tensor, f.what) for f in problems_of(Files(open_folder(folder)), "checkpoint_health")[1]]


def test_a_healthy_checkpoint_has_no_problem(healthy):
    assert findings(healthy) == []


def test_rows_are_what_transformers_loads_and_the_formula_says(healthy):
    from transformers import AutoModelForCausalLM

    form, files = format_of(open_folder(healthy)), Files(open_folder(healthy))
    rows = form.rows(DOWN).reshape(4, 64, 64)
    blocks, scales = (np.array(form.parts(DOWN)[part].raw()) for part in ("blocks", "scales"))
    codes = E2M1[np.stack([blocks % 16, blocks // 16], axis=-1)].reshape(4, 64, 2, 32)
    powers = 2.0 ** (scales[..., None].astype(np.float64) - 127)
    np.testing.assert_array_equal(rows, (codes * powers).reshape(4, 64, 64))
    np.testing.assert_array_equal(form.rows(DOWN, slice(70, 75)), rows.reshape(256, 64)[70:75])
    model = AutoModelForCausalLM.from_pretrained(healthy)
    experts = model.get_submodule(EXPERTS)
    np.testing.assert_array_equal(rows, experts.down_proj.detach().double().numpy().transpose(0, 2, 1))
    gate_up = form.rows(f"{EXPERTS}.gate_up_proj").reshape(4, 128, 64)
    np.testing.assert_array_equal(gate_up, experts.gate_up_proj.detach().double().numpy().transpose(0, 2, 1))
    layers = with_experts({EXPERTS: experts})
    assert StoredWeights(files, layers).powers(EXPERTS, experts)[1] == 0
    experts.down_proj.data[3] *= 2
    stored = StoredWeights(files, layers)
    assert stored.powers(EXPERTS, experts)[1] > 0
    changed = [name for name, layer in layers.items() if stored.powers(name, layer)[1] > 0]
    assert changed == [EXPERTS, f"{EXPERTS}.3.down_proj"]


def put(part, change):
    return lambda weights: change(weights[f"{DOWN}_{part}"])


def emptied(scales):
    scales[1, 5, 0] = 0


FAULTS_OF_FILES = {
    "NaN": (put("scales", lambda t: t.view(-1)[3:4].fill_(255)), "scales", "1 of 512 are NaN, the first at 3"),
    "scale": (put("scales", lambda t: t.add_(2)), "scales", "the geometric mean of its scales is"),
    "no exponent": (put("scales", emptied), "scales", "1 of 512 are 0, and their weights aren't"),
    "constant": (put("blocks", lambda t: t.fill_(0x33)), "blocks", "all of it is one value"),
    "a row": (put("blocks", lambda t: t[1, 2].fill_(0x33)), "blocks", "row 66 is one code throughout"),
    "lost scales": (lambda w: w.pop(f"{DOWN}_scales"), "scales", "missing"),
    "lost blocks": (lambda w: w.pop(f"{DOWN}_blocks"), "scales", "its blocks are missing"),
    "shape": (
        lambda w: w.update({f"{DOWN}_blocks": w[f"{DOWN}_blocks"].reshape(4, 64, 32).clone()}),
        "blocks",
        "shape 4×64×32, but MXFP4 is",
    ),
}


@pytest.mark.parametrize("fault", FAULTS_OF_FILES)
def test_a_fault_is_found_and_its_layer_named(healthy, tmp_path, fault):
    change, part, text = FAULTS_OF_FILES[fault]
    found = findings(edited(healthy, tmp_path / "faulty", change))
    assert any(tensor in (f"{DOWN}_{part}", f"{DOWN}.{part}") and text in what for tensor, what in found), found


def test_blocks_without_scales_are_never_read_as_numbers(healthy, tmp_path):
    form = format_of(open_folder(edited(healthy, tmp_path / "lost", lambda w: w.pop(f"{DOWN}_scales"))))
    with pytest.raises(AnomalyError, match="its scales are missing"):
        form.rows(DOWN)


@pytest.mark.parametrize(
    "fault", ["scale_layer", "nan_scale", "weights_constant", "nibbles_swapped", "weights_exchanged"]
)
def test_faults_of_the_self_test_can_be_put_into_it(healthy, fault):
    assert DOWN in FAULTS[fault].targets(open_folder(healthy))


def test_a_fault_of_scales_changes_exponents(healthy):
    mutant, folder = Mutant(open_folder(healthy)), open_folder(healthy)
    name = f"{DOWN}_scales"
    FAULTS["scale_layer"].inject(mutant, DOWN, 4.0)
    np.testing.assert_array_equal(mutant.raw(name), np.array(folder.tensors[name].raw()) + 2)
    FAULTS["nan_scale"].inject(mutant, DOWN, 3.0)
    assert (mutant.raw(name) == 255).sum() == 3

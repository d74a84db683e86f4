"""GGUF files: gated as the models that they hold, with the tokens of their own tokenizer."""

from __future__ import annotations

import pytest

from pytest_qsa.common.errors import InfraError
from pytest_qsa.engine.load.tokenizer import compare_gguf_tokens, load_tokenizer
from support.checkpoints import save_gguf
from support.projects import Project, peaks, suite


@pytest.fixture(scope="module")
def files(llama, tmp_path_factory):
    """Return the folders of the small Llama as GGUF files whose pre-tokenizer is the right one, a wrong or none."""
    base = tmp_path_factory.mktemp("gguf")
    pres = {"sound": "gpt-2", "wrong": "default", "unnamed": "", "unknown": "tekken"}
    return {name: save_gguf(base / name, llama, pre=pre) for name, pre in pres.items()}


@pytest.fixture(scope="module")
def run(files, llama, tmp_path_factory):
    """Gate each file, in one run."""
    project = Project(tmp_path_factory.mktemp("gates") / "project")
    loads, close = (
        "id: loads, metric: loaded_weights, max: 0",
        "id: close, metric: weight_sqnr, layers: _proj$, min: 30",
    )
    for name, folder in files.items():
        text = suite(folder, peaks("max: 40"), loads, close, "id: files, metric: checkpoint_weights")
        keys = f"gguf_file: model.gguf, reference: {llama}, require: {{executed_as: weights only}}, name"
        project.write(f"{name}.qsa.yaml", text.replace("{name", f"{{{keys}"))
    return project.pytest("--qsa-report=never")


@pytest.mark.process
def test_a_sound_file_passes_and_says_what_it_was_executed_as(run):
    found = {test.rpartition("::")[2]: outcome for test, outcome in run.outcomes.items() if test.startswith("sound.")}
    assert found == dict.fromkeys(("peaks", "loads", "close", "files"), "passed"), run.out
    assert "weights only, dequantized when loaded: GGUF (30 modules)" in run.out


@pytest.mark.process
@pytest.mark.parametrize(("name", "pre"), [("wrong", "default: "), ("unnamed", "not named, so that llama.cpp takes")])
def test_ids_that_are_not_the_files_own_fail_and_the_first_is_named(run, name, pre):
    line = run.first_line(f"{name}.qsa.yaml::peaks")
    assert line.startswith("INFRA peaks: ")
    assert f"model.gguf, whose pre-tokenizer is {pre}" in line
    assert "after " in line


@pytest.mark.process
def test_a_kind_of_tokenizer_that_is_not_known_is_told_and_fails_nothing(run, files):
    assert run.outcomes["unknown.qsa.yaml::peaks"] == "passed"
    tokenizer = load_tokenizer(str(files["unknown"]), {"gguf_file": "model.gguf"})
    said = compare_gguf_tokens(files["unknown"] / "model.gguf", tokenizer)
    assert said == "not compared with the GGUF's own, whose kind (gpt2 tekken) is not known here"


def test_the_ids_are_those_of_the_tokenizer_that_the_file_was_made_from(files, llama):
    original = load_tokenizer(str(llama), {})
    assert compare_gguf_tokens(files["sound"] / "model.gguf", original) == "the GGUF's own ids (gpt-2) on sample texts"


def test_a_tokenizer_with_other_words_is_not_the_files_own(files, llama):
    original = load_tokenizer(str(llama), {})

    def shifted(text, **how):
        return {"input_ids": [token + 1 for token in original(text, **how)["input_ids"]]}

    with pytest.raises(InfraError, match=r"(\d+) of \1 ids of this run's tokenizer .*: after '', "):
        compare_gguf_tokens(files["sound"] / "model.gguf", shifted)

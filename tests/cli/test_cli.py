"""The program `qsa`: what editors and people ask of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qsa.cli import main
from pytest_qsa.suite import suite_schema
from support.checkpoints import save_adapter, save_gguf
from support.projects import Project, peaks, suite


def test_schema_prints_the_schema_of_suites(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == suite_schema()


def test_layers_lists_all_layers_without_reading_weights(llama, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    assert main(["layers", "--model", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "57 of 57 layers"
    row = next(line.split() for line in lines if line.startswith("model.layers.0.mlp.down_proj"))
    assert row == ["model.layers.0.mlp.down_proj", "Linear", "32×64", "2,048"]


def test_layers_of_an_adapter_are_those_of_its_base_and_name_it(llama, tmp_path, capsys):
    save_adapter(tmp_path / "adapter", llama)
    command = ["layers", "--model", str(tmp_path / "adapter"), "down_proj"]
    assert main([*command, "--base", str(llama)]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].split() == ["model.layers.0.mlp.down_proj", "lora.Linear", "32×64", "2,432"]
    assert lines[-2] == "4 of 57 layers"
    assert lines[-1].startswith("with an adapter, LoRA of rank 4 in ")
    assert output.err == ""
    assert main(command) == 1
    assert "name the base in model.base" in capsys.readouterr().err


def test_layers_shows_what_a_regex_finds(llama, capsys):
    assert main(["layers", "--model", str(llama), r"layers\.\d$"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [f"model.layers.{n}" for n in range(4)]
    assert lines[-1] == "4 of 57 layers"


def test_layers_takes_the_model_of_a_suite_relative_to_it(llama, tmp_path, capsys):
    (tmp_path / "here").symlink_to(llama)
    (tmp_path / "a.qsa.yaml").write_text(suite("here", peaks("max: 1")))
    assert main(["layers", "--config", str(tmp_path / "a.qsa.yaml"), "lm_head"]) == 0
    assert "1 of 57 layers" in capsys.readouterr().out


def test_a_target_is_a_suite_or_a_checkpoint_in_every_command(llama, tmp_path, capsys):
    gate, folder = tmp_path / "a.qsa.yaml", str(llama)
    gate.write_text(suite(folder, peaks("max: 1")))
    for target in (str(gate), folder):
        assert main(["layers", target, "lm_head"]) == 0
        assert "1 of 57 layers" in capsys.readouterr().out
        assert main(["analyze", target, "--dry-run", "--save_dir", str(tmp_path)]) == 0
        assert "dry run" in capsys.readouterr().out
    assert main(["layers", "nowhere.qsa.yaml"]) == 2
    assert "nowhere.qsa.yaml" in capsys.readouterr().err
    assert main(["analyze", folder, "--config", str(gate)]) == 4
    assert "name one TARGET" in capsys.readouterr().err


def test_a_target_may_be_a_gguf_file(llama, tmp_path, capsys):
    target = str(save_gguf(tmp_path / "gguf", llama) / "model.gguf")
    assert main(["layers", target, "down_proj$"]) == 0
    assert "4 of 57 layers" in capsys.readouterr().out
    assert main(["analyze", target, "--dry-run", "--save_dir", str(tmp_path)]) == 0
    assert "dry run" in capsys.readouterr().out


def test_layers_lists_the_weights_of_files(int8_llama, tmp_path, capsys):
    (tmp_path / "a.qsa.yaml").write_text(suite(int8_llama, peaks("max: 1")).replace("}", ", weights: files}", 1))
    for arguments in (["--model", str(int8_llama), "--weights", "files"], ["--config", str(tmp_path / "a.qsa.yaml")]):
        assert main(["layers", *arguments, r"layers\.0\.mlp"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["model.layers.0.mlp.down_proj", "I8", "32×64", "2,048"]
        assert lines[-1] == "3 of 39 layers"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 4, "usage: qsa"),
        (["nothing"], 4, "invalid choice: 'nothing'"),
        (["schema", "--deep"], 4, "unrecognized arguments: --deep"),
        (["layers"], 4, "name one TARGET"),
        (["layers", "--config", "a.yaml", "--model", "x"], 4, "name one of TARGET, --config and --model"),
        (["layers", "--config", "nowhere.qsa.yaml"], 2, "nowhere.qsa.yaml"),
        (["layers", "--config", "wrong.qsa.yaml"], 2, "wrong.qsa.yaml:1: "),
        (["layers", "--config", "none.qsa.yaml"], 2, "there is no section 'model'"),
        (["layers", "--model", "{llama}", "lyers"], 1, "'lyers'"),
        (["layers", "--model", "{llama}", "layers("], 2, "'layers('"),
        (["layers", "--model", "./nowhere"], 1, "nowhere"),
    ],
)  # fmt: skip
def test_a_wrong_use_is_one_line_and_the_code_of_pytest(tmp_path, monkeypatch, capsys, llama, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.qsa.yaml").write_text("modle: {path: x}\n")
    (tmp_path / "none.qsa.yaml").write_text("data: {seed: 1}\n")
    assert main([argument.format(llama=llama) for argument in arguments]) == code
    output = capsys.readouterr()
    assert said in output.err
    assert not output.out
    assert len(output.err.strip().splitlines()) == 1 or output.err.startswith("usage: ")


def test_help_is_no_mistake(capsys):
    assert main(["--help"]) == 0
    assert "layers" in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize("program", [["-m", "pytest_qsa"], None])
def test_the_program_runs_by_its_name_and_as_a_module(tmp_path, program):
    project = Project(tmp_path / "project")
    words = [sys.executable, *program] if program else [Path(sys.executable).with_name("qsa")]
    done = project.program(*words, "schema")
    assert done.returncode == 0
    assert json.loads(done.stdout)["title"] == "Suite"
    assert project.program(*words, "nothing").returncode == 4


@pytest.mark.process
def test_a_closed_pipe_ends_a_command_without_a_traceback():
    command = [sys.executable, "-m", "pytest_qsa", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")

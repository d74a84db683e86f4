"""The commands are the modules of cli/ with a function `run`; their help, exit codes and log."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pytest_qsa.cli import commands, main
from pytest_qsa.cli.shared import between, command_parser, first_line, writing
from pytest_qsa.common import AnomalyError, InfraError, SuiteError

NAMES = ["analyze", "calibrate", "capture", "diff", "init", "layers", "merge", "schema", "selftest"]


def test_every_module_with_a_function_run_is_a_command():
    assert [name for name in NAMES if name not in commands()] == []
    assert not {"shared", "overrides"} & set(commands())


def test_the_help_lists_each_command_with_the_first_line_of_its_docstring(capsys):
    assert main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert [name for name, module in commands().items() if first_line(module.__doc__) not in out] == []


@pytest.mark.parametrize("name", sorted(commands()))
def test_each_command_has_its_own_help(name, capsys):
    assert main([name, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(f"usage: qsa {name} ")
    assert (commands()[name].__doc__ or "").partition("\n")[0] in out
    assert "examples:" in out


def test_the_list_of_commands_imports_nothing_heavy():
    code = (
        "import sys; from pytest_qsa.cli import main; main(['--help']); "
        "print([name for name in ('torch', 'numpy', 'pydantic', 'pytest', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("error", "code"), [(SuiteError("x"), 2), (InfraError("x"), 1), (AnomalyError("x"), 1), (SystemExit(2), 4)]
)
def test_an_error_of_a_command_is_one_line_and_an_exit_code_of_pytest(monkeypatch, capsys, error, code):
    def run(arguments):
        raise error

    monkeypatch.setattr("pytest_qsa.cli.schema.run", run)
    assert main(["schema"]) == code
    assert capsys.readouterr().err == ("" if code == 4 else "qsa: x\n")


@pytest.mark.parametrize(
    ("words", "shown"),
    [(["-v", "schema"], True), (["schema", "-v"], True), (["schema", "--verbose"], True), (["schema"], False)],
)
def test_verbose_shows_the_log_on_stderr(monkeypatch, capsys, words, shown):
    def schema():
        logging.getLogger("pytest_qsa.suite").debug("a detail")
        return {}

    monkeypatch.setattr("pytest_qsa.suite.suite_schema", schema)
    assert main(words) == 0
    assert ("ms  a detail" in capsys.readouterr().err) == shown
    assert logging.getLogger("pytest_qsa").level == logging.NOTSET
    assert logging.getLogger("pytest_qsa").handlers == []


def test_a_command_takes_its_name_and_description_from_its_module():
    parser = command_parser("pytest_qsa.cli.draw", "Draw a picture.\n\nOf layers.\n", "FILE")
    assert (parser.prog, parser.usage, parser.description) == (
        "qsa draw",
        "qsa draw FILE",
        "Draw a picture.\n\nOf layers.\n",
    )
    assert first_line(parser.description) == "draw a picture"


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("0.5", 0.5), ("1", 1), ("2", None), ("nan", None)])
def test_a_number_is_between_its_limits(text, number):
    if number is None:
        with pytest.raises(argparse.ArgumentTypeError, match="is not between 0 and 1"):
            between(0, 1)(text)
    else:
        assert between(0, 1)(text) == number


def test_a_file_that_cannot_be_written_is_told_in_one_line():
    with pytest.raises(InfraError, match=r"^x/y: can't be written: No space left$"), writing(Path("x/y")):
        raise OSError(28, "No space left")


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pytest-qsa {version('pytest-qsa')}\n"


@pytest.mark.parametrize("name", ["analyze", "calibrate", "capture", "init"])
def test_the_help_is_short_and_ends_with_examples_and_the_keys_have_a_help_of_their_own(name, capsys):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 50
    assert f"\nexamples:\n  qsa {name} " in out
    assert "%%" not in out
    assert "--data.seq_len" not in out
    assert main([name, "--help-keys", "data"]) == 0
    out = capsys.readouterr().out
    assert "  --data.seq_len int\n      tokens of a window; default: 512\n" in out
    assert "--memory" not in out


def test_the_help_of_keys_has_those_of_every_section(capsys):
    assert main(["init", "--help-keys"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  --{key} " in out for key in ("model.path", "data.source", "memory.device", "outlier.threshold"))
    assert "Undefined" not in out


def test_bash_completes_commands_options_and_keys(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "qsa.bash").write_text(capsys.readouterr().out)

    def completed(*words):
        script = f"source qsa.bash; COMP_WORDS=(qsa {' '.join(words)}); COMP_CWORD={len(words)}; "
        script += f"_qsa qsa '{words[-1]}'; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("ca") == ["calibrate", "capture", "card"]
    assert completed("layers", "--wei") == ["--weights"]
    assert completed("init", "--data.num") == ["--data.num_samples"]
    assert completed("diff", "qs") == ["qsa.bash"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_each_command(shell, capsys):
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert [name for name in commands() if name not in out] == []

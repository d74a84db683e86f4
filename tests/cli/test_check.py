"""`qsa check`: every suite's first mistake at its line, in one run, without a model and without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_qsa.cli import main
from support.projects import peaks, suite


@pytest.fixture
def suites(tmp_path, monkeypatch):
    """Return a folder with a valid suite, one in a folder below, and one that is still without assertions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below" / ".hidden").mkdir(parents=True)
    (tmp_path / "a.qsa.yaml").write_text(suite("checkpoints/a", peaks("max: 1")))
    (tmp_path / "below" / "b.qsa.yml").write_text("extends: ../a.qsa.yaml\n")
    (tmp_path / "below" / ".hidden" / "c.qsa.yaml").write_text("not: ours\n")
    (tmp_path / "seed.yaml").write_text("model: {path: checkpoints/a}\n")
    return tmp_path


def test_all_suites_of_a_folder_are_checked(suites, capsys):
    assert main(["check"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "a.qsa.yaml: 1 assertion",
        "below/b.qsa.yml: 1 assertion",
        "2 suites, 2 assertions: all valid",
    ]
    assert captured.err == ""


def test_a_file_is_checked_by_whatever_name_and_once(suites, capsys):
    assert main(["check", "seed.yaml", "a.qsa.yaml", "."]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "seed.yaml: no assertions yet",
        "a.qsa.yaml: 1 assertion",
        "below/b.qsa.yml: 1 assertion",
        "3 suites, 2 assertions: all valid",
    ]


def test_each_wrong_suite_says_its_line_and_the_others_are_checked_all_the_same(suites, capsys):
    (suites / "a0.qsa.yaml").write_text("modle: {}\n")
    (suites / "z.qsa.yaml").write_text("assertions:\n  - {id: a, metric: rsm, layers: x, site: input, max: 1}\n")
    assert main(["check", "."]) == 2
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first.startswith("a0.qsa.yaml:1: unknown key 'modle'")
    assert second.startswith("z.qsa.yaml:2: unknown metric 'rsm'")
    assert captured.out.splitlines()[-1] == "4 suites: 2 wrong"


@pytest.mark.parametrize("name", ["empty", "nowhere.qsa.yaml"])
def test_nothing_to_check_is_no_success(suites, capsys, name):
    (suites / "empty").mkdir()
    assert main(["check", name]) == 2
    assert name in capsys.readouterr().err


def test_checking_imports_neither_torch_nor_transformers(suites):
    code = (
        "import sys; from pytest_qsa.cli import main; main(['check']); "
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

"""What only an operator may allow: by the command line, the environment, or an ini file that is given with -c."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from pytest_qsa.cli.shared import add_allow_code, roots_of
from pytest_qsa.common import SuiteError, VllmWords, vllm_arguments
from pytest_qsa.gate import options
from support.projects import suite

RAN = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n\n\ndef make():\n    raise RuntimeError\n"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a function that makes what pytest knows of a command line, PYTEST_ADDOPTS, and the ini file it found."""
    for name in ("PYTEST_ADDOPTS", "QSA_ALLOW_CODE", "QSA_ALLOW_PATH"):
        monkeypatch.delenv(name, raising=False)

    def make(*words, code=None, paths=(), ini=None, vllm=None, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        values = {name: default for name, (_, _, default) in options.INI_KEYS.items()} | (ini or {})
        return SimpleNamespace(
            invocation_params=SimpleNamespace(args=words, dir=tmp_path),
            inipath=tmp_path / "pytest.ini",
            rootpath=tmp_path,
            getini=values.get,
            getoption={
                "qsa_allow_code": code,
                "qsa_allow_path": list(paths),
                "qsa_vllm_python": vllm,
                "qsa_vllm_arg": [],
            }.get,
        )

    return make


def allowed(config):
    return options._permissions(config)[:2]


INI = {"qsa_allow_code": True}


def test_the_command_line_and_the_environment_allow_code(config):
    assert allowed(config()) == (False, ())
    assert allowed(config("--qsa-allow-code", code=True))[0]
    assert allowed(config(code=True, PYTEST_ADDOPTS="-q --qsa-allow-code"))[0]


@pytest.mark.parametrize(("text", "expected"), [("1", True), ("TRUE", True), ("0", False), ("", False), ("off", False)])
def test_the_environment_says_yes_or_no(config, text, expected):
    assert allowed(config(QSA_ALLOW_CODE=text))[0] is expected
    if expected is False and text:
        assert not allowed(config("-c", "x.ini", ini=INI, QSA_ALLOW_CODE=text))[0]


@pytest.mark.parametrize("words", [("-c", "x.ini"), ("--config-file=x.ini",), ("-q", "-cx.ini")])
def test_an_ini_file_that_is_given_counts(config, tmp_path, words):
    (tmp_path / "data").mkdir()
    assert allowed(config(*words, ini={**INI, "qsa_allow_path": ["data"]})) == (True, (tmp_path / "data",))
    assert allowed(config(*words, code=True))[0]  # its addopts


def test_an_override_on_the_command_line_counts(config):
    assert allowed(config("-o", "qsa_allow_code=true", ini=INI))[0]


DISCOVERED = {
    "its key": {"ini": INI},
    "its folders": {"ini": {"qsa_allow_path": ["/"]}},
    "its addopts": {"code": True},
    "its addopts of a folder": {"paths": ["/"]},
    "its interpreter": {"ini": {"qsa_vllm_python": "/tmp/python"}},
    "its arguments of vLLM": {"ini": {"qsa_vllm_arg": ["a=1"]}},
    "its addopts of an interpreter": {"vllm": "/tmp/python"},
    "its addopts that give another file": {"code": True, "ini": INI},
}


@pytest.mark.parametrize("found", DISCOVERED.values(), ids=DISCOVERED)
def test_an_ini_file_that_pytest_found_allows_nothing(config, found):
    with pytest.raises(
        pytest.UsageError, match=r"pytest\.ini: .*counts only in a file that is given with -c.*on the command line"
    ):
        allowed(config("a.qsa.yaml", **found))


def test_what_the_operator_adds_to_its_folders_doesnt_cover_for_them(config):
    with pytest.raises(pytest.UsageError, match="qsa-allow-path counts only"):
        allowed(config("--qsa-allow-path=.", paths=["/etc", "."]))


@pytest.mark.parametrize("environment", [{"QSA_ALLOW_CODE": "maybe"}, {"QSA_ALLOW_PATH": "/nowhere"}])
def test_a_wrong_value_of_the_environment_is_said(config, environment):
    with pytest.raises(pytest.UsageError, match=r"QSA_ALLOW_CODE=maybe: write 1 or 0|QSA_ALLOW_PATH .*no such folder"):
        allowed(config(**environment))


def test_the_commands_of_qsa_read_the_environment(tmp_path, monkeypatch):
    def parsed(*words):
        parser = argparse.ArgumentParser()
        add_allow_code(parser)
        return parser.parse_args(words)

    monkeypatch.setenv("QSA_ALLOW_PATH", str(tmp_path))
    assert not parsed().qsa_allow_code
    assert roots_of(parsed()).allowed == (tmp_path,)
    monkeypatch.setenv("QSA_ALLOW_CODE", "1")
    assert parsed().qsa_allow_code
    with pytest.raises(SuiteError, match="there is no such folder"):
        roots_of(parsed("--qsa-allow-path=nowhere"))


CODE = "model: {factory: 'plugin:make'}\nassertions:\n  - {id: a, metric: absmax, layers: x, site: output, max: 1}\n"


@pytest.mark.process
def test_the_recipe_for_ci_runs_suites_and_nothing_of_the_checkouts_own_python(own_project, tmp_path, llama):
    own_project.write("gate.qsa.yaml", suite(llama, "id: health, metric: checkpoint_health"))
    own_project.write("code.qsa.yaml", CODE)
    own_project.write("conftest.py", RAN)
    own_project.write("plugin.py", RAN)
    own_project.write("pytest.ini", "[pytest]\naddopts = -p plugin --qsa-allow-code\n")
    (tmp_path / "trusted.ini").write_text("[pytest]\nqsa_report = never\n", encoding="utf-8")
    recipe = ("-c", tmp_path / "trusted.ini", "--rootdir=.", "--noconftest")
    run = own_project.pytest(*recipe, "gate.qsa.yaml", "code.qsa.yaml")
    assert run.outcomes == {"gate.qsa.yaml::health": "passed", "code.qsa.yaml::a": "failed"}
    assert "allow it with --qsa-allow-code" in run.first_line("::a")
    assert not (own_project.folder / "ran").exists()


@pytest.mark.process
def test_workers_allow_what_the_operator_allows(own_project):
    own_project.write("plugin.py", RAN)
    own_project.write("code.qsa.yaml", CODE)
    run = own_project.pytest("-n1", "-o", "qsa_allow_code=true", "-o", "pythonpath=.")
    assert "RuntimeError" in run.first_line("::a")


def test_the_command_line_names_vllm(config):
    named = config("--qsa-vllm-python=/x/python", vllm="/x/python")
    assert options._permissions(named)[2] == VllmWords("/x/python", ())


@pytest.mark.parametrize("text", ["eager", "enforce_eager=false", "worker-extension-cls=a.b"])
def test_an_argument_of_vllm_that_a_capture_needs_is_a_wrong_usage(text):
    with pytest.raises(SuiteError, match="--qsa-vllm-arg"):
        vllm_arguments([text])
    assert vllm_arguments(["a-b=2", "c=x"]) == {"a_b": 2, "c": "x"}

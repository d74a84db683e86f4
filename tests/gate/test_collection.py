"""Suites among pytest's tests: their ids, their lines, how they are selected, and what is left alone."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from support.projects import peaks, suite

pytestmark = pytest.mark.process

GATE = """\
model: {name: llama, path: nowhere}
assertions:
  - id: peaks
    metric: absmax
    layers: layers
    site: output
    max: 1
  - {id: drift.of-all_9, metric: rms, layers: x, site: input, baseline: {rel: 0.1}}
  - {id: also, metric: rms, layers: x, site: input, max: 1}
"""
OTHER = "assertions:\n  - {id: peaks, metric: absmax, layers: x, site: output, max: 1}\n"
NOT_OURS = "services: {web: {image: x}, web: {image: y}}\n- not even YAML"
ALL = ["gate.qsa.yaml::peaks", "gate.qsa.yaml::drift.of-all_9", "gate.qsa.yaml::also", "sub/other.qsa.yml::peaks"]


@pytest.fixture(scope="module")
def mixed(project):
    """Fill a project with suites, other people's YAML and a plain test."""
    project.write("gate.qsa.yaml", GATE)
    project.write("sub/other.qsa.yml", OTHER)
    project.write("named.yaml", OTHER)
    project.write("named.gate", OTHER)
    project.write("docker-compose.yaml", NOT_OURS)
    project.write("test_api.yml", NOT_OURS)
    project.write("test_plain.py", "def test_plain(): pass\n")
    return project


@pytest.mark.parametrize(
    ("arguments", "collected"),
    [
        ([], [*ALL, "test_plain.py::test_plain"]),
        (["-k", "drift or plain"], ["gate.qsa.yaml::drift.of-all_9", "test_plain.py::test_plain"]),
        (["-k", "other"], ["sub/other.qsa.yml::peaks"]),
        (["-m", "qsa"], ALL),
        (["-m", "not qsa"], ["test_plain.py::test_plain"]),
        (["--deselect", "gate.qsa.yaml::also", "gate.qsa.yaml"], ALL[:2]),
        (["gate.qsa.yaml::also", "gate.qsa.yaml::peaks"], [ALL[2], ALL[0]]),
        (["sub"], ["sub/other.qsa.yml::peaks"]),
        (["named.yaml"], ["named.yaml::peaks"]),
        (["named.yaml::peaks"], ["named.yaml::peaks"]),
        (["-o", "qsa_suites=*.gate"], ["named.gate::peaks", "test_plain.py::test_plain"]),
        (["--strict-markers", "-m", "qsa", "sub"], ["sub/other.qsa.yml::peaks"]),
        (["--qsa-model", "somewhere", "gate.qsa.yaml"], ALL[:3]),
        (
            ["--qsa-model", "a=one", "--qsa-model", "two/three", "sub"],
            ["sub/other.qsa.yml::peaks[a]", "sub/other.qsa.yml::peaks[three]"],
        ),
    ],
    ids=" ".join,
)
def test_collects(mixed, arguments, collected):
    run = mixed.pytest("--co", "-q", *arguments)
    assert run.code == 0, run.out
    assert run.collected == collected


def test_an_unknown_id_is_not_found(mixed):
    run = mixed.pytest("gate.qsa.yaml::peak")
    assert run.code == 4
    assert "not found" in run.out


UNKNOWN = {
    "gate.qsa.yaml::peek": r"gate.qsa.yaml has no assertion 'peek' \(did you mean 'peaks'\?\)",
    "gate.qsa.yaml::zz": r"gate.qsa.yaml has no assertion 'zz'; it has peaks",
    "gate.qsa.yaml::peaks[new]": r"gate.qsa.yaml: peaks runs on no checkpoint \[new\]: --qsa-model names them",
}


@pytest.mark.parametrize("workers", [(), ("-n1",)], ids=["alone", "workers"])
def test_an_unknown_id_is_answered_with_what_the_suite_has(mixed, workers):
    run = mixed.pytest(*UNKNOWN, *workers)
    assert run.code == (2 if workers else 4)
    for text in UNKNOWN.values():
        assert re.search(text, run.out)


def test_a_suite_without_assertions_is_collected_with_a_warning(own_project):
    own_project.write("seed.qsa.yaml", "model: {path: nowhere}\nvisualization: {dpi: 300}\n")
    run = own_project.pytest("-W", "default::pytest_qsa.common.errors.QsaWarning")
    assert run.code == 5
    assert [(warning["kind"], warning["text"]) for warning in run.warnings] == [
        ("QsaWarning", "seed.qsa.yaml has no assertions: nothing is checked")
    ]


def test_the_name_of_a_file_may_hold_spaces_and_letters_of_any_script(own_project):
    own_project.write("übung 1/mein modell.qsa.yaml", OTHER)
    run = own_project.pytest("--co", "-q", "übung 1/mein modell.qsa.yaml::peaks")
    assert run.collected == ["übung 1/mein modell.qsa.yaml::peaks"]


@pytest.fixture(scope="module")
def two(tmp_path_factory, llama):
    """Run a suite of which one assertion fails; return the project and the run."""
    from support.projects import Project

    project = Project(tmp_path_factory.mktemp("two") / "project")
    lines = "id: fails\n    metric: absmax\n    layers: layers\\.\\d$\n    site: output\n    max: 1\n    level: fail"
    project.write("a.qsa.yaml", suite(llama, peaks("max: 100", "holds")) + f"  - {lines}\n")
    return project, project.pytest("--junitxml=junit.xml", "-o", "junit_family=xunit1", "--qsa-report=never")


def test_a_test_stands_at_the_line_of_its_assertion(two):
    _, run = two
    assert run.report("::holds")["location"][:2] == ["a.qsa.yaml", 3]
    assert run.report("::fails")["location"][:2] == ["a.qsa.yaml", 4]


def test_a_failure_stands_at_the_line_of_its_bound(two):
    project, run = two
    failure = run.report("::fails")
    assert (failure["path"], failure["line"]) == (str(project.folder / "a.qsa.yaml"), 9)
    assert failure["text"].startswith("a.qsa.yaml:9: in fails\n    max: 1\n")


def test_junit_has_the_place_the_kind_and_the_verdict(two):
    project, _ = two
    cases = {case.get("name"): case for case in ElementTree.parse(project.folder / "junit.xml").iter("testcase")}
    assert (cases["fails"].get("file"), cases["fails"].get("line")) == ("a.qsa.yaml", "4")
    properties = {p.get("name"): p.get("value") for p in cases["fails"].iter("property")}
    assert properties["qsa_kind"] == "REGRESSION"
    assert properties["qsa_verdict"].endswith("; 4 of 4 layers are out of bounds")
    assert cases["fails"].find("failure").get("message").startswith("REGRESSION: model.layers.3: ")
    assert {p.get("value") for p in cases["holds"].iter("property")} >= {"PASSED"}


def test_last_failed_runs_the_failed_assertion_alone(two):
    project, _ = two
    run = project.pytest("--lf", "--qsa-report=never")
    assert run.outcomes == {"a.qsa.yaml::fails": "failed"}


def test_stepwise_and_failed_first_know_assertions(two):
    project, _ = two
    assert project.pytest("--co", "-q", "--ff").collected[0] == "a.qsa.yaml::fails"


@pytest.mark.parametrize("option", ["--qsa-model", "--qsa-output"])
def test_a_path_outside_the_project_does_not_take_its_ini_file_away(own_project, tmp_path_factory, option):
    own_project.write("a.qsa.yaml", OTHER)
    outside = str(tmp_path_factory.mktemp("outside"))
    run = own_project.pytest("--co", option, outside)  # pytest takes the path for a place to look for its ini file
    said = run.code == 4 and f"{option}={outside}" in run.out
    assert said or ("configfile: pytest.ini" in run.out and run.collected == ["a.qsa.yaml::peaks"])

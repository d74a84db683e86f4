"""pytest-xdist: one capture a run, whatever the number of workers, and the same baselines, reports and words."""

from __future__ import annotations

import os
import socket

import pytest

from pytest_qsa.common.locks import UNFINISHED, try_lock
from support.projects import COUNTED, Project, peaks, suite

pytestmark = pytest.mark.process

KEPT = ("drift", "drift.1", "gone")


@pytest.fixture(scope="module")
def workers(tmp_path_factory, llama):
    """Run one project with two workers: to make baselines, to fail, to fail to load."""
    project = Project(tmp_path_factory.mktemp("workers") / "project")
    project.write("counted.py", COUNTED.format(path=str(llama)))

    def write(*kept):
        lines = [peaks("max: 100", "holds"), peaks("max: 1", "above"), peaks("max: 1, level: warn", "softened")]
        lines += [peaks("baseline: {rel: 0.05}", name) for name in kept]
        project.write("a.qsa.yaml", suite("x", *lines).replace("path: x", "factory: counted:make"))

    write(*KEPT)
    broken = suite("x", peaks("max: 1"), peaks("max: 2", "again"))
    project.write("broken.qsa.yaml", broken.replace("path: x", "factory: counted:fail"))
    project.write("qsa_baselines/llama/a/README.md", "kept")
    arguments = ("-n2", "--qsa-allow-code", "--dist=load")
    project.made = project.pytest(*arguments, "--snapshot-update", "a.qsa.yaml", "--qsa-report=never")
    project.made_files = project.files("qsa_baselines")
    project.notes = project.read("notes.txt").split()
    (project.folder / "notes.txt").unlink()
    write(*KEPT[:2])
    project.run = project.pytest(*arguments, "--junitxml=junit.xml")
    project.run_notes = project.read("notes.txt").split()
    return project


def test_workers_share_one_load_and_one_pass(workers):
    assert workers.notes == ["load", "forward", "forward"]


def test_workers_share_a_failure_to_load(workers):
    assert workers.run_notes.count("load") == 2  # one that works, one that fails
    said = "model.factory 'counted:fail' failed: RuntimeError: no such thing"
    lines = {name: workers.run.first_line(f"::{name}") for name in ("peaks", "again")}
    [first] = [name for name, line in lines.items() if line == f"INFRA {name}: {said}"]
    [other] = {*lines} - {first}
    unjudged = f"could not be judged, for nothing was measured of llama; broken.qsa.yaml::{first} has the reason"
    assert lines[other] == f"INFRA {other}: {unjudged}"


def test_workers_make_baselines_and_touch_nothing_else(workers):
    names = {name.rpartition("/")[2] for name in workers.made_files}
    assert names == {"README.md", *(f"{name}.json" for name in KEPT)}
    assert workers.made.outcomes == {
        **{f"a.qsa.yaml::{name}": "passed" for name in ("holds", "softened", *KEPT)}, "a.qsa.yaml::above": "failed",
    }  # fmt: skip


def test_workers_meet_their_baselines_and_report_the_unused_one(workers):
    assert workers.run.outcomes["a.qsa.yaml::drift"] == "passed"
    assert "1 snapshot unused" in workers.run.out
    assert workers.files("qsa_baselines") == workers.made_files


def test_a_failure_on_a_worker_reads_as_it_does_without(workers):
    alone = workers.pytest("--qsa-allow-code", "--qsa-report=never", "a.qsa.yaml::above")
    assert workers.run.text("::above").startswith("[gw")

    def words(run):
        lines = run.text("::above").splitlines()
        return [line.split() for line in lines if not line.startswith("[gw") and "qsa-results" not in line]

    here, there = words(alone), words(workers.run)
    assert here == there


def test_a_warning_on_a_worker_arrives(workers):
    assert [w["text"].partition(":")[0] for w in workers.run.warnings if w["kind"] == "QsaWarning"] == ["softened"]


def test_the_controller_writes_one_report_of_all_verdicts(workers):
    results = workers.json("qsa-results/report.json")["results"]
    assert {result["nodeid"].partition("::")[2]: result["kind"] for result in results} == {
        "holds": "PASSED", "above": "REGRESSION", "softened": "WARNED", "drift": "PASSED", "drift.1": "PASSED",
        "peaks": "INFRA", "again": "INFRA",
    }  # fmt: skip
    assert workers.run.out.count("report: qsa-results/report.html") == 1
    assert workers.run.out.count("qsa: 4 of 7 assertions ") == 1


def test_junit_of_workers_has_the_kinds(workers):
    assert 'name="qsa_kind" value="REGRESSION"' in workers.read("junit.xml")


def test_a_pass_waits_until_the_machine_has_a_slot(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 100")))
    folder = own_project.folder.parent / "cache"
    own_project.settings["XDG_CACHE_HOME"] = str(folder)
    folder /= "pytest-qsa/slots"
    folder.mkdir(parents=True)
    held = try_lock(folder / f"{socket.gethostname()}-0.lock", "int8")
    run = own_project.pytest("--qsa-lock-timeout=1.5", "--qsa-no-cache", "--qsa-report=never")
    with_two = own_project.pytest("--qsa-jobs=2", "--qsa-no-cache", "--qsa-report=never")
    held.release()
    whom = f"llama waits for process {os.getpid()}, which has worked on int8 since "
    assert run.first_line("::peaks").startswith(f"INFRA peaks: {whom}")
    assert f"qsa: {whom}" in run.out
    assert "--qsa-jobs lets 1 pass run on this machine at once" in run.out
    assert with_two.outcomes == {"a.qsa.yaml::peaks": "passed"}


@pytest.mark.parametrize("option", ["--qsa-jobs=0", "--qsa-lock-timeout=0", "--qsa-lock-timeout=nan"])
def test_a_wrong_count_of_slots_or_seconds_is_a_usage_error(own_project, option):
    run = own_project.pytest(option)
    assert run.code == 4
    assert option.partition("=")[0].removeprefix("--").replace("-", "_") in run.out.replace("-", "_")


def test_what_a_killed_write_left_goes_with_a_run_that_writes_nothing(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("baseline: {rel: 0.05}")))
    assert own_project.pytest("--snapshot-update", "--qsa-report=never").code == 0
    for folder in ("qsa_baselines/llama/a", "qsa-results/plots"):
        own_project.write(f"{folder}/.peaks.json.x1{UNFINISHED}", "half")
    assert own_project.pytest("--qsa-report=never").code == 0
    assert [name for name in own_project.files(".") if name.endswith(UNFINISHED)] == []

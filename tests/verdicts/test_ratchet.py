"""The ratchet: a patch that tightens budgets, which git takes, and which changes nothing by itself."""

from __future__ import annotations

import math
import subprocess

import pytest

from pytest_qsa import Capture
from pytest_qsa.verdicts.budgets import patch_of, tighter
from support.projects import Project, peaks, suite

BASE = """\
# a base of two suites
data: {num_samples: 2, seq_len: 32}
memory: {device: cpu}
assertions:
  - id: peaks
    metric: absmax
    layers: layers\\.\\d$
    site: output
    max: 1000   # loose
    min: 1e-3
  - id: groups
    metric: absmax
    layers: layers\\.\\d$
    site: output
    max: {'layers\\.0$': 500, default: 0.5}
  - {id: exceeded, metric: absmax, layers: 'layers\\.\\d$', site: output, max: 1}
  - {id: nothing, metric: absmax, layers: nowhere, site: output, max: 1000}
  - {id: count, metric: nonfinite, layers: 'layers\\.\\d$', site: output, max: 7}"""


@pytest.mark.parametrize(
    ("side", "bound", "nearest", "proposed"),
    [
        ("max", 4.0, 1.231, 1.3),
        ("max", 4.0, 3.91, None),
        ("max", 4.0, 3.0, 3.0),
        ("max", 1.0, 0.0, 0.0),
        ("max", 1.0, 2.0, None),
        ("max", 1000.0, 123.4, 130.0),
        ("max", 1.0, -0.0123, -0.012),
        ("min", 1.0, 1.29, 1.2),
        ("min", -5.0, -1.21, -1.3),
        ("min", 1.0, 0.5, None),
        ("min", 30.0, math.inf, None),
    ],
)
def test_a_proposal_is_rounded_away_from_the_values_and_only_ever_tighter(side, bound, nearest, proposed):
    assert tighter(side, bound, nearest) == proposed


def test_of_two_equal_numbers_on_a_line_neither_is_changed(tmp_path):
    (tmp_path / "a.yaml").write_text("a: {max: {default: 5}, min: {default: 5}}\nb: {max: 7}\n")
    limit = {"path": str(tmp_path / "a.yaml"), "line": 1, "side": "max", "key": "default", "bound": 5.0, "nearest": 2.0}
    assert patch_of([limit], tmp_path) == ""
    assert "\n-b: {max: 7}\n+b: {max: 2}\n" in patch_of(
        [limit, {**limit, "line": 2, "key": "max", "bound": 7.0}], tmp_path
    )


@pytest.fixture(scope="module")
def ratchet(tmp_path_factory, llama, changed_llama):
    """Run the ratchet over two checkpoints that share one base, in a repository; the second has the larger numbers."""
    project = Project(tmp_path_factory.mktemp("ratchet") / "project")
    subprocess.run(["git", "init", "-q"], cwd=project.folder, check=True)
    project.write("gates/_base/b.qsa.yaml", BASE)
    for name, path in (("one", llama), ("two", changed_llama)):
        project.write(f"gates/{name}.qsa.yaml", f"extends: _base/b.qsa.yaml\nmodel: {{name: {name}, path: {path}}}\n")
    project.before = project.files("gates")
    project.run = project.pytest("--qsa-ratchet", "--qsa-report=always", "--qsa-cache=cache")
    project.unchanged = project.files("gates") == project.before
    return project


@pytest.mark.process
def test_it_changes_no_suite_by_itself(ratchet):
    assert ratchet.unchanged


@pytest.mark.process
def test_its_patch_is_shown_and_written(ratchet):
    patch = ratchet.read("qsa-results/ratchet.patch")
    assert patch in ratchet.run.out
    assert "git apply qsa-results/ratchet.patch" in ratchet.run.out


@pytest.mark.process
def test_git_applies_it_and_the_gate_still_holds_at_its_bounds(ratchet, tmp_path):
    subprocess.run(["git", "apply", "qsa-results/ratchet.patch"], cwd=ratchet.folder, check=True)
    changed = ratchet.read("gates/_base/b.qsa.yaml").splitlines()
    before = BASE.splitlines()
    try:
        captures = [Capture.load(file) for file in (ratchet.folder / "cache").glob("*.qsa")]
        values = [value for capture in captures for value in capture.output(r"layers\.\d$").absmax().values.tolist()]
        top, first = max(values), max(capture.output(r"layers\.0$").absmax().values[0] for capture in captures)
        differing = [number for number, (old, new) in enumerate(zip(before, changed, strict=True), 1) if old != new]
        assert differing == [9, 10, 15, 18]
        assert changed[8].startswith("    max: ")
        assert changed[8].endswith("   # loose")
        assert top <= float(changed[8].split()[1]) <= 1.1 * top
        assert 0.9 * min(values) <= float(changed[9].split()[1]) <= min(values)
        assert first <= float(changed[14].partition("': ")[2].partition(",")[0]) <= 1.1 * first
        assert changed[14].endswith("default: 0.5}")
        assert changed[17].endswith("site: output, max: 0}")
        run = ratchet.pytest("--qsa-report=never", "-k", "peaks or count")
        assert run.code == 0, run.out
    finally:
        subprocess.run(["git", "apply", "-R", "qsa-results/ratchet.patch"], cwd=ratchet.folder, check=True)


@pytest.mark.process
def test_a_bound_that_an_override_changed_is_left_alone(ratchet):
    override = "--qsa-set=assertions.peaks.max=900"
    run = ratchet.pytest("gates/one.qsa.yaml::peaks", "--qsa-ratchet", override, "--qsa-output=other")
    assert "-    max: 1000" not in run.out
    assert "-    min: 1e-3" in run.out


@pytest.mark.process
def test_nothing_to_tighten_is_said(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 1")))
    run = own_project.pytest("--qsa-ratchet", "--qsa-report=never")
    assert "qsa: no budget can be tightened" in run.out
    assert not (own_project.folder / "qsa-results" / "ratchet.patch").exists()

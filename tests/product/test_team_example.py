"""The example of a team: one base suite, three checkpoints that extend it, tiers, a waiver before and after its day."""

from __future__ import annotations

import shutil

import pytest

from support.checkpoints import edited
from support.paths import ROOT
from support.projects import Project

pytestmark = pytest.mark.process

TEAM = ROOT / "example_suites" / "team"
SMALL = ("--qsa-set=data.num_samples=2", "--qsa-set=data.seq_len=32", "--qsa-report=never")
CHECKPOINTS = ("original", "int8", "candidate")


@pytest.fixture(scope="module")
def team(tmp_path_factory, llama, int8_llama):
    """Return a project with the example's files and small checkpoints; the candidate has the scale of layer 2 × 64."""
    project = Project(tmp_path_factory.mktemp("team") / "project")
    shutil.copytree(TEAM, project.folder / "example_suites/team", ignore=shutil.ignore_patterns("__pycache__"))
    candidate = "example_suites/team/candidate.qsa.yaml"
    project.write(candidate, project.read(candidate).replace(r"layers\.17\.", r"layers\.2\."))
    demo = project.folder / ".demo"
    demo.mkdir()
    (demo / "smollm2").symlink_to(llama)
    (demo / "smollm2-int8").symlink_to(int8_llama)

    def change(weights):
        weights["model.layers.2.mlp.down_proj.weight_scale"] *= 64

    edited(int8_llama, demo / "smollm2-int8-damaged", change)
    return project


def outcomes_of(run):
    """Return what became of each assertion of each checkpoint."""
    named = (nodeid.removeprefix("example_suites/team/").split(".qsa.yaml::") for nodeid in run.reports)
    return {(one, other): report["outcome"] for (one, other), report in zip(named, run.reports.values(), strict=True)}


@pytest.mark.parametrize(
    ("tier", "ids", "left"),
    [
        ("pr", {"files"}, 9),
        ("nightly", {"files", "residual-outliers", "finite"}, 3),
        ("release", {"files", "residual-outliers", "finite", "fits-float16"}, 0),
    ],
)
def test_each_tier_runs_the_base_for_all_three_checkpoints(team, tier, ids, left):
    run = team.pytest("example_suites/team", f"--qsa-tier={tier}", "--qsa-today=2027-01-31", *SMALL)
    assert outcomes_of(run) == {(checkpoint, id): "passed" for checkpoint in CHECKPOINTS for id in ids}, run.out
    assert (f"{left} assertions skipped by --qsa-tier={tier}" in run.out) == bool(left)


def test_the_waiver_holds_on_its_last_day_and_not_on_the_next(team):
    before, after = (
        team.pytest("example_suites/team", "--qsa-tier=pr", f"--qsa-today={day}", *SMALL)
        for day in ("2027-01-31", "2027-02-01")
    )
    assert before.code == 0
    assert "quantization@example.org" in before.out
    assert after.code == 1
    assert {name for name, outcome in outcomes_of(after).items() if outcome == "failed"} == {("candidate", "files")}
    assert "quantization@example.org" in after.text("candidate.qsa.yaml::files")

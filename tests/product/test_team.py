"""A team's gate as a whole: one base, three checkpoints that extend it, in each tier, with a waiver and its end."""

from __future__ import annotations

import pytest

from support.checkpoints import save_llama
from support.projects import Project

pytestmark = pytest.mark.process

BASE = r"""
data: {num_samples: 2, seq_len: 32}
defaults: {site: output, layers: 'layers\.\d$'}
assertions:
  - {id: health, metric: checkpoint_health, layers: .}
  - {id: finite, metric: nonfinite, max: 0}
  - {id: peaks, metric: absmax, max: {'layers\.0$': 40, default: 20}, tier: nightly}
  - id: drift
    metric: rms
    layers: down_proj$
    max: {times: 1.1, of: previous}
    tier: release
"""
LARGE = """
extends: ../_base/w8a8.qsa.yaml
model: {name: large, path: PATH, previous: PREVIOUS}
assertions:
  peaks:
    max: {default: 8}
  drift:
    waive: {layers: 'layers.2', owner: quantization, reason: rescaled on purpose, until: 2027-01-31}
"""
PR = ["health", "finite"]
TIERS = {"pr": PR, "nightly": [*PR, "peaks"], "release": [*PR, "peaks", "drift"]}


@pytest.fixture(scope="module")
def team(tmp_path_factory, llama, changed_llama):
    """Return three suites over one base: the last release itself, one like it, and one with a louder layer."""

    def change(weights):
        weights["model.layers.0.mlp.down_proj.weight"] *= 1.01

    similar = save_llama(tmp_path_factory.mktemp("checkpoints") / "similar", change)
    project = Project(tmp_path_factory.mktemp("team") / "project")
    project.write("_base/w8a8.qsa.yaml", BASE)
    for name, path in (("small", llama), ("similar", similar)):
        model = f"model: {{name: {name}, path: {path}, previous: {llama}}}\n"
        project.write(f"{name}/gate.qsa.yaml", f"extends: ../_base/w8a8.qsa.yaml\n{model}")
    text = LARGE.replace("PATH", str(changed_llama)).replace("PREVIOUS", str(llama))
    project.write("large/gate.qsa.yaml", text)
    return project


@pytest.fixture(scope="module", params=TIERS)
def tier(request, team):
    """Run all three in one tier, in January."""
    return request.param, team.pytest(f"--qsa-tier={request.param}", "--qsa-today=2027-01-15", "--qsa-report=never")


def test_each_tier_runs_its_assertions_on_each_checkpoint_and_lists_the_rest(tier):
    name, run = tier
    suites = ("large", "similar", "small")
    assert list(run.outcomes) == [f"{suite}/gate.qsa.yaml::{test}" for suite in suites for test in TIERS[name]]
    left_out = 3 * (len(TIERS["release"]) - len(TIERS[name]))
    assert (f"qsa: {left_out} assertions skipped by --qsa-tier={name}" in run.out) == (left_out > 0)


def test_what_fails_is_the_bound_of_the_suite_that_tightened_it(tier):
    name, run = tier
    failed = [test for test, outcome in run.outcomes.items() if outcome != "passed"]
    assert failed == ([] if name == "pr" else ["large/gate.qsa.yaml::peaks"]), run.out
    if failed:
        assert run.labelled("large/gate.qsa.yaml::peaks")["bound"][0].startswith(
            "large/gate.qsa.yaml:6: max {default: 8"
        )


def test_the_waiver_softens_until_its_day_and_then_fails_in_the_base(team):
    drift = ("large/gate.qsa.yaml::drift", "--qsa-report=never")
    before, after = (team.pytest(*drift, f"--qsa-today={day}") for day in ("2027-01-31", "2027-02-01"))
    assert (before.code, after.code) == (0, 1)
    assert "until 2027-01-31" in before.out
    assert "2027-01-31" in after.first_line("::drift")
    assert after.labelled("::drift")["bound"] == ["_base/w8a8.qsa.yaml:11: max 1.1 × previous"]

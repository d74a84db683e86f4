"""Tiers: a run of one runs those before it, and says what it left out."""

from __future__ import annotations

import pytest

from support.projects import Project, peaks, suite

pytestmark = pytest.mark.process

TESTS = """
import pytest

@pytest.mark.qsa(layers="down_proj$", site="output", tier="nightly")
def test_nightly(qsa):
    assert qsa.output("down_proj$").absmax() <= 100

@pytest.mark.qsa(tier="release")
class TestRelease:
    @pytest.mark.qsa(layers="down_proj$", site="output")
    def test_release(self, qsa):
        assert qsa.output("down_proj$").absmax() <= 100

    @pytest.mark.qsa(layers="down_proj$", site="output", tier="pr")
    def test_pr(self, qsa):
        assert qsa.output("down_proj$").absmax() <= 100

def test_plain():
    pass
"""
PR = ["a.qsa.yaml::quick", "a.qsa.yaml::files", "test_t.py::TestRelease::test_pr", "test_t.py::test_plain"]
NIGHTLY = ["a.qsa.yaml::slow", "test_t.py::test_nightly"]
RELEASE = ["a.qsa.yaml::last", "test_t.py::TestRelease::test_release"]


@pytest.fixture(scope="module")
def tiered(tmp_path_factory, llama):
    """Return a project with gates of each tier."""
    project = Project(tmp_path_factory.mktemp("tiered") / "project")
    lines = [
        peaks("max: 100", "quick"),
        peaks("max: 100, tier: nightly", "slow"),
        peaks("max: 1, tier: release", "last"),
    ]
    project.write("a.qsa.yaml", suite(llama, *lines, "id: files, metric: checkpoint_health, max: 99"))
    project.write("test_t.py", TESTS)
    return project


@pytest.mark.parametrize(
    ("arguments", "collected"),
    [
        ([], PR + NIGHTLY + RELEASE),
        (["--qsa-tier=release"], PR + NIGHTLY + RELEASE),
        (["--qsa-tier=nightly"], PR + NIGHTLY),
        (["--qsa-tier=pr"], PR),
        (["-o", "qsa_tier=pr"], PR),
        (["-o", "qsa_tier=pr", "--qsa-tier=nightly"], PR + NIGHTLY),
        (["-m", "qsa(tier='nightly')"], NIGHTLY),
    ],
    ids=" ".join,
)
def test_a_tier_runs_itself_and_those_before_it(tiered, arguments, collected):
    run = tiered.pytest("--co", "-q", *arguments)
    assert run.code == 0, run.out
    assert sorted(run.collected) == sorted(collected)


@pytest.fixture(scope="module", params=[(), ("-n", "2")], ids=["alone", "workers"])
def nightly(request, tiered):
    """Run the nightly tier, with and without workers."""
    arguments = ("--qsa-tier=nightly", "--qsa-config=a.qsa.yaml", "--qsa-report=always", *request.param)
    return tiered.pytest(*arguments), tiered.json("qsa-results/report.json")


def test_what_did_not_run_is_listed_in_the_terminal(nightly):
    run, _ = nightly
    assert run.code == 0, run.out
    assert sorted(run.outcomes) == sorted(PR + NIGHTLY)
    listed = run.out.partition("qsa: 2 assertions skipped by --qsa-tier=nightly (release: 2)")[2].splitlines()[1:3]
    assert sorted(line.split() for line in listed) == sorted(["release", name] for name in RELEASE)


def test_what_did_not_run_is_listed_in_the_report(nightly, tiered):
    _, report = nightly
    assert report["session"]["tier"] == "nightly"
    assert report["session"]["not_run"] == [{"nodeid": name, "tier": "release"} for name in sorted(RELEASE)]
    assert "2 skipped by --qsa-tier=nightly" in tiered.read("qsa-results/report.html")


def test_a_tier_of_static_assertions_loads_no_model(tiered):
    refused = "--qsa-set=model.trust_remote_code=true"  # loading would be INFRA
    assert tiered.pytest("a.qsa.yaml::files", refused, "--qsa-report=never").code == 0
    assert tiered.pytest("a.qsa.yaml::quick", refused, "--qsa-report=never").code == 1


def test_a_failure_s_command_keeps_the_tier_of_the_command_line(tiered):
    run = tiered.pytest("a.qsa.yaml::last", "-o", "qsa_tier=pr", "--qsa-tier=release", "--qsa-report=never")
    assert run.labelled("::last")["again"] == ["pytest a.qsa.yaml::last --qsa-tier=release"]


def test_an_unknown_tier_is_told(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 1, tier: nigthly")))
    run = own_project.pytest()
    assert run.code == 2
    assert "a.qsa.yaml:4: tier: 'nigthly' is none of 'pr', 'nightly' or 'release' (did you mean 'nightly'?)" in run.out
    run = own_project.pytest("--qsa-tier=weekly")
    assert run.code == 4
    assert "argument --qsa-tier: invalid choice: 'weekly'" in run.out
    run = own_project.pytest("-o", "qsa_tier=weekly")
    assert (run.code, "qsa_tier = weekly: one of pr, nightly, release" in run.out) == (4, True)


def test_an_unknown_tier_of_a_mark_is_told(own_project):
    own_project.write("test_t.py", TESTS.replace('tier="nightly"', 'tier="nigthly"'))
    run = own_project.pytest()
    assert run.code == 2
    assert "test_t.py::test_nightly: " in run.out
    assert "'nigthly'" in run.out

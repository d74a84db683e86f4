"""Bounds that follow the last release: a capture, baselines or a checkpoint gives its numbers."""

from __future__ import annotations

import re

import pytest

from pytest_qsa import Capture
from pytest_qsa.common.errors import SuiteError
from pytest_qsa.suite import Relative, load_suite
from pytest_qsa.verdicts.budgets import budget_of
from support.projects import Project, suite

ASKED = r"metric: absmax, layers: 'layers\.\d\.mlp\.down_proj$', site: output"
TIMES = "{times: 1.1, of: previous}"


def drift(bound, id="drift"):
    return f"id: {id}, {ASKED}, {bound}"


@pytest.mark.parametrize(
    ("keys", "number"),
    [
        ({"times": 1.1}, 2.2),
        ({"plus": 0.5}, 2.5),
        ({"times": 3.0, "plus": -1.0}, 5.0),
        ({"times": 3.0, "at_most": 4.0}, 4.0),
        ({"times": 0.1, "at_least": 1.0}, 1.0),
    ],
)
def test_a_bound_is_computed_from_the_layer_s_last_value(keys, number):
    stated = {"max": Relative(of="previous", **keys)}
    (bounds,) = budget_of(stated, ["a"], None, {"a": 2.0}).bounds
    assert bounds.high == pytest.approx(number)


def test_a_group_may_follow_and_another_not():
    stated = {"max": {"a": Relative(of="previous", times=1.5, at_most=9.0), "default": 4.0}}
    budget = budget_of(stated, ["a", "b"], None, {"a": 2.0, "b": 2.0})
    assert [bounds.high for bounds in budget.bounds] == [3, 4]
    assert budget.text == "max {a: 1.5 × previous, at most 9, default: 4}"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("max: {times: 1.1}", "the key 'of' is missing"),
        ("max: {times: 1.1, of: reference}", "of: 'reference' is none of 'previous'"),
        ("max: {times: -1, of: previous}", "times: should be greater than 0"),
        ("max: {times: 1, of: previous, at_mots: 2}", "unknown key 'at_mots' (did you mean 'at_most'?)"),
        ("max: {times: 1.1, of: previous}", "max follows the last release: name it, model.previous"),
    ],
)
def test_a_wrong_relative_bound_is_told(tmp_path, monkeypatch, keys, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.qsa.yaml"
    path.write_text(suite("x", drift(keys)))
    with pytest.raises(SuiteError, match=re.escape(f"a.qsa.yaml:4: {said}")):
        load_suite(path)


def test_a_static_check_follows_nothing(tmp_path):
    path = tmp_path / "a.qsa.yaml"
    path.write_text(
        f"model: {{path: x, previous: y}}\nassertions: [{{id: a, metric: checkpoint_health, max: {TIMES}}}]\n"
    )
    with pytest.raises(SuiteError, match="checkpoint_health is of one checkpoint alone: write a number"):
        load_suite(path)


NOTING = """
from pathlib import Path

from pytest_qsa.engine import subject as running

original = running.capture_subject

def noting(subject, *arguments, **options):
    with Path(__file__).with_name("passes.txt").open("a") as notes:
        notes.write(Path(subject.path).name + " ")
    return original(subject, *arguments, **options)

running.capture_subject = noting
"""
"""Notes each pass: the name of its checkpoint's folder."""


@pytest.fixture(scope="module")
def releases(tmp_path_factory, llama, changed_llama):
    """Gate a release whose layer 2 is three times the last one's, against each form of the last."""
    project = Project(tmp_path_factory.mktemp("releases") / "project")
    project.write("pytest.ini", "[pytest]\naddopts = --qsa-report=never\n")
    made = suite(llama, drift("baseline: {rel: 0.01}"), name="v1")
    project.write("a.qsa.yaml", made)
    assert project.pytest("--snapshot-update", "--qsa-cache=cache").code == 0
    (kept,) = (project.folder / "cache").glob("*.qsa")
    kept.rename(project.folder / "v1.qsa")

    def run(previous, bound=f"max: {TIMES}", *options, path=changed_llama, sections=""):
        text = suite(path, drift(bound), drift(f"max: {TIMES}", "other"), name="v2", sections=sections)
        project.write("a.qsa.yaml", text.replace("{name: v2", f"{{previous: {previous}, name: v2"))
        return project.pytest(*options)

    project.gate = run
    return project


@pytest.fixture(params=["v1.qsa", "v1", "checkpoint"])
def previous(request, llama):
    """Return each of the names that the last release may have: a capture, a model with baselines, a checkpoint."""
    return str(llama) if request.param == "checkpoint" else request.param


@pytest.mark.process
def test_what_rose_beyond_the_last_release_fails(releases, previous):
    run = releases.gate(previous, f"baseline: {{rel: 9}}, max: {TIMES}", "a.qsa.yaml::drift", "--qsa-report=always")
    line = run.first_line("::drift")
    assert line.startswith("REGRESSION drift: ")
    assert "(max 1.1 × previous)" in line
    assert line.startswith("REGRESSION drift: model.layers.2.mlp.down_proj: ")
    # A release whose capture was read is drawn in the report, over the layer's own distribution.
    drawn = '"whose":"last release"' in releases.read("qsa-results/report.html")
    assert drawn == (previous not in ("v1", "v1.qsa"))  # what was kept of v1 has no distributions


@pytest.mark.process
def test_the_bound_is_the_last_release_s_number_times_the_factor(releases, llama):
    run = releases.gate(str(llama), "max: {times: 1.25, of: previous}", "a.qsa.yaml::drift")
    capture = Capture.load(releases.folder / "v1.qsa")
    series = capture.output(r"layers\.2\.mlp\.down_proj$").absmax()
    row = next(line for line in run.text("::drift").splitlines() if re.match(r"E\s+model\.layers\.2", line))
    assert f"≤ {1.25 * series.values[0]:.4g}" in row


@pytest.mark.process
def test_a_ceiling_beside_the_factor_stops_creep(releases, llama):
    assert releases.gate(str(llama), "max: {times: 9, of: previous}", "a.qsa.yaml::drift").code == 0
    run = releases.gate(str(llama), "max: {times: 9, of: previous, at_most: 0.001}", "a.qsa.yaml::drift")
    assert "(max 9 × previous, at most 0.001)" in run.first_line("::drift")


@pytest.mark.process
def test_one_pass_of_the_last_release_answers_all(releases, llama):
    releases.write("conftest.py", NOTING)
    run = releases.gate(str(llama), "max: {times: 9, of: previous}", "--qsa-no-cache")
    (releases.folder / "conftest.py").unlink()
    assert sorted(run.outcomes.values()) == ["failed", "passed"], run.out  # the other bound is 1.1 ×
    assert sorted(releases.read("passes.txt").split()) == ["changed", llama.name]


@pytest.mark.process
def test_a_release_on_other_tokens_is_anomalous(releases):
    run = releases.gate("v1.qsa", f"max: {TIMES}", "--qsa-set=data.seed=5")
    assert run.first_line("::drift").startswith(
        "ANOMALOUS drift: model.previous 'v1.qsa': the last release was made on other tokens"
    )


@pytest.mark.process
def test_a_release_without_the_baseline_is_anomalous(releases):
    run = releases.gate("v1", f"max: {TIMES}")
    assert run.first_line("::other").startswith("ANOMALOUS other: model.previous 'v1' has no baseline other.json: give")


@pytest.mark.process
def test_a_release_that_is_nowhere_is_infra(releases):
    assert (
        releases.gate("./nowhere", f"max: {TIMES}").first_line("::drift").startswith("INFRA drift: there is no folder")
    )

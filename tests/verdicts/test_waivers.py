"""Waivers: an excess that is known softens until its day, in someone's name, and never more than that."""

from __future__ import annotations

from datetime import date
from xml.etree import ElementTree

import numpy as np
import pytest

from pytest_qsa.common.errors import SuiteError
from pytest_qsa.metrics import Bounds, Query, Series
from pytest_qsa.suite import Waiver, load_suite
from pytest_qsa.verdicts.budgets import Budget
from pytest_qsa.verdicts.judgement import Leniency, within_budget
from pytest_qsa.verdicts.verdict import Kind, failing
from support.projects import Project, peaks, suite

UNTIL = date(2027, 1, 31)
WAIVE = "waive: {layers: 'layers.[01]$', owner: 'team-x', reason: known since June, until: 2027-01-31}"
ALL = WAIVE.replace("[01]", ".")
NONE = WAIVE.replace("[01]", "9")


def waived(values, *patterns, today=UNTIL, high=1.0):
    """Hold values against a maximum, with a waiver for each pattern."""
    layers = [f"layers.{n}" for n in range(len(values))]
    series = Series(layers, np.array(values), Query("absmax", "absmax/1", "output", "."))
    waivers = [Waiver(layers=p, owner=f"owner-{p}", reason="known", until=UNTIL) for p in patterns]
    return within_budget(series, Budget.of(Bounds(max=high), layers), Leniency(waivers, today))


def test_an_excess_that_is_waived_whole_is_a_warning_that_names_the_waiver():
    verdict = waived([2, 3, 0.5], "layers.[01]")
    assert verdict.kind is Kind.WARNED
    assert verdict.headline.endswith("; waived until 2027-01-31 by owner-layers.[01]")
    assert str(verdict.waivers[0]) == "in force, until 2027-01-31, owner-layers.[01]: known (layers.1, layers.0)"


def test_what_is_not_waived_still_fails_and_the_headline_is_about_it():
    verdict = waived([9, 3, 0.5], "layers.0")
    assert verdict.kind is Kind.REGRESSION
    assert verdict.headline == ("layers.1: 3 (max 1); 1 of 3 layers is out of bounds; 1 more are waived")
    assert [row.layer for row in failing(verdict.rows)] == ["layers.1"]


@pytest.mark.parametrize(
    ("today", "kind"),
    [(date(2027, 1, 31), Kind.WARNED), (date(2027, 2, 1), Kind.REGRESSION)],
    ids=["in", "out"],
)
def test_a_waiver_holds_to_the_end_of_its_day(today, kind):
    verdict = waived([2, 0.5], "layers.0", today=today)
    assert verdict.kind is kind
    assert ("the waiver of owner-layers.0 expired on 2027-01-31" in verdict.headline) == (kind is Kind.REGRESSION)


def test_several_waivers_add_up():
    verdict = waived([2, 3], "layers.0", "layers.1", "layers.2")
    assert verdict.kind is Kind.WARNED
    assert [use.state for use in verdict.waivers] == ["in force", "in force", "unused"]


def test_a_waiver_leaves_a_pass_alone():
    assert waived([0.5], "layers").kind is Kind.PASSED


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("layers: x, reason: y, until: 2027-01-31", "the key 'owner' is missing"),
        ("layers: x, owner: y, until: 2027-01-31", "the key 'reason' is missing"),
        ("layers: x, owner: y, reason: z", "the key 'until' is missing"),
        ("owner: y, reason: z, until: 2027-01-31", "the key 'layers' is missing"),
        ("layers: x, owner: y, reason: z, until: soon", "until: write a day, such as 2027-01-31, not 'soon'"),
        ("layers: x, owner: y, reason: z, until: 3", "until: write a day, such as 2027-01-31, not 3"),
        ("layers: x, owner: ' ', reason: z, until: 2027-01-31", "owner: "),
        ("layers: x(, owner: y, reason: z, until: 2027-01-31", "'x('"),
        ("layers: x, owner: y, reason: z, untill: 2027-01-31", "unknown key 'untill' (did you mean 'until'?)"),
    ],
)
@pytest.mark.parametrize("form", ["waive: {%s}", "waive: [{%s}]"], ids=["one", "list"])
def test_a_wrong_waiver_is_told(tmp_path, monkeypatch, keys, said, form):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.qsa.yaml"
    path.write_text(suite("x", peaks("max: 1, " + form % keys)))
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"a.qsa.yaml:4: {said}")


@pytest.mark.parametrize("text", ["3", "[]", "[3]"])
def test_a_waiver_of_a_wrong_type_is_told(tmp_path, text):
    path = tmp_path / "a.qsa.yaml"
    path.write_text(suite("x", peaks(f"max: 1, waive: {text}")))
    with pytest.raises(SuiteError, match=r"a\.qsa\.yaml:4: "):
        load_suite(path)


@pytest.fixture(scope="module")
def told(tmp_path_factory, llama):
    """Run waivers before their date and after it; the checkpoint's blocks are all beyond 1."""
    project = Project(tmp_path_factory.mktemp("waivers") / "project")
    drift = "id: drift, metric: rms, layers: down_proj$, site: output, baseline: {rel: 0.01}"
    lines = [
        peaks(f"max: 1, {ALL}", "known"),
        peaks(f"max: 1, {WAIVE}", "partly"),
        peaks(f"max: 100, {NONE}", "idle"),
        peaks(f"max: 1, {ALL}", "nothing", layers="nowhere"),
        f"{drift}, max: 0.001, {WAIVE.replace('layers.[01]$', '.')}",
    ]
    project.write("a.qsa.yaml", suite(llama, *lines))
    project.pytest("--snapshot-update", "--qsa-report=never", "--qsa-today=2027-01-01")
    project.before = project.pytest("--qsa-today=2027-01-31", "--junitxml=junit.xml")
    project.report = project.json("qsa-results/report.json")
    project.after = project.pytest("--qsa-today=2027-02-01", "--qsa-report=never")
    return project


@pytest.mark.process
def test_before_its_day_a_waiver_softens_and_after_it_fails(told):
    before, after = told.before.outcomes, told.after.outcomes
    assert (before["a.qsa.yaml::known"], after["a.qsa.yaml::known"]) == ("passed", "failed")
    assert "the waiver of team-x expired on 2027-01-31" in told.after.first_line("::known")
    assert told.after.labelled("::known")["waiver"][0].startswith(
        "expired, until 2027-01-31, team-x: known since June ("
    )


@pytest.mark.process
def test_a_waiver_in_force_is_printed_in_terminal_report_and_junit(told):
    text = "in force, until 2027-01-31"
    assert f"waiver {text}" in told.before.out
    result = next(result for result in told.report["results"] if result["id"] == "known")
    assert (result["kind"], result["waivers"][0]["text"].startswith(text)) == ("WARNED", True)
    assert "in force, until 2027-01-31, team-x: known since June" in told.read("qsa-results/report.html")
    case = next(c for c in ElementTree.parse(told.folder / "junit.xml").iter("testcase") if c.get("name") == "known")
    properties = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert properties["qsa_waiver"].startswith(text)


@pytest.mark.process
def test_what_a_waiver_does_not_name_fails(told):
    assert told.before.first_line("::partly").startswith(
        "REGRESSION partly: model.layers.3: 11.53 (max 1); 2 of 4 layers "
    )
    assert "waived" in told.before.first_line("::partly")


@pytest.mark.process
def test_a_waiver_without_an_excess_is_a_warning(told):
    assert told.before.outcomes["a.qsa.yaml::idle"] == "passed"
    texts = [warning["text"] for warning in told.before.warnings if "idle" in warning["text"]]
    assert texts == [
        "idle: the waiver of team-x until 2027-01-31 waives nothing any more: no layer that 'layers.9$' finds is out "
        "of bounds; remove it (a.qsa.yaml:6)"
    ]


@pytest.mark.process
def test_a_waiver_never_softens_an_assertion_that_saw_nothing(told):
    assert told.before.first_line("::nothing").startswith("ANOMALOUS nothing: no layer matches 'nowhere'")


@pytest.mark.process
def test_a_baseline_is_judged_beside_a_bound_that_is_waived(told):
    assert told.before.outcomes["a.qsa.yaml::drift"] == "passed"
    path = told.folder / "qsa_baselines/llama/a/drift.json"
    kept = path.read_text()
    path.write_text(kept.replace('"values": {', '"values": {\n    "gone": 1,'))
    run = told.pytest("a.qsa.yaml::drift", "--qsa-today=2027-01-01", "--qsa-report=never")
    path.write_text(kept)
    assert run.first_line("::drift").startswith("ANOMALOUS drift: the layers differ from the baseline's")


@pytest.mark.process
def test_a_wrong_day_is_a_usage_error(told):
    run = told.pytest("--qsa-today=soon")
    assert (run.code, "--qsa-today soon: write a day, such as 2027-01-31" in run.out) == (4, True)


@pytest.mark.process
def test_a_waiver_on_everything_or_for_years_and_an_earlier_day_are_warned_of(told):
    assert "warning: the waiver of team-x until 2027-01-31, a.qsa.yaml::drift, is on everything" in told.before.out
    assert told.before.out.count("is on everything") == 1
    assert "ends in more than a year" not in told.before.out
    run = told.pytest("a.qsa.yaml::known", "--qsa-today=2026-01-29", "--qsa-report=never")
    assert "warning: --qsa-today 2026-01-29 is over" in run.out
    assert "warning: the waiver of team-x until 2027-01-31, a.qsa.yaml::known, ends in more than a year" in run.out

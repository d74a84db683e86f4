"""The hooks for users: what they are given, how often, in which process, and that they change nothing."""

from __future__ import annotations

import json

import pytest

from support.projects import Project, peaks, suite

pytestmark = pytest.mark.process

NOTING = """
    import json, os
    from pathlib import Path

    def note(**content):
        with Path("notes.jsonl").open("a") as file:
            file.write(json.dumps(content | {"worker": os.environ.get("PYTEST_XDIST_WORKER", "")}) + "\\n")

    def pytest_qsa_verdict(item, verdict):
        texts = [token.text for token in verdict.evidence]
        note(test=item.nodeid, kind=verdict.kind, id=verdict.id, report="report" in verdict.artefacts, texts=texts)

    def pytest_qsa_capture(subject, capture, cached):
        note(subject=subject.name, sites=len(capture.sites), cached=cached, tokens=len(capture.tokens))
"""
PYTHON = """
import pytest
BLOCKS = r"layers\\.\\d$"

@pytest.mark.qsa(layers=BLOCKS, site="output")
def test_two(qsa):
    assert qsa.output(BLOCKS).absmax() >= 0.1
    assert not qsa.output(BLOCKS).absmax() <= 1
    assert qsa.output(BLOCKS).absmax() <= 100
"""
OUTLIERS = r"id: outliers, metric: outlier_tokens, threshold: 1, layers: layers\.\d$, site: output, max: 0"


@pytest.fixture
def project(tmp_path, llama):
    made = Project(tmp_path / "project")
    made.write("conftest.py", NOTING)
    made.write("a.qsa.yaml", suite(llama, peaks("max: 100", "holds"), OUTLIERS))
    return made


def notes(project):
    """Return what the hooks were given: of the verdicts, and of the captures."""
    found = [json.loads(line) for line in project.read("notes.jsonl").splitlines()]
    (project.folder / "notes.jsonl").unlink()
    return [note for note in found if "test" in note], [note for note in found if "subject" in note]


def test_each_verdict_and_each_capture_is_handed_over_once(project):
    project.pytest("a.qsa.yaml")
    verdicts, captures = notes(project)
    assert [(note["id"], note["kind"], note["report"]) for note in verdicts] == [
        ("holds", "PASSED", False),
        ("outliers", "REGRESSION", True),
    ]
    assert verdicts[1]["test"] == "a.qsa.yaml::outliers"
    assert [(note["subject"], note["cached"]) for note in captures] == [("llama", False)]
    assert verdicts[1]["texts"]


def test_a_capture_of_an_earlier_run_is_said_to_be_cached(project):
    project.pytest("a.qsa.yaml", "--qsa-cache=cache")
    notes(project)
    project.pytest("a.qsa.yaml", "--qsa-cache=cache")
    assert [note["cached"] for note in notes(project)[1]] == [True]


def test_nothing_that_is_handed_over_holds_text_where_a_run_is_redacted(project):
    project.pytest("a.qsa.yaml", "--qsa-redact")
    verdicts, (capture,) = notes(project)
    assert set(verdicts[1]["texts"]) == {""}
    assert capture["tokens"] == 0


def test_workers_hand_over_their_own_verdicts_and_one_of_them_the_capture(project):
    project.pytest("a.qsa.yaml", "-n2", "--dist=load")
    verdicts, captures = notes(project)
    assert sorted(note["id"] for note in verdicts) == ["holds", "outliers"]
    assert all(note["worker"] for note in verdicts)
    assert len(captures) == 1


def test_a_comparison_that_a_passing_test_took_back_has_no_verdict(project):
    project.write("test_a.py", PYTHON)
    project.pytest("test_a.py", "--qsa-config=a.qsa.yaml")
    verdicts, _ = notes(project)
    assert [note["kind"] for note in verdicts] == ["PASSED", "PASSED"]


def test_every_attempt_hands_over_its_verdict(project):
    pytest.importorskip("pytest_rerunfailures")
    project.pytest("a.qsa.yaml::outliers", "--reruns=1", "-p", "rerunfailures")
    assert [note["kind"] for note in notes(project)[0]] == ["REGRESSION", "REGRESSION"]


@pytest.mark.parametrize(
    "strict", [(), ("-W", "error::pytest_qsa.common.errors.QsaWarning")], ids=["warnings", "errors"]
)
def test_a_hook_that_raises_is_a_warning_and_the_others_still_run(project, strict):
    project.write(
        "broken.py",
        """
        def pytest_qsa_verdict(item, verdict):
            raise ValueError(f"no database for {verdict.id}")

        def pytest_qsa_capture(subject):
            raise OSError("disk full")
        """,
    )
    run = project.pytest("a.qsa.yaml", "-p", "broken", *strict)
    assert sorted(run.outcomes.values()) == ["failed", "passed"], run.out
    said = [warning["text"] for warning in run.warnings if warning["kind"] == "QsaWarning"]
    assert said == [
        "pytest_qsa_capture: OSError: disk full",
        "pytest_qsa_verdict: ValueError: no database for holds",
        "pytest_qsa_verdict: ValueError: no database for outliers",
    ]
    assert [len(found) for found in notes(project)] == [2, 1]


def test_a_hook_of_another_folder_is_not_called(project):
    project.write("other/conftest.py", "def pytest_qsa_verdict(item):\n    raise AssertionError\n")
    project.write("other/b.qsa.yaml", "assertions: []\n")
    run = project.pytest("a.qsa.yaml", "other")
    assert not [warning for warning in run.warnings if "pytest_qsa_verdict" in warning["text"]]

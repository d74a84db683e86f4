"""`qsa history`: the numbers of a suite over git's tags and the reports of runs, and what can't be seen is said."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess

import numpy as np
import pytest

from pytest_qsa.cli import main
from pytest_qsa.metrics import Series, query_of
from pytest_qsa.report.report import write_report
from pytest_qsa.verdicts.baseline_file import BaselineFile

SUITE = {"model": {"name": "my-model", "path": "nowhere"}, "assertions": [
    {"id": "drift", "metric": "magnitude", "layers": "x", "site": "output", "baseline": {"rel": 0.1}},
    {"id": "close", "metric": "absmax", "layers": "x", "site": "output", "max": 9.0},
]}  # fmt: skip


def git(folder, *words, day=1):
    time = f"2026-01-{day:02}T00:00:00+00:00"
    own = {"GIT_AUTHOR_DATE": time, "GIT_COMMITTER_DATE": time, "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(folder)}
    options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *options, *words], check=True, capture_output=True, env=os.environ | own)


def baseline(folder, values, *, tokens="sha256:1", id="drift", model="my-model"):
    query = query_of("magnitude", "output", "x", None, {"stat": "median"}, "all", None)
    file = folder / f"qsa_baselines/{model}/gate/{id}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(BaselineFile.of(Series(list(values), np.array(list(values.values())), query), tokens).dump())


def report(folder, name, value, when, *, kind="PASSED", suite="gate.qsa.yaml", subject="my-model", id="close"):
    row = {"layer": "a", "value": value, "low": None, "high": 9.0, "depth": 0}
    query = {"metric": "absmax", "definition": "absmax/1", "site": "output"}
    result = {"id": id, "subject": subject, "kind": kind, "nodeid": f"sub/{suite}::{id}", "rows": [row], "query": query}
    folder = folder / name
    whole = {"headline": "", "failed": False, "run": {}, "bound": "", "waivers": [], **result}
    write_report([whole], folder, {"started": when, "command": f"pytest {name}"})


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a repository with three releases, and two reports of runs in between."""
    folder = tmp_path_factory.mktemp("history")
    git(folder, "init", "-q")
    (folder / "gate.qsa.yaml").write_text(json.dumps(SUITE))
    for day, values in ((1, {"a": 2.0, "b": 1.0}), (5, {"a": 2.0, "b": 2.5}), (9, {"a": 2.2, "b": 2.0})):
        baseline(folder, values)
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "release", day=day)
        git(folder, "tag", f"v{day}", day=day)
    baseline(folder, {"a": 3.3, "b": 2.0}, tokens="sha256:2")
    report(folder, "runs/one", 4.0, "2026-01-07T10:30:00+00:00")
    report(folder, "runs/two", 12.0, "2026-01-08T10:30:00+02:00", kind="REGRESSION")
    report(folder, "runs/other", 1.0, "2026-01-08T10:30:00+02:00", suite="another.qsa.yaml")
    return folder


@pytest.fixture
def qsa(project, capsys, monkeypatch):
    monkeypatch.chdir(project)

    def run(*words):
        code = main(["history", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def rows_of(out):
    return [
        (row["assertion"], row["label"], float(row["value"]), row["layer"]) for row in csv.DictReader(out.splitlines())
    ]


def test_the_baselines_of_each_tag_and_the_working_tree_are_in_order_of_time(qsa):
    code, out, _ = qsa("--format", "csv")
    assert code == 0
    assert rows_of(out) == [
        ("drift", "v1", 2.0, "a"),
        ("drift", "v5", 2.5, "b"),
        ("drift", "v9", 2.2, "a"),
        ("drift", "working tree", 3.3, "a"),
    ]


@pytest.mark.parametrize(
    ("keys", "folder"), [({"engine": "vllm"}, "my-model@vllm"), ({"kv_cache": "q8_0"}, "my-model@kv-q8_0")]
)
def test_an_engine_and_a_rounded_cache_have_the_history_of_their_own_baselines(tmp_path, capsys, keys, folder):
    model = {**SUITE["model"], **keys}
    (tmp_path / "gate.qsa.yaml").write_text(json.dumps({**SUITE, "model": model}))
    baseline(tmp_path, {"a": 1.0})
    baseline(tmp_path, {"a": 5.0, "b": 1.0}, model=folder)
    assert main(["history", str(tmp_path / "gate.qsa.yaml"), "--format", "csv"]) == 0
    assert rows_of(capsys.readouterr().out) == [("drift", "working tree", 5.0, "a")]


def test_a_layer_of_its_own_is_followed(qsa):
    _, out, _ = qsa("gate.qsa.yaml::drift", "--layer", "b", "--format", "csv")
    assert [value for _, _, value, _ in rows_of(out)] == [1.0, 2.5, 2.0, 2.0]


def test_the_table_says_how_each_differs_from_the_one_before_and_what_can_not_be_compared(qsa):
    _, out, _ = qsa("gate.qsa.yaml::drift")
    lines = [
        re.split(r" {2,}", line.strip()) for line in out.splitlines() if line.startswith("  20") or " now " in line
    ]
    assert lines == [
        ["2026-01-01", "v1", "2", "a"],
        ["2026-01-05", "v5", "2.5", "b", "+150.00 %", "b"],
        ["2026-01-09", "v9", "2.2", "a", "−20.00 %", "b"],
        ["now", "working tree", "3.3", "a", "other tokens"],
    ]
    assert "drift on my-model  ▁▄▂█" in out


def test_reports_are_points_between_the_releases_and_those_of_other_suites_are_left_out(qsa):
    _, out, _ = qsa("--reports", "runs/*/report.json", "--format", "csv")
    assert [row for row in rows_of(out) if row[0] == "close"] == [
        ("close", "report 10:30", 4.0, ""), ("close", "report 10:30", 12.0, ""),
    ]  # fmt: skip
    _, out, _ = qsa("gate.qsa.yaml::close", "--reports", "runs/*/report.json")
    assert "12 ◆" in out


def test_the_plot_has_steps_for_releases_breaks_where_nothing_can_be_compared_and_all_numbers_to_point_at(qsa, project):
    code, out, _ = qsa("gate.qsa.yaml::drift", "-o", "drift.svg")
    svg = (project / "drift.svg").read_text()
    assert (code, out) == (0, "written: drift.svg\n")
    (path,) = re.findall(r'<path d="([^"]+)" class="steps"', svg)
    assert [len(re.findall(letter, path)) for letter in "MHV"] == [2, 2, 2]
    assert "<title>2026-01-05 v5: 2.5, b, +150.00 % at b</title>" in svg
    qsa("--reports", "runs/*/report.json", "-o", "h.html")
    page = (project / "h.html").read_text()
    assert page.count("<svg") == 2
    assert "bound 9" in page


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("gate.qsa.yaml::drif",), 2, "gate.qsa.yaml has no assertion 'drif' (did you mean 'drift'?)"),
        (("absent.qsa.yaml",), 2, "absent.qsa.yaml"),
        (("gate.qsa.yaml::close",), 1, "no number to show: no baseline of it is in git's tags or beside it; --reports"),
        (("gate.qsa.yaml::drift", "--layer", "nope"), 1, "no number to show: no layer 'nope' is in its baselines"),
        (("--reports", "nothing/*.json"), 2, "--reports 'nothing/*.json': there is no such file"),
        (("--reports", "gate.qsa.yaml"), 2, "gate.qsa.yaml: no report.json of this program"),
        (("--format", "svg", "--reports", "runs/*/report.json"), 4, "a plot is of one assertion"),
    ],
)
def test_a_mistake_is_told_in_one_line(qsa, words, code, message):
    got, out, err = qsa(*words)
    assert (got, out) == (code, "")
    assert message in err


def test_a_shallow_clone_and_no_repository_are_told(qsa, project, tmp_path, monkeypatch):
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{project}", tmp_path / "shallow")
    monkeypatch.chdir(tmp_path / "shallow")
    _, out, _ = qsa()
    assert "note: the clone is shallow and has 1 tag: `git fetch --unshallow --tags` brings the earlier releases" in out
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/gate.qsa.yaml").write_text(json.dumps(SUITE))
    baseline(tmp_path / "plain", {"a": 1.0})
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(tmp_path / "plain")
    _, out, _ = qsa()
    assert "note: no releases are shown: releases are read from git's tags" in out
    assert "working tree" in out

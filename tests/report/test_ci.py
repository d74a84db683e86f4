"""Where CI shows a run: pytest-html, Allure, JUnit, GitHub and GitLab, each as its real plugin or format has it."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from pytest_qsa.report.verdict_text import (
    SUMMARY_BYTES,
    annotation_lines,
    append_summary,
    command,
    comment,
    shared_layers,
    step_summary,
    styled_lines,
)
from support.junit_format import violations
from support.paths import ROOT
from support.projects import Project, peaks, suite

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "</summary><img src=x>\\|`@team``\n::error::no%\u202e"


@pytest.fixture(scope="module")
def gate(tmp_path_factory, llama):
    """Return a project with three assertions on one model: one fails, one warns, one holds."""
    project = Project(tmp_path_factory.mktemp("ci") / "project")
    project.write("suites/gate.qsa.yaml", suite(
        llama, peaks("max: 1", id="fails"), peaks("max: 2, level: warn", id="warns"), peaks("max: 1000", id="holds"),
    ))  # fmt: skip
    return project


@pytest.fixture(scope="module")
def on_gitlab(gate):
    """Run it with everything that is active at once, as a job of GitLab; the results lie in `gitlab/`."""
    return gate.pytest(
        "suites", "--html=gitlab/out.html", "--alluredir=gitlab/allure", "--junit-xml=gitlab/out.xml",
        "-o", "junit_family=xunit1", "-o", "junit_logging=system-out",
        environment={"GITLAB_CI": "true", "CI_PROJECT_DIR": str(gate.folder)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_github(gate):
    """Run it in a worker of pytest-xdist, as a step of GitHub Actions; the results lie in `github/`."""
    return gate.pytest(
        "suites", "-n", "1", "--html=github/out.html", "--self-contained-html", "--alluredir=github/allure",
        "--junit-xml=github/out.xml", "--qsa-output=github/results", environment={
            "GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(gate.folder.parent),
            "GITHUB_STEP_SUMMARY": str(gate.folder / "github/summary.md"),
        },
    )  # fmt: skip


def result_of(kind="REGRESSION", **fields):
    """Return a result as `to_plain` gives it."""
    made = {
        "id": "a", "subject": "m", "kind": kind, "headline": "h", "reason": None, "where": "gate.qsa.yaml:7",
        "rows": [{"layer": "l", "value": 2.0, "used": 2.0}], "bound": "max 1", "evidence": [], "command": "pytest x",
        "accept": "", "failed": kind not in ("PASSED", "WARNED"),
    }  # fmt: skip
    return made | fields


@pytest.mark.process
def test_pytest_html_embeds_the_plots_of_what_failed(gate, on_github):
    page = gate.read("github/out.html")
    data = json.loads(html.unescape(re.search(r'data-jsonblob="([^"]*)"', page)[1]))
    extras = {test.rpartition("::")[2]: entries[0]["extras"] for test, entries in data["tests"].items()}

    assert [extra["name"] for extra in extras["fails"]][:1] == ["fails: value"]
    for extra in extras["fails"]:
        kind, _, content = extra["content"].partition(";base64,")
        assert kind == "data:image/png"
        assert base64.b64decode(content).startswith(PNG)
    assert extras["holds"] == []


@pytest.mark.process
def test_pytest_html_beside_its_assets_has_pictures_that_are_there(gate, on_gitlab):
    assets = [content for name, content in gate.files("gitlab/assets").items() if name.endswith(".png")]
    assert assets
    assert all(content.startswith(PNG) for content in assets)


@pytest.mark.process
@pytest.mark.parametrize("service", ["github", "gitlab"])
def test_allure_has_the_plots_as_attachments_of_the_test_that_failed(gate, on_github, on_gitlab, service):
    results = [gate.json(name) for name in gate.files(f"{service}/allure") if name.endswith("-result.json")]
    by_name = {result["name"]: result for result in results}

    assert {name: result["status"] for name, result in by_name.items()} == {
        "fails": "failed", "warns": "passed", "holds": "passed",
    }  # fmt: skip
    attachments = [each for each in by_name["fails"]["attachments"] if each["name"].startswith("fails: ")]
    assert attachments[0]["name"] == "fails: value"
    for attachment in attachments:
        assert attachment["type"] == "image/png"
        assert (gate.folder / service / "allure" / attachment["source"]).read_bytes().startswith(PNG)
    assert not by_name["holds"].get("attachments")


def junit(gate, service):
    (found,) = ElementTree.parse(gate.folder / service / "out.xml").getroot()
    return {case.get("name"): case for case in found.iter("testcase")}


@pytest.mark.process
@pytest.mark.parametrize("service", ["github", "gitlab"])
def test_the_junit_file_fits_its_format(gate, on_github, on_gitlab, service):
    root = ElementTree.parse(gate.folder / service / "out.xml").getroot()
    xunit1 = service == "gitlab"
    assert violations(root, xunit1=xunit1) == []
    (found,) = root
    cases = list(found.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None]
    assert (int(found.get("tests")), int(found.get("failures")), int(found.get("errors"))) == (3, len(failed), 0)
    assert {case.find("properties") is not None for case in cases} == {True}
    cases[0].append(ElementTree.Element("attachment"))
    cases[1].find("properties")[0].attrib.pop("value")
    cases[2].set("time", "soon")
    assert violations(root, xunit1=xunit1) == [
        "testcase has a child attachment", "property lacks value", "testcase: time is 'soon'"
    ]  # fmt: skip


@pytest.mark.process
def test_junit_has_the_numbers_as_properties_in_the_formats_order(gate, on_github):
    cases = junit(gate, "github")
    case = cases["fails"]

    assert [child.tag for child in case] == ["properties", "failure"]  # the order that the schema asks for
    assert set(case.keys()) == {"classname", "name", "time"}
    (properties,) = case.findall("properties")
    assert all(set(entry.keys()) == {"name", "value"} and not len(entry) for entry in properties)
    told = {entry.get("name"): entry.get("value") for entry in properties}
    row = gate.json("github/results/report.json")["results"][0]["rows"][0]
    assert told["qsa_kind"] == "REGRESSION"
    assert told["qsa_worst_layer"] == row["layer"]
    assert float(told["qsa_value"]) == row["value"] == float(told["qsa_used"])  # of a bound of 1
    assert (told["qsa_bound"], told["qsa_where"].partition(":")[0]) == ("max 1", "suites/gate.qsa.yaml")
    assert case.find("failure").get("message").startswith("REGRESSION: ")
    assert {entry.get("value") for entry in cases["warns"].iter("property")} >= {"WARNED", "max 2"}


@pytest.mark.process
def test_gitlab_finds_the_file_and_the_plot_of_what_failed(gate, on_gitlab):
    cases = junit(gate, "gitlab")
    assert cases["fails"].get("file") == "suites/gate.qsa.yaml"
    assert cases["fails"].get("classname") == "suites.gate.qsa.yaml"
    (path,) = re.findall(r"\[\[ATTACHMENT\|(.+)\]\]", cases["fails"].find("system-out").text)
    assert (gate.folder / path).read_bytes().startswith(PNG)
    assert not Path(path).is_absolute()
    assert "ATTACHMENT" not in ElementTree.tostring(cases["holds"], encoding="unicode")


@pytest.mark.process
def test_github_gets_annotations_at_the_suites_lines_and_a_summary(gate, on_github):
    lines = gate.read("suites/gate.qsa.yaml").splitlines()
    at = {name: 1 + next(i for i, line in enumerate(lines) if f"id: {name}" in line) for name in ("fails", "warns")}
    folder = gate.folder.name

    marked = [line for line in on_github.out.splitlines() if line.startswith("::")]
    assert [line.partition("::")[2].partition("::")[0] for line in marked] == [
        f"error file={folder}/suites/gate.qsa.yaml,line={at['fails']},title=REGRESSION fails",
        f"warning file={folder}/suites/gate.qsa.yaml,line={at['warns']},title=WARNED warns",
    ]
    summary = gate.read("github/summary.md")
    assert summary.startswith("## ❌ qsa: 2 of 3 assertions hold")
    row = r"^\| ❌ REGRESSION \| `fails` \| `llama` \| `model.layers.\d` \| [\d.]+ \| `max 1` \| \d+% \|$"
    assert re.search(row, summary, re.MULTILINE)
    assert "again   pytest suites/gate.qsa.yaml::fails" in summary


@pytest.mark.process
def test_a_run_that_is_not_in_github_prints_no_annotation(on_gitlab):
    assert on_gitlab.code == 1
    assert not [line for line in on_gitlab.out.splitlines() if line.startswith("::")]


@pytest.mark.process
def test_a_summary_that_cannot_be_written_changes_no_verdict(gate):
    environment = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(gate.folder)}
    run = gate.pytest("suites/gate.qsa.yaml::holds", environment=environment)
    assert run.code == 0
    assert "the step summary was not written" in run.out


@pytest.mark.process
def test_a_wrong_suite_is_annotated_at_its_line(gate):
    gate.write("bad/bad.qsa.yaml", "assertions:\n  - {id: a, metrc: rms, layers: x, site: input, max: 1}\n")
    run = gate.pytest("bad", environment={"GITHUB_ACTIONS": "true"})
    assert run.code == 2
    (line,) = [line for line in run.out.splitlines() if line.startswith("::")]
    assert line.startswith("::error file=bad/bad.qsa.yaml,line=2,title=wrong suite::")


def test_an_annotation_is_escaped_as_github_asks():
    line = command("error", "a,b:c.yaml", "7", "100%: x", "first\nsecond % \r\x1b[0m\u202e")
    assert line == r"::error file=a%2Cb%3Ac.yaml,line=7,title=100%25%3A x::first%0Asecond %25 \r\x1b[0m\u202e"


def test_github_gets_no_more_annotations_than_it_shows():
    lines = list(annotation_lines([result_of() for _ in range(30)] + [result_of("WARNED") for _ in range(30)]))
    assert [line[:4] for line in lines] == ["::er"] * 10 + ["::wa"] * 10


def test_a_failure_that_only_names_anothers_reason_takes_no_place_in_a_list_that_is_cut():
    told = [result_of(id="told", told_by="x::first", subject=f"m{index}") for index in range(12)]
    results = [*told, result_of(id="reason", subject="other")]
    assert "title=REGRESSION reason on other::" in next(annotation_lines(results))
    assert comment(results).splitlines()[2] == "- `reason on other`: `h`"


def test_a_summary_is_cut_below_githubs_limit_whatever_another_tool_wrote_before(tmp_path):
    path = tmp_path / "summary.md"
    path.write_text("x" * 400_000)
    token = {"before": "b" * 500, "text": "é" * 500, "after": "", "ratio": 9.0, "sample": 0, "position": 0}
    append_summary(path, [result_of(id=f"a{i}", evidence=[token] * 5) for i in range(400)])

    assert 800_000 < path.stat().st_size <= SUMMARY_BYTES
    assert path.read_text(encoding="utf-8").rstrip().endswith("… cut; the report has all of it.")


def test_no_text_breaks_the_summary():
    token = {"before": HOSTILE, "text": HOSTILE, "after": HOSTILE, "ratio": 9.0, "sample": 0, "position": 0}
    hostile = dict.fromkeys(("id", "subject", "headline", "reason", "where", "bound", "command", "accept"), HOSTILE)
    text = step_summary([result_of(rows=[{"layer": HOSTILE, "value": 1.0, "used": None}], evidence=[token], **hostile)])

    assert "\u202e" not in text
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert page.count("</summary>") == 1
    assert "<img" not in page
    assert page.count("<td>") == 7
    outside = re.sub(r"<(pre|code)>.*?</\1>", "", page, flags=re.DOTALL)
    assert "@team" not in outside  # GitHub calls nobody who is named in code
    assert "img" not in outside


def test_a_comment_begins_with_the_verdict_and_what_failed():
    results = [result_of(id=f"a{index}", headline=f"layer {index}: × 2") for index in range(7)] + [result_of("PASSED")]
    lines = comment(results).splitlines()
    assert lines[0] == "## ❌ qsa: 1 of 8 assertions hold"
    assert lines[2] == "- `a0`: `layer 0: × 2`"
    assert lines[7] == "- … and 2 more"


def test_a_comment_of_a_wrong_suite_names_its_line_and_fits_into_what_github_takes():
    assert comment([], ["gates/a.qsa.yaml:2: unknown metric 'x'"]).splitlines() == [
        "## ❌ qsa: 1 suite wrong", "", "- `gates/a.qsa.yaml:2: unknown metric 'x'`",
    ]  # fmt: skip
    many = comment([result_of(id=f"a{index}", reason="é" * 500) for index in range(400)])
    assert len(many.encode()) <= 60_000


ACTION = (ROOT / "action.yml").read_text(encoding="utf-8")


@pytest.mark.process
def test_the_action_fits_githubs_schema_and_no_input_is_text_of_a_script(tmp_path):
    def check(content):
        (tmp_path / "action.yml").write_text(content, encoding="utf-8")
        words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-actions"]
        return subprocess.run([*words, str(tmp_path / "action.yml")], capture_output=True, text=True, check=False)

    assert check(ACTION).returncode == 0, check(ACTION).stdout
    assert check(ACTION.replace("using: composite", "usng: composite")).returncode == 1
    scripts = [step.get("run", "") for step in yaml.safe_load(ACTION)["runs"]["steps"]]
    assert [script for script in scripts if "${{" in script] == []
    options = set(re.findall(r"--qsa-[a-z]+(?:-[a-z]+)*", ACTION))
    assert options <= set(re.findall(r"--qsa-[a-z-]+", (ROOT / "docs" / "options.md").read_text("utf-8")))


@pytest.mark.process
def test_the_script_of_the_action_runs_the_gate_and_leaves_report_and_comment(gate, llama):
    """It runs in bash as GitHub runs it, with errexit; suites and arguments are words, `*` is no pattern of files."""
    gate.write("files.qsa.yaml", f"model: {{path: {llama}}}\nassertions: [{{id: files, metric: checkpoint_health}}]\n")
    script = next(step["run"] for step in yaml.safe_load(ACTION)["runs"]["steps"] if step["name"] == "Gate")
    tools = gate.folder / "tools"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)
    inputs = {"SUITES": "files.qsa.yaml", "KEEP": "true", "MODEL": "", "ARGS": "-q --qsa-set=data.source=* -rA"}
    words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **inputs}
    done = subprocess.run(words, cwd=gate.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (gate.folder / "qsa-comment.md").read_text("utf-8").startswith("## ✅ qsa: 1 of 1 assertions hold")
    assert (gate.folder / "qsa-results" / "report.json").is_file()
    assert (gate.folder / "qsa-results" / "junit.xml").is_file()


STAND_IN = """#!/bin/bash
printf '%s\\n' "$*" >> calls.txt
for word in "$@"; do case "$word" in --jq) echo "$KNOWN" ;; esac; done
"""
"""Writes down how it was called; asked for a comment of an earlier run, it says its number, or nothing."""


@pytest.mark.process
def test_the_scripts_of_the_action_install_what_is_asked_for_and_keep_one_comment(tmp_path):
    scripts = {step["name"]: step["run"] for step in yaml.safe_load(ACTION)["runs"]["steps"] if "run" in step}

    def calls(name, **environment):
        for program in ("python", "gh"):
            (tmp_path / program).write_text(STAND_IN)
            (tmp_path / program).chmod(0o755)
        (tmp_path / "calls.txt").unlink(missing_ok=True)
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", scripts[name]]
        settings = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "KNOWN": "", **environment}
        done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
        written = tmp_path / "calls.txt"
        return done.returncode, written.read_text().splitlines() if written.exists() else []

    installed = calls("Install pytest-qsa", GITHUB_ACTION_PATH="/the action", EXTRAS="gguf,all")
    assert installed == (0, ["-m pip install --quiet /the action[gguf,all]"])
    pull_request = {"REPOSITORY": "me/models", "NUMBER": "7", "NAME": "w8a8 report"}
    assert calls("Comment", **pull_request) == (0, [])  # the gate wrote none
    (tmp_path / "qsa-comment.md").write_text("## verdict\n")
    (tmp_path / "qsa-loosened.md").write_text("## loosened\n")
    code, (_, posted) = calls("Comment", **pull_request)
    field = "--field body=@qsa-comment-marked.md"
    assert (code, posted) == (0, f"api --silent --method POST repos/me/models/issues/7/comments {field}")
    marked = (tmp_path / "qsa-comment-marked.md").read_text()
    assert marked == "<!-- pytest-qsa: w8a8_report -->\n## loosened\n\n## verdict\n"
    code, (_, patched) = calls("Comment", **pull_request, KNOWN="11")
    assert (code, patched) == (0, f"api --silent --method PATCH repos/me/models/issues/comments/11 {field}")
    assert calls("Was the gate loosened?") == (1, [])


INJECTING = r"""
model: {{name: llama, path: {path}}}
data: {{num_samples: 2, seq_len: 32}}
assertions:
  - {{id: waived, metric: absmax, layers: 'layers\.\d$', site: output, reason: "a
      ::stop-commands::zz", max: 0,
      waive: {{layers: ., owner: "me\n::stop-commands::zz\n##[error]x", reason: "\e[2Jr\u202e", until: 2027-01-01}}}}
  - {{id: unused, metric: absmax, layers: 'layers\.\d$', site: output, max: 1e9, reason: "a\n::add-mask::REGRESSION",
      waive: {{layers: ., owner: "me\n::stop-commands::zz", reason: r, until: 2027-01-01}}}}
  - {{id: fails, metric: absmax, layers: 'layers\.\d$', site: output, reason: "a
      ::stop-commands::zz", max: 0}}
  - {{id: warns, metric: absmax, layers: 'layers\.\d$', site: output, level: warn,
      reason: "::x::\n##vso[task.x]", max: 0}}
"""


@pytest.mark.process
@pytest.mark.parametrize("options", [["-rA", "--junitxml=junit.xml", "-vv"], ["--collect-only", "-v"]])
def test_no_text_of_a_suite_is_a_command_in_the_log(own_project, llama, options):
    own_project.write("a.qsa.yaml", INJECTING.format(path=llama))
    run = own_project.pytest(*options, "--qsa-today=2026-12-01")
    assert "waived" in run.out
    junit = own_project.folder / "junit.xml"
    text = run.out + (junit.read_text("utf-8").replace("&#10;", "\n") if junit.exists() else "")
    assert not [line for line in text.splitlines() if line.lstrip().removeprefix("E").lstrip().startswith("::")]
    assert not re.search(r"##\w*\[|[\x1b\u202e]", re.sub(r"\x1b\[[0-9;]*m", "", text))


@pytest.mark.process
@pytest.mark.parametrize(("job", "schema"), [("runs-on", "github-workflows"), ("script", "gitlab-ci")])
def test_the_documented_pipelines_fit_their_services_schemas(tmp_path, job, schema):
    text = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    pipeline = next(block for block in blocks if f" {job}:" in block)  # test_documents.py runs what all of them say

    def check(content):
        path = tmp_path / "pipeline.yaml"
        path.write_text(content, encoding="utf-8")
        words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(path)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    assert check(pipeline).returncode == 0, check(pipeline).stdout
    assert check(re.sub(rf"(?m)^( +){job}:", r"\1unknown-key:", pipeline)).returncode == 1
    options = set(re.findall(r"--qsa-[a-z]+", text))
    assert options <= set(re.findall(r"--qsa-[a-z]+", (ROOT / "docs" / "options.md").read_text("utf-8")))


def failure_at(layer, **fields):
    row = {"layer": layer, "value": 2.0, "used": 2.0, "excess": 1.0, "waived": False}
    return result_of(**({"rows": [row], "query": {}} | fields))


def test_failures_of_one_subject_at_one_layer_are_named_together():
    results = [
        failure_at("l.17", id="files"), failure_at("l.17", id="drift"), failure_at("l.18", id="other"),
        failure_at("l.17", id="warned", kind="WARNED"), failure_at("l.17", id="elsewhere", subject="n"),
        failure_at("l.17", id="summed", query={"over": "sum"}),
    ]  # fmt: skip
    assert list(shared_layers(results)) == ["one layer, 2 failures: l.17 of m: files, drift"]


def test_a_failure_is_red_where_it_says_what_broke_and_dim_where_it_says_what_ran():
    lines = ["REGRESSION a: l: 2 (max 1)", "  rms()", "", "  l  2", "again    pytest x", "bound    f:1", "ran      m"]
    styles = [line.styles for line in styled_lines(lines)]
    assert styles == [("red", "bold"), ("light",), (), ("red",), ("bold",), ("light",), ("light",)]
    assert [line.text for line in styled_lines(lines)] == lines

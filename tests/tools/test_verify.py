"""`qsa verify`: what ships is what passed, or the reason why not is told. Exit 0 for nothing else."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest

from pytest_qsa.cli import main
from pytest_qsa.common import json_with_checksum
from support.checkpoints import save_llama
from support.projects import Project, peaks, suite

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """Run a gate that passes: a suite with a base, a baseline and a gate of a later tier; return its project."""
    project = Project(tmp_path_factory.mktemp("passed") / "project")
    save_llama(project.folder / "llama")
    (project.folder / "llama/.cache").mkdir()
    (project.folder / "llama/.cache/times.json").write_text("1")
    project.write("_base.yaml", f"assertions:\n  - {{{peaks('max: 100', 'bounded')}}}\n")
    text = suite("llama", peaks("baseline: {rel: 0.5}", "kept"), peaks("max: 100, tier: nightly", "later"))
    project.write("a.qsa.yaml", f"extends: _base.yaml\n{text}")
    project.write("b.qsa.yaml", suite("llama", "id: files, metric: checkpoint_health"))
    assert project.pytest("--snapshot-update", "--qsa-report=never").code == 0
    project.run = project.pytest("--qsa-report=always", "--qsa-tier=pr")
    assert project.run.code == 0, project.run.out
    shutil.copy(project.folder / "qsa-results/report.json", project.folder / "passed.json")
    return project


@pytest.fixture
def verify(passed, capsys, monkeypatch, tmp_path):
    """Return a function that runs `qsa verify` on a copy of the checkpoint, with a report that may be changed."""
    monkeypatch.chdir(passed.folder)
    shipped = shutil.copytree(passed.folder / "llama", tmp_path / "shipped")

    def run(*words, report=None, files=None):
        name = tmp_path / "report.json"
        content = json.loads((passed.folder / "passed.json").read_text())
        if report is not None:
            del content["checksum"]
            report(content)
            name.write_bytes(json_with_checksum(content))
        else:
            shutil.copy(passed.folder / "passed.json", name)
        if files is not None:
            files(shipped)
        code = main(["verify", str(name), str(shipped), *words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.replace(f"{tmp_path}/", ""), err.replace(f"{tmp_path}/", "").splitlines()

    return run


NOTED = """\
from pathlib import Path

from pytest_qsa.suite import fingerprint

hashed = fingerprint._stamp_and_digest


def noted(file):
    with Path(__file__).with_name("hashed.txt").open("a") as notes:
        notes.write(f"{file.name}\\n")
    return hashed(file)


fingerprint._stamp_and_digest = noted
"""
"""A conftest that notes each file whose content is hashed."""


def test_a_run_without_a_cache_hashes_the_weights_once_for_its_captures_and_its_report(tmp_path):
    project = Project(tmp_path / "project")
    save_llama(project.folder / "llama", width=256)  # above the size from which a hash is remembered
    project.write("conftest.py", NOTED)
    project.write(
        "a.qsa.yaml", suite("llama", r"id: finite, metric: nonfinite, layers: 'layers\.\d$', site: output, max: 0")
    )
    run = project.pytest("--qsa-report=always", "--qsa-no-cache")
    assert run.code == 0, run.out
    assert (project.folder / "hashed.txt").read_text().split().count("model.safetensors") == 1


def test_what_passed_is_verified_wherever_it_lies(verify):
    code, out, err = verify("--suite=a.qsa.yaml", "--suite=b.qsa.yaml")
    assert (code, err) == (0, [])
    assert out.splitlines() == [
        "holds  5 files of shipped are those that were judged",
        "holds  3 tests of tier pr ran and passed",
        "holds  a.qsa.yaml and 1 baseline are those of the run",
        "holds  b.qsa.yaml and 0 baselines are those of the run",
        "holds  nothing was overridden",
    ]


def edit(name):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edit("model.safetensors"), "model.safetensors is another one"),
        (edit("config.json"), "config.json is another one"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is gone"),
        (lambda folder: (folder / "modeling.py").write_text("x"), "modeling.py was not judged"),
    ],
)
def test_other_files_are_told_by_name(verify, change, told):
    code, _, err = verify(files=change)
    assert (code, err) == (1, [f"FAILED shipped: {told}"])


def test_hidden_files_of_a_download_are_no_part_of_a_checkpoint(verify):
    assert verify(files=lambda folder: shutil.rmtree(folder / ".cache"))[0] == 0


def of_tests(change):
    return lambda report: [change(test) for test in report["session"]["manifest"]["tests"][:1]]


def override(**keys):
    return lambda report: report["session"]["manifest"]["overrides"].update(keys)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (of_tests(lambda test: test.update(outcome="failed")), "a.qsa.yaml::bounded: failed"),
        (of_tests(lambda test: test.update(outcome="skipped")), "a.qsa.yaml::bounded: skipped"),
        (of_tests(lambda test: test.update(outcome="not run")), "a.qsa.yaml::bounded: not run"),
        (lambda report: report["results"][0].update(failed=True), "a.qsa.yaml::bounded: a verdict failed"),
        (lambda report: report["results"].pop(0), "a.qsa.yaml::bounded: passed without a verdict"),
        (lambda report: report["session"]["manifest"].update(tests=[]), "no test of the run judged this checkpoint"),
        (override(set=["data.seed=1"]), "--qsa-set data.seed=1: a key of the suites was overridden"),
        (override(today="2020-01-01"), "--qsa-today 2020-01-01: waivers were judged as on another day"),
        (override(updated=True), "--snapshot-update: the run wrote the baselines that it was held against"),
        (override(selected=["a.qsa.yaml::kept"]), "a.qsa.yaml::kept: not all tests were run"),
        (override(deselected={"a.qsa.yaml::x": "deselected"}), "a.qsa.yaml::x: deselected"),
        (override(waivers=["in force, me: why"]), "a waiver was used: in force, me: why"),
        (lambda report: report["session"]["manifest"].update(errors=["c.yaml:1: x"]), "not collected: c.yaml:1: x"),
        (
            lambda report: report["results"][0]["run"]["model"].update(weights="sha256:0"),
            "the numbers are of other weights: the files changed while the gate ran",
        ),
        (
            lambda report: report["session"]["manifest"].update(checkpoints=[]),
            "the run judged no checkpoint with files of its own",
        ),
    ],
)  # fmt: skip
def test_a_run_that_did_not_check_everything_is_refused(verify, change, told):
    code, _, err = verify(report=change)
    assert (code, err) == (1, [f"FAILED {told}"])


def test_a_waiver_may_be_allowed_and_a_later_tier_demanded(verify):
    assert verify("--allow-waivers", report=override(waivers=["in force, me: why"]))[0] == 0
    assert verify("--tier=pr")[0] == 0
    assert verify("--tier=release")[2] == ["FAILED the run was of tier pr, and release is demanded"]


def test_the_base_of_an_adapter_is_part_of_what_passed(verify, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    files = {"config.json": hashlib.sha256(b"{}").hexdigest()}

    def with_base(report):
        [judged] = report["session"]["manifest"]["checkpoints"]
        judged["parts"].append({"folder": str(base), "files": files})

    assert verify(report=with_base)[1].splitlines()[0] == "holds  6 files of shipped are those that were judged"
    (base / "config.json").write_text("{ }")
    assert verify(report=with_base)[2] == ["FAILED the base base: config.json is another one"]
    assert verify(f"--base={tmp_path / 'nowhere'}", report=with_base)[2] == [
        "FAILED the base nowhere: config.json is gone"
    ]


def test_a_suite_or_a_baseline_that_was_changed_since_is_refused(verify, passed):
    base, kept = passed.folder / "_base.yaml", passed.folder / "qsa_baselines/llama/a/kept.json"
    for file, changed, told in (
        (base, base.read_text().replace("100", "101"), "is no suite of the run, or is another one"),
        (
            kept,
            kept.read_text().replace('"values": {', '"values": {"x": 1,'),
            "the baseline qsa_baselines/llama/a/kept",
        ),
    ):
        before = file.read_text()
        file.write_text(changed)
        code, _, err = verify("--suite=a.qsa.yaml")
        file.write_text(before)
        assert code == 1
        assert told in err[0]
    base.write_text(f"# said otherwise\n\n{base.read_text()}")
    assert verify("--suite=a.qsa.yaml")[0] == 0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda text: text.replace("PASSED", "passed", 1), "its checksum differs: it was damaged, or changed after"),
        (lambda text: "{}", "no report.json of this program"),
        (lambda text: '{"schema": "qsa-report/1"}', "an earlier version wrote it, without the files that it is of"),
        (lambda text: json_with_checksum({"schema": "qsa-report/1", "session": {"manifest": {}}}).decode(), "damaged"),
    ],
)
def test_a_report_that_is_none_is_one_line(passed, capsys, tmp_path, content, told):
    (tmp_path / "report.json").write_text(content((passed.folder / "passed.json").read_text()))
    assert main(["verify", str(tmp_path / "report.json"), str(passed.folder / "llama")]) in (1, 2)
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_the_statement_names_every_file_and_test_for_a_signer(verify, tmp_path):
    assert verify(f"--statement={tmp_path / 'statement.json'}", "--suite=a.qsa.yaml")[0] == 0
    statement = json.loads((tmp_path / "statement.json").read_text())
    shipped = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "shipped").glob("[!.]*")
    }
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert {each["name"]: each["digest"]["sha256"] for each in statement["subject"]} == shipped
    predicate = statement["predicate"]
    assert predicate["result"] == "PASSED"
    assert predicate["passedTests"] == ["a.qsa.yaml::bounded", "a.qsa.yaml::kept", "b.qsa.yaml::files"]
    assert [each["name"] for each in predicate["configuration"]] == ["a.qsa.yaml", "b.qsa.yaml", "report.json"]


def test_no_statement_is_written_of_what_does_not_hold(verify, tmp_path):
    assert verify(f"--statement={tmp_path / 'statement.json'}", report=override(updated=True))[0] == 1
    assert not (tmp_path / "statement.json").exists()


def test_it_loads_no_torch(passed):
    program = "import sys; from pytest_qsa.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    words = [sys.executable, "-c", program, "verify", "passed.json", "llama", "--suite=a.qsa.yaml"]
    done = subprocess.run(words, cwd=passed.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing was overridden" in done.stdout


def test_a_report_says_what_was_left_out_and_overridden_whichever_process_ran_it(passed):
    arguments = (
        "--qsa-report=always",
        "-k",
        "not files",
        "--qsa-set=data.seed=3",
        "--qsa-tier=pr",
        "--qsa-output=left",
    )
    found = []
    for more in ((), ("-n2",)):
        passed.pytest(*arguments, *more)
        manifest = passed.json("left/report.json")["session"]["manifest"]
        found.append({key: manifest[key] for key in ("tests", "suites", "checkpoints", "overrides")})
        found[-1]["tests"].sort(key=lambda test: test["nodeid"])
    assert found[0] == found[1]
    assert found[0]["overrides"]["deselected"] == {"b.qsa.yaml::files": "deselected"}
    assert found[0]["overrides"]["set"] == ["data.seed=3"]
    assert [test["nodeid"] for test in found[0]["tests"]] == ["a.qsa.yaml::bounded", "a.qsa.yaml::kept"]


def test_one_test_by_name_leaves_the_others_of_its_suite_out(passed):
    passed.pytest("--qsa-report=always", "--qsa-output=one", "a.qsa.yaml::bounded")
    overrides = passed.json("one/report.json")["session"]["manifest"]["overrides"]
    assert overrides["selected"] == ["a.qsa.yaml::bounded"]
    assert list(overrides["deselected"]) == ["a.qsa.yaml::kept", "a.qsa.yaml::later"]

"""`qsa check --against REF`: a pull request can't take anything from the gate without a word."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pytest_qsa.cli import main
from pytest_qsa.suite import load_suite
from pytest_qsa.tools.loosening import loosened, moved
from pytest_qsa.tools.revision import Revision
from support.paths import ROOT

BASE = {
    "id": "a",
    "metric": "outlier_tokens",
    "layers": r"q_proj|v_proj|mlp\.(up|down)",
    "exclude": "lm_head",
    "site": "output",
    "threshold": 64.0,
    "max": 4.0,
}
DRIFT = {"id": "a", "metric": "rms", "layers": "x", "site": "output", "baseline": {"rel": 0.1, "abs": 0.01}}
WAIVER = {"layers": "x", "owner": "me", "reason": "why", "until": "2027-03-01"}
EVAL = {"id": "a", "metric": "external", "file": "r.json", "reference": "o.json", "score": "acc,none"} | {
    "compare": "drop", "max": 0.1, "sigmas": 1.0,
}  # fmt: skip


def changes(tmp_path, before, after, **sections):
    """Return what is told of an assertion (or sections) that became another one."""
    files = []
    for name, assertion, more in (("old", before, {}), ("new", after, sections)):
        content = {"model": {"path": "m", "previous": "p"}, **more, "assertions": [assertion]}
        (tmp_path / f"{name}.qsa.yaml").write_text(json.dumps(content))
        files.append(load_suite(tmp_path / f"{name}.qsa.yaml"))
    return [each.what for each in loosened(*files, "main") if each.counts]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max": 5.0}, "max 4 → 5"),
        ({"max": None, "min": 0.0}, "max 4 → no bound"),
        ({"max": None, "equals": 5.0}, "max 4 → no bound"),
        ({"max": {"q_proj": 3.0, "default": 5.0}}, "max 4 → {q_proj: 3, default: 5}"),
        ({"max": {"of": "previous", "times": 1.1}}, "max 4 → 1.1 × previous"),
        ({"tier": "nightly"}, "tier pr → nightly"),
        ({"level": "warn"}, "level fail → warn"),
        ({"threshold": 65.0}, "threshold 64 → 65"),
        ({"layers": r"q_proj|mlp\.(up|down)"}, r"layers 'q_proj|v_proj|mlp\.(up|down)' → 'q_proj|mlp\.(up|down)'"),
        ({"layers": r"q_proj|v_proj|mlp\.up"}, r"layers 'q_proj|v_proj|mlp\.(up|down)' → 'q_proj|v_proj|mlp\.up'"),
        ({"exclude": "lm_head|q_proj"}, "exclude 'lm_head' → 'lm_head|q_proj'"),
        ({"waive": WAIVER}, "waived for 'x' until 2027-03-01 by me: why"),
        ({"site": "input"}, "site 'output' → 'input'"),
        ({"reduce": "mean"}, "reduce none → 'mean'"),
        ({"over": "mean"}, "over none → 'mean'"),
        ({"positions": "sink"}, "positions none → 'sink'"),
        ({"metric": "rms", "threshold": None}, "metric outlier_tokens → rms"),
        ({"models": "int8"}, "models none → 'int8'"),
    ],
)
def test_an_assertion_that_allows_more_is_told(tmp_path, change, told):
    after = {key: value for key, value in (BASE | change).items() if value is not None}
    assert changes(tmp_path, BASE, after) == [told]


@pytest.mark.parametrize(
    "change",
    [
        {"max": 3.0}, {"max": {"q_proj": 3.0, "default": 4.0}}, {"max": None, "equals": 4.0}, {"min": 1.0},
        {"threshold": 32.0}, {"layers": r"o_proj|v_proj|q_proj|mlp\.(up|down)"}, {"layers": "."}, {"exclude": None},
        {"reason": "because"}, {"baseline": {"rel": 0.1}},
    ],
    ids=str,
)  # fmt: skip
def test_an_assertion_that_allows_no_more_is_not_told(tmp_path, change):
    after = {key: value for key, value in (BASE | change).items() if value is not None}
    assert changes(tmp_path, BASE, after) == []


GROUPS = {"q_proj": 1.0, "default": 2.0}
RELATIVE = {"of": "previous", "times": 1.1, "at_most": 4.0}


@pytest.mark.parametrize(
    ("before", "after", "looser"),
    [
        (GROUPS, 1.0, False), (GROUPS, 2.0, True), (GROUPS, {"default": 2.0, "q_proj": 1.0}, True),
        (GROUPS, {"q_proj": 1.0, "default": 2.5}, True), (GROUPS, {"v_proj": 0.5, **GROUPS}, False),
        (GROUPS, {"v_proj": 1.5, **GROUPS}, True), (GROUPS, {"default": 2.0}, True),
        (1.0, {"q_proj": 1.0, "default": None}, True), ({"q_proj": 1.0, "default": None}, 1.0, False),
        ({"q_proj": 1.0, "default": None}, {"q_proj": 2.0, "default": None}, True),
        (GROUPS, {"q_proj": 1.0, "default": None}, True),
        (RELATIVE, {**RELATIVE, "times": 1.05}, False), (RELATIVE, {**RELATIVE, "times": 1.2}, True),
        (RELATIVE, {"of": "previous", "times": 1.1}, True), (RELATIVE, {**RELATIVE, "plus": 0.1}, True),
        (RELATIVE, {**RELATIVE, "at_least": 1.0}, True), (RELATIVE, 1.0, True), (1.0, RELATIVE, True),
    ],
    ids=str,
)  # fmt: skip
def test_bounds_by_group_and_those_that_follow_the_last_release_are_compared(tmp_path, before, after, looser):
    assert bool(changes(tmp_path, BASE | {"max": before}, BASE | {"max": after})) == looser


def test_an_assertion_that_is_for_more_models_is_not_told(tmp_path):
    for before, after in (("int8", "int8|int4"), ("int8", None)):
        assert changes(tmp_path, BASE | {"models": before}, BASE | {"models": after}) == []
    fewer = changes(tmp_path, BASE | {"models": "int8|int4"}, BASE | {"models": "int8"})
    assert fewer == ["models 'int8|int4' → 'int8'"]


@pytest.mark.parametrize(("before", "after", "looser"), [(1.0, 0.5, True), (1.0, 2.0, False)])
def test_a_lower_bound_is_looser_below(tmp_path, before, after, looser):
    one, other = ({**BASE, "max": None, "min": bound} for bound in (before, after))
    one, other = ({key: value for key, value in each.items() if value is not None} for each in (one, other))
    assert bool(changes(tmp_path, one, other)) == looser


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (DRIFT, {**DRIFT, "baseline": {"rel": 0.2, "abs": 0.01}}, ["baseline rel 0.1 → 0.2"]),
        (DRIFT, {**DRIFT, "baseline": {"rel": 0.1, "abs": 1.0}}, ["baseline abs 0.01 → 1"]),
        (DRIFT, {**DRIFT, "baseline": {"rel": 0.01}}, []),
        (DRIFT, {**DRIFT, "max": 9.0, "baseline": None}, ["is held against its baseline no more"]),
        (EVAL, {**EVAL, "sigmas": 2.0}, ["sigmas 1 → 2"]),
        (EVAL, {**EVAL, "sigmas": 0.0}, []),
        (EVAL, {**EVAL, "reference": "worse.json"}, ["reference 'o.json' → 'worse.json'"]),
    ],
    ids=str,
)
def test_tolerances_and_evals_are_compared(tmp_path, before, after, told):
    assert changes(tmp_path, before, {key: value for key, value in after.items() if value is not None}) == told


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"data": {"num_samples": 4}}, ["16 → 4"]),
        ({"data": {"num_samples": 32, "seq_len": 1024, "batch_size": 4}}, []),
        ({"data": {"seed": 3}}, ["0 → 3"]),
        ({"model": {"path": "other", "previous": "p"}}, []),
        ({"model": {"path": "m", "previous": "p", "reference": "r"}}, ["none → 'r'"]),
        ({"model": {"path": "m", "previous": "p", "allow_idle": "."}}, ["none → '.'"]),
        ({"model": {"path": "m", "previous": "q"}}, ["'p' → 'q'"]),
        ({"defaults": {"level": "warn"}}, ["level fail → warn"]),
    ],
    ids=str,
)
def test_data_and_what_is_compared_with_are_part_of_the_gate(tmp_path, sections, told):
    assert changes(tmp_path, BASE, BASE, **sections) == told


def test_a_waiver_may_be_shortened_and_not_lengthened(tmp_path):
    waived, longer = BASE | {"waive": WAIVER}, BASE | {"waive": WAIVER | {"until": "2027-04-01"}}
    assert changes(tmp_path, longer, waived) == []
    assert len(changes(tmp_path, waived, longer)) == 1


BASELINE = {"data": "d", "format": "qsa-baseline/1", "made_with": {}, "query": {"definition": "rms/1"}} | {
    "values": {"layers.0": 1.0, "layers.1": 2.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"values": {"layers.0": 1.0, "layers.1": 3.0}}, "drift.json:10: drift: layers.1 2 → 3 (+50.0%)"),
        ({"values": {"layers.0": 1.0}}, "drift.json:8: drift: layers.1 is in it no more"),
        ({"data": "e"}, "drift.json:2: drift: is of other tokens"),
        ({"query": {"definition": "rms/2"}}, "drift.json:5: drift: definition 'rms/1' → 'rms/2'"),
    ],
)
def test_a_baseline_that_moved_is_told_at_its_line(tmp_path, monkeypatch, change, told):
    monkeypatch.chdir(tmp_path)
    old, new = (json.dumps(content, indent=1) for content in (BASELINE, BASELINE | change))
    assert [*map(str, moved(tmp_path / "drift.json", old, new, "main"))] == [told]


def test_a_baseline_in_another_layout_has_not_moved(tmp_path):
    changed = json.dumps(BASELINE | {"made_with": {"torch": "3"}}, sort_keys=True).replace("2.0", "2e0")
    assert list(moved(tmp_path / "drift.json", json.dumps(BASELINE, indent=2), changed, "main")) == []


SUITE = """\
extends: base.yaml
model: {name: int8, path: checkpoints/int8}
assertions:
  - {id: own, metric: absmax, layers: x, site: output, max: 1}
"""
FILES = {
    "texts.jsonl": '{"text": "one"}\n',
    "gates/original.json": "{}",
    "gates/data.qsa.yaml": """\
model: {name: int8, path: checkpoints/int8}
data: {source: 'custom:../texts.jsonl'}
assertions:
  - {id: scores, metric: external, file: results.json, reference: original.json, pointer: /a, compare: drop, max: 0.1}
""",
    "base.yaml": "assertions:\n  - {id: shared, metric: rms, layers: x, site: output, baseline: {rel: 0.1}}\n",
    "gates/a.qsa.yaml": SUITE.replace("base.yaml", "../base.yaml"),
    "gates/b.qsa.yaml": SUITE.replace("base.yaml", "../base.yaml"),
    "gates/qsa_baselines/int8/a/shared.json": json.dumps(BASELINE, indent=2),
}


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """Return a repository with two suites of one base, and a baseline."""
    folder = tmp_path_factory.mktemp("repository")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)
    return folder


@pytest.fixture
def check(committed, capsys, monkeypatch):
    """Return a function that changes files, runs `qsa check` in the repository, and puts the files back."""
    monkeypatch.chdir(committed)

    def run(changed, *words):
        for name, text in changed.items():
            (committed / name).unlink() if text is None else (committed / name).write_text(text)
        code = main(["check", *words])
        for name in changed:
            (committed / name).unlink(missing_ok=True)
            if name in FILES:
                (committed / name).write_text(FILES[name])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def test_a_gate_that_is_as_it_was_passes(check):
    code, lines, _ = check({}, "--against", "main")
    assert code == 0
    assert lines[-1].startswith("as strict as at main (")


def test_a_loosened_base_is_told_once_at_its_line_and_may_be_allowed(check, committed):
    base = {"base.yaml": FILES["base.yaml"].replace("0.1", "0.5")}
    code, lines, _ = check(base, "--against=HEAD", "--markdown=comment.md", "gates")
    assert code == 1
    assert [line for line in lines if "→" in line] == ["base.yaml:2: shared: baseline rel 0.1 → 0.5"]
    comment = (committed / "comment.md").read_text()
    assert "| `base.yaml:2` | `shared` | `baseline rel 0.1 → 0.5` |" in comment
    (committed / "comment.md").unlink()
    assert check(base, "--against=HEAD", "--allow-loosening", "gates")[0] == 0


def test_what_is_gone_is_told_at_its_old_line(check):
    gone = {"gates/b.qsa.yaml": None, "gates/a.qsa.yaml": FILES["gates/a.qsa.yaml"].replace("own", "other")}
    code, lines, _ = check(gone, "--against", "main", "gates")
    told = {line.partition(" at ")[0]: line.partition("): ")[2] for line in lines if "is removed" in line}
    assert code == 1
    assert told == {
        "gates/a.qsa.yaml:4": "own: is removed",
        "base.yaml:2": "shared: is removed with gates/b.qsa.yaml",
        "gates/b.qsa.yaml:4": "own: is removed with gates/b.qsa.yaml",
    }
    code, lines, _ = check({"gates/a.qsa.yaml": None, "gates/b.qsa.yaml": None}, "--against", "main", "gates")
    assert code == 1
    assert sum("is removed with gates/" in line for line in lines) == 4


def test_moved_removed_and_own_baselines_are_told(check):
    name = "gates/qsa_baselines/int8/a/shared.json"
    code, lines, _ = check({name: FILES[name].replace("2.0", "2.5")}, "--against=main", "gates/a.qsa.yaml")
    assert code == 1
    assert f"{name}:10: shared: layers.1 2 → 2.5 (+25.0%)" in lines
    assert check({name: FILES[name].replace("2.0", "2.5")}, "--against=main", "gates/b.qsa.yaml")[0] == 0
    assert any("the baseline is removed" in line for line in check({name: None}, "--against=main")[1])
    own = {"gates/qsa_baselines/int8/a/shared@cpu.json": FILES[name]}
    assert any("is new, and stands in for shared.json" in line for line in check(own, "--against=main")[1])


def test_a_test_in_python_is_compared_by_its_baselines(check, committed):
    name = "gates/qsa_baselines/int8/test_a/shared.json"
    (committed / name).parent.mkdir()
    assert "there is no suite" in check({}, "--against=main", "gates/qsa_baselines/int8/test_a")[2]
    (committed / "gates/test_a.py").write_text("")
    assert check({name: FILES["gates/qsa_baselines/int8/a/shared.json"]}, "--against=main", "gates/test_a.py")[0] == 0
    (committed / "gates/test_a.py").unlink()
    (committed / name).parent.rmdir()


def test_other_content_of_data_and_of_an_evals_reference_is_told(check):
    changed = {"texts.jsonl": '{"text": "simple"}\n', "gates/original.json": '{"a": 0.1}'}
    code, lines, _ = check(changed, "--against=main")
    assert code == 1
    assert [line for line in lines if "content" in line] == [
        "gates/data.qsa.yaml:2: data.source: texts.jsonl has other content",
        "gates/data.qsa.yaml:4: scores: gates/original.json has other content",
    ]


def test_what_git_lfs_keeps_elsewhere_is_compared_by_its_pointer(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    content = b"large" * 1000
    digest = hashlib.sha256(content).hexdigest()
    file = tmp_path / "a.parquet"
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    revision = Revision.of("HEAD", tmp_path)
    file.write_bytes(content)
    assert revision.changed(file) == []
    file.write_bytes(content + b"x")
    assert revision.changed(file) == [file]


def test_a_new_suite_and_a_new_assertion_loosen_nothing(check):
    more = {
        "gates/a.qsa.yaml": FILES["gates/a.qsa.yaml"] + "  - {id: more, metric: rms, layers: x, site: output, max: 1}\n"
    }
    assert check({**more, "gates/c.qsa.yaml": SUITE.replace("base", "../base")}, "--against=main")[0] == 0


def test_a_wrong_suite_is_told_as_wrong_beside_what_was_loosened(check):
    base = {"base.yaml": FILES["base.yaml"].replace("0.1", "0.5"), "gates/b.qsa.yaml": "modle: 1\n"}
    code, lines, err = check(base, "--against=main")
    assert code == 2
    assert err.startswith("gates/b.qsa.yaml:1: unknown key 'modle'")
    assert "base.yaml:2: shared: baseline rel 0.1 → 0.5" in lines


@pytest.mark.parametrize("name", ["nowhere", "--output=x", "main:base.yaml", ""])
def test_a_commit_that_is_none_is_one_line(check, name):
    code, _, err = check({}, f"--against={name}")
    assert code == 1
    assert err.count("\n") == 1
    assert "there is no such commit here" in err


def test_options_of_a_comparison_need_one(check):
    assert check({}, "--allow-loosening")[0] == 4


def test_the_hooks_for_pre_commit_are_commands_of_this_version(check):
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert [hook["id"] for hook in hooks] == ["qsa-check", "qsa-check-against"]
    for hook in hooks:
        assert re.search(hook["files"], "gates/a.qsa.yaml")
        program, command, *words = shlex.split(hook["entry"])
        assert (program, command) == ("qsa", "check")
        assert check({}, *words, *hook.get("args", ()))[0] == 0


def test_the_script_of_the_action_tells_what_a_pull_request_loosens(committed, tmp_path):
    """It runs in bash as GitHub runs it, in a clone that has its own commit alone."""
    steps = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
    script = next(step["run"] for step in steps if step["name"] == "Loosening")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{committed}", clone], check=True)
    (clone / "base.yaml").write_text(FILES["base.yaml"].replace("0.1", "0.5"))
    found = {}
    for loosening in ("refuse", "list"):
        summary = tmp_path / f"{loosening}.md"
        environment = {"SUITES": "gates/a.qsa.yaml::own gates", "BASE": "main", "LOOSENING": loosening} | {
            "GITHUB_STEP_SUMMARY": str(summary), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        done = subprocess.run(
            words, cwd=clone, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        found[loosening] = done.returncode
        assert "`baseline rel 0.1 → 0.5`" in summary.read_text(), done.stdout + done.stderr
    assert found == {"refuse": 1, "list": 0}

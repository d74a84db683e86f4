"""Baselines: made, met, moved, removed; and what beside them is never touched."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest

from pytest_qsa.captures import ModelProvenance, since_text
from pytest_qsa.common import BaselineError, SuiteError
from pytest_qsa.metrics import Query, Series
from pytest_qsa.suite import load_suite
from pytest_qsa.verdicts import BaselineFile, Tolerance
from pytest_qsa.verdicts.baselines import within_baseline
from support.projects import Project, peaks, suite

pytestmark = pytest.mark.process

DRIFT = r"id: drift, metric: magnitude, stat: median, layers: down_proj$, site: output, baseline: {rel: 0.05}"
HOME = "qsa_baselines/llama/a"


@pytest.fixture(scope="module")
def story(tmp_path_factory, llama, changed_llama):
    """Tell the life of a baseline in five runs; keep what each left."""
    project = Project(tmp_path_factory.mktemp("story") / "project")
    project.write("a.qsa.yaml", suite(llama, DRIFT))
    steps = {}

    def step(name, *arguments):
        steps[name] = project.pytest("--qsa-report=never", *arguments), project.files("qsa_baselines")

    step("missing")
    step("made", "--snapshot-update")
    path = project.folder / HOME / "drift.json"
    os.utime(path, (1, 1))
    step("met")
    step("met with update", "--snapshot-update")
    steps["mtime"] = path.stat().st_mtime
    step("moved", f"--qsa-model={changed_llama}")
    step("accepted", f"--qsa-model={changed_llama}", "--snapshot-update")
    step("new normal", f"--qsa-model={changed_llama}")
    return steps


def test_a_missing_baseline_fails_and_says_how_to_make_it(story):
    run, files = story["missing"]
    assert run.code == 1
    assert run.kind("::drift") == "ANOMALOUS"
    assert run.labelled("::drift")["accept"] == ["pytest a.qsa.yaml::drift --snapshot-update"]
    assert not files


def test_an_update_makes_it_and_the_next_run_passes(story):
    assert story["made"][0].code == 0
    assert list(story["made"][1]) == [f"{HOME}/drift.json"]
    assert story["met"][0].code == 0


def test_what_is_within_the_tolerance_is_not_rewritten(story):
    assert story["met with update"][0].code == 0
    assert story["met with update"][1] == story["made"][1]
    assert story["mtime"] == 1


def test_what_is_out_of_tolerance_is_a_regression_that_says_how_to_accept_it(story, changed_llama):
    run, files = story["moved"]
    assert run.code == 1
    assert run.first_line("::drift").startswith("REGRESSION drift: ")
    assert "model.layers.2.mlp.down_proj" in run.first_line("::drift")
    assert "model.layers.2.mlp.down_proj: × 3 (" in run.first_line("::drift")
    accept = run.labelled("::drift")["accept"][0]
    assert accept.startswith("pytest a.qsa.yaml::drift --qsa-model")
    assert str(changed_llama) in accept
    assert accept.endswith("--snapshot-update")
    assert files == story["made"][1]


def test_an_update_accepts_it(story):
    assert story["accepted"][0].code == 0
    assert story["accepted"][1] != story["made"][1]
    assert list(story["accepted"][1]) == [f"{HOME}/drift.json"]
    assert story["new normal"][0].code == 0


def test_a_baseline_reads_well_in_a_diff(story, llama):
    text = story["made"][1][f"{HOME}/drift.json"].decode()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    assert list(content) == ["data", "format", "made_with", "query", "values", "content"]
    assert list(content["values"]) == [f"model.layers.{n}.mlp.down_proj" for n in range(4)]
    assert all(len(str(value)) <= 7 for value in content["values"].values())
    assert content["data"].startswith("sha256:")
    assert content["query"]["definition"] == "magnitude/1"
    assert content["query"]["stat"] == "median"
    assert set(content["made_with"]) >= {"model", "weights", "dtype", "device", "torch", "transformers"}
    assert len(text.splitlines()) < 40


def test_a_baseline_names_no_folder_of_this_machine(story, llama):
    for _, files in (story["made"], story["accepted"]):
        assert b"/" not in files[f"{HOME}/drift.json"].replace(b"magnitude/1", b"").replace(b"qsa-baseline/1", b"")


def rewritten(project, name, change):
    """Apply a change to the JSON of a baseline, which then is as those of earlier versions: without a hash of it."""
    path = project.folder / name
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["content"]
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


DIRECTIONS = {
    f"{direction}-{moved}": (direction, factor)
    for direction in ("up", "down", "both")
    for moved, factor in (("rose", 0.5), ("fell", 2.0), ("stayed", 1.01))
}
INCOMPARABLE = {
    "tokens": (lambda content: content.update(data="sha256:" + "0" * 64), "the baseline was made on other tokens"),
    "definition": (
        lambda content: content["query"].update(definition="magnitude/0"),
        "made with another definition: 'magnitude/0', now 'magnitude/1'",
    ),
    "stat": (lambda content: content["query"].update(stat="top1"), "made with another stat: 'top1', now 'median'"),
    "vanished": (lambda content: content["values"].update({"model.layers.9": 1.0}), "1 vanished (model.layers.9)"),
    "appeared": (
        lambda content: content["values"].pop("model.layers.1.mlp.down_proj"),
        "1 appeared (model.layers.1.mlp.down_proj)",
    ),
}
DAMAGED = {
    "conflict": "<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> other\n",
    "empty": "",
    "list": "[]",
    "format": '{"format": "qsa-baseline/9"}',
    "words": '{"format": "qsa-baseline/1", "values": {"a": "x"}, "query": {}, "data": null, "made_with": {}}',
    "binary": "\udcff",
}


@pytest.fixture(scope="module")
def many(tmp_path_factory, llama):
    """Make one baseline for each case, change each in its way, and run them all."""
    project = Project(tmp_path_factory.mktemp("many") / "project")
    lines = [
        DRIFT.replace("id: drift", f"id: {name}").replace("rel: 0.05", f"rel: 0.05, direction: {direction}")
        for name, (direction, _) in DIRECTIONS.items()
    ]
    lines += [DRIFT.replace("id: drift", f"id: {name}") for name in [*INCOMPARABLE, *DAMAGED]]
    warned = DRIFT.replace("id: drift", "id: softened") + ", level: warn"
    absolute = DRIFT.replace("id: drift", "id: absolute").replace("rel: 0.05", "abs: 1000, rel: 0.0001")
    both = DRIFT.replace("id: drift", "id: bounded") + ", max: 0.001"
    exact = DRIFT.replace("id: drift", "id: exact").replace("{rel: 0.05}", "{}")
    project.write("a.qsa.yaml", suite(llama, *lines, warned, absolute, both, exact))
    made = project.pytest("--qsa-report=never", "--snapshot-update")
    assert list(made.outcomes.values()).count("failed") == 1, made.out

    def scaled(factor):
        return lambda content: content.update(values={k: v * factor for k, v in content["values"].items()})

    for name, (_, factor) in DIRECTIONS.items():
        rewritten(project, f"{HOME}/{name}.json", scaled(factor))
    for name, (change, _) in INCOMPARABLE.items():
        rewritten(project, f"{HOME}/{name}.json", change)
    for name, text in DAMAGED.items():
        (project.folder / HOME / f"{name}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    rewritten(project, f"{HOME}/softened.json", scaled(0.5))
    rewritten(project, f"{HOME}/absolute.json", scaled(0.5))
    project.run = project.pytest("--qsa-report=never", "-W", "default::pytest_qsa.common.errors.QsaWarning")
    project.update = project.pytest("--qsa-report=never", "--snapshot-update")
    project.after = project.pytest("--qsa-report=never")
    return project


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_forbids_one_side_only(many, name):
    direction, factor = DIRECTIONS[name]
    forbidden = (factor < 1 and direction != "down") or (factor > 1.5 and direction != "up")
    assert many.run.outcomes[f"a.qsa.yaml::{name}"] == ("failed" if forbidden else "passed")
    if forbidden:
        assert many.run.first_line(f"::{name}").endswith("; 4 of 4 layers are out of bounds")


@pytest.mark.parametrize("name", INCOMPARABLE)
def test_a_baseline_of_something_else_cannot_be_met(many, name):
    line = many.run.first_line(f"::{name}")
    assert line.startswith(f"ANOMALOUS {name}: ")
    assert INCOMPARABLE[name][1] in line


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_baseline_is_told_in_one_line(many, name):
    assert many.run.first_line(f"::{name}").startswith(f"ANOMALOUS {name}: the baseline can't be read")
    assert ".py:" not in many.run.text(f"::{name}")


def test_an_absolute_tolerance_adds_to_a_relative_one(many):
    assert many.run.outcomes["a.qsa.yaml::absolute"] == "passed"


def test_no_tolerance_means_the_digits_of_the_file(many):
    assert many.run.outcomes["a.qsa.yaml::exact"] == "passed"


def test_a_bound_beside_a_baseline_is_judged_too(many):
    assert many.run.kind("::bounded") == "REGRESSION"
    assert "(max 0.001)" in many.run.first_line("::bounded")


def test_a_warning_is_given_for_a_softened_baseline(many):
    assert many.run.outcomes["a.qsa.yaml::softened"] == "passed"
    assert ["softened" in warning["text"] for warning in many.run.warnings] == [True]


def test_an_update_mends_what_can_be_mended(many):
    assert many.update.outcomes == many.after.outcomes
    assert {test for test, outcome in many.after.outcomes.items() if outcome != "passed"} == {"a.qsa.yaml::bounded"}


@pytest.fixture(scope="module")
def classes(tmp_path_factory, llama, changed_llama):
    """Meet, on a CPU, baselines that another class of devices has made: one that fits and one that doesn't."""
    project = Project(tmp_path_factory.mktemp("classes") / "project")
    per = DRIFT.replace("rel: 0.05", "rel: 0.05, per: device_class")
    lines = [per.replace("id: drift", f"id: {name}") for name in ("same", "other", "mine")]
    project.write("a.qsa.yaml", suite(llama, *lines))
    project.pytest("--qsa-report=never", "--snapshot-update")
    project.made = project.json(f"{HOME}/mine.json")["made_with"]

    def elsewhere(factor):
        def change(content):
            content.update(values={layer: value * factor for layer, value in content["values"].items()})
            content["made_with"].update(device="NVIDIA H100", device_class="sm_90")

        return change

    rewritten(project, f"{HOME}/same.json", elsewhere(1.01))
    rewritten(project, f"{HOME}/other.json", elsewhere(2))
    before = project.files("qsa_baselines")
    project.met = project.pytest("--qsa-report=never")
    project.update = project.pytest("--qsa-report=never", "--snapshot-update")
    project.written = {n: text for n, text in project.files("qsa_baselines").items() if before.get(n) != text}
    project.lost = before.keys() - project.files("qsa_baselines").keys()
    project.after = project.pytest("--qsa-report=never")
    project.moved = project.pytest("--qsa-report=never", "--snapshot-update", f"--qsa-model={changed_llama}")
    project.rewritten = {n for n, text in project.files("qsa_baselines").items() if before.get(n) != text}
    return project


def test_a_baseline_says_which_class_of_devices_made_it(classes):
    assert classes.made["device_class"] == "cpu"


def test_a_class_whose_numbers_do_not_fit_is_told_and_gets_a_baseline_of_its_own(classes):
    assert classes.met.outcomes["a.qsa.yaml::other"] == "failed"
    assert "device_class was sm_90, is cpu" in classes.met.labelled("::other")["since"][0]
    assert classes.update.code == 0
    assert set(classes.written) == {f"{HOME}/other@cpu.json"}
    assert classes.after.code == 0


def test_a_class_whose_numbers_fit_shares_the_baseline(classes):
    assert classes.met.outcomes["a.qsa.yaml::same"] == "passed"


def test_the_baselines_of_other_classes_are_neither_removed_nor_unused(classes):
    assert not classes.lost
    assert "unused" not in classes.after.out


def test_a_change_of_the_model_rewrites_the_baseline_of_the_own_class(classes):
    assert classes.moved.code == 0
    assert classes.rewritten == {f"{HOME}/{name}.json" for name in ("other@cpu", "same@cpu", "mine")}


FOREIGN = {
    f"{HOME}/README.md": "why these numbers\n",
    f"{HOME}/other.json": '{"not": "ours"}\n',
    f"{HOME}/notes/kept.json": '{"format": "qsa-baseline/1"}\n',
    "qsa_baselines/llama/c/gone.json": '{"format": "qsa-baseline/1"}\n',
    "qsa_baselines/other-model/a/gone.json": '{"format": "qsa-baseline/1"}\n',
    "qsa_baselines/gone.json": '{"format": "qsa-baseline/1"}\n',
    "__snapshots__/test_gone.ambr": "# serializer version: 1\n# name: test_gone\n  1\n# ---\n",
}


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory, llama):
    """Return a project whose baselines lie among files of others, and one of which belongs to nothing any more."""
    project = Project(tmp_path_factory.mktemp("neighbours") / "project")
    lines = [DRIFT.replace("id: drift", f"id: {name}") for name in ("drift", "drift.1", "down", "gone")]
    project.write("a.qsa.yaml", suite(llama, *lines))
    project.write("b.qsa.yaml", suite(llama, DRIFT))
    project.write("test_words.py", "def test_words(snapshot): assert [1] == snapshot\n")
    project.write("pytest.ini", "[pytest]\naddopts = --qsa-report=never\n")
    assert project.pytest("--snapshot-update").code == 0
    project.write("a.qsa.yaml", suite(llama, *lines[:3]))
    for name, text in FOREIGN.items():
        project.write(name, text)
    return project


@pytest.mark.parametrize(
    "arguments",
    [
        ["-k", "drift"],
        ["--deselect", "a.qsa.yaml::down"],
        ["--deselect", "a.qsa.yaml::drift.1"],
        ["a.qsa.yaml::drift"],
        ["a.qsa.yaml::drift.1"],
        ["b.qsa.yaml"],
        ["test_words.py"],
        ["-m", "not qsa"],
        ["--ignore=a.qsa.yaml"],
        ["-p", "no:qsa", "test_words.py", "-o", "addopts="],
        ["--qsa-model=new={llama}", "a.qsa.yaml::down"],
    ],
    ids=" ".join,
)
def test_an_update_of_some_touches_no_other(neighbours, llama, arguments):
    def others():
        """Return all files but the baselines of another name, and but those that truly belong to nothing any more."""
        mine = {f"{HOME}/gone.json", "__snapshots__/test_gone.ambr"}
        return {name: text for name, text in neighbours.files().items() if name not in mine and "/new/" not in name}

    before = others()
    run = neighbours.pytest("--snapshot-update", *(argument.format(llama=llama) for argument in arguments))
    assert run.code == 0, run.out
    assert others() == before


def test_an_unused_baseline_is_reported_then_removed_and_nothing_else(tmp_path, llama):
    project = Project(tmp_path / "project")
    lines = [DRIFT.replace("id: drift", f"id: {name}") for name in ("drift", "drift.1", "down", "gone")]
    project.write("a.qsa.yaml", suite(llama, *lines))
    project.write("test_words.py", "def test_words(snapshot): assert [1] == snapshot\n")
    assert project.pytest("--qsa-report=never", "--snapshot-update").code == 0
    project.write("a.qsa.yaml", suite(llama, *lines[:3]))
    for name, text in FOREIGN.items():
        if name != "__snapshots__/test_gone.ambr":
            project.write(name, text)
    before = project.files()
    told = project.pytest("--qsa-report=never")
    assert told.code == 1
    assert "1 snapshot unused" in told.out
    assert project.files() == before
    removed = project.pytest("--qsa-report=never", "--snapshot-update")
    assert "1 unused snapshot deleted" in removed.out
    assert {name for name in before if name not in project.files()} == {f"{HOME}/gone.json"}
    assert project.pytest("--qsa-report=never").code == 0


def test_a_failed_capture_removes_no_baseline(tmp_path, llama):
    project = Project(tmp_path / "project")
    project.write("a.qsa.yaml", suite(llama, DRIFT, peaks("max: 100")))
    project.pytest("--qsa-report=never", "--snapshot-update")
    before = project.files()
    run = project.pytest("--qsa-report=never", "--snapshot-update", "--qsa-model=./nowhere")
    assert run.code == 1
    assert project.files() == before
    run = project.pytest("--qsa-report=never", "--snapshot-update", "--qsa-set=assertions.drift.layers=nothing")
    assert run.code == 1
    assert project.files() == before


def test_a_baseline_that_cannot_be_written_is_one_line(tmp_path, llama):
    project = Project(tmp_path / "project")
    project.write("a.qsa.yaml", suite(llama, DRIFT))
    project.write("qsa_baselines", "a file where the folder should be")
    run = project.pytest("--qsa-report=never", "--snapshot-update")
    assert run.outcomes == {"a.qsa.yaml::drift": "failed"}
    assert run.first_line("::drift").startswith("INFRA drift: ")
    assert ".py:" not in run.text("::drift")


CLASSES = """
import pytest

WHAT = {"layers": "down_proj$", "site": "output"}

class TestOne:
    @pytest.mark.qsa(**WHAT)
    def test_drift(self, qsa, qsa_baseline):
        assert qsa.output("down_proj$").rms() == qsa_baseline(rel=0.05)

class TestTwo:
    @pytest.mark.qsa(**WHAT)
    def test_drift(self, qsa, qsa_baseline):
        assert qsa.output("down_proj$").absmax() == qsa_baseline(rel=0.05)

@pytest.mark.qsa(**WHAT)
def test_two_in_one(qsa, qsa_baseline):
    assert qsa.output("down_proj$").absmax() == qsa_baseline(rel=0.05)
    assert qsa.output("down_proj$").rms() == qsa_baseline(rel=0.05)

@pytest.mark.parametrize("where", ["a/b", "a:b", "..", "ä", "with space"])
@pytest.mark.qsa(**WHAT)
def test_each(qsa, qsa_baseline, where):
    assert qsa.output("down_proj$").absmax() == qsa_baseline(rel=0.05)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory, llama):
    """Run Python tests with baselines: to make them, and to meet them."""
    project = Project(tmp_path_factory.mktemp("python") / "project")
    project.write("a.qsa.yaml", suite(llama, peaks("max: 100")))
    project.write("test_p.py", CLASSES)
    options = ["--qsa-report=never", "--qsa-config=a.qsa.yaml", "test_p.py"]
    project.update = project.pytest(*options, "--snapshot-update")
    project.made = project.files("qsa_baselines")
    project.run = project.pytest(*options)
    project.again = project.pytest(*options, "--snapshot-update")
    return project


def test_python_tests_of_one_name_in_two_classes_have_two_baselines(python):
    assert python.update.code == 0, python.update.out
    assert python.run.code == 0, python.run.out


def test_every_baseline_of_a_python_test_is_in_use(python):
    assert "unused" not in python.run.out
    assert len(python.made) == 2 + 2 + 5
    assert python.files("qsa_baselines") == python.made


def test_baselines_of_python_tests_stay_in_their_folder(python):
    assert {name.rpartition("/")[0] for name in python.files("qsa_baselines")} == {"qsa_baselines/llama/test_p"}


@pytest.mark.parametrize(("definition", "read"), [("quantization_sqnr/1", math.inf), ("magnitude/1", 300.0)])
def test_the_300_db_of_an_older_baseline_is_no_error_at_all(definition, read):
    query = Query("sqnr", definition, "output", "layers", unit="dB")
    text = BaselineFile.of(Series(["a", "b"], np.array([300.0, 12.5]), query), None).dump()
    assert BaselineFile.parse(text).values == {"a": read, "b": 12.5}


def of_weights(value, site="weight"):
    return Series(["a"], np.array([value]), Query("absmax", "absmax/1", site, "a"))


def against(kept, made_with, now, series):
    content = json.loads(BaselineFile.of(kept, None, made_with).dump())
    if made_with.format is None:  # as earlier versions wrote it
        del content["made_with"]["format"]
    baseline = BaselineFile.parse(json.dumps(content))
    return within_baseline(series, baseline, Tolerance(), None, now)


DOUBT = "it was recorded by a version that read weights of bitsandbytes wrongly: if these are right, update it"


def test_a_baseline_of_weights_that_were_read_wrongly_says_so_where_it_fails():
    old, new = ModelProvenance("m", weights="w"), ModelProvenance("m", weights="w", format="bitsandbytes_4bit")
    assert DOUBT in against(of_weights(255.0), old, new, of_weights(0.3)).headline
    with pytest.raises(BaselineError, match=DOUBT):
        against(Series(["b"], np.array([1.0]), of_weights(0.0).query), old, new, of_weights(0.3))
    adapted = against(of_weights(0.2), old, replace(old, adapter="LoRA r 8"), of_weights(0.3))
    assert "read weights without the adapter: if these are right" in adapted.headline
    # What fits needs no doubt, nor does what is no weight, is in another format, or was read rightly.
    healthy = [
        against(of_weights(0.3), old, new, of_weights(0.3)),
        against(of_weights(255.0, "output"), old, new, of_weights(0.3, "output")),
        against(of_weights(255.0), old, replace(new, format="compressed-tensors"), of_weights(0.3)),
        against(of_weights(255.0), new, new, of_weights(0.3)),
        against(of_weights(0.2), replace(old, format="none"), replace(old, adapter="LoRA r 8"), of_weights(0.3)),
    ]
    assert not any("wrongly" in judgement.headline for judgement in healthy)
    assert "format" not in healthy[0].since
    assert "format was bitsandbytes_4bit, is gptq" in since_text(new, replace(new, format="gptq"))


@pytest.mark.parametrize(
    "tolerance", [{"rel": 10.1}, {"rel": math.inf}, {"abs": math.inf}, {"rel": math.nan}, {"abs": -1}]
)
def test_a_tolerance_with_which_nothing_is_checked_is_refused(tolerance):
    with pytest.raises(ValueError, match=r"nothing would be checked|a tolerance is 0 or more"):
        Tolerance(**tolerance)
    Tolerance(rel=10, abs=1e30)


def test_a_suite_has_no_such_tolerance_either(tmp_path):
    path = tmp_path / "a.qsa.yaml"
    path.write_text(suite("x", peaks("baseline: {rel: 11}")))
    with pytest.raises(SuiteError, match=r"a.qsa.yaml:4: rel: .*less than or equal to 10, not 11"):
        load_suite(path)

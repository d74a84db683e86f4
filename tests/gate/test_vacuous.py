"""Nothing is green because nothing was checked: tests that drop their comparison, files that were meant as suites."""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qsa.captures import Capture, ModelProvenance, Provenance
from pytest_qsa.checkpoint import Files, open_folder
from pytest_qsa.common import AnomalyError, SuiteError
from pytest_qsa.gate import resembles_a_suite
from pytest_qsa.gate.comparisons import unasserted
from pytest_qsa.gate.summary import always_within
from pytest_qsa.metrics import Bounds, Query, Series
from pytest_qsa.report import to_plain
from pytest_qsa.report.verdict_text import step_summary
from pytest_qsa.suite import Model, Place, check_reference, load_suite
from support.judged import judge_bounds
from support.projects import suite

STATEMENTS = {
    "series <= 1": True,
    "(series <= 1,)": True,
    "not series > 1": True,
    "series >= 0 and series <= 1": True,
    "(\n    series\n    <= 1\n)": True,
    "ok = series <= 1": True,
    "assert series <= 1": False,
    "ok = series <= 1\nassert ok": False,
    "if series <= 1:\n    print()": False,
    "check(series <= 1)": False,
    "with pytest.raises(ValueError):\n    series <= 1": False,
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_comparison_whose_result_is_lost_is_found_in_the_source(tmp_path, statement):
    file = tmp_path / "test_it.py"
    file.write_text("def test_it(qsa):\n" + textwrap.indent(statement, "    "), encoding="utf-8")
    line = 1 + next(number for number, text in enumerate(file.read_text().splitlines()) if "series" in text)
    assert bool(unasserted(Place(file, line))) is STATEMENTS[statement]


def test_a_comparison_in_no_file_is_taken_for_asserted(tmp_path):
    assert unasserted(None) is None
    assert unasserted(Place(tmp_path / "absent.py", 1)) is None


NEAR = {
    "x.qsa.YAML": True, "qsa.yaml": True, "x-qsa.yml": True, "x.qas.yaml": True, "x.qsa.yaml.txt": True,
    "x.qsa.json": True, "x.yaml": False, "x.qsa": False, "qsa.py": False,
}  # fmt: skip


def test_a_file_is_taken_for_a_suite_by_its_name_and_its_assertions(tmp_path):
    for name in NEAR:
        (tmp_path / name).write_text("model: {}\nassertions:\n", encoding="utf-8")
    assert {name: resembles_a_suite(tmp_path / name) for name in NEAR} == NEAR
    (tmp_path / "qsa.yaml").write_text("model: {}\n  assertions: 1\n", encoding="utf-8")
    assert not resembles_a_suite(tmp_path / "qsa.yaml")


@pytest.fixture
def beside(own_project, llama):
    """Make a project with a good suite and files that may be meant as others."""
    good = suite(llama, "id: keys, metric: checkpoint_keys")
    for name in ("good.qsa.yaml", "lost.qsa.YAML", "base-qsa.yaml", "_near-qsa.yaml"):
        own_project.write(name, good)
    own_project.write("child.qsa.yaml", "extends: base-qsa.yaml\n")
    return own_project


@pytest.mark.process
@pytest.mark.parametrize("workers", [(), ("-n1",)], ids=["alone", "workers"])
def test_a_suite_that_is_almost_named_so_is_told_and_a_base_is_none(beside, workers):
    run = beside.pytest(*workers)
    told = [line for line in run.out.splitlines() if line.startswith("warning: ")]
    assert [line.partition(" isn't collected")[0] for line in told] == ["warning: lost.qsa.YAML"]
    assert run.code == 0


@pytest.mark.process
@pytest.mark.parametrize("workers", [(), ("-n1",)], ids=["alone", "workers"])
def test_an_assertion_for_some_models_is_left_out_for_the_others_with_a_word(own_project, llama, workers):
    checks = ("id: shape, metric: checkpoint_unquantized, models: int8", "id: files, metric: checkpoint_health")
    own_project.write("a.qsa.yaml", suite(f"{llama}, reference: {llama}", *checks))
    models = (f"--qsa-model=llama-int8={llama}", f"--qsa-model=original={llama}")
    run = own_project.pytest(*models, *workers)
    ran = sorted(name.partition("::")[2] for name in run.outcomes)
    assert ran == ["files[llama-int8]", "files[original]", "shape[llama-int8]"]
    assert "note: a.qsa.yaml: shape is not for original (models: int8)" in run.out.splitlines()
    assert not [line for line in run.out.splitlines() if line.startswith("warning: ")]  # the suite itself says so
    left = own_project.json("qsa-results/report.json")["session"]["manifest"]["overrides"]["deselected"]
    assert left == {}  # the suite says so, and nobody overrode it
    alone = own_project.pytest("a.qsa.yaml::shape", f"--qsa-model=original={llama}", *workers)
    assert alone.code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "warning: a.qsa.yaml: shape is not for original (models: int8)" in alone.out.splitlines()


@pytest.mark.process
def test_a_suite_without_assertions_beside_others_is_an_error(beside):
    beside.write("empty.qsa.yaml", "model: {path: x}\n")
    run = beside.pytest()
    assert run.code == 2
    assert "empty.qsa.yaml:1: has no assertions: nothing of it would be checked" in run.out
    assert beside.pytest("--qsa-config=empty.qsa.yaml").code == 0  # it gives Python tests their subject


@pytest.mark.process
def test_a_python_test_that_looks_at_no_number_fails(own_project, llama):
    own_project.write("a.yaml", suite(llama).replace("assertions:\n", ""))
    own_project.write(
        "test_it.py",
        """
        import pytest

        pytestmark = pytest.mark.qsa(layers="mlp$", site="output")

        def test_lost(qsa):
            qsa.output("mlp$").absmax() <= 1e9

        def test_nothing(qsa):
            qsa.output("mlp$").absmax()

        def test_taken_only(qsa):
            pass

        @pytest.mark.parametrize("read", [lambda s: s.values, list, lambda s: s[0]])
        def test_reads(qsa, read):
            assert read(qsa.output("mlp$").absmax()) is not None

        def test_reads_the_capture(qsa):
            assert qsa.capture.sites
        """,
    )
    run = own_project.pytest("--qsa-config=a.yaml", "--qsa-report=never")
    failed = {name.rpartition("::")[2]: run.first_line(name) for name, how in run.outcomes.items() if how == "failed"}
    assert sorted(failed) == ["test_lost", "test_nothing", "test_taken_only"]
    assert "the result of this comparison is lost" in failed["test_lost"]
    assert all("looked at no number" in failed[name] for name in ("test_nothing", "test_taken_only"))
    assert {run.kind(f"::{name}") for name in failed} == {"ANOMALOUS"}


def test_what_a_reader_has_to_know_stands_in_the_step_summary_too():
    remarks = [("warning", "a waiver of `me` is on everything"), ("note", "shape is not for original (models: int8)")]
    lines = step_summary([], remarks).splitlines()
    assert "- ⚠️ ``a waiver of `me` is on everything``" in lines
    assert "- note: `shape is not for original (models: int8)`" in lines


@pytest.mark.process
def test_a_reference_that_is_the_model_itself_compares_nothing(own_project, llama, tmp_path):
    copy = shutil.copytree(llama, tmp_path / "copy")
    checks = (
        "id: far, metric: sqnr, layers: mlp$, min: 30", "id: files, metric: checkpoint_settings",
        "id: alone, metric: absmax, layers: mlp$, site: output, max: 1000",
    )  # fmt: skip
    own_project.write("itself.qsa.yaml", suite(f"{llama}, reference: {llama}", *checks))
    own_project.write("copy.qsa.yaml", suite(f"{llama}, reference: {copy}", *checks[:1]))
    own_project.write("floor.qsa.yaml", suite(f"{llama}, reference: {copy}, reference_is_copy: true", *checks))
    run = own_project.pytest("--qsa-report=never")
    failed = sorted(name for name, outcome in run.outcomes.items() if outcome == "failed")
    assert failed == ["copy.qsa.yaml::far", "itself.qsa.yaml::far", "itself.qsa.yaml::files"]
    assert {run.kind(name) for name in failed} == {"ANOMALOUS"}
    assert "is the model itself or a copy of it" in run.first_line("copy.qsa.yaml::far")
    assert "llama: the reference is a copy (model.reference_is_copy): this is the floor" in run.out


def test_the_same_weights_run_otherwise_are_no_copy():
    own = ModelProvenance("a", weights="sha256:1", dtype="bfloat16", attention="sdpa")
    assert own.same_weights(replace(own, path="b"))
    assert not own.same_weights(replace(own, weights="sha256:2"))
    for changed in ({"dtype": "float32"}, {"attention": "eager"}, {"adapter": "LoRA of rank 8"}, {"format": "int8"}):
        assert not own.runs_as(replace(own, **changed))
    unread = replace(own, weights="")
    assert unread.same_weights(unread)
    assert not unread.same_weights(replace(unread, path="b"))
    assert not replace(unread, path="").same_weights(replace(unread, path=""))  # two fixtures' models


def cut_again(folder, into, change=lambda tensors: None):
    """Copy a checkpoint with its tensors in two files of other names, and return the copy."""
    shutil.copytree(folder, into)
    (file,) = into.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    names = sorted(tensors)
    for part, some in (("a", names[:5]), ("b", names[5:])):
        save_file({name: tensors[name] for name in some}, into / f"weights-{part}.safetensors", {"by": "me"})
    return into


def copied(own, reference, weights="sha256:2", **model):
    """Say what is thought of a reference: an error's text, or nothing."""
    provenance = ModelProvenance(str(own), weights="sha256:1", dtype="float32")
    theirs = Capture({}, provenance=Provenance(replace(provenance, path=str(reference), weights=weights)))
    capture = Capture({}, provenance=Provenance(provenance), reference=theirs)
    files = Files(open_folder(own), open_folder(reference))
    try:
        check_reference(capture, Model(path=str(own), **model), lambda: files)
    except AnomalyError as error:
        return str(error)
    return ""


def test_a_copy_whose_tensors_lie_in_other_files_is_one(llama, tmp_path):
    assert "is the model itself or a copy of it" in copied(llama, cut_again(llama, tmp_path / "copy"))
    assert not copied(llama, tmp_path / "copy", reference_is_copy=True)

    def last_bit(tensors):
        tensors["model.norm.weight"].view(torch.uint8)[-1] ^= 1

    assert not copied(llama, cut_again(llama, tmp_path / "another", last_bit))
    assert not copied(llama, cut_again(llama, tmp_path / "fewer", lambda tensors: tensors.pop("model.norm.weight")))


@pytest.mark.parametrize("key", ["kv_cache_scheme", "run_compressed"])
def test_the_same_tensors_with_another_cache_or_execution_are_no_copy(quantized, tmp_path, key):
    own = quantized["int8"]
    copy = shutil.copytree(own, tmp_path / "copy")
    assert copied(own, copy, weights="sha256:1")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"][key] = {"num_bits": 8, "dynamic": True, "type": "float"} if "kv" in key else False
    (copy / "config.json").write_text(json.dumps(config))
    assert not copied(own, copy, weights="sha256:1")


VACUOUS = {
    "cosine, layers: x, max: 2": "cosine is never above 1",
    "rms, layers: x, site: output, min: -1": "rms is never below 0",
    "mean, layers: x, site: output, max: 1e39": "beyond the largest number of float32",
    "absmax, layers: x, site: output, max: {'a': 1e39, default: 5}": "beyond the largest number of float32",
    "rms, layers: x, site: output, min: -1, noise: {min: {mean: 2, sigma: 0.5, n: 4, k: 6}}": "rms is never below 0",
    "rms, layers: x, site: output, max: {of: previous, times: 12}": "times: should be less than or equal to 11",
    "same_top, max: {of: previous, at_least: 2}": "same_top is never above 1",
    "same_top, max: {'a': 1, default: 1.5}": "same_top is never above 1",
    "external, file: a.json, reference: b.json, score: acc, compare: recovery, min: 0": "never 0, so min 0 checks",
    "external, file: a.json, reference: b.json, score: acc, compare: drop, max: 1, sigmas: 99": "sigmas: should be",
    "checkpoint_health, min: 0": "a number of problems is never below 0",
    "cosine, layers: x, baseline: {abs: 3}": "abs 3 is more than cosine can differ by",
}


@pytest.mark.parametrize("assertion", VACUOUS)
def test_a_bound_that_holds_whatever_is_measured_is_refused(tmp_path, assertion):
    file = tmp_path / "a.qsa.yaml"
    file.write_text(suite("x, reference: y, previous: z", f"id: a, metric: {assertion}"), encoding="utf-8")
    with pytest.raises(SuiteError, match=f"a.qsa.yaml:4: .*{VACUOUS[assertion]}"):
        load_suite(file)


ENDS = [
    ("absmax", Bounds(min=0), "absmax is never below 0"),
    ("cosine", Bounds(max=1), "cosine is never below -1 or above 1"),
    ("same_top", Bounds(min=0, max=1), "same_top is never below 0 or above 1"),
    ("same_top", Bounds(min=0.1, max=1), ""),
    ("absmax", Bounds(min=0, max=3), ""),
    ("sqnr", Bounds(min=0), ""),
]


@pytest.mark.parametrize(("metric", "bounds", "said"), ENDS)
def test_a_bound_at_the_end_of_what_can_be_is_told(metric, bounds, said):
    series = Series(["a", "b"], np.array([0.5, 0.5]), Query(metric, f"{metric}/1", "output", "."))
    assert always_within(to_plain(judge_bounds(series, bounds))) == said


BEYOND = {
    "absmax, layers: x, site: output, max: 65505": "max 65505 is beyond the largest number of float16, 65504",
    "quantile, layers: x, site: input, signed: true, min: -7e4": "min -70000 is beyond the largest number of float16",
    "magnitude, layers: x, site: output, max: {a: 7e4, default: 5}": "beyond the largest number of float16",
    "headroom, layers: x, site: output, max: 1.5": "max 1.5 of float16 is beyond what float16 holds",
}
WITHIN = (
    "absmax, layers: x, site: output, max: 65504", "absmax, layers: x, site: output, over: sum, max: 1e6",
    "magnitude, layers: x, site: output, reduce: sum, max: 1e6", "kurtosis, layers: x, site: output, max: 1e5",
    "absmax, layers: x, site: weight, max: 1e5", "headroom, layers: x, site: output, max: 1",
    "headroom, dtype: float8_e4m3fn, layers: x, site: output, max: 100",
)  # fmt: skip


@pytest.mark.parametrize("assertion", [*BEYOND, *WITHIN])
def test_a_bound_beyond_the_dtype_that_a_suite_asks_for_is_refused(tmp_path, assertion):
    file = tmp_path / "a.qsa.yaml"
    for dtype in ("float16", "auto"):
        file.write_text(suite(f"x, dtype: {dtype}", f"id: a, metric: {assertion}"), encoding="utf-8")
        if assertion in WITHIN or dtype == "auto":
            assert load_suite(file).assertions
            continue
        with pytest.raises(SuiteError, match=f"a.qsa.yaml:4: .*{BEYOND[assertion]}"):
            load_suite(file)


def test_what_can_be_is_no_vacuous_bound(tmp_path):
    file = tmp_path / "a.qsa.yaml"
    bounds = (
        "cosine, layers: x, min: -1", "zero_fraction, layers: x, site: output, over: sum, max: 3",
        "cosine, layers: x, over: sum, min: -3",
        "rms, layers: x, site: output, min: 0, noise: {min: {mean: 2, sigma: 0.5, n: 4, k: 6}}",
    )  # fmt: skip
    written = suite("x, reference: y", *(f"id: a{index}, metric: {bound}" for index, bound in enumerate(bounds)))
    file.write_text(written, encoding="utf-8")
    assert len(load_suite(file).assertions) == len(bounds)

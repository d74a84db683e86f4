"""Tests in Python: the same words as a suite's, one pass with its assertions, and nothing that passes by accident."""

from __future__ import annotations

import re

import pytest

from support.checkpoints import save_llama
from support.projects import COUNTED, Project, peaks, suite

pytestmark = pytest.mark.process

HEAD = "import pytest\nBLOCKS = r'layers\\.\\d$'\nblocks = pytest.mark.qsa(layers=BLOCKS, site='output')\n"
BOTH = {
    "above": (peaks("max: 1", "above"), "absmax() <= 1"),
    "below": (peaks("min: 99", "below"), "absmax() >= 99"),
    "exactly": (peaks("equals: 3", "exactly"), "absmax() == 3"),
    "skipped": (peaks("max: 1, positions: {skip_first: 3}", "skipped"), "absmax(positions={'skip_first': 3}) <= 1"),
    "counted": (
        r"id: counted, metric: outlier_tokens, threshold: 1, layers: layers\.\d$, site: output, reduce: sum, max: 0",
        "outlier_tokens(threshold=1, reduce='sum') <= 0",
    ),
    "missing": (peaks("baseline: {rel: 0.05}", "missing"), "absmax() == qsa_baseline(rel=0.05)"),
}
PLAIN = """
@blocks
def test_holds(qsa):
    assert qsa.output(BLOCKS).absmax() <= 100

@blocks
def test_negated(qsa):
    assert not qsa.output(BLOCKS).absmax() <= 1

@blocks
def test_either(qsa):
    assert qsa.output(BLOCKS).absmax() <= 1 or qsa.output(BLOCKS).absmax() <= 100

@blocks
def test_both_sides(qsa):
    assert 1 <= qsa.output(BLOCKS).absmax() <= 100

@blocks
def test_skips(qsa):
    assert qsa.output(BLOCKS).absmax() <= 100
    pytest.skip("enough")
"""
WRONG = """
@blocks
def test_unrelated(qsa):
    assert not qsa.output(BLOCKS).absmax() <= 1
    assert "this" == "that"

@blocks
def test_helper(qsa):
    check(qsa.output(BLOCKS).absmax())

def check(series):
    assert series <= 1

@blocks
def test_truth(qsa):
    assert qsa.output(BLOCKS).absmax()

@blocks
def test_unequal(qsa):
    assert qsa.output(BLOCKS).absmax() != 1

@blocks
def test_nan_bound(qsa):
    assert qsa.output(BLOCKS).absmax() <= float("nan")

@blocks
def test_nan_bound_reversed(qsa):
    assert float("nan") <= qsa.output(BLOCKS).absmax()

@blocks
def test_negative_tolerance(qsa, qsa_baseline):
    assert qsa.output(BLOCKS).absmax() == qsa_baseline(rel=-0.05)

@blocks
def test_sideways(qsa, qsa_baseline):
    assert qsa.output(BLOCKS).absmax() == qsa_baseline(rel=0.05, direction="sideways")

@blocks
def test_median_of_samples(qsa):
    assert qsa.output(BLOCKS).outlier_tokens(reduce="median") <= 1

@blocks
def test_no_layer(qsa):
    assert not qsa.output("lyers").absmax() <= 1

@blocks
def test_bad_regex(qsa):
    assert qsa.output("layers(").absmax() <= 1
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory, llama):
    """Run each assertion as YAML and as Python."""
    project = Project(tmp_path_factory.mktemp("both") / "project")
    project.write("a.qsa.yaml", suite(llama, *(yaml for yaml, _ in BOTH.values()), peaks("max: 1", "lost", "lyers")))
    tests = "".join(
        f"@blocks\ndef test_{name}(qsa, qsa_baseline):\n    assert qsa.output(BLOCKS).{python}\n"
        for name, (_, python) in BOTH.items()
    )
    tests += "@blocks\ndef test_lost(qsa):\n    assert qsa.output('lyers').absmax() <= 1\n"
    project.write("test_p.py", HEAD + tests)
    return project.pytest("--qsa-config=a.qsa.yaml", "--qsa-report=never")


def plain(text):
    """Leave out of a failure what names the test: the frames, its id, its place and its commands."""
    lines = [line for line in text.splitlines() if line.startswith("E ")]
    lines = [line for line in lines if not re.match(r"E   (bound|again|accept) ", line)]
    return re.sub(r"\btest_", "", "\n".join(lines))


@pytest.mark.parametrize("name", [*BOTH, "lost"])
def test_python_says_what_yaml_says(both, name):
    python, yaml = both.text(f"test_p.py::test_{name}"), both.text(f"a.qsa.yaml::{name}")
    # A suite's pattern is checked before the pass, so that nothing has run yet.
    texts = [re.sub(r"(E   ran  .*)", "", plain(text)) if name == "lost" else plain(text) for text in (python, yaml)]
    # A missing baseline is told with its path: each file has its folder, p and a.
    assert re.sub(r"/p/missing\b", "/a/missing", texts[0]) == texts[1]
    assert "E   bound" in python
    assert "E   again" in python


@pytest.mark.parametrize("name", [*BOTH, "lost"])
def test_a_python_failure_stands_at_its_line_and_can_be_run_again(both, name):
    report = both.report(f"test_p.py::test_{name}")
    labelled = both.labelled(f"test_p.py::test_{name}")
    assert labelled["bound"][0].startswith(f"test_p.py:{report['line']}")
    again = labelled["again"][0]
    assert again.startswith(f"pytest test_p.py::test_{name}")


def test_a_python_failure_can_be_run_again_with_its_subject(both):
    assert "--qsa-config" in both.labelled("test_p.py::test_above")["again"][0]


def test_the_failures_of_a_file_begin_with_their_kind(both):
    assert "FAILED test_p.py::test_above - REGRESSION: model.layers.3: " in both.out
    assert "FAILED test_p.py::test_missing - ANOMALOUS: " in both.out


@pytest.fixture(scope="module")
def passing(tmp_path_factory, llama):
    project = Project(tmp_path_factory.mktemp("passing") / "project")
    project.write("a.qsa.yaml", suite(llama, peaks("max: 100")))
    project.write("test_p.py", HEAD + PLAIN)
    project.run = project.pytest("--qsa-config=a.qsa.yaml")
    return project


def test_a_comparison_may_be_negated_or_joined(passing):
    assert passing.run.code == 0, passing.run.out
    assert passing.run.report("::test_skips")["outcome"] == "skipped"


def test_what_no_test_asserted_does_not_count_as_a_failure(passing):
    assert "REGRESSION" not in passing.run.out
    assert not (passing.folder / "qsa-results/report.html").exists()


def test_weights_that_nobody_announced_are_measured_too(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 100")))
    own_project.write("test_p.py", "def test_w(qsa):\n    assert qsa.weight('q_proj$').absmax() <= 1\n")
    run = own_project.pytest("--qsa-config=a.qsa.yaml", "--qsa-report=never", "test_p.py")
    assert run.outcomes == {"test_p.py::test_w": "passed"}, run.out


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, llama):
    project = Project(tmp_path_factory.mktemp("wrong") / "project")
    project.write("a.qsa.yaml", suite(llama, peaks("max: 100")))
    project.write("test_p.py", HEAD + WRONG)
    return project.pytest("--qsa-config=a.qsa.yaml", "--qsa-report=never", "test_p.py")


def test_an_assertion_about_something_else_is_not_shown_as_a_verdict(wrong):
    assert "REGRESSION" not in wrong.text("::test_unrelated")
    assert "'this' == 'that'" in wrong.text("::test_unrelated")


def test_a_failure_in_a_helper_shows_the_helper_and_its_caller(wrong):
    text = wrong.text("::test_helper")
    assert text.index("in test_helper") < text.index("in check") < text.index("REGRESSION test_helper: ")


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("truth", "compare it with a bound, as in `series <= 1`"),
        ("unequal", "use <=, >= or =="),
        ("nan_bound", "the bound is NaN"),
        ("nan_bound_reversed", "the bound is NaN"),
        ("negative_tolerance", "rel"),
        ("sideways", "one of both, up, down"),
        ("median_of_samples", "one of max, mean, sum, p95"),
        ("no_layer", "'lyers'"),
        ("bad_regex", "'layers('"),
    ],
)
def test_what_cannot_be_compared_raises_and_says_why(wrong, test, said):
    assert wrong.outcomes[f"test_p.py::test_{test}"] == "failed"
    assert said in wrong.report(f"::test_{test}")["crash"]


@pytest.fixture(scope="module")
def nan(tmp_path_factory):
    import torch

    project = Project(tmp_path_factory.mktemp("nan") / "project")

    def break_(weights):
        weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan

    save_llama(project.folder / "nan", break_)
    project.write("a.qsa.yaml", suite("./nan", peaks("max: 1")))
    tests = ""
    for name, expression in {
        "less": "not {} <= 1",
        "more": "not {} >= 1",
        "equal": "not {} == 1",
        "joined": "{} <= 1 or True",
        "kept": "not {} == qsa_baseline(rel=0.1)",
    }.items():
        expression = expression.format("qsa.output(BLOCKS).absmax()")
        tests += f"@blocks\ndef test_{name}(qsa, qsa_baseline):\n    assert {expression}\n"
    project.write("test_p.py", HEAD + tests)
    return project.pytest("--qsa-config=a.qsa.yaml", "--qsa-report=never", "test_p.py", "--snapshot-update")


@pytest.mark.parametrize("name", ["less", "more", "equal", "joined", "kept"])
def test_a_comparison_of_what_is_not_finite_raises_rather_than_being_false(nan, name):
    assert nan.first_line(f"::test_{name}").startswith(f"ANOMALOUS test_{name}: ")
    assert "model.layers.2" in nan.first_line(f"::test_{name}")


UNPLANNED = r"""
def test_unplanned(qsa):
    series = qsa.input(r"down_proj$")
    assert series.absmax() <= 100
    assert series.rms() <= 100
    assert series.magnitude("median", reduce_dim=-2) <= 100

def test_too_much(qsa):
    assert qsa.input(r"down_proj$").absmax() <= 1
"""


@pytest.fixture(scope="module")
def unplanned(tmp_path_factory, llama):
    """Run tests that announce nothing beside a suite, then again with the mark that the warning named."""
    project = Project(tmp_path_factory.mktemp("unplanned") / "project")
    project.write("counted.py", COUNTED.format(path=str(llama)))
    text = suite("x", peaks("max: 100")).replace("path: x", "factory: counted:make")
    project.write("a.qsa.yaml", text)
    project.write("test_p.py", HEAD + UNPLANNED)
    arguments = ("--qsa-config=a.qsa.yaml", "--qsa-report=never", "--qsa-allow-code")
    project.run = project.pytest(*arguments)
    project.notes = project.read("notes.txt").split()
    (project.folder / "notes.txt").unlink()
    marks = re.findall(r"@pytest\.mark\.qsa\(.*\)", project.run.warnings[0]["text"])
    project.write("test_p.py", HEAD + UNPLANNED.replace("def test_", f"{marks[0]}\ndef test_"))
    project.marked = project.pytest(*arguments)
    project.marked_notes = project.read("notes.txt").split()
    return project


def test_a_test_without_a_mark_is_warned_of_the_second_pass(unplanned):
    warnings = [w for w in unplanned.run.warnings if w["kind"] == "QsaUnplannedCaptureWarning"]
    assert {w["nodeid"] for w in warnings} == {"test_p.py::test_unplanned", "test_p.py::test_too_much"}
    assert "@pytest.mark.qsa(layers=r'down_proj$', site='input')" in warnings[0]["text"]


def test_a_test_without_a_mark_is_warned_once(unplanned):
    warned = [w["nodeid"] for w in unplanned.run.warnings if w["kind"] == "QsaUnplannedCaptureWarning"]
    assert warned.count("test_p.py::test_unplanned") == 1


def test_a_second_pass_is_made_once_for_all_that_ask_the_same(unplanned):
    assert unplanned.notes == ["load", "forward", "forward"] * 2


def test_a_test_without_a_mark_is_judged_right_all_the_same(unplanned):
    assert unplanned.run.outcomes["test_p.py::test_unplanned"] == "passed"
    text, marked = unplanned.run.text("::test_too_much"), unplanned.marked.text("::test_too_much")
    assert text.partition("E ")[2].splitlines()[0] == marked.partition("E ")[2].splitlines()[0]


def test_a_test_without_a_mark_shows_the_tokens_too(unplanned):
    assert "the tokens that stand out most" in unplanned.marked.text("::test_too_much")
    assert "the tokens that stand out most" in unplanned.run.text("::test_too_much")


def test_the_mark_of_the_warning_ends_it(unplanned):
    assert not [w for w in unplanned.marked.warnings if w["kind"] == "QsaUnplannedCaptureWarning"]
    assert unplanned.marked_notes == ["load", "forward", "forward"]


MARKS = {
    "layer": ("layer='x', site='output'", "'layers'"),
    "site": ("layers='x', site='outptu'", "unknown site 'outptu'"),
    "regex": ("layers='x(', site='output'", "'x('"),
    "metric": ("layers='x', site='output', metric='speed'", "speed"),
    "extra": ("layers='x', site='output', bogus=1", "bogus"),
    "parameter": ("layers='x', site='output', metric='absmax', threshold=3", "threshold"),
    "positional": ("'x', 'output'", "layers="),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_wrong_mark_is_one_clear_line_for_its_own_test(own_project, llama, name):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 100")))
    mark, said = MARKS[name]
    body = "def test_wrong(qsa):\n    assert qsa.output(BLOCKS).absmax() <= 100\n"
    own_project.write("test_p.py", f"{HEAD}@pytest.mark.qsa({mark})\n{body}")
    run = own_project.pytest("--qsa-config=a.qsa.yaml", "--qsa-report=never")
    line = run.first_line("::test_wrong")
    assert "test_p.py::test_wrong: the mark is wrong: " in line
    assert said in line
    assert "@pytest.mark.qsa(layers=r'…', site='output')" in line
    assert "Traceback" not in run.out
    assert run.outcomes["a.qsa.yaml::peaks"] == "passed"

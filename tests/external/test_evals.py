"""Evals as evidence: scores of lm-eval and of any JSON, beside a reference, with the error of the difference."""

from __future__ import annotations

import copy
import json
import math
import sys

import pytest

from pytest_qsa.common.errors import AnomalyError, InfraError, SuiteError
from pytest_qsa.external.evals import EvalFiles
from pytest_qsa.suite import load_suite
from pytest_qsa.verdicts.judge import judge_evals
from pytest_qsa.verdicts.judgement import NO_LENIENCY
from support.projects import Project

BASE = {
    "results": {
        "gsm8k": {
            "alias": "gsm8k", "exact_match,strict-match": 0.61, "exact_match_stderr,strict-match": 0.0134,
            "exact_match,flexible-extract": 0.63, "exact_match_stderr,flexible-extract": 0.0133,
        },
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.72, "acc_stderr,none": 0.0092},
        "arc_challenge": {"alias": "arc_challenge", "acc,none": 0.44, "acc_stderr,none": 0.0145},
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
    },
    "versions": {"gsm8k": 3.0, "arc_easy": 1.0},
    "n-shot": {"gsm8k": 5, "arc_easy": 0},
    "n-samples": {"gsm8k": {"original": 1319, "effective": 1319}},
    "higher_is_better": {"gsm8k": {"exact_match": True}, "wikitext": {"word_perplexity": False}},
}  # fmt: skip
STRICT = "tasks: gsm8k, score: 'exact_match,strict-match'"
BESIDE = "file: own.json, reference: base.json"


@pytest.fixture
def evals(tmp_path):
    return Evals(Project(tmp_path / "project"))


class Evals:
    """A user's project with the results of two models."""

    def __init__(self, project):
        self.project = project
        self.write("base.json", BASE)
        self.write("own.json", BASE)

    def write(self, name, content):
        self.project.write(name, content if isinstance(content, str) else json.dumps(content))

    def own(self, task, key, value):
        """Write the results of the subject: those of the base but for one."""
        content = copy.deepcopy(BASE)
        content["results"][task][key] = value
        self.write("own.json", content)

    def suite(self, *assertions, head=""):
        lines = [f"  - {{id: a{n}, metric: external, {keys}}}\n" for n, keys in enumerate(assertions)]
        return self.project.write("gate.qsa.yaml", f"{head}assertions:\n" + "".join(lines))

    def judge(self, keys):
        """Judge one assertion without pytest around it."""
        (assertion,) = load_suite(self.suite(keys)).assertions
        return judge_evals(assertion, EvalFiles(self.project.folder, "int8"), NO_LENIENCY)

    def run(self, *assertions, head="", arguments=()):
        return self.project.pytest(self.suite(*assertions, head=head).name, *arguments)


@pytest.mark.process
def test_recovery_and_drop_are_of_the_reference_whichever_way_is_better(evals):
    own = copy.deepcopy(BASE)
    own["results"]["gsm8k"]["exact_match,strict-match"] = 0.549
    own["results"]["wikitext"]["word_perplexity,none"] = 12.5
    evals.write("own.json", own)
    perplexity = f"{BESIDE}, tasks: wikitext, score: word_perplexity"
    run = evals.run(
        f"{BESIDE}, {STRICT}, compare: recovery, min: 0.91",
        f"{BESIDE}, {STRICT}, compare: drop, max: 0.06",
        f"{perplexity}, compare: recovery, min: 0.97",
        f"{perplexity}, compare: drop, max: 0.4",
        f"{BESIDE}, {STRICT}, compare: recovery, min: 0.89",
        f"{perplexity}, compare: drop, max: 0.6",
        "file: own.json, tasks: ^arc_c, score: acc, min: 0.4",
    )
    values = [float(run.report(f"::a{n}")["properties"]["qsa_value"]) for n in range(7)]
    assert values == pytest.approx([0.549 / 0.61, 0.061, 12 / 12.5, 0.5, 0.549 / 0.61, 0.5, 0.44])
    assert [run.report(f"::a{n}")["outcome"] for n in range(7)] == ["failed"] * 4 + ["passed"] * 3
    assert run.first_line("::a0") == (
        "REGRESSION a0: gsm8k: 0.9 (min 0.91), out of bounds "
        "(0.549 ± 0.0134 against 0.61 ± 0.0134, ± 0.01895 of the difference)"
    )
    report = evals.project.read("qsa-results/report.html")
    assert "0.549 ± 0.0134 against 0.61 ± 0.0134" in report
    assert "reference=base.json" in report
    assert report.count("Nothing is known of the run") == 1


def test_an_excess_within_the_error_of_the_difference_is_allowed_and_one_beyond_it_is_not(evals):
    error = math.hypot(0.0134, 0.0134)
    for lost, failed in ((0.01 + 1.99 * error, False), (0.01 + 2.01 * error, True)):
        evals.own("gsm8k", "exact_match,strict-match", 0.61 - lost)
        assert evals.judge(f"{BESIDE}, {STRICT}, compare: drop, max: 0.01, sigmas: 2").failed is failed


def test_what_is_uncertain_because_it_is_broken_gains_no_tolerance(evals):
    own = copy.deepcopy(BASE)
    own["results"]["gsm8k"] |= {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.3}
    evals.write("own.json", own)
    verdict = evals.judge(f"{BESIDE}, {STRICT}, compare: recovery, min: 0.98, sigmas: 2")
    assert verdict.failed
    assert verdict.rows[0].low == pytest.approx(0.98 - 2 * math.hypot(0.0134, 0.0134) / 0.61)


def test_a_bound_that_the_worst_score_would_meet_is_no_bound(evals):
    few = copy.deepcopy(BASE)
    few["results"]["gsm8k"]["exact_match_stderr,strict-match"] = 0.3
    evals.write("few.json", few)
    for bound in ("compare: drop, max: 0.01", "compare: recovery, min: 0.98"):
        with pytest.raises(AnomalyError, match="the worst score of all would pass; evaluate more samples"):
            evals.judge(f"file: few.json, reference: few.json, {STRICT}, {bound}, sigmas: 2")


def test_a_gain_that_is_too_good_to_be_true_is_anomalous_unless_it_is_meant(evals):
    drop = "compare: drop, max: 0"
    noise = math.hypot(0.0134, 0.0134)
    evals.own("gsm8k", "exact_match,strict-match", 0.61 * 1.1 + 3.9 * noise)
    assert not evals.judge(f"{BESIDE}, {STRICT}, {drop}").failed
    evals.own("gsm8k", "exact_match,strict-match", 0.61 * 1.1 + 4.1 * noise)
    with pytest.raises(
        AnomalyError, match=r"gsm8k is implausibly better than the reference: 0\.7487 ± 0\.0134 against"
    ):
        evals.judge(f"{BESIDE}, {STRICT}, {drop}")
    assert not evals.judge(f"{BESIDE}, {STRICT}, {drop}, implausible_gain: 0.2").failed
    evals.own("wikitext", "word_perplexity,none", 10.7)
    with pytest.raises(AnomalyError, match="wikitext is implausibly better"):
        evals.judge(f"{BESIDE}, tasks: wikitext, score: word_perplexity, {drop}")


def test_a_task_that_only_one_of_the_two_was_given_is_not_passed_over(evals):
    one = copy.deepcopy(BASE)
    del one["results"]["arc_easy"]
    evals.write("one.json", one)
    for files, said in (
        ("file: one.json, reference: base.json", "there is no score of arc_easy, which the reference has"),
        ("file: base.json, reference: one.json", "the reference has no score of arc_easy"),
    ):
        with pytest.raises(AnomalyError, match=said):
            evals.judge(f"{files}, tasks: ^arc, score: acc, compare: drop, max: 0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n-samples": {"gsm8k": {"original": 1319, "effective": 100}}}, "samples 100, of the reference 1319"),
        ({"n-shot": {"gsm8k": 0}}, "n-shot 0, of the reference 5"),
        ({"versions": {"gsm8k": 2.0}}, r"version 2\.0, of the reference 3\.0"),
    ],
    ids=["samples", "shots", "version"],
)
def test_evals_that_were_not_made_alike_are_not_compared(evals, change, said):
    evals.write("own.json", BASE | change)
    with pytest.raises(AnomalyError, match=f"gsm8k can't be compared: {said}"):
        evals.judge(f"{BESIDE}, {STRICT}, compare: recovery, min: 0.5")


@pytest.mark.parametrize(
    ("keys", "kind", "said"),
    [
        ("file: gone.json, score: acc", InfraError, "gone.json: there is no such file of results; run the eval first"),
        ("file: html.json, score: acc", AnomalyError, "html.json: is no JSON: Expecting value"),
        ("file: latin.json, score: acc", AnomalyError, "latin.json: is no JSON: 'utf-8' codec"),
        ("file: empty, score: acc", InfraError, "empty: there is no results_*.json of lm-eval below this folder"),
        ("file: list.json, score: acc", AnomalyError, "list.json has no results of tasks as lm-eval writes them"),
        (
            "file: base.json, tasks: mmlu, score: acc",
            AnomalyError,
            "base.json has no task that 'mmlu' finds; it has gs",
        ),
        ("file: base.json, tasks: arc, score: ac", AnomalyError, "arc_easy has no score 'ac'; it has acc,none"),
        (
            "file: base.json, tasks: gsm, score: exact_match",
            AnomalyError,
            "by several filters: write exact_match,strict",
        ),
        ("file: base.json, pointer: /results/gsm8", AnomalyError, "leads nowhere: there is no 'gsm8' (did you mean"),
        ("file: list.json, pointer: /2", AnomalyError, "/2 leads nowhere: there is no '2'"),
        ("file: base.json, pointer: /results/gsm8k", AnomalyError, "/results/gsm8k is no number: {"),
        ("file: odd.json, score: acc", AnomalyError, "odd.json: t acc,none is nan: the eval saw nothing sound"),
        ("file: odd.json, score: f1", AnomalyError, 't f1,none is no number: "high"'),
        ("file: odd.json, score: b", AnomalyError, "t b,none is no number: true"),
        ("file: odd.json, score: ok", AnomalyError, "odd.json: t ok,none is negative: -1"),
        (
            "file: odd.json, reference: zero.json, score: em, compare: recovery",
            AnomalyError,
            "t: 0.5 / 0 is no recovery",
        ),
        ("file: odd.json, reference: base.json, score: em, compare: drop", AnomalyError, "base.json has no task"),
    ],
)
def test_what_is_not_in_a_file_or_is_no_number_is_told_in_one_line_of_its_kind(evals, keys, kind, said):
    odd = '{"acc,none": NaN, "f1,none": "high", "b,none": true, "ok,none": 1, "ok_stderr,none": -1, "em,none": 0.5}'
    evals.write("odd.json", '{"results": {"t": ' + odd + "}}")
    evals.write("zero.json", '{"results": {"t": {"em,none": 0}}}')
    evals.write("html.json", "<html>502</html>")
    evals.write("list.json", "[1, 2]")
    (evals.project.folder / "latin.json").write_bytes(b'{"caf\xe9": 1}')
    (evals.project.folder / "empty").mkdir()
    tasks = ", tasks: ^t$" if "score" in keys and "tasks" not in keys else ""
    with pytest.raises(kind) as error:
        evals.judge(f"{keys}{tasks}, min: 0.1")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pointer_reads_any_json_with_its_standard_error(evals):
    evals.write("own.json", {"runs": [{"a/b": 0.8}, {"a/b": 0.7, "se": 0.01}]})
    evals.write("house.json", {"runs": [{}, {"a/b": 0.75, "se": 0.02}]})
    keys = "file: own.json, reference: house.json, pointer: '/runs/1/a~1b', stderr: /runs/1/se, compare: drop"
    assert not evals.judge(f"{keys}, max: 0.01, sigmas: 2").failed
    verdict = evals.judge(f"{keys}, max: 0.01, sigmas: 1")
    assert verdict.rows[0].excess == pytest.approx(0.05 - 0.01 - math.hypot(0.02, 0.01))


@pytest.mark.process
def test_a_folder_stands_for_its_latest_results_and_name_for_the_subject(evals):
    old = copy.deepcopy(BASE)
    old["results"]["arc_easy"]["acc,none"] = 0.1
    evals.write("runs/int8/org__m/results_2026-01-31T10-00-00.000000.json", old)
    evals.write("runs/int8/org__m/results_2026-02-01T10-00-00.000000.json", BASE)
    keys, head = "file: 'runs/{name}', tasks: arc_easy, score: acc, min: 0.7", "model: {name: int8, path: nowhere}\n"
    assert not evals.judge(keys).failed
    renamed = evals.run(keys, head=head, arguments=["--qsa-model=other=nowhere"])
    assert renamed.first_line("::a0").startswith("INFRA a0: runs/other: there is no such file")


@pytest.mark.process
def test_tasks_fold_are_waived_warn_and_group_as_layers_do(evals):
    evals.own("arc_easy", "acc,none", 0.65)
    beside = f"{BESIDE}, tasks: ^arc, score: acc, compare: drop"
    waive = "waive: {layers: arc_easy, owner: evals, reason: known, until: 2999-01-01}"
    run = evals.run(
        f"{beside}, over: mean, max: 0.034",
        f"{beside}, max: 0.05, {waive}",
        f"{beside}, max: 0.05, level: warn",
        f"{beside}, max: {{arc_easy: 0.08, default: 0.01}}",
        f"{beside}, max: 0.05",
    )
    assert [run.report(f"::a{n}")["outcome"] for n in range(5)] == ["failed", "passed", "passed", "passed", "failed"]
    assert float(run.report("::a0")["properties"]["qsa_value"]) == pytest.approx(0.035)
    assert "1 of 2 tasks" in run.first_line("::a4")
    assert "arc_easy: 0.07" in run.first_line("::a4")


def test_the_noise_of_a_mean_is_that_of_independent_tasks(evals):
    beside = f"{BESIDE}, tasks: ^arc, score: acc, compare: drop, over: mean"
    (row,) = evals.judge(f"{beside}, max: 0.01, sigmas: 3").rows
    assert row.high == pytest.approx(0.01 + 3 * math.sqrt(2 * 0.0092**2 + 2 * 0.0145**2) / 2)


@pytest.mark.process
def test_an_eval_is_judged_without_torch(evals):
    evals.suite("file: base.json, tasks: arc_easy, score: acc, min: 0.7", "file: gone.json, score: acc, min: 0.7")
    code = (
        "import sys, pytest\n"
        "pytest.main(['-q', '-p', 'no:randomly', '-p', 'no:hypothesispytest'])\n"
        "print('found', [name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = evals.project.program(sys.executable, "-c", code)
    assert "1 failed, 1 passed" in done.stdout
    assert "found []" in done.stdout


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("file: f, score: acc", "an assertion on an eval needs a bound"),
        ("file: f, min: 0", "say which number: score:"),
        ("file: f, score: acc, pointer: /a, min: 0", "say which number: score:"),
        ("score: acc, min: 0", "the key 'file' is missing"),
        ("file: f, pointer: a, min: 0", "a JSON Pointer begins with a slash, such as /scores/gsm8k, not 'a'"),
        ("file: f, pointer: /a, tasks: b, min: 0", "a pointer leads to one number"),
        ("file: f, score: acc, stderr: /a, min: 0", "stderr stands beside a pointer"),
        ("file: f, score: acc, compare: drop, max: 0", "drop is against a reference: name its file"),
        ("file: f, reference: g, score: acc, max: 0", "say how the reference counts"),
        ("file: f, score: acc, sigmas: 2, min: 0", "a tolerance from the suspect alone"),
        (
            "file: f, score: acc, compare: dorp, min: 0",
            "compare: 'dorp' is none of 'value', 'recovery', 'drop' or",
        ),
        ("file: f, score: acc, layers: x, min: 0", "unknown key 'layers'"),
        ("file: 3, score: acc, min: 0", "file: "),
        ("file: f, reference: g, score: acc, compare: drop, sigmas: two, max: 0", "sigmas: "),
        ("file: f, score: acc, max: {times: 1.1, of: previous}", "max follows the last release"),
    ],
)
def test_a_wrong_key_is_told_with_its_line(tmp_path, keys, said):
    suite = tmp_path / "gate.qsa.yaml"
    suite.write_text(f"assertions:\n  - {{id: a, metric: external, {keys}}}\n")
    with pytest.raises(SuiteError, match=r"gate\.qsa\.yaml:2: ") as error:
        load_suite(suite)
    assert said in str(error.value)


def test_the_paths_of_a_base_are_relative_to_it(tmp_path):
    (tmp_path / "base").mkdir()
    entry = (
        "{id: a, metric: external, file: 'evals/{name}.json', reference: ref.json, score: acc, compare: drop, max: 0}"
    )
    (tmp_path / "base" / "b.qsa.yaml").write_text(f"assertions: [{entry}]\n")
    (tmp_path / "gate.qsa.yaml").write_text("extends: base/b.qsa.yaml\nmodel: {path: m}\n")
    (assertion,) = load_suite(tmp_path / "gate.qsa.yaml").assertions
    assert (assertion.file, assertion.reference) == ("base/evals/{name}.json", "base/ref.json")

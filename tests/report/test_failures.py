"""What a failure says: its kind first, where and on which token, what to type next; and what it leaves on disk."""

from __future__ import annotations

import json
import shlex

import pytest

from support.checkpoints import save_llama
from support.projects import Project, peaks, suite

pytestmark = pytest.mark.process

WORDS = "a b c d e f g h i j k l m <tag>#\x1b[31m n o p q r s t u v w x y z " * 2
ASSERTIONS = {
    "holds": peaks("max: 100"),
    "above": peaks("max: 1"),
    "below": peaks("min: 1000"),
    "between": peaks("min: 0, max: 7"),
    "exactly": peaks("equals: 3"),
    "summed": peaks("max: 20, over: sum"),
    "averaged": peaks("max: 20, over: mean"),
    "without-last": peaks("max: 20, over: max, exclude: 'layers.3'"),
    "first-tokens": peaks("max: 0, positions: {skip_first: 31}"),
    "reduced": r"id: x, metric: outlier_ratio, layers: layers\.\d$, site: output, reduce: mean, max: 0",
    "weights": peaks("max: 0", layers="q_proj", site="weight"),
    "reasoned": peaks("max: 1, reason: 'outliers cost us accuracy: June'"),
    "softened": peaks("max: 1, level: warn"),
    "softened-nothing": peaks("max: 1, level: warn", layers="lyers"),
    "misspelt": peaks("max: 1", layers=r"mlp\.dwn_proj$"),
    "excluded": peaks("max: 1, exclude: layers"),
    "integers": peaks("max: 1", layers="embed_tokens", site="input"),
    "no-weight": peaks("max: 1", layers="act_fn", site="weight"),
    "no-token": peaks("max: 1, positions: {skip_first: 99}"),
}
KINDS = {
    "REGRESSION": {"above", "below", "between", "exactly", "summed", "first-tokens", "reduced", "weights", "reasoned"},
    "ANOMALOUS": {"softened-nothing", "misspelt", "excluded", "integers", "no-weight", "no-token"},
}


@pytest.fixture(scope="module")
def failing(tmp_path_factory, llama):
    """Run a suite in which nearly everything fails, with every report on."""
    project = Project(tmp_path_factory.mktemp("failing") / "project")
    lines = []
    for name, line in ASSERTIONS.items():
        _, _, rest = line.partition(", ")
        lines.append(f"id: {name}, {rest}")
    project.write("a.qsa.yaml", suite(llama, *lines))
    project.write("b.qsa.yaml", suite("./nowhere", peaks("max: 1", "absent")))
    project.write("pytest.ini", "[pytest]\npythonpath = .\nfilterwarnings = default\n")
    project.run = project.pytest()
    return project


@pytest.fixture(scope="module")
def run(failing):
    return failing.run


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in sorted(names)] + [("INFRA", "absent")]
)
def test_the_kind_comes_first_in_the_text_and_in_the_summary(run, kind, name):
    assert run.first_line(f"::{name}").startswith(f"{kind} {name}: ")
    assert f".qsa.yaml::{name} - {kind}: " in run.out


def test_everything_else_passes(run):
    passed = {nodeid.partition("::")[2] for nodeid, outcome in run.outcomes.items() if outcome == "passed"}
    assert passed == {"holds", "softened", "averaged", "without-last"}


@pytest.mark.parametrize("name", ["above", "misspelt", "absent", "no-token", "summed", "excluded"])
def test_every_failure_says_how_to_run_it_again_and_that_does_it(failing, run, name):
    again = shlex.split(run.labelled(f"::{name}")["again"][0])
    assert again[0] == "pytest"
    second = failing.pytest("--qsa-report=never", *again[1:])
    assert second.code == 1
    assert list(second.outcomes.values()) == ["failed"]
    assert second.first_line(f"::{name}") == run.first_line(f"::{name}")


@pytest.mark.parametrize("name", ["above", "misspelt", "absent", "no-token", "excluded"])
def test_every_failure_names_the_line_of_its_bound(run, name):
    failure = run.report(f"::{name}")
    assert run.labelled(f"::{name}")["bound"][0].startswith(f"{failure['path'].rpartition('/')[2]}:{failure['line']}")


def test_the_worst_layers_stand_in_a_table_with_value_bound_and_excess(run):
    rows = [line.split() for line in run.text("::above").splitlines() if line.startswith("E     model.layers.")]
    assert [row[1] for row in rows] == [f"model.layers.{n}" for n in (3, 2, 1, 0)]
    assert rows[0][3:5] == ["≤", "1"]
    assert rows[0][5].startswith("+")


def test_the_first_bad_layer_is_named(run):
    assert run.labelled("::above")["begins"][0].startswith("model.layers.0, the first layer out of bounds")


def test_what_ran_is_said(run, llama):
    ran = run.labelled("::above")["ran"][0]
    assert ran.startswith(f"llama: {llama} (sha256 ")
    assert "LlamaForCausalLM float32 on cpu" in ran
    assert "2 × 32 tokens of sample, seed 0" in ran


def test_a_reason_is_shown(run):
    assert run.labelled("::reasoned")["reason"] == ["outliers cost us accuracy: June"]


def test_a_pattern_without_a_match_names_the_nearest_layers(run):
    line = run.first_line("::misspelt")
    assert r"no layer matches 'mlp\.dwn_proj$'" in line
    assert "the nearest names of 57: model.layers." in line
    assert ".mlp.down_proj" in line


def test_a_hook_that_never_fired_is_told(run):
    assert "model.embed_tokens never fired" in run.first_line("::integers")


def test_positions_without_a_token_are_told(run):
    assert run.kind("::no-token") == "ANOMALOUS"
    assert "skip_first:99" in run.first_line("::no-token")


def test_a_fold_over_layers_is_one_number(run):
    assert run.kind("::summed") == "REGRESSION"
    assert "sum of 4 layers" in run.first_line("::summed")
    assert "begins" not in run.labelled("::summed")


def test_a_softened_excess_is_a_warning_with_its_numbers_and_place(run):
    texts = [warning["text"] for warning in run.warnings if warning["kind"] == "QsaWarning"]
    assert [text.partition(":")[0] for text in texts] == ["softened"]
    assert "4 of 4 layers" in texts[0]
    assert " (a.qsa.yaml:" in texts[0]
    assert run.report("::softened")["properties"]["qsa_kind"] == "WARNED"


def test_the_end_of_the_run_says_how_the_gate_stands(run):
    total, passed = len(ASSERTIONS) + 1, 4
    assert f"qsa: {passed} of {total} assertions hold, {total - passed} fail (ANOMALOUS, INFRA, REGRESSION)" in run.out
    assert "1 of them with a warning" in run.out


def test_a_failed_run_leaves_a_report(failing):
    assert "report: qsa-results/report.html" in failing.run.out
    assert "<html" in failing.read("qsa-results/report.html")
    report = failing.json("qsa-results/report.json")
    assert report["schema"].startswith("qsa-report/")
    kinds = {result["nodeid"].partition("::")[2]: result["kind"] for result in report["results"]}
    assert kinds == (
        {name: kind for kind, names in KINDS.items() for name in names}
        | dict.fromkeys(("holds", "averaged", "without-last"), "PASSED")
        | {"softened": "WARNED", "absent": "INFRA"}
    )
    assert report["session"]["counts"]["ANOMALOUS"] == len(KINDS["ANOMALOUS"])


def test_a_report_is_strict_json(failing):
    def refuse(word):
        raise AssertionError(word)

    json.loads(failing.read("qsa-results/report.json"), parse_constant=refuse)


def test_a_report_never_turns_a_verdict_into_a_crash(failing):
    assert failing.run.code == 1
    assert "INTERNALERROR" not in failing.run.out
    assert "not written" not in failing.run.out
    assert "could not be drawn" not in failing.run.out


@pytest.mark.parametrize(
    ("mode", "test", "written"),
    [
        ("on-failure", "holds", False),
        ("on-failure", "softened", False),
        ("on-failure", "misspelt", True),
        ("always", "holds", True),
        ("never", "above", False),
    ],
)
def test_a_report_is_written_when_it_was_asked_for(failing, tmp_path, mode, test, written):
    run = failing.pytest(f"--qsa-report={mode}", f"--qsa-output={tmp_path / 'out'}", f"a.qsa.yaml::{test}")
    assert run.code in (0, 1)
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.suffix in (".html", ".json")}
    assert files == ({"report.html", "report.json"} if written else set())
    assert (tmp_path / "out").exists() == written


@pytest.mark.parametrize("shown", ["", "html", "alluredir", "GITLAB_CI"])
def test_pictures_of_a_passed_test_are_written_for_tools_that_show_them(failing, tmp_path, shown):
    other = [f"--{shown}={tmp_path / 'shown'}"] if shown.islower() else []
    always = ("--qsa-report=always", f"--qsa-output={tmp_path / 'out'}", "a.qsa.yaml::holds", *other)
    run = failing.pytest(*always, environment={"GITLAB_CI": "true"} if shown.isupper() else {})
    assert run.code == 0
    assert bool([*(tmp_path / "out").rglob("value.png")]) == bool(shown)
    page = (tmp_path / "out/report.html").read_text()
    assert "The picture is missing" not in page


def test_a_report_that_cannot_be_written_leaves_the_verdicts(failing, tmp_path):
    (tmp_path / "out").write_text("a file")
    run = failing.pytest("--qsa-report=always", f"--qsa-output={tmp_path / 'out'}", "a.qsa.yaml::holds")
    assert run.outcomes == {"a.qsa.yaml::holds": "passed"}
    assert run.code == 0
    assert "report: not written: " in run.out


@pytest.mark.parametrize("style", ["long", "line", "native", "no"])
def test_every_traceback_style_keeps_the_reason(failing, style):
    run = failing.pytest("--qsa-report=never", f"--tb={style}", "a.qsa.yaml::above")
    assert "FAILED a.qsa.yaml::above - REGRESSION: model.layers.3: " in run.out
    assert "pluggy" not in run.out.replace("pluggy-", "")


def test_a_warning_can_be_made_a_failure(failing):
    run = failing.pytest(
        "--qsa-report=never", "-W", "error::pytest_qsa.common.errors.QsaWarning", "a.qsa.yaml::softened"
    )
    assert run.outcomes == {"a.qsa.yaml::softened": "failed"}
    assert "INTERNALERROR" not in run.out


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """Run a checkpoint in which one token is loud, and one in which a weight is NaN, over words of our own."""
    import torch

    project = Project(tmp_path_factory.mktemp("loud") / "project")
    save_llama(project.folder / "plain")
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(project.folder / "plain").convert_tokens_to_ids("#")

    def shout(weights):
        weights["model.embed_tokens.weight"][token] *= 500

    def break_(weights):
        weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan

    save_llama(project.folder / "loud", shout)
    save_llama(project.folder / "nan", break_)
    project.write("words.txt", WORDS)
    outliers = r"id: outliers, metric: outlier_tokens, threshold: 8, layers: layers\.\d$, site: output, max: 0"
    for name in ("loud", "nan"):
        text = suite(f"./{name}", outliers, peaks("max: 1000"), name=name)
        data = "num_samples: 1, seq_len: 48, source: 'custom:words.txt'"
        project.write(f"{name}.qsa.yaml", text.replace("num_samples: 2, seq_len: 32", data))
    project.run = project.pytest()
    return project


def test_the_tokens_behind_a_number_are_shown_in_their_context(loud):
    text = loud.run.text("loud.qsa.yaml::outliers")
    assert "⟦#⟧" in text
    line = next(line for line in text.splitlines() if "⟦#⟧" in line)
    assert "<tag>⟦#⟧" in line
    assert "at sample 0, position " in line


def test_control_characters_of_a_text_cannot_reach_the_terminal(loud):
    text = loud.run.text("loud.qsa.yaml::outliers")
    assert "\x1b[31m" not in text
    assert "\\x1b" in text


def test_a_model_with_a_nan_is_anomalous_and_says_where(loud):
    for name in ("outliers", "peaks"):
        line = loud.run.first_line(f"nan.qsa.yaml::{name}")
        assert line.startswith(f"ANOMALOUS {name}: ")
        assert "model.layers.2 " in line


def test_a_nan_does_not_harm_the_report(loud):
    assert "not written" not in loud.run.out
    assert "could not be drawn" not in loud.run.out
    assert "INTERNALERROR" not in loud.run.out
    assert loud.json("qsa-results/report.json")["session"]["counts"]["ANOMALOUS"] == 2


@pytest.mark.parametrize("name", ["v2=", ""])
def test_the_command_keeps_the_options_and_the_ini_file_of_the_run(tmp_path, llama, name):
    project = Project(tmp_path / "a project")
    project.write("pytest.ini", "[pytest]\nqsa_report = never\n")
    project.write("the suites/a.qsa.yaml", suite("x", peaks("max: 1")))
    first = project.pytest(f"--qsa-model={name}{llama}", "--qsa-set=assertions.peaks.max=2", "--qsa-set=data.seed=3")
    command = first.labelled("::peaks")["again"][0]
    second = project.pytest(*shlex.split(command)[1:])
    assert second.first_line("::peaks") == first.first_line("::peaks")
    assert "(max 2)" in second.first_line("::peaks")
    assert "seed 3" in second.labelled("::peaks")["ran"][0]
    assert "configfile: pytest.ini" in second.out
    assert not (project.folder / "qsa-results").exists()


def test_equal_ids_in_two_suites_have_plots_of_their_own(tmp_path, llama):
    project = Project(tmp_path / "project")
    for name, bound in (("a", 1), ("b", 2)):
        project.write(f"{name}.qsa.yaml", suite(llama, peaks(f"max: {bound}")))
    project.pytest()
    first, second = (result["artefacts"] for result in project.json("qsa-results/report.json")["results"])
    assert len(first) > 1
    common = set(first.values()) & set(second.values())
    assert common == {"qsa-results/report.html"}

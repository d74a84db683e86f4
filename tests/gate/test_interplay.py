"""Beside other plugins, and without those that one may switch off."""

from __future__ import annotations

import pytest

from support.checkpoints import edited
from support.projects import Project, peaks, suite

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def gate(tmp_path_factory, llama):
    """Return a project in which one assertion holds, one fails, and one has a baseline."""
    project = Project(tmp_path_factory.mktemp("gate") / "project")
    lines = [peaks("max: 100", "holds"), peaks("max: 1", "above"), peaks("baseline: {rel: 0.05}", "drift")]
    project.write("a.qsa.yaml", suite(llama, *lines))
    project.write("test_plain.py", "def test_plain():\n    '''\n    >>> 1\n    1\n    '''\n")
    made = project.pytest("--snapshot-update", "--qsa-report=never")
    project.usual = made.outcomes
    return project


@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", "no:cacheprovider"],
        ["-p", "no:terminal"],
        ["-p", "no:tmpdir"],
        ["-p", "no:warnings"],
        ["-p", "no:logging"],
        ["-p", "no:capture"],
        ["-p", "no:junitxml"],
        ["-s", "-vv"],
        ["--doctest-modules"],
        ["--import-mode=importlib"],
        ["-x", "--maxfail=9"],
        ["--setup-show"],
        ["-n0"],
        ["--color=yes"],
        ["-rA", "--durations=3"],
        ["--strict-markers", "--strict-config"],
    ],
    ids=" ".join,
)
def test_the_gate_says_the_same(gate, arguments):
    run = gate.pytest(*arguments, "--qsa-report=never")
    assert run.code == 1, run.out
    assert "INTERNALERROR" not in run.out
    assert {nodeid: run.outcomes[nodeid] for nodeid in gate.usual} == gate.usual
    assert run.report("::above")["crash"].startswith("REGRESSION: model.layers.3: ")


def test_without_syrupy_a_baseline_says_so_and_the_rest_works(gate):
    run = gate.pytest("-p", "no:syrupy", "--qsa-report=never")
    assert run.outcomes["a.qsa.yaml::holds"] == "passed"
    assert run.first_line("::above").startswith("REGRESSION above: ")
    line = run.first_line("::drift")
    assert "a baseline needs syrupy" in line
    assert "-p no:syrupy" in line
    assert ".py:" not in run.text("::drift")


def test_another_fixture_of_the_name_snapshot_is_told(own_project, llama):
    own_project.write("conftest.py", "import pytest\n@pytest.fixture\ndef snapshot(): return 3\n")
    own_project.write("a.qsa.yaml", suite(llama, peaks("baseline: {rel: 0.05}")))
    line = own_project.pytest("--qsa-report=never").first_line("::peaks")
    assert "the fixture 'snapshot' is not syrupy's" in line


def test_plugins_can_be_named_instead_of_found(gate):
    plugins = ("-p", "pytest_qsa.plugin", "-p", "syrupy")
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = gate.pytest(*plugins, "--qsa-report=never", environment=environment)
    assert {nodeid: run.outcomes[nodeid] for nodeid in gate.usual} == gate.usual
    run = gate.pytest(*plugins[:2], "--qsa-report=never", environment=environment)
    assert run.outcomes["a.qsa.yaml::holds"] == "passed"
    assert "a baseline needs syrupy" in run.first_line("::drift")


def test_without_the_plugin_suites_are_no_tests(gate):
    run = gate.pytest("-p", "no:qsa", "-W", "ignore")
    assert run.outcomes == {"test_plain.py::test_plain": "passed"}


def test_pytest_html_shows_the_failure(gate):
    run = gate.pytest("--html=page.html", "--self-contained-html", "--qsa-report=never")
    assert run.code == 1
    page = gate.read("page.html")
    assert "REGRESSION above: model.layers.3: " in page


def test_reruns_run_it_again_and_report_it_once(gate):
    run = gate.pytest("--reruns=1", "a.qsa.yaml::above", "a.qsa.yaml::holds", "--qsa-output=again")
    assert run.code == 1
    assert "1 rerun" in run.out
    assert run.first_line("::above").startswith("REGRESSION above: ")
    results = [result["nodeid"] for result in gate.json("again/report.json")["results"]]
    assert sorted(results) == ["a.qsa.yaml::above", "a.qsa.yaml::holds"]
    assert run.out.count("qsa: 1 of 2 assertions ") == 1


@pytest.fixture(scope="module")
def broken(tmp_path_factory, llama):
    """Run suites over a checkpoint without its last norm, one whose file is cut short, one without a tokenizer of JSON.

    Also over results of an eval that are no JSON; all with reruns.
    """
    project = Project(tmp_path_factory.mktemp("broken") / "project")
    lost = edited(llama, project.folder / "lost", lambda weights: weights.pop("model.norm.weight"))
    cut = edited(llama, project.folder / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    project.write("a.qsa.yaml", suite(lost, peaks("max: 9"), peaks("max: 8", "again"), peaks("baseline: {}", "kept")))
    keys = ("id: keys, metric: checkpoint_keys, max: 0", "id: scales, metric: checkpoint_weights, max: 0")
    project.write("b.qsa.yaml", suite(cut, *keys, peaks("max: 9", "cut")))
    text = edited(llama, project.folder / "text")
    (text / "tokenizer.json").write_text("{,")
    evals = ("id: first, metric: external, file: r.json, pointer: /a, max: 1",)
    evals += ("id: second, metric: external, file: r.json, pointer: /b, max: 1",)
    settings = ("id: settings, metric: checkpoint_settings, max: 0", "id: health, metric: checkpoint_health, max: 0")
    both = suite(f"{text}, reference: {llama}", *settings, peaks("max: 9", "text"), *evals)
    project.write("c.qsa.yaml", both)
    project.write("r.json", "{")
    project.write("test_lost.py", "def test_lost(qsa): assert qsa.output('up_proj').rms() <= 3")
    return project, project.pytest("--reruns=2", "--qsa-config=a.qsa.yaml", "--junitxml=junit.xml")


def test_what_stops_many_tests_is_told_by_the_first(broken):
    _, run = broken
    assert "LlamaForCausalLM" in run.first_line("a.qsa.yaml::peaks")
    assert "cut short" in run.first_line("::keys")
    assert "tokenizer.json is no JSON" in run.first_line("::settings")
    assert "r.json: is no JSON" in run.first_line("::first")
    elsewhere = {
        "a.qsa.yaml::again": "a.qsa.yaml::peaks", "a.qsa.yaml::kept": "a.qsa.yaml::peaks",
        "::test_lost": "a.qsa.yaml::peaks", "::scales": "b.qsa.yaml::keys", "::cut": "b.qsa.yaml::keys",
        "::health": "c.qsa.yaml::settings", "::text": "c.qsa.yaml::settings", "::second": "c.qsa.yaml::first",
    }  # fmt: skip
    for test, first in elsewhere.items():
        [line] = run.text(test).splitlines()
        assert line.startswith("E   ANOMALOUS ")
        assert "could not be judged" in line
        assert line.endswith(f"; {first} has the reason")
    assert run.report("::again")["crash"].startswith("ANOMALOUS: could not be judged")


def test_what_another_attempt_would_meet_again_is_not_run_again(broken):
    assert "rerun" not in broken[1].out.splitlines()[-1]
    assert broken[0].read("junit.xml").count("<failure") == 12


def test_a_test_that_is_expected_to_fail_is_not_the_one_that_tells(broken):
    mark = "import pytest\ndef pytest_collection_modifyitems(items): items[0].add_marker(pytest.mark.xfail)"
    broken[0].write("conftest.py", mark)
    run = broken[0].pytest("--qsa-report=never", "a.qsa.yaml")
    assert "LlamaForCausalLM" in run.first_line("::again")
    assert run.first_line("::kept").endswith("a.qsa.yaml::again has the reason")


def test_random_order_changes_nothing(gate):
    runs = [gate.pytest("--randomly-seed", seed, "--qsa-report=never") for seed in (1, 2, 3)]
    assert [run.outcomes for run in runs] == [gate.usual] * 3
    assert len({tuple(run.collected) for run in runs}) > 1


def test_an_annotation_of_a_ci_points_into_the_suite(gate):
    run = gate.pytest("--qsa-report=never", "a.qsa.yaml::above", environment={"CI": "true", "GITHUB_ACTIONS": "true"})
    line = next(line for line in run.out.splitlines() if line.startswith("FAILED a.qsa.yaml::above"))
    assert line.startswith("FAILED a.qsa.yaml::above - REGRESSION: model.layers.3: ")


def test_a_mark_of_skip_or_xfail_can_be_added_to_an_assertion(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 1", "skipped"), peaks("max: 1", "expected")))
    own_project.write(
        "conftest.py",
        """
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                item.add_marker(pytest.mark.skip("later") if item.name == "skipped" else pytest.mark.xfail(strict=True))
        """,
    )
    run = own_project.pytest()
    assert run.code == 0, run.out
    assert "1 skipped, 1 xfailed" in run.out


def test_an_expected_failure_is_no_failure_of_the_gate(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 1", "expected")))
    own_project.write(
        "conftest.py",
        """
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                item.add_marker(pytest.mark.xfail)
        """,
    )
    run = own_project.pytest()
    assert run.code == 0
    assert "1 fail" not in run.out
    assert not (own_project.folder / "qsa-results/report.html").exists()


def test_interrupting_leaves_the_verdicts_so_far(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 1", "above")))
    own_project.write("test_z.py", "def test_z():\n    raise KeyboardInterrupt\n")
    run = own_project.pytest()
    assert run.code == 2
    assert "INTERNALERROR" not in run.out
    assert [result["id"] for result in own_project.json("qsa-results/report.json")["results"]] == ["above"]

"""Metrics of a user's own, of a conftest or an entry point: gated in YAML and Python, with baselines; what can't be."""

from __future__ import annotations

import numpy as np
import pytest

from pytest_qsa import SuiteError, View, capture, metric
from pytest_qsa.cli import main
from pytest_qsa.metrics.registry import METRICS
from support import models
from support.projects import Project, suite

BLOCKS = r"layers\.\d$"
CONFTEST = """
    import numpy as np
    import pytest_qsa


    @pytest_qsa.metric(statistics=["moments"], reduce="max", unit="× rms", sites=("input", "output"), version=3)
    def crest(view: pytest_qsa.View, *, power: float = 1.0) -> np.ndarray:
        \"\"\"Divide the largest |x| of a sample by its root mean square, to a power.\"\"\"
        n, mean, m2, largest = (view.numbers.moment(name) for name in ("n", "mean", "m2", "absmax"))
        return (largest / np.sqrt(mean**2 + m2 / n)) ** power
"""
ASSERTED = rf"id: crest, metric: crest, layers: '{BLOCKS}', site: output"

SQUARED = f"{ASSERTED}, power: 2, min: 1e9".replace("id: crest", "id: squared")


@pytest.fixture
def forgetting():
    """Let a test register metrics of this module's own."""
    yield
    for name in [name for name, known in METRICS.items() if known.origin]:
        del METRICS._others[name]


@pytest.fixture
def project(tmp_path, llama):
    made = Project(tmp_path / "project")
    made.write("conftest.py", CONFTEST)
    made.write(
        "a.qsa.yaml",
        suite(llama, f"{ASSERTED}, max: 1000", SQUARED),
    )
    return made


@pytest.mark.process
def test_a_conftests_metric_is_gated_in_yaml(project):
    run = project.pytest("a.qsa.yaml", "--qsa-report=always")
    assert run.outcomes == {"a.qsa.yaml::crest": "passed", "a.qsa.yaml::squared": "failed"}, run.out
    text = run.text("squared")
    assert "crest(power=2)" in text
    assert "× rms" in text
    (verdict,) = (v for v in project.json("qsa-results/report.json")["results"] if v["id"] == "squared")
    assert (verdict["query"]["definition"], verdict["query"]["reduce"]) == ("conftest:crest/3", "max")


@pytest.mark.process
def test_its_baseline_remembers_its_origin_and_version(project, llama):
    project.write("a.qsa.yaml", suite(llama, f"{ASSERTED}, baseline: {{rel: 0.01}}"))
    made = project.pytest("a.qsa.yaml", "--snapshot-update")
    assert made.code == 0, made.out
    assert project.json("qsa_baselines/llama/a/crest.json")["query"]["definition"] == "conftest:crest/3"
    assert project.pytest("a.qsa.yaml").code == 0
    project.write("conftest.py", CONFTEST.replace("version=3", "version=4"))
    assert "ANOMALOUS" in project.pytest("a.qsa.yaml").first_line("crest")


@pytest.mark.process
def test_a_wrong_key_of_its_assertion_is_told_as_any_other(project, llama):
    project.write("a.qsa.yaml", suite(llama, f"{ASSERTED}, max: 3, powr: 2"))
    run = project.pytest("a.qsa.yaml")
    assert "a.qsa.yaml:4: unknown key 'powr' (did you mean 'power'?)" in run.out
    project.write("a.qsa.yaml", suite(llama, f"{ASSERTED}, max: 3, power: much"))
    assert "a.qsa.yaml:4: power: " in project.pytest("a.qsa.yaml").out


@pytest.mark.process
def test_python_tests_ask_for_it_as_for_any_other(project):
    project.write("test_p.py", f"""
        import pytest

        @pytest.mark.qsa(layers=r"{BLOCKS}", site="output", metric="crest")
        def test_crest(qsa):
            assert qsa.output(r"{BLOCKS}").crest(2) >= 1
    """)  # fmt: skip
    run = project.pytest("test_p.py", "--qsa-config=a.qsa.yaml")
    assert run.code == 0, run.out


@pytest.mark.process
def test_an_entry_point_is_loaded_when_a_suite_names_what_is_unknown(project, llama):
    project.write("conftest.py", "")
    project.write("team_metrics.py", CONFTEST + "\n    print('the entry point came')\n")
    folder = "team_metrics-1.0.dist-info"
    project.write(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: team-metrics\nVersion: 1.0\n")
    project.write(f"{folder}/entry_points.txt", "[pytest_qsa.metrics]\nteam = team_metrics\n")
    run = project.pytest("a.qsa.yaml", "-k", "crest", "--qsa-report=always", "-s")
    assert run.code == 0, run.out
    (verdict,) = project.json("qsa-results/report.json")["results"]
    assert verdict["query"]["definition"] == "team_metrics:crest/3"
    rms = f"id: rms, metric: rms, layers: '{BLOCKS}', site: output, max: 1e9"
    project.write("a.qsa.yaml", suite(llama, rms, "id: files, metric: checkpoint_health"))
    assert "the entry point came" not in project.pytest("a.qsa.yaml", "-s").out
    project.write("conftest.py", CONFTEST)
    project.write("a.qsa.yaml", suite(llama, f"{ASSERTED}, max: 1000", "id: b, metric: unknown, max: 1"))
    assert "team_metrics.py:6: a metric 'crest' is already defined by conftest" in project.pytest("a.qsa.yaml").out


@pytest.mark.process
def test_qsa_says_that_it_imports_no_conftest(project, capsys):
    code = main(["layers", "--config", str(project.folder / "a.qsa.yaml")])
    shown = capsys.readouterr()
    assert code != 0
    assert "unknown metric 'crest'" in shown.err
    assert "qsa imports no conftest.py" in shown.err


@pytest.mark.parametrize(("arguments", "name", "said"), [
    ({"statistics": ["moments"]}, "rms", "'rms' is a name of pytest-qsa's own"),
    ({"statistics": ["moments"]}, "external", "'external' is a name of pytest-qsa's own"),
    ({"statistics": ["moment"]}, "mine", "unknown statistic 'moment' (did you mean 'moments'?)"),
    ({"statistics": ["massive:100"]}, "mine", "'massive:100' is not of the form massive:absolute:ratio"),
])  # fmt: skip
def test_a_metric_that_cannot_be_is_told_with_its_line(forgetting, arguments, name, said):
    def compute(view: View) -> float:
        return 0.0

    compute.__name__ = name
    with pytest.raises(SuiteError, match=r"test_users_metrics\.py:\d+: ") as caught:
        metric(**arguments)(compute)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parameter_needs_a_type_and_a_default(forgetting):
    with pytest.raises(SuiteError, match="the parameter 'q' of mine needs a type and a default"):

        @metric(["moments"])
        def mine(view: View, *, q: float) -> float:
            return q


def test_a_metric_on_tokens_takes_positions_and_one_of_each_population_is_folded(forgetting):
    @metric(["tokens"], reduce="sum", unit="tokens")
    def loud(view: View, *, above: float = 2.0) -> np.ndarray:
        """Count the tokens above a value."""
        return np.array([float(np.count_nonzero(maxima > above)) for maxima in view.token_maxima()])

    values = np.ones((2, 4, 3), dtype=np.float32)
    values[0, 0, 1] = values[1, 2, 0] = 3.0
    model = models.Scripted(values)
    cap = capture(model, [models.numbered(model)], sites=[("0", "output")], statistics=["loud"])
    selected = cap.output("0")
    assert selected.loud().values == [2]
    assert selected.loud(above=1, positions={"skip_first": 1}).values == [1]
    assert selected.loud(5).values == [0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'beyond'"):
        selected.loud(beyond=1)
    with pytest.raises(AttributeError, match=r"there is no metric 'lou' .did you mean 'loud'"):
        selected.lou()


def test_numbers_of_populations_need_a_reduction(forgetting):
    @metric(["tokens"])
    def loudest(view: View) -> np.ndarray:
        return np.array([maxima.max() for maxima in view.token_maxima()])

    model = models.Scripted(np.ones((2, 4, 3), dtype=np.float32))
    cap = capture(model, [models.numbered(model)], sites=[("0", "output")], statistics=["loudest"])
    with pytest.raises(SuiteError, match="loudest returns a number for each population: say reduce="):
        cap.output("0").loudest()

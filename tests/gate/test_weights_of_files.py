"""Weights that a suite reads from the checkpoint's files: without a model, beside a pass, and where none can run."""

import ast
import shutil
import sys

import pytest

from pytest_qsa import Capture
from support.projects import peaks, suite

pytestmark = pytest.mark.process
CLOSE = "id: close, metric: weight_sqnr, layers: _proj$, min: 20"
RMS = "id: rms, metric: rms, site: weight, layers: _proj$, min: 0.1, max: 0.3"
HEAVY = ("torch", "transformers", "accelerate", "datasets", "tokenizers")


def suite_of(checkpoint, *assertions, weights="files", reference=None):
    named = f", reference: {reference}" if reference else ""
    return suite(checkpoint, *assertions).replace("}", f"{named}, weights: {weights}}}", 1)


@pytest.fixture
def gate(own_project):
    """Return a function that runs a suite."""

    def run(text, *arguments):
        own_project.write("gate.qsa.yaml", text)
        return own_project.pytest("gate.qsa.yaml", "--qsa-report=never", *arguments)

    return run


def copied(folder, target, *without):
    return shutil.copytree(folder, target, ignore=lambda _, names: [name for name in names if name in without])


def test_a_suite_of_weights_alone_imports_no_torch(own_project, int8_llama, llama):
    own_project.write("gate.qsa.yaml", suite_of(int8_llama, CLOSE, RMS, reference=llama))
    code = (
        "import sys, pytest; code = pytest.main(['gate.qsa.yaml', '-q', '-p', 'no:randomly', '--qsa-report=never'])\n"
        f"print([int(code), *(name for name in {HEAVY} if name in sys.modules)])"
    )
    run = own_project.program(sys.executable, "-c", code)
    assert ast.literal_eval(run.stdout.splitlines()[-1]) == [0], run.stdout


def test_a_verdict_says_that_its_weights_are_those_of_the_files(gate, int8_llama, llama):
    run = gate(suite_of(int8_llama, "id: low, metric: weight_sqnr, layers: _proj$, min: 99", reference=llama))
    assert run.kind("low") == "REGRESSION"
    (ran,) = run.labelled("low")["ran"]
    assert "weights read from the files (" in ran
    assert "compressed-tensors int-quantized" in ran
    assert str(llama) in ran
    assert "weight_sqnr(by=tensor) at the weight of '_proj$', read from the files" in run.text("low")


def test_weights_need_neither_data_nor_a_tokenizer_and_a_failed_pass_leaves_them_judged(gate, int8_llama, tmp_path):
    bare = copied(int8_llama, tmp_path / "bare", "tokenizer.json", "tokenizer_config.json")
    run = gate(suite_of(bare, RMS, peaks("max: 100")))
    assert run.report("rms")["outcome"] == "passed"
    assert run.kind("peaks") == "ANOMALOUS"
    assert "tokenizer" in run.text("peaks")


def test_beside_a_pass_the_weights_are_still_those_of_the_files(gate, int8_llama):
    run = gate(suite_of(int8_llama, RMS.replace("max: 0.3", "max: 0.11"), peaks("max: 0")))
    assert "weights read from the files" in run.labelled("rms")["ran"][0]
    assert "weights read from the files" not in run.labelled("peaks")["ran"][0]
    assert "W8A8 emulated" in run.labelled("peaks")["ran"][0]


def test_files_are_read_where_the_installed_libraries_cannot_load_the_format(gate, quantized, llama):
    unloadable = quantized["int4 with zero points"]
    close = CLOSE.replace("min: 20", "min: 5")
    gain = "id: gain, metric: weight_gain, layers: _proj$, max: 9"  # of the files in any case, by other numbers
    after = close.replace("id: close", "id: after")
    run = gate(suite_of(unloadable, close, gain, after, peaks("max: 100"), weights="loaded", reference=llama))
    assert [run.report(name)["outcome"] for name in ("close", "gain", "after")] == ["passed"] * 3
    assert run.kind("peaks") == "INFRA"
    assert "can't load the format" in run.text("peaks")
    told = [each["text"] for each in run.warnings if "read from the files" in each["text"]]
    assert len(told) == 2
    assert "can't load the format" in told[0]


def test_a_weight_that_the_files_hold_in_an_unknown_way_stops_only_what_needs_it(gate, int8_llama, tmp_path):
    folder = copied(int8_llama, tmp_path / "unknown")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"compressed-tensors"', '"of tomorrow"'))
    run = gate(suite_of(folder, RMS, "id: norms, metric: rms, site: weight, layers: norm$, min: 0.9, max: 1.1"))
    assert run.report("norms")["outcome"] == "passed"
    assert run.kind("::rms") == "INFRA"
    assert "model.layers.0.mlp.down_proj (and 27 more)" in run.first_line("::rms")


def test_a_baseline_of_loaded_weights_holds_for_those_of_the_files(gate, int8_llama):
    drift = "id: drift, metric: rms, site: weight, layers: _proj$, baseline: {rel: 0.01}"
    assert gate(suite_of(int8_llama, drift, weights="loaded"), "--snapshot-update").code == 0
    run = gate(suite_of(int8_llama, drift))
    assert run.outcomes == {"gate.qsa.yaml::drift": "passed"}


def test_loaded_weights_are_never_asked_of_files_that_nothing_loads(gate, int8_llama):
    run = gate(suite_of(int8_llama, "id: loader, metric: loaded_weights, layers: _proj$"))
    assert run.code == 2
    assert "gate.qsa.yaml:4: loaded_weights holds a loaded model against its files" in run.out


def test_numbers_of_files_and_of_a_loaded_model_are_kept_apart(gate, int8_llama):
    low = RMS.replace("max: 0.3", "max: 0.11")
    runs = [gate(suite_of(int8_llama, low, weights=weights)) for weights in ("loaded", "files", "loaded", "files")]
    assert ["read from the files" in run.labelled("rms")["ran"][0] for run in runs] == [False, True, False, True]


@pytest.mark.parametrize("weights", ["loaded", "files"])
def test_workers_read_the_files_once_and_agree(gate, quantized, llama, weights):
    close = [CLOSE.replace("min: 20", "min: 5").replace("close", f"close{index}") for index in range(3)]
    folder = quantized["int4 with zero points"]  # which can't be loaded here
    run = gate(suite_of(folder, *close, weights=weights, reference=llama), "-n", "2")
    assert list(run.outcomes.values()) == ["passed"] * 3, run.out


def test_a_capture_file_holds_weights_of_the_files_beside_the_pass(own_project, int8_llama):
    own_project.write("gate.qsa.yaml", suite_of(int8_llama, RMS, peaks("max: 100")))
    own_project.program(sys.executable, "-m", "pytest_qsa", "capture", "--config", "gate.qsa.yaml", "-o", "all.qsa")
    capture = Capture.load(own_project.folder / "all.qsa")
    assert len(capture.weight("_proj$").rms().layers) == 28
    assert len(capture.output(r"layers\.\d$").absmax().layers) == 4
    assert "weights read from the files (" in capture.provenance.summary("llama")
    assert "executed as W8A8 emulated" in capture.provenance.summary("llama")


def test_bounds_of_weights_of_the_files_can_be_calibrated(own_project, int8_llama, llama):
    own_project.write("gate.qsa.yaml", suite_of(int8_llama, CLOSE, reference=llama))
    run = own_project.program(sys.executable, "-m", "pytest_qsa", "calibrate", "gate.qsa.yaml")
    assert "llama: its files, which no data changes" in run.stdout
    assert "min 20" in run.stdout


def test_a_python_test_gets_weights_of_the_files_and_activations_of_the_pass(own_project, int8_llama):
    own_project.write("gate.qsa.yaml", suite_of(int8_llama, RMS))
    own_project.write(
        "test_python.py",
        r"""
        import pytest

        @pytest.mark.qsa(layers=r"down_proj$", site="weight")
        @pytest.mark.qsa(layers=r"layers\.\d$", site="output")
        def test_both(qsa):
            assert qsa.weight(r"down_proj$").rms() <= 0.3
            assert qsa.output(r"layers\.\d$").absmax() <= 100
            assert qsa.capture_at("weight").provenance.weights_read
            assert qsa.capture_at("output").provenance.execution is not None
        """,
    )
    run = own_project.pytest("--qsa-config=gate.qsa.yaml", "test_python.py", "--qsa-report=never")
    assert run.outcomes == {"test_python.py::test_both": "passed"}, run.out

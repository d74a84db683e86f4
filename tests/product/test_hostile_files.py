"""Files that anyone may have written, through each of their readers: one line that names the file, no traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from pytest_qsa.captures import Capture
from pytest_qsa.checkpoint.folder import Folder
from pytest_qsa.cli import main
from pytest_qsa.common import BLANK, AnomalyError, BaselineError, InfraError, QsaError, checked_json, with_checksum
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.load.sources import read_texts
from pytest_qsa.engine.modules import forward_errors
from pytest_qsa.engine.reference.reference_file import ReferenceFile
from pytest_qsa.external import EvalFiles, eval_scores
from pytest_qsa.external.logprobs import read_logprobs
from pytest_qsa.external.paired import _lines
from pytest_qsa.report.report import read_report
from pytest_qsa.suite import Data, ExternalAssertion, Memory, Model
from pytest_qsa.verdicts.baseline_file import BaselineFile, baseline_hashes, is_baseline, read_baseline


def tensors(header):
    """Return a safetensors file with a text as the header of this package."""
    return save({"x": np.zeros(2, np.float32)}, metadata={"qsa": header})


def texts_of(file):
    return read_texts(Data(source=f"custom:{file}"), file.parent)


READERS = {
    "baseline.json": (
        '{"format": "qsa-baseline/1", "query": DEEP, "data": null, "values": {}}',
        lambda file: BaselineFile.parse(file.read_text()),
    ),
    "capture.qsa": ('{"format": "qsa-capture/1", "x": DEEP}', Capture.load),
    "reference.qsa": ('{"format": "qsa-reference/1", "x": DEEP}', ReferenceFile.open),
    "hashes.json": ('{"checksum": DEEP}', lambda file: checked_json(file.read_bytes())),
    "config.json": ('{"a": DEEP}', lambda file: Folder(file.parent).json(file.name)),
    "samples.jsonl": ('{"a": DEEP}', lambda file: list(_lines(file))),
    "logprobs.json": ("DEEP", read_logprobs),
    "data.json": ("DEEP", texts_of),
    "data.jsonl": ("DEEP", texts_of),
}


# 600 is a depth that Python's own parser takes.
@pytest.mark.parametrize("depth", [600, 100_000])
@pytest.mark.parametrize("name", READERS)
def test_json_that_is_nested_deeply_is_one_line(tmp_path, name, depth):
    content, read = READERS[name]
    text = content.replace("DEEP", "[" * depth + "]" * depth)
    file = tmp_path / name
    file.write_bytes(tensors(text) if name.endswith(".qsa") else text.encode())
    with pytest.raises(QsaError) as caught:
        read(file)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_nested_too_deeply_is_no_report_and_no_hash_of_a_baseline(tmp_path):
    file = tmp_path / "report.json"
    deep = "[" * 600 + "]" * 600
    file.write_text(f'{{"schema": "qsa-report/1", "checksum": {deep}}}')
    assert read_report(file) is None
    file.write_text(READERS["baseline.json"][0].replace("DEEP", deep))
    assert baseline_hashes(tmp_path) == {"report.json": "unreadable"}


SIZES = {1 << 20: "it has no header", 200 << 30: "has 214,748 MB, more than the 8,590 MB that are read"}


@pytest.mark.parametrize("size", SIZES)
def test_a_capture_that_pretends_to_be_large_is_not_read(tmp_path, size, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda file: 1 / 0)
    with (tmp_path / "a.qsa").open("wb") as file:
        file.truncate(size)
    with pytest.raises(InfraError, match=rf"a\.qsa: can't be read as a capture: (not a whole capture: )?{SIZES[size]}"):
        Capture.load(tmp_path / "a.qsa")


HEADERS = (
    {"meta": 5},
    {},
    {"meta": {"model": 5}},
    {"meta": {}, "samples": 5},
    {"meta": {}, "samples": [], "streams": [5]},
)


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_a_kept_reference_with_a_checksum_of_its_own_and_another_header_is_one_line(tmp_path, header):
    text = json.dumps({"checksum": BLANK, "format": "qsa-reference/1", **header})
    (tmp_path / "a.qsa").write_bytes(with_checksum(tensors(text)))
    with pytest.raises(InfraError, match=r"a\.qsa: its header is not whole \(\w+: .*\); make it anew"):
        ReferenceFile.open(tmp_path / "a.qsa")


def test_whole_numbers_that_no_float_holds_are_one_line(tmp_path):
    large = "9" * 400
    content = (
        f'{{"format": "qsa-baseline/1", "query": {{}}, "data": null, "made_with": {{}}, "values": {{"a": {large}}}}}'
    )
    with pytest.raises(BaselineError, match="too large"):
        BaselineFile.parse(content.replace("LARGE", large))
    (tmp_path / "a.json").write_text(f'{{"a": {large}}}')
    assertion = ExternalAssertion(id="a", metric="external", file="a.json", pointer="/a", min=0.0)
    with pytest.raises(AnomalyError, match=r"a\.json: /a is 9{60}: the eval saw nothing sound"):
        eval_scores(assertion, EvalFiles(tmp_path, "m", "", None))


def test_a_document_in_a_csv_may_be_long_and_its_mistakes_are_one_line(tmp_path):
    (tmp_path / "a.csv").write_text(f'text\n"{"x" * 200_000}"\n')
    assert read_texts(Data(source="custom:a.csv"), tmp_path) == ["x" * 200_000]
    (tmp_path / "a.csv").write_text("text\na\rb\n", newline="")
    with pytest.raises(InfraError, match=r"a\.csv: can't be read as data"):
        read_texts(Data(source="custom:a.csv", custom={"text_column": "none"}), tmp_path)


class SpeechlessError(Exception):
    def __str__(self):
        raise ValueError("no text")


RAISED = {
    SystemExit(3): "SystemExit: 3",
    SpeechlessError(): "SpeechlessError: SpeechlessError",
    MemoryError(): "MemoryError: MemoryError",
    RuntimeError("\n\nfirst\nsecond"): "RuntimeError: first",
}


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_forward_pass_raises_is_one_line(error):
    with pytest.raises(InfraError) as caught, forward_errors("Llama"):
        raise error
    assert str(caught.value) == f"the forward pass of Llama failed: {RAISED[error]}"


def test_whoever_stops_a_run_stops_it():
    with pytest.raises(KeyboardInterrupt), forward_errors("Llama"):
        raise KeyboardInterrupt


FACTORIES = {
    "return 1, 2, 3": "returned tuple",
    "return 5": "returned int",
    "raise SystemExit(3)": "failed: SystemExit: 3",
    "import pytest; pytest.skip('never')": "failed: Skipped: never",
}


@pytest.mark.parametrize(("code", "said"), FACTORIES.items())
def test_a_factory_that_makes_no_model_is_one_line(tmp_path, monkeypatch, code, said):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"made_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(f"def make():\n    {code}\n")
    with pytest.raises(InfraError, match=f"model.factory '{name}:make' {said}"):
        load_model(Model(factory=f"{name}:make"), "", Memory(), allow_code=True)


COMMANDS = (["layers"], ["check"], ["diff", "x"], ["init"], ["capture", "-o", "x.qsa"])


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_path_that_no_system_takes_is_one_line(capsys, command):
    assert main([*command, "a" * 5000]) != 0
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith("qsa: ")


@pytest.mark.process
def test_a_pattern_that_would_take_years_is_a_verdict_at_its_line(own_project, llama):
    own_project.write(
        "a.qsa.yaml",
        f"model: {{path: '{llama}'}}\nassertions:\n  - id: a\n    metric: checkpoint_health\n"
        "    layers: '(?=(\\w|.)*[A-Z])'\n  - {id: b, metric: checkpoint_keys}\n",
    )
    run = own_project.pytest("a.qsa.yaml")
    assert run.outcomes == {"a.qsa.yaml::a": "failed", "a.qsa.yaml::b": "passed"}
    assert "INFRA a: the regex '(?=(\\w|.)*[A-Z])' takes more than 2 s for the names" in run.text("::a")
    assert "a.qsa.yaml:3" in run.text("::a")


def test_a_baseline_or_a_report_that_is_a_device_or_a_pipe_is_not_read(tmp_path):
    device, pipe = tmp_path / "device.json", tmp_path / "pipe.json"
    device.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    for file in (device, pipe):
        assert not is_baseline(file)
        for read in (read_baseline, read_report):
            with pytest.raises(InfraError, match="is no regular file, so it isn't read"):
                read(file)

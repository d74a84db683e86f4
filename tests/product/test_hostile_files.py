"""Files that anyone may have written, through each of their readers: one line that names the file, no traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from pytest_qsa.captures import Capture
from pytest_qsa.checkpoint.folder import Folder
from pytest_qsa.common import InfraError, QsaError, checked_json
from pytest_qsa.engine.load.data import read_texts
from pytest_qsa.engine.reference.reference_file import ReferenceFile
from pytest_qsa.external.logprobs import read_logprobs
from pytest_qsa.external.paired import _lines
from pytest_qsa.report.report import read_report
from pytest_qsa.suite import Data
from pytest_qsa.verdicts.baseline_file import BaselineFile, baseline_hashes


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


SIZES = {1 << 20: "it has no header", 200 << 30: "has 214,748 MB, and of more than 8,590 it isn't read"}


@pytest.mark.parametrize("size", SIZES)
def test_a_capture_that_pretends_to_be_large_is_not_read(tmp_path, size, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda file: 1 / 0)
    with (tmp_path / "a.qsa").open("wb") as file:
        file.truncate(size)
    with pytest.raises(InfraError, match=rf"a\.qsa: can't be read as a capture: (not a whole capture: )?{SIZES[size]}"):
        Capture.load(tmp_path / "a.qsa")

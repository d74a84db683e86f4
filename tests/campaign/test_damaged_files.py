"""Files of this program that were damaged by a seed: every reader tells, or reads what was written."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from pytest_qsa.captures import Capture, PartialSums, Request
from pytest_qsa.captures.statistics import TOKENS
from pytest_qsa.common import QsaError, checked_json, json_with_checksum
from pytest_qsa.engine.reference.record import RecordOptions, record_model
from pytest_qsa.engine.reference.reference_file import ReferenceFile
from pytest_qsa.report.report import read_report, write_report
from pytest_qsa.verdicts.baseline_file import BaselineFile, read_baseline
from support import models
from support.mutations import damaged_bytes, draws

PLAN = (Request("a", "output", None, frozenset({TOKENS})),)


def a_capture(folder):
    file = folder / "a.qsa"
    file.write_bytes(Capture({}, modules=("a",), plan=PLAN, tokens=(np.arange(300, dtype=np.int32),)).to_bytes())
    return file, Capture.load


def a_kept_reference(folder):
    file = folder / "ref.qsa"
    requests = [Request(r"layers\.\d$", "output", None, frozenset({TOKENS}))]
    batches = [{"input_ids": torch.arange(12)[None]}]
    recorded = record_model(models.llama(), batches, requests, RecordOptions(with_head=True))
    file.write_bytes(recorded.content.to_bytes())
    return file, ReferenceFile.open


def partial_sums(folder):
    file = folder / "sums.partial"
    PartialSums(file, every=0).keep(lambda: Capture({}, modules=("a",), plan=PLAN))
    return file, lambda path: PartialSums(path).load(PLAN)


def remembered_hashes(folder):
    file = folder / "hashes.json"
    file.write_bytes(json_with_checksum({f"/models/{n}.safetensors": [[n, n, n, n], "ab" * 32] for n in range(9)}))
    return file, lambda path: checked_json(path.read_bytes())


def a_report(folder):
    write_report([], folder, {"command": "pytest", "counts": {}, "started": "", "version": "1", "duration_s": 1.0})
    return folder / "report.json", read_report


def a_baseline(folder):
    file = folder / "drift.json"
    query = {"definition": "rms/1", "site": "output", "positions": "all"}
    values = {f"model.layers.{n}": round(0.3 * n + 0.1, 3) for n in range(20)}
    file.write_text(BaselineFile(values, query, "sha256:" + "cd" * 32).dump(), encoding="utf-8")
    return file, lambda path: json.dumps([(read := read_baseline(path)).values, read.query, read.data])


READERS = (a_capture, a_kept_reference, partial_sums, remembered_hashes, a_report, a_baseline)


def is_told(read, file, sound):
    """Say whether a reader refuses a file in one line, warns of it, takes it for none, or reads what was written."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = read(file)
        except QsaError as error:
            return "\n" not in str(error)
    return bool(told) or found is None or (sound is not None and found == sound)


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.__name__)
def test_every_reader_tells_what_was_damaged(kind, tmp_path):
    file, read = kind(tmp_path)
    content = file.read_bytes()
    # What is written is compared only where damage may leave it as it was: spaces and the notes of a baseline.
    sound = read(file) if kind is a_baseline else None
    assert read(file) is not None
    untold = []
    for number, rng in draws(kind.__name__, 20, 1000):
        if (damaged := damaged_bytes(rng, content)) != content:
            file.write_bytes(damaged)
            untold += [] if is_told(read, file, sound) else [number]
    assert untold == []


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.__name__)
def test_no_single_byte_can_be_changed_unseen(kind, tmp_path):
    file, read = kind(tmp_path)
    content = file.read_bytes()
    sound = read(file) if kind is a_baseline else None
    untold = []
    for number, rng in draws(f"{kind.__name__} byte", 20, 1000):
        at, change = rng.randrange(len(content)), rng.randrange(1, 256)
        file.write_bytes(content[:at] + bytes([content[at] ^ change]) + content[at + 1 :])
        untold += [] if is_told(read, file, sound) else [(number, at, change)]
    assert untold == []

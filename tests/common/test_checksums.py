"""Files of this program tell what was damaged or edited, whatever byte it was."""

import hashlib
import json
import warnings

import numpy as np
import pytest

from pytest_qsa.captures import Capture, PartialSums, Request
from pytest_qsa.captures.statistics import TOKENS
from pytest_qsa.common import (
    BLANK,
    InfraError,
    QsaWarning,
    checked_json,
    content_hash,
    json_with_checksum,
    with_checksum,
)
from support.captures import flipped, without_checksum

PLAN = (Request("a", "output", None, frozenset({TOKENS})),)


def a_capture():
    return Capture(sites={}, modules=("a",), plan=PLAN, tokens=(np.arange(30, dtype=np.int32),))


def test_any_program_can_compute_the_checksum_of_a_capture():
    content = a_capture().to_bytes()
    size = int.from_bytes(content[:8], "little")
    stated = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["qsa"])["checksum"]
    blank = content.replace(stated.encode(), b"sha256:" + b"0" * 64, 1)
    assert stated == f"sha256:{hashlib.sha256(blank).hexdigest()}"


def test_a_file_without_a_place_for_its_checksum_is_not_written():
    with pytest.raises(ValueError, match="not found"):
        with_checksum(b"{}")


def test_each_byte_of_a_capture_counts():
    content = a_capture().to_bytes()
    loaded = []
    for at in range(len(content)):
        try:
            Capture.from_bytes(flipped(content, at))
        except InfraError:
            continue
        loaded.append(at)
    assert loaded == []


def test_each_byte_of_partial_sums_counts(tmp_path):
    file = tmp_path / "sums.partial"
    PartialSums(file, every=0).keep(a_capture)
    content = file.read_bytes()
    loaded = []
    for at in range(0, len(content), 3):
        file.write_bytes(flipped(content, at))
        loaded += [at] if PartialSums(file).load(PLAN) is not None else []
    assert loaded == []


def test_each_byte_of_a_small_file_counts():
    content = json_with_checksum({"a/b": [1, "x"], "ü": None})
    assert checked_json(content) == {"a/b": [1, "x"], "ü": None}
    for at in range(len(content)):
        with pytest.raises(InfraError):
            checked_json(flipped(content, at))


def test_a_capture_of_an_earlier_version_is_read_with_a_warning(tmp_path):
    file = tmp_path / "old.qsa"
    file.write_bytes(without_checksum(a_capture().to_bytes()))
    with pytest.warns(QsaWarning, match=r"old.qsa has no checksum, .* so damage to it can't be seen"):
        capture = Capture.load(file)
    assert capture.to_bytes() == a_capture().to_bytes()
    with pytest.raises(InfraError, match="checksum"):
        Capture.from_bytes(file.read_bytes())


def test_a_changed_capture_is_refused_by_name(tmp_path):
    file = tmp_path / "new.qsa"
    file.write_bytes(a_capture().to_bytes()[:-1] + b"x")
    with warnings.catch_warnings(), pytest.raises(InfraError, match=r"new.qsa.*was damaged, or changed after"):
        Capture.load(file)


def test_a_place_for_a_checksum_in_a_users_text_is_not_taken_for_the_own_one():
    assert checked_json(json_with_checksum({"a": BLANK})) == {"a": BLANK}


def test_neither_order_nor_spaces_nor_the_writing_of_a_number_change_the_hash_of_content():
    one, other = '{"a": [1, 2.50], "b": {"c": 100.0}}', '{"b":{"c":1e2},"a":[1.0,2.5]}'
    assert content_hash(json.loads(one)) == content_hash(json.loads(other))
    assert content_hash(json.loads(one)) != content_hash(json.loads(one.replace("2.50", "2.51")))
    assert content_hash({"x": True}) != content_hash({"x": 1})

"""Files are written whole or not at all; no temporary folder outlives its run for long, and no other is removed."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from pytest_qsa.common import (
    AnomalyError,
    InfraError,
    Scratch,
    parsed_json,
    read_json,
    refuse_special,
    remove_unfinished,
    write_atomically,
)
from pytest_qsa.common.locks import flocked
from pytest_qsa.suite import FileHashes


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def orphan(home, name="0123abcd"):
    """Leave what a killed run leaves."""
    (home / f"qsa-offload-{name}.lock").write_bytes(b"")
    folder = home / f"qsa-offload-{name}-left"
    folder.mkdir()
    (folder / "weight.dat").write_bytes(b"0")
    return folder


def test_it_is_gone_with_its_lock_when_it_is_cleaned_up(home):
    with Scratch("qsa-offload") as name:
        Path(name, "weight.dat").write_bytes(b"0")
        assert Path(name).parent == home
    assert list(home.iterdir()) == []


def test_the_next_one_removes_what_a_killed_run_has_left(home):
    orphan(home)
    with Scratch("qsa-offload") as name:
        assert {path.name for path in home.iterdir() if path.is_dir()} == {Path(name).name}


def test_a_folder_in_use_one_without_a_lock_and_one_of_another_kind_stay(home):
    other, unknown = orphan(home, "ffffffff"), home / "qsa-offload-mine"
    unknown.mkdir()
    with Scratch("qsa-offload") as first, Scratch("qsa-hidden"), Scratch("qsa-offload"):
        assert Path(first).is_dir()
        assert unknown.is_dir()
        assert not other.exists()
    kept = orphan(home)
    with Scratch("qsa-hidden"):
        assert kept.is_dir()


def test_no_link_in_a_shared_folder_leads_it_elsewhere(home, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").write_bytes(b"1")
    orphan(home)
    (home / "qsa-offload-0123abcd-link").symlink_to(elsewhere)
    (home / "qsa-offload-89.lock").symlink_to(elsewhere / "precious")
    with Scratch("qsa-offload"):
        pass
    assert (elsewhere / "precious").read_bytes() == b"1"


def test_what_another_user_has_left_is_not_ours(home, monkeypatch):
    theirs = orphan(home)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with Scratch("qsa-offload"):
        assert theirs.is_dir()


def test_a_file_is_written_with_its_folders_and_readable_for_all(tmp_path):
    write_atomically(tmp_path / "a/b.txt", "é")
    assert (tmp_path / "a/b.txt").read_bytes() == "é".encode()
    assert (tmp_path / "a/b.txt").stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.txt", b"old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "a.txt", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.txt", b"old")]


def test_what_a_killed_write_left_goes_with_the_next_and_one_that_goes_on_stays(tmp_path):
    left, other = tmp_path / ".b.json.x1y2.qsa-tmp", tmp_path / ".b.json.tmp"
    left.write_bytes(b"half")
    other.write_bytes(b"not ours")
    handle, going = tempfile.mkstemp(dir=tmp_path, prefix=".c.", suffix=".qsa-tmp")
    assert flocked(handle)
    write_atomically(tmp_path / "a.txt", b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", other.name, Path(going).name}
    os.close(handle)
    remove_unfinished(tmp_path)
    assert not Path(going).exists()


def test_without_locks_of_the_system_only_an_old_one_is_taken_for_left(tmp_path, monkeypatch):
    monkeypatch.setattr("pytest_qsa.common.files.flocked", lambda handle: None)
    old, new = tmp_path / ".b.qsa-tmp", tmp_path / ".c.qsa-tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    write_atomically(tmp_path / "a.txt", b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", new.name}


DEPTHS = {200: True, 201: False, 600: False, 100_000: False}


@pytest.mark.parametrize("depth", DEPTHS)
def test_json_is_read_to_a_depth_that_every_reader_can_walk(tmp_path, depth):
    text = "[" * depth + "]" * depth
    lists, objects = text, text.replace("[", '{"a":').replace("]", "}").replace(":}", ":1}")
    for content in (lists, objects):
        (tmp_path / "a.json").write_text(content)
        if DEPTHS[depth]:
            assert parsed_json(content) == read_json(tmp_path / "a.json", "results") == json.loads(content)
            continue
        with pytest.raises(ValueError, match="nested more than 200 deep"):
            parsed_json(content)
        with pytest.raises(AnomalyError, match=r"a\.json: is no JSON: it is nested more than 200 deep"):
            read_json(tmp_path / "a.json", "results")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFO in a folder")
def test_what_would_block_or_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    for name in ("results.json", "endless.json"):
        with pytest.raises(InfraError, match="is no regular file, so it isn't read"):
            read_json(tmp_path / name, "results")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    (tmp_path / "real.json").write_text("[1]")
    assert read_json(tmp_path / "link.json", "results") == [1]
    refuse_special(tmp_path)
    refuse_special(tmp_path / "absent")


def test_a_sparse_file_of_many_gigabytes_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "results.json").open("wb") as file:
        file.truncate(200 << 30)
    with pytest.raises(InfraError, match=r"results\.json: has 214,748 MB, more than the 1,074 MB that are read"):
        read_json(tmp_path / "results.json", "results")


def test_a_file_of_holes_alone_is_refused_before_it_is_hashed(tmp_path):
    file = tmp_path / "notes.bin"
    with file.open("wb") as stream:
        stream.truncate(200 << 30)
    with pytest.raises(AnomalyError, match=r"notes\.bin is a sparse file, with 0 of its 214,748,364,800 bytes"):
        FileHashes(None).of(file)

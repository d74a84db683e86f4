"""Captures that outlive a run: when one is taken again, and when it must not be."""

import errno
import shutil

import numpy as np
import pytest

from pytest_qsa.captures import COUNTS, MOMENTS, TOKENS, Request
from pytest_qsa.captures.cache import CaptureCache
from pytest_qsa.captures.capture import Capture
from pytest_qsa.common import InfraError, Patience, QsaWarning
from support.captures import without_checksum
from support.checkpoints import save_llama
from support.projects import peaks, suite


@pytest.fixture
def own_llama(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "llama")


@pytest.mark.process
def test_an_edited_threshold_runs_no_model_and_imports_no_torch(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 100")))
    first = own_project.pytest("--qsa-report=never")
    again = own_project.pytest("--qsa-report=never", "--qsa-set=assertions.peaks.max=1")
    assert (first.code, again.code) == (0, 1)
    assert "torch" in first.heavy
    assert "REGRESSION" in again.out


@pytest.mark.process
def test_the_verdict_from_a_cached_capture_is_that_of_the_pass(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 1")))
    texts = [own_project.pytest("--qsa-report=never").text("peaks") for _ in range(2)]
    assert texts[0] == texts[1]


REQUESTS = [Request("a", "output", None, frozenset({TOKENS}))]


class Passes:
    """Stands in for the pass, which other tests cover: counts how often and for what it was run."""

    def __init__(self):
        self.plans = []

    def __call__(self, plan, sums=None):
        self.plans.append(tuple(plan))
        return Capture(sites={}, modules=("a",), plan=tuple(plan), tokens=(np.arange(3, dtype=np.int32),))


def test_what_is_asked_for_the_second_time_is_not_captured_again(tmp_path):
    cache, passes = CaptureCache(tmp_path), Passes()
    captures = [cache.get_or_make("f", REQUESTS, passes) for _ in range(2)]
    assert len(passes.plans) == 1
    assert captures[0].to_bytes() == captures[1].to_bytes()


def test_a_capture_grows_by_what_is_asked_for(tmp_path):
    cache, passes = CaptureCache(tmp_path), Passes()
    more = [Request("a", "output", None, frozenset({COUNTS})), Request("a", "input", None, frozenset({MOMENTS}))]
    cache.get_or_make("f", REQUESTS, passes)
    cache.get_or_make("f", more, passes)
    cache.get_or_make("f", REQUESTS, passes)
    assert len(passes.plans) == 2
    assert Request("a", "output", None, frozenset({COUNTS, TOKENS})) in passes.plans[1]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-3], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), without_checksum],
    ids=["cut short", "empty", "another last byte", "without a checksum"],
)
def test_a_damaged_capture_is_noticed_and_made_anew(tmp_path, damage):
    cache, passes = CaptureCache(tmp_path), Passes()
    cache.get_or_make("f", REQUESTS, passes)
    file = tmp_path / "f.qsa"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(QsaWarning, match="damaged"):
        cache.get_or_make("f", REQUESTS, passes)
    cache.get_or_make("f", REQUESTS, passes)
    assert len(passes.plans) == 2


def test_a_folder_that_can_not_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    passes = Passes()
    with pytest.warns(QsaWarning, match="can't be used"):
        CaptureCache(tmp_path / "file" / "cache").get_or_make("f", REQUESTS, passes)
    assert len(passes.plans) == 1


def test_a_folder_that_can_only_be_read_is_read(tmp_path, monkeypatch):
    cache, passes = CaptureCache(tmp_path), Passes()
    cache.get_or_make("f", REQUESTS, passes)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def read_only(*arguments, **named):  # a mode alone doesn't stop root
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pytest_qsa.common.locks.os.open", read_only)
    assert cache.get_or_make("f", REQUESTS, passes).plan == tuple(REQUESTS)
    with pytest.warns(QsaWarning, match="can't be used .*Read-only file system"):
        cache.get_or_make("g", REQUESTS, passes)
    assert len(passes.plans) == 2
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_subjects_do_not_wait_for_one_another_and_one_subject_does(tmp_path):
    cache, passes = CaptureCache(tmp_path, patience=Patience(0.1)), Passes()

    def make(plan, sums=None):
        cache.get_or_make("g", REQUESTS, passes, "other")
        with pytest.raises(InfraError, match="llama waits for process"):
            cache.get_or_make("f", REQUESTS, passes, "llama")
        return passes(plan)

    cache.get_or_make("f", REQUESTS, make, "llama")
    assert len(passes.plans) == 2
    assert not list(tmp_path.glob("*.lock"))


def test_what_a_killed_write_left_goes_with_the_next_run(tmp_path):
    cache, passes = CaptureCache(tmp_path), Passes()
    cache.get_or_make("f", REQUESTS, passes)
    (tmp_path / ".g.partial.x1y2.qsa-tmp").write_bytes(b"half")
    cache.get_or_make("f", REQUESTS, passes)
    assert not list(tmp_path.glob(".*"))


def test_the_folder_stays_within_its_size_and_loses_nothing_that_is_not_a_capture(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    passes = Passes()
    size = len(passes(REQUESTS).to_bytes())
    cache = CaptureCache(tmp_path, limit=2 * size)
    for name in "abcd":
        cache.get_or_make(name, REQUESTS, passes)
    kept = sorted(file.name for file in tmp_path.glob("*.qsa"))
    assert "d.qsa" in kept
    assert len(kept) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.process
def test_another_checkpoint_in_the_same_folder_is_captured_anew(own_project, own_llama):
    def larger(weights):
        weights["model.layers.1.mlp.down_proj.weight"] *= 100

    own_project.write("a.qsa.yaml", suite(own_llama, peaks("max: 100")))
    assert own_project.pytest("--qsa-report=never").code == 0
    save_llama(own_llama, larger)
    assert own_project.pytest("--qsa-report=never").code == 1

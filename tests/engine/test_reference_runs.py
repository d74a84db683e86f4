"""A pass of two models that is streamed, split, stopped or shared gives the bits of one process in memory."""

from __future__ import annotations

import signal

import pytest

from pytest_qsa import Capture
from pytest_qsa.captures.cache import PartialSums
from pytest_qsa.captures.merging import merge
from pytest_qsa.engine import SampleShare
from support.captures import assert_equal
from support.checkpoints import save_llama, save_quantized_llama
from support.processes import as_ranks, die_after, forking
from support.projects import Project, suite
from support.reference_runs import EVERYTHING, captured, save_shared, subject_of


@pytest.fixture(scope="module")
def short_llama(tmp_path_factory):
    """Return the small Llama with two blocks: a pass of two models costs by the module."""
    return save_llama(tmp_path_factory.mktemp("short") / "llama", layers=2)


@pytest.fixture(scope="module")
def short_int8(tmp_path_factory, short_llama):
    """Return the same in int8."""
    return save_quantized_llama(tmp_path_factory.mktemp("short") / "int8", short_llama)


@pytest.fixture(scope="module")
def whole(short_int8, short_llama):
    return captured(subject_of(short_int8, short_llama))


@pytest.fixture
def small_waves(monkeypatch):
    monkeypatch.setattr("pytest_qsa.engine.stream.stream.WAVE", 2)


def test_two_streamed_models_give_the_bits_of_two_in_memory(changed_llama, llama):
    streamed, held = (captured(subject_of(changed_llama, llama, disk=disk)) for disk in (True, False))
    assert_equal(streamed, held)


@pytest.mark.usefixtures("small_waves")
def test_a_streamed_int8_model_and_its_original_give_the_same_bits_in_waves(short_int8, short_llama, whole):
    assert_equal(captured(subject_of(short_int8, short_llama, disk=True)), whole)


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_comparison_alone_streams_with_the_same_bits(short_int8, short_llama, name):
    streamed, held = (captured(subject_of(short_int8, short_llama, disk=disk), name) for disk in (True, False))
    assert_equal(streamed, held)


def test_parts_against_a_reference_merge_to_the_whole(short_int8, short_llama, whole):
    subject = subject_of(short_int8, short_llama)
    assert_equal(merge([captured(subject, share=SampleShare(samples=ends)) for ends in ((2, 5), (0, 2))]), whole)


@pytest.mark.process
@pytest.mark.usefixtures("small_waves")
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_a_pass_of_two_models_that_was_killed_goes_on_and_ends_with_the_same_bits(
    short_int8, short_llama, whole, tmp_path, disk
):
    file, subject = tmp_path / "sums.partial", subject_of(short_int8, short_llama, disk=disk)
    child = forking().Process(target=die_after, args=(4, file, subject, list(EVERYTHING.values())))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert file.exists()
    told = []
    resumed = captured(subject, progress=lambda done, _: told.append(done), share=SampleShare(sums=PartialSums(file)))
    assert told[0] > 2
    assert_equal(resumed, whole)
    assert not file.exists()


@pytest.mark.process
def test_workers_share_one_pass_of_two_models(tmp_path, short_int8, short_llama):
    project = Project(tmp_path / "project")
    bounds = (
        "id: close, metric: kl_divergence, max: 1",
        r"id: blocks, metric: sqnr, layers: 'layers\.\d$', min: 500",
        "id: alone, metric: local_sqnr, layers: _proj$, min: 10",
        "id: weights, metric: weight_sqnr, layers: _proj$, min: 10",
    )
    project.write("a.qsa.yaml", suite(f"{short_int8}, reference: {short_llama}", *bounds))
    runs = {
        workers: project.pytest("--qsa-report=never", f"--qsa-cache=cache{workers}", f"-n{workers}")
        for workers in (0, 2)
    }
    entries = {workers: list((project.folder / f"cache{workers}").glob("*.qsa")) for workers in runs}
    assert [len(found) for found in entries.values()] == [1, 1]
    assert_equal(*(Capture.load(found) for (found,) in entries.values()))
    assert runs[2].outcomes == runs[0].outcomes
    assert runs[0].outcomes["a.qsa.yaml::blocks"] == "failed"
    assert runs[0].outcomes["a.qsa.yaml::close"] == "passed"


@pytest.mark.process
def test_two_ranks_with_two_models_give_the_bits_of_one_process_from_memory_and_from_disk(
    short_int8, short_llama, whole, tmp_path
):
    assert as_ranks(save_shared, short_int8, short_llama, tmp_path) == [0, 0]
    for name in ("memory0", "memory1", "disk0", "disk1"):
        assert_equal(Capture.load(tmp_path / name), whole)

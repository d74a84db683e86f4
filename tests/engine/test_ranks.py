"""Samples that are split, over processes, over captures or over time, give the bits of one uninterrupted pass."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest

from pytest_qsa import Capture
from pytest_qsa.captures import ALL_STATISTICS, Request
from pytest_qsa.captures.cache import CaptureCache, PartialSums
from pytest_qsa.cli import main
from pytest_qsa.engine import SampleShare, capture_subject
from pytest_qsa.suite import Data, Memory, Model, Subject
from support.captures import same
from support.processes import die_after, torchrun
from support.projects import peaks, suite

REQUESTS = [Request(r"layers\.\d$|down_proj", site, None, ALL_STATISTICS) for site in ("input", "output")]


def subject_of(llama, disk=False, samples=6):
    memory = Memory(device="cpu", offload_device="disk" if disk else "cpu")
    return Subject("llama", Model(path=str(llama)), Data(num_samples=samples, seq_len=32), memory, llama.parent)


@pytest.mark.process
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_a_pass_that_was_killed_goes_on_where_it_was_and_ends_with_the_same_bits(llama, tmp_path, monkeypatch, disk):
    monkeypatch.setattr("pytest_qsa.engine.stream.stream.WAVE", 2)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    file, subject = tmp_path / "sums.partial", subject_of(llama, disk)
    whole = capture_subject(subject, REQUESTS)
    child = multiprocessing.get_context("spawn").Process(target=die_after, args=(4, file, subject, REQUESTS))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert file.exists()
    assert any(path.is_dir() for path in scratch.glob("qsa-offload-*")) == disk
    told = []
    resumed = capture_subject(
        subject,
        REQUESTS,
        progress=lambda done, total: told.append((done, total)),
        share=SampleShare(sums=PartialSums(file)),
    )
    assert told[0][0] > 2
    assert told[-1] == (6, 6)
    assert same(resumed, whole)
    assert not file.exists()
    assert not any(path.is_dir() for path in scratch.glob("qsa-offload-*"))


def test_sums_that_are_damaged_or_of_another_plan_are_not_gone_on_from(llama, tmp_path):
    file, subject = tmp_path / "sums.partial", subject_of(llama)
    whole = capture_subject(subject, REQUESTS)
    sums = PartialSums(file, every=0)
    part = capture_subject(subject, REQUESTS, share=SampleShare(samples=(0, 2)))
    sums.keep(lambda: part)
    assert sums.load(REQUESTS) is not None
    assert sums.load(REQUESTS[:1]) is None
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert sums.load(REQUESTS) is None
    assert same(capture_subject(subject, REQUESTS, share=SampleShare(sums=sums)), whole)


def test_the_cache_offers_a_place_for_sums_beside_its_entries(llama, tmp_path):
    seen = []

    def make(requests, sums):
        seen.append(sums.file)
        return capture_subject(subject_of(llama), requests, share=SampleShare(sums=sums))

    CaptureCache(tmp_path).get_or_make("f00d", REQUESTS, make)
    assert seen == [tmp_path / "f00d.partial"]


@pytest.fixture
def written(llama, tmp_path):
    def write(*lines):
        file = tmp_path / "llama.qsa.yaml"
        file.write_text(suite(llama, *lines).replace("num_samples: 2", "num_samples: 5"), encoding="utf-8")
        return file

    return write


def test_captures_of_parts_merge_to_the_file_of_the_whole(written, tmp_path, capsys):
    config = str(written(peaks("max: 100")))
    for name, samples in {"a": "0:2", "b": "2:3", "c": "3:5"}.items():
        assert main(["capture", "--config", config, "-o", str(tmp_path / f"{name}.qsa"), "--samples", samples]) == 0
    assert main(["capture", "--config", config, "-o", str(tmp_path / "whole.qsa")]) == 0
    parts = [str(tmp_path / f"{name}.qsa") for name in "cab"]
    assert main(["merge", *parts, "-o", str(tmp_path / "merged.qsa")]) == 0
    assert "3 captures merged" in capsys.readouterr().out
    assert same(Capture.load(tmp_path / "merged.qsa"), Capture.load(tmp_path / "whole.qsa"))
    assert main(["merge", parts[0], parts[1], "-o", str(tmp_path / "x.qsa")]) == 1
    assert "the samples 2:3 are in none of the captures" in capsys.readouterr().err


def test_a_capture_that_was_stopped_is_not_gone_on_from_with_other_data(written, tmp_path, monkeypatch):
    config, output = str(written(peaks("max: 100"))), tmp_path / "a.qsa"
    keeping = PartialSums.keep

    def keep_always(self, make):
        self.every = 0
        keeping(self, make)

    def stopped(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialSums, "keep", keep_always)
        patch.setattr(PartialSums, "discard", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(["capture", "--config", config, "-o", str(output)])
    assert list(tmp_path.glob("*.partial"))
    for file in (output, tmp_path / "b.qsa"):
        assert main(["capture", "--config", config, "-o", str(file), "--data.seed", "7"]) == 0
    assert same(Capture.load(output), Capture.load(tmp_path / "b.qsa"))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--samples", "2"], 2, "write A:B"),
        (["--samples", "3:9"], 0, ""),
        (["--samples", "7:9"], 1, "there are 5 samples in batches of 1"),
        (["--data.batch_size", "2", "--samples", "1:3"], 1, "are no whole batches"),
        (["-o", "nowhere/x.qsa"], 1, "there is no folder"),
    ],
)
def test_a_capture_that_cannot_be_made_says_so(written, tmp_path, capsys, monkeypatch, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    assert main(["capture", "--config", str(written(peaks("max: 100"))), "-o", "a.qsa", *arguments]) == code
    assert text in capsys.readouterr().err


def test_a_pattern_without_a_layer_stops_a_capture_before_any_weight_is_read(written, tmp_path, capsys):
    config = str(written(peaks("max: 100", layers="nothing")))
    assert main(["capture", "--config", config, "-o", str(tmp_path / "a.qsa")]) == 1
    assert "'nothing'" in capsys.readouterr().err


PROGRAM = """
import os, sys
from pytest_qsa.cli import main
if {dies} and os.environ["RANK"] == "1":
    import pytest_qsa.engine.run.shared_pass as running
    running.run_pass = lambda *a, **k: os._exit(9)
sys.exit(main({arguments!r}))
"""


@pytest.mark.process
def test_two_ranks_of_torchrun_draw_what_one_process_draws(written, tmp_path, capsys):
    text = "visualization: {save_dir: SAVE, output: {formats: [json]}, enabled: {magnitude_input: true}}\n"
    config = written(peaks("max: 100"))
    config.write_text(config.read_text().replace("assertions:", text + "assertions:"))
    arguments = ["analyze", "--config", str(config), "--save_dir", str(tmp_path / "out"), "--qsa-cache"]
    assert main([*arguments, str(tmp_path / "alone")]) == 0
    done = torchrun(PROGRAM.format(dies=False, arguments=[*arguments, str(tmp_path / "ranks")]), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for said in (capsys.readouterr().out, done.stdout):
        assert said.count("The largest activation is ") == 1
    (alone,), (shared,) = ([*(tmp_path / name).glob("*.qsa")] for name in ("alone", "ranks"))
    equal = alone.read_bytes() == shared.read_bytes()
    assert equal


@pytest.mark.process
def test_a_rank_that_dies_ends_the_run_without_a_hang_and_without_a_capture(written, tmp_path):
    config = written(peaks("max: 100"))
    arguments = [
        "analyze",
        "--config",
        str(config),
        "--save_dir",
        str(tmp_path / "out"),
        "--qsa-cache",
        str(tmp_path / "cache"),
    ]
    done = torchrun(PROGRAM.format(dies=True, arguments=arguments), tmp_path)
    assert done.returncode != 0
    assert list(Path(tmp_path / "cache").glob("*.qsa")) == []

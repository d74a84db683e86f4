"""Runs that are killed at a random time: the next one has the bits of an uninterrupted one, and leaves nothing."""

from __future__ import annotations

import time

import pytest

from pytest_qsa.captures import Request
from pytest_qsa.captures.cache import CaptureCache
from pytest_qsa.engine import SampleShare, capture_subject
from pytest_qsa.suite import Data, Memory, Model, Subject
from support.captures import assert_equal, statistics
from support.mutations import draws
from support.processes import forking

REQUESTS = [Request(r"layers\.\d$", "output", None, statistics("moments", "tokens"))]


def subject_of(llama):
    data = Data(num_samples=24, seq_len=32)
    return Subject("llama", Model(path=str(llama)), data, Memory(device="cpu"), llama.parent)


def make(subject, folder):
    """Take the capture of a subject from a cache, which keeps the sums after every sample."""

    def measured(requests, sums):
        if sums is not None:
            sums.every = 0
        return capture_subject(subject, requests, share=SampleShare(sums=sums))

    return CaptureCache(folder).get_or_make("f" * 64, REQUESTS, measured)


@pytest.mark.process
def test_what_a_killed_run_leaves_is_gone_on_with_to_the_same_bits(llama, tmp_path):
    subject = subject_of(llama)
    began = time.monotonic()
    whole = capture_subject(subject, REQUESTS)
    length = time.monotonic() - began
    for number, rng in draws("kills", 1, 20):
        folder = tmp_path / f"cache{number}"
        for _ in range(rng.randint(1, 3)):
            process = forking().Process(target=make, args=(subject, folder))
            process.start()
            time.sleep(rng.random() * (0.5 + 1.5 * length))
            process.kill()
            process.join()
        assert_equal(make(subject, folder), whole)
        assert [file.name for file in folder.iterdir()] == ["f" * 64 + ".qsa"], number

"""Processes of their own: forks of one that has imported torch, ranks of torchrun, and passes that are killed."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from multiprocessing import forkserver

import pytest

from .paths import TESTS

marked = False
"""Whether the test that runs has the mark `process`; set by conftest.py."""


def check_mark():
    """Fail in a test that starts a process without saying so: `make test-fast` would be slow, and nobody knew why."""
    assert marked, "this test, or a fixture of it, starts a process: mark it with @pytest.mark.process"


def forking():
    """Return the context of processes that are forks of one that has imported `support.preloaded`."""
    check_mark()
    return _forkserver()


@functools.cache
def _forkserver():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def as_ranks(function, *arguments, ranks=2):
    """Run a function in forks that have the environment of one torchrun; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        forking().Process(target=_as_rank, args=(rank, ranks, port, function, *arguments)) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def _as_rank(rank, ranks, port, function, *arguments):
    torchruns = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in torchruns.items()} | {"MASTER_ADDR": "127.0.0.1"}
    function(*arguments)


def torchrun(program, tmp_path, ranks=2):
    """Run the text of a program in so many ranks; return the completed process."""
    check_mark()
    script = tmp_path / "program.py"
    script.write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path, env=environment
    )


def die_after(count, file, subject, requests):
    """Capture in this process, which kills itself when `count` samples are done."""
    from pytest_qsa.captures.cache import PartialSums
    from pytest_qsa.engine import SampleShare, capture_subject
    from pytest_qsa.engine.stream import stream

    stream.WAVE = 2

    def progress(done, total):
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)

    capture_subject(subject, requests, progress=progress, share=SampleShare(sums=PartialSums(file, every=0)))

"""How many threads of the CPU a model runs on: as many as there are free cores, chosen once in a process.

A parallel product waits for its slowest thread. Where another program has one of two cores, two threads therefore take
four times as long as one, and burn the processor meanwhile (docs/benchmarks.md). The bits of a capture are the same for
any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..common import BACKGROUND, logger, own_cores

SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that decide on the threads of torch; one that is set is kept."""


class Threads(NamedTuple):
    """How many threads torch was given, of how many it would take by itself."""

    used: int
    of: int


_chosen: list[Threads] = []
"""What this process has chosen; empty before."""


def use_free_cores() -> None:
    """Let torch use no more threads than cores are free, unless the user has set how many it has.

    The first call of a process watches the cores, which may take two seconds; later ones choose the same.
    """
    if any(os.environ.get(name) for name in SET_BY_USER):
        return
    before = torch.get_num_threads()
    if not _chosen:
        free = own_cores.free() if before > 1 else None
        _chosen.append(Threads(before if free is None else max(1, min(before, int(free + BACKGROUND))), before))
        if free is not None:
            logger.debug("%.1f cores are free: torch uses %d of its %d threads", free, *_chosen[0])
    if _chosen[0].used < before:
        torch.set_num_threads(_chosen[0].used)


@contextmanager
def threads_restored() -> Iterator[None]:
    """Give torch back its number of threads afterwards, for the tests of a user that run in the same process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def threads_text() -> str:
    """Say on how many threads of the CPU torch runs: `2`, or `1 of 2` where fewer cores are free."""
    now = torch.get_num_threads()
    return next((f"{now} of {of}" for used, of in _chosen if now == used < of), str(now))

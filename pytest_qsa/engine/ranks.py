"""The processes of one torchrun: each runs a part of the samples, and every one gets the merged capture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from ..captures import Capture, PartialSums, Request, merge
from ..common import AnomalyError, InfraError, QsaError
from ..suite import MakeCapture

PATIENCE = timedelta(hours=12)
"""How long a rank waits for the slowest one. A rank that dies is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """The processes that torchrun started: how many there are, and which one this is."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> slice:
        """Return which of `count` batches are this rank's: a contiguous range, so that the parts merge in order."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gathered(self, make: Callable[[], Capture | None]) -> Capture:
        """Make this rank's part (None where it has none), and return the merged parts of all.

        Raises:
            QsaError: a part could not be made, on any rank. All ranks raise, so that none waits for ever.
        """
        if self.size == 1:
            made = make()
            assert made is not None  # one process has all batches, of which there is one at least
            return made
        # An error is a value here: a rank that raised before the exchange would leave the others waiting for it.
        part, error = None, None
        try:
            made = make()
            part = made.to_bytes() if made is not None else None
        except QsaError as raised:
            error = raised.kind, str(raised)
        parts = self._all((part, error))
        for rank, (_, failed) in enumerate(parts):
            if failed is not None:
                kind, text = failed
                raise (AnomalyError if kind == AnomalyError.kind else InfraError)(f"rank {rank}: {text}")
        return merge([Capture.from_bytes(part) for part, _ in parts if part is not None])

    def led(self, get: Callable[[MakeCapture], Capture], make: MakeCapture) -> Capture | None:
        """Let the first rank look for a capture, and all make it together if it has to be made; None on the others.

        `get` is only called on the first rank: it may find the capture in a cache, or call the function that it gets.
        The sums of an unfinished pass are of one process, so that several start anew.
        """
        if self.size == 1:
            return get(make)
        if self.rank:
            plan = self._from_first(None)
            if plan is not None:
                make(plan, None)
            return None
        announced = False

        def together(requests: Sequence[Request], sums: PartialSums | None) -> Capture:
            nonlocal announced
            announced = True
            self._from_first(tuple(requests))
            return make(requests, None)

        try:
            return get(together)
        finally:
            if not announced:  # the others wait for a plan: None lets them go
                self._from_first(None)

    def _all(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with _lost_rank():
            distributed.all_gather_object(values, value)
        return values

    def _from_first(self, value: Any) -> Any:
        values = [value]
        with _lost_rank():
            distributed.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def _lost_rank() -> Iterator[None]:
    """Name what a failed collective means."""
    try:
        yield
    except RuntimeError as error:
        raise InfraError(f"another rank is gone: {str(error).splitlines()[0]}") from None


def _backend(devices: int) -> str:
    """Take this rank's GPU, in turns where there are fewer GPUs than ranks: nccl then can't join them, gloo can."""
    if devices:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % devices)
    return "nccl" if 0 < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= devices else "gloo"


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun there is this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    # torch's own limit, 10 minutes with nccl and 30 with gloo, is too short for the wait for a slow rank.
    distributed.init_process_group(_backend(torch.cuda.device_count()), timeout=PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()

"""The machine as plain values, so that a plan can be made for another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """An accelerator; bytes."""

    name: str
    memory: int
    free: int


@dataclass(frozen=True)
class Machine:
    """What a run has. `memory`, `free`: bytes. `rates`: device type → FLOP/s of a matrix product in the model's dtype.

    `reading`: bytes/s from the checkpoint's files.
    """

    cores: int
    memory: int
    free: int
    gpus: tuple[Gpu, ...]
    rates: Mapping[str, float]
    reading: float

"""What the engine finds out about a model and a machine, as plain values: rooms without torch work with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a model and the linear layers in them, in model order."""

    blocks: Sequence[str]
    linears: Sequence[str]

    @property
    def block_pattern(self) -> str:
        r"""A regex that finds the blocks and nothing in them: `^model\.layers\.\d+$`."""
        trunks = list(dict.fromkeys(re.escape(block.rpartition(".")[0]) for block in self.blocks))
        return rf"^{trunks[0]}\.\d+$" if len(trunks) == 1 else rf"^({'|'.join(trunks)})\.\d+$"

    @property
    def linear_pattern(self) -> str:
        r"""A regex that finds the linear layers by the last part of their names: `\.(q_proj|down_proj)$`."""
        return rf"\.({'|'.join(self._kinds)})$"

    @property
    def linear_groups(self) -> list[str]:
        r"""A regex for each kind of linear layer, such as `\.q_proj$`: a bound of its own suits each kind."""
        return [rf"\.{kind}$" for kind in self._kinds]

    @property
    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in self.linears))


@dataclass(frozen=True)
class Gpu:
    """An accelerator; bytes."""

    name: str
    memory: int
    free: int


@dataclass(frozen=True)
class Machine:
    """The machine of a run.

    `memory`, `free`: bytes. `rates`: device type → FLOP/s of a matrix product in the model's dtype.
    `reading`: bytes/s from the checkpoint's files.
    """

    cores: int
    memory: int
    free: int
    gpus: tuple[Gpu, ...]
    rates: Mapping[str, float]
    reading: float

"""Which layers of a model a suite names: its blocks, and the linear layers in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Anatomy:
    """What a suite has to know of a model: its blocks, and the linear layers in them, in model order."""

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
        r"""A regex for each kind of linear layer, `\.q_proj$`: kinds are alike from block to block."""
        return [rf"\.{kind}$" for kind in self._kinds]

    @property
    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in self.linears))

"""Units: what is in memory together while a model is streamed: a block, or a layer outside the blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.format import owner_of
from ..modules import blocks_of
from .shards import Place, Shards


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer that is on disk: the module that owns it, its name there, its key among the shards."""

    module: nn.Module
    name: str
    key: str
    shape: torch.Size


@dataclass(eq=False)
class Unit:
    """What is loaded and let go at once. `modules`: the names of those that own its slots."""

    name: str
    slots: list[Slot] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    _before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], Any]] = field(default_factory=list)

    def attach(self, weights: dict[Place, nn.Parameter], shards: Shards) -> None:
        """Put the weights where the model looks for them, and unpack those that are packed."""
        owners = {id(slot.module): slot.module for slot in self.slots}
        self._before = [
            (owner, dict(owner._parameters), dict(owner._buffers), getattr(owner, "quantization_status", None))
            for owner in owners.values()
        ]
        for slot in self.slots:
            table = slot.module._parameters if slot.name in slot.module._parameters else slot.module._buffers
            table[slot.name] = weights[shards.place(slot.key)]
        for owner in owners.values():
            if form := owner_of(owner):
                form.unpack(owner)

    def detach(self) -> None:
        """Leave the modules as they were before."""
        for owner, parameters, buffers, status in self._before:
            for table, before in ((owner._parameters, parameters), (owner._buffers, buffers)):
                table.clear()
                table.update(before)
            if status is not None:
                owner.quantization_status = status
        self._before = []


def units_of(model: nn.Module, shards: Shards) -> tuple[list[Unit], Unit]:
    """Return the units in model order, and the one that stays in memory: what is not owned by a layer that is called.

    A module outside the blocks that has parameters of its own and children with parameters can't be let go before its
    children; such parameters (class tokens, position tables) are small.
    """
    blocks = blocks_of(model)
    units: dict[str, Unit] = {}
    pinned = Unit("")
    for name, module in model.named_modules():
        slots = list(_stored(name, module, shards))
        if not slots:
            continue
        block = next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)
        if block is None and any(True for child in module.children() for _ in child.parameters()):
            pinned.slots += slots
            continue
        unit = units.setdefault(block or name, Unit(block or name))
        unit.slots += slots
        unit.modules.append(name)
    return list(units.values()), pinned


def shared_places(units: list[Unit], shards: Shards) -> set[Place]:
    """Return the tensors that several units hold, tied weights: they are read once and kept."""
    places = Counter(place for unit in units for place in {shards.place(slot.key) for slot in unit.slots})
    return {place for place, holders in places.items() if holders > 1}


def _stored(name: str, module: nn.Module, shards: Shards) -> Iterator[Slot]:
    tensors = {**module._parameters, **module._buffers}
    for own, tensor in tensors.items():
        key = f"{name}.{own}" if name else own
        if isinstance(tensor, Tensor) and tensor.device.type == "meta" and key in shards:
            yield Slot(module, own, key, tensor.shape)

"""Models larger than memory: every sample's forward waits at the entrance of a unit until its weights are there.

Each forward runs in a greenlet. A unit is loaded once, all samples pass it in order, and it goes; while they pass, the
next one is read. Nothing is traced, and the operations are those of a model in memory, so that the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from ..modules import input_of
from .shards import Place, Shards
from .spill import Spill
from .units import Unit, shared_places, units_of

WAVE = 256
"""How many samples wait at once: each holds a greenlet's frames, and its hidden state in memory or on disk."""

Weights = dict[Place, nn.Parameter]
Loading = Callable[[Sequence[str]], None]
"""Told the names of the modules whose weights have just been loaded."""


class Stream:
    """A model whose weights are on disk, read unit by unit. `held`: the bytes of hidden states kept in memory."""

    def __init__(self, model: nn.Module, shards: Shards, device: torch.device, held: int | None = None) -> None:
        self.shards = shards
        self.device = device
        self.spill = Spill(held)
        self.units, self.pinned = units_of(model, shards)
        self._shared = shared_places([*self.units, self.pinned], shards)
        self._kept: Weights = {}
        self._owned: dict[nn.Module, Unit] = {}
        for unit in self.units:
            self._owned |= {slot.module: unit for slot in unit.slots}
            self._owned[model.get_submodule(unit.name)] = unit
        self._after = {unit: after for unit, after in pairwise(self.units) if _siblings(unit.name, after.name)}
        self._loaded: Unit | None = None
        self._next: tuple[Unit, Future[Weights]] | None = None
        self._beside: Stream | None = None
        self._before_waiting: Callable[[], None] | None = None

    def stand_beside(self, other: Stream | None, before_waiting: Callable[[], None]) -> None:
        """Load the units of another streamed model as well, which run in the same flights.

        `before_waiting`: called before a flight waits for a unit of this one.
        """
        self._beside, self._before_waiting = other, before_waiting

    def enter_module(self, module: nn.Module) -> None:
        """Load the unit that holds the weights of a module, if it isn't always there."""
        unit = self._owned.get(module)
        if unit is not None:
            self._enter(unit)

    @contextmanager
    def ready(self, loading: Loading | None = None) -> Iterator[None]:
        """Hook the entrances and load what stays; afterwards no weight is in memory."""
        self._loading = loading or (lambda modules: None)
        handles = [
            module.register_forward_pre_hook(self._entrance(unit), prepend=True, with_kwargs=True)
            for module, unit in self._owned.items()
        ]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="qsa-weights")
        try:
            self.pinned.attach(self._read(self.pinned), self.shards)
            self._loading(sorted({slot.key.rpartition(".")[0] for slot in self.pinned.slots}))
            yield
        finally:
            self._leave()
            self.pinned.detach()
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._next = None
            self._kept.clear()
            self.spill.close()
            for handle in handles:
                handle.remove()

    def run(self, jobs: Sequence[Callable[[], None]], resumed: Callable[[int], None]) -> None:
        """Run the jobs side by side, unit by unit, in their order; `resumed` is told which one goes on."""
        flights = [greenlet(job) for job in jobs]
        waiting: dict[int, Unit] = {}
        try:
            self._pass(flights, range(len(flights)), waiting, resumed)
            while waiting:
                unit = waiting[min(waiting)]
                self._home(unit)._enter(unit)
                passing = sorted(index for index, awaited in waiting.items() if awaited is unit)
                self._pass(flights, passing, waiting, resumed)
        finally:
            for flight in flights:
                if not flight.dead:
                    with suppress(GreenletExit):
                        flight.throw(GreenletExit)

    def _pass(
        self,
        flights: Sequence[greenlet],
        passing: Sequence[int],
        waiting: dict[int, Unit],
        resumed: Callable[[int], None],
    ) -> None:
        for position, index in enumerate(passing):
            resumed(index)
            with torch.no_grad():
                awaited = flights[index].switch()
            waiting.pop(index, None)
            if not flights[index].dead:
                waiting[index] = awaited
                if position == 0:  # the first sample tells what the others need next
                    self._home(awaited)._foresee(awaited)

    def _home(self, unit: Unit) -> Stream:
        """Return the stream whose unit it is."""
        return self._beside if self._beside is not None and unit in self._beside.units else self

    def _foresee(self, awaited: Unit) -> None:
        if awaited is not self._loaded:
            if self._loaded is not None:
                self._after[self._loaded] = awaited
            self._prefetch(awaited)

    def visit_rest(self, wanted: Callable[[Sequence[str]], bool]) -> None:
        """Load the units that a caller still wants to look at, though no forward came by."""
        for unit in self.units:
            if wanted(unit.modules):
                self._enter(unit)

    def _entrance(self, unit: Unit) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._loaded is unit:
                return
            if self._before_waiting is not None:
                self._before_waiting()
            held = self.spill.hold(input_of(args, kwargs))
            while self._loaded is not unit:
                grad = torch.is_grad_enabled()
                getcurrent().parent.switch(unit)
                torch.set_grad_enabled(grad)
            self.spill.bring_back(held)

        return enter

    def _enter(self, unit: Unit) -> None:
        if self._loaded is unit:
            return
        self._leave()
        weights = self._fetched(unit)
        follower = self._after.get(unit)
        unit.attach(weights, self.shards)
        self._loaded = unit
        del weights
        if follower is not None:
            self._prefetch(follower)
        self._loading(unit.modules)

    def _leave(self) -> None:
        if self._loaded is not None:
            self._loaded.detach()
            self._loaded = None

    def _prefetch(self, unit: Unit) -> None:
        if self._next is None or self._next[0] is not unit:
            if self._next is not None:
                self._next[1].cancel()
            self._next = unit, self._reader.submit(self._read, unit)

    def _fetched(self, unit: Unit) -> Weights:
        self._prefetch(unit)
        assert self._next is not None
        weights = self._next[1].result()
        self._next = None
        return weights

    def _read(self, unit: Unit) -> Weights:
        weights: Weights = {}
        for slot in unit.slots:
            place = self.shards.place(slot.key)
            if place in self._kept:
                weights[place] = self._kept[place]
            elif place not in weights:
                tensor = self.shards.read(slot.key, slot.shape).to(self.device)
                weights[place] = nn.Parameter(tensor, requires_grad=False)
                if place in self._shared:
                    self._kept[place] = weights[place]
        return weights


def _siblings(one: str, other: str) -> bool:
    """Say whether two units are entries of one list: the next block can be guessed, and is read ahead."""
    (parent, _, index), (other_parent, _, other_index) = one.rpartition("."), other.rpartition(".")
    return parent == other_parent and index.isdigit() and other_index.isdigit()

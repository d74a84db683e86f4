"""Models larger than memory: every sample's forward waits at the entrance of a unit until its weights are loaded.

A unit is a block, or a layer outside the blocks. Each forward runs in a greenlet. A unit is loaded once, all samples
pass it in order, and it's released; meanwhile the next one is read. Nothing is traced, and the operations are those of
a model in memory, so that the bits are the same.

The weights stay on disk: transformers' own conversion loads the model, so that every checkpoint is known. It leaves a
parameter in the checkpoint's file where it only renames it, and writes the rest (packed experts) into a folder of its
own; both come with an index, which is all that streaming needs.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from typing import Any, TypeVar

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ...checkpoint import streams_from_disk
from ...common import InfraError, QsaWarning
from ..formats.format import owner_of
from ..modules import blocks_of, input_of, towers_of
from .disk import Shards, Spill, StoredTensor

WAVE = 256
"""The most forwards that wait at once: each holds a greenlet's frames, and its hidden state in memory or on disk."""

Weights = dict[StoredTensor, nn.Parameter]
Item = TypeVar("Item")
Loading = Callable[[Sequence[str]], None]
"""A callback that gets the names of the modules whose weights have just been loaded."""


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer that is on disk: the module that owns it, its name there, its key among the shards."""

    module: nn.Module
    name: str
    key: str
    shape: torch.Size


@dataclass(eq=False)
class Unit:
    """Weights that are loaded and released together. `modules`: the names of the modules that own them."""

    name: str
    slots: list[Slot] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    _before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], Any]] = field(default_factory=list)

    def attach(self, weights: Weights, shards: Shards) -> None:
        """Put the weights where the model looks for them, and unpack those that are packed."""
        owners = {id(slot.module): slot.module for slot in self.slots}
        self._before = [
            # Unpacking replaces parameters and changes the status, so that `detach` has all of it to restore.
            (owner, dict(owner._parameters), dict(owner._buffers), getattr(owner, "quantization_status", None))
            for owner in owners.values()
        ]
        for slot in self.slots:
            table = slot.module._parameters if slot.name in slot.module._parameters else slot.module._buffers
            table[slot.name] = weights[shards.locate(slot.key)]
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
    blocks, towers = blocks_of(model), tuple(f"{tower}." for tower in towers_of(model))
    units: dict[str, Unit] = {}
    pinned = Unit("")
    for name, module in model.named_modules():
        slots = list(_slots(name, module, shards))
        if not slots:
            continue
        block = next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)
        holds_more = any(True for child in module.children() for _ in child.parameters())
        # Towers read some of their weights instead of calling the layers; outside of their blocks they are small.
        in_tower = name.startswith(towers)
        if block is None and (holds_more or in_tower or _is_never_called(model, name)):
            pinned.slots += slots
            continue
        unit = units.setdefault(block or name, Unit(block or name))
        unit.slots += slots
        unit.modules.append(name)
    return list(units.values()), pinned


def _is_never_called(model: nn.Module, name: str) -> bool:
    """Say whether a module's parent reads its weight instead of calling it, as torch's own attention does."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def shared_tensors(units: list[Unit], shards: Shards) -> set[StoredTensor]:
    """Return the tensors that several units hold, tied weights: they are read once and stay in memory."""
    holders = Counter(stored for unit in units for stored in {shards.locate(slot.key) for slot in unit.slots})
    return {stored for stored, count in holders.items() if count > 1}


def _slots(name: str, module: nn.Module, shards: Shards) -> Iterator[Slot]:
    tensors = {**module._parameters, **module._buffers}
    for own, tensor in tensors.items():
        key = f"{name}.{own}" if name else own
        if isinstance(tensor, Tensor) and tensor.device.type == "meta" and key in shards:
            yield Slot(module, own, key, tensor.shape)


class Stream:
    """A model whose weights are on disk, read unit by unit. `held`: the most bytes of hidden states in memory."""

    def __init__(self, model: nn.Module, shards: Shards, device: torch.device, held: int | None = None) -> None:
        self.shards = shards
        self.device = device
        self.spill = Spill(held)
        self.units, self.pinned = units_of(model, shards)
        self._shared = shared_tensors([*self.units, self.pinned], shards)
        self._shared_weights: Weights = {}
        self._owned: dict[nn.Module, Unit] = {}
        for unit in self.units:
            self._owned |= {slot.module: unit for slot in unit.slots}
            # The entrance of a block comes before those of its layers, so that the hidden state waits there.
            self._owned[model.get_submodule(unit.name)] = unit
        self._after = {unit: after for unit, after in pairwise(self.units) if _siblings(unit.name, after.name)}
        self._loaded: Unit | None = None
        self._next: tuple[Unit, Future[Weights]] | None = None
        self._other: Stream | None = None
        self._before_waiting: Callable[[], None] | None = None

    def run_with(self, other: Stream | None, before_waiting: Callable[[], None] | None) -> None:
        """Load the units of another streamed model as well, whose forwards run inside those of this one.

        `before_waiting`: called before a forward waits for a unit of this one.
        """
        self._other, self._before_waiting = other, before_waiting

    def enter_module(self, module: nn.Module) -> None:
        """Load the unit that holds the weights of a module, if it isn't always there."""
        unit = self._owned.get(module)
        if unit is not None:
            self._enter(unit)

    @contextmanager
    def ready(self, loading: Loading | None = None) -> Iterator[None]:
        """Hook the units' entrances and load what stays in memory for the pass; afterwards no weight is in memory."""
        self._loading = loading or (lambda modules: None)
        handles = [
            # First of all hooks: those of sites must see the hidden state after it was brought back, and the weights.
            module.register_forward_pre_hook(self._entrance(unit), prepend=True, with_kwargs=True)
            for module, unit in self._owned.items()
        ]
        # One thread: no more than the next unit is in memory beside the present one.
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
            self._shared_weights.clear()
            self.spill.close()
            for handle in handles:
                handle.remove()

    def run(
        self, forwards: Iterable[Item], run: Callable[[Item], None], resumed: Callable[[Item], None]
    ) -> Iterator[int]:
        """Run forwards side by side, unit by unit, a wave at a time; yield, after each wave, how many have run.

        `resumed`: called before a forward goes on.
        """
        waiting, done = iter(forwards), 0
        while wave := list(islice(waiting, WAVE)):
            self._run_wave(wave, run, resumed)
            done += len(wave)
            yield done

    def _run_wave(self, wave: Sequence[Item], run: Callable[[Item], None], resumed: Callable[[Item], None]) -> None:
        greenlets = [greenlet(partial(run, forward)) for forward in wave]
        awaited: dict[int, Unit] = {}
        try:
            self._run_until_weights(wave, range(len(wave)), greenlets, awaited, resumed)
            while awaited:
                unit = awaited[min(awaited)]
                self._home(unit)._enter(unit)
                ready = sorted(index for index, needed in awaited.items() if needed is unit)
                self._run_until_weights(wave, ready, greenlets, awaited, resumed)
        finally:
            for each in greenlets:
                if not each.dead:
                    # After an error the other forwards are still suspended: end them, so that their frames free what
                    # they hold.
                    with suppress(GreenletExit):
                        each.throw(GreenletExit)

    def _run_until_weights(
        self,
        wave: Sequence[Item],
        ready: Sequence[int],
        greenlets: Sequence[greenlet],
        awaited: dict[int, Unit],
        resumed: Callable[[Item], None],
    ) -> None:
        """Let the forwards that are ready go on, each until it ends or waits for a unit."""
        for position, index in enumerate(ready):
            resumed(wave[index])
            with torch.no_grad():
                unit = greenlets[index].switch()
            awaited.pop(index, None)
            if not greenlets[index].dead:
                awaited[index] = unit
                if position == 0:  # the other samples need the same unit next: it is read ahead
                    self._home(unit)._foresee(unit)

    def _home(self, unit: Unit) -> Stream:
        """Return the stream whose unit it is."""
        return self._other if self._other is not None and unit in self._other.units else self

    def _foresee(self, awaited: Unit) -> None:
        if awaited is not self._loaded:
            if self._loaded is not None:
                self._after[self._loaded] = awaited
            self._prefetch(awaited)

    def visit_rest(self, wanted: Callable[[Sequence[str]], bool]) -> None:
        """Load the units that no forward has reached and whose weights a caller still has to see."""
        for unit in self.units:
            if wanted(unit.modules):
                self._enter(unit)

    def _entrance(self, unit: Unit) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if self._loaded is unit:
                return
            if self._before_waiting is not None:
                self._before_waiting()
            held = self.spill.hold(input_of(args, kwargs))
            while self._loaded is not unit:
                grad = torch.is_grad_enabled()  # a greenlet switch doesn't restore it: torch has it by thread
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
        del weights  # else this unit's weights would stay while the next one is loaded
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
                # Another unit was expected; its reading is not needed, unless it has begun.
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
            stored = self.shards.locate(slot.key)
            if stored in self._shared_weights:
                weights[stored] = self._shared_weights[stored]
            # Two names of one unit may be the same tensor (tied weights).
            elif stored not in weights:
                tensor = self.shards.read(slot.key, slot.shape).to(self.device)
                weights[stored] = nn.Parameter(tensor, requires_grad=False)
                if stored in self._shared:
                    self._shared_weights[stored] = weights[stored]
        return weights


def _siblings(one: str, other: str) -> bool:
    """Say whether two units are entries of one list: the next block can be guessed, and is read ahead."""
    (parent, _, index), (other_parent, _, other_index) = one.rpartition("."), other.rpartition(".")
    return parent == other_parent and index.isdigit() and other_index.isdigit()


def check_format(path: str, config: Any, *, gguf: bool) -> None:
    """Refuse what transformers can't leave on disk.

    Raises:
        InfraError: GGUF, or a quantization other than compressed-tensors.
    """
    settings = getattr(config, "quantization_config", None) or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = getattr(method, "value", method)  # an enum in the library's own configuration
    if gguf or not streams_from_disk(method or ""):
        raise InfraError(
            f"{path} is {'GGUF' if gguf else method}, which transformers can't leave on disk (memory.offload_device: "
            "disk): write offload_device: cpu, or convert it to safetensors in float or compressed-tensors"
        )


def skipping_packed(kind: type[Any]) -> type[Any]:
    """Return the class such that loading doesn't fill quantized weights, which are on disk, with random numbers."""

    class Streamed(kind):  # type: ignore[misc]
        def initialize_weights(self) -> None:
            for module in self.modules():
                if owner_of(module) is not None:
                    module._is_hf_initialized = True
            super().initialize_weights()

    Streamed.__name__, Streamed.__qualname__, Streamed.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Streamed


def stream_of(model: nn.Module, device: torch.device) -> Stream | None:
    """Take a model's weights over from accelerate's hooks; None, with a warning, where it has no blocks to stream."""
    if not blocks_of(model):
        warnings.warn(
            QsaWarning(
                f"{type(model).__name__} has no list of blocks to stream: accelerate offloads it instead, which reads "
                "its weights again for every batch"
            ),
            stacklevel=2,
        )
        return None
    index = _index(model)
    remove_hook_from_module(model, recurse=True)
    for form in {type(form): form for module in model.modules() if (form := owner_of(module))}.values():
        form.prepare_streaming(model)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
    return Stream(model, Shards(index), device)


def _index(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return accelerate's index of what is on disk: parameter → file, name there, dtype."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for single in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            weights = getattr(single, "weights_map", None) if isinstance(single, AlignDevicesHook) else None
            loader = getattr(weights, "dataset", weights)
            index: dict[str, dict[str, str]] = getattr(loader, "index", None) or {}
            if index:
                return dict(index)
    raise InfraError(f"transformers left no index of the weights of {type(model).__name__} that are on disk")

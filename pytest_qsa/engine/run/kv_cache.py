"""What enters a model's KV cache: transformers' `Cache.update`, watched while a model runs.

No class of a model is known here. A layer of attention hands its states to the cache under the number that it carries,
`layer_idx`; of the layers that are running, the innermost with this number is the one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...captures import KEY_AND_VALUE, LATENT_AND_ROPE_KEY, Site
from ..modules import cache_index

States = tuple[Tensor, Tensor]
"""What a layer hands to the cache, each [sample, head, token, channel]."""
Take = Callable[[tuple[Site, Site], States], States]
"""Gets the two sites of a layer and its states; returns the states that the cache keeps."""


@dataclass(frozen=True)
class _Running:
    """A layer while its forward runs. `takes`: who looks at its states, in the order in which they came."""

    module: nn.Module
    takes: Sequence[Take]

    def enter(self, states: States) -> States:
        sites = sites_of(self.module, states)
        for take in self.takes:
            states = take(sites, states)
        return states


# A variable of the context: each forward of a streamed pass, and each of a reference, is a greenlet with its own.
_RUNNING: ContextVar[tuple[_Running, ...]] = ContextVar("running", default=())
_TAKES: dict[nn.Module, list[Take]] = {}
"""Module → who looks at its states."""


def sites_of(module: Any, states: States) -> tuple[Site, Site]:
    """Return where a layer's states belong: to multi-head latent attention where the first is of its latent's size."""
    rank, (first, _) = getattr(module, "kv_lora_rank", None), states
    return LATENT_AND_ROPE_KEY if first.shape[1] == 1 and first.shape[-1] == rank else KEY_AND_VALUE


@contextmanager
def watched(modules: Mapping[str, nn.Module], takes: Mapping[str, Take], *, last: bool = False) -> Iterator[None]:
    """While it is open, give every state that a layer puts into a KV cache to its `Take`, by the layer's name.

    `last`: after those that come later; it may change the states that others measure.
    """
    with ExitStack() as exits:
        if not _TAKES:
            exits.enter_context(_cache_watched())
        for name, take in takes.items():
            exits.enter_context(_layer_watched(modules[name], take, last))
        exits.callback(_RUNNING.reset, _RUNNING.set(()))
        yield


@contextmanager
def _layer_watched(module: nn.Module, take: Take, last: bool) -> Iterator[None]:
    handles = [] if module in _TAKES else list(_hooks(module))
    own = _TAKES.setdefault(module, [])
    own.insert(len(own) if last else 0, take)
    try:
        yield
    finally:
        _TAKES[module].remove(take)
        if not _TAKES[module]:
            del _TAKES[module]
        for handle in handles:
            handle.remove()


def _hooks(module: nn.Module) -> Iterator[RemovableHandle]:
    yield module.register_forward_hook(_end)
    emulation = emulated_cache(module)
    if emulation is None:
        yield module.register_forward_pre_hook(lambda _, args: _begin(module, _TAKES[module]))
        return
    # What it hands to the cache is rounded already.
    yield module.register_forward_pre_hook(lambda _, args: _begin(module, ()))
    yield emulation.register_forward_pre_hook(
        lambda _, args: (*_Running(module, _TAKES[module]).enter((args[0], args[1])), *args[2:])
    )


def emulated_cache(module: nn.Module) -> nn.Module | None:
    """Return what compressed-tensors puts between a layer and its cache, to round as the checkpoint declares it."""
    found = getattr(module, "kv_cache", None)
    return found if isinstance(found, nn.Module) else None


def _begin(module: nn.Module, takes: Sequence[Take]) -> None:
    _RUNNING.set((*_RUNNING.get(), _Running(module, takes)))


def _end(module: nn.Module, args: object, output: object) -> None:
    # A forward that was ended in the middle has left layers behind.
    running = _RUNNING.get()
    while running and running[-1].module is not module:
        running = running[:-1]
    _RUNNING.set(running[:-1])


@contextmanager
def _cache_watched() -> Iterator[None]:
    from transformers import cache_utils

    shared: Any = cache_utils.Cache
    update = shared.update

    def watching(cache: object, first: Tensor, second: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> States:
        layer = _running_layer(layer_idx)
        if layer is None:
            untouched: States = update(cache, first, second, layer_idx, *args, **kwargs)
            return untouched
        states = layer.enter((first, second))
        kept: States = update(cache, *states, layer_idx, *args, **kwargs)
        # The cache returns copies of another layout, which attention may add up in another order.
        return states if all(a.shape == b.shape for a, b in zip(states, kept, strict=True)) else kept

    shared.update = watching
    try:
        yield
    finally:
        shared.update = update


def _running_layer(index: int) -> _Running | None:
    running = _RUNNING.get()
    numbered = (layer for layer in reversed(running) if cache_index(layer.module) == index)
    return next(numbered, running[-1] if running else None)

"""The pass: hooks at the planned sites, one forward for each batch, a Capture at the end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import plan
from ..captures import Capture
from ..errors import InfraError
from ..numbers import SiteNumbers
from ..plan import Request, Site, match_layers, merge_requests
from .batches import Batch, Rows, row_count, rows_of, token_ids
from .modules import (
    Routing,
    blocks_of,
    channels_first,
    device_of,
    input_of,
    layers_of,
    packed_experts,
    routing_of,
    tensor_of,
)
from .observers import Reducers, StreamObserver
from .weights import observe_weights, packed

SiteKey = tuple[str, Site]
Progress = Callable[[int, int], None]
"""Told after each batch: samples done, samples in all."""


class _PassComplete(Exception):  # noqa: N818 - a signal, not an error
    """Raised in the hook of the last planned call: nothing after it is needed."""


class _CallsChanged(Exception):  # noqa: N818
    """Where the pass stopped other layers had been called than in the first batch; it starts again without stopping."""


class _SharingChanged(Exception):  # noqa: N818
    """A site that read another's tensor now reads its own; the pass starts again without that sharing."""

    def __init__(self, site: SiteKey) -> None:
        super().__init__(site)
        self.site = site


@dataclass
class _Seen:
    """A tensor that was reduced in this forward; it lives on only if the model itself keeps it."""

    tensor: weakref.ref[Tensor]
    version: int | None
    site: SiteKey
    call: int


@dataclass
class _Pass:
    """The state of one pass: observers by site, and which site reads whose tensor."""

    wanted: Mapping[SiteKey, frozenset[str]]
    modules: Mapping[str, nn.Module]
    unshared: frozenset[SiteKey]
    observers: dict[SiteKey, StreamObserver] = field(default_factory=dict)
    shared: dict[SiteKey, SiteKey] = field(default_factory=dict)
    calls: dict[SiteKey, int] = field(default_factory=dict)
    seen: dict[int, _Seen] = field(default_factory=dict)
    reducers: Reducers = field(default_factory=Reducers)
    rows: Rows | None = None
    last: tuple[SiteKey, int] | None = None
    stop_at: tuple[SiteKey, int] | None = None
    first: bool = True
    may_stop: bool = True
    usual: dict[SiteKey, int] = field(default_factory=dict)

    def visit(self, site: SiteKey, tensor: Tensor | None, routing: Routing | None = None) -> None:
        """Reduce a site's tensor, or note that it has been reduced at another site of this forward.

        `routing`: where the tensor's tokens go, which another site that reads it need not know.
        """
        if tensor is None or self.rows is None:
            return
        call = self.calls.get(site, 0)
        self.calls[site] = call + 1
        owner = self._owner(site, tensor, call)
        missing = self.wanted[site] - (self.wanted[owner] if owner else frozenset())
        if routing is not None:
            missing |= self.wanted[site] & {plan.EXPERTS}
        if missing:
            self._reduce(site, tensor, call, missing, routing)
        self.last = (site, call)
        if self.last == self.stop_at:
            if self.calls != self.usual:
                raise _CallsChanged
            raise _PassComplete

    def _owner(self, site: SiteKey, tensor: Tensor, call: int) -> SiteKey | None:
        seen = self.seen.get(id(tensor))
        version = _version(tensor)
        fresh = seen is None or seen.tensor() is not tensor or seen.version != version or version is None
        known = self.shared.get(site)
        if known is not None:
            if fresh or seen is None or (seen.site, seen.call) != (known, call):
                raise _SharingChanged(site)
            return known
        if fresh or seen is None:
            self.seen[id(tensor)] = _Seen(weakref.ref(tensor), version, site, call)
        elif (
            self.first
            and site not in self.observers
            and site not in self.unshared
            and seen.call == call
            and seen.site != site
        ):
            self.shared[site] = seen.site
            return seen.site
        return None

    def _reduce(
        self, site: SiteKey, tensor: Tensor, call: int, statistics: frozenset[str], routing: Routing | None
    ) -> None:
        assert self.rows is not None
        observer = self.observers.setdefault(site, StreamObserver(statistics, self.reducers))
        try:
            shaped, token_axis = self.rows.shaped(tensor, channels_first(self.modules[site[0]]))
        except InfraError as error:
            raise InfraError(f"the {site[1]} of {site[0]}: {error}") from None
        keep = self.rows.kept(site[0], shaped.shape[1]) if token_axis else [None] * len(self.rows.samples)
        observer.add(shaped, keep, self.rows.samples, call, token_axis, routing)

    def begin(self, rows: Rows) -> None:
        """Start a forward."""
        self.rows = rows
        self.calls.clear()
        self.seen.clear()

    def end(self, *, first: bool) -> None:
        """End a forward; the first one tells which call is the last that is needed."""
        for site, owner in self.shared.items():
            if self.calls.get(site, 0) != self.calls.get(owner, 0):
                raise _SharingChanged(site)
        if first and self.may_stop and all(site in self.calls for site in self.wanted):
            self.stop_at, self.usual = self.last, dict(self.calls)
        self.first = False
        self.seen.clear()

    def numbers(self) -> dict[SiteKey, SiteNumbers]:
        """Fetch the numbers of every site; a site that read another's tensor shares what was reduced there."""
        own = {site: observer.numbers(self.wanted[site]) for site, observer in self.observers.items()}
        found = {
            site: own.get(site) or StreamObserver(statistics).numbers(statistics)
            for site, statistics in self.wanted.items()
            if site not in self.shared
        }
        for site, owner in self.shared.items():
            found[site] = _joined(found[owner], own[site]) if site in own else found[owner]
        return found


def _version(tensor: Tensor) -> int | None:
    """Return the count of changes in place; None for an inference tensor, which has none and so is never shared."""
    return None if tensor.is_inference() else tensor._version


def _joined(lent: SiteNumbers, own: SiteNumbers) -> SiteNumbers:
    """Join what was reduced at another site of the same tensor with what only this site asked for."""
    arrays, _ = lent.to_arrays()
    added, header = own.to_arrays()
    return SiteNumbers.from_arrays(arrays | added, header | {"statistics": lent.statistics | own.statistics})


def run_pass(
    model: nn.Module,
    batches: Sequence[Batch],
    requests: Iterable[Request],
    *,
    decode: Callable[[Sequence[int]], Mapping[int, str]] | None = None,
    progress: Progress | None = None,
) -> Capture:
    """Run the model once over the batches and reduce every tensor that the requests name.

    `batches`: tensors [B, T] (or whatever the model takes), or dicts of forward arguments. `decode`: token ids → texts.
    The model's mode and hooks are as before afterwards.
    """
    modules = layers_of(model)
    blocks = blocks_of(model)
    wanted = wanted_sites(list(modules), blocks, requests)
    activations = {site: statistics for site, statistics in wanted.items() if site[1] != "weight"}
    weights = {site: statistics for site, statistics in wanted.items() if site[1] == "weight"}
    numbers: dict[SiteKey, SiteNumbers] = {}
    with _evaluating(model):
        if activations:
            numbers = _forwards(model, modules, batches, activations, progress).numbers()
        elif packed(modules, weights):
            with torch.no_grad():
                _forward(model, batches[0], device_of(model))
        numbers |= observe_weights(modules, weights)
    ids = [row for batch in batches for row in token_ids(batch)]
    unique = sorted({int(token) for row in ids for token in set(row.tolist())})
    return Capture(
        sites={site: numbers[site] for site in wanted if site in numbers},
        modules=tuple(modules),
        blocks=tuple(blocks),
        tokens=tuple(row.numpy().astype(np.int32) for row in ids),
        pieces=decode(unique) if decode else {},
        plan=merge_requests(requests),
    )


def wanted_sites(
    modules: Sequence[str], blocks: Sequence[str], requests: Iterable[Request]
) -> dict[SiteKey, frozenset[str]]:
    """Return what is to be measured at each site, in model order; where sinks matter, the blocks' outputs as well."""
    wanted: dict[SiteKey, frozenset[str]] = {}
    for request in requests:
        for layer in match_layers(modules, request.pattern, request.exclude):
            site: SiteKey = (layer, request.site)
            wanted[site] = wanted.get(site, frozenset()) | request.statistics
        if plan.SINKS in request.statistics and request.site != "weight":
            for block in blocks:
                wanted[block, "output"] = wanted.get((block, "output"), frozenset()) | {plan.TOKENS, plan.SINKS}
    order = {name: index for index, name in enumerate(modules)}
    return dict(sorted(wanted.items(), key=lambda item: (order[item[0][0]], plan.SITES.index(item[0][1]))))


def _forwards(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    wanted: Mapping[SiteKey, frozenset[str]],
    progress: Progress | None,
) -> _Pass:
    unshared: frozenset[SiteKey] = frozenset()
    may_stop = True
    while True:
        state = _Pass(wanted, modules, unshared, may_stop=may_stop)
        try:
            with torch.no_grad(), _hooked(modules, state):
                _run_batches(model, batches, state, progress)
            return state
        except _SharingChanged as change:
            unshared |= {change.site}
        except _CallsChanged:
            may_stop = False


def _run_batches(model: nn.Module, batches: Sequence[Batch], state: _Pass, progress: Progress | None) -> None:
    device = device_of(model)
    done = 0
    for index, batch in enumerate(batches):
        rows = rows_of(batch, done, device)
        state.begin(rows)
        with suppress(_PassComplete):
            _forward(model, batch, device)
        state.end(first=index == 0)
        done += len(rows.samples)
        if progress is not None:
            progress(done, done + sum(row_count(later) for later in batches[index + 1 :]))


def _forward(model: nn.Module, batch: Batch, device: torch.device) -> None:
    if isinstance(batch, Tensor):
        model(batch.to(device))
    else:
        model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], state: _Pass) -> Iterator[None]:
    handles = []
    for layer, site in state.wanted:
        if site == "input":
            experts = packed_experts(modules[layer]) if plan.EXPERTS in state.wanted[layer, site] else 0
            hook = _input_hook(state, layer, experts)
            handles.append(modules[layer].register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(modules[layer].register_forward_hook(_output_hook(state, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(state: _Pass, layer: str, experts: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = routing_of(experts, args, kwargs) if experts else None
        state.visit((layer, "input"), input_of(args, kwargs), routing)

    return hook


def _output_hook(state: _Pass, layer: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        state.visit((layer, "output"), tensor_of(output))

    return hook


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode and its cache off, and back afterwards."""
    training = {name: module.training for name, module in model.named_modules()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if isinstance(use_cache, bool):
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        if isinstance(use_cache, bool):
            config.use_cache = use_cache  # type: ignore[union-attr]

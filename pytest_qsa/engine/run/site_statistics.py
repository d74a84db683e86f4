"""What is reduced at the sites of a model: the tensors of its calls, which hooks see, and its weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from accelerate.utils import align_module_device
from numpy.typing import NDArray
from torch import Tensor, nn

from ...captures import (
    CACHE_SITES,
    EXPERTS,
    STORED,
    Capture,
    InRange,
    Site,
    SiteKey,
    SiteNumbers,
    Statistic,
    against_reference,
)
from ...common import InfraError, logger
from ..formats.format import dequantized
from ..formats.stored import StoredWeights
from ..load.batches import BatchRows
from ..modules import (
    Expert,
    Layer,
    Routing,
    channels_first,
    input_of,
    packed_experts,
    routing_of,
    tensor_of,
)
from ..reduce.observer import Reducers, StreamObserver
from ..reduce.storage import Transfer
from .kv_cache import States, Take, watched
from .participant import Forward, ForwardComplete, Need, Participant, Pass, Restart, SeenTensor, WantedSites


@dataclass(frozen=True)
class CallOrder:
    """What the first forward showed: its last call that is needed, and how often each site had been reached by then."""

    last: tuple[SiteKey, int] | None
    calls: Mapping[SiteKey, int]


class SiteStatistics(Participant):
    """Reduces the tensor of every site once, wherever it's seen, and ends a forward where nothing more is needed.

    The first forward shows which sites share a tensor (q, k and v read one and the same), and which call is the last.
    A later forward that does otherwise makes the pass start again, without that sharing or without stopping.

    `wanted`: the statistics of each site; those that compare with a reference are left to it. `may_stop`: a forward may
    end at the last site. `learns_order`: the first forward ends before the second one begins, so that it can show which
    call is the last; in a streamed pass `rehearsed` says so. `fused` off keeps to torch's operators. `hooks`: what the
    hooks of each site call while they are set; `input_sites`: those that hand on what went into the layer as well.
    """

    def __init__(
        self, wanted: WantedSites, modules: Mapping[str, nn.Module], *,
        may_stop: bool = True, learns_order: bool = True, fused: bool = True,
    ) -> None:  # fmt: skip
        self.wanted = {site: statistics - against_reference(statistics) for site, statistics in wanted.items()}
        self.modules = modules
        self.needs = Need.FORWARDS if wanted else Need.NOTHING
        self.may_stop = may_stop
        self.learns_order = learns_order
        self.uses_cache = any(site in CACHE_SITES for _, site in wanted)
        self.cached: dict[str, tuple[Site, Site]] = {}
        """Layer → the sites of what it has put into the KV cache."""
        self.head_sizes: dict[SiteKey, int] = {}
        """Of the sites of the cache: how many channels a head has there."""
        self.rehearsed: CallOrder | None = None
        self.unshared: frozenset[SiteKey] = frozenset()
        self.hooks: dict[SiteKey, Observe] = {}
        self.input_sites: frozenset[SiteKey] = frozenset()
        self._fused = fused
        self.begin()

    def begin(self, exits: ExitStack | None = None) -> None:
        """Begin an attempt: nothing is reduced yet, and nothing is known to be shared."""
        self.observers: dict[SiteKey, StreamObserver] = {}
        self.odd: dict[SiteKey, str] = {}
        """Sites that can have no numbers, and why."""
        self.shared: dict[SiteKey, SiteKey] = {}
        self.reducers = Reducers(fused=self._fused)
        self.forward: Forward | None = None
        self.order = self.rehearsed if self.may_stop else None
        self.sharing: set[SiteKey] = set()
        self.learning = True
        self._lacking: dict[SiteKey, frozenset[Statistic]] = {}

    def forward_resumed(self, forward: Forward) -> None:
        """Let the hooks know whose tensors they see."""
        self.forward = forward

    def observe(self, site: SiteKey, tensor: Tensor | None, routing: Routing | None = None) -> None:
        """Reduce a site's tensor, or note that it has been reduced at another site of this forward.

        `routing`: which experts its tokens go to. Another site that reads the same tensor need not know that.
        """
        forward = self.forward
        if tensor is None or forward is None:
            return
        call = forward.calls.get(site, 0)
        forward.calls[site] = call + 1
        # Most sites share no tensor: after the first forward only those that do are looked up, for each call costs
        # time.
        owner = self._owner(forward, site, tensor, call) if self.learning or site in self.sharing else None
        missing = self.wanted[site] if owner is None else self._lacking[site]
        if routing is not None:
            # The site that shares the tensor may be another kind of layer, whose hook sees no routing.
            missing |= {each for each in self.wanted[site] if each == EXPERTS or _counts_experts(each)}
        if missing and not (self.odd and site in self.odd):
            observer = self.observers.get(site) or self._observer(site, missing)
            if routing is not None or not observer.repeat(tensor, forward.rows.whole, call):
                self._reduce(observer, forward.rows, site, tensor, call, routing)
        forward.last = (site, call)
        if self.order is not None and forward.last == self.order.last:
            # The last site was reached on another way: stopping here could leave out a site that is still to come.
            if forward.calls != self.order.calls:
                self.may_stop = False
                raise Restart(f"other layers had been called than in the first batch when {site[0]} was reached")
            raise ForwardComplete

    def _owner(self, forward: Forward, site: SiteKey, tensor: Tensor, call: int) -> SiteKey | None:
        seen = forward.seen.get(id(tensor))
        version = _version(tensor)
        # An id is reused as soon as its tensor is gone, and an in-place change makes other values of the same object.
        fresh = seen is None or seen.tensor() is not tensor or seen.version != version or version is None
        known = self.shared.get(site)
        if known is not None:
            if fresh or seen is None or seen.site != known or seen.call != call:
                self._unshare(site)
            return known
        if fresh or seen is None:
            forward.seen[id(tensor)] = SeenTensor(weakref.ref(tensor), version, site, call)
        elif (
            forward.first
            and site not in self.observers
            and site not in self.unshared
            and seen.call == call
            and seen.site != site
        ):
            self.shared[site] = seen.site
            self.sharing |= {site, seen.site}
            self._lacking[site] = self.wanted[site] - self.wanted[seen.site]
            return seen.site
        return None

    def _reduce(
        self,
        observer: StreamObserver,
        rows: BatchRows,
        site: SiteKey,
        tensor: Tensor,
        call: int,
        routing: Routing | None,
    ) -> None:
        try:
            shaped, token_axis = rows.shaped(tensor, observer.channels_first)
        except InfraError as error:
            raise InfraError(f"the {site[1]} of {site[0]}: {error}") from None
        padded = token_axis and rows.padded
        keep = rows.unpadded(site[0], shaped.shape[1], shaped.device) if padded else rows.all_count
        try:
            observer.add(shaped, keep, rows.samples, call, token_axis, routing)
        except (ValueError, RuntimeError) as error:  # of numpy, of torch: arrays of channels that can't be joined
            widths = [shape[-1] for shape in (observer.last_shape, shaped.shape) if shape]
            if len(set(widths)) < 2 or site in self.odd:
                raise
            self.odd[site] = f"it is called with {widths[0]} channels and with {widths[1]}"
            logger.debug("the %s of %s: %s (%s)", site[1], site[0], self.odd[site], error)

    def _observer(self, site: SiteKey, statistics: frozenset[Statistic]) -> StreamObserver:
        first = channels_first(self.modules[site[0]])
        size = self.head_sizes.get(site, 0)
        made = self.observers[site] = StreamObserver(statistics, self.reducers, channels_first=first, head_size=size)
        return made

    def _unshare(self, site: SiteKey) -> NoReturn:
        self.unshared |= {site}
        raise Restart(f"the {site[1]} of {site[0]} is no longer the tensor of another site")

    def forward_ended(self, forward: Forward, output: object = None) -> None:
        """End a forward; the first one shows which call is the last that is needed."""
        for site, owner in self.shared.items():
            # A call without its owner's has been reduced nowhere.
            if forward.calls.get(site, 0) != forward.calls.get(owner, 0):
                self._unshare(site)
        if forward.first:
            self.learning = False
            # A site that the first batch didn't reach (an expert) may come in a later one, so no forward is stopped
            # then.
            if self.may_stop and self.learns_order and all(site in forward.calls for site in self.wanted):
                self.order = CallOrder(forward.last, dict(forward.calls))
        forward.seen.clear()

    def contribute(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add the numbers of every site."""
        numbers |= self.numbers()

    def complete(self, capture: Capture) -> Capture:
        """Add which sites have no numbers, and leave out the layers that have put nothing into the KV cache."""
        unfit = {f"{site} of {layer}": why for (layer, site), why in self.odd.items()}
        capture = replace(capture, unfit={**capture.unfit, **unfit}) if unfit else capture
        if not self.uses_cache:
            return capture
        left = [site for site, n in capture.sites.items() if site[1] in CACHE_SITES and not n.populations]
        sites = {site: numbers for site, numbers in capture.sites.items() if site not in left}
        asked = {layer for layer, site in self.wanted if site in CACHE_SITES}
        # A block carries the number of the attention in it, and hands nothing over itself.
        blocks = {layer for layer in asked for other in asked if other.startswith(f"{layer}.")}
        uncached = {layer: self._why_uncached(layer) for layer, _ in left if layer not in blocks}
        return replace(capture, sites=sites, uncached=uncached)

    def _why_uncached(self, layer: str) -> str:
        if layer not in self.cached:
            return "fills no KV cache: it reads another layer's, keeps a state, or sees all tokens at once"
        first, second = self.cached[layer]
        return f"has the sites {first} and {second}"

    def numbers(self) -> dict[SiteKey, SiteNumbers]:
        """Fetch the numbers of every site; a site that read another's tensor shares what was reduced there."""
        for site in self.odd:
            self.observers.pop(site, None)
        fetched = Transfer(tensor for observer in self.observers.values() for tensor in observer.tensors())
        own = {site: observer.numbers(self.wanted[site], fetched) for site, observer in self.observers.items()}
        found = {
            site: own.get(site) or StreamObserver(statistics).numbers(statistics)
            for site, statistics in self.wanted.items()
            if site not in self.shared
        }
        for site, owner in self.shared.items():
            # The same object for both sites: the capture's file then holds their arrays once.
            found[site] = _joined(found[owner], own[site]) if site in own else found[owner]
        return found


def _counts_experts(statistic: Statistic) -> bool:
    return isinstance(statistic, InRange) and statistic.inner == EXPERTS


def _version(tensor: Tensor) -> int | None:
    """Return the count of changes in place; None for an inference tensor, which has none and so is never shared."""
    return None if tensor.is_inference() else tensor._version


def _joined(lent: SiteNumbers, own: SiteNumbers) -> SiteNumbers:
    """Join what was reduced at another site of the same tensor with what only this site asked for."""
    return lent.having(own.statistics, own.arrays)


@contextmanager
def hooked(statistics: SiteStatistics, visitors: Sequence[Participant] = ()) -> Iterator[None]:
    """Hook every site that is wanted: those of `visitors` that name it look at its tensor, then it's reduced."""
    handles = []
    statistics.input_sites = frozenset(site for visitor in visitors for site in visitor.input_sites)
    caching: dict[str, dict[Site, Observe]] = {}
    for layer, site in statistics.wanted:
        module = statistics.modules[layer]
        observe = statistics.hooks[layer, site] = _observer_of(statistics, visitors, (layer, site))
        if site in CACHE_SITES:
            caching.setdefault(layer, {})[site] = observe
        elif site == "input":
            experts = packed_experts(module) if EXPERTS in statistics.wanted[layer, site] else 0
            handles.append(module.register_forward_pre_hook(_input_hook(observe, experts), with_kwargs=True))
        elif (layer, site) in statistics.input_sites:
            handles.append(module.register_forward_hook(_output_hook_with_inputs(observe), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_output_hook(observe)))
    takes = {layer: cache_hook(statistics, layer, observers) for layer, observers in caching.items()}
    try:
        with watched(statistics.modules, takes) if takes else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


Observe = Callable[..., None]
"""Called by a hook with a tensor, its routing and the layer's inputs, each of them None where there is none."""


def _observer_of(statistics: SiteStatistics, visitors: Sequence[Participant], site: SiteKey) -> Observe:
    seeing = [visitor for visitor in visitors if site in visitor.sites]
    if not seeing:  # the hot path: nothing stands between the hook and the reduction
        return partial(statistics.observe, site)

    def observe(tensor: Tensor | None, routing: Routing | None = None, inputs: Tensor | None = None) -> None:
        forward = statistics.forward
        if tensor is not None and forward is not None:
            call = forward.calls.get(site, 0)
            for visitor in seeing:
                visitor.visit(forward, site, call, tensor, inputs)
            statistics.forward = forward  # other forwards may have run while a visitor waited
        statistics.observe(site, tensor, routing)

    return observe


def _input_hook(observe: Observe, experts: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        observe(input_of(args, kwargs), routing_of(experts, args, kwargs) if experts else None)

    return hook


def _output_hook(observe: Observe) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        observe(tensor_of(output))

    return hook


def _output_hook_with_inputs(observe: Observe) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        observe(tensor_of(output), None, input_of(args, kwargs))

    return hook


def cache_hook(statistics: SiteStatistics, layer: str, observers: Mapping[Site, Observe]) -> Take:
    """Return what hands the states that a layer puts into the cache to the observer of their site, [B, T, H × C]."""

    def take(sites: tuple[Site, Site], states: States) -> States:
        statistics.cached[layer] = sites
        for site, state in zip(sites, states, strict=True):
            if site in observers:
                statistics.head_sizes[layer, site] = state.shape[-1]
                observers[site](state.transpose(1, 2).flatten(2))
        return states

    return take


class _Weights(Participant):
    """Looks at the weight of every layer at which some statistics are wanted, while it's in memory."""

    awaited_weights: frozenset[str] = frozenset()

    def prepare(self, run: Pass, exits: ExitStack) -> None:
        """Note which weights are wanted."""
        self._modules, self._layers = run.modules, run.layers
        self._wanted = {
            layer: statistics
            for (layer, site), statistics in run.wanted.items()
            if site == "weight" and self.concerns(statistics)
        }
        self._in_module: dict[str, list[str]] = {}
        """Module → the layers whose weights it holds: itself, or those of its experts."""
        for name in self._wanted:
            layer = run.layers[name]
            self._in_module.setdefault(layer.holder if isinstance(layer, Expert) else name, []).append(name)
        self.awaited_weights = frozenset(self._in_module)

    def weights_loaded(self, layers: Iterable[str]) -> None:
        """Look at those that are wanted, each once."""
        for module in self.awaited_weights.intersection(layers):
            # An offloaded module is brought in once for all of its experts.
            with torch.no_grad(), align_module_device(self._modules[module]):
                for name in self._in_module[module]:
                    self.look_at(name, self._layers[name], self._wanted[name])
        self.awaited_weights = self.awaited_weights.difference(layers)

    @staticmethod
    def concerns(statistics: frozenset[Statistic]) -> bool:
        raise NotImplementedError

    def look_at(self, name: str, layer: Layer, statistics: frozenset[Statistic]) -> None:
        raise NotImplementedError


class WeightStatistics(_Weights):
    """Reduces the weights of layers that own one, dequantized; output channels stand where tokens do."""

    def __init__(self) -> None:
        self._numbers: dict[SiteKey, SiteNumbers] = {}
        self._refused: dict[str, str] = {}
        self._reducers = Reducers()

    @staticmethod
    def concerns(statistics: frozenset[Statistic]) -> bool:
        """Leave out layers of which only the files are compared."""
        return bool(statistics - {STORED})

    def look_at(self, name: str, layer: Layer, statistics: frozenset[Statistic]) -> None:
        """Reduce one weight: [out, in], or [n] where it's no matrix; note one in a format that is not known."""
        try:
            weight = dequantized(layer)
        except InfraError as error:
            self._refused[name] = str(error)
            return
        if weight is not None:
            observer = StreamObserver(statistics, self._reducers)
            matrix = weight.dim() >= 2
            # One population: the rows of a matrix, which are its output channels, take the place of tokens.
            observer.add(weight.flatten(1)[None] if matrix else weight[None], [None], [0], 0, token_axis=matrix)
            self._numbers[name, "weight"] = observer.numbers(statistics)

    def finish(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add the numbers of all weights."""
        numbers |= self._numbers

    def complete(self, capture: Capture) -> Capture:
        """Add which weights are refused."""
        return replace(capture, refused={**capture.refused, **self._refused}) if self._refused else capture


class StoredComparison(_Weights):
    """Compares loaded weights with what the checkpoint's own files hold of them."""

    def __init__(self, stored: StoredWeights) -> None:
        self._stored = stored
        self._powers: dict[str, NDArray[np.float64]] = {}
        self._uncompared: dict[str, str] = {}

    @staticmethod
    def concerns(statistics: frozenset[Statistic]) -> bool:
        """Take the layers at which that is asked for."""
        return STORED in statistics

    def look_at(self, name: str, layer: Layer, statistics: frozenset[Statistic]) -> None:
        """Compare one layer's weight, if the files hold it quantized."""
        try:
            powers = self._stored.powers(name, layer)
        except InfraError as error:  # of this layer alone: the others, and what else is measured, can be judged
            self._uncompared[name] = str(error)
            return
        if powers is not None:
            self._powers[name] = powers

    def finish(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add the powers to the numbers of each weight, or to none where nothing else was asked for."""
        zero = np.zeros(1, dtype=np.int32)
        for layer, powers in self._powers.items():
            nothing = SiteNumbers("", (), False, self._wanted[layer], zero, zero, np.zeros(1, dtype=np.int64))
            numbers[layer, "weight"] = numbers.get((layer, "weight"), nothing).having((), {"stored": powers})

    def complete(self, capture: Capture) -> Capture:
        """Add which layers can't be compared."""
        return replace(capture, uncompared={**capture.uncompared, **self._uncompared}) if self._uncompared else capture

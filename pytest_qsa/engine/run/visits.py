"""What the hooks do: reduce a tensor once wherever it is seen, and end a forward where nothing more is needed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...captures import EXPERTS, SiteKey, SiteNumbers, Statistic
from ...common import InfraError
from ..load.batches import Rows
from ..modules import Routing, channels_first
from ..reduce.observer import Reducers, StreamObserver
from ..reduce.storage import Transfer


class PassComplete(Exception):  # noqa: N818 - a signal, not an error
    """Raised in the hook of the last planned call: nothing after it is needed."""


class CompanionChanged(Exception):  # noqa: N818 - a signal, not an error
    """The reference shares its tensors, or calls its layers, otherwise than its first forward told."""

    def __init__(self, site: SiteKey | None) -> None:
        super().__init__(site)
        self.site = site


class CallsChanged(Exception):  # noqa: N818
    """Where the pass stopped other layers had been called than in the first batch; it starts again without stopping."""


class SharingChanged(Exception):  # noqa: N818
    """A site that read another's tensor now reads its own; the pass starts again without that sharing."""

    def __init__(self, site: SiteKey) -> None:
        super().__init__(site)
        self.site = site


@dataclass(slots=True)
class _Seen:
    """A tensor that was reduced in this forward; it lives on only if the model itself keeps it."""

    tensor: weakref.ref[Tensor]
    version: int | None
    site: SiteKey
    call: int


@dataclass
class Forward:
    """The state of one forward: whose rows run, which calls were made, which tensors were seen."""

    rows: Rows
    first: bool
    calls: dict[SiteKey, int] = field(default_factory=dict)
    seen: dict[int, _Seen] = field(default_factory=dict)
    last: tuple[SiteKey, int] | None = None
    flight: Any = None
    """The forward of the reference over the same rows, where there is one."""


@dataclass(frozen=True)
class Order:
    """What the first forward told: its last call that is needed, and how often each site had been called by then."""

    last: tuple[SiteKey, int] | None
    calls: Mapping[SiteKey, int]


@dataclass
class Visits:
    """The state of one pass: observers by site, which site reads whose tensor, and the forward that is running."""

    wanted: Mapping[SiteKey, frozenset[Statistic]]
    modules: Mapping[str, nn.Module]
    unshared: frozenset[SiteKey]
    may_stop: bool = True
    observers: dict[SiteKey, StreamObserver] = field(default_factory=dict)
    shared: dict[SiteKey, SiteKey] = field(default_factory=dict)
    reducers: Reducers = field(default_factory=Reducers)
    forward: Forward | None = None
    order: Order | None = None
    sharing: set[SiteKey] = field(default_factory=set)
    learning: bool = True
    _lacking: dict[SiteKey, frozenset[Statistic]] = field(default_factory=dict)

    def visit(
        self, site: SiteKey, tensor: Tensor | None, routing: Routing | None = None, inputs: Tensor | None = None
    ) -> None:
        """Reduce a site's tensor, or note that it has been reduced at another site of this forward.

        `routing`: where the tensor's tokens go, which another site that reads it need not know. `inputs`: what went
        into the layer, which only a reference has to know.
        """
        forward = self.forward
        if tensor is None or forward is None:
            return
        call = forward.calls.get(site, 0)
        forward.calls[site] = call + 1
        owner = self._owner(forward, site, tensor, call) if self.learning or site in self.sharing else None
        missing = self.wanted[site] if owner is None else self._lacking[site]
        if routing is not None:
            missing |= self.wanted[site] & {EXPERTS}
        if missing:
            self._reduce(forward.rows, site, tensor, call, missing, routing)
        forward.last = (site, call)
        if self.order is not None and forward.last == self.order.last:
            if forward.calls != self.order.calls:
                raise CallsChanged
            raise PassComplete

    def _owner(self, forward: Forward, site: SiteKey, tensor: Tensor, call: int) -> SiteKey | None:
        seen = forward.seen.get(id(tensor))
        version = _version(tensor)
        fresh = seen is None or seen.tensor() is not tensor or seen.version != version or version is None
        known = self.shared.get(site)
        if known is not None:
            if fresh or seen is None or seen.site != known or seen.call != call:
                raise SharingChanged(site)
            return known
        if fresh or seen is None:
            forward.seen[id(tensor)] = _Seen(weakref.ref(tensor), version, site, call)
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
        rows: Rows,
        site: SiteKey,
        tensor: Tensor,
        call: int,
        statistics: frozenset[Statistic],
        routing: Routing | None,
    ) -> None:
        observer = self.observers.get(site) or self._observer(site, statistics)
        try:
            shaped, token_axis = rows.shaped(tensor, observer.channels_first)
        except InfraError as error:
            raise InfraError(f"the {site[1]} of {site[0]}: {error}") from None
        padded = token_axis and rows.padded
        keep = rows.kept(site[0], shaped.shape[1], shaped.device) if padded else rows.all_count
        observer.add(shaped, keep, rows.samples, call, token_axis, routing)

    def _observer(self, site: SiteKey, statistics: frozenset[Statistic]) -> StreamObserver:
        first = channels_first(self.modules[site[0]])
        made = self.observers[site] = StreamObserver(statistics, self.reducers, channels_first=first)
        return made

    def end(self, forward: Forward) -> None:
        """End a forward; the first one tells which call is the last that is needed."""
        for site, owner in self.shared.items():
            if forward.calls.get(site, 0) != forward.calls.get(owner, 0):
                raise SharingChanged(site)
        self.learning &= not forward.first
        if forward.first and self.may_stop and all(site in forward.calls for site in self.wanted):
            self.order = Order(forward.last, dict(forward.calls))
        forward.seen.clear()

    def numbers(self) -> dict[SiteKey, SiteNumbers]:
        """Fetch the numbers of every site; a site that read another's tensor shares what was reduced there."""
        fetched = Transfer(tensor for observer in self.observers.values() for tensor in observer.tensors())
        own = {site: observer.numbers(self.wanted[site], fetched) for site, observer in self.observers.items()}
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
    return lent.having(own.statistics, own.arrays)

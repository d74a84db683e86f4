"""The partner of a pass: the reference model that every sample of the subject is compared with, as it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from ...captures import (
    AGREEMENT,
    ERROR,
    REFERENCE_SINKS,
    REFERENCE_TOKENS,
    SINKS,
    TOKENS,
    Capture,
    ChannelError,
    LocalError,
    Sinks,
    SiteKey,
    SiteNumbers,
    Statistic,
    against_reference,
    find_sinks,
    renumbered,
)
from ...common import AnomalyError
from ..load.batches import Batch, rows_of
from ..modules import Routing, blocks_of, device_of, layers_of
from ..run.hooks import evaluating, hooked, run_batch
from ..run.rehearsal import rehearsal_of
from ..run.visits import CompanionChanged, Forward, Order, Visits
from ..stream.stream import WAVE, Stream
from .compare import Pairs
from .lockstep import Companion, ReferenceVisits
from .weight_pairs import weighed

Wanted = Mapping[SiteKey, frozenset[Statistic]]


@dataclass
class PairedVisits(Visits):
    """The subject's hooks, where a reference runs beside it."""

    pairs: Pairs = field(kw_only=True)

    def visit(
        self, site: SiteKey, tensor: Tensor | None, routing: Routing | None = None, inputs: Tensor | None = None
    ) -> None:
        """Meet the reference, then reduce what is wanted of the subject alone."""
        forward = self.forward
        if tensor is not None and forward is not None and site in self.pairs.meeting:
            call = forward.calls.get(site, 0)
            self.pairs.compare(forward.rows, site, call, forward.flight.at(site, call), tensor)
        super().visit(site, tensor, routing)

    def end(self, forward: Forward) -> None:
        """End a forward."""
        super().end(forward)
        self.pairs.forget()

    def numbers(self) -> dict[SiteKey, SiteNumbers]:
        """Fetch the numbers of every site, with what was compared."""
        return self.pairs.numbers(super().numbers())


def paired(
    pairs: Pairs, wanted: Wanted, modules: Mapping[str, nn.Module], unshared: frozenset[SiteKey], *, may_stop: bool
) -> PairedVisits:
    """Return the subject's hooks: what the reference isn't needed for is reduced of the subject alone."""
    alone = {site: statistics - against_reference(statistics) for site, statistics in wanted.items()}
    return PairedVisits(alone, modules, unshared, may_stop=may_stop, pairs=pairs)


def _needs_sinks(statistic: Statistic) -> bool:
    return isinstance(statistic, ChannelError) and statistic.positions in ("sink", "no_sink")


@dataclass
class Partner:
    """A reference that runs beside the subject. `stream`: reads its weights while it runs."""

    model: nn.Module
    stream: Stream | None = None
    modules: Mapping[str, nn.Module] = field(init=False)
    _scores: bool = False
    _pairs: Wanted = field(default_factory=dict)
    _own: Wanted = field(default_factory=dict)
    _unshared: frozenset[SiteKey] = frozenset()
    _order: Order | None = None
    _may_stop: bool = True
    _sinks: Sinks = field(default_factory=lambda: Sinks((), searched=False))
    _companion: Companion | None = None
    _hooks: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.modules = layers_of(self.model)

    @contextmanager
    def ready(
        self, batches: Sequence[Batch], first_sample: int, wanted: Wanted, scores: frozenset[Statistic]
    ) -> Iterator[None]:
        """Prepare for a pass over these batches; afterwards the reference is as it was.

        Raises:
            AnomalyError: it lacks a layer that it is to be compared at.
        """
        self._plan(wanted, scores)
        with evaluating(self.model), ExitStack() as stack:
            stack.callback(lambda: self._hooks.close())
            if self.stream is not None:
                if self._own:
                    self._unshared, self._order = rehearsal_of(self.model, self.modules, batches[0], self._own)
                stack.enter_context(self.stream.ready())
            if any(map(_needs_sinks, chain.from_iterable(self._pairs.values()))):
                self._sinks = self._find_sinks(batches, first_sample)
            yield

    def _plan(self, wanted: Wanted, scores: frozenset[Statistic]) -> None:
        self._scores = AGREEMENT in scores
        pairs = {site: against_reference(statistics) for site, statistics in wanted.items()}
        absent = [site[0] for site, statistics in pairs.items() if statistics and site[0] not in self.modules]
        if absent:
            raise AnomalyError(
                f"the reference has no layer {absent[0]}{f' (and {len(absent) - 1} more)' if absent[1:] else ''}: "
                "is model.reference the original of this model?"
            )
        activations = {site: names for site, names in pairs.items() if names and site[1] != "weight"}
        own = {
            site: frozenset({TOKENS}) if REFERENCE_TOKENS in names else frozenset()
            for site, names in activations.items()
        }
        if any(REFERENCE_SINKS in names for names in activations.values()):
            own |= {
                (block, "output"): own.get((block, "output"), frozenset()) | {TOKENS, SINKS}
                for block in blocks_of(self.model)
            }
        self._own = own
        self._pairs = activations

    def visits(
        self, wanted: Wanted, modules: Mapping[str, nn.Module], unshared: frozenset[SiteKey], *, may_stop: bool
    ) -> Visits:
        """Begin a try of the pass over the subject's `modules`."""
        return paired(self._begin(modules), wanted, modules, unshared, may_stop=may_stop)

    def _begin(self, modules: Mapping[str, nn.Module]) -> Pairs:
        self._hooks.close()
        pairs = Pairs(self._pairs, modules, self._sinks.among)
        locals_ = {site for site, names in self._pairs.items() if any(isinstance(name, LocalError) for name in names)}
        may_stop = self._may_stop and not self._scores and self.stream is None
        state = ReferenceVisits(
            self._own, self.modules, self._unshared, may_stop=may_stop, pairs=frozenset(pairs.meeting)
        )
        state.order = self._order if self._may_stop and not self._scores else None
        self._hooks.enter_context(hooked(self.modules, state, frozenset(locals_)))
        self._companion = Companion(self.model, state, self._device, run_batch, self.stream)
        return pairs

    def fly(self, batch: Batch, forward: Forward) -> None:
        """Let the reference begin one forward of the subject as well, where it is needed."""
        assert self._companion is not None
        if self._own or self._scores:
            own = Forward(rows_of(batch, forward.rows.samples[0]), first=forward.first)
            forward.flight = self._companion.flight(batch, own)

    def learn(self, change: CompanionChanged) -> None:
        """Take note of what the first forward of the reference didn't tell."""
        if change.site is None:
            self._may_stop = False
        else:
            self._unshared |= {change.site}

    def capture(self, first_sample: int) -> Capture:
        """Return the reference's own numbers; its samples are numbered from 0."""
        found = self._companion.state.numbers() if self._companion else {}
        own = {site: numbers for site, numbers in found.items() if self._own[site]}
        return Capture(
            sites=renumbered(own, first_sample), modules=tuple(self.modules), blocks=tuple(blocks_of(self.model))
        )

    def weighed(
        self,
        modules: Mapping[str, nn.Module],
        wanted: Wanted,
        numbers: Mapping[SiteKey, SiteNumbers],
        stream: Stream | None,
    ) -> dict[SiteKey, SiteNumbers]:
        """Add what the weights of both models say; those of a streamed model are read for it once more."""
        compared = [site for site, names in wanted.items() if ERROR in names]
        with stream.ready() if stream is not None and compared else nullcontext():
            return {**numbers, **weighed(compared, (self.modules, modules), (self.stream, stream), numbers)}

    @property
    def _device(self) -> torch.device:
        return self.stream.device if self.stream is not None else device_of(self.model)

    def _find_sinks(self, batches: Sequence[Batch], first_sample: int) -> Sinks:
        """Run the reference alone for its sinks: a channel's error is summed up in the pass, so they come first."""
        wanted: Wanted = {(block, "output"): frozenset({TOKENS, SINKS}) for block in blocks_of(self.model)}
        if not wanted:
            return Sinks((), searched=False)
        state = Visits(wanted, self.modules, frozenset(wanted), may_stop=False)
        forwards, sample = [], first_sample
        for batch in batches:
            forwards.append(Forward(rows_of(batch, sample), first=False))
            sample += len(forwards[-1].rows.samples)

        def run(index: int) -> None:
            run_batch(self.model, batches[index], self._device)
            state.end(forwards[index])

        def resumed(start: int, index: int) -> None:
            state.forward = forwards[start + index]

        with torch.no_grad(), hooked(self.modules, state):
            for start in range(0, len(batches), WAVE):
                wave = range(start, min(start + WAVE, len(batches)))
                if self.stream is not None:
                    self.stream.run([partial(run, index) for index in wave], partial(resumed, start))
                    continue
                for index in wave:
                    resumed(0, index)
                    run(index)
        return find_sinks({layer: numbers for (layer, _), numbers in state.numbers().items()})

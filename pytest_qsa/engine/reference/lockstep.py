"""The reference beside the subject: its forward waits at each site until the subject's has come there.

Each forward of the reference runs in a greenlet below the subject's, which drives it: where the subject is at a site,
the reference goes on to the same one. So neither model's tensor is kept longer than the pair of them needs, and two
streamed models have one unit of each in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ...captures import SiteKey
from ...common import InfraError
from ..load.batches import Batch
from ..modules import Routing
from ..reduce.pairs import powers_of
from ..run.visits import CallsChanged, CompanionChanged, Forward, PassComplete, SharingChanged, Visits
from ..stream.stream import Stream
from ..stream.units import Unit
from .compare import Met, check_rows, drawn_rows, run_rows

Run = Callable[[nn.Module, Batch, torch.device], Any]


@dataclass
class ReferenceVisits(Visits):
    """The reference's hooks: the subject meets it at `pairs`; where it wants `inputs`, with what the layer got."""

    pairs: frozenset[SiteKey] = frozenset()
    inputs: frozenset[SiteKey] = frozenset()
    _checks: list[tuple[str, Tensor]] = field(default_factory=list)

    def visit(
        self, site: SiteKey, tensor: Tensor | None, routing: Routing | None = None, inputs: Tensor | None = None
    ) -> None:
        """Wait for the subject, then reduce what is wanted of the reference itself."""
        forward = self.forward
        if tensor is not None and forward is not None and site in self.pairs:
            if inputs is not None and forward.first:
                self._check(site[0], inputs, tensor, forward)
            forward.flight.meet((site, forward.calls.get(site, 0)), Met(tensor, inputs))
            self.forward = forward
        super().visit(site, tensor, routing)

    def _check(self, layer: str, inputs: Tensor, tensor: Tensor, forward: Forward) -> None:
        rows = forward.rows
        kept = rows.kept(layer, tensor.shape[1])[0] if tensor.dim() == 3 else None
        drawn = drawn_rows(rows.samples[0], tensor.shape[1], kept, 8).to(tensor.device, non_blocking=True)
        alone = run_rows(self.modules[layer], layer, inputs[0].index_select(0, drawn))
        powers = powers_of(tensor[0].index_select(0, drawn), alone, None)
        self._checks.append((layer, powers[:, :2].sum(dim=0)))

    def end(self, forward: Forward) -> None:
        """End a forward; the first one tells which layers can be run on single tokens."""
        checks, self._checks = self._checks, []
        for layer, powers in checks:
            check_rows(layer, powers)
        super().end(forward)


@dataclass
class Companion:
    """A reference that is run. `state`: what is wanted of it."""

    model: nn.Module
    state: ReferenceVisits
    device: torch.device
    run: Run
    stream: Stream | None = None

    def flight(self, batch: Batch, forward: Forward) -> Flight:
        """Return the forward of one batch, which begins when the subject first asks."""
        forward.flight = flight = Flight(self, batch, forward)
        return flight


@dataclass
class Flight:
    """One forward of the reference, as far as the subject has driven it."""

    companion: Companion
    batch: Batch
    forward: Forward
    waiting: dict[tuple[SiteKey, int], Met] = field(default_factory=dict)
    output: Any = None
    _greenlet: greenlet | None = None
    _awaited: Unit | None = None

    def at(self, site: SiteKey, call: int) -> Met | None:
        """Go on until the reference is where the subject is; None if it never comes there."""
        key = (site, call)
        while key not in self.waiting and self._advance():
            pass
        return self.waiting.pop(key, None)

    def end(self, *, whole: bool) -> Any:
        """Let the reference come to its end; return its output, if it ran as a whole."""
        while self._advance():
            pass
        self.companion.state.end(self.forward)
        if whole and self.output is None:
            raise InfraError("the forward of the reference ended before its logits")
        return self.output

    def meet(self, key: tuple[SiteKey, int], met: Met) -> None:
        """Wait for the subject (called by the reference's hooks)."""
        self.waiting[key] = met
        parent = getcurrent().parent
        assert parent is not None
        parent.switch(None)

    def settle(self) -> None:
        """Go on to where the next weights or the subject are needed: no more than a hidden state is held there."""
        if self._greenlet is not None and self._awaited is None and not self.waiting:
            self._awaited = self._switch()

    def _advance(self) -> bool:
        """Go on to the next site; say whether there may be more."""
        awaited, self._awaited = self._awaited or self._switch(), None
        while awaited is not None:
            parent = getcurrent().parent  # the stream's, which loads the unit once all samples wait for it
            assert parent is not None
            parent.switch(awaited)
            awaited = self._switch()
        assert self._greenlet is not None
        return not self._greenlet.dead

    def _switch(self) -> Unit | None:
        """Let the reference run; return the unit that it waits for, if it does."""
        if self._greenlet is None:
            self._greenlet = greenlet(self._fly)
        if self._greenlet.dead:
            return None
        self.companion.state.forward = self.forward
        awaited = self._greenlet.switch()
        return awaited if isinstance(awaited, Unit) else None

    def _fly(self) -> None:
        companion = self.companion
        try:
            with suppress(PassComplete):
                self.output = companion.run(companion.model, self.batch, companion.device)
        except SharingChanged as change:
            raise CompanionChanged(change.site) from None
        except CallsChanged:
            raise CompanionChanged(None) from None
        except RuntimeError as error:
            raise InfraError(
                f"the forward pass of the reference, {type(companion.model).__name__}, failed: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def close(self) -> None:
        """Abandon the forward."""
        if self._greenlet is not None and not self._greenlet.dead:
            with suppress(GreenletExit):
                self._greenlet.throw(GreenletExit)
        self.waiting.clear()

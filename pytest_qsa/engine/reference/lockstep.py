"""One forward of a live reference: a greenlet that goes on as far as the subject's forward has come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from greenlet import getcurrent, greenlet
from torch import Tensor

from ...captures import SiteKey
from ...common import InfraError
from ..modules import forward_errors
from ..reduce.pairs import powers_of
from ..run.decode import run_forward
from ..run.participant import Forward, ForwardComplete
from ..stream.stream import Unit
from .pair_statistics import ReferenceTensor, check_rows, drawn_rows, run_rows

if TYPE_CHECKING:
    from .live import LiveReference


class Lockstep:
    """One forward of the reference, as far as the subject has driven it."""

    def __init__(self, reference: LiveReference, forward: Forward) -> None:
        self._reference = reference
        self._forward = forward
        self._waiting: dict[tuple[SiteKey, int], ReferenceTensor] = {}
        self._output: object = None
        self._greenlet = greenlet(self._run)
        self._awaited: Unit | None = None
        self._alone: list[tuple[str, Tensor]] = []

    def tensor_at(self, site: SiteKey, call: int) -> ReferenceTensor | None:
        """Go on until the reference is where the subject is; None if it never comes there."""
        key = (site, call)
        # The models may call their layers in another order: tensors that the subject has not asked for yet wait.
        while key not in self._waiting and self._advance():
            pass
        return self._waiting.pop(key, None)

    def finish(self, *, whole: bool) -> object:
        """Let the reference come to its end; return its output, None where it was stopped.

        Raises:
            InfraError: `whole` is asked for, and it was stopped.
            AnomalyError: a layer can't be run on single tokens, as its local error requires.
        """
        while self._advance():
            pass
        for layer, powers in self._alone:
            check_rows(layer, powers)
        self._reference.statistics.forward_ended(self._forward)
        if whole and self._output is None:
            raise InfraError("the forward of the reference ended before its logits")
        return self._output

    def run_alone(self, layer: str, inputs: Tensor, outputs: Tensor) -> None:
        """Run a layer on a few tokens of its inputs [B, T, C], to see at the end whether it gives the same for them."""
        rows = self._forward.rows
        # A block of experts takes the samples of a batch together.
        inputs = rows.shaped(inputs, False)[0]
        outputs, has_tokens = rows.shaped(outputs, False)
        if not has_tokens:  # as of a pooler, whose local error is none
            return
        kept = rows.unpadded(layer, outputs.shape[1])[0]
        drawn = drawn_rows(rows.samples[0], outputs.shape[1], kept, 8).to(outputs.device, non_blocking=True)
        alone = run_rows(self._reference.modules[layer], layer, inputs[0].index_select(0, drawn))
        powers = powers_of(outputs[0].index_select(0, drawn), alone, None)
        self._alone.append((layer, powers[:, :2].sum(dim=0)))

    def wait_for_subject(self, key: tuple[SiteKey, int], tensor: ReferenceTensor) -> None:
        """Let the subject go on, in the greenlet of the reference."""
        self._waiting[key] = tensor
        _parent().switch(None)

    def settle(self) -> None:
        """Go on to where the next weights or the subject are needed: no more than a hidden state is held there."""
        # A suspended forward keeps the activations of its layer alive; between units it keeps a hidden state alone.
        if self._greenlet and self._awaited is None and not self._waiting:
            self._awaited = self._switch()

    def _advance(self) -> bool:
        """Go on to the next site; say whether there may be more."""
        awaited, self._awaited = self._awaited or self._switch(), None
        while awaited is not None:
            _parent().switch(awaited)  # the stream's greenlet, which loads the unit once all samples wait for it
            awaited = self._switch()
        return not self._greenlet.dead

    def _switch(self) -> Unit | None:
        """Let the reference run; return the unit that it waits for, if it does."""
        if self._greenlet.dead:
            return None
        # Several forwards of the reference may be suspended: its hooks must know whose tensors they see.
        self._reference.statistics.forward = self._forward
        awaited = self._greenlet.switch()
        return awaited if isinstance(awaited, Unit) else None

    def _run(self) -> None:
        reference = self._reference
        try:
            with forward_errors(f"the reference, {type(reference.model).__name__},"):
                batch = self._forward.batch
                self._output = run_forward(reference.model, batch, reference.device, reference.statistics)
        except ForwardComplete:
            pass


def _parent() -> greenlet:
    parent = getcurrent().parent
    assert parent is not None  # only the main greenlet has none, and it never waits
    return parent

"""What takes part in a pass over a model, and the pass and its forwards as a participant sees them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence, Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor, nn

from ...captures import LOGITS, Capture, PredictionMargins, Request, SiteKey, SiteNumbers, Statistic
from ..heads import LastHidden
from ..load.batches import Batch, BatchRows
from ..modules import Layer, device_of
from ..stream.stream import Stream

WantedSites = Mapping[SiteKey, frozenset[Statistic]]
"""Which statistics are wanted at each site."""


class ForwardComplete(BaseException):
    """Raised in the hook of the last call that is needed: the rest of the forward need not run.

    It is no `Exception`, so that a model's own `except Exception` can't catch it; nor is `Restart`.
    """


class Restart(BaseException):
    """A later forward contradicts what the first one showed, so the pass has to start again.

    Whoever raises it has noted the difference, so that the next attempt doesn't stumble over it.
    """


class Need(IntEnum):
    """How much has to run for a participant; the pass runs the most that any of them needs."""

    NOTHING = 0
    ONE_FORWARD = 1
    """The first batch."""
    FORWARDS = 2
    """Every batch, as far as the last site that is wanted."""
    WHOLE_FORWARDS = 3
    """Every batch, to the model's output."""


@dataclass(frozen=True)
class Pass:
    """What is run. `requests`: what its capture has to answer; `first_sample`: the number of the first row.

    `layers`: what may own a weight, the `modules` and the layers of packed experts among them.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    layers: Mapping[str, Layer]
    blocks: Sequence[str]
    batches: Sequence[Batch]
    requests: tuple[Request, ...]
    wanted: WantedSites
    first_sample: int = 0
    stream: Stream | None = None

    @cached_property
    def predictions(self) -> frozenset[Statistic]:
        """What is wanted of the model's predictions."""
        return frozenset().union(*(request.statistics for request in self.requests if request.site == LOGITS))

    @property
    def wants_margins(self) -> bool:
        """Whether both models' logits are compared more exactly than they come."""
        return any(isinstance(statistic, PredictionMargins) for statistic in self.predictions)

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        # A streamed model has its weights on the meta device, except while they are loaded.
        return self.stream.device if self.stream is not None else device_of(self.model)


@dataclass(slots=True)
class SeenTensor:
    """A tensor that was reduced in this forward; it lives on only if the model itself keeps it."""

    tensor: weakref.ref[Tensor]
    version: int | None
    site: SiteKey
    call: int


@dataclass
class Forward:
    """The state of one forward of a model.

    `first`: the first of the pass, which shows which sites share a tensor and where later forwards may stop.
    `calls`: how often each site has been reached; `last`: where that was, and in which of its calls.
    `seen`: the tensors that were reduced, by id. `stopped_at`: the site after which it was stopped, None if it ran
    to its end. `reference_output`: what the reference returned for the same batch, if it ran to its end;
    `reference_hidden`: what its head made that of, where margins are wanted.
    """

    batch: Batch
    rows: BatchRows
    first: bool
    calls: dict[SiteKey, int] = field(default_factory=dict)
    seen: dict[int, SeenTensor] = field(default_factory=dict)
    last: tuple[SiteKey, int] | None = None
    stopped_at: SiteKey | None = None
    reference_output: object = None
    reference_hidden: LastHidden | None = None


class Participant:
    """Takes part in a pass over a model. A subclass overrides what concerns it; the rest does nothing.

    The pass calls `prepare` once; then, for each attempt at all forwards, `begin`; then for each forward
    `forward_resumed`, `forward_started`, `visit` (from the hooks) and `forward_ended`; then `weights_loaded` and
    `finish`. `contribute` and `complete` make a capture, of all samples or of those that have run so far.

    `needs`: how much has to run. `sites`: the sites whose tensors `visit` gets, of every batch.
    `input_sites`: the output sites at which it also gets what went into the layer.
    `awaited_weights`: the layers whose weights it still has to see.
    `stream`: reads the weights of a model of its own while the pass runs. `uses_cache`: the model has to fill its KV
    cache.
    """

    needs: Need = Need.NOTHING
    sites: AbstractSet[SiteKey] = frozenset()
    input_sites: AbstractSet[SiteKey] = frozenset()
    awaited_weights: AbstractSet[str] = frozenset()
    stream: Stream | None = None
    uses_cache: bool = False

    def prepare(self, run: Pass, exits: ExitStack) -> None:
        """Get ready for a pass; what goes onto `exits` is undone after it."""

    def begin(self, exits: ExitStack) -> None:
        """Begin an attempt at all forwards, without anything that an earlier one left."""

    def forward_resumed(self, forward: Forward) -> None:
        """Note which forward runs from here on. In a streamed pass many are under way, and each waits for weights."""

    def forward_started(self, forward: Forward) -> None:
        """Get ready for the forward of one batch."""

    def visit(self, forward: Forward, site: SiteKey, call: int, tensor: Tensor, inputs: Tensor | None) -> None:
        """Look at the tensor of one of `sites`, before it's reduced. `inputs`: see `input_sites`."""

    def forward_ended(self, forward: Forward, output: object) -> None:
        """Take what a forward returned, None if it was stopped after its last site."""

    def weights_loaded(self, layers: Iterable[str]) -> None:
        """Look at the weights of some layers, which are in memory now."""

    def contribute(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add the numbers of the samples so far to those of the participants before."""

    def finish(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add what needs no samples, after the last forward."""

    def complete(self, capture: Capture) -> Capture:
        """Return the capture with what this participant adds beside the subject's numbers."""
        return capture

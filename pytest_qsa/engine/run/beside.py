"""What stands beside the subject in its pass, as the pass sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from ...captures import Capture, SiteKey, SiteNumbers, Statistic
from ..load.batches import Batch
from ..stream.stream import Stream
from .visits import CompanionChanged, Forward, Visits

Wanted = Mapping[SiteKey, frozenset[Statistic]]


class Beside(Protocol):
    """What stands beside the subject in its pass: a reference that runs, or one that was kept."""

    @property
    def stream(self) -> Stream | None:
        """What reads its weights while it runs, if it has any."""

    def ready(
        self, batches: Sequence[Batch], first_sample: int, wanted: Wanted, scores: frozenset[Statistic]
    ) -> AbstractContextManager[None]:
        """Prepare for a pass over these batches."""

    def visits(
        self, wanted: Wanted, modules: Mapping[str, nn.Module], unshared: frozenset[SiteKey], *, may_stop: bool
    ) -> Visits:
        """Begin a try of the pass; return the subject's hooks."""

    def fly(self, batch: Batch, forward: Forward) -> None:
        """Begin one forward of the subject."""

    def learn(self, change: CompanionChanged) -> None:
        """Take note of what the first forward of the reference didn't tell."""

    def capture(self, first_sample: int) -> Capture | None:
        """Return the reference's own numbers; its samples are numbered from 0."""

    def weighed(
        self,
        modules: Mapping[str, nn.Module],
        wanted: Wanted,
        numbers: Mapping[SiteKey, SiteNumbers],
        stream: Stream | None,
    ) -> dict[SiteKey, SiteNumbers]:
        """Add what the weights of both models say."""

"""A pass over a part of the samples: those of one process, those that were asked for, the rest of a stopped pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

from ...captures import Capture, PartialSums, Provenance, Request, SampleRange, merge
from ...common import InfraError, Progress, logger, phase
from ..load.batches import Batch, row_count
from ..load.models import Loaded, quiet
from ..load.tokenizer import decoder_of
from ..modules import forward_errors
from ..ranks import Ranks
from .participant import Participant
from .run_pass import run_pass


@dataclass(frozen=True)
class SampleShare:
    """Which part of the samples is run here, and how it goes on where an earlier run was stopped.

    `samples`: first and end, None for all. `ranks`: the processes that run a part each. `sums`: of an unfinished pass.
    """

    samples: tuple[int, int] | None = None
    ranks: Ranks = field(default_factory=Ranks)
    sums: PartialSums | None = None


ALL_SAMPLES = SampleShare()
"""All samples, in this process."""


@dataclass(frozen=True)
class SharedPass:
    """A pass of which this process runs a share of the batches, from where an earlier run was interrupted."""

    loaded: Loaded
    participants: Sequence[Participant]
    batches: Sequence[Batch]
    requests: Sequence[Request]
    progress: Progress | None
    share: SampleShare

    @cached_property
    def starts(self) -> list[int]:
        """The first sample of each batch, and the end of the last one."""
        return [0, *accumulate(map(row_count, self.batches))]

    def own_part(self) -> Capture | None:
        """Return the capture of this process's samples; None where it has none.

        Raises:
            InfraError: the wanted samples are no whole batches; or the pass fails.
        """
        selected = self._selected()
        own = selected[self.share.ranks.share(len(selected))]
        if not own:
            return None
        first, end, total = self.starts[own.start], self.starts[own.stop], self.starts[-1]
        capture = self._run(own, self._interrupted(first, end))
        if self.share.sums is not None:
            self.share.sums.discard()
        samples = None if (first, end) == (0, total) else SampleRange(first, end, total)
        return replace(capture, provenance=Provenance(samples=samples))

    def _selected(self) -> range:
        """Return which batches hold the wanted samples."""
        if self.share.samples is None:
            return range(len(self.batches))
        wanted, starts = self.share.samples, self.starts
        first, end = wanted[0], min(wanted[1], starts[-1])
        # A batch runs as a whole, so that a share can't begin or end inside one.
        if first not in starts or end not in starts or first >= end:
            raise InfraError(
                f"the samples {wanted[0]}:{wanted[1]} are no whole batches: there are {starts[-1]} samples "
                f"in batches of {starts[1]}"
            )
        return range(starts.index(first), starts.index(end))

    def _interrupted(self, first: int, end: int) -> Capture | None:
        """Return what an interrupted pass over the samples from `first` to `end` left of its first ones, if any."""
        done = self.share.sums.load(self.requests) if self.share.sums else None
        held = done.provenance.samples if done else None
        # The earlier run may have had another share or batch size, whose samples end inside a batch of this
        # run.
        if held is None or held.first != first or held.end not in self.starts or not first < held.end < end:
            return None
        logger.debug("an interrupted pass goes on: %d of %d samples are done", held.end - first, end - first)
        return done

    def _run(self, own: range, done: Capture | None) -> Capture:
        """Run some batches; those whose samples are done already are left out."""
        first, end, total = self.starts[own.start], self.starts[own.stop], self.starts[-1]
        held = done.provenance.samples if done else None
        position = held.end if held else first

        def joined(capture: Capture, to: int) -> Capture:
            # `merge` joins captures by the range of samples that each one states.
            part = replace(capture, provenance=Provenance(samples=SampleRange(position, to, total)))
            return merge([done, part]) if done else part

        def save_partial(make: Callable[[], Capture], count: int) -> None:
            if self.share.sums is not None:
                self.share.sums.keep(lambda: joined(make(), position + count))

        def moved(count: int, _: int) -> None:
            if self.progress is not None:
                self.progress(position - first + count, end - first)

        phase("pass", "samples")
        with quiet(), forward_errors(type(self.loaded.model).__name__):  # compressed-tensors shows bars of its own
            capture = run_pass(
                self.loaded.model,
                self.batches[self.starts.index(position) : own.stop],
                self.requests,
                self.participants,
                stream=self.loaded.stream,
                first_sample=position,
                decode=decoder_of(self.loaded.tokenizer),
                progress=moved,
                save_partial=save_partial,
            )
        return joined(capture, end)

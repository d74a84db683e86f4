"""The pass: one forward for each batch, in which every participant takes part, and a Capture at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate

import numpy as np
import torch
from torch import nn

from ...captures import (
    CACHE_SITES,
    LOGITS,
    SINKS,
    SITES,
    TOKENS,
    Capture,
    Request,
    SiteKey,
    SiteNumbers,
    Statistic,
    at_experts,
    match_layers,
    merge_requests,
    renumbered,
)
from ...common import Progress, earlier_objects_frozen, logger
from ..load.batches import Batch, pictures_of, row_count, rows_of, token_ids
from ..modules import Expert, Layer, blocks_of, caching_layers, evaluating, layers_of, with_experts
from ..stream.stream import Stream
from .decode import run_forward
from .next_token import Predictions, decided_otherwise
from .participant import Forward, ForwardComplete, Need, Participant, Pass, Restart
from .rehearsal import rehearse
from .site_statistics import SiteStatistics, WeightStatistics, hooked

Decode = Callable[[Sequence[int]], Mapping[int, str]]
"""Token ids → the text of each."""
SavePartial = Callable[[Callable[[], Capture], int], None]
"""A callback after each batch but the last (each wave of a streamed pass). It gets a function that makes the capture of
the samples so far, and their number."""


def run_pass(
    model: nn.Module,
    batches: Sequence[Batch],
    requests: Iterable[Request],
    participants: Sequence[Participant] = (),
    *,
    stream: Stream | None = None,
    first_sample: int = 0,
    decode: Decode | None = None,
    progress: Progress | None = None,
    save_partial: SavePartial | None = None,
) -> Capture:
    """Run a model once over the batches and return what the requests ask for.

    `batches`: tensors [B, T] (or whatever the model takes), or dicts of forward arguments. `participants`: who takes
    part beside the statistics of the requested sites and predictions: a reference, say. `stream`: reads the weights
    while the model runs; without it they are in memory. `first_sample`: the number of the first row among all samples
    of the subject. Afterwards the model's mode and hooks are as they were.
    """
    modules, blocks, requests = layers_of(model), blocks_of(model), merge_requests(requests)
    layers = with_experts(modules)
    wanted = wanted_sites(layers, blocks, requests)
    run = Pass(model, modules, layers, blocks, batches, requests, wanted, first_sample, stream)
    return _Running(run, participants, decode, progress, save_partial).capture()


def wanted_sites(
    layers: Mapping[str, Layer], blocks: Sequence[str], requests: Iterable[Request]
) -> dict[SiteKey, frozenset[Statistic]]:
    """Return what is to be measured at each site, in model order; where sinks matter, the blocks' outputs as well."""
    wanted: dict[SiteKey, frozenset[Statistic]] = {}
    for request in requests:
        if request.site == LOGITS:
            continue
        of_experts = at_experts(request.site, request.statistics)
        names = caching_layers(layers) if request.site in CACHE_SITES else layers
        for name in match_layers(list(names), request.pattern, request.exclude):
            if isinstance(layers[name], Expert) and not of_experts:
                continue  # nothing calls it, so that it has a weight alone
            statistics = of_experts if isinstance(layers[name], Expert) else request.statistics
            wanted[name, request.site] = wanted.get((name, request.site), frozenset()) | statistics
        if SINKS in request.statistics and request.site != "weight":
            for block in blocks:
                wanted[block, "output"] = wanted.get((block, "output"), frozenset()) | {TOKENS, SINKS}
    order = {name: index for index, name in enumerate(layers)}
    return dict(sorted(wanted.items(), key=lambda item: (order[item[0][0]], SITES.index(item[0][1]))))


class _Running:
    """A pass while it runs: its participants, and whoever follows how far it is."""

    def __init__(
        self,
        run: Pass,
        participants: Sequence[Participant],
        decode: Decode | None,
        progress: Progress | None,
        save_partial: SavePartial | None,
    ) -> None:
        self.run = run
        self.decode = decode
        self.progress = progress
        self.save_partial = save_partial
        activations = {
            site: statistics
            for site, statistics in run.wanted.items()
            if site[1] != "weight" and site[0] in run.modules  # nothing calls the layers of packed experts
        }
        # A participant sees tensors through the hooks of the statistics, so that its sites need entries, even
        # empty ones.
        if run.predictions:  # after the reference, whose output it may compare with
            participants = [*participants, Predictions(run)]
        seen_by_others = {site: frozenset[Statistic]() for other in participants for site in other.sites}
        alone = [run.layers[name] for name, site in run.wanted if site != "weight"]
        seen_by_others |= {(each.holder, "input"): frozenset() for each in alone if isinstance(each, Expert)}
        self.statistics = SiteStatistics(seen_by_others | activations, run.modules, learns_order=run.stream is None)
        # Each adds to the numbers of those before it: the reference to the sites', StoredComparison to the
        # weights'.
        self.participants = [self.statistics, WeightStatistics(), *participants]
        self.need = max(participant.needs for participant in self.participants)
        self.statistics.may_stop = self.need < Need.WHOLE_FORWARDS
        self.batches = run.batches[:1] if self.need is Need.ONE_FORWARD else run.batches
        self.ends = list(accumulate(map(row_count, self.batches)))

    def capture(self) -> Capture:
        """Run all of it."""
        run, stream = self.run, self.run.stream
        use_cache = any(participant.uses_cache for participant in self.participants)
        with earlier_objects_frozen(), evaluating(run.model, use_cache=use_cache), ExitStack() as exits:
            for participant in self.participants:
                participant.prepare(run, exits)
            if stream is not None:
                if self.statistics.wanted:
                    rehearse(run.model, self.statistics, self.batches[0])
                exits.enter_context(stream.ready(self._look_at_weights))
            numbers: dict[SiteKey, SiteNumbers] = {}
            if self.need is not Need.NOTHING:
                self._run_forwards()
                numbers = self._numbers()
            began = time.perf_counter()
            if stream is not None:
                stream.visit_rest(self._awaits_weights)
            else:
                self._look_at_weights(list(run.modules))
            for participant in self.participants:
                participant.finish(numbers)
            capture = self._capture_of(numbers, run.batches)
        logger.debug("weights and the end of the pass: %.2f s", time.perf_counter() - began)
        return capture

    def _run_forwards(self) -> None:
        """Run all batches; again where a later one contradicts what the first one showed."""
        began, attempts = time.perf_counter(), 1
        while True:
            try:
                with torch.no_grad(), ExitStack() as exits:
                    for participant in self.participants:
                        participant.begin(exits)
                    # After the participants' own hooks: torch calls hooks in the order of registration, and
                    # these may end the forward before another one has seen its last layer.
                    exits.enter_context(hooked(self.statistics, self.participants))
                    self._attempt()
                break
            except Restart as restart:
                attempts += 1
                logger.debug("the pass starts again: %s", restart)
        seconds = time.perf_counter() - began
        logger.debug("%d samples, %d attempts: forwards took %.2f s", self.ends[-1], attempts, seconds)

    def _attempt(self) -> None:
        """Run each batch once: one after the other, or side by side where weights are streamed."""
        streams = [self.run.stream, *(participant.stream for participant in self.participants)]
        # The subject's stream drives that of a reference too; where only the reference streams, its stream
        # drives.
        driving = next((stream for stream in streams if stream is not None), None)
        run = run_in_turn if driving is None else driving.run
        for done in run(forwards_of(self.batches, self.run.first_sample), self._run_one, self._resume):
            self._tell(done)

    def _resume(self, forward: Forward) -> None:
        for participant in self.participants:
            participant.forward_resumed(forward)

    def _run_one(self, forward: Forward) -> None:
        for participant in self.participants:
            participant.forward_started(forward)
        output = None
        try:
            output = run_forward(self.run.model, forward.batch, self.run.device, self.statistics)
        except ForwardComplete:
            forward.stopped_at = forward.last[0] if forward.last else None
        for participant in self.participants:
            participant.forward_ended(forward, output)
        forward.reference_hidden = None
        forward.reference_output = None  # logits [B, T, V]: too large to wait for the end of a wave

    def _tell(self, count: int) -> None:
        """Say how far the pass is: `count` batches have run."""
        samples = self.ends[count - 1]
        if self.progress is not None:
            self.progress(samples, self.ends[-1])
        if self.save_partial is not None and count < len(self.batches):
            self.save_partial(lambda: self._capture_of(self._numbers(), self.batches[:count]), samples)

    def _look_at_weights(self, layers: Sequence[str]) -> None:
        for participant in self.participants:
            participant.weights_loaded(layers)

    def _awaits_weights(self, layers: Sequence[str]) -> bool:
        return any(not participant.awaited_weights.isdisjoint(layers) for participant in self.participants)

    def _numbers(self) -> dict[SiteKey, SiteNumbers]:
        numbers: dict[SiteKey, SiteNumbers] = {}
        for participant in self.participants:
            participant.contribute(numbers)
        return numbers

    def _capture_of(self, numbers: Mapping[SiteKey, SiteNumbers], batches: Sequence[Batch]) -> Capture:
        """Make the capture of some first batches; its samples are numbered from 0, whatever the first one's number."""
        run = self.run
        sites = [*run.wanted, (LOGITS, LOGITS)]
        ids = [row for batch in batches for row in token_ids(batch)]
        shown = {int(token) for row in ids for token in set(row.tolist())}
        # Where the models decide otherwise, a failure shows what each of them would write.
        shown |= decided_otherwise(numbers.get((LOGITS, LOGITS)))
        capture = Capture(
            sites=renumbered({site: numbers[site] for site in sites if site in numbers}, run.first_sample),
            modules=tuple(run.layers),
            experts=tuple(dict.fromkeys(each.holder for each in run.layers.values() if isinstance(each, Expert))),
            blocks=tuple(run.blocks),
            tokens=tuple(row.numpy().astype(np.int32) for row in ids),
            pieces=self.decode(sorted(shown)) if self.decode else {},
            pictures=pictures_of(batches),
            plan=run.requests,
        )
        for participant in self.participants:
            capture = participant.complete(capture)
        return capture


def forwards_of(batches: Iterable[Batch], first_sample: int) -> Iterator[Forward]:
    """Yield the state of the forward of each batch, when it's about to begin."""
    for index, batch in enumerate(batches):
        rows = rows_of(batch, first_sample)
        first_sample += len(rows.samples)
        yield Forward(batch, rows, first=index == 0)


def run_in_turn(
    forwards: Iterable[Forward], run: Callable[[Forward], None], resumed: Callable[[Forward], None]
) -> Iterator[int]:
    """Run forwards one after the other; yield, after each, how many have run. `Stream.run` does so for a wave."""
    for count, forward in enumerate(forwards, 1):
        resumed(forward)
        run(forward)
        yield count

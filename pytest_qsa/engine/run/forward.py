"""The pass: hooks at the planned sites, one forward for each batch, a Capture at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate

import numpy as np
import torch
from torch import nn

from ...captures import (
    LOGITS,
    SINKS,
    SITES,
    TOKENS,
    Capture,
    Request,
    SiteKey,
    SiteNumbers,
    Statistic,
    match_layers,
    merge_requests,
    renumbered,
)
from ..formats.stored import StoredWeights
from ..load.batches import Batch, row_count, rows_of, token_ids
from ..modules import blocks_of, device_of, layers_of
from ..stream.stream import WAVE, Stream
from .beside import Beside
from .hooks import evaluating, hooked, run_batch
from .logits import Predictions
from .observed_execution import Witness
from .rehearsal import NOTHING_LEARNED, rehearsal_of
from .visits import CallsChanged, CompanionChanged, Forward, Order, PassComplete, SharingChanged, Visits
from .weights import observe_weights

Progress = Callable[[int, int], None]
"""Told after each batch: samples done, samples in all."""
Keep = Callable[[Callable[[], Capture], int], None]
"""Told after each batch but the last (each wave of a streamed pass): what makes the capture so far, its samples."""
Wanted = Mapping[SiteKey, frozenset[Statistic]]


def run_pass(
    model: nn.Module,
    batches: Sequence[Batch],
    requests: Iterable[Request],
    *,
    decode: Callable[[Sequence[int]], Mapping[int, str]] | None = None,
    progress: Progress | None = None,
    stream: Stream | None = None,
    first_sample: int = 0,
    keep: Keep | None = None,
    partner: Beside | None = None,
    witness: Witness | None = None,
    stored: StoredWeights | None = None,
) -> Capture:
    """Run the model once over the batches and reduce every tensor that the requests name.

    `batches`: tensors [B, T] (or whatever the model takes), or dicts of forward arguments. `decode`: token ids → texts.
    `stream`: reads the weights while the model runs; without it they are in memory. `first_sample`: the number of the
    first row among all samples of the subject. `keep`: see `Keep`. `partner`: the reference, where the requests compare
    the model with one. `witness`: sees how quantized modules are run. `stored`: the model's
    files. Afterwards the model's mode and hooks are as they were.
    """
    modules = layers_of(model)
    requests = merge_requests(requests)
    job = _Job(
        model, modules, blocks_of(model), batches, requests, decode, progress, first_sample, keep, partner, witness,
        stored,
    )  # fmt: skip
    wanted = wanted_sites(list(modules), job.blocks, requests)
    activations = {site: statistics for site, statistics in wanted.items() if site[1] != "weight"}
    weights = {site: statistics for site, statistics in wanted.items() if site[1] == "weight"}
    job = job if activations or job.scores else replace(job, batches=batches[:1], keep=None)
    with evaluating(model), ExitStack() as stack:
        if partner is not None:
            stack.enter_context(partner.ready(batches, first_sample, wanted, job.scores))
        if stream is not None:
            numbers = _streamed(job, activations, weights, stream)
        else:
            numbers = _forwards(job, activations).numbers() if job.runs(activations) else {}
            numbers |= observe_weights(modules, weights, stored)
        if partner is not None:
            numbers = partner.weighed(modules, weights, numbers, stream)
    return job.capture({site: numbers[site] for site in [*wanted, (LOGITS, LOGITS)] if site in numbers}, batches)


@dataclass(frozen=True)
class _Job:
    """What a pass is asked to do."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    blocks: Sequence[str]
    batches: Sequence[Batch]
    requests: tuple[Request, ...]
    decode: Callable[[Sequence[int]], Mapping[int, str]] | None
    progress: Progress | None
    first_sample: int
    keep: Keep | None
    partner: Beside | None
    witness: Witness | None
    stored: StoredWeights | None

    def runs(self, activations: Wanted) -> bool:
        """Say whether there are forwards: where only weights are measured, a witness may want one batch to run."""
        return bool(activations or self.scores or (self.witness and self.witness.required))

    def watching(self) -> AbstractContextManager[None]:
        """Let the witness see what is run."""
        return self.witness.watching() if self.witness else nullcontext()

    @cached_property
    def scores(self) -> frozenset[Statistic]:
        """What is wanted of the model's predictions."""
        return frozenset().union(*(request.statistics for request in self.requests if request.site == LOGITS))

    @cached_property
    def ends(self) -> list[int]:
        """How many samples there are up to the end of each batch."""
        return list(accumulate(map(row_count, self.batches)))

    def capture(self, numbers: Mapping[SiteKey, SiteNumbers], batches: Sequence[Batch]) -> Capture:
        """Make the capture of some first batches; its samples are numbered from 0, wherever they come from."""
        ids = [row for batch in batches for row in token_ids(batch)]
        unique = sorted({int(token) for row in ids for token in set(row.tolist())})
        return Capture(
            sites=renumbered(numbers, self.first_sample),
            modules=tuple(self.modules),
            blocks=tuple(self.blocks),
            tokens=tuple(row.numpy().astype(np.int32) for row in ids),
            pieces=self.decode(unique) if self.decode else {},
            plan=self.requests,
            reference=self.partner.capture(self.first_sample) if self.partner else None,
        )

    def done(self, state: _Pass, count: int) -> None:
        """Tell how far the pass is: `count` batches have run."""
        samples = self.ends[count - 1]
        if self.progress is not None:
            self.progress(samples, self.ends[-1])
        if self.keep is not None and count < len(self.batches):
            self.keep(lambda: self.capture(state.numbers(), self.batches[:count]), samples)


def wanted_sites(
    modules: Sequence[str], blocks: Sequence[str], requests: Iterable[Request]
) -> dict[SiteKey, frozenset[Statistic]]:
    """Return what is to be measured at each site, in model order; where sinks matter, the blocks' outputs as well."""
    wanted: dict[SiteKey, frozenset[Statistic]] = {}
    for request in requests:
        if request.site == LOGITS:
            continue
        for layer in match_layers(modules, request.pattern, request.exclude):
            site: SiteKey = (layer, request.site)
            wanted[site] = wanted.get(site, frozenset()) | request.statistics
        if SINKS in request.statistics and request.site != "weight":
            for block in blocks:
                wanted[block, "output"] = wanted.get((block, "output"), frozenset()) | {TOKENS, SINKS}
    order = {name: index for index, name in enumerate(modules)}
    return dict(sorted(wanted.items(), key=lambda item: (order[item[0][0]], SITES.index(item[0][1]))))


@dataclass
class _Pass:
    """One try at all forwards: what the hooks reduced, and what the model predicted."""

    visits: Visits
    predictions: Predictions | None

    def numbers(self) -> dict[SiteKey, SiteNumbers]:
        """Fetch the numbers of every site."""
        found = self.visits.numbers()
        if self.predictions is not None:
            found[LOGITS, LOGITS] = self.predictions.numbers()
        return found


def _forwards(
    job: _Job,
    wanted: Wanted,
    stream: Stream | None = None,
    rehearsed: tuple[frozenset[SiteKey], Order | None] = (frozenset(), None),
) -> _Pass:
    """Run all batches; again where what the first one told turns out not to hold for all."""
    unshared, order = rehearsed
    may_stop = not job.scores
    while True:
        predictions = Predictions(job.model, job.scores) if job.scores else None
        state = _Pass(_visits(job, wanted, unshared, may_stop=may_stop and stream is None), predictions)
        state.visits.order = order if may_stop else None
        try:
            with torch.no_grad(), job.watching(), hooked(job.modules, state.visits):
                if stream is not None or (job.partner and job.partner.stream):
                    _run_stream(job, state, stream)
                else:
                    _run_batches(job, state)
            if job.witness is not None:
                job.witness.ended(order.last[0] if order and may_stop and order.last else None)
            return state
        except SharingChanged as change:
            unshared |= {change.site}
        except CallsChanged:
            may_stop = False
        except CompanionChanged as change:
            assert job.partner is not None
            job.partner.learn(change)


def _visits(job: _Job, wanted: Wanted, unshared: frozenset[SiteKey], *, may_stop: bool) -> Visits:
    if job.partner is None:
        return Visits(wanted, job.modules, unshared, may_stop=may_stop)
    return job.partner.visits(wanted, job.modules, unshared, may_stop=may_stop)


def _run_one(job: _Job, state: _Pass, batch: Batch, forward: Forward, device: torch.device) -> None:
    """Run one batch, and the reference beside it."""
    if job.partner is not None:
        job.partner.fly(batch, forward)
    output = None
    with suppress(PassComplete):
        output = run_batch(job.model, batch, device)
    reference = forward.flight.end(whole=bool(state.predictions)) if forward.flight else None
    if state.predictions is not None:
        state.predictions.add(batch, forward.rows, output, reference)
    state.visits.end(forward)


def _run_batches(job: _Job, state: _Pass) -> None:
    device = device_of(job.model)
    sample = job.first_sample
    for index, batch in enumerate(job.batches):
        state.visits.forward = forward = Forward(rows_of(batch, sample), first=index == 0)
        _run_one(job, state, batch, forward, device)
        sample += len(forward.rows.samples)
        job.done(state, index + 1)


def _run_stream(job: _Job, state: _Pass, stream: Stream | None) -> None:
    """Run the batches side by side, a wave at a time: as many as may wait at once."""
    sample = job.first_sample
    device = stream.device if stream is not None else device_of(job.model)
    driving = stream or (job.partner.stream if job.partner else None)
    assert driving is not None
    if stream is not None and job.partner is not None:
        stream.stand_beside(job.partner.stream, lambda: _settle(state.visits.forward))
    for start in range(0, len(job.batches), WAVE):
        wave = job.batches[start : start + WAVE]
        forwards = []
        for index, batch in enumerate(wave, start):
            forwards.append(Forward(rows_of(batch, sample), first=index == 0))
            sample += len(forwards[-1].rows.samples)

        def run(index: int, wave: Sequence[Batch] = wave, forwards: Sequence[Forward] = forwards) -> None:
            _run_one(job, state, wave[index], forwards[index], device)

        def resumed(index: int, forwards: Sequence[Forward] = forwards) -> None:
            state.visits.forward = forwards[index]

        driving.run([partial(run, index) for index in range(len(wave))], resumed)
        job.done(state, start + len(wave))


def _settle(forward: Forward | None) -> None:
    """Let the reference come to a place where it holds little, before the subject waits for weights."""
    if forward is not None and forward.flight is not None:
        forward.flight.settle()


def _streamed(job: _Job, activations: Wanted, weights: Wanted, stream: Stream) -> dict[SiteKey, SiteNumbers]:
    """Run the pass while the weights are read; weights that are sites are reduced when they come by."""
    left = dict(weights)
    found: dict[SiteKey, SiteNumbers] = {}

    def loading(modules: Sequence[str]) -> None:
        here = {site: left.pop(site) for site in list(left) if site[0] in modules}
        found.update(observe_weights(job.modules, here, job.stored))

    rehearsed = rehearsal_of(job.model, job.modules, job.batches[0], activations) if activations else NOTHING_LEARNED
    with stream.ready(loading):
        numbers = _forwards(job, activations, stream, rehearsed).numbers() if job.runs(activations) else {}
        stream.visit_rest(lambda modules: any(site[0] in modules for site in left))
    return numbers | found

"""The pass: hooks at the planned sites, one forward for each batch, a Capture at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import plan
from ..captures import Capture
from ..numbers import SiteNumbers
from ..plan import Request, match_layers, merge_requests
from .batches import Batch, row_count, rows_of, token_ids
from .modules import blocks_of, device_of, input_of, layers_of, packed_experts, routing_of, tensor_of
from .rehearsal import Rehearsal, without_data
from .streaming import WAVE, Stream
from .visits import CallsChanged, Forward, Order, PassComplete, SharingChanged, SiteKey, Visits
from .weights import observe_weights

Progress = Callable[[int, int], None]
"""Told after each batch: samples done, samples in all."""
Keep = Callable[[Callable[[], Capture], int], None]
"""Told after each batch but the last (each wave of a streamed pass): what makes the capture so far, its samples."""


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
) -> Capture:
    """Run the model once over the batches and reduce every tensor that the requests name.

    `batches`: tensors [B, T] (or whatever the model takes), or dicts of forward arguments. `decode`: token ids → texts.
    `stream`: reads the weights while the model runs; without it they are in memory. `first_sample`: the number of the
    first row among all samples of the subject. `keep`: see `Keep`. The model's mode and hooks are as before afterwards.
    """
    modules = layers_of(model)
    requests = merge_requests(requests)
    job = _Job(model, modules, blocks_of(model), batches, requests, decode, progress, first_sample, keep)
    wanted = wanted_sites(list(modules), job.blocks, requests)
    activations = {site: statistics for site, statistics in wanted.items() if site[1] != "weight"}
    weights = {site: statistics for site, statistics in wanted.items() if site[1] == "weight"}
    with _evaluating(model):
        if stream is not None:
            numbers = _streamed(job, activations, weights, stream)
        else:
            numbers = _forwards(job, activations).numbers() if activations else {}
            numbers |= observe_weights(modules, weights)
    return job.capture({site: numbers[site] for site in wanted if site in numbers}, batches)


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

    @cached_property
    def ends(self) -> list[int]:
        """How many samples there are up to the end of each batch."""
        return list(accumulate(map(row_count, self.batches)))

    def capture(self, numbers: Mapping[SiteKey, SiteNumbers], batches: Sequence[Batch]) -> Capture:
        """Make the capture of some first batches; its samples are numbered from 0, wherever they come from."""
        ids = [row for batch in batches for row in token_ids(batch)]
        unique = sorted({int(token) for row in ids for token in set(row.tolist())})
        return Capture(
            sites=_renumbered(numbers, self.first_sample),
            modules=tuple(self.modules),
            blocks=tuple(self.blocks),
            tokens=tuple(row.numpy().astype(np.int32) for row in ids),
            pieces=self.decode(unique) if self.decode else {},
            plan=self.requests,
        )

    def done(self, state: Visits, count: int) -> None:
        """Tell how far the pass is: `count` batches have run."""
        samples = self.ends[count - 1]
        if self.progress is not None:
            self.progress(samples, self.ends[-1])
        if self.keep is not None and count < len(self.batches):
            self.keep(lambda: self.capture(state.numbers(), self.batches[:count]), samples)


def _renumbered(numbers: Mapping[SiteKey, SiteNumbers], first: int) -> dict[SiteKey, SiteNumbers]:
    if not first:
        return dict(numbers)
    own = {id(n): n if site[1] == "weight" else replace(n, sample=n.sample - first) for site, n in numbers.items()}
    return {site: own[id(n)] for site, n in numbers.items()}


def wanted_sites(
    modules: Sequence[str], blocks: Sequence[str], requests: Iterable[Request]
) -> dict[SiteKey, frozenset[str]]:
    """Return what is to be measured at each site, in model order; where sinks matter, the blocks' outputs as well."""
    wanted: dict[SiteKey, frozenset[str]] = {}
    for request in requests:
        for layer in match_layers(modules, request.pattern, request.exclude):
            site: SiteKey = (layer, request.site)
            wanted[site] = wanted.get(site, frozenset()) | request.statistics
        if plan.SINKS in request.statistics and request.site != "weight":
            for block in blocks:
                wanted[block, "output"] = wanted.get((block, "output"), frozenset()) | {plan.TOKENS, plan.SINKS}
    order = {name: index for index, name in enumerate(modules)}
    return dict(sorted(wanted.items(), key=lambda item: (order[item[0][0]], plan.SITES.index(item[0][1]))))


def _forwards(
    job: _Job,
    wanted: Mapping[SiteKey, frozenset[str]],
    stream: Stream | None = None,
    rehearsed: tuple[frozenset[SiteKey], Order | None] = (frozenset(), None),
) -> Visits:
    """Run all batches; again where what the first one told turns out not to hold for all."""
    unshared, order = rehearsed
    may_stop = True
    while True:
        state = Visits(wanted, job.modules, unshared, may_stop=may_stop and stream is None)
        state.order = order if may_stop else None
        try:
            with torch.no_grad(), _hooked(job.modules, state):
                if stream is None:
                    _run_batches(job, state)
                else:
                    _run_stream(job, state, stream)
            return state
        except SharingChanged as change:
            unshared |= {change.site}
        except CallsChanged:
            may_stop = False


def _run_batches(job: _Job, state: Visits) -> None:
    device = device_of(job.model)
    sample = job.first_sample
    for index, batch in enumerate(job.batches):
        state.forward = Forward(rows_of(batch, sample, device), first=index == 0)
        with suppress(PassComplete):
            _forward(job.model, batch, device)
        state.end(state.forward)
        sample += len(state.forward.rows.samples)
        job.done(state, index + 1)


def _run_stream(job: _Job, state: Visits, stream: Stream) -> None:
    """Run the batches side by side, a wave at a time: as many as may wait at once."""
    sample = job.first_sample
    for start in range(0, len(job.batches), WAVE):
        wave = job.batches[start : start + WAVE]
        forwards = []
        for index, batch in enumerate(wave, start):
            forwards.append(Forward(rows_of(batch, sample, stream.device), first=index == 0))
            sample += len(forwards[-1].rows.samples)

        def run(index: int, wave: Sequence[Batch] = wave, forwards: Sequence[Forward] = forwards) -> None:
            with suppress(PassComplete):
                _forward(job.model, wave[index], stream.device)
            state.end(forwards[index])

        def resumed(index: int, forwards: Sequence[Forward] = forwards) -> None:
            state.forward = forwards[index]

        stream.run([partial(run, index) for index in range(len(wave))], resumed)
        job.done(state, start + len(wave))


def _streamed(
    job: _Job,
    activations: Mapping[SiteKey, frozenset[str]],
    weights: Mapping[SiteKey, frozenset[str]],
    stream: Stream,
) -> dict[SiteKey, SiteNumbers]:
    """Run the pass while the weights are read; weights that are sites are reduced when they come by."""
    left = dict(weights)
    found: dict[SiteKey, SiteNumbers] = {}

    def loading(modules: Sequence[str]) -> None:
        here = {site: left.pop(site) for site in list(left) if site[0] in modules}
        found.update(observe_weights(job.modules, here))

    rehearsed = _rehearsed(job, activations) if activations else (frozenset[SiteKey](), None)
    with stream.ready(loading):
        numbers = _forwards(job, activations, stream, rehearsed).numbers() if activations else {}
        stream.visit_rest(lambda modules: any(site[0] in modules for site in left))
    return numbers | found


def _rehearsed(job: _Job, wanted: Mapping[SiteKey, frozenset[str]]) -> tuple[frozenset[SiteKey], Order | None]:
    """Run the first batch on tensors without data; learn what is not shared, and the last call that is needed.

    All samples of a streamed pass are under way at once, so that the first can't tell the others. A model whose calls
    depend on values (the experts of a MoE) can't be run so; it then runs to its end.
    """
    batch = job.batches[0]
    tensors = {"": batch} if isinstance(batch, Tensor) else dict(batch)
    empty = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in tensors.items()}
    unshared: frozenset[SiteKey] = frozenset()
    while True:
        state = Rehearsal(wanted, job.modules, unshared)
        state.forward = Forward(rows_of(batch, 0, torch.device("cpu")), first=True)
        try:
            with torch.no_grad(), _hooked(job.modules, state), without_data(job.model):
                _forward(job.model, empty[""] if isinstance(batch, Tensor) else empty, torch.device("meta"))
            state.end(state.forward)
            return unshared, state.order
        except SharingChanged as change:
            unshared |= {change.site}
        except Exception:  # whatever a model does with a value that isn't there
            return unshared, None


def _forward(model: nn.Module, batch: Batch, device: torch.device) -> None:
    if isinstance(batch, Tensor):
        model(batch.to(device))
    else:
        model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], state: Visits) -> Iterator[None]:
    handles = []
    for layer, site in state.wanted:
        if site == "input":
            experts = packed_experts(modules[layer]) if plan.EXPERTS in state.wanted[layer, site] else 0
            hook = _input_hook(state, layer, experts)
            handles.append(modules[layer].register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(modules[layer].register_forward_hook(_output_hook(state, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(state: Visits, layer: str, experts: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = routing_of(experts, args, kwargs) if experts else None
        state.visit((layer, "input"), input_of(args, kwargs), routing)

    return hook


def _output_hook(state: Visits, layer: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        state.visit((layer, "output"), tensor_of(output))

    return hook


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode and its cache off, and back afterwards."""
    training = {name: module.training for name, module in model.named_modules()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if isinstance(use_cache, bool):
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        if isinstance(use_cache, bool):
            config.use_cache = use_cache  # type: ignore[union-attr]

"""Keeping a reference as a file: one pass that draws rows of its sites and takes its last hidden states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...captures import (
    LOGITS,
    PADDING,
    REFERENCE_TOKENS,
    SCORES,
    SINKS,
    TOKENS,
    UNKNOWN_RUN,
    Capture,
    LocalError,
    Request,
    SiteKey,
    SiteNumbers,
    Statistic,
    against_reference,
    compares,
    exactly,
    match_layers,
)
from ...common import AnomalyError, InfraError
from ...metrics import KL
from ..load.batches import Batch, Rows
from ..modules import Routing, blocks_of, channels_first, layers_of
from ..reduce.pairs import powers_of, scores_of
from ..run.forward import Progress, run_pass
from ..run.logits import logits_of
from ..run.visits import CompanionChanged, Forward, Visits
from ..stream.stream import Stream
from .compare import check_rows, run_rows
from .head import Head, head_of, loaded_head, scalings_of
from .kept_file import Call, Content, Stream as KeptStream, drawn, hashes_of

FARTHEST = 1e-5
"""The most that logits made again may differ from the model's own, in nats: 1 % of the least KL divergence of healthy
8-bit models (metrics.md)."""


@dataclass(frozen=True)
class Keep:
    """What is to be kept. `rows`: of each sample; `seed`: by which they are drawn; `with_head`: the head as well."""

    rows: int = 4
    seed: int = 0
    with_head: bool = False


@dataclass(frozen=True)
class _Sites:
    """Where rows are kept, which layers will be fed with single tokens, and where the maxima are wanted."""

    rows: frozenset[SiteKey]
    local: frozenset[str]
    maxima: frozenset[SiteKey]

    @classmethod
    def of(cls, modules: Sequence[str], blocks: Sequence[str], requests: Iterable[Request]) -> _Sites:
        rows: set[SiteKey] = set()
        local: set[str] = set()
        maxima: set[SiteKey] = set()
        for request in requests:
            statistics = against_reference(request.statistics)
            if not statistics or request.site in ("weight", LOGITS):
                continue
            layers = match_layers(modules, request.pattern, request.exclude)
            rows |= {(layer, request.site) for layer in layers}
            if any(isinstance(statistic, LocalError) for statistic in statistics):
                local |= set(layers)
            if REFERENCE_TOKENS in statistics:
                maxima |= {(layer, request.site) for layer in layers}
        if not rows:
            rows = {(block, "output") for block in blocks}
        return cls(frozenset(rows | {(layer, "input") for layer in local}), frozenset(local), frozenset(maxima))

    def requests(self, blocks: Sequence[str]) -> Iterator[Request]:
        """Yield what a pass has to visit: the sinks' blocks as well."""
        for layer, site in sorted(self.rows):
            own = frozenset({TOKENS}) if (layer, site) in self.maxima else frozenset[Statistic]()
            yield Request(exactly([layer]), site, None, own)
        if blocks:
            yield Request(exactly(blocks), "output", None, frozenset({TOKENS, SINKS}))


@dataclass
class _Kept:
    """What a pass has drawn: for each call of a site, sample → its number of tokens, which are kept, their rows."""

    keep: Keep
    hashes: Mapping[int, str]
    sites: _Sites
    head: str | None
    modules: Mapping[str, nn.Module]
    calls: dict[Call, dict[int, tuple[int, Any, Tensor]]] = field(default_factory=lambda: defaultdict(dict))
    hidden: dict[int, tuple[int, Any, Tensor]] = field(default_factory=dict)
    latest: tuple[int, Tensor | None, Tensor] | None = None
    """Of the last sample that came to the head: its row in the batch, its tokens that count, its hidden states."""

    def add(self, rows: Rows, site: SiteKey, call: int, tensor: Tensor, *, first: bool) -> None:
        """Keep rows of one tensor."""
        whole, some = site == (self.head, "input"), site in self.sites.rows
        if not whole and not some:
            return
        shaped, token_axis = rows.shaped(tensor, channels_first(self.modules[site[0]]))
        if not token_axis:
            raise InfraError(
                f"the {site[1]} of {site[0]} has no tokens of which some could be kept: leave it out, or name the "
                "model itself as the reference"
            )
        for index, (sample, kept) in enumerate(
            zip(rows.samples, rows.kept(site[0], shaped.shape[1], shaped.device), strict=True)
        ):
            values = shaped[index] if kept is None else shaped[index].index_select(0, kept)
            count = len(values)
            if whole:
                self.latest = index, kept, values
                self.hidden[sample] = count, None, halved(values).cpu()
            if not some:
                continue
            at = drawn(self.keep.seed, self.hashes[sample], count, self.keep.rows)
            values = values.index_select(0, torch.from_numpy(at).long().to(values.device))
            self.calls[*site, call][sample] = count, at, values.detach()
        if first and site[1] == "output" and site[0] in self.sites.local:
            self._check(site[0], call, rows.samples[0])

    def _check(self, layer: str, call: int, sample: int) -> None:
        """Check that the layer can be fed with single tokens, as a comparison will."""
        fed = self.calls.get((layer, "input", call), {})
        if sample in fed:
            outputs = self.calls[layer, "output", call][sample][2]
            alone = run_rows(self.modules[layer], layer, fed[sample][2])
            check_rows(layer, powers_of(outputs, alone, None)[:, :2].sum(dim=0))


@dataclass
class KeepingVisits(Visits):
    """The hooks of a model that is kept as a reference."""

    kept: _Kept = field(kw_only=True)

    def visit(
        self, site: SiteKey, tensor: Tensor | None, routing: Routing | None = None, inputs: Tensor | None = None
    ) -> None:
        """Keep rows, then reduce what is wanted."""
        forward = self.forward
        if tensor is not None and forward is not None:
            self.kept.add(forward.rows, site, forward.calls.get(site, 0), tensor, first=forward.first)
        super().visit(site, tensor, routing)


@dataclass
class Keeper:
    """What stands in the partner's place in a pass that keeps a reference. `head`: the name of the head, if any."""

    model: nn.Module
    keep: Keep
    hashes: Mapping[int, str]
    sites: _Sites
    head: str | None
    stream: Stream | None = None
    kept: _Kept | None = None
    found: Head | None = None
    problem: str | None = None
    distance: float = 0.0

    @contextmanager
    def ready(self, batches: Any, first_sample: int, wanted: Any, scores: frozenset[Statistic]) -> Iterator[None]:
        """Look at the first logits that the model returns."""
        handle = self.model.register_forward_hook(self._check_head)
        try:
            yield
        finally:
            handle.remove()

    def visits(
        self, wanted: Mapping[SiteKey, frozenset[Statistic]], modules: Mapping[str, nn.Module],
        unshared: frozenset[SiteKey], *, may_stop: bool,
    ) -> Visits:  # fmt: skip
        """Begin a try of the pass."""
        self.kept = _Kept(self.keep, self.hashes, self.sites, self.head, modules)
        return KeepingVisits(wanted, modules, unshared, may_stop=may_stop, kept=self.kept)

    def fly(self, batch: Batch, forward: Forward) -> None:
        """Nothing runs beside."""

    def learn(self, change: CompanionChanged) -> None:
        """Nothing runs beside."""

    def capture(self, first_sample: int) -> Capture | None:
        """There is no reference to the reference."""
        return None

    def weighed(
        self, modules: Any, wanted: Any, numbers: Mapping[SiteKey, SiteNumbers], stream: Any
    ) -> dict[SiteKey, SiteNumbers]:
        """Weights aren't kept."""
        return dict(numbers)

    def _check_head(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Check once that the head makes the model's logits of what is kept, and find out how its output is scaled."""
        if self.head is None or self.kept is None or self.kept.latest is None or self.found or self.problem:
            return
        index, kept, hidden = self.kept.latest
        try:
            head, logits = loaded_head(module, self.head), logits_of(output, module)[index]
        except (InfraError, AnomalyError) as error:
            self.problem = str(error)
            return
        if self.keep.with_head:
            head = replace(head, weight=halved(head.weight).to(head.weight.dtype))
        logits = logits if kept is None else logits.index_select(0, kept)
        for scaling in scalings_of(module):
            made = replace(head, scaling=scaling)
            self.distance = _distance(logits, made.logits(halved(hidden)))
            if self.distance <= FARTHEST:
                self.found = made
                return
        self.problem = f"logits made again by {self.head} differ from the model's by {self.distance:.2g} nats"


@dataclass(frozen=True)
class Kept:
    """A reference to be written. `problem`: why nothing of what it predicts is in it, if so; `distance`: in nats."""

    content: Content
    problem: str | None
    distance: float


def keep_model(
    model: nn.Module,
    batches: Sequence[Batch],
    requests: Sequence[Request],
    keep: Keep,
    locate: Callable[[Head], dict[str, Any]] | None = None,
    *,
    stream: Stream | None = None,
    progress: Progress | None = None,
) -> Kept:
    """Run a model once and keep what a comparison with it at these requests needs.

    Without a request that compares layers, the outputs of the blocks are kept. `locate`: finds the head's weights in
    the checkpoint; without it they can only be kept in the file.

    Raises:
        InfraError: what the model predicts is asked for and can't be kept.
        AnomalyError: there is nothing to keep; or a layer that is to be fed with single tokens can't be.
    """
    modules, blocks = layers_of(model), blocks_of(model)
    sites = _Sites.of(list(modules), blocks, requests)
    head = head_of(model)
    hashes = dict(enumerate(sample for batch in batches for sample in hashes_of(batch)))
    keeper = Keeper(model, keep, hashes, sites, head)
    own = [*sites.requests(blocks)]
    if head is not None:
        own += [Request(exactly([head]), "input", None, frozenset()), Request("", LOGITS, None, _WHOLE)]
    capture = run_pass(model, batches, own, progress=progress, stream=stream, partner=keeper)
    problem, entry = keeper.problem, None
    weights: dict[str, Tensor] = {}
    if head is None:
        problem = f"{type(model).__name__} has no layer that makes logits"
    elif keeper.found is not None:
        try:
            entry, weights = _head_entry(keeper.found, keep, locate)
        except InfraError as error:
            problem = f"its head can't be read alone ({error}): keep it in the file, --with-head"
    if problem and any(request.site == LOGITS for request in requests if compares([request])):
        raise InfraError(f"what the reference predicts can't be kept: {problem}")
    return Kept(_content(keeper, capture, entry, weights), problem, keeper.distance)


def halved(tensor: Tensor) -> Tensor:
    """Return a tensor in 16 bits: those that it has, else float16, else, where that overflows, bfloat16."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor
    half = tensor.half()
    return half if bool((half.isfinite() | ~tensor.isfinite()).all()) else tensor.bfloat16()


_WHOLE = frozenset({SCORES})
"""What makes the forward go on to the logits, which the head is checked against."""


def _distance(logits: Tensor, made: Tensor) -> float:
    """Return the mean KL divergence of logits that were made again from a model's own, in nats."""
    scores = scores_of(made, logits, torch.full((len(logits),), -1))
    return float(scores[:, KL].mean())


def _head_entry(
    head: Head, keep: Keep, locate: Callable[[Head], dict[str, Any]] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the file says of the head, and the tensors of it that it holds."""
    if keep.with_head:
        weights = {"weight": halved(head.weight).cpu()}
        if head.bias is not None:
            weights["bias"] = head.bias.cpu()
        return {
            "kept": sorted(weights),
            "scaling": dict(head.scaling),
            "dtype": str(head.weight.dtype).removeprefix("torch."),
        }, weights
    if locate is None:
        raise InfraError("it has no checkpoint")
    return locate(head), {}


def _content(
    keeper: Keeper, capture: Capture, head: Mapping[str, Any] | None, weights: Mapping[str, Tensor]
) -> Content:
    assert keeper.kept is not None
    samples = list(keeper.hashes.values())
    maxima = {(*site, call): found for site, numbers in capture.sites.items() for call, found in _maxima(numbers)}
    calls = keeper.kept.calls
    unseen = [site for site in sorted(keeper.sites.rows) if (*site, 0) not in calls]
    if unseen:
        raise AnomalyError(f"the hook at the {unseen[0][1]} of {unseen[0][0]} never fired with a floating-point tensor")
    streams = {
        call: _stream(call, calls.get(call, {}), maxima.get(call), len(samples))
        for call in sorted(calls.keys() | maxima.keys())
    }
    hidden = _stream((str(keeper.head), "input", 0), keeper.kept.hidden, None, len(samples)) if head else None
    sinks = [
        [s.sample, _place(capture.sites[s.layers[0], "output"], s.sample, s.position), s.channel, list(s.layers)]
        for s in capture.sinks.found
    ]
    return Content(
        UNKNOWN_RUN, keeper.keep.seed, keeper.keep.rows, samples, capture.modules, capture.blocks, sinks, streams,
        hidden, head, weights,
    )  # fmt: skip


def _stream(
    call: Call, kept: Mapping[int, tuple[int, Any, Tensor]], maxima: tuple[Any, Tensor] | None, samples: int
) -> KeptStream:
    """Put what was kept of the samples one after the other."""
    if (kept and len(kept) != samples) or (maxima and len(maxima[0]) != samples):
        raise InfraError(
            f"{call[0]} isn't called for every sample (an expert, say), so that nothing of it can be kept: leave it "
            "out, or name the model itself as the reference"
        )
    if not kept:
        assert maxima is not None
        return KeptStream(maxima[0], maxima=maxima[1])
    ordered = [kept[sample] for sample in sorted(kept)]
    parts = [halved(rows).cpu() for _, _, rows in ordered]
    narrow = len({part.dtype for part in parts}) == 1
    at = [places for _, places, _ in ordered if places is not None]
    return KeptStream(
        counts=np.array([count for count, *_ in ordered], dtype=np.int64),
        rows=torch.cat(parts if narrow else [part.bfloat16() for part in parts]),
        at=np.concatenate(at) if at else None,
        maxima=maxima[1] if maxima else None,
    )


def _maxima(numbers: SiteNumbers) -> Iterator[tuple[int, tuple[Any, Tensor]]]:
    """Yield, for each call, the numbers of tokens and the largest |x| of each, of all samples in their order."""
    if numbers.token_max is None or not numbers.token_axis:
        return
    for call in sorted(set(numbers.call.tolist())):
        rows = [numbers.tokens_of(population) for population in np.flatnonzero(numbers.call == call).tolist()]
        rows = [row[row != PADDING] for row in rows]
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        yield call, (counts, torch.from_numpy(np.concatenate(rows)).to(getattr(torch, numbers.dtype)))


def _place(numbers: SiteNumbers, sample: int, position: int) -> int:
    """Return which of a sample's tokens that are no padding is at a position."""
    population = int(np.flatnonzero(numbers.sample == sample)[0])
    return int(np.count_nonzero(numbers.tokens_of(population)[:position] != PADDING))

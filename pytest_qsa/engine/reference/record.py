"""Recording a reference: one pass that draws rows of its sites and takes its last hidden states, for a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...captures import (
    LOGITS,
    PADDING,
    REFERENCE_TOKENS,
    SINKS,
    TOKENS,
    UNKNOWN_RUN,
    Capture,
    LocalError,
    Request,
    SiteKey,
    SiteNumbers,
    against_reference,
    compares,
    exactly,
    match_layers,
)
from ...common import AnomalyError, InfraError, Progress
from ...metrics import KL
from ..heads import Head, head_of, loaded_head, scalings_of
from ..load.batches import Batch
from ..modules import blocks_of, channels_first, layers_of
from ..reduce.pairs import powers_of, scores_of
from ..run.next_token import logits_of
from ..run.participant import Forward, Need, Participant, Pass
from ..run.run_pass import run_pass
from ..stream.stream import Stream
from .pair_statistics import check_rows, run_rows
from .reference_file import Call, ReferenceContent, SiteRows, drawn_tokens, hashes_of

FARTHEST = 1e-5
"""How far recomputed logits may be from the model's own, as mean KL in nats: 1 % of the least KL divergence of healthy
8-bit models (metrics.md)."""


@dataclass(frozen=True)
class RecordOptions:
    """What is recorded. `rows`: of each sample; `seed`: by which they are drawn; `with_head`: the head as well."""

    rows: int = 4
    seed: int = 0
    with_head: bool = False


@dataclass(frozen=True)
class _Drawn:
    """What is recorded of one sample at a site: its number of tokens, which of them (None for all), and their rows."""

    count: int
    at: NDArray[np.int32] | None
    rows: Tensor


@dataclass(frozen=True)
class _Sites:
    """The sites whose rows and maxima are recorded, and the layers that a comparison runs on single tokens."""

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
        """Yield what a pass has to measure: the maxima, and what sinks are found by."""
        for layer, site in sorted(self.maxima):
            yield Request(exactly([layer]), site, None, frozenset({TOKENS}))
        if blocks:
            yield Request(exactly(blocks), "output", None, frozenset({TOKENS, SINKS}))


class RowRecorder(Participant):
    """Draws rows of a model's sites, takes its last hidden states, and checks that its head makes the logits of these.

    `hashes`: sample → its hash, which decides on the rows that are drawn. `head`: the name of the head, if any.
    """

    def __init__(self, options: RecordOptions, hashes: Mapping[int, str], sites: _Sites, head: str | None) -> None:
        self.options = options
        self.hashes = hashes
        self.rows = sites.rows
        self.head = head
        self.sites = sites.rows | ({(head, "input")} if head is not None else set())
        self.needs = Need.WHOLE_FORWARDS if head is not None else Need.FORWARDS
        self.calls: dict[Call, dict[int, _Drawn]] = {}
        """Of each call of a site: what was drawn of each sample."""
        self.hidden: dict[int, _Drawn] = {}
        self.checked_head: Head | None = None
        self.problem: str | None = None
        self.distance = 0.0
        self._local = sites.local

    def prepare(self, run: Pass, exits: ExitStack) -> None:
        """Look at the first logits that the model returns."""
        self._modules = run.modules
        # The model's output, not its head's: a model may scale what its head returns.
        exits.callback(run.model.register_forward_hook(self._check_head).remove)

    def begin(self, exits: ExitStack) -> None:
        """Begin an attempt: nothing is drawn yet."""
        self.calls = defaultdict(dict)
        self.hidden = {}
        self._latest: tuple[int, Tensor | None, Tensor] | None = None
        """Of the last sample that came to the head: its row in the batch, its tokens that count, its hidden states."""

    def visit(self, forward: Forward, site: SiteKey, call: int, tensor: Tensor, inputs: Tensor | None) -> None:
        """Draw rows of one tensor, [B, T, C].

        Raises:
            InfraError: it has no axis for tokens.
        """
        rows = forward.rows
        shaped, token_axis = rows.shaped(tensor, channels_first(self._modules[site[0]]))
        if not token_axis:
            raise InfraError(
                f"the {site[1]} of {site[0]} has no tokens of which some could be kept: leave it out, or name the "
                "model itself as the reference"
            )
        counting = rows.unpadded(site[0], shaped.shape[1], shaped.device)
        for index, (sample, kept) in enumerate(zip(rows.samples, counting, strict=True)):
            values = shaped[index] if kept is None else shaped[index].index_select(0, kept)
            if site == (self.head, "input"):
                self._latest = index, kept, values
                # To the host at once, unlike the few rows: all hidden states together may not fit on the
                # device.
                self.hidden[sample] = _Drawn(len(values), None, halved(values).cpu())
            if site in self.rows:
                at = drawn_tokens(self.options.seed, self.hashes[sample], len(values), self.options.rows)
                some = values.index_select(0, torch.from_numpy(at).long().to(values.device))
                self.calls[*site, call][sample] = _Drawn(len(values), at, some.detach())
        # One sample shows whether a layer mixes tokens; all of them would cost another forward.
        if forward.first and site[1] == "output" and site[0] in self._local:
            self._check_alone(site[0], call, rows.samples[0])

    def _check_alone(self, layer: str, call: int, sample: int) -> None:
        """Check that the layer can be fed with single tokens, as a comparison will."""
        fed = self.calls.get((layer, "input", call), {})
        if sample in fed:
            outputs = self.calls[layer, "output", call][sample].rows
            alone = run_rows(self._modules[layer], layer, fed[sample].rows)
            check_rows(layer, powers_of(outputs, alone, None)[:, :2].sum(dim=0))

    def _check_head(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Check once that the head makes the model's logits of what is recorded, and find out how they are scaled."""
        if self.head is None or self._latest is None or self.checked_head or self.problem:
            return
        index, kept, hidden = self._latest
        try:
            head, logits = loaded_head(module, self.head), logits_of(output, module)[index]
        except (InfraError, AnomalyError) as error:
            self.problem = str(error)
            return
        # The file will hold it in 16 bits: what is checked is what a comparison will read.
        if self.options.with_head:
            head = replace(head, weight=halved(head.weight).to(head.weight.dtype))
        logits = logits if kept is None else logits.index_select(0, kept)
        for scaling in scalings_of(module):
            made = replace(head, scaling=scaling)
            self.distance = _distance(logits, made.logits(halved(hidden)))
            if self.distance <= FARTHEST:
                self.checked_head = made
                return
        self.problem = f"logits made again by {self.head} differ from the model's by {self.distance:.2g} nats"


@dataclass(frozen=True)
class Recording:
    """A reference to be written. `problem`: why nothing of what it predicts is in it, if so; `distance`: in nats."""

    content: ReferenceContent
    problem: str | None
    distance: float


def record_model(
    model: nn.Module,
    batches: Sequence[Batch],
    requests: Sequence[Request],
    options: RecordOptions,
    locate: Callable[[Head], dict[str, Any]] | None = None,
    *,
    stream: Stream | None = None,
    progress: Progress | None = None,
) -> Recording:
    """Run a model once and record what a comparison with it at these requests needs.

    Without a request that compares layers, the outputs of the blocks are recorded. `locate`: finds the head's weights
    in the checkpoint; without it they can only go into the file.

    Raises:
        InfraError: what the model predicts is asked for and can't be recorded.
        AnomalyError: there is nothing to record; or a layer that is to be fed with single tokens can't be.
    """
    modules, blocks = layers_of(model), blocks_of(model)
    sites = _Sites.of(list(modules), blocks, requests)
    head = head_of(model)
    hashes = dict(enumerate(sample for batch in batches for sample in hashes_of(batch)))
    recorder = RowRecorder(options, hashes, sites, head)
    capture = run_pass(model, batches, sites.requests(blocks), [recorder], stream=stream, progress=progress)
    problem, entry = recorder.problem, None
    weights: dict[str, Tensor] = {}
    if head is None:
        problem = f"{type(model).__name__} has no layer that makes logits"
    elif recorder.checked_head is not None:
        try:
            entry, weights = _head_entry(recorder.checked_head, options, locate)
        except InfraError as error:
            problem = f"its head can't be read alone ({error}): keep it in the file, --with-head"
    if problem and any(request.site == LOGITS for request in requests if compares([request])):
        raise InfraError(f"what the reference predicts can't be kept: {problem}")
    return Recording(_content(recorder, capture, entry, weights), problem, recorder.distance)


def halved(tensor: Tensor) -> Tensor:
    """Return a tensor in 16 bits: those that it has, else float16, else, where that overflows, bfloat16."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor
    half = tensor.half()
    return half if bool((half.isfinite() | ~tensor.isfinite()).all()) else tensor.bfloat16()


def _distance(logits: Tensor, made: Tensor) -> float:
    """Return the mean KL divergence of logits that were made again from a model's own, in nats."""
    # A divergence needs no token that follows.
    scores = scores_of(made, logits, torch.full((len(logits),), -1))
    return float(scores[:, KL].mean())


def _head_entry(
    head: Head, options: RecordOptions, locate: Callable[[Head], dict[str, Any]] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the file's entry of the head, and the head's tensors that the file holds."""
    if options.with_head:
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
    recorder: RowRecorder, capture: Capture, head: Mapping[str, Any] | None, weights: Mapping[str, Tensor]
) -> ReferenceContent:
    samples = list(recorder.hashes.values())
    maxima = {(*site, call): found for site, numbers in capture.sites.items() for call, found in _maxima(numbers)}
    unseen = [site for site in sorted(recorder.rows) if (*site, 0) not in recorder.calls]
    if unseen:
        raise AnomalyError(f"the hook at the {unseen[0][1]} of {unseen[0][0]} never fired with a floating-point tensor")
    calls = {
        call: _rows_of_samples(call, recorder.calls.get(call, {}), maxima.get(call), len(samples))
        for call in sorted(recorder.calls.keys() | maxima.keys())
    }
    hidden = _rows_of_samples((str(recorder.head), "input", 0), recorder.hidden, None, len(samples)) if head else None
    sinks = [
        [s.sample, _place(capture.sites[s.layers[0], "output"], s.sample, s.position), s.channel, list(s.layers)]
        for s in capture.sinks.found
    ]
    drawn, names = (recorder.options.seed, recorder.options.rows, samples), (capture.modules, capture.blocks)
    return ReferenceContent(UNKNOWN_RUN, *drawn, *names, sinks, calls, hidden, head, weights)


def _rows_of_samples(
    call: Call, drawn: Mapping[int, _Drawn], maxima: tuple[NDArray[np.int64], Tensor] | None, samples: int
) -> SiteRows:
    """Concatenate the recorded rows of the samples."""
    if (drawn and len(drawn) != samples) or (maxima and len(maxima[0]) != samples):
        raise InfraError(
            f"{call[0]} isn't called for every sample (an expert, say), so that nothing of it can be kept: leave it "
            "out, or name the model itself as the reference"
        )
    if maxima is not None and not drawn:
        return SiteRows(maxima[0], maxima=maxima[1])
    ordered = [drawn[sample] for sample in sorted(drawn)]
    parts = [halved(each.rows).cpu() for each in ordered]
    # A sample that overflows float16 is in bfloat16, and then all of them are: they are one array.
    narrow = len({part.dtype for part in parts}) == 1
    at = [each.at for each in ordered if each.at is not None]
    return SiteRows(
        counts=np.array([each.count for each in ordered], dtype=np.int64),
        rows=torch.cat(parts if narrow else [part.bfloat16() for part in parts]),
        at=np.concatenate(at) if at else None,
        maxima=maxima[1] if maxima else None,
    )


def _maxima(numbers: SiteNumbers) -> Iterator[tuple[int, tuple[Any, Tensor]]]:
    """Yield, for each call, the numbers of tokens and the largest |x| of each, of all samples in their order."""
    if "token_max" not in numbers or not numbers.token_axis:
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

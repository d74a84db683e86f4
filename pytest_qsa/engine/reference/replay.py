"""A reference that was recorded to a file: a pass replays it in the place of a model that runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...captures import (
    PADDING,
    REFERENCE_TOKENS,
    SINKS,
    TOKENS,
    Array,
    Capture,
    ChannelError,
    LocalError,
    Pooled,
    Provenance,
    Request,
    SiteKey,
    SiteNumbers,
    against_reference,
    pairwise,
)
from ...common import AnomalyError, InfraError
from ..heads import LastHidden
from ..load.batches import Batch, BatchRows
from ..run.participant import Forward, Pass
from .live import Reference
from .pair_statistics import ReferenceTensor
from .reference_file import Call, ReferenceFile, hashes_of

ANEW = "make it anew with `qsa capture --for-reference` of a suite that compares there"


def check_answerable(requests: Sequence[Request], shown: str) -> None:
    """Refuse requests that no file can answer, before a model is loaded.

    Raises:
        InfraError: they ask for weights, or for channels of all tokens, which no file holds.
    """
    for request in requests:
        names = against_reference(request.statistics)
        by_channel = any(isinstance(statistic, ChannelError) for statistic in names)
        pooled = any(isinstance(statistic, Pooled) for statistic in names)
        if names and (request.site == "weight" or by_channel or pooled):
            what = "by: channel needs the error of every token" if by_channel else "weight_sqnr needs its weights"
            what = "embedding needs every token" if pooled else what
            raise InfraError(
                f"model.reference: {shown} holds drawn tokens of a model, and {what}: name the model itself as "
                "model.reference, or leave that assertion to a suite of its own"
            )


class ReplayedReference(Reference):
    """A reference that was recorded to a file, in the place of one that runs.

    `device`: where the subject runs; `origin`: may explain why a sample isn't in the file.
    """

    def __init__(self, file: ReferenceFile, device: torch.device, origin: str = "") -> None:
        self.file = file
        self._device = device
        self._origin = origin
        self._rows_of_call: dict[Call, tuple[list[Tensor], list[Tensor]]] = {}
        self._maxima_sites: frozenset[SiteKey] = frozenset()
        self._replayed: list[tuple[int, int, BatchRows, int]] = []
        """Of each sample that has run: its number, that in the file, the rows of its batch, and which one it is."""
        self._samples: dict[int, list[int]] = {}
        """The samples, as numbered in the file, of each forward that is under way, by its first sample."""

    def prepare(self, run: Pass, exits: ExitStack) -> None:
        """Check that the file holds what is wanted, of these samples.

        Raises:
            AnomalyError: it lacks a site, what the model predicts, or a sample.
            InfraError: predictions are wanted and the head's checkpoint is gone or has changed.
        """
        super().prepare(run, exits)
        if self.compares_predictions:
            if self.file.header["hidden"] is None:
                raise AnomalyError(f"{self._name} holds nothing of what the model predicts: {ANEW}")
            self._head = self.file.head().to(self._device)
        for site, names in self.compared.items():
            if pairwise(names):
                self._check(site, local=any(isinstance(statistic, LocalError) for statistic in names))
        self._maxima_sites = frozenset(site for site, names in self.compared.items() if REFERENCE_TOKENS in names)
        for site in self._maxima_sites:
            self._check(site, part="maxima")
        self._check_samples(run.batches)
        # The rows of a call are read once for all samples; after the pass nobody needs them.
        exits.callback(self._rows_of_call.clear)

    def _check(self, site: SiteKey, part: str = "rows", *, local: bool = False) -> None:
        held = self.file.calls.get((*site, 0), {})
        if part not in held:
            what = "maxima of the tokens" if part == "maxima" else "rows"
            raise AnomalyError(f"{self._name} holds no {what} of the {site[1]} of {site[0]}: {ANEW}")
        if local:
            # A local error feeds the subject's layer with what went into the reference's.
            self._check((site[0], "input"))

    def _check_samples(self, batches: Sequence[Batch]) -> None:
        missing = [
            i for i, sample in enumerate(s for batch in batches for s in hashes_of(batch)) if sample not in self._index
        ]
        if missing:
            raise AnomalyError(
                f"{self._name} was made of other tokens: sample {missing[0]}"
                f"{f' (and {len(missing) - 1} more)' if missing[1:] else ''} isn't among its {len(self._index)} samples"
                f"{self._origin}; give the suite the data and tokenizer of the reference, or make the file anew with it"
            )

    def begin(self, exits: ExitStack) -> None:
        """Begin an attempt: no sample is replayed yet."""
        super().begin(exits)
        self._replayed = []

    def forward_started(self, forward: Forward) -> None:
        """Look the samples of one forward up."""
        samples = [self._index[sample] for sample in hashes_of(forward.batch)]
        for row, (own, recorded) in enumerate(zip(forward.rows.samples, samples, strict=True)):
            self._replayed.append((own, recorded, forward.rows, row))
        # Streamed forwards are interleaved; the number of the first sample tells them apart.
        self._samples[forward.rows.samples[0]] = samples

    def forward_ended(self, forward: Forward, output: object) -> None:
        """Make the logits again, if predictions are compared."""
        samples = self._samples.pop(forward.rows.samples[0])
        if self.compares_predictions:
            hidden = [self.file.hidden(sample).to(self._device) for sample in samples]
            logits = _spread([self._head.logits(states) for states in hidden], forward.rows)
            forward.reference_output = SimpleNamespace(logits=logits)
            forward.reference_hidden = LastHidden(_spread(hidden, forward.rows), [self._head])
        super().forward_ended(forward, output)

    def complete(self, capture: Capture) -> Capture:
        """Add the maxima of the reference's tokens, of the samples that have run; they are numbered from 0."""
        blocks = {(block, "output") for block in self.file.header["blocks"]}
        sites: dict[SiteKey, list[Call]] = {}
        for call, held in self.file.calls.items():
            if "maxima" in held and call[:2] in blocks | self._maxima_sites:
                sites.setdefault((call[0], call[1]), []).append(call)
        reference = Capture(
            sites={site: self._numbers(site, calls) for site, calls in sites.items()},
            modules=tuple(self.file.header["modules"]),
            blocks=tuple(self.file.header["blocks"]),
            provenance=Provenance(self.file.provenance.model, rows=self.file.header["rows"], kept=self.file.shown),
        )
        return replace(capture, reference=reference)

    def tensor_at(self, forward: Forward, site: SiteKey, call: int) -> ReferenceTensor | None:
        """Return the rows that were recorded at a call of a site, for the samples of a forward."""
        return self._recorded((*site, call), self._samples[forward.rows.samples[0]])

    def _recorded(self, call: Call, samples: Sequence[int]) -> ReferenceTensor | None:
        if "rows" not in self.file.calls.get(call, {}):
            return None
        rows, at = self._rows(call)
        fed: Call = (call[0], "input", call[2])
        inputs = self._rows(fed)[0] if call[1] == "output" and "rows" in self.file.calls.get(fed, {}) else None
        return ReferenceTensor(
            self._padded([rows[sample] for sample in samples]),
            None if inputs is None else self._padded([inputs[sample] for sample in samples]),
            [at[sample] for sample in samples],
        )

    @property
    def _name(self) -> str:
        return f"the kept reference {self.file.shown}"

    @cached_property
    def _index(self) -> dict[str, int]:
        return self.file.samples

    def _rows(self, call: Call) -> tuple[list[Tensor], list[Tensor]]:
        if call not in self._rows_of_call:
            self._rows_of_call[call] = self.file.rows(call)
        return self._rows_of_call[call]

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        """Stack rows [R, C] of some samples, where one has fewer tokens than were drawn with zeros below."""
        width = self.file.header["rows"]
        return torch.stack([nn.functional.pad(row, (0, 0, 0, width - len(row))) for row in rows]).to(self._device)

    def _sinks(self, sample: int, site: SiteKey) -> list[Sequence[Any]]:
        """Return the sinks of a sample, as numbered in the file, at a site: they are found at the outputs of blocks."""
        sinks = self.file.header["sinks"] if site[1] == "output" else ()
        return [sink for sink in sinks if sink[0] == sample and site[0] in sink[3]]

    def _numbers(self, site: SiteKey, calls: Sequence[Call]) -> SiteNumbers:
        maxima = {call[2]: self.file.maxima(call) for call in calls}
        owners, tokens, peaks, channels = [], [], [], []
        for own, recorded, rows, row in sorted(self._replayed, key=lambda replayed: replayed[0]):
            for call in sorted(maxima):
                values = maxima[call][recorded].numpy()
                counting, length = _positions(rows, row, site[0], len(values))
                at: Array = np.arange(length) if counting is None else counting.numpy()
                spread = np.full(length, PADDING, dtype=np.float32)
                spread[at] = values
                tokens.append(spread)
                owners.append((own - self._first_sample, call, length))
                sinks = self._sinks(recorded, site)
                peaks.append([int(at[sink[1]]) for sink in sinks])
                channels.append([sink[2] for sink in sinks])
        table = np.array(owners, dtype=np.int64).reshape(-1, 3)
        return SiteNumbers(
            dtype=self.file.calls[calls[0]]["dtype"],
            shape=(),
            token_axis=True,
            statistics=frozenset({TOKENS, SINKS}),
            sample=table[:, 0].astype(np.int32),
            call=table[:, 1].astype(np.int32),
            lengths=table[:, 2],
            arrays={
                "token_max": np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.float32),
                "peaks": _table(peaks),
                "peak_channels": _table(channels),
            },
        )


def _spread(samples: Sequence[Tensor], rows: BatchRows) -> Tensor:
    """Stack tensors [T, C] of some samples' tokens as the subject's batch has them, [B, T, C]; 0 at padding."""
    layer = "decoder" if rows.has_decoder else ""
    positions = [_positions(rows, index, layer, len(one)) for index, one in enumerate(samples)]
    if all(counting is None for counting, _ in positions):
        return torch.stack(list(samples))
    # The file holds tokens without padding, the subject's batch may have some.
    found = samples[0].new_zeros(len(samples), max(length for _, length in positions), samples[0].shape[-1])
    for row, one, (counting, length) in zip(found, samples, positions, strict=True):
        row[slice(length) if counting is None else counting.to(one.device)] = one
    return found


def _positions(rows: BatchRows, index: int, layer: str, count: int) -> tuple[Tensor | None, int]:
    """Return the indices of a sample's tokens in its row of a batch, without padding, and the length of the row."""
    # Encoder and decoder have lengths of their own; the mask that leaves as many tokens is the right one.
    for length in rows.lengths:
        kept = rows.unpadded(layer, length)[index]
        if kept is not None and len(kept) == count:
            return kept, length
    return None, count


def _table(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    table = np.full((len(rows), max(1, *(len(row) for row in rows)) if rows else 1), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table

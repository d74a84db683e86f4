"""The partner of a pass that is no model: a reference that was kept as a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...captures import (
    AGREEMENT,
    PADDING,
    REFERENCE_TOKENS,
    SINKS,
    TOKENS,
    Capture,
    ChannelError,
    LocalError,
    Provenance,
    Request,
    Sinks,
    Site,
    SiteKey,
    SiteNumbers,
    Statistic,
    against_reference,
    pairwise,
)
from ...common import AnomalyError, InfraError
from ..load.batches import Batch, Rows
from ..run.visits import CompanionChanged, Forward, Visits
from ..stream.stream import Stream
from .compare import Met, Pairs
from .head import Head
from .kept_file import Call, KeptFile, hashes_of
from .live import Wanted, paired

ANEW = "make it anew with `qsa capture --for-reference` of a suite that compares there"


def check_answerable(requests: Sequence[Request], shown: str) -> None:
    """Find what no file can answer, before a model is loaded.

    Raises:
        InfraError: weights, or channels of all tokens.
    """
    for request in requests:
        names = against_reference(request.statistics)
        by_channel = any(isinstance(statistic, ChannelError) for statistic in names)
        if names and (request.site == "weight" or by_channel):
            what = "by: channel needs the error of every token" if by_channel else "weight_sqnr needs its weights"
            raise InfraError(
                f"model.reference: {shown} holds drawn tokens of a model, and {what}: name the model itself as "
                "model.reference, or leave that assertion to a suite of its own"
            )


@dataclass
class KeptPartner:
    """A reference that was kept. `device`: where the subject runs; `origin`: may explain why a sample isn't there."""

    file: KeptFile
    device: torch.device
    origin: str = ""
    stream: Stream | None = None
    _pairs: Wanted = field(default_factory=dict)
    _own: frozenset[SiteKey] = frozenset()
    _scores: bool = False
    _flown: list[tuple[int, int, Rows, int]] = field(default_factory=list)
    _drawn: dict[Call, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)

    @contextmanager
    def ready(
        self, batches: Sequence[Batch], first_sample: int, wanted: Wanted, scores: frozenset[Statistic]
    ) -> Iterator[None]:
        """Check that the file holds what is wanted, of these samples.

        Raises:
            AnomalyError: it lacks a site, what the model predicts, or a sample.
        """
        self._scores = AGREEMENT in scores
        if self._scores and self.file.header["hidden"] is None:
            raise AnomalyError(f"{self._name} holds nothing of what the model predicts: {ANEW}")
        if self._scores:
            _ = self._head
        names = {site: against_reference(statistics) for site, statistics in wanted.items()}
        self._pairs = {site: each for site, each in names.items() if site[1] != "weight" and each}
        self._own = frozenset(site for site, each in names.items() if REFERENCE_TOKENS in each)
        for site, each in self._pairs.items():
            if pairwise(each):
                self._check(site, local=any(isinstance(statistic, LocalError) for statistic in each))
        for site in self._own:
            self._check(site, part="maxima")
        self._check_samples(batches)
        yield
        self._drawn.clear()

    def _check(self, site: SiteKey, part: str = "rows", *, local: bool = False) -> None:
        held = self.file.calls.get((*site, 0), {})
        if part not in held:
            what = "maxima of the tokens" if part == "maxima" else "rows"
            raise AnomalyError(f"{self._name} holds no {what} of the {site[1]} of {site[0]}: {ANEW}")
        if local:
            self._check((site[0], "input"))

    def _check_samples(self, batches: Sequence[Batch]) -> None:
        missing = [
            i for i, sample in enumerate(s for batch in batches for s in hashes_of(batch)) if sample not in self._index
        ]
        if missing:
            raise AnomalyError(
                f"{self._name} was made of other tokens: sample {missing[0]}"
                f"{f' (and {len(missing) - 1} more)' if missing[1:] else ''} isn't among its {len(self._index)} samples"
                f"{self.origin}; give the suite the data and tokenizer of the reference, or make the file anew with it"
            )

    def visits(
        self, wanted: Wanted, modules: Mapping[str, nn.Module], unshared: frozenset[SiteKey], *, may_stop: bool
    ) -> Visits:
        """Begin a try of the pass."""
        self._flown = []
        pairs = Pairs(self._pairs, modules, Sinks((), searched=False).among)
        return paired(pairs, wanted, modules, unshared, may_stop=may_stop)

    def fly(self, batch: Batch, forward: Forward) -> None:
        """Look the samples of one forward up."""
        samples = [self._index[sample] for sample in hashes_of(batch)]
        self._flown += [(own, kept, forward.rows, row) for row, (own, kept) in
                        enumerate(zip(forward.rows.samples, samples, strict=True))]  # fmt: skip
        forward.flight = KeptFlight(self, forward.rows, samples)

    def learn(self, change: CompanionChanged) -> None:
        """Nothing runs that could change."""

    def capture(self, first_sample: int) -> Capture:
        """Return the maxima of the reference's tokens, of the samples that have run; they are numbered from 0."""
        blocks = {(block, "output") for block in self.file.header["blocks"]}
        calls = [call for call, held in self.file.calls.items() if "maxima" in held and call[:2] in blocks | self._own]
        sites: dict[tuple[str, Site], list[Call]] = {}
        for call in calls:
            sites.setdefault((call[0], call[1]), []).append(call)
        return Capture(
            sites={site: self._numbers(site, each, first_sample) for site, each in sites.items()},
            modules=tuple(self.file.header["modules"]),
            blocks=tuple(self.file.header["blocks"]),
            provenance=Provenance(self.file.provenance.model, rows=self.file.header["rows"], kept=self.file.shown),
        )

    def weighed(
        self,
        modules: Mapping[str, nn.Module],
        wanted: Wanted,
        numbers: Mapping[SiteKey, SiteNumbers],
        stream: Stream | None,
    ) -> dict[SiteKey, SiteNumbers]:
        """Weights aren't kept."""
        return dict(numbers)

    def met(self, call: Call, samples: Sequence[int]) -> Met | None:
        """Return what was kept of a call of a site for some samples."""
        if "rows" not in self.file.calls.get(call, {}):
            return None
        rows, at = self._rows(call)
        fed: Call = (call[0], "input", call[2])
        inputs = self._rows(fed)[0] if call[1] == "output" and "rows" in self.file.calls.get(fed, {}) else None
        return Met(
            self._padded([rows[sample] for sample in samples]),
            None if inputs is None else self._padded([inputs[sample] for sample in samples]),
            [at[sample] for sample in samples],
        )

    def logits(self, samples: Sequence[int], rows: Rows) -> Tensor:
        """Return logits [B, T, V] that are made again; 0 at padding."""
        layer = "decoder" if rows.has_decoder else ""
        made = [self._head.logits(self.file.hidden(sample).to(self.device)) for sample in samples]
        places = [_places(rows, index, layer, len(one)) for index, one in enumerate(made)]
        if all(place is None for place, _ in places):
            return torch.stack(made)
        found = made[0].new_zeros(len(made), max(length for _, length in places), made[0].shape[-1])
        for row, one, (place, length) in zip(found, made, places, strict=True):
            row[slice(length) if place is None else place.to(self.device)] = one
        return found

    @property
    def _name(self) -> str:
        return f"the kept reference {self.file.shown}"

    @cached_property
    def _index(self) -> dict[str, int]:
        return self.file.samples

    @cached_property
    def _head(self) -> Head:
        return self.file.head().to(self.device)

    def _rows(self, call: Call) -> tuple[list[Tensor], list[Tensor]]:
        if call not in self._drawn:
            self._drawn[call] = self.file.rows(call)
        return self._drawn[call]

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        """Stack rows [R, C] of some samples, where one has fewer tokens than were drawn with zeros below."""
        width = self.file.header["rows"]
        return torch.stack([nn.functional.pad(row, (0, 0, 0, width - len(row))) for row in rows]).to(self.device)

    def _numbers(self, site: tuple[str, Site], calls: Sequence[Call], first_sample: int) -> SiteNumbers:
        maxima = {call[2]: self.file.maxima(call) for call in calls}
        owners, tokens, peaks, channels = [], [], [], []
        for own, kept, rows, row in sorted(self._flown, key=lambda flown: flown[0]):
            for call in sorted(maxima):
                values = maxima[call][kept].numpy()
                place, length = _places(rows, row, site[0], len(values))
                at: NDArray[Any] = np.arange(length) if place is None else place.numpy()
                spread = np.full(length, PADDING, dtype=np.float32)
                spread[at] = values
                tokens.append(spread)
                owners.append((own - first_sample, call, length))
                sinks = [
                    s for s in self.file.header["sinks"] if s[0] == kept and site[0] in s[3] and site[1] == "output"
                ]
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


@dataclass
class KeptFlight:
    """The forward of a reference that ran long ago, over some samples of its file."""

    partner: KeptPartner
    rows: Rows
    samples: Sequence[int]

    def at(self, site: SiteKey, call: int) -> Met | None:
        """Return what was kept there."""
        return self.partner.met((*site, call), self.samples)

    def end(self, *, whole: bool) -> Any:
        """Return an output with logits, if they are compared."""
        if not whole or not self.partner._scores:
            return None
        return SimpleNamespace(logits=self.partner.logits(self.samples, self.rows))

    def settle(self) -> None:
        """Nothing runs."""


def _places(rows: Rows, index: int, layer: str, count: int) -> tuple[Tensor | None, int]:
    """Return where a sample's tokens that are no padding stand in its row of a batch, and how long the row is."""
    for length in rows.lengths:
        kept = rows.kept(layer, length)[index]
        if kept is not None and len(kept) == count:
            return kept, length
    return None, count


def _table(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    table = np.full((len(rows), max(1, *(len(row) for row in rows)) if rows else 1), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table

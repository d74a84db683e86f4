"""What vLLM ran beside a recorded reference: the rows that the file holds, which vLLM's workers keep as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor, nn

from ...captures import LOGITS, Capture, Request, SiteKey
from ..load.batches import Batch, token_ids
from ..modules import blocks_of, layers_of, with_experts
from ..reference.reference_file import Call, ReferenceFile, drawn_tokens, hashes_of
from ..reference.replay import ReplayedReference
from ..run.participant import Pass
from ..run.run_pass import forwards_of, wanted_sites


@dataclass(frozen=True)
class DrawnRows:
    """Which rows of which sites vLLM's workers keep. `rows`: of each sample, ascending."""

    sites: frozenset[SiteKey]
    rows: Sequence[Sequence[int]]


class RecordedComparison:
    """Compares the rows of a pass in vLLM with those of a recorded reference, as a pass by transformers does.

    `model`: without weights; its layers are what the requests name. `origin`: may explain why a sample isn't in the
    file. A context manager: at its end the rows of the file are let go.
    """

    def __init__(
        self, file: ReferenceFile, model: nn.Module, batches: Sequence[Batch], requests: Sequence[Request], origin: str
    ) -> None:
        own = tuple(request for request in requests if request.site != LOGITS)
        modules, blocks = layers_of(model), blocks_of(model)
        layers = with_experts(modules)
        wanted = wanted_sites(layers, blocks, own)
        self._run = Pass(model, modules, layers, blocks, batches, own, wanted)
        self._reference = ReplayedReference(file, torch.device("cpu"), origin)
        self._file = file
        self._exits = ExitStack()

    def __enter__(self) -> RecordedComparison:
        """Check that the file holds what is wanted, of these samples.

        Raises:
            AnomalyError: it doesn't.
        """
        with ExitStack() as exits:
            self._reference.prepare(self._run, exits)
            self._reference.begin(exits)
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the rows of the file go."""
        self._exits.close()

    @property
    def drawn(self) -> DrawnRows:
        """What vLLM's workers have to keep."""
        header = self._file.header
        rows = [
            drawn_tokens(header["seed"], sample, len(ids), header["rows"]).tolist()
            for batch in self._run.batches
            for sample, ids in zip(hashes_of(batch), token_ids(batch), strict=True)
        ]
        return DrawnRows(frozenset(self._reference.sites), rows)

    @torch.no_grad()
    def added_to(self, capture: Capture, rows: Mapping[Call, Tensor]) -> Capture:
        """Return a capture with the comparison. `rows`: of each call of a site the rows of all samples, [N, C].

        Raises:
            InfraError: the file holds other calls or shapes.
        """
        drawn = self.drawn.rows
        parts = {call: torch.split(every, [len(each) for each in drawn]) for call, every in rows.items()}
        for forward in forwards_of(self._run.batches, 0):
            self._reference.forward_started(forward)
            for (layer, site, call), found in parts.items():
                own = [_spread(found[i], drawn[i], len(capture.tokens[i])) for i in forward.rows.samples]
                self._reference.visit(forward, (layer, site), call, torch.stack(own), None)
            self._reference.forward_ended(forward, None)
        numbers = dict(capture.sites)
        self._reference.contribute(numbers)
        return self._reference.complete(replace(capture, sites=numbers))


def _spread(rows: Tensor, at: Sequence[int], length: int) -> Tensor:
    """Return a sample's tensor [T, C] of its rows that were kept; the others, which nothing reads, are zeros."""
    whole = rows.new_zeros(length, rows.shape[1])
    whole[list(at)] = rows
    return whole

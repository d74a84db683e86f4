"""What a model predicts for the next token, sample by sample, alone and against its reference."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn

from ...captures import (
    LOGITS,
    MARGIN_NAMES,
    SCORE_NAMES,
    PredictionMargins,
    SiteKey,
    SiteNumbers,
    against_reference,
    no_logits,
)
from ...common import AnomalyError
from ...metrics import NLL, REFERENCE_NLL, TokenScores, numbers_of
from ..heads import HeadInputs, LastHidden
from ..load.batches import Batch
from ..reduce.margins import Margins, RowLogits
from ..reduce.pairs import COMPARISONS, comparison_of, scores_of
from ..reduce.storage import Transfer
from .participant import Forward, Need, Participant, Pass

MASKED = ("MaskedLM", "PreTraining")
"""The ends of the names of models that predict masked tokens, not the next one."""

CLASSIFIERS = ("Classification", "ClassificationWithTeacher")
"""The ends of the names of models that decide once for a sample."""


class Predictions(Participant):
    """Scores what the model predicts after each token, against the reference's predictions where that is wanted."""

    needs = Need.WHOLE_FORWARDS

    def __init__(self, run: Pass) -> None:
        self._model = run.model
        self._statistics = run.predictions
        self._compared = [statistic for statistic in sorted(run.predictions) if statistic.name in COMPARISONS]
        self._heads = HeadInputs(run.model, stays=run.stream is None) if run.wants_margins else None
        if self._heads is not None and self._heads.site is not None and self._heads.site[0] in run.modules:
            self.sites = {self._heads.site}
        self._margins = Margins()
        self.begin()

    def begin(self, exits: ExitStack | None = None) -> None:
        """Begin an attempt without scores."""
        self._samples: dict[int, Tensor] = {}
        self._dtype = ""

    def visit(self, forward: Forward, site: SiteKey, call: int, tensor: Tensor, inputs: Tensor | None) -> None:
        """Keep what goes into the head."""
        if self._heads is not None:
            self._heads.keep(forward.rows.samples[0], tensor)

    def forward_ended(self, forward: Forward, output: object) -> None:
        """Score the rows of one batch.

        Raises:
            AnomalyError: the model returns no logits, or the reference has another vocabulary.
        """
        own = logits_of(output, self._model)
        theirs = logits_of(forward.reference_output, self._model) if against_reference(self._statistics) else None
        if theirs is not None and theirs.shape != own.shape:
            raise AnomalyError(
                f"the model predicts {own.shape[-1]} tokens and its reference {theirs.shape[-1]}: "
                "they can't be compared"
            )
        rows = forward.rows
        self._dtype = str(own.dtype).removeprefix("torch.")
        # A model of masked tokens sees the next token, so that its score for it would mean nothing.
        following = following_tokens(
            forward.batch, own.shape[:2], causal=not type(self._model).__name__.endswith(MASKED)
        )
        # Logits belong to no layer; those of an encoder-decoder are its decoder's, whose mask then counts.
        keep = rows.unpadded("decoder" if rows.has_decoder else "", own.shape[1], own.device)
        hidden = None if self._heads is None else self._heads.take(rows.samples[0])
        for index, sample in enumerate(rows.samples):
            # The reference may have run on another device.
            pair = None if theirs is None else theirs[index].to(own.device, non_blocking=True)
            after = following[index].to(own.device, non_blocking=True)
            if pair is None:
                found = scores_of(own[index], None, after)
            else:
                found = comparison_of(own[index], pair, after, [statistic.name for statistic in self._compared])
                if self._heads is not None:
                    models = (own[index], hidden), (pair, forward.reference_hidden)
                    found = torch.cat([found, self._margins_of(*models, index, keep[index])], dim=1)
            self._samples[sample] = _blanked(found, keep[index])

    def _margins_of(
        self,
        own: tuple[Tensor, LastHidden | None],
        reference: tuple[Tensor, LastHidden | None],
        index: int,
        kept: Tensor | None,
    ) -> Tensor:
        """Return `MARGIN_NAMES` of the tokens that count, [T, 4]; NaN at the others."""
        found = self._margins.of(RowLogits.of(*own, index, kept), RowLogits.of(*reference, index, kept))
        if kept is None:
            return found
        return found.new_full((len(own[0]), len(MARGIN_NAMES)), float("nan")).index_copy_(0, kept, found)

    def contribute(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add the scores of all samples, in their order."""
        fetch = Transfer(self._samples.values())
        tables = [fetch(self._samples[sample]) for sample in sorted(self._samples)]
        columns = range(len(SCORE_NAMES))
        scores = [TokenScores(*(table[:, column] for column in columns)) for table in tables]
        found = numbers_of(scores, sorted(self._samples), self._statistics, self._dtype)
        more = enumerate(self._compared, len(SCORE_NAMES))
        arrays = {statistic.key: np.concatenate([table[:, column] for table in tables]) for column, statistic in more}
        if self._heads is not None:
            arrays[PredictionMargins().key] = np.concatenate([table[:, -len(MARGIN_NAMES) :] for table in tables])
        numbers[LOGITS, LOGITS] = found.having((), arrays)


def decided_otherwise(numbers: SiteNumbers | None) -> set[int]:
    """Return the tokens that two models find likeliest where these aren't the same; none where that was not kept."""
    if numbers is None or PredictionMargins().key not in numbers:
        return set()
    token, other = numbers.arrays[PredictionMargins().key][:, 2:].T
    apart = ~np.isnan(token) & (token != other)
    return {int(each) for each in np.concatenate([token[apart], other[apart]])}


def logits_of(output: object, model: nn.Module) -> Tensor:
    """Return the logits [B, T, V] of what a model returned, [B, 1, V] where it sorts whole samples into classes.

    Raises:
        AnomalyError: there are none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, tuple):
        logits = logits[0]
    if isinstance(logits, Tensor) and logits.dim() == 2 and type(model).__name__.endswith(CLASSIFIERS):
        logits = logits[:, None]  # one decision for each sample
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        raise no_logits(type(model).__name__)
    return logits.detach()


def following_tokens(batch: Batch, shape: tuple[int, ...], *, causal: bool) -> Tensor:
    """Return the token after each position, [B, T] int64; −1 at the last one, or where the model predicts none."""
    following = torch.full(tuple(shape), -1, dtype=torch.int64)
    ids = batch if isinstance(batch, Tensor) else batch.get("decoder_input_ids", batch.get("input_ids"))
    if causal and isinstance(ids, Tensor) and not ids.is_floating_point() and tuple(ids.shape) == tuple(shape):
        following[:, :-1] = ids[:, 1:].cpu()
    return following


def _blanked(scores: Tensor, kept: Tensor | None) -> Tensor:
    """Leave out padding: its own rows, and the prediction of a token that is none."""
    if kept is None:
        return scores
    blank = torch.full_like(scores, float("nan"))
    blank.index_copy_(0, kept, scores.index_select(0, kept))
    # The score at a position is that of the token after it, so that the mask is read one position later.
    counts = torch.zeros(len(scores) + 1, dtype=torch.bool, device=scores.device)
    counts.index_fill_(0, kept, value=True)
    for column in (NLL, REFERENCE_NLL):
        blank[:, column].masked_fill_(~counts[1:], float("nan"))
    return blank

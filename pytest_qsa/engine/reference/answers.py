"""The predictions of a local reference for the tokens that a server listed, position by position.

The reference's whole distribution of a position is reduced at once and never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common import AnomalyError, Progress
from ...suite import Subject
from ..load.batches import token_ids
from ..load.data import batches_of
from ..load.models import Loaded, quiet
from ..load.tokenizer import load_tokenizer
from ..modules import device_of, evaluating, forward_errors, run_batch
from ..reduce.pairs import ROWS_AT_ONCE
from ..run.next_token import logits_of

NO_TOKEN = -1
"""Fills the ids of a row that asks for fewer tokens than others."""
Answer = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]
"""Of T − 1 positions: ln p of the k tokens that were asked for (−∞ where absent), ln p of the token that came, the
likeliest token, and Σ p ln p; all in nats."""


def tokenizer_at(path: str) -> Any:
    """Load a tokenizer alone; None for a folder that has none.

    Raises:
        AnomalyError: a tokenizer file is no JSON.
        InfraError: it can't be loaded for any other reason.
    """
    return load_tokenizer(path, {"trust_remote_code": False})


def windows(subject: Subject, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each sample of the subject's data."""
    batches = batches_of(subject.data, tokenizer, subject.folder)
    return [row.tolist() for batch in batches for row in token_ids(batch)]


def answers_of(
    loaded: Loaded,
    samples: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]],
    progress: Progress | None = None,
) -> list[Answer]:
    """Run a model over the tokens of each sample; return what it says of the tokens that are asked for.

    `samples`: the tokens [T] of each, and which are asked for after each but the last, [T − 1, k].

    Raises:
        AnomalyError: the model has fewer tokens than are asked for, or predicts none, or NaN.
        InfraError: it can't be run.
    """
    # By index, for a streamed model ends its forwards in any order.
    found: dict[int, Answer] = {}
    device = loaded.stream.device if loaded.stream is not None else device_of(loaded.model)

    def answer(index: int) -> None:
        tokens, ids = samples[index]
        batch = torch.from_numpy(tokens.astype("int64"))[None]
        found[index] = _rows(logits_of(run_batch(loaded.model, batch, device), loaded.model)[0], tokens, ids)
        if progress is not None:
            progress(len(found), len(samples))

    with torch.no_grad(), evaluating(loaded.model), quiet(), forward_errors("the reference"):
        if loaded.stream is None:
            for index in range(len(samples)):
                answer(index)
        else:
            with loaded.stream.ready():
                for _ in loaded.stream.run(range(len(samples)), answer, lambda index: None):
                    pass
    return [found[index] for index in range(len(samples))]


def _rows(logits: Tensor, tokens: NDArray[np.int32], asked: NDArray[np.int32]) -> Answer:
    """Reduce the logits [T, V] of one sample to what is asked for."""
    ids = torch.from_numpy(asked.astype("int64"))
    if int(ids.max()) >= logits.shape[1]:
        raise AnomalyError(
            f"the served model predicts the token {int(ids.max())} and the reference has {logits.shape[1]} of them: "
            "another vocabulary"
        )
    following = torch.from_numpy(tokens[1:].astype("int64"))
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(ids), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(ids)))
        p = logits[rows].double().log_softmax(1).cpu()
        # gather refuses −1, so that missing ids ask for token 0 and are masked afterwards.
        known = p.gather(1, ids[rows].clamp_min(0)).masked_fill(ids[rows] == NO_TOKEN, float("-inf"))
        # A token of probability 0 adds nothing; 0 · −∞ would be NaN.
        negentropy = torch.where(p > float("-inf"), p.exp() * p, 0.0).sum(1)
        parts.append((known, p.gather(1, following[rows][:, None])[:, 0], p.argmax(1), negentropy))
    if any(torch.isnan(part[1]).any() for part in parts):
        raise AnomalyError("the reference predicts NaN or Inf: there is nothing sound to compare with")
    at_known, came, likeliest, entropies = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return at_known, came, likeliest, entropies

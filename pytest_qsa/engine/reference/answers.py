"""What a local model says where a served one was asked: the same tokens, and of each position the served tokens alone.

The reference's whole distribution of a position lives only as long as it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common.errors import AnomalyError, InfraError
from ...external.served.agreement import ReferenceRows
from ...external.served.tables import ABSENT, Table
from ...suite.subject import Subject
from ..load.data import batches_of
from ..load.models import Loaded, tokenizer_of
from ..load.quiet import quiet
from ..modules import device_of
from ..reduce.pairs import ROWS_AT_ONCE
from ..run.batches import token_ids
from ..run.hooks import evaluating, run_batch
from ..run.logits import logits_of
from ..stream.stream import WAVE

Progress = Callable[[int, int], None]


def tokenizer_at(path: str) -> Any:
    """Load a tokenizer alone; None where there is none."""
    return tokenizer_of(path, {"trust_remote_code": False})


def windows(subject: Subject, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each sample of the subject's data."""
    batches = batches_of(subject.data, tokenizer, subject.folder)
    return [row.tolist() for batch in batches for row in token_ids(batch)]


def rows_of_model(loaded: Loaded, tables: Sequence[Table], progress: Progress | None = None) -> list[ReferenceRows]:
    """Run a model over the tokens of each table; return what it says of the tables' tokens.

    Raises:
        AnomalyError: the model has fewer tokens than the tables, or predicts none, or NaN.
        InfraError: it can't be run.
    """
    found: dict[int, ReferenceRows] = {}

    def answer(index: int) -> None:
        table = tables[index]
        batch = torch.from_numpy(table.tokens.astype("int64"))[None]
        device = loaded.stream.device if loaded.stream is not None else device_of(loaded.model)
        found[index] = _rows(logits_of(run_batch(loaded.model, batch, device), loaded.model)[0], table)
        if progress is not None:
            progress(len(found), len(tables))

    try:
        with torch.no_grad(), evaluating(loaded.model), quiet():
            _run(loaded, [partial(answer, index) for index in range(len(tables))])
    except torch.OutOfMemoryError as error:
        raise InfraError(f"the reference ran out of memory ({str(error).splitlines()[0]}): lower seq_len") from error
    except (RuntimeError, IndexError) as error:
        raise InfraError(f"the forward pass of the reference failed: {str(error).splitlines()[0]}") from error
    return [found[index] for index in range(len(tables))]


def _run(loaded: Loaded, jobs: Sequence[Callable[[], None]]) -> None:
    if loaded.stream is None:
        for job in jobs:
            job()
        return
    with loaded.stream.ready():
        for start in range(0, len(jobs), WAVE):
            loaded.stream.run(jobs[start : start + WAVE], lambda index: None)


def _rows(logits: Tensor, table: Table) -> ReferenceRows:
    """Reduce the logits [T, V] of one sample to what a table asks for."""
    ids = torch.from_numpy(table.ids.astype("int64"))
    if int(ids.max()) >= logits.shape[1]:
        raise AnomalyError(
            f"the served model predicts the token {int(ids.max())} and the reference has {logits.shape[1]} of them: "
            "another vocabulary"
        )
    following = torch.from_numpy(table.tokens[1:].astype("int64"))
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(ids), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(ids)))
        p = logits[rows].double().log_softmax(1).cpu()
        known = p.gather(1, ids[rows].clamp_min(0)).masked_fill(ids[rows] == ABSENT, float("-inf"))
        negentropy = torch.where(p > float("-inf"), p.exp() * p, 0.0).sum(1)
        parts.append((known, p.gather(1, following[rows][:, None])[:, 0], p.argmax(1), negentropy))
    if any(torch.isnan(part[1]).any() for part in parts):
        raise AnomalyError("the reference predicts NaN or Inf: there is nothing sound to compare with")
    at_known, came, likeliest, entropies = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return ReferenceRows(at_known, came, likeliest, entropies)

"""Margins: how clearly two models prefer the token that the reference finds likeliest.

Logits in 16 bits lie so far apart that one position in 25 has two likeliest tokens, so the few logits that decide a
margin are made again, in float64, of the hidden states that went into the head. A row's candidates are brought to the
host: there are a few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...captures import Array
from ..heads import Head, LastHidden
from .pairs import compiled, rows_of_logits

ROOM = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""dtype → how far a logit may be from its exact value, as a share of itself: four roundings of it."""
ROOM_OF_OTHERS = 2.0**-16
"""The same of float32, whose sums over thousands of channels lose more than their rounding."""
FEW = 16
"""The candidates of a row that are looked for at first."""


@dataclass(frozen=True)
class RowLogits:
    """One sample's logits [T, V], its last hidden states [T, H] where they are known, and the heads that may fit."""

    logits: Tensor
    states: Tensor | None
    heads: Sequence[Head]

    @classmethod
    def of(cls, logits: Tensor, hidden: LastHidden | None, index: int, kept: Tensor | None) -> RowLogits:
        """Take one row of a batch, [T, V], of which the tokens `kept` count; None for all."""
        states = hidden.states[index] if hidden is not None and hidden.states.shape[1] == len(logits) else None
        if kept is not None:
            logits = logits.index_select(0, kept.to(logits.device))
            states = None if states is None else states.index_select(0, kept.to(states.device))
        return cls(logits, states, () if hidden is None or states is None else hidden.heads)

    def at(self, rows: Tensor, ids: Tensor, head: Head | None) -> Array:
        """Return logits of some rows and tokens, [N] float64: by the head where both are known, or as they are."""
        if head is None or self.states is None:
            return self.logits[rows, ids].double().cpu().numpy()
        device = head.weight.device
        return head.logits_at(self.states[rows].to(device), ids.to(device)).cpu().numpy()


class Margins:
    """Takes margins sample by sample, and remembers which scaling of each model's head makes its logits."""

    def __init__(self) -> None:
        self._found: dict[str, Head | None] = {}

    def of(self, own: RowLogits, reference: RowLogits) -> Tensor:
        """Return `MARGIN_NAMES` of each position, [T, 4] float64; NaN where either row holds NaN.

        Of tokens that are equally likely the first one is taken.
        """
        rows, ids = candidates(reference.logits)
        z = reference.at(rows, ids, self._head("reference", reference))
        token, top, second = _best(rows.numpy(), ids.numpy(), z, len(reference.logits))
        known, head = torch.from_numpy(np.flatnonzero(token >= 0)), self._head("own", own)
        at_token = np.full(len(token), np.nan)
        # The reference's token need not be among the model's own candidates.
        at_token[known.numpy()] = own.at(known, torch.from_numpy(token)[known], head)
        rows, ids = candidates(own.logits)
        others = ids.numpy() != token[rows.numpy()]
        rows, ids = rows[others], ids[others]
        other, rest, _ = _best(rows.numpy(), ids.numpy(), own.at(rows, ids, head), len(token))
        likeliest = np.where(at_token >= rest, token, other)
        found = np.stack([top - second, at_token - rest, token, likeliest], axis=1)
        found[np.isnan(found[:, :2]).any(axis=1)] = np.nan
        return torch.from_numpy(found).to(own.logits.device)

    def _head(self, side: str, rows: RowLogits) -> Head | None:
        """Return the head that makes a model's logits again; None where none of those that may do so does."""
        if side not in self._found:
            self._found[side] = next((head for head in rows.heads if _makes(head, rows)), None)
        return self._found[side]


def candidates(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and the tokens of logits [T, V] that may be the two largest of their row; by row, then token."""
    room = ROOM.get(logits.dtype, ROOM_OF_OTHERS)
    if compiled(logits):
        return _fused_candidates(logits, room)
    top = logits.float().topk(2, dim=1).values
    least = top[:, 1] - room * top.abs().amax(1)
    rows, ids = torch.nonzero(logits.float() >= least[:, None], as_tuple=True)
    sound = ~torch.isnan(top[rows, 0])
    return rows[sound].cpu(), ids[sound].cpu()


def _fused_candidates(logits: Tensor, room: float) -> tuple[Tensor, Tensor]:
    from . import pairs_kernels as kernels
    from .cpu_kernels import share_torchs_threads

    table, threads, width = rows_of_logits(logits), share_torchs_threads(), FEW
    while True:
        found, counts = np.zeros((len(table), width), dtype=np.int32), np.zeros(len(table), dtype=np.int64)
        kernels.lead_rows(table, room, found, counts, threads)
        if counts.max(initial=0) <= width:
            break
        width = int(counts.max())
    kept = np.arange(width) < counts[:, None]
    rows = np.repeat(np.arange(len(table)), counts)
    return torch.from_numpy(rows), torch.from_numpy(found[kept].astype(np.int64))


def _makes(head: Head, rows: RowLogits) -> bool:
    """Say whether a head makes the largest logits of a sample again, as far as their dtype can show."""
    if rows.states is None:
        return False
    at, ids = candidates(rows.logits)
    made, known = rows.at(at, ids, head), rows.logits[at, ids].double().cpu().numpy()
    room = ROOM.get(rows.logits.dtype, ROOM_OF_OTHERS)
    return bool((np.abs(made - known) <= room * np.maximum(np.abs(known), 1.0)).all())


def _best(rows: Array, ids: Array, values: Array, count: int) -> tuple[Array, Array, Array]:
    """Return each row's token of the largest value, that value, and the second largest: [count] each.

    −1 and NaN where a row has none; of equal values the lowest token is the first.
    """
    order = np.lexsort((ids, -values, rows))
    rows, ids, values = rows[order], ids[order], values[order]
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    tokens, top, second = np.full(count, -1, dtype=np.int64), np.full(count, np.nan), np.full(count, np.nan)
    tokens[rows[first]], top[rows[first]] = ids[first], values[first]
    several = first[np.append(np.diff(first), len(rows) - first[-1:]) > 1]
    second[rows[several]] = values[several + 1]
    return tokens, top, second

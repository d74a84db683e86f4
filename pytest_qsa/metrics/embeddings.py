"""The metric of embeddings: how close each sample's is to the reference's, and whether it finds the same neighbours.

numpy only. Encoders without a head are used by the order in which a query finds their embeddings, not by the numbers.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from ..captures import Pooled, Site, Statistic
from ..common import AnomalyError
from .intervals import mean_by_window
from .registry import Estimate, Parameters, metric
from .view import View

EmbeddingStat = Literal["order", "recall", "cosine"]
Nearest = Annotated[int, Ge(1)]
Pool = Literal["mean", "first", "last"]
Floats = NDArray[np.float64]
LEAST_SAMPLES = 4
"""An order of fewer than three others says nothing."""


def _needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    return frozenset({Pooled(parameters["pool"])})


@metric(
    _needs,
    reduce=None,
    against=True,
    sites=("input", "output"),
    worst="lowest",
    counts="samples",
    perfect=1.0,
    span={"order": (-1.0, 1.0), "recall": (0.0, 1.0), "cosine": (-1.0, 1.0)},
)
def embedding(view: View, *, stat: EmbeddingStat = "order", k: Nearest = 5, pool: Pool = "mean") -> Estimate:
    """Compare each sample's embedding, and which other samples it finds nearest by cosine, with the reference's.

    `order`: Spearman's rank correlation of a sample's cosines to all other samples, in the model and in the reference.
    `recall`: the share of its `k` nearest samples in the reference that are among the `k` nearest in the model
    (recall@k). `cosine`: of its embedding with the reference's. Means over samples, with the 95 % interval by sample.
    `pool` makes the embedding of a tensor with tokens: their mean, the first one (BERT's [CLS]), or the last one,
    without padding; a tensor without a token axis, as CLIP's projections, is one. At least 4 samples, `recall` k + 2.
    """
    pooled = view.numbers.arrays[Pooled(pool).key]
    if len(np.unique(view.numbers.sample)) < len(pooled):
        raise AnomalyError("it is called several times for a sample, so that a sample has no single embedding here")
    if not np.isfinite(pooled).all():
        raise AnomalyError("the embedding of a sample holds NaN or Inf")
    reference, own = pooled[:, 0], pooled[:, 1]
    if stat == "cosine":
        return _mean((_unit(reference) * _unit(own)).sum(axis=1))
    least = max(LEAST_SAMPLES, k + 2 if stat == "recall" else 0)
    if len(pooled) < least:
        raise AnomalyError(
            f"{len(pooled)} samples have no order of neighbours to keep: {least} or more (data.num_samples)"
        )
    theirs, ours = _cosines(reference), _cosines(own)
    if not (np.ptp(theirs, axis=1) > 0).all():
        raise AnomalyError("in the reference a sample is equally near to all others, so there is no order to keep")
    pairs = zip(theirs, ours, strict=True)
    kept = [_rank_correlation(*pair) if stat == "order" else _recall(*pair, k) for pair in pairs]
    return _mean(np.array(kept))


def _mean(values: Floats) -> Estimate:
    found = mean_by_window(values, np.arange(len(values), dtype=np.int64))
    # The comparison is false of NaN, which stays.
    return Estimate(found.value, found.low, 1.0 if found.high > 1 else found.high, found.count)


def _unit(rows: Floats) -> Floats:
    """Return rows of length 1; zeros stay."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units: Floats = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return units


def _cosines(rows: Floats) -> Floats:
    """Return the cosine of each sample to each other one, [n, n − 1]; of [n, C]."""
    units, count = _unit(rows), len(rows)
    # Rounded, so that equal cosines stay equal whatever the order of their sums.
    every: Floats = np.matmul(units, units.T).round(12)
    return every[~np.eye(count, dtype=bool)].reshape(count, count - 1)


def _ranks(values: Floats) -> Floats:
    """Return the ranks of values [N], from 0, equal ones with the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts, dtype=np.float64) - (counts.astype(np.float64) + 1) / 2
    return np.take(middles, place)


def _rank_correlation(theirs: Floats, ours: Floats) -> float:
    """Return Spearman's correlation, Pearson's of the ranks; 0 where ours has no order."""
    one, other = (ranks - ranks.mean() for ranks in (_ranks(theirs), _ranks(ours)))
    scale = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / scale if scale > 0 else 0.0


def _recall(theirs: Floats, ours: Floats, k: int) -> float:
    """Return the share of the k nearest that are among the k nearest of the other's."""
    # Stable: of equal ones the first sample, in both models.
    first, second = (np.argsort(-cosines, kind="stable")[:k] for cosines in (theirs, ours))
    return float(np.isin(first, second).mean())

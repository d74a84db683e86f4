"""SiteNumbers: what a pass leaves of one tensor stream. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .statistics import SiteKey

TOP_NAMES = ("top1", "top2", "top3", "median", "min3", "min2", "min")
"""The columns of `channel_top` and `element_top`."""
MOMENT_NAMES = ("n", "mean", "m2", "m4", "absmax", "zeros", "nonfinite")
"""The columns of `moments`; m2 and m4 are the sums of powers of the deviations from the mean."""
EXTREME_NAMES = ("largest", "smallest", "low", "high")
"""What `extremes` holds: of |x|, then of x; the last two are NaN where the signs were not counted."""
ERROR_NAMES = ("signal", "error", "own", "largest")
"""The columns of `error`, of one token: Σx², Σ(x − x̂)², Σx̂², max |x − x̂|, where x is the reference's."""
STORED_NAMES = ("signal", "error", "product", "own")
"""What `stored` holds: Σw₀², Σ(w − w₀)², Σw·w₀, Σw², w₀ the file's weight and w the loaded one."""
SCORE_NAMES = ("nll", "reference_nll", "kl", "same_top")
"""The columns of `scores`, of one position: −ln of the probability of the token that came next, by the model and by the
reference; Σ p·(ln p − ln q) over the vocabulary, p the reference's; 1 where both find the same token likeliest."""
UNKNOWN = -1
"""Stands in a count of massive activations where the sample holds NaN or Inf."""
PADDING = -1.0
"""Stands in `token_max` and `error` where a token is padding; a maximum of magnitudes is never negative."""
NOT_COMPARED = -2.0
"""Stands in `error` where a reference that was kept for some tokens has none."""
NAMED = ("massive", "quantized", "features", "maps", "channel_error")
"""The fields that hold an array for each statistic of their kind, by its name."""
Merge = Literal["populations", "named populations", "named sums", "union", "largest", "extremes"]
"""How an array is merged with that of other samples: side by side, added, by name, the larger, as `EXTREME_NAMES`."""


@dataclass(frozen=True, eq=False)
class SiteNumbers:
    """The numbers of one tensor stream. A population is one call of the layer for one sample (a row of a batch).

    `sample`, `call` [P]: whose population it is. `lengths` [P]: its tokens, 0 where the site has no token axis.
    `token_max` [sum of lengths] float32: max over channels of |x|, populations one after the other; −1 marks padding.
    `peaks` [P, K]: the positions of the K largest tokens, largest first; `peak_channels` [P, K]: where; −1: none.
    `channel_top`, `element_top` [P, 7]: order statistics (`TOP_NAMES`) of the channel-wise maxima and of |x|.
    `channel_max` [C]: channel-wise maxima over all populations. `moments` [P, 7] float64: `MOMENT_NAMES`.
    `extremes` [4] float32: `EXTREME_NAMES` of all that was counted, exact whatever the width of a bin.
    `bins`, `counts`: how often each 16-bit pattern of |x| occurs (of x for `signed_`), zero counts left out.
    `channel_bins` [B], `channel_counts` [B, C] uint32: how often x falls into each bin of channels.py, bins that no
    channel has left out. `channel_extremes` [4, C] float32: `EXTREME_NAMES` of each channel, exact.
    `massive`: for each `massive_statistic` the count per population [P].
    `quantized`: for each `quantization_statistic` Σx² and Σ(x − x̂)² of each population, [P, 2] float64.
    `features`: for each `features_statistic` in how many tokens each channel reaches it, then how many tokens and
    how many NaN and Inf there are, [C + 2].
    `experts`: how many tokens of each population go to each expert of the layer, [P, E].
    `maps`: for each `map_statistic` |x| of that sample's first call, [≤ 128, ≤ 128] float32: the largest of each
    rectangle of equally many tokens and channels; 0 where all of its tokens are padding.
    `error` [sum of lengths, 4] float32: `ERROR_NAMES` of each token, `PADDING` or `NOT_COMPARED`; [P, 4] where the
    site has no token axis. `local_rows`, `local` [P, R], [P, R, 3]: the sampled tokens of each population, −1 for
    none, and their Σy², Σ(y − ŷ)², Σŷ², ŷ the layer's output on the reference's input. `channel_error`: for each
    `channel_error_statistic` Σx², Σ(x − x̂)² of each population and channel, [P, 2, C] float64.
    `scores` [sum of lengths, 4] float64: `SCORE_NAMES` of each position of the logits, NaN where there is none.
    `stored` [4] float64: `STORED_NAMES` of a weight that the files hold quantized.
    Each array says how it is merged with that of other samples (`merging`); counts are added bin by bin.
    """

    dtype: str
    shape: tuple[int, ...]
    token_axis: bool
    statistics: frozenset[str]
    sample: NDArray[np.int32] = field(metadata={"merge": "populations"})
    call: NDArray[np.int32] = field(metadata={"merge": "populations"})
    lengths: NDArray[np.int64] = field(metadata={"merge": "populations"})
    token_max: NDArray[np.float32] | None = field(default=None, metadata={"merge": "populations"})
    peaks: NDArray[np.int32] | None = field(default=None, metadata={"merge": "populations"})
    peak_channels: NDArray[np.int32] | None = field(default=None, metadata={"merge": "populations"})
    channel_top: NDArray[np.float32] | None = field(default=None, metadata={"merge": "populations"})
    channel_max: NDArray[np.float32] | None = field(default=None, metadata={"merge": "largest"})
    element_top: NDArray[np.float32] | None = field(default=None, metadata={"merge": "populations"})
    moments: NDArray[np.float64] | None = field(default=None, metadata={"merge": "populations"})
    extremes: NDArray[np.float32] | None = field(default=None, metadata={"merge": "extremes"})
    bins: NDArray[np.uint16] | None = None
    counts: NDArray[np.int64] | None = None
    signed_bins: NDArray[np.uint16] | None = None
    signed_counts: NDArray[np.int64] | None = None
    channel_bins: NDArray[np.uint16] | None = None
    channel_counts: NDArray[np.uint32] | None = None
    channel_extremes: NDArray[np.float32] | None = field(default=None, metadata={"merge": "extremes"})
    massive: Mapping[str, NDArray[np.int64]] = field(default_factory=dict, metadata={"merge": "named populations"})
    quantized: Mapping[str, NDArray[np.float64]] = field(default_factory=dict, metadata={"merge": "named populations"})
    features: Mapping[str, NDArray[np.int64]] = field(default_factory=dict, metadata={"merge": "named sums"})
    experts: NDArray[np.int64] | None = field(default=None, metadata={"merge": "populations"})
    maps: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, metadata={"merge": "union"})

    error: NDArray[np.float32] | None = field(default=None, metadata={"merge": "populations"})
    local_rows: NDArray[np.int32] | None = field(default=None, metadata={"merge": "populations"})
    local: NDArray[np.float32] | None = field(default=None, metadata={"merge": "populations"})
    channel_error: Mapping[str, NDArray[np.float64]] = field(
        default_factory=dict, metadata={"merge": "named populations"}
    )
    scores: NDArray[np.float64] | None = field(default=None, metadata={"merge": "populations"})
    stored: NDArray[np.float64] | None = None

    @property
    def populations(self) -> int:
        """How many populations there are; 0 means that the hook never fired."""
        return len(self.sample)

    @property
    def counted_exactly(self) -> bool:
        """Whether each bin of its counts is a value of its dtype, of which there are 65,536 or fewer."""
        return self.dtype in ("bfloat16", "float16")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each population begins in `token_max`, and where the last one ends: [P + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def tokens_of(self, population: int) -> NDArray[np.float32]:
        """Return the token-wise maxima of one population, [T], −1 at padding."""
        assert self.token_max is not None
        return self.token_max[self.offsets[population] : self.offsets[population + 1]]

    def error_of(self, population: int) -> NDArray[np.float32]:
        """Return `ERROR_NAMES` of the tokens of one population, [T, 4]; one row where there is no token axis."""
        assert self.error is not None
        if not self.token_axis:
            return self.error[population : population + 1]
        return self.error[self.offsets[population] : self.offsets[population + 1]]

    def moment(self, name: str) -> NDArray[np.float64]:
        """Return one column of `moments`, [P]."""
        assert self.moments is not None
        return self.moments[:, MOMENT_NAMES.index(name)]

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Split into named arrays and a JSON header; `from_arrays` is the way back."""
        arrays = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)}
        arrays |= {f"{kind}/{name}": array for kind in NAMED for name, array in getattr(self, kind).items()}
        header = {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "token_axis": self.token_axis,
            "statistics": sorted(self.statistics),
        }
        return arrays, header

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> SiteNumbers:
        """Join what `to_arrays` split."""
        own: dict[str, Any] = {kind: {} for kind in NAMED}
        for name, array in arrays.items():
            kind, slash, rest = name.partition("/")
            (own[kind] if slash else own)[rest if slash else name] = array
        return cls(
            dtype=header["dtype"],
            shape=tuple(header["shape"]),
            token_axis=header["token_axis"],
            statistics=frozenset(header["statistics"]),
            **own,
        )


def lower_median(values: NDArray[Any]) -> float:
    """Return the median of a 1-D array, the lower one for an even count, as `torch.median` does; NaN for none."""
    if not values.size:
        return float("nan")
    middle = (values.size - 1) // 2
    return float(np.partition(values, middle)[middle])


def order_statistics(values: NDArray[Any], names: Sequence[str]) -> dict[str, float]:
    """Return some of `TOP_NAMES` of a 1-D array by one partition; NaN for a missing rank, or beside NaN and Inf."""
    if not np.isfinite(values).all():
        return dict.fromkeys(names, float("nan"))
    size = values.size
    ranks = dict(zip(TOP_NAMES, (size - 1, size - 2, size - 3, (size - 1) // 2, 2, 1, 0), strict=True))
    known = {name: ranks[name] for name in names if 0 <= ranks[name] < size}
    ordered = np.partition(values, sorted(set(known.values()))) if known else values
    return {name: float(ordered[known[name]]) if name in known else float("nan") for name in names}


def renumbered(numbers: Mapping[SiteKey, SiteNumbers], first: int) -> dict[SiteKey, SiteNumbers]:
    """Return the numbers with their samples counted from 0, where the first one here is `first`."""
    if not first:
        return dict(numbers)
    own = {id(n): n if site[1] == "weight" else replace(n, sample=n.sample - first) for site, n in numbers.items()}
    return {site: own[id(n)] for site, n in numbers.items()}

"""SiteNumbers: the statistics of one tensor stream. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .requests import SiteKey
from .statistics import LAYOUTS, Statistic

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
"""Stands in `error` at a token that a reference file has no row of."""
POPULATIONS = ("sample", "call", "lengths")
"""The arrays that say of which sample and call each population is, and how long it is; every site has them."""
D = TypeVar("D", bound=np.generic)


class KeptArray(Generic[D]):
    """An attribute of `SiteNumbers`: one of its arrays by name; a KeyError where the pass didn't keep it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, numbers: SiteNumbers, owner: type) -> NDArray[D]:
        return numbers.arrays[self.name]


@dataclass(frozen=True, eq=False)
class SiteNumbers:
    """The numbers of one tensor stream. A population is one call of the layer for one sample (a row of a batch).

    `sample`, `call` [P]: whose population it is. `lengths` [P]: its tokens, 0 where the site has no token axis.
    `statistics`: what the site has. `arrays`: what they keep, by the names that the classes of `statistics` give and
    explain; most are attributes as well.
    """

    dtype: str
    shape: tuple[int, ...]
    token_axis: bool
    statistics: frozenset[Statistic]
    sample: NDArray[np.int32]
    call: NDArray[np.int32]
    lengths: NDArray[np.int64]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    token_max = KeptArray[np.float32]()
    peaks = KeptArray[np.int32]()
    peak_channels = KeptArray[np.int32]()
    channel_top = KeptArray[np.float32]()
    channel_max = KeptArray[np.float32]()
    element_top = KeptArray[np.float32]()
    moments = KeptArray[np.float64]()
    extremes = KeptArray[np.float32]()
    bins = KeptArray[np.uint16]()
    counts = KeptArray[np.int64]()
    signed_bins = KeptArray[np.uint16]()
    signed_counts = KeptArray[np.int64]()
    channel_bins = KeptArray[np.uint16]()
    channel_counts = KeptArray[np.uint32]()
    channel_extremes = KeptArray[np.float32]()
    experts = KeptArray[np.int64]()
    error = KeptArray[np.float32]()
    local_rows = KeptArray[np.int32]()
    local = KeptArray[np.float32]()
    scores = KeptArray[np.float64]()
    stored = KeptArray[np.float64]()

    def __contains__(self, array: str) -> bool:
        """Say whether the pass kept an array."""
        return array in self.arrays

    @property
    def populations(self) -> int:
        """How many populations there are; 0 means that the hook never fired."""
        return len(self.sample)

    @property
    def counted_exactly(self) -> bool:
        """Whether each bin of the counts is exactly one value: the dtype has 16 bits or fewer."""
        return self.dtype in ("bfloat16", "float16")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each population begins in `token_max`, and where the last one ends: [P + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def tokens_of(self, population: int) -> NDArray[np.float32]:
        """Return the token-wise maxima of one population, [T], −1 at padding."""
        return self.token_max[self.offsets[population] : self.offsets[population + 1]]

    def error_of(self, population: int) -> NDArray[np.float32]:
        """Return `ERROR_NAMES` of the tokens of one population, [T, 4]; one row where there is no token axis."""
        if not self.token_axis:
            return self.error[population : population + 1]
        return self.error[self.offsets[population] : self.offsets[population + 1]]

    def moment(self, name: str) -> NDArray[np.float64]:
        """Return one column of `moments`, [P]."""
        return self.moments[:, MOMENT_NAMES.index(name)]

    def having(self, statistics: Iterable[Statistic], arrays: Mapping[str, NDArray[Any]]) -> SiteNumbers:
        """Return a copy with more statistics and their arrays."""
        return replace(self, statistics=self.statistics | {*statistics}, arrays={**self.arrays, **arrays})

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Split into named arrays and a JSON header; `from_arrays` is the way back."""
        header = {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "token_axis": self.token_axis,
            "statistics": sorted(map(str, self.statistics)),
        }
        return {**{name: getattr(self, name) for name in POPULATIONS}, **self.arrays}, header

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> SiteNumbers:
        """Join what `to_arrays` split.

        Raises:
            ValueError: there is an array that no statistic keeps.
        """
        kept = {name: array for name, array in arrays.items() if name not in POPULATIONS}
        if unknown := sorted({name.partition("/")[0] for name in kept} - {*LAYOUTS}):
            raise ValueError(f"no statistic keeps an array '{unknown[0]}'")
        return cls(
            dtype=header["dtype"],
            shape=tuple(header["shape"]),
            token_axis=header["token_axis"],
            statistics=frozenset(map(Statistic.parse, header["statistics"])),
            **{name: arrays[name] for name in POPULATIONS},
            arrays=kept,
        )


def lower_median(values: NDArray[Any]) -> float:
    """Return the median of a 1-D array, the lower one for an even count, as `torch.median` does; NaN for none."""
    if not values.size:
        return float("nan")
    middle = (values.size - 1) // 2
    return float(np.partition(values, middle)[middle])


def order_statistics(values: NDArray[Any], names: Sequence[str]) -> dict[str, float]:
    """Return some of `TOP_NAMES` of a 1-D array by one partition; NaN for a missing rank, or if it holds NaN or Inf."""
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

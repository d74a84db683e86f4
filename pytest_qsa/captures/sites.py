"""Sites: the tensor streams of a model, and the numbers that a pass has of each. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from .arrays import MOMENT_NAMES, PER_POPULATION, PER_TOKEN, POPULATIONS, RAGGED, Array
from .statistics import LAYOUTS, Statistic

Site = Literal["input", "output", "key", "value", "latent", "rope_key", "weight", "logits"]
SITES: tuple[Site, ...] = get_args(Site)
SiteKey = tuple[str, Site]
"""A layer and its site."""
LayerSite = Literal["input", "output", "key", "value", "latent", "rope_key", "weight"]
LOGITS: Site = "logits"
"""The site of the whole model's output, the scores of every next token. All other sites belong to a layer."""
GENERATION = "generation"
"""What stands in the place of a layer, at the site `logits`, for the numbers of answers: a population is a prompt."""
KEY_AND_VALUE: tuple[Site, Site] = ("key", "value")
"""What a layer of attention puts into the KV cache, [sample, token, head × channel]."""
LATENT_AND_ROPE_KEY: tuple[Site, Site] = ("latent", "rope_key")
"""What one of multi-head latent attention (MLA) puts there: a tensor for keys and values, and a key with positions."""
CACHE_SITES: frozenset[Site] = frozenset({*KEY_AND_VALUE, *LATENT_AND_ROPE_KEY})
"""The sites of the layers that fill a KV cache."""


D = TypeVar("D", bound=np.generic)


class KeptArray(Generic[D]):
    """An attribute of `SiteNumbers`: one of its arrays by name; a KeyError where the pass didn't keep it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, numbers: SiteNumbers, owner: type) -> NDArray[D]:
        return numbers.arrays[self.name]


# eq=False: the generated `==` would compare arrays, which have no single truth value.
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
    arrays: Mapping[str, Array] = field(default_factory=dict)

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

    def only(self, populations: NDArray[np.bool_]) -> SiteNumbers:
        """Return it with some of the populations, [P] booleans; what is pooled over all of them stays as it is."""
        if populations.all():
            return self
        tokens = np.repeat(populations, self.lengths)
        masks = {
            PER_TOKEN: tokens if self.token_axis else populations,
            PER_POPULATION: populations,
            RAGGED: populations,
        }
        layouts = {name: LAYOUTS[name.partition("/")[0]] for name in self.arrays}
        arrays = {n: a[masks[layouts[n]]] if layouts[n] in masks else a for n, a in self.arrays.items()}
        placed = {name: getattr(self, name)[populations] for name in POPULATIONS}
        return replace(self, **placed, arrays=arrays)

    @property
    def only_zeros(self) -> bool:
        """Whether every element that was seen is 0; False where nothing that was kept says so."""
        if "moments" in self:
            return not (self.moment("absmax").any() or self.moment("nonfinite").any())
        names = ("extremes", "channel_extremes", "element_top", "channel_max", "token_max")
        values = next((self.arrays[name] for name in names if name in self), None)
        # Padding is −1 in `token_max`; where signs aren't counted, the extremes are NaN after the first two.
        return values is not None and bool(values.size) and not (np.isnan(values[:2]).any() or np.any(values > 0))

    def having(self, statistics: Iterable[Statistic], arrays: Mapping[str, Array]) -> SiteNumbers:
        """Return a copy with more statistics and their arrays."""
        return replace(self, statistics=self.statistics | {*statistics}, arrays={**self.arrays, **arrays})

    def to_arrays(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Split into named arrays and a JSON header; `from_arrays` is the way back."""
        header = {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "token_axis": self.token_axis,
            # Sorted, because equal captures have equal bytes.
            "statistics": sorted(map(str, self.statistics)),
        }
        return {**{name: getattr(self, name) for name in POPULATIONS}, **self.arrays}, header

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], header: Mapping[str, Any]) -> SiteNumbers:
        """Join what `to_arrays` split.

        Raises:
            ValueError: there is an array that no statistic keeps.
        """
        kept = {name: array for name, array in arrays.items() if name not in POPULATIONS}
        # Behind a slash are the parameters of the statistic.
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


def renumbered(numbers: Mapping[SiteKey, SiteNumbers], first: int) -> dict[SiteKey, SiteNumbers]:
    """Return the numbers with their samples counted from 0, where the first one here is `first`."""
    if not first:
        return dict(numbers)
    # Sites of one tensor go on sharing their numbers; a weight has no samples.
    own = {id(n): n if site[1] == "weight" else replace(n, sample=n.sample - first) for site, n in numbers.items()}
    return {site: own[id(n)] for site, n in numbers.items()}

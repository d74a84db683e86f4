"""What one observer has to keep, worked out once from the names of its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ...captures import (
    CHANNEL_COUNTS,
    CHANNELS,
    COUNTS,
    ELEMENTS,
    EXPERTS,
    MOMENTS,
    SIGNED_COUNTS,
    TOKENS,
    FeatureCounts,
    HeatMap,
    Massive,
    QuantizationPowers,
    Statistic,
)
from .quantizing import Quantizer

PEAKS_MIN = 16
PEAKS_SHARE = 32
MAP_SIZE = 128
"""The most rows and columns that a map keeps."""


@dataclass(frozen=True)
class Wants:
    """The statistics as flags. `ordered`: order statistics of the elements are needed; `counted`: so are counts."""

    tokens: bool
    channels: bool
    elements: bool
    moments: bool
    counts: bool
    signed: bool
    experts: bool
    channel_counts: bool
    massive: Mapping[str, tuple[float, float]]
    quantizers: Mapping[str, Quantizer]
    features: Mapping[str, float]
    maps: Mapping[int, str]

    @classmethod
    def of(cls, statistics: frozenset[Statistic]) -> Wants:
        """Read the flags."""
        ordered = sorted(statistics)
        return cls(
            tokens=TOKENS in statistics,
            channels=CHANNELS in statistics,
            elements=ELEMENTS in statistics,
            moments=MOMENTS in statistics,
            counts=COUNTS in statistics,
            signed=SIGNED_COUNTS in statistics,
            experts=EXPERTS in statistics,
            channel_counts=CHANNEL_COUNTS in statistics,
            massive={s.key: (s.absolute, s.ratio) for s in ordered if isinstance(s, Massive)},
            quantizers={s.key: Quantizer.of(s) for s in ordered if isinstance(s, QuantizationPowers)},
            features={s.key: s.absolute for s in ordered if isinstance(s, FeatureCounts)},
            maps={s.sample: s.key for s in ordered if isinstance(s, HeatMap)},
        )

    @cached_property
    def ordered(self) -> bool:
        """Whether the order statistics of a row's elements are needed."""
        return self.elements or bool(self.massive)

    @cached_property
    def on_request(self) -> bool:
        """Whether there is something that only a site that asks for it has."""
        return self.channel_counts or bool(self.quantizers) or bool(self.features)

    @cached_property
    def counted(self) -> bool:
        """Whether a row's patterns have to be counted."""
        return self.counts or self.signed or self.ordered


def peak_count(counted: int, length: int) -> int:
    """Return how many of the largest tokens keep their channel: max(16, T / 32), of those that count."""
    return min(counted, max(PEAKS_MIN, length // PEAKS_SHARE))


def ranks_of(count: int) -> list[int]:
    """Return the ascending ranks of top1, top2, top3, the lower median, min3, min2, min among `count` values."""
    return [count - 1, count - 2, count - 3, (count - 1) // 2, 2, 1, 0]

"""Attention sinks: the few tokens whose norm is hundreds of times the others', whatever the token is.

They are found by their numbers: a token above 64 × the median at the outputs of at least a quarter of the blocks, at
the same channel (reference: arXiv 2402.17762, 2508.04257; the rule is this project's own).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .arrays import lower_median
from .sites import SiteNumbers

RATIO = 64.0
SHARE_OF_BLOCKS = 0.25


@dataclass(frozen=True)
class PositionRange:
    """Some tokens of each sample: of those that are no padding, counted from 0, those from `start` up to `end`.

    `end`: the first that no longer counts; None for the sample's end. `sinks`: whether attention sinks in it count.
    """

    start: int
    end: int | None = None
    sinks: bool = True

    def __str__(self) -> str:
        return f"range:{self.start}:{'' if self.end is None else self.end}{'' if self.sinks else ':no_sink'}"

    @classmethod
    def parse(cls, positions: str) -> PositionRange | None:
        """Read the canonical form of positions; None of any other than a range."""
        found = re.fullmatch(r"range:(\d+):(\d*)(:no_sink)?", positions)
        return found and cls(int(found[1]), int(found[2]) if found[2] else None, found[3] is None)

    def among(self, counting: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return those of the tokens that count, [T] booleans, that lie in it, sinks included."""
        named = np.zeros_like(counting)
        named[np.flatnonzero(counting)[self.start : self.end]] = True
        return named

    @property
    def text(self) -> str:
        """It in words, for a report."""
        end = "on" if self.end is None else f"to {self.end:,}"
        return f"positions from {self.start:,} {end}{'' if self.sinks else ', without the sinks'}"


def names_sinks(positions: str) -> bool:
    """Say whether positions can be told only where the sinks are known."""
    return positions in ("sink", "no_sink") or positions.endswith(":no_sink")


@dataclass(frozen=True)
class Sink:
    """One sink: its position in its sample, its channel, the blocks that show it, its largest multiple of the median.

    `trunk`: the list of blocks that it was found in, such as `model.layers`; an encoder and a decoder have one each.
    """

    trunk: str
    sample: int
    position: int
    channel: int
    layers: tuple[str, ...]
    ratio: float


@dataclass(frozen=True)
class Sinks:
    """All sinks of a capture. `searched`: the capture has block outputs, without which nothing can be found."""

    found: tuple[Sink, ...]
    searched: bool
    trunks: tuple[str, ...] = ()

    def mask(self, sample: int, length: int, layer: str) -> NDArray[np.bool_]:
        """Return [length] booleans, true at the sinks of one sample in the trunk that the layer belongs to."""
        mask = np.zeros(length, dtype=bool)
        trunk = self._trunk(layer)
        mask[
            [s.position for s in self.found if s.sample == sample and s.position < length and trunk in (None, s.trunk)]
        ] = True
        return mask

    def among(self, positions: str, counting: NDArray[np.bool_], sample: int, layer: str) -> NDArray[np.bool_]:
        """Return those of a sample's tokens that count, [T] booleans, that `positions` names, in canonical form."""
        if (span := PositionRange.parse(positions)) is not None:
            named = span.among(counting)
            return named if span.sinks else named & ~self.mask(sample, len(named), layer)
        named = counting.copy()
        if positions.startswith("skip_first:"):
            # The first ones that count: padding on the left of a sample is no token to skip.
            named[np.flatnonzero(named)[: int(positions.partition(":")[2])]] = False
        elif positions != "all":
            sinks = self.mask(sample, len(named), layer)
            named &= sinks if positions == "sink" else ~sinks
        return named

    def _trunk(self, layer: str) -> str | None:
        """Return the trunk that a layer belongs to; None, which stands for all of them, where it belongs to none."""
        beside = (trunk for trunk in self.trunks if layer.startswith(trunk.rpartition(".")[0] + "."))
        # Trunks may be nested in one another, and the innermost has the longest name.
        return max(beside, key=len, default=None)

    def summary(self) -> str:
        """Say in one line how many there are and where."""
        if not self.searched:
            return "not looked for"
        if not self.found:
            return "none"
        positions = Counter(sink.position for sink in self.found)
        channels = Counter(sink.channel for sink in self.found)
        samples = len({sink.sample for sink in self.found})
        top = max(self.found, key=lambda sink: sink.ratio)
        return (
            f"{len(self.found)} in {samples} samples, mostly at position {positions.most_common(1)[0][0]}, "
            f"channel {channels.most_common(1)[0][0]}, {top.layers[0]} to {top.layers[-1]}, "
            f"up to {top.ratio:.0f} × the median"
        )


def find_sinks(blocks: Mapping[str, SiteNumbers]) -> Sinks:
    """Find the sinks in the block outputs of one capture; a block without token maxima is left out of the count."""
    usable = {layer: numbers for layer, numbers in blocks.items() if "peaks" in numbers}
    trunks: dict[str, dict[str, SiteNumbers]] = defaultdict(dict)
    for layer, numbers in usable.items():
        trunks[layer.rpartition(".")[0]][layer] = numbers
    found = [sink for trunk, members in trunks.items() for sink in _find_in_trunk(trunk, members)]
    return Sinks(
        tuple(sorted(found, key=lambda sink: (sink.sample, sink.position))), searched=bool(usable), trunks=tuple(trunks)
    )


def _find_in_trunk(trunk: str, usable: Mapping[str, SiteNumbers]) -> list[Sink]:
    sightings: dict[tuple[int, int, int], list[tuple[str, float]]] = defaultdict(list)
    for layer, numbers in usable.items():
        for population in range(numbers.populations):
            for position, channel, ratio in _candidates(numbers, population):
                sightings[int(numbers.sample[population]), position, channel].append((layer, ratio))
    needed = max(1.0, SHARE_OF_BLOCKS * len(usable))
    return [
        Sink(
            trunk,
            sample,
            position,
            channel,
            tuple(dict.fromkeys(layer for layer, _ in seen)),
            max(ratio for _, ratio in seen),
        )
        for (sample, position, channel), seen in sightings.items()
        # A set, because a block that is called twice for a sample counts once.
        if len({layer for layer, _ in seen}) >= needed
    ]


def _candidates(numbers: SiteNumbers, population: int) -> list[tuple[int, int, float]]:
    tokens = numbers.tokens_of(population)
    # Neither padding, which is −1, nor NaN.
    median = lower_median(tokens[tokens >= 0])
    if not median > 0:
        return []
    pairs = zip(numbers.peaks[population].tolist(), numbers.peak_channels[population].tolist(), strict=True)
    return [
        (position, channel, float(tokens[position]) / median)
        for position, channel in pairs
        if position >= 0 and tokens[position] > RATIO * median
    ]

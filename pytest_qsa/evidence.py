"""The tokens behind a number: where they are, what they say, how far they stand out. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .assertions import TokenEvidence, Verdict
from .captures import Capture
from .metrics import View
from .numbers import SiteNumbers

NEIGHBOURS = 6


def token_evidence(capture: Capture, layers: Sequence[str], verdict: Verdict, *, most: int = 5) -> list[TokenEvidence]:
    """Return the most outlying tokens of the layers, largest multiple of the median first, of those that count.

    Where the metric has a threshold, those above it; the one nearest to it where there are none.
    """
    site, positions = verdict.query["site"], verdict.positions or "all"
    found: list[TokenEvidence] = []
    for layer in layers:
        numbers = capture.sites.get((layer, site))
        if numbers is not None and numbers.token_max is not None and site != "weight":
            found += _of_layer(capture, layer, View(numbers, site, positions, capture.sinks, layer), most)
    found = sorted(found, key=lambda token: -token.ratio)[:most]
    threshold = verdict.query["parameters"].get("threshold", 0.0)
    return [token for token in found if token.ratio > threshold] or found[:1]


def _of_layer(capture: Capture, layer: str, view: View, most: int) -> list[TokenEvidence]:
    numbers = view.numbers
    candidates: list[tuple[float, int, int]] = []
    for population in range(numbers.populations):
        ratios = view.ratios(population)
        top = np.argsort(-ratios, kind="stable")[:most]
        candidates += [(float(ratios[i]), population, int(i)) for i in top if np.isfinite(ratios[i])]
    largest = sorted(candidates, key=lambda item: -item[0])[:most]
    return [_token(capture, layer, numbers, ratio, population, position) for ratio, population, position in largest]


def _token(
    capture: Capture, layer: str, numbers: SiteNumbers, ratio: float, population: int, position: int
) -> TokenEvidence:
    sample = int(numbers.sample[population])
    tokens = numbers.tokens_of(population)
    before, text, after = context(capture, sample, position)
    sinks = capture.sinks.mask(sample, len(tokens), layer)
    return TokenEvidence(
        layer, sample, position, text, before, after, float(tokens[position]), ratio,
        channel_of(numbers, population, position), bool(sinks[position]), int(numbers.call[population]),
    )  # fmt: skip


def channel_of(numbers: SiteNumbers, population: int, position: int) -> int:
    """Return the channel of a token's maximum; −1 where the token was not among the largest of its sample."""
    if numbers.peaks is None or numbers.peak_channels is None:
        return -1
    at = np.flatnonzero(numbers.peaks[population] == position)
    return int(numbers.peak_channels[population, at[0]]) if at.size else -1


def context(capture: Capture, sample: int, position: int) -> tuple[str, str, str]:
    """Return the text before a token, of the token, and after it; its id where the texts were not kept."""
    if sample >= len(capture.tokens) or position >= len(capture.tokens[sample]):
        return "", "", ""
    ids = capture.tokens[sample].tolist()

    def text(tokens: list[int]) -> str:
        return "".join(capture.pieces.get(token, f"⟨{token}⟩") for token in tokens)

    return (
        text(ids[max(0, position - NEIGHBOURS) : position]),
        text(ids[position : position + 1]),
        text(ids[position + 1 : position + 1 + NEIGHBOURS]),
    )

"""The tokens behind a value: their location, their text, and how far they stand out. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..captures import Capture, Sinks, SiteNumbers, lower_median
from ..metrics import LARGEST, METRICS, NOISE, SIGNAL, View, compared_tokens, local_tokens
from .verdict import TokenEvidence, Verdict

NEIGHBOURS = 6
"""The tokens of context before and after a token."""


def token_evidence(capture: Capture, layers: Sequence[str], verdict: Verdict, *, most: int = 5) -> list[TokenEvidence]:
    """Return the tokens of the layers that stand out most, by their multiple of the median, the largest first.

    For a metric against the reference these are the tokens with the largest error, where the pass kept the error of
    each token. Where the metric has a threshold, only tokens above it are returned, else the one nearest to it.
    """
    site, positions = verdict.query["site"], verdict.positions or "all"
    metric, sinks = METRICS[verdict.query["metric"]], sinks_behind(capture, verdict.query)
    found: list[TokenEvidence] = []
    for layer in layers:
        numbers = capture.sites.get((layer, site))
        if numbers is None or site == "weight":
            continue
        view = View(numbers, site, positions, sinks, layer)
        errors = _of_errors(capture, view, verdict.query, most) if metric.against and not metric.tokenwise else []
        if not errors and "token_max" in numbers:
            errors = _of_magnitudes(capture, view, most)
        found += errors
    found = sorted(found, key=lambda token: -token.ratio)[:most]
    threshold = verdict.query["parameters"].get("threshold", 0.0)
    return [token for token in found if token.ratio > threshold] or found[:1]


def sinks_behind(capture: Capture, query: Mapping[str, Any]) -> Sinks:
    """Return the sinks that `positions` refers to: the reference's for a metric against it, else the model's."""
    metric = METRICS.get(query.get("metric", ""))  # an error may have come before there was a query
    against = metric is not None and metric.against
    return capture.reference.sinks if against and capture.reference is not None else capture.sinks


def _of_magnitudes(capture: Capture, view: View, most: int) -> list[TokenEvidence]:
    numbers = view.numbers
    candidates: list[tuple[float, int, int]] = []
    for population in range(numbers.populations):
        ratios = view.ratios(population)
        top = np.argsort(-ratios, kind="stable")[:most]
        candidates += [(float(ratios[i]), population, int(i)) for i in top if np.isfinite(ratios[i])]
    largest = sorted(candidates, key=lambda item: -item[0])[:most]
    found = []
    for ratio, population, position in largest:
        magnitude = float(numbers.tokens_of(population)[position])
        found.append(_token(capture, view, population, position, magnitude=magnitude, ratio=ratio))
    return found


def _of_errors(capture: Capture, view: View, query: Mapping[str, Any], most: int) -> list[TokenEvidence]:
    """Return the tokens with the largest error; none where the pass kept no errors of tokens, or all are 0."""
    numbers, local = view.numbers, query["metric"] == "local_sqnr"
    if ("local" if local else "error") not in numbers or not numbers.token_axis:
        return []
    kept = [(local_tokens if local else compared_tokens)(view, each) for each in range(numbers.populations)]
    populations = np.repeat(np.arange(len(kept)), [len(at) for at, _ in kept])
    positions = np.concatenate([at for at, _ in kept])
    powers = np.concatenate([rows for _, rows in kept])
    of, sizes = _sizes(query, powers)
    sizes = np.where(np.isfinite(sizes), sizes, 0.0)
    whole, apart = float(powers[:, NOISE].sum()), sizes[sizes > 0]
    if not apart.size or not np.isfinite(whole):
        return []
    median = lower_median(apart)
    largest = [i for i in np.argsort(-sizes, kind="stable")[:most].tolist() if sizes[i] > 0]
    found = []
    for i in largest:
        population, position = int(populations[i]), int(positions[i])
        token = _token(capture, view, population, position, magnitude=float(sizes[i]), ratio=float(sizes[i]) / median)
        found.append(replace(token, of=of, share=float(powers[i, NOISE]) / whole, channel=-1))
    return found


def _sizes(query: Mapping[str, Any], powers: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
    """Return the quantity that ranks the tokens of a metric, in words, and its values: [N] of energies [N, 3 or 4]."""
    if query["metric"] == "max_abs_diff":
        return "max |x − x̂|", powers[:, LARGEST]
    error = np.sqrt(powers[:, NOISE])
    if query["parameters"].get("by") != "token":
        return "‖x − x̂‖", error
    with np.errstate(divide="ignore", invalid="ignore"):
        return "‖x − x̂‖ / ‖x‖", error / np.sqrt(powers[:, SIGNAL])


def _token(
    capture: Capture, view: View, population: int, position: int, *, magnitude: float, ratio: float
) -> TokenEvidence:
    numbers = view.numbers
    sample = int(numbers.sample[population])
    before, text, after = context(capture, sample, position)
    sinks = view.sinks.mask(sample, int(numbers.lengths[population]), view.layer)
    return TokenEvidence(
        view.layer, sample, position, text, before, after, magnitude, ratio,
        channel_of(numbers, population, position), bool(sinks[position]), int(numbers.call[population]),
    )  # fmt: skip


def channel_of(numbers: SiteNumbers, population: int, position: int) -> int:
    """Return the channel of a token's maximum; −1 where the pass didn't keep it, as for all but the largest tokens."""
    if "peaks" not in numbers:
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

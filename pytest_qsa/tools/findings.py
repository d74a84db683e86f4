"""What an analysis found, in sentences: the largest activation, sinks, outlier tokens, layers least fit for 8 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from .. import report
from ..captures import Capture, QuantizationPowers, SiteNumbers, exactly
from ..common import counted, number, size_text
from ..suite import Visualization

FIT_FOR: Mapping[Literal["int8", "fp8_e4m3"], str] = {"int8": "int8", "fp8_e4m3": "fp8 (E4M3)"}
"""The formats that layers' inputs are tried in, each with a scale a token, and how they are called."""
LEAST_FIT = 3
"""How many of the layers that lose most are named."""


def fitness_needs() -> frozenset[QuantizationPowers]:
    """Return the statistics of the inputs of layers that say how fit they are for 8 bits."""
    return frozenset(QuantizationPowers(scheme, "token", 128) for scheme in FIT_FOR)


def findings_of(capture: Capture, visualization: Visualization) -> list[str]:
    """Return what the pictures of an analysis show, a sentence each, the largest activation first."""
    sinks = [f"Attention sinks: {capture.sinks.summary()}."] if capture.sinks.searched else []
    return [*_largest(capture), *sinks, *_outliers(capture, visualization), *_least_fit(capture)]


def _largest(capture: Capture) -> Iterator[str]:
    sites = {key: numbers for key, numbers in capture.sites.items() if key[1] != "weight" and "peaks" in numbers}
    tops = {key: _top(numbers) for key, numbers in sites.items()}
    if not any(math.isfinite(value) for value, _ in tops.values()):
        return
    (layer, site), (value, population) = max(tops.items(), key=lambda each: each[1][0])
    numbers = sites[layer, site]
    position, channel = int(numbers.peaks[population][0]), int(numbers.peak_channels[population][0])
    where = f"sample {int(numbers.sample[population])}, position {position}, channel {channel}"
    yield f"The largest activation is {size_text(value)}, at the {site} of {layer} ({where})."


def _top(numbers: SiteNumbers) -> tuple[float, int]:
    """Return the largest |x| of a site, and in which of its populations it is."""
    tops = [numbers.tokens_of(population).max(initial=-math.inf) for population in range(numbers.populations)]
    finite = np.where(np.isfinite(tops), tops, -math.inf)
    best = int(finite.argmax()) if len(finite) else 0
    return (float(finite[best]), best) if len(finite) else (-math.inf, 0)


def _outliers(capture: Capture, visualization: Visualization) -> Iterator[str]:
    layers = [layer for (layer, site), numbers in capture.sites.items() if site == "output" and "token_max" in numbers]
    blocks = [layer for layer in layers if layer in capture.blocks] or layers
    if not blocks:
        return
    threshold = visualization.outlier.threshold
    outliers = report.outliers_of(capture, blocks, "output", threshold, "all")
    count, sinks = len(outliers.layer), int(outliers.sink.sum())
    tokens = {*zip(outliers.sample[~outliers.sink].tolist(), outliers.position[~outliers.sink].tolist(), strict=True)}
    if not count:
        yield f"No token is above {threshold:g} × the median at the output of any block."
    elif not tokens:
        yield f"All {count} outlier tokens above {threshold:g} × the median at the blocks are attention sinks."
    else:
        first = outliers.layers[int(outliers.layer[~outliers.sink].min())]
        yield (
            f"Beside {counted(sinks, 'sink')}, {counted(count - sinks, 'outlier token')} above {threshold:g} × the "
            f"median at the blocks, of {counted(len(tokens), 'token')} of the data; the first at {first}."
        )


def _least_fit(capture: Capture) -> Iterator[str]:
    for scheme, name in FIT_FOR.items():
        key = QuantizationPowers(scheme, "token", 128).key
        layers = [layer for (layer, site), numbers in capture.sites.items() if site == "input" and key in numbers]
        if len(layers) < 2:
            continue
        series = capture.select(exactly(layers), "input").quantization_sqnr(scheme=scheme, by="token")
        order = np.argsort(np.nan_to_num(series.values, nan=-math.inf), kind="stable")[:LEAST_FIT].tolist()
        worst = ", ".join(f"{series.layers[index]} {number(float(series.values[index]))} dB" for index in order)
        yield f"Least fit for {name}, by the input's SQNR with a scale a token: {worst}."

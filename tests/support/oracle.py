"""Every metric of reference/metrics.md from raw activations, in numpy float64. Knows nothing of the package.

A population is one call of a layer for one sample: an array [T, C] without its padding, or [n] without a token axis.
"""

from __future__ import annotations

import numpy as np


def lower_median(values):
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    return ordered[(len(ordered) - 1) // 2]


def token_maxima(x):
    return np.abs(np.asarray(x, dtype=np.float64)).max(axis=1)


def fold(values, how):
    values = np.asarray(values, dtype=np.float64)
    return {"max": np.max, "mean": np.mean, "sum": np.sum, "p95": lambda v: np.percentile(v, 95)}[how](values)


# One number for each population.


def outlier_tokens(x, threshold=64.0):
    maxima = token_maxima(x)
    return np.sum(maxima / lower_median(maxima) > threshold)


def outlier_ratio(x):
    maxima = token_maxima(x)
    return maxima.max() / lower_median(maxima)


def magnitude(x, stat="top1", reduce_dim=-1):
    magnitudes = np.abs(np.asarray(x, dtype=np.float64))
    if reduce_dim is not None:
        magnitudes = magnitudes.max(axis={-1: 1, -2: 0}[reduce_dim])
    ordered = np.sort(magnitudes.ravel())
    if stat == "median":
        return lower_median(ordered)
    return ordered[{"top1": -1, "top2": -2, "top3": -3, "min": 0, "min2": 1, "min3": 2}[stat]]


def massive_activations(x, abs=100.0, ratio=1000.0, median=None):
    magnitudes = np.abs(np.asarray(x, dtype=np.float64))
    median = lower_median(magnitudes) if median is None else median
    return np.sum((magnitudes > abs) & (magnitudes >= ratio * median))


def kurtosis(x):
    x = np.asarray(x, dtype=np.float64)
    deviations = x - x.mean()
    return np.mean(deviations**4) / np.mean(deviations**2) ** 2


def nonfinite(x):
    return np.sum(~np.isfinite(np.asarray(x, dtype=np.float64)))


# One number for all populations of a layer.


def pooled(populations):
    return np.concatenate([np.asarray(x, dtype=np.float64).ravel() for x in populations])


def absmax(populations):
    return np.abs(pooled(populations)).max()


def rms(populations):
    return np.sqrt(np.mean(pooled(populations) ** 2))


def mean(populations):
    return pooled(populations).mean()


def std(populations):
    return pooled(populations).std()


def crest_factor(populations):
    return absmax(populations) / rms(populations)


def quantile(populations, q, signed=False):
    x = pooled(populations)
    return np.quantile(x if signed else np.abs(x), q)


def channel_band(populations, stat="p99", across="max", signed=False):
    x = np.concatenate([np.asarray(rows, dtype=np.float64) for rows in populations])
    q = {"min": 0.0, "max": 100.0}.get(stat)
    band = np.percentile(x if signed else np.abs(x), float(stat.removeprefix("p")) if q is None else q, axis=0)
    return lower_median(band) if across == "median" else {"max": np.max, "min": np.min, "mean": np.mean}[across](band)


def zero_fraction(populations):
    return np.mean(pooled(populations) == 0)


def headroom(populations, dtype="float16"):
    largest = {"float16": 65504.0, "bfloat16": 2.0**127 * (2 - 2**-7), "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
    return absmax(populations) / largest[dtype]


PER_POPULATION = {
    "outlier_tokens": outlier_tokens,
    "outlier_ratio": outlier_ratio,
    "magnitude": magnitude,
    "massive_activations": massive_activations,
    "kurtosis": kurtosis,
    "nonfinite": nonfinite,
}
POOLED = {
    "absmax": absmax,
    "rms": rms,
    "mean": mean,
    "std": std,
    "crest_factor": crest_factor,
    "quantile": quantile,
    "channel_band": channel_band,
    "zero_fraction": zero_fraction,
    "headroom": headroom,
}
DEFAULT_REDUCE = {
    "outlier_tokens": "max",
    "outlier_ratio": "max",
    "magnitude": "mean",
    "massive_activations": "max",
    "kurtosis": "mean",
    "nonfinite": "sum",
}


def metric(name, populations, reduce=None, **parameters):
    """Compute any metric of one layer from its populations."""
    if name in POOLED:
        return POOLED[name](populations, **parameters)
    return fold([PER_POPULATION[name](x, **parameters) for x in populations], reduce or DEFAULT_REDUCE[name])

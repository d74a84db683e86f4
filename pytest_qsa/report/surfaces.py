"""Heat maps as data for the page's turning surface: a coarse grid of the largest |x|, in few digits. numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 48
"""The most points along either side: 48 × 48 turn smoothly on a phone and take 12 kB a layer."""
MOST_LAYERS = 32


def surface_data(
    maps: Mapping[str, NDArray[np.float32]], size: tuple[int, int], angle: Sequence[float]
) -> dict[str, Any]:
    """Return the data of a surface for each layer. `maps`: layer → [t, c] of |x|; `size`: what they stand for.

    `angle`: elevation and azimuth in degrees. Every peak is kept; NaN and Inf are drawn as 0 and counted as `holes`.
    Of more than 32 layers every n-th is taken, the last one always.
    """
    names = list(maps)
    step = math.ceil(len(names) / MOST_LAYERS)
    shown = sorted({*range(len(names) - 1, -1, -step)}) if names else []
    return {
        "tokens": size[0],
        "channels": size[1],
        "elevation": float(angle[0]),
        "azimuth": float(angle[1]),
        "left_out": len(names) - len(shown),
        "layers": [{"layer": names[index], **_grid(maps[names[index]])} for index in shown],
    }


def _grid(values: NDArray[np.float32]) -> dict[str, Any]:
    finite = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
    coarse = finite
    for axis in (0, 1):
        cell = math.ceil(coarse.shape[axis] / SIZE)
        coarse = np.maximum.reduceat(coarse, np.arange(0, coarse.shape[axis], cell), axis=axis)
    return {
        "rows": coarse.shape[0],
        "values": [float(f"{value:.3g}") for value in coarse.ravel()],
        "holes": int(values.size - np.isfinite(values).sum()),
    }

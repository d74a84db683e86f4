"""The page of an analysis: pictures by section and heat maps that turn, in one self-contained file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .html import PagePicture, render

SURFACE_SIDE = 48
"""The most points along either side: 48 × 48 points turn smoothly on a phone and take 12 kB for each layer."""
MOST_LAYERS = 32


@dataclass(frozen=True)
class GallerySurface:
    """A surface that a reader can turn, under one of the headings. `data`: what `surface_data` returns."""

    heading: str
    name: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Gallery:
    """All that the page shows. `facts`: label → what was run. `sections`: heading → pictures. `layers`: the model's."""

    title: str
    facts: Mapping[str, str]
    sections: Mapping[str, Sequence[PagePicture]]
    warnings: Sequence[str] = ()
    layers: Sequence[str] = ()
    files: Sequence[str] = field(default_factory=list)
    command: str = ""
    surfaces: Sequence[GallerySurface] = ()


def render_gallery(gallery: Gallery) -> str:
    """Return the page; nothing in it is fetched from anywhere, and all text is escaped."""
    return render("gallery.html.j2", gallery=gallery, session={})


def surface_data(
    maps: Mapping[str, NDArray[np.float32]], size: tuple[int, int], angle: Sequence[float]
) -> dict[str, Any]:
    """Return the data of a surface for each layer.

    `maps`: layer → [t, c] of |x|. `size`: the tokens and channels that a map stands for. `angle`: elevation and azimuth
    in degrees. Every peak is kept; NaN and Inf are drawn as 0 and counted as `holes`. Of more than 32 layers every n-th
    is taken, always with the last one.
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
        cell = math.ceil(coarse.shape[axis] / SURFACE_SIDE)
        coarse = np.maximum.reduceat(coarse, np.arange(0, coarse.shape[axis], cell), axis=axis)
    return {
        "rows": coarse.shape[0],
        "values": [float(f"{value:.3g}") for value in coarse.ravel()],  # three digits: the page stays small
        "holes": int(values.size - np.isfinite(values).sum()),
    }

"""Pictures → figures → files. A picture that can't be drawn says why, and the others are drawn all the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...captures import Capture, HeatMap, Site, channel_bands, exactly
from ...common import QsaError, write_atomically
from ...report import (
    STATS,
    box_figure,
    counted,
    encoded,
    histogram_figure,
    magnitude_panels,
    magnitude_title,
    map_figure,
    outlier_picture,
    outliers_of,
    percentile_figure,
    population,
    samples_of,
    surface_figure,
    texts_of,
)
from ...suite import Visualization
from .pictures import Picture, measured

IMAGES = ("png", "svg")
_SITES = {"input": "inputs", "output": "outputs", "weight": "weights"}


@dataclass(frozen=True)
class Drawn:
    """A picture as it came out: its title, its PNG, the files that were written; or the problem that stopped it."""

    picture: Picture
    title: str
    png: bytes = b""
    files: list[Path] = field(default_factory=list)
    problem: str = ""


def draw_picture(
    picture: Picture, capture: Capture, visualization: Visualization, folder: Path, run: str
) -> tuple[Drawn, list[str]]:
    """Draw one picture and write it in the formats asked for; also return what a reader should know of it.

    `run`: what was measured on what, for the picture's small print.

    Raises:
        OSError: the folder can't be written.
    """
    title = title_of(picture, visualization)
    try:
        kept, left_out = measured(picture, capture)
        figure = _DRAW[picture.section](kept, capture, visualization, title, run)
    except QsaError as error:
        return Drawn(picture, title, problem=str(error)), []
    formats = [form for form in IMAGES if form in visualization.output.formats]
    png = encoded(figure, "png", visualization.dpi, shaded=picture.section == "heatmap_3d")
    files = []
    for form in formats:
        path = folder / f"{picture.name}.{form}"
        write_atomically(path, png if form == "png" else encoded(figure, form, visualization.dpi))
        files.append(path)
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    return Drawn(kept, title, png, files), [f"{picture.name}: {left_out[0]}{more}"] if left_out else []


def title_of(picture: Picture, visualization: Visualization) -> str:
    """Write what a picture shows."""
    site = picture.site
    if picture.section.startswith("magnitude"):
        settings = visualization.magnitude
        return magnitude_title(site, settings.weight.reduce_dim if site == "weight" else settings.reduce_dim)
    if picture.section.startswith("outlier"):
        return f"Tokens above {visualization.outlier.threshold:g} × the median at the {_SITES[site]}"
    if picture.section == "distribution":
        return f"Distribution of the {_SITES[site]}"
    if picture.section == "percentile_range":
        what = "|x|" if visualization.percentile_range.use_abs else "x"
        return f"Percentiles over tokens of {what} at the {_SITES[site]}"
    return f"|x| of sample {visualization.heatmap_3d.sample_idx} at the {_SITES[site]}"


def _note(picture: Picture, capture: Capture, reduce: str | None, run: str) -> str:
    samples = samples_of(capture, picture.layers, picture.site)
    parts = (population(reduce, samples, None), counted(len(picture.layers), "layer"), run)
    return " · ".join(part for part in parts if part)


def _magnitude(picture: Picture, capture: Capture, visualization: Visualization, title: str, run: str) -> Figure:
    settings = visualization.magnitude
    dim = settings.weight.reduce_dim if picture.site == "weight" else settings.reduce_dim
    series = capture.select(exactly(picture.layers), picture.site).magnitudes(cast(Any, list(STATS)), reduce_dim=dim)
    note = _note(picture, capture, "" if picture.site == "weight" else "mean", run)
    return magnitude_panels(series, title, note, legend=visualization.show_legend)


def _outlier(picture: Picture, capture: Capture, visualization: Visualization, title: str, run: str) -> Figure:
    settings = visualization.outlier
    outliers = outliers_of(capture, picture.layers, picture.site, settings.threshold, "all")
    texts = texts_of(capture, outliers, decode=settings.decode_tokens) if picture.section == "outlier_token" else []
    kind = cast(Literal["layer_wise", "position", "token"], picture.section.removeprefix("outlier_"))
    note = _note(picture, capture, "sum", run) + ("" if capture.sinks.searched else " · sinks not looked for")
    return outlier_picture(
        kind, outliers, texts, title, note, most=settings.top_n, legend=visualization.show_legend
    )  # fmt: skip


def _distribution(picture: Picture, capture: Capture, visualization: Visualization, title: str, run: str) -> Figure:
    sites = {layer: capture.sites[layer, picture.site] for layer in picture.layers}
    draw = box_figure if picture.form == "boxplot" else histogram_figure
    return draw(sites, title, _note(picture, capture, None, run), legend=visualization.show_legend)


def _heatmap(picture: Picture, capture: Capture, visualization: Visualization, title: str, run: str) -> Figure:
    settings = visualization.heatmap_3d
    maps, size = maps_of(capture, picture.layers, picture.site, settings.sample_idx)
    if picture.form == "map":
        return map_figure(maps, size, title, run)
    return surface_figure(maps, size, settings.view_angle, title, run)


def maps_of(
    capture: Capture, layers: Sequence[str], site: Site, sample: int
) -> tuple[dict[str, NDArray[np.float32]], tuple[int, int]]:
    """Return the map of one sample at each layer, and how many tokens and channels the largest stands for."""
    sites = {layer: capture.sites[layer, site] for layer in layers}
    tokens, channels = max(numbers.shape for numbers in sites.values())[:2]
    return {layer: numbers.arrays[HeatMap(sample).key] for layer, numbers in sites.items()}, (tokens, channels)


def _percentile(picture: Picture, capture: Capture, visualization: Visualization, title: str, run: str) -> Figure:
    settings = visualization.percentile_range
    sites = {layer: capture.sites[layer, picture.site] for layer in picture.layers}
    bands: Mapping[str, Any] = {
        layer: channel_bands(numbers, signed=not settings.use_abs) for layer, numbers in sites.items()
    }
    note = _note(picture, capture, None, run)
    return percentile_figure(bands, title, note, style=settings.style, legend=visualization.show_legend)


_Draw = Callable[[Picture, Capture, Visualization, str, str], Figure]
_DRAW: Mapping[str, _Draw] = {
    "magnitude_input": _magnitude, "magnitude_output": _magnitude, "magnitude_weight": _magnitude,
    "outlier_layer_wise": _outlier, "outlier_position": _outlier, "outlier_token": _outlier,
    "distribution": _distribution, "heatmap_3d": _heatmap, "percentile_range": _percentile,
}  # fmt: skip

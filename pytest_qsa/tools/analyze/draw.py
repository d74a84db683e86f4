"""Planned pictures → figures. Each key of `visualization.enabled` is a kind of picture in `PICTURE_KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...captures import Capture, HeatMap, Site, SiteNumbers, channel_bands, exactly
from ...report import (
    STATS,
    box_figure,
    counted,
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
from .pictures import Picture, Section, magnitude_dim


@dataclass(frozen=True)
class Drawing:
    """A picture with what it is drawn from. `run`: the model and the data in words, for the small print."""

    picture: Picture
    capture: Capture
    settings: Visualization
    run: str

    @property
    def title(self) -> str:
        """What the picture shows."""
        return PICTURE_KINDS[self.picture.section].title(self.picture, self.settings)

    @property
    def sites(self) -> dict[str, SiteNumbers]:
        """The numbers of the picture's layers."""
        return {layer: self.capture.sites[layer, self.picture.site] for layer in self.picture.layers}

    def note(self, reduce: str | None) -> str:
        """Write the small print. `reduce`: how the samples were folded, None for pooled."""
        samples = samples_of(self.capture, self.picture.layers, self.picture.site)
        parts = (population(reduce, samples, None), counted(len(self.picture.layers), "layer"), self.run)
        return " · ".join(part for part in parts if part)

    def figure(self) -> Figure:
        """Draw it.

        Raises:
            QsaError: the capture lacks what it shows.
        """
        return PICTURE_KINDS[self.picture.section].draw(self)


@dataclass(frozen=True)
class PictureKind:
    """How the pictures of a section are titled and drawn, and the heading on the page."""

    heading: str
    title: Callable[[Picture, Visualization], str]
    draw: Callable[[Drawing], Figure]


def _magnitude(drawing: Drawing) -> Figure:
    picture, settings = drawing.picture, drawing.settings
    stats, dim = cast(Any, list(STATS)), magnitude_dim(picture.site, settings)
    series = drawing.capture.select(exactly(picture.layers), picture.site).magnitudes(stats, reduce_dim=dim)
    note = drawing.note("" if picture.site == "weight" else "mean")
    return magnitude_panels(series, drawing.title, note, legend=settings.show_legend)


def _outlier(drawing: Drawing) -> Figure:
    picture, capture, settings = drawing.picture, drawing.capture, drawing.settings.outlier
    outliers = outliers_of(capture, picture.layers, picture.site, settings.threshold, "all")
    texts = texts_of(capture, outliers, decode=settings.decode_tokens) if picture.section == "outlier_token" else []
    kind = cast(Literal["layer_wise", "position", "token"], picture.section.removeprefix("outlier_"))
    note = drawing.note("sum") + ("" if capture.sinks.searched else " · sinks not looked for")
    legend = drawing.settings.show_legend
    return outlier_picture(kind, outliers, texts, drawing.title, note, most=settings.top_n, legend=legend)


def _distribution(drawing: Drawing) -> Figure:
    draw = box_figure if drawing.picture.form == "boxplot" else histogram_figure
    return draw(drawing.sites, drawing.title, drawing.note(None), legend=drawing.settings.show_legend)


def _percentile(drawing: Drawing) -> Figure:
    settings = drawing.settings.percentile_range
    bands = {layer: channel_bands(numbers, signed=not settings.use_abs) for layer, numbers in drawing.sites.items()}
    note, legend = drawing.note(None), drawing.settings.show_legend
    return percentile_figure(cast(Any, bands), drawing.title, note, style=settings.style, legend=legend)


def _heatmap(drawing: Drawing) -> Figure:
    picture, settings = drawing.picture, drawing.settings.heatmap_3d
    maps, size = maps_of(drawing.capture, picture.layers, picture.site, settings.sample_idx)
    if picture.form == "map":
        return map_figure(maps, size, drawing.title, drawing.run)
    return surface_figure(maps, size, settings.view_angle, drawing.title, drawing.run)


def maps_of(
    capture: Capture, layers: Sequence[str], site: Site, sample: int
) -> tuple[dict[str, NDArray[np.float32]], tuple[int, int]]:
    """Return the [t, c] map of one sample at each layer, and the tokens and channels of the largest site."""
    sites = {layer: capture.sites[layer, site] for layer in layers}
    tokens, channels = max(numbers.shape for numbers in sites.values())[:2]
    return {layer: numbers.arrays[HeatMap(sample).key] for layer, numbers in sites.items()}, (tokens, channels)


def _magnitude_title(picture: Picture, settings: Visualization) -> str:
    return magnitude_title(picture.site, magnitude_dim(picture.site, settings))


def _outlier_title(picture: Picture, settings: Visualization) -> str:
    return f"Tokens above {settings.outlier.threshold:g} × the median at the {picture.site}s"


def _distribution_title(picture: Picture, _: Visualization) -> str:
    return f"Distribution of the {picture.site}s"


def _percentile_title(picture: Picture, settings: Visualization) -> str:
    values = "|x|" if settings.percentile_range.use_abs else "x"
    return f"Percentiles over tokens of {values} at the {picture.site}s"


def _heatmap_title(picture: Picture, settings: Visualization) -> str:
    return f"|x| of sample {settings.heatmap_3d.sample_idx} at the {picture.site}s"


PICTURE_KINDS: Mapping[Section, PictureKind] = {
    "magnitude_input": PictureKind("Magnitudes of inputs", _magnitude_title, _magnitude),
    "magnitude_output": PictureKind("Magnitudes of outputs", _magnitude_title, _magnitude),
    "magnitude_weight": PictureKind("Magnitudes of weights", _magnitude_title, _magnitude),
    "outlier_layer_wise": PictureKind("Outlier tokens by layer", _outlier_title, _outlier),
    "outlier_position": PictureKind("Outlier tokens by position", _outlier_title, _outlier),
    "outlier_token": PictureKind("Outlier tokens by text", _outlier_title, _outlier),
    "distribution": PictureKind("Distributions", _distribution_title, _distribution),
    "percentile_range": PictureKind("Percentiles by channel", _percentile_title, _percentile),
    "heatmap_3d": PictureKind("Heat maps", _heatmap_title, _heatmap),
}

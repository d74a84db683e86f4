"""The section `visualization` and a model's layers → planned pictures, what a pass must keep for them, and figures.

Each key of `visualization.enabled` is a kind of picture in `PICTURE_KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .. import report
from ..captures import (
    CHANNEL_COUNTS,
    SIGNED_COUNTS,
    Capture,
    HeatMap,
    Request,
    Site,
    SiteNumbers,
    Statistic,
    channel_bands,
    counted_quantiles,
    exactly,
    known_kinds,
    match_layers,
    merge_requests,
    no_match,
)
from ..common import AnomalyError, SuiteError, counted, size_text
from ..metrics import METRICS
from ..suite import Location, Visualization, kind_patterns
from .findings import fitness_needs

DEFAULT_PATTERN, SEEDS_PATTERN = "kind:blocks", r"layers\.\d+$"
"""The default of a picture of blocks, and what stands for it where nothing says what the layers are."""
SURFACES = 3
"""How many layers are drawn as surfaces, which need room."""


class PatternError(SuiteError):
    """A pattern finds no layer. `location`: its keys in the configuration."""

    def __init__(self, message: str, location: Location) -> None:
        super().__init__(message)
        self.location = location


@dataclass(frozen=True)
class Picture:
    """A planned picture. `name`: of its file. `section`: the key that enables it. `layers`: in the model's order.

    `optional`: nobody named its layers, so that it is left out where the model calls none of them.
    """

    title: str
    name: str
    section: str
    site: Site
    layers: tuple[str, ...]
    statistics: frozenset[Statistic]
    form: str = ""
    optional: bool = False


@dataclass
class Analysis:
    """All pictures of a configuration, and warnings about its patterns."""

    pictures: list[Picture] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def requests(self) -> tuple[Request, ...]:
        """What one pass has to keep for all pictures, and how fit the inputs that are drawn are for 8 bits."""
        # By the names of the layers, because `layer_selection` narrows what the patterns find.
        asked = [Request(exactly(each.layers), each.site, None, each.statistics) for each in self.pictures]
        inputs = [each for each in self.pictures if each.section == "magnitude_input"]
        return merge_requests([*asked, *(Request(exactly(p.layers), p.site, None, fitness_needs()) for p in inputs)])


def plan_pictures(visualization: Visualization, names: Sequence[str]) -> Analysis:
    """Find the layers of every enabled picture among the model's `names`.

    Raises:
        PatternError: a pattern finds none.
    """
    finder = _Finder(visualization, names)
    enabled = [section for section in PICTURE_KINDS if getattr(visualization.enabled, section)]
    pictures = [picture for section in enabled for picture in PICTURE_KINDS[section].plan(finder, section)]
    return Analysis(pictures, finder.warnings)


def magnitude_dim(site: str, visualization: Visualization) -> Literal[-1, -2] | None:
    """Return the axis over which the maxima of magnitudes are taken, None for |x| itself."""
    settings = visualization.magnitude
    return settings.weight.reduce_dim if site == "weight" else settings.reduce_dim


@dataclass
class _Finder:
    """Finds the layers of patterns; `layer_selection` narrows them unless it would leave none."""

    visualization: Visualization
    names: Sequence[str]
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        patterns = self.visualization.layer_selection.patterns
        found = [self._all(each, ("layer_selection", "patterns", index)) for index, each in enumerate(patterns)]
        self.selected = {layer for layers in found for layer in layers}

    def each(self, patterns: Sequence[str] | None, section: tuple[str | int, ...]) -> Mapping[str, list[str]]:
        """Return the layers of each pattern; `patterns` None stands for those of the magnitudes."""
        if patterns is None:
            patterns, section = self.visualization.magnitude.patterns, ("magnitude",)
        if patterns is self.visualization.magnitude.patterns:
            patterns = self._of_model(patterns)
        return {each: self._narrowed(each, (*section, "patterns", i)) for i, each in enumerate(patterns)}

    def chose(self, patterns: Sequence[str] | None) -> bool:
        """Say whether the user chose the patterns of a picture, so that one without numbers is a mistake."""
        own = self.visualization.magnitude
        return (patterns is not None and patterns is not own.patterns) or "patterns" in own.model_fields_set

    def _of_model(self, patterns: Sequence[str]) -> Sequence[str]:
        """Return the patterns that the user chose; of the default ones those that find a layer, else the model's own.

        The defaults are names of Llama's layers, and other models have others: then their first kinds of linear layers.
        """
        if "patterns" in self.visualization.magnitude.model_fields_set:
            return patterns
        found = [each for each in patterns if match_layers(self.names, each)]
        return found or kind_patterns(match_layers(self.names, "kind:linears"))[: len(patterns)] or patterns

    def whole(self, pattern: str, section: str) -> list[str]:
        """Return the layers of a pattern that no selection narrows."""
        layers = self._all(pattern, (section, "pattern"))
        if self.selected and self.selected.isdisjoint(layers):
            self._warn(f"layer_selection has none of the layers of {section}.pattern '{pattern}', which stays as it is")
        return layers

    def _narrowed(self, pattern: str, location: Location) -> list[str]:
        layers = self._all(pattern, location)
        kept = [layer for layer in layers if layer in self.selected]
        # An empty `layer_selection` selects every layer.
        if self.selected and not kept:
            self._warn(f"layer_selection would leave none of the {len(layers)} layers of '{pattern}', so all are drawn")
        return kept or layers

    def _all(self, pattern: str, location: Location) -> list[str]:
        layers = match_layers(self.names, pattern)
        if not layers and pattern == DEFAULT_PATTERN and not known_kinds(self.names):
            layers = match_layers(self.names, SEEDS_PATTERN)
        if not layers:
            raise PatternError(str(no_match(self.names, pattern, None)), ("visualization", *location))
        return layers

    def _warn(self, text: str) -> None:
        # Several sections may use one pattern, such as the magnitudes of inputs and of outputs.
        if text not in self.warnings:
            self.warnings.append(text)


def _magnitudes(finder: _Finder, section: str, site: Site) -> Iterator[Picture]:
    settings, weight = finder.visualization.magnitude, site == "weight"
    patterns = settings.weight.patterns if weight else settings.patterns
    found = finder.each(patterns, ("magnitude", "weight") if weight else ("magnitude",))
    needs = METRICS["magnitude"].needs(site, "all", {"reduce_dim": magnitude_dim(site, finder.visualization)})
    title = report.magnitude_title(site, magnitude_dim(site, finder.visualization))
    for name, layers in _grouped(found, section, together=settings.combined_plot, names=finder.names):
        yield Picture(title, name, section, site, layers, needs)


def _outliers(finder: _Finder, section: str) -> Iterator[Picture]:
    settings = finder.visualization.outlier
    layers = tuple(finder.whole(settings.pattern, "outlier"))
    title = f"Tokens above {settings.threshold:g} × the median at the outputs"
    yield Picture(title, section, section, "output", layers, METRICS["outlier_tokens"].needs("output", "all", {}))


def _distributions(finder: _Finder, section: str) -> Iterator[Picture]:
    settings = finder.visualization.distribution
    found = finder.each(settings.patterns, (section,))
    title = f"Distribution of the {settings.site}s"
    # A form that is named twice would overwrite its own file.
    for form in dict.fromkeys(settings.plot_types):
        for name, layers in _grouped(found, f"{section}_{form}", together=True, names=finder.names):
            yield Picture(title, name, section, settings.site, layers, frozenset({SIGNED_COUNTS}), form)


def _percentiles(finder: _Finder, section: str) -> Iterator[Picture]:
    settings = finder.visualization.percentile_range
    found = finder.each(settings.patterns, (section,))
    title = f"Percentiles over tokens of {'|x|' if settings.use_abs else 'x'} at the {settings.site}s"
    for name, layers in _grouped(found, section, together=False, names=finder.names):
        shown = tuple(layers[index] for index in report.evenly_spread(len(layers), settings.num_layers_to_show))
        optional = not finder.chose(settings.patterns)
        yield Picture(title, name, section, settings.site, shown, frozenset({CHANNEL_COUNTS}), optional=optional)


def _heatmaps(finder: _Finder, section: str) -> Iterator[Picture]:
    settings = finder.visualization.heatmap_3d
    layers = finder.whole(settings.pattern, section)
    needs = frozenset({HeatMap(settings.sample_idx)})
    title = f"|x| of sample {settings.sample_idx} at the {settings.site}s"
    for name, form, most in (("heatmap_3d", "surface", SURFACES), ("heatmap_2d", "map", settings.num_2d_layers)):
        if most:
            shown = tuple(layers[index] for index in report.evenly_spread(len(layers), most))
            yield Picture(title, name, section, settings.site, shown, needs, form)


def drawable(picture: Picture, capture: Capture) -> tuple[Picture, list[str]]:
    """Leave out the layers that a capture lacks; also return why.

    Raises:
        AnomalyError: none is left.
    """
    kept, left_out = [], []
    for layer in picture.layers:
        problem = _problem(capture.sites.get((layer, picture.site)), picture)
        if picture.site == "weight" and layer in capture.refused:
            problem = f"can't be read: {capture.refused[layer]}"
        if problem:
            left_out.append(f"the {picture.site} of {layer} {problem}")
        else:
            kept.append(layer)
    if not kept:
        raise AnomalyError(f"{left_out[0]} (and so the other {len(left_out) - 1} layers)")
    return replace(picture, layers=tuple(kept)), left_out


def _problem(numbers: SiteNumbers | None, picture: Picture) -> str:
    if numbers is None:
        return "is none: the layer owns no weight" if picture.site == "weight" else "was not measured"
    if not numbers.populations:
        return "was never seen: the forward pass doesn't call this layer with a floating-point tensor"
    # Before the general check: a map is also missing where the data has no such sample.
    if picture.section == "heatmap_3d" and not any(s.key in numbers for s in picture.statistics):
        return "has no token axis, or the data has no such sample"
    if any(s.needs_tokens and s.key not in numbers for s in picture.statistics):
        return "has no token axis"
    return ""


def _grouped(
    found: Mapping[str, Sequence[str]], stem: str, *, together: bool, names: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (name, layers in model order) of one picture for all patterns, or of one for each."""
    if together:
        union = {layer for layers in found.values() for layer in layers}
        yield stem, tuple(name for name in names if name in union)
        return
    # Patterns that differ in punctuation only have the same slug, and one picture must not overwrite another.
    slugs: dict[str, int] = {}
    for pattern, layers in found.items():
        slug = _slug(pattern)
        slugs[slug] = slugs.get(slug, 0) + 1
        number = f"_{slugs[slug]}" if slugs[slug] > 1 else ""
        yield f"{stem}_{slug}{number}", tuple(layers)


def _slug(pattern: str) -> str:
    r"""Make a file name of a pattern's words: `mlp\.down_proj$` → `mlp_down_proj`."""
    plain = "".join(c if c.isalnum() else "_" for c in pattern.replace("\\d+", "").replace("\\", ""))
    return "_".join(part for part in plain.split("_") if part)[:60] or "layers"


@dataclass(frozen=True)
class Drawing:
    """A picture with what it is drawn from. `run`: the model and the data in words, for the small print."""

    picture: Picture
    capture: Capture
    settings: Visualization
    run: str

    @property
    def sites(self) -> dict[str, SiteNumbers]:
        """The numbers of the picture's layers."""
        return {layer: self.capture.sites[layer, self.picture.site] for layer in self.picture.layers}

    def note(self, reduce: str | None) -> str:
        """Write the small print. `reduce`: how the samples were folded, None for pooled."""
        samples = report.samples_of(self.capture, self.picture.layers, self.picture.site)
        parts = (report.population(reduce, samples, None), counted(len(self.picture.layers), "layer"), self.run)
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class PictureKind:
    """The pictures of a section: their heading on the page, how they are planned and drawn, and how to read them.

    `draw` raises a QsaError where the capture lacks what the picture shows.
    """

    heading: str
    plan: Callable[[_Finder, str], Iterator[Picture]]
    draw: Callable[[Drawing], Figure]
    reading: str


def _magnitude(drawing: Drawing) -> Figure:
    picture, settings = drawing.picture, drawing.settings
    stats, dim = cast(Any, list(report.STATS)), magnitude_dim(picture.site, settings)
    series = drawing.capture.select(exactly(picture.layers), picture.site).magnitudes(stats, reduce_dim=dim)
    note = drawing.note("" if picture.site == "weight" else "mean")
    tops = next(iter(series.values()))
    finite = np.nan_to_num(tops.values, nan=-1.0, posinf=-1.0)
    peak = int(finite.argmax())
    title = f"{picture.title}: largest {size_text(float(finite[peak]))} at {tops.layers[peak]}"
    return report.magnitude_panels(series, title, note, legend=settings.show_legend)


def _outlier(drawing: Drawing) -> Figure:
    picture, capture, settings = drawing.picture, drawing.capture, drawing.settings.outlier
    outliers = report.outliers_of(capture, picture.layers, picture.site, settings.threshold, "all")
    shows_texts = picture.section == "outlier_token"
    texts = report.texts_of(capture, outliers, decode=settings.decode_tokens) if shows_texts else []
    kind = cast(Literal["layer_wise", "position", "token"], picture.section.removeprefix("outlier_"))
    note = drawing.note("sum") + ("" if capture.sinks.searched else " · sinks not looked for")
    legend = drawing.settings.show_legend
    title = f"{_outliers_told(outliers, capture)} {picture.title.partition(' ')[2]}{_most_of(kind, outliers, texts)}"
    return report.outlier_picture(kind, outliers, texts, title, note, most=settings.top_n, legend=legend)


def _outliers_told(outliers: report.Outliers, capture: Capture) -> str:
    """Say how many outlier tokens there are, and that all are sinks where it is so."""
    count = len(outliers.layer)
    sinks = ", all attention sinks," if count and capture.sinks.searched and outliers.sink.all() else ""
    return f"{counted(count, 'token')}{sinks}" if count else "No token"


def _most_of(
    kind: Literal["layer_wise", "position", "token"], outliers: report.Outliers, texts: list[tuple[str, int, int]]
) -> str:
    """Say which layer, position or text has most of the outlier tokens."""
    if not len(outliers.layer):
        return ""
    if kind == "token":
        return f": “{texts[0][0]}” most often, {texts[0][1]} ×" if texts else ""
    found, counts = np.unique(outliers.layer if kind == "layer_wise" else outliers.position, return_counts=True)
    most = int(found[counts.argmax()])
    if kind == "layer_wise":
        return f", in {counted(len(found), 'layer')}: {counts.max()} at {outliers.layers[most]}"
    return f": {counts.max()} at position {most}" if len(found) > 1 else f", all at position {most}"


def _distribution(drawing: Drawing) -> Figure:
    draw = report.box_figure if drawing.picture.form == "boxplot" else report.histogram_figure
    ends = {layer: counted_quantiles(numbers, (0.0, 1.0), signed=True) for layer, numbers in drawing.sites.items()}
    widest = max(ends, key=lambda layer: float(np.nan_to_num(np.abs(ends[layer]), posinf=0.0).max()))
    low, high = (size_text(float(end)) for end in ends[widest])
    title = f"{drawing.picture.title}: widest at {widest}, {low} to {high}"
    return draw(drawing.sites, title, drawing.note(None), legend=drawing.settings.show_legend)


def _percentile(drawing: Drawing) -> Figure:
    settings = drawing.settings.percentile_range
    bands = {layer: channel_bands(numbers, signed=not settings.use_abs) for layer, numbers in drawing.sites.items()}
    note, legend = drawing.note(None), drawing.settings.show_legend
    ends = {layer: np.nan_to_num(np.stack([b["max"], b["min"]]), posinf=0.0, neginf=0.0) for layer, b in bands.items()}
    worst = max(ends, key=lambda layer: float(np.abs(ends[layer]).max()))
    side, channel = np.unravel_index(int(np.abs(ends[worst]).argmax()), ends[worst].shape)
    reach = size_text(float(ends[worst][side, channel]))
    title = f"{drawing.picture.title}: channel {channel} reaches {reach} at {worst}"
    return report.percentile_figure(cast(Any, bands), title, note, style=settings.style, legend=legend)


def _heatmap(drawing: Drawing) -> Figure:
    picture, settings = drawing.picture, drawing.settings.heatmap_3d
    layers = picture.layers if picture.form == "map" else _most_telling(drawing)
    maps, size = maps_of(drawing.capture, layers, picture.site, settings.sample_idx)
    finite = {layer: np.nan_to_num(each, posinf=0.0, neginf=0.0) for layer, each in maps.items()}
    worst = max(finite, key=lambda layer: float(finite[layer].max()))
    token, channel = np.unravel_index(int(finite[worst].argmax()), finite[worst].shape)
    cells = [-(-whole // max(part, 1)) for whole, part in zip(size, maps[worst].shape, strict=True)]
    where = f"token {_span(int(token), cells[0])}, channel {_span(int(channel), cells[1])}"
    title = f"{picture.title}: largest {size_text(float(finite[worst].max()))} at {worst}, {where}"
    if picture.form == "map":
        return report.map_figure(maps, size, title, drawing.run)
    return report.surface_figure(maps, size, settings.view_angle, title, drawing.run)


def _span(index: int, cell: int) -> str:
    return str(index) if cell == 1 else f"{index * cell}–{(index + 1) * cell - 1}"


def _most_telling(drawing: Drawing) -> list[str]:
    """Choose the layers of the heat maps whose peak stands out most, as many as are drawn as surfaces."""
    picture, key = drawing.picture, HeatMap(drawing.settings.heatmap_3d.sample_idx).key
    sites = {layer: numbers for (layer, site), numbers in drawing.capture.sites.items() if site == picture.site}
    maps = {layer: numbers.arrays[key] for layer, numbers in sites.items() if key in numbers}
    contrast = {layer: report.contrast(each) for layer, each in maps.items()}
    chosen = sorted(maps, key=lambda layer: -contrast[layer])[: len(picture.layers)]
    return [layer for layer in drawing.capture.modules if layer in chosen] or list(picture.layers)


def maps_of(
    capture: Capture, layers: Sequence[str], site: Site, sample: int
) -> tuple[dict[str, NDArray[np.float32]], tuple[int, int]]:
    """Return the [t, c] map of one sample at each layer, and the tokens and channels of the largest site."""
    sites = {layer: capture.sites[layer, site] for layer in layers}
    # The maps have common axes, which reach as far as the largest site.
    tokens, channels = max(numbers.shape for numbers in sites.values())[:2]
    return {layer: numbers.arrays[HeatMap(sample).key] for layer, numbers in sites.items()}, (tokens, channels)


def _magnitude_kind(site: Site) -> PictureKind:
    read = (
        "Each line is one of the largest values, the median or the least; a peak of top1 alone is one token or channel."
    )
    return PictureKind(f"Magnitudes of {site}s", partial(_magnitudes, site=site), _magnitude, read)


_SINKS = "Hatched bars are attention sinks, which most models have and a quantizer must keep."
PICTURE_KINDS: Mapping[str, PictureKind] = {
    "magnitude_input": _magnitude_kind("input"),
    "magnitude_output": _magnitude_kind("output"),
    "magnitude_weight": _magnitude_kind("weight"),
    "outlier_layer_wise": PictureKind("Outlier tokens by layer", _outliers, _outlier, _SINKS),
    "outlier_position": PictureKind("Outlier tokens by position", _outliers, _outlier, _SINKS),
    "outlier_token": PictureKind("Outlier tokens by text", _outliers, _outlier, _SINKS),
    "distribution": PictureKind(
        "Distributions",
        _distributions,
        _distribution,
        "All elements of a layer. The axis is linear around 0 and logarithmic beyond; extremes far from a narrow box "
        "make int8 coarse.",
    ),
    "percentile_range": PictureKind(
        "Percentiles by channel",
        _percentiles,
        _percentile,
        "Between which values the tokens of each channel lie; on the right those of the widest channels. A "
        "channel that stands out takes the scale of all others.",
    ),
    "heatmap_3d": PictureKind(
        "Heat maps",
        _heatmaps,
        _heatmap,
        "|x| of one sample: a line along the channels is a token, a line along the tokens a channel.",
    ),
}

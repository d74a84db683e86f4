"""All that an analysis leaves in its folder: pictures, the numbers behind them as tables, and the page."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import report
from ..captures import Capture, Site, SiteNumbers, channel_bands, counted_quantiles, exactly
from ..common import AnomalyError, QsaError, write_atomically
from ..metrics import ACROSS, AcrossChannels, Selection, Series
from ..suite import Subject, Visualization
from .findings import findings_of
from .pictures import PICTURE_KINDS, Analysis, Drawing, Picture, drawable, magnitude_dim, maps_of

ANALYSIS_SCHEMA = "qsa-analysis/1"
_FOLDED_BY: Mapping[str, AcrossChannels] = {
    "min": "min", "p0.01": "min", "p1": "min", "p25": "min", "p75": "max", "p99": "max", "p99.99": "max", "max": "max",
}  # fmt: skip
"""The percentiles over tokens → whether the smallest or the largest channel stands for the layer."""


@dataclass(frozen=True)
class Drawn:
    """A drawn picture and its files, or the problem why it could not be drawn.

    `chart`: its data, which the page draws; a surface has none, for the page has one that turns.
    """

    picture: Picture
    chart: Mapping[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    problem: str = ""


@dataclass
class Export:
    """The files of an analysis, in `folder`.

    `files`, in the order of writing, `drawn` and `warnings`: what `write` did.
    """

    visualization: Visualization
    subject: Subject
    analysis: Analysis
    capture: Capture
    folder: Path
    files: list[Path] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def findings(self) -> list[str]:
        """What the pictures show, in sentences."""
        return findings_of(self.capture, self.visualization)

    @property
    def problems(self) -> list[Drawn]:
        """The pictures that could not be drawn."""
        return [each for each in self.drawn if each.problem and not each.picture.optional]

    def write(self, command: str, say: Callable[[str], None]) -> None:
        """Draw and export everything.

        `command`: shown on the page. `say`: called with a line on how long each picture took.

        Raises:
            OSError: the folder can't be written.
        """
        data = self.capture.provenance
        run = f"{self.subject.name}, {data.model.dtype or ''}, {data.data.size}"
        for picture in self.analysis.pictures:
            started = time.perf_counter()
            drawn, warnings = draw_picture(picture, self.capture, self.visualization, self.folder, run)
            self.drawn.append(drawn)
            self.files += drawn.files
            self.warnings += warnings
            say(f"{picture.name}: {time.perf_counter() - started:.2f} s")
        started = time.perf_counter()
        self._write_tables()
        if "html" in self.visualization.output.formats:  # last, for the page lists the other files
            page = self.folder / self.visualization.output.report_file
            write_atomically(page, report.render_gallery(self._gallery(command)))
            self.files.append(page)
        say(f"tables and report: {time.perf_counter() - started:.2f} s")

    def _write_tables(self) -> None:
        encode: Mapping[str, Callable[[], bytes]] = {
            "csv": lambda: as_csv(rows),
            "json": lambda: as_json(rows, self._about()),
            "parquet": lambda: as_parquet(rows),
        }
        wanted = [form for form in encode if form in self.visualization.output.formats]
        rows = export_rows(self.analysis, self.capture, self.visualization) if wanted else []
        for form in wanted:
            file = self.folder / f"analysis.{form}"
            write_atomically(file, encode[form]())
            self.files.append(file)
        if self.visualization.output.include_raw_data:
            self.files.append(self.folder / "capture.qsa")
            self.capture.save(self.files[-1])

    def _about(self) -> dict[str, Any]:
        """Return what the JSON says besides the rows: the run, the settings and the pictures."""
        pictures = [
            {
                "name": each.picture.name,
                "title": each.picture.title,
                "site": each.picture.site,
                "problem": each.problem or None,
                "files": [path.name for path in each.files],
                "layers": list(each.picture.layers),
            }
            for each in self.drawn
        ]
        meta, settings = self.capture.provenance.plain(), self.visualization.model_dump()
        return {"name": self.subject.name, "meta": meta, "visualization": settings, "pictures": pictures}

    def _gallery(self, command: str) -> report.Gallery:
        sections: dict[str, list[report.PagePicture]] = {}
        for each in self.drawn:
            shown = sections.setdefault(PICTURE_KINDS[each.picture.section].heading, [])
            if each.chart or each.problem:
                picture = each.picture
                shown.append(report.PagePicture(picture.title, picture.name, problem=each.problem, chart=each.chart))
        readings = {kind.heading: kind.reading for kind in PICTURE_KINDS.values()}
        provenance = self.capture.provenance
        return report.Gallery(
            title=f"Analysis of {self.subject.name}",
            facts={**provenance.facts(), **(provenance.model.versions or {})},
            sections=sections,
            findings=self.findings,
            readings=readings,
            warnings=[*self.analysis.warnings, *self.warnings],
            layers=self.capture.modules,
            files=[path.name for path in self.files],
            command=command,
            surfaces=list(self._surfaces()),
        )

    def _surfaces(self) -> Iterator[report.GallerySurface]:
        """Yield a surface for the page with all layers of the heat maps."""
        settings = self.visualization.heatmap_3d
        pictures = [each.picture for each in self.drawn if each.picture.section == "heatmap_3d" and not each.problem]
        wanted = {layer for picture in pictures for layer in picture.layers}
        if wanted:
            layers = [layer for layer in self.capture.modules if layer in wanted]
            maps, size = maps_of(self.capture, layers, settings.site, settings.sample_idx)
            data = report.surface_data(maps, size, settings.view_angle)
            yield report.GallerySurface(PICTURE_KINDS["heatmap_3d"].heading, "heatmap_3d", data)


def draw_picture(
    picture: Picture, capture: Capture, visualization: Visualization, folder: Path, run: str
) -> tuple[Drawn, list[str]]:
    """Draw one picture and write it in the configured formats; also return warnings about its layers.

    `run`: the model and the data in words, for the small print. A picture that can't be drawn holds the problem,
    so that the others are drawn all the same.

    Raises:
        OSError: the folder can't be written.
    """
    try:
        kept, left_out = drawable(picture, capture)
        figure = PICTURE_KINDS[picture.section].draw(Drawing(kept, capture, visualization, run))
    except QsaError as error:
        left_out = [f"{picture.name} was left out: {error}"] if picture.optional else []
        return Drawn(picture, problem=str(error)), left_out
    kept = replace(kept, title=figure.get_suptitle().strip() or kept.title)
    files = []
    for form in ("png", "svg"):
        if form in visualization.output.formats:
            files.append(folder / f"{picture.name}.{form}")
            shaded = picture.section == "heatmap_3d"
            write_atomically(files[-1], report.encode_figure(figure, form, visualization.dpi, shaded=shaded))
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    flat = "html" in visualization.output.formats and picture.form != "surface"
    chart = report.chart_of(figure) if flat else {}
    return Drawn(kept, chart, files), [f"{picture.name}: {left_out[0]}{more}"] if left_out else []


class ExportRow(NamedTuple):
    """One number. `sample`: the index of its sample, None for all samples together."""

    layer: str
    site: str
    metric: str
    statistic: str
    sample: int | None
    value: float


@dataclass(frozen=True)
class _Numbers:
    """One statistic of some layers; `populations`: layer → its values before folding, where it has samples."""

    metric: str
    statistic: str
    site: Site
    values: Mapping[str, float]
    populations: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def of(cls, series: Series, statistic: str) -> _Numbers:
        """Take a series."""
        site: Any = series.query.site
        values = dict(zip(series.layers, series.values.tolist(), strict=True))
        return cls(series.query.metric, statistic, site, values, series.populations)


def export_rows(analysis: Analysis, capture: Capture, visualization: Visualization) -> list[ExportRow]:
    """Return the numbers behind all pictures, layer by layer; those of single samples only with `include_raw_data`."""
    raw = visualization.output.include_raw_data
    found: dict[tuple[str, str, str, str, int | None], ExportRow] = {}
    for numbers in _numbers(analysis, capture, visualization):
        for row in _rows(numbers, capture, raw=raw):
            # Pictures of several sections may rest on the same number, which the table has once.
            found.setdefault(row[:5], row)
    order = {name: index for index, name in enumerate(capture.modules)}
    return sorted(found.values(), key=lambda row: (order[row.layer], row.site))


def _numbers(analysis: Analysis, capture: Capture, visualization: Visualization) -> Iterator[_Numbers]:
    # Pictures that differ in their form only show the same numbers.
    for picture in {(p.section, p.site, p.layers): p for p in analysis.pictures}.values():
        try:
            layers = drawable(picture, capture)[0].layers
        except AnomalyError:  # its picture reports it
            continue
        yield from _of_section(picture.section, capture.select(exactly(layers), picture.site), visualization)


def _of_section(section: str, selection: Selection, visualization: Visualization) -> Iterator[_Numbers]:
    if section.startswith("magnitude"):
        stats: Any = list(report.STATS)
        found = selection.magnitudes(stats, reduce_dim=magnitude_dim(selection.site, visualization))
        yield from (_Numbers.of(series, stat) for stat, series in found.items())
    elif section.startswith("outlier"):
        yield _Numbers.of(selection.outlier_tokens(visualization.outlier.threshold, reduce="sum"), "count")
        yield _Numbers.of(selection.outlier_ratio(), "max")
    elif section == "distribution":
        names = [f"p{100 * share:g}" for share in report.BOX_SHARES]
        yield from _tabled(
            "quantile",
            selection,
            lambda n: dict(zip(names, counted_quantiles(n, report.BOX_SHARES, signed=True), strict=True)),
        )
    elif section == "percentile_range":
        signed = not visualization.percentile_range.use_abs
        yield from _tabled("channel_band", selection, lambda n: _bands_of(n, signed=signed))


def _tabled(
    metric: str, selection: Selection, compute: Callable[[SiteNumbers], Mapping[str, float]]
) -> Iterator[_Numbers]:
    """Compute all statistics of a layer at once, for reading its counts takes most of the time."""
    site, sites = selection.site, selection.capture.sites
    table = {layer: compute(sites[layer, site]) for layer in selection.layers}
    for statistic in next(iter(table.values())):
        yield _Numbers(metric, statistic, site, {layer: row[statistic] for layer, row in table.items()})


def _bands_of(numbers: SiteNumbers, *, signed: bool) -> dict[str, float]:
    bands = channel_bands(numbers, signed=signed)
    return {name: ACROSS[_FOLDED_BY[name]](band) for name, band in bands.items()}


def _rows(numbers: _Numbers, capture: Capture, *, raw: bool) -> Iterator[ExportRow]:
    head = (numbers.site, numbers.metric, numbers.statistic)
    for layer, value in numbers.values.items():
        yield ExportRow(layer, *head, None, value)
        if raw and layer in numbers.populations and numbers.site != "weight":
            samples = capture.sites[layer, numbers.site].sample.tolist()
            by_sample: dict[int, float] = {}
            for sample, number in zip(samples, numbers.populations[layer].tolist(), strict=True):
                by_sample.setdefault(sample, number)  # a layer that is called twice counts by its first call
            yield from (ExportRow(layer, *head, sample, number) for sample, number in by_sample.items())


def as_csv(rows: Sequence[ExportRow]) -> bytes:
    """Write the rows with a header; `sample` is empty for a number of all samples."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ExportRow._fields)
    # repr writes the shortest digits that read back as the same float.
    writer.writerows((*row[:4], "" if row.sample is None else row.sample, repr(row.value)) for row in rows)
    return text.getvalue().encode()


def as_json(rows: Sequence[ExportRow], about: Mapping[str, Any]) -> bytes:
    """Write the keys of `about` and, a line each, the rows under `rows`; NaN and infinities become null."""
    write = json.JSONEncoder(allow_nan=False).encode  # with an indent Python's own encoder takes ten times as long
    plain = ({**row._asdict(), "value": row.value if math.isfinite(row.value) else None} for row in rows)
    lines = ",\n  ".join(map(write, plain))
    whole = json.dumps({"schema": ANALYSIS_SCHEMA, **about, "rows": []}, indent=1, allow_nan=False, default=str)
    # `whole` ends in "]\n}".
    return f"{whole[:-3]}\n  {lines}\n ]\n}}".encode()


def as_parquet(rows: Sequence[ExportRow]) -> bytes:
    """Write the rows as a parquet table with the same columns."""
    import pyarrow
    import pyarrow.parquet

    columns = dict(zip(ExportRow._fields, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}
    # Without a schema a column without values, such as `sample`, would get the type null.
    kinds = [pyarrow.string()] * 4 + [pyarrow.int64(), pyarrow.float64()]
    schema = pyarrow.schema(list(zip(ExportRow._fields, kinds, strict=True)))
    table = pyarrow.table({name: columns.get(name, []) for name in ExportRow._fields}, schema=schema)
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()

"""Numbers of an analysis as tidy rows, and the rows as CSV, JSON and parquet. Plain data in, bytes out."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...captures import Capture, Site, SiteNumbers, channel_bands, counted_quantiles, exactly
from ...common import AnomalyError
from ...metrics import ACROSS, AcrossChannels, Selection, Series
from ...report import SHARES, STATS
from ...suite import Visualization
from .pictures import Analysis, measured

SCHEMA = "qsa-analysis/1"
_SPEAKER: Mapping[str, AcrossChannels] = {
    "min": "min", "p0.01": "min", "p1": "min", "p25": "min", "p75": "max", "p99": "max", "p99.99": "max", "max": "max",
}  # fmt: skip
"""The percentiles over tokens → which channel speaks for the layer."""


class Row(NamedTuple):
    """One number. `sample`: whose it is; None for all samples together."""

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


def rows_of(analysis: Analysis, capture: Capture, visualization: Visualization) -> list[Row]:
    """Return the numbers behind all pictures, layer by layer; those of single samples only with `include_raw_data`."""
    raw = visualization.output.include_raw_data
    found: dict[tuple[str, str, str, str, int | None], Row] = {}
    for numbers in _numbers(analysis, capture, visualization):
        for row in _rows(numbers, capture, raw=raw):
            found.setdefault(row[:5], row)
    order = {name: index for index, name in enumerate(capture.modules)}
    return sorted(found.values(), key=lambda row: (order[row.layer], row.site))


def _numbers(analysis: Analysis, capture: Capture, visualization: Visualization) -> Iterator[_Numbers]:
    for picture in {(p.section, p.site, p.layers): p for p in analysis.pictures}.values():
        try:
            layers = measured(picture, capture)[0].layers
        except AnomalyError:  # told with its picture
            continue
        yield from _of_section(picture.section, capture.select(exactly(layers), picture.site), visualization)


def _of_section(section: str, selection: Selection, visualization: Visualization) -> Iterator[_Numbers]:
    if section.startswith("magnitude"):
        settings = visualization.magnitude
        dim = settings.weight.reduce_dim if selection.site == "weight" else settings.reduce_dim
        stats: Any = list(STATS)
        found = selection.magnitudes(stats, reduce_dim=dim)
        yield from (_Numbers.of(series, stat) for stat, series in found.items())
    elif section.startswith("outlier"):
        yield _Numbers.of(selection.outlier_tokens(visualization.outlier.threshold, reduce="sum"), "count")
        yield _Numbers.of(selection.outlier_ratio(), "max")
    elif section == "distribution":
        names = [f"p{100 * share:g}" for share in SHARES]
        yield from _tabled(
            "quantile", selection, lambda n: dict(zip(names, counted_quantiles(n, SHARES, signed=True), strict=True))
        )
    elif section == "percentile_range":
        signed = not visualization.percentile_range.use_abs
        yield from _tabled("channel_band", selection, lambda n: _bands_of(n, signed=signed))


def _tabled(
    metric: str, selection: Selection, compute: Callable[[SiteNumbers], Mapping[str, float]]
) -> Iterator[_Numbers]:
    """Compute all statistics of each layer at once: reading counts takes longer than the rest."""
    site, sites = selection.site, selection.capture.sites
    table = {layer: compute(sites[layer, site]) for layer in selection.layers}
    for statistic in next(iter(table.values())):
        yield _Numbers(metric, statistic, site, {layer: row[statistic] for layer, row in table.items()})


def _bands_of(numbers: SiteNumbers, *, signed: bool) -> dict[str, float]:
    bands = channel_bands(numbers, signed=signed)
    return {name: ACROSS[_SPEAKER[name]](band) for name, band in bands.items()}


def _rows(numbers: _Numbers, capture: Capture, *, raw: bool) -> Iterator[Row]:
    head = (numbers.site, numbers.metric, numbers.statistic)
    for layer, value in numbers.values.items():
        yield Row(layer, *head, None, value)
        if raw and layer in numbers.populations and numbers.site != "weight":
            samples = capture.sites[layer, numbers.site].sample.tolist()
            by_sample: dict[int, float] = {}
            for sample, number in zip(samples, numbers.populations[layer].tolist(), strict=True):
                by_sample.setdefault(sample, number)  # a layer that is called twice counts by its first call
            yield from (Row(layer, *head, sample, number) for sample, number in by_sample.items())


def as_csv(rows: Sequence[Row]) -> bytes:
    """Write the rows with a header; `sample` is empty for a number of all samples."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows((*row[:4], "" if row.sample is None else row.sample, repr(row.value)) for row in rows)
    return text.getvalue().encode()


def as_json(rows: Sequence[Row], about: Mapping[str, Any]) -> bytes:
    """Write the rows under `rows`, and what they are about beside them; NaN and infinities are null."""
    plain = [
        {**row._asdict(), "value": row.value if math.isfinite(row.value) else None}
        for row in rows
    ]  # fmt: skip
    return json.dumps({"schema": SCHEMA, **about, "rows": plain}, indent=1, allow_nan=False, default=str).encode()


def as_parquet(rows: Sequence[Row]) -> bytes:
    """Write the rows as a parquet table with the same columns."""
    import pyarrow
    import pyarrow.parquet

    columns = dict(zip(Row._fields, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}
    kinds = [pyarrow.string()] * 4 + [pyarrow.int64(), pyarrow.float64()]
    schema = pyarrow.schema(list(zip(Row._fields, kinds, strict=True)))
    table = pyarrow.table({name: columns.get(name, []) for name in Row._fields}, schema=schema)
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()

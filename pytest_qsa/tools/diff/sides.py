"""A side of a diff: a capture, baselines or a report, read into tables of numbers by measure and layer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...captures import SINKS, Capture, DataProvenance, Provenance, Site, exactly
from ...common import QsaError, SuiteError, number, shown_path
from ...metrics import METRICS, Parameters, Series
from ...report import read_report
from ...verdicts import is_baseline, read_baseline

USUAL = (("magnitude", "top1"), ("magnitude", "median"), ("outlier_tokens", None), ("rms", None), ("kurtosis", None))
"""What two captures are compared by; `--fail-on` adds what it names."""


@dataclass(frozen=True)
class DiffMeasure:
    """A metric with its parameters at a site, and how samples and layers were folded. `parameters`: sorted JSON."""

    metric: str
    site: str
    parameters: str = "{}"
    positions: str | None = None
    reduce: str | None = None
    over: str | None = None

    @classmethod
    def of(cls, query: Mapping[str, Any]) -> DiffMeasure:
        """Read the query of a report, or that of a baseline, where the parameters stand among the other keys."""
        named = {"definition", "site", "positions", "reduce", "over"}
        parameters = query["parameters"] if "metric" in query else {k: v for k, v in query.items() if k not in named}
        return cls(
            query["definition"].partition("/")[0], query["site"], json.dumps(parameters, sort_keys=True),
            query.get("positions"), query.get("reduce"), query.get("over"),
        )  # fmt: skip

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters as a mapping."""
        arguments: dict[str, Any] = json.loads(self.parameters)
        return arguments

    @property
    def name(self) -> str:
        """The metric with its stat, as `--fail-on` names it: `magnitude.top1`."""
        stat = self.arguments.get("stat")
        return f"{self.metric}.{stat}" if stat is not None else self.metric

    def is_perfect(self, value: float) -> bool:
        """Say whether a value is +∞ dB: the layer is equal to the reference."""
        return value == math.inf and self.metric in METRICS and METRICS[self.metric].unit == "dB"

    def text_of(self, value: float) -> str:
        """Write one of its values: `12.3`, `∞ dB`."""
        return "∞ dB" if self.is_perfect(value) else number(value)

    def __str__(self) -> str:
        """Write it for the cell of a table: `magnitude.top1 @output`."""
        more = [f"positions {self.positions}"] if self.positions not in (None, "all") else []
        more += [f"{self.over} over layers"] if self.over else []
        return f"{self.name} @{self.site}" + (f" ({', '.join(more)})" if more else "")


@dataclass(frozen=True)
class MeasureTable:
    """A measure's numbers. `values`: layer → number. `data`: the hash of the tokens, where known."""

    definition: str
    data: str | None
    values: Mapping[str, float]


@dataclass(frozen=True)
class DiffSide:
    """One side of a diff. `facts`: where the numbers come from. `capture`: None for baselines and reports."""

    path: str
    facts: Mapping[str, str]
    tables: Mapping[DiffMeasure, MeasureTable] = field(default_factory=dict)
    capture: Capture | None = None

    @property
    def title(self) -> str:
        """The side in one line."""
        facts = "; ".join(f"{name} {text}" for name, text in self.facts.items() if text)
        return f"{self.path}: {facts}" if facts else self.path


def read_side(given: str) -> DiffSide:
    """Read a capture (.qsa), a baseline, a folder of baselines, or a report.json. `PATH::SUBJECT` picks a subject.

    Raises:
        SuiteError: the file is of another kind, or holds several subjects.
        InfraError: it can't be read.
    """
    name, _, subject = given.partition("::")
    path = Path(name)
    if path.is_dir():
        # Sorted: the order of a file system must not decide which file an error names.
        return _baselines(path, sorted(file for file in path.rglob("*.json") if is_baseline(file)), subject)
    if path.suffix == ".qsa":
        capture = Capture.load(path)
        return DiffSide(shown_path(path), _facts(capture.provenance), capture=capture)
    if is_baseline(path):
        return _baselines(path, [path], subject)
    return _reported(path, subject)


def _facts(provenance: Provenance) -> dict[str, str]:
    """Return the facts that tell two runs of one model apart."""
    facts = provenance.facts() | {"Model": Path(provenance.model.path).name}
    for short, label in (("Weights", "Weights hash"), ("Tokens", "Data hash")):
        facts[short] = facts.get(label, "").removeprefix("sha256:")[:12]
    shown = ("Model", "Weights", "Dtype", "Device", "Executed as", "Tokens")
    return {label.lower(): facts.get(label, "") for label in shown}


def _baselines(path: Path, files: Iterable[Path], subject: str) -> DiffSide:
    tables: dict[DiffMeasure, MeasureTable] = {}
    seen: dict[DiffMeasure, Path] = {}
    facts: dict[str, str] = {}
    for file in files:
        # The first folder below the path is named after the subject.
        if subject and file.relative_to(path).parts[:1] != (subject,):
            continue
        baseline = read_baseline(file)
        measure = DiffMeasure.of(baseline.query)
        table = MeasureTable(baseline.query["definition"], baseline.data, baseline.values)
        facts = _facts(Provenance(baseline.made_with, DataProvenance(fingerprint=baseline.data)))
        tables[measure] = _joined(tables.get(measure), table, seen.get(measure), file)
        seen[measure] = file
    if not tables:
        under = f" under '{subject}'" if subject else ""
        checkpoint = "; checkpoints are compared by `qsa compare`" if (path / "config.json").is_file() else ""
        raise SuiteError(f"{path}: there is no baseline in this folder{under}{checkpoint}")
    return DiffSide(shown_path(path), facts, tables)


def _joined(known: MeasureTable | None, new: MeasureTable, first: object, second: object) -> MeasureTable:
    """Join two tables of one measure, whose numbers must agree where the layers overlap."""
    if known is None:
        return new
    differ = [layer for layer in new.values if new.values[layer] != known.values.get(layer, new.values[layer])]
    if differ or (known.data, known.definition) != (new.data, new.definition):
        raise SuiteError(
            f"{first} and {second} hold the same measure with other numbers: "
            "name the folder of one model, or PATH::SUBJECT"
        )
    return MeasureTable(known.definition, known.data, {**known.values, **new.values})


def _reported(path: Path, subject: str) -> DiffSide:
    report = read_report(path)
    if report is None:
        raise SuiteError(f"{path}: neither a capture (.qsa), nor a baseline, nor a report.json of this program")
    try:  # the file may be of another version
        return _of_results(path, report["results"], subject)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # SuiteError is a ValueError too.
        if isinstance(error, QsaError):
            raise
        raise SuiteError(f"{path}: a damaged report.json: {type(error).__name__}: {error}") from None


def _of_results(path: Path, results: Iterable[Mapping[str, Any]], subject: str) -> DiffSide:
    measured = [result for result in results if result["rows"] and result["query"]]
    subjects = sorted({result["subject"] for result in measured})
    if (subject and subject not in subjects) or (not subject and len(subjects) > 1):
        raise SuiteError(f"{path}: pick a subject: {', '.join(f'{path}::{name}' for name in subjects)}")
    tables: dict[DiffMeasure, MeasureTable] = {}
    kept = [result for result in measured if subject in ("", result["subject"])]
    for result in kept:
        measure = DiffMeasure.of(result["query"])
        # A report has the worst row first, a diff the order of the model; `float` reads the NaN and Infinity
        # of strict JSON.
        values = {row["layer"]: float(row["value"]) for row in sorted(result["rows"], key=lambda row: row["depth"])}
        table = MeasureTable(result["query"]["definition"], Provenance.of(result["run"] or {}).data.fingerprint, values)
        tables[measure] = _joined(tables.get(measure), table, path, result["id"])
    if not tables:
        raise SuiteError(f"{path}: no assertion in it was measured")
    return DiffSide(shown_path(path), _facts(Provenance.of(kept[0]["run"] or {})), tables)


def compute_tables(capture: Capture, wanted: Iterable[tuple[str, str | None]]) -> dict[DiffMeasure, MeasureTable]:
    """Compute metrics with their default parameters at every site of a capture that has what they need."""
    tables: dict[DiffMeasure, MeasureTable] = {}
    for name, stat in dict.fromkeys(wanted):
        for site in dict.fromkeys(site for _, site in capture.sites):
            parameters: Parameters = {"stat": stat} if stat is not None else {}
            layers = [
                layer for layer, at in capture.sites if at == site and _can(capture, layer, site, name, parameters)
            ]
            if layers:
                series = capture.select(exactly(layers), site).series(name, **parameters)
                tables[DiffMeasure.of(series.query.plain())] = _table(capture, series)
    return tables


def compute_table(capture: Capture, measure: DiffMeasure, layers: Iterable[str]) -> MeasureTable | None:
    """Compute a measure from a capture, at those of the layers that it holds; None where it can't be computed."""
    held = [layer for layer in layers if (layer, measure.site) in capture.sites]
    if not held or measure.over or measure.metric not in METRICS:
        return None
    selection = capture.select(exactly(held), measure.site)  # type: ignore[arg-type]
    positions, reduce = measure.positions or "all", measure.reduce
    try:
        return _table(capture, selection.series(measure.metric, reduce, positions, **measure.arguments))  # type: ignore[arg-type]
    except QsaError:
        return None


def _table(capture: Capture, series: Series) -> MeasureTable:
    values = dict(zip(series.layers, series.values.tolist(), strict=True))
    return MeasureTable(series.query.definition, tokens_hash(capture), values)


def _can(capture: Capture, layer: str, site: Site, name: str, parameters: Parameters) -> bool:
    """Say whether a capture has at a layer what a metric needs."""
    metric, numbers = METRICS[name], capture.sites[layer, site]
    # Sinks belong to the whole capture, so that a single site need not have them.
    needs = metric.needs(site, "all", parameters) - {SINKS}
    # A site that no tensor reached would raise, where the other layers can still be compared.
    if not needs <= numbers.statistics or not numbers.populations or (site == "weight" and metric.tokenwise):
        return False
    return numbers.token_axis or not any(statistic.needs_tokens for statistic in needs)


def tokens_hash(capture: Capture) -> str | None:
    """Return the hash of a capture's tokens: of its provenance, or of the token ids where a library call made it."""
    noted = capture.provenance.data.fingerprint
    if noted or not capture.tokens:
        return noted
    digest = hashlib.sha256()
    for ids in capture.tokens:
        # With the lengths, else the same ids cut into other samples would have the same hash.
        digest.update(f"{len(ids)}:".encode() + ids.tobytes())
    return f"ids:{digest.hexdigest()}"

"""Checkpoints side by side: a row a metric and a column a checkpoint, then a row a layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..captures import Provenance
from ..common import AnomalyError, number
from ..metrics import CHECKPOINT, EVALS, METRICS
from .layer_table import Plain, is_out, state_of
from .report import PlainVerdict

BEST, OUT = "★", "◆"
"""The signs of the best value of a row, and of one out of bounds."""
SPEED = re.compile(
    r"throughput|tok(en)?s?_?(per|/)_?s|tpot|ttft|itl|latency|duration|speed|_ms\b|seconds", re.IGNORECASE
)
"""Names of what another machine measures otherwise."""
PROBLEMS = "problems"
"""The unit of static checks."""
UNDIRECTED = {("weight_gain", "factor")}
"""Metrics against the reference, with their `stat`, of which neither a high nor a low value is better."""


class Size(NamedTuple):
    """Of a checkpoint: the bytes of its tensors, and how many parameters they hold after unpacking."""

    stored: int
    parameters: int

    @property
    def bits(self) -> float:
        """The bits of all tensors over all parameters; NaN where there are none."""
        return 8 * self.stored / self.parameters if self.parameters else math.nan


@dataclass(frozen=True)
class Column:
    """A checkpoint. `results`: as `to_plain` gives them. `machine`: of its report, where speeds were measured.

    `notes`: what a reader must know of it, a line each. `stopped`: the kind of the error, where nothing was measured.
    """

    name: str
    results: Sequence[PlainVerdict]
    size: Size | None = None
    machine: str = ""
    notes: Sequence[str] = ()
    stopped: str = ""

    @property
    def title(self) -> str:
        """Which model ran, on what and against what, in one line."""
        runs = [Provenance.of(result.get("run") or {}) for result in self.results]
        told = max((run.summary(self.name) for run in runs), key=len, default="")
        return told or self.name


@dataclass(frozen=True)
class Cell:
    """A value of a checkpoint. `layer`: of which it is the worst. `interval`: 95 %. `allowed`: its bounds in words.

    `stopped`: the kind of the verdict where there is no value.
    """

    value: float = math.nan
    layer: str = ""
    interval: tuple[float, float] | None = None
    allowed: str = ""
    out: bool = False
    best: bool = False
    stopped: str = ""

    @property
    def text(self) -> str:
        """The value with its interval and signs: `0.012 ± 0.001 ★`."""
        if self.stopped:
            return self.stopped
        text = number(self.value).replace("inf", "∞")
        if self.interval and not math.isnan(self.interval[0]):
            low, high = self.interval
            half = max(self.value - low, high - self.value)
            even = abs((self.value - low) - (high - self.value)) <= 0.1 * half
            text += f" ± {half:.2g}" if even else f" [{number(low)}, {number(high)}]"
        return " ".join(filter(None, [text, BEST * self.best, OUT * self.out]))

    @property
    def hint(self) -> str:
        """What a reader sees who points at it."""
        return "; ".join(filter(None, [self.layer, self.allowed and f"allowed {self.allowed}"]))


Cells = tuple["Cell | None", ...]


@dataclass(frozen=True)
class Line:
    """A row of a table: a cell for each checkpoint, None where it has no such number.

    `unit`: of its values. `text`: its query and bound. `metric`: its name in the registry.
    """

    name: str
    cells: Cells
    unit: str = ""
    text: str = ""
    metric: str = ""

    @property
    def out(self) -> bool:
        """Whether one of the checkpoints is out of bounds."""
        return any(cell is not None and cell.out for cell in self.cells)

    @property
    def label(self) -> str:
        """The name with its unit."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


@dataclass(frozen=True)
class Layers:
    """What a metric finds at each layer, the worst first. `line`: its row in the table of metrics."""

    line: Line
    rows: Sequence[Line]


@dataclass(frozen=True)
class Comparison:
    """Checkpoints side by side. `lines`: a row a metric. `layers`: those of them that are of layers."""

    columns: Sequence[Column]
    lines: Sequence[Line]
    layers: Sequence[Layers]
    notes: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [column.name for column in self.columns]


@dataclass
class _Row:
    """The results of one assertion, by the index of the column."""

    id: str
    measure: str
    found: dict[int, PlainVerdict] = field(default_factory=dict)

    @property
    def query(self) -> Plain:
        return next((result["query"] for result in self.found.values() if result["query"]), {})


def comparison_of(columns: Sequence[Column], *, strict: bool = True) -> Comparison:
    """Put checkpoints side by side.

    `strict`: refuse numbers that can't be compared; else their rows are left out, and a note says why.

    Raises:
        AnomalyError: numbers were measured on other tokens, by another definition or against another reference.
    """
    lines, layers, notes = _sizes(columns), [], [note for column in columns for note in column.notes]
    if columns and all(column.stopped for column in columns):
        raise AnomalyError("; ".join(notes))
    for row in _rows_of(columns):
        if problem := _incomparable(row, columns):
            if strict and not problem.optional:
                raise AnomalyError(problem.text)
            notes.append(problem.text)
            continue
        line = _line(row, columns)
        lines.append(line)
        if len(by_layer := _by_layer(row, len(columns))) > (line.unit != PROBLEMS):
            layers.append(Layers(line, by_layer))
    return Comparison(columns, lines, layers, [*dict.fromkeys(notes), *_stopped(columns)])


def _rows_of(columns: Sequence[Column]) -> list[_Row]:
    """Join the results of the columns: by id and by what is measured, else by what is measured alone."""
    rows: list[_Row] = []
    for index, column in enumerate(columns):
        for result in column.results:
            measure = _measure(result["query"])
            free = [row for row in rows if index not in row.found]
            same = [row for row in free if row.id == result["id"] and measure in (row.measure, "")]
            if not same and measure:
                own = {(other["id"], _measure(other["query"])) for other in column.results}
                same = [row for row in free if row.measure == measure and (row.id, measure) not in own]
            row = same[0] if same else _Row(result["id"], measure)
            if not same:
                rows.append(row)
            row.measure = row.measure or measure
            row.found[index] = result
    return rows


def _measure(query: Plain) -> str:
    """Return what a query measures, whatever its layers and the version of its definition; empty for an empty one."""
    keys = ("metric", "site", "parameters", "positions", "reduce", "over")
    return json.dumps([query.get(key) for key in keys], sort_keys=True) if query else ""


class _Problem(NamedTuple):
    """Why a row can't be compared. `optional`: it is left out, whoever asks."""

    text: str
    optional: bool = False


def _incomparable(row: _Row, columns: Sequence[Column]) -> _Problem | None:
    queries = {index: result["query"] for index, result in row.found.items() if result["rows"]}
    runs = {index: Provenance.of(row.found[index].get("run") or {}) for index in queries}
    if odd := _two({index: query.get("definition") for index, query in queries.items()}, columns):
        return _Problem(f"{row.id} was measured by another definition: {odd}; make both with the same version")
    site, metric = row.query.get("site"), METRICS.get(row.query.get("metric", ""))
    if site == EVALS:
        machines = {columns[index].machine for index in queries}
        named = f"{row.id} {json.dumps(row.query.get('parameters'))} {row.query.get('layers')}"
        if SPEED.search(named) and (len(machines) > 1 or machines == {""}):
            return _Problem(f"{row.id}: speeds are compared only of reports of one machine", optional=True)
        return None
    if site not in ("weight", CHECKPOINT):
        odd = _two({index: run.data.fingerprint for index, run in runs.items()}, columns)
        if odd:
            advice = "run all over the same data, tokenizer, seed, num_samples and seq_len"
            return _Problem(f"{row.id} was measured on other tokens: {odd}; {advice}")
    if metric is not None and metric.against:
        known = {i: run.reference.weights or run.reference.path for i, run in runs.items() if run.reference}
        hashed = {i: name for i, name in known.items() if name.startswith("sha256:")}
        if odd := _two(hashed if hashed else known, columns):
            return _Problem(f"{row.id} was measured against another reference: {odd}; compare with one original")
    return None


def _two(values: Mapping[int, str | None], columns: Sequence[Column]) -> str:
    """Name two columns whose values differ; empty where all that are known are equal."""
    known = [(index, value) for index, value in values.items() if value]
    other = next(((index, value) for index, value in known if value != known[0][1]), None)
    if other is None:
        return ""
    return " and ".join(
        f"{columns[index].name} ({value.partition(':')[2][:12] or value})" for index, value in (known[0], other)
    )


def _sizes(columns: Sequence[Column]) -> list[Line]:
    """Return the rows of what the files take; none where no size is known."""
    sizes = [column.size for column in columns]
    if not any(sizes):
        return []
    stored = [Cell(size.stored / 1e6) if size else None for size in sizes]
    bits = [Cell(size.bits) if size and size.parameters else None for size in sizes]
    return [
        Line("size", _marked(stored, abs), "MB", "all tensors in the files"),
        Line("bits a weight", _marked(bits, abs), "", "bits of all tensors over all parameters, embeddings among them"),
    ]


Better = Callable[[float], float]
"""Smaller for a better value."""


def better_of(query: Plain, rows: Iterable[Plain]) -> Better | None:
    """Return what is smaller for a better value of a query; None where neither a high nor a low one is better.

    Where the metric doesn't say, its bounds do: what has a `max` only is better low.
    """
    metric, stat = METRICS.get(query.get("metric", "")), (query.get("parameters") or {}).get("stat")
    if query.get("site") == CHECKPOINT:
        return abs
    if metric is not None and (metric.against or metric.per == "logits") and (metric.name, stat) not in UNDIRECTED:
        if (perfect := metric.best(query.get("parameters") or {})) is not None:
            return lambda value: abs(value - perfect)
        return (lambda value: -value) if metric.worst == "lowest" else abs
    ends = {(row.get("low") is not None, row.get("high") is not None) for row in rows if row.get("baseline") is None}
    if ends == {(False, True)}:
        return lambda value: value
    return (lambda value: -value) if ends == {(True, False)} else None


def _marked(cells: Sequence[Cell | None], better: Better | None) -> Cells:
    """Mark the best of several values; those that read the same are all the best, and of equal ones none is."""
    known = [cell for cell in cells if cell is not None and not math.isnan(cell.value)]
    if better is None or len(known) < 2 or len({number(cell.value) for cell in known}) == 1:
        return tuple(cells)
    best = number(min((cell.value for cell in known), key=better))
    return tuple(cell and replace(cell, best=number(cell.value) == best) for cell in cells)


def _line(row: _Row, columns: Sequence[Column]) -> Line:
    """Return a metric's row: one number of the whole model, the sum of problems, or the worst layer of each."""
    query = row.query
    better = better_of(query, [each for result in row.found.values() for each in result["rows"]])
    cells = [
        _of_model(row.found[index], better)
        if index in row.found
        else Cell(stopped=column.stopped)
        if column.stopped
        else None
        for index, column in enumerate(columns)
    ]
    bound = next((result["bound"] for result in row.found.values() if result.get("bound")), "")
    text = "; ".join(filter(None, [query.get("text", ""), bound]))
    return Line(row.id, _marked(cells, better), _unit_of(query), text, str(query.get("metric", "")))


def _unit_of(query: Plain) -> str:
    return PROBLEMS if query.get("site") == CHECKPOINT else str(query.get("unit") or "")


def _of_model(result: PlainVerdict, better: Better | None) -> Cell | None:
    rows = [row for row in result["rows"] if not math.isnan(float(row["value"]))]
    if not rows:
        return Cell(stopped=str(result["kind"])) if result["failed"] else None
    out = any(map(is_out, rows))
    if result["query"].get("site") == CHECKPOINT:
        return Cell(sum(float(row["value"]) for row in rows), out=out)
    metric = METRICS.get(result["query"].get("metric", ""))
    lowest = metric is not None and metric.worst == "lowest"
    badness = better or ((lambda value: -value) if lowest else (lambda value: value))
    worst = max(rows, key=lambda row: (is_out(row), badness(float(row["value"]))))
    return replace(_cell(worst), layer=worst["layer"] if len(rows) > 1 else "", out=out)


def _cell(row: Plain) -> Cell:
    ends = row.get("interval")
    return Cell(
        float(row["value"]),
        interval=(float(ends[0]), float(ends[1])) if ends else None,
        allowed=_allowed(row),
        out=state_of(row) == "out",
    )


def _allowed(row: Plain) -> str:
    low, high = (None if row.get(end) is None else number(float(row[end])) for end in ("low", "high"))
    if low is not None and high is not None:
        return f"= {low}" if low == high else f"{low} … {high}"
    return f"≥ {low}" if low is not None else f"≤ {high}" if high is not None else ""


def _by_layer(row: _Row, count: int) -> list[Line]:
    """Return a row for each layer: those out of bounds first, then the worst; in the model's order without a worst."""
    tables = [
        {each["layer"]: each for each in row.found[index]["rows"]} if index in row.found else {}
        for index in range(count)
    ]
    ordered = sorted((each for table in tables for each in table.values()), key=lambda each: each["depth"])
    names = list(dict.fromkeys(each["layer"] for each in ordered))
    better = better_of(row.query, ordered)
    lines = []
    for name in names:
        cells = [_cell(table[name]) if name in table else None for table in tables]
        # A sound layer has no problem to list.
        if row.query.get("site") != CHECKPOINT or any(cell and cell.value for cell in cells):
            lines.append(Line(name, _marked(cells, better)))
    if better is None:
        return sorted(lines, key=lambda line: not line.out)
    return sorted(lines, key=lambda line: _rank(line, better))


def _rank(line: Line, better: Better) -> tuple[bool, float]:
    known = [cell for cell in line.cells if cell is not None]
    return not line.out, -max(better(cell.value) for cell in known)


def _stopped(columns: Sequence[Column]) -> Iterator[str]:
    """Yield a line for each reason why a checkpoint has no number, whatever it stopped."""
    for column in columns:
        reasons: dict[tuple[str, str], list[str]] = {}
        for result in column.results:
            if result["failed"] and not result["rows"]:
                reasons.setdefault((result["kind"], result["headline"]), []).append(result["id"])
        for (kind, why), ids in reasons.items():
            yield f"{column.name}: {kind} {', '.join(ids)}: {why}"

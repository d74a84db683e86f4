"""The table of a model card: what quantization did to one checkpoint, and how it was measured."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from ..captures import ModelProvenance, Provenance
from ..common import code_span, escaped, markdown_table, number, short_hash
from ..metrics import METRICS
from .comparison import OUT, Cell, Column, Comparison, Line, Size

WORDS = {
    "size": "Size of the tensors",
    "bits a weight": "Bits a weight, embeddings included",
    "kl_divergence": "KL divergence from the original's next-token probabilities",
    "margin_ratio": "Share of the margin of clear decisions that is left, median",
    "overlap": "Overlap of the next-token probabilities with the original's",
    "ln_ppl_ratio": "ln(perplexity / perplexity of the original)",
    "perplexity": "Perplexity",
    "sqnr_of_blocks": "SQNR of the blocks' outputs, the worst block",
    "sqnr_of_weights": "SQNR of the weights, the worst layer",
}
"""What `qsa compare` measures without a suite, for readers of a model card."""
OWN = ("--qsa-cache", "-o", "--output", "--qsa-allow-path")
"""Options, each with a value, that mean something on one machine alone."""
BASIC = ("torch", "transformers", "pytest-qsa")
"""The versions that stand in a card."""


def model_card(comparison: Comparison, command: str, original: Size | None = None) -> str:
    """Return Markdown for a model card.

    `comparison`: of one column. `command`: that made it. `original`: the size of the reference's files, where known.
    """
    (column,) = comparison.columns
    bounded = any(line.cells[0] and line.cells[0].allowed for line in comparison.lines)
    heads = ["metric", "value", "of the original", *["allowed"] * bounded]
    known = _of_original(comparison.lines, original)
    rows = [_row(line, known) for line in comparison.lines]
    if bounded:
        allowed = [cell.allowed if (cell := line.cells[0]) else "" for line in comparison.lines]
        rows = [[*row, bound] for row, bound in zip(rows, allowed, strict=True)]
    table = markdown_table([heads, *rows], plain=range(len(heads)))
    lines = [f"### Quantization of {escaped(column.name)}", "", *table, "", " ".join(_sentences(column)), ""]
    lines += [f"Made by {code_span(_portable(command))}.", *(f"\n{escaped(note)}" for note in comparison.notes)]
    return "\n".join(lines) + "\n"


def _of_original(lines: Sequence[Line], size: Size | None) -> dict[str, float]:
    """Return what is known of the original, by the name of a line: its size, and its perplexity."""
    known = {line.metric or line.name: line.cells[0].value for line in lines if line.cells[0] is not None}
    found = {"size": size.stored / 1e6, "bits a weight": size.bits} if size is not None else {}
    if {"perplexity", "ln_ppl_ratio"} <= known.keys():
        found["perplexity"] = known["perplexity"] / math.exp(known["ln_ppl_ratio"])
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _row(line: Line, known: Mapping[str, float]) -> list[str]:
    cell, name = line.cells[0], line.metric or line.name
    original = f"{number(known[name])} {line.unit}".rstrip() if name in known else _lossless(line)
    return [WORDS.get(line.name, line.name), "–" if cell is None else _value(cell, line.unit), original]


def _value(cell: Cell, unit: str) -> str:
    if cell.stopped:
        return cell.stopped
    at = f" ({cell.layer})" if cell.layer else ""
    return f"{cell.text.removesuffix(f' {OUT}')} {unit}".rstrip() + at + f" {OUT}" * cell.out


def _lossless(line: Line) -> str:
    """Return what the metric is where nothing was lost; empty where that isn't known."""
    metric = METRICS.get(line.metric)
    if metric is None or not metric.against:
        return ""
    if metric.unit == "dB":
        return "∞ dB"
    if metric.perfect is not None:
        best = metric.best({})  # None where it depends on the stat
        return "" if best is None else number(best)
    return number(1.0 if metric.worst == "lowest" else 0.0)


def _sentences(column: Column) -> Iterator[str]:
    """Yield how it was measured; of paths only the last part, which other machines share."""
    runs = [Provenance.of(result.get("run") or {}) for result in column.results]
    run = max(runs, key=lambda each: len(each.summary(column.name)), default=Provenance())
    model = run.model
    against = f" against {_named(run.reference)}" if run.reference and run.reference.path else ""
    data = f" on {escaped(str(run.data))}" if str(run.data) else ""
    yield f"Measured{against}{data}."
    if run.execution:
        yield f"Executed {run.run_as} in {model.dtype} on {model.device}."
    if model.weights:
        yield f"Weights: {short_hash(model.weights)}."
    versions = {"pytest-qsa": version("pytest-qsa")} | dict(model.versions or {})
    yield f"Versions: {', '.join(f'{name} {text}' for name, text in sorted(versions.items()) if name in BASIC)}."
    yield "Intervals are 95 %."


def _named(model: ModelProvenance) -> str:
    name = Path(model.path).name if Path(model.path).exists() or Path(model.path).is_absolute() else model.path
    return code_span(name) + (f" ({short_hash(model.weights)})" if model.weights else "")


def _portable(command: str) -> str:
    """Return a command as others can type it: without this machine's folders, cache and output."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        name, equals, _ = word.partition("=")
        if name in OWN:
            if not equals:
                next(words, None)
        elif word != "--qsa-no-cache":
            kept.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(kept)

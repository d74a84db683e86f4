"""A result as a card of the page, and the layers of all cards in one table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .html import PagePicture
from .report import PlainVerdict

Plain = Mapping[str, Any]
"""A part of a result: a row, a token."""
Card = Plain
"""A result with what the page shows of it."""
Variables = dict[str, Any]
"""Variables of a template."""
MOST_STRIPS = 16
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_FIELDS = ("value", "low", "high", "baseline", "reference", "used", "excess", "waived")
_PLOTS = {"value": "Value by layer", "outliers": "Outlier tokens", "magnitude": "Magnitudes by layer"}
_POSITIONS = {
    "all": "all positions, sinks included",
    "no_sink": "positions without the attention sinks",
    "sink": "the attention sinks only",
}  # fmt: skip
_COLUMNS = ("low", "high", "baseline", "reference", "excess", "used")
_EMPTY: Variables = {
    "id": "", "subject": "", "kind": "INFRA", "headline": "", "bound": "", "where": "", "reason": None, "sinks": "",
    "since": "", "origin": {}, "hints": [], "findings": [], "command": "", "accept": "", "failed": False,
}  # fmt: skip


def is_out(row: Plain) -> bool:
    """Say whether a layer is out of bounds with no waiver that covers it."""
    return bool(row.get("excess")) and not row.get("waived")


def kind_of_layer(layer: str, numbers: int = 1) -> str:
    """Return a layer's name with its first numbers as `*`, all of them for 0: `model.layers.*.mlp.down_proj`."""
    return _NUMBER.sub("*", layer, count=numbers)


def worst_first(results: Iterable[PlainVerdict], ranks: Mapping[str, int]) -> list[PlainVerdict]:
    """Sort by the rank of the kind, and within a kind by how much of the budget the worst layer uses."""
    return sorted(results, key=lambda result: (ranks.get(result.get("kind", "INFRA"), 0), -_worst_used(result)))


def _worst_used(result: PlainVerdict) -> float:
    used = (row.get("used") for row in result.get("rows", ()))
    return max((value for value in used if isinstance(value, float | int) and not math.isnan(value)), default=0.0)


def card_of(result: PlainVerdict, index: int) -> Card:
    """Return a result with what the template shows of it; keys that the result lacks are empty."""
    rows = sorted(result.get("rows") or (), key=lambda row: row["depth"])
    used = _worst_used(result)
    measured = any(row.get("used") is not None for row in rows)
    return {
        **_EMPTY,
        **result,
        "anchor": f"a{index}",
        "rows": rows,
        "query": result.get("query") or {},
        "run": result.get("run") or {},
        "used": used if measured else None,
        "strip": list(strip_of(rows)),
        "evidence": grouped_tokens(result.get("evidence") or ()),
        "positions": positions_text(result.get("positions")),
        "plots": list(plots_of(result.get("artefacts") or {})),
        "out": sum(map(is_out, rows)),
        "columns": [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)],
    }


def strip_of(rows: Sequence[Plain]) -> Iterator[Variables]:
    """Yield a cell of the heat strip for each layer: its heat from 0 to 1, by budget used, else by value."""
    values = [row["value"] for row in rows if math.isfinite(row["value"])]
    low, high = min(values, default=0.0), max(values, default=0.0)
    for row in rows:
        heat = row.get("used")
        if heat is None:
            heat = (row["value"] - low) / (high - low) if high > low else 0.0
        heat = min(max(heat, 0.0), 1.0) if not math.isnan(heat) else 1.0
        yield {"layer": row["layer"], "value": row["value"], "heat": round(heat, 3), "out": is_out(row)}


def grouped_tokens(evidence: Sequence[Plain]) -> list[Variables]:
    """Join the entries of one token at several layers; the first one, which is the strongest, stands for all."""
    groups: dict[tuple[int, int, str], Variables] = {}
    for token in evidence:
        key = (token["sample"], token["position"], token["text"])
        groups.setdefault(key, {**token, "also": []})
        if groups[key]["layer"] != token["layer"]:
            groups[key]["also"].append(token["layer"])
    return list(groups.values())


def positions_text(positions: str | None) -> str:
    """Say in words which positions counted."""
    if not positions:
        return ""
    skipped = positions.partition("skip_first:")[2]
    return f"all positions but the first {skipped}" if skipped else _POSITIONS.get(positions, positions)


def plots_of(artefacts: Mapping[str, str]) -> Iterator[PagePicture]:
    """Yield the pictures with their content; one that is gone has none."""
    for title, path in artefacts.items():
        if path.endswith(".png"):
            try:
                png = Path(path).read_bytes()
            except OSError:
                png = b""
            yield PagePicture(_PLOTS.get(title, title), path, png)


def layer_table(cards: Sequence[Card]) -> Variables:
    """Join the rows of all cards by layer, sorted by name and number.

    Returns `columns`, an assertion each; `rows`, with the layer, its cells (one for each column, or None), its worst
    share of the budget, and its histograms; and `strips`, the indices of rows by kind of layer.
    """
    # Tasks of an eval and the many experts of a layer would fill the table; they have the table of their own card.
    layered = [card for card in cards if card["query"].get("of", "layers") == "layers"]
    columns = [card for card in layered if card["rows"] and not card["query"].get("over")]
    rows: dict[tuple[str, str], Variables] = {}

    def entry_of(card: Card, layer: str) -> Variables:
        empty = {"layer": layer, "cells": [None] * len(columns), "histograms": []}
        return rows.setdefault((card["subject"], layer), empty)

    for index, card in enumerate(columns):
        for row in card["rows"]:
            cell = {name: row[name] for name in _FIELDS if row.get(name) is not None}
            entry_of(card, row["layer"])["cells"][index] = cell
    for card in cards:
        site = card["query"].get("site", "")
        for layer, histograms in (card.get("histograms") or {}).items():
            entry = entry_of(card, layer)
            known = {(each["site"], each["of"]) for each in entry["histograms"]}
            entry["histograms"] += [{"site": site, **each} for each in histograms if (site, each["of"]) not in known]
    several = len({subject for subject, _ in rows}) > 1
    ordered = sorted(rows, key=lambda key: (key[0], _by_number(key[1])))
    finished = [_finished(rows[key], key[0] if several else "") for key in ordered]
    return {
        "columns": [_column(card, several=several) for card in columns],
        "rows": finished,
        "strips": strips_of(finished),
    }


def strips_of(rows: Sequence[Plain]) -> list[Variables]:
    """Group rows into a few heat strips over depth: those of one kind, `model.layers.*.mlp.down_proj`, stand together.

    Experts and other second numbers share a strip where each by itself would make too many.
    """
    for count in (1, 0):
        strips: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            kind = kind_of_layer(row["layer"], count)
            strips.setdefault(f"{row['subject']} {kind}".strip(), []).append(index)
        if len(strips) <= MOST_STRIPS:
            return [{"name": name, "rows": members} for name, members in strips.items()]
    return [{"name": "", "rows": [*range(len(rows))]}]


def _column(card: Card, *, several: bool) -> Variables:
    return {
        "id": card["id"],
        "subject": card["subject"] if several else "",
        "anchor": card["anchor"],
        "kind": card["kind"],
        "unit": card["query"].get("unit", ""),
        "site": card["query"].get("site", ""),
        "text": card["query"].get("text", ""),
        "bound": card["bound"],
        "threshold": (card["query"].get("parameters") or {}).get("threshold"),
    }


def _finished(entry: Variables, subject: str) -> Variables:
    cells = [cell for cell in entry["cells"] if cell]
    used = [cell["used"] for cell in cells if "used" in cell and not math.isnan(cell["used"])]
    worst = max(used, default=None)
    for cell in cells:
        cell["heat"] = round(min(max(cell.get("used", 0.0), 0.0), 1.0), 3)
        cell["out"] = is_out(cell)
    return {
        **entry,
        "subject": subject,
        "used": worst,
        "out": any(cell["out"] for cell in cells),
        "heat": round(min(max(worst or 0.0, 0.0), 1.0), 3),
    }


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """Return a key that puts `layers.9` before `layers.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]

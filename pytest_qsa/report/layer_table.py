"""All layers of a report in one table: a row a layer, a column an assertion, and strips over depth for each kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..checkpoint import kind_of, natural

Plain = Mapping[str, Any]
"""A part of a result: a row, a token."""
Card = Plain
"""A result with what the page shows of it."""
Variables = dict[str, Any]
"""Variables of a template."""
MOST_KINDS = 24
"""Of more kinds than this, those that differ in their second number alone, experts say, are one."""
OTHERS = "others"
"""The kind of all layers that are the only ones of theirs: embeddings, the last norm, files."""
NEAR = 0.8
"""From this share of what is allowed on, a layer within its bounds is shown in amber."""
_FIELDS = ("value", "low", "high", "baseline", "reference", "used", "excess", "waived")


def is_out(row: Plain) -> bool:
    """Say whether a layer is out of bounds with no waiver that covers it."""
    return bool(row.get("excess")) and not row.get("waived")


def state_of(row: Plain) -> str:
    """Return the class of a layer on the page: `out`, `near` from 80 % of what is allowed on, or nothing.

    What has to equal a number is not near to a limit where it does.
    """
    if is_out(row):
        return "out"
    used, exact = row.get("used"), row.get("low") is not None and row.get("low") == row.get("high")
    return "near" if used is not None and used >= NEAR and not exact else ""


def heat_of(used: float | None) -> float:
    """Return a share of what is allowed as a heat from 0 to 1; NaN must not look harmless."""
    if used is None:
        return 0.0
    return round(min(max(used, 0.0), 1.0), 3) if not math.isnan(used) else 1.0


def layer_table(cards: Sequence[Card]) -> Variables:
    """Join the rows of all cards by layer, in the order of names and numbers.

    Returns `columns`, an assertion of a subject each; `kinds`, the names of the kinds of layers; `rows`, each with the
    layer, the index of its kind, its cells (one for each column, or None), its worst share of the budget, and its
    histograms; `strips`, which `strips_of` makes; and `order`, the indices of rows, the worst first.
    """
    # Tasks of an eval and the many experts of a layer would fill the table; they have the table of their own card.
    layered = [card for card in cards if card["query"].get("of", "layers") == "layers"]
    # One number over all layers (`over`) has no cell at a layer.
    columns = [card for card in layered if card["rows"] and not card["query"].get("over")]
    several = len({card["subject"] for card in cards}) > 1
    rows: dict[str, Variables] = {}

    def entry_of(layer: str) -> Variables:
        return rows.setdefault(layer, {"layer": layer, "cells": [None] * len(columns), "histograms": []})

    for index, card in enumerate(columns):
        for row in card["rows"]:
            cell = {name: _rounded(row[name]) for name in _FIELDS if row.get(name) is not None}
            shown = {"heat": heat_of(cell.get("used")), "out": is_out(row), "state": state_of(row)}
            entry_of(row["layer"])["cells"][index] = {**cell, **shown}
    for card in cards:
        for layer, histograms in (card.get("histograms") or {}).items():
            entry = entry_of(layer)["histograms"]
            # Several assertions on one site bring the same histograms.
            entry += _new_histograms(entry, card, histograms, card["subject"] if several else "")
    kinds = _kinds([*rows])
    finished = [_finished(rows[layer], kinds[layer]) for layer in sorted(rows, key=natural)]
    names = sorted({*kinds.values()}, key=natural)
    return {
        "columns": [_column(card, several=several) for card in columns],
        "kinds": names,
        "rows": [{**row, "kind": names.index(row["kind"])} for row in finished],
        "strips": strips_of(finished, columns, several=several),
        "order": sorted(range(len(finished)), key=lambda index: _badness(finished[index])),
    }


def _rounded(value: Any) -> Any:
    """Keep seven digits of a number, of which the page shows four: the others are a third of a page of many layers."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _new_histograms(known: Iterable[Plain], card: Card, histograms: Iterable[Plain], subject: str) -> Iterator[Plain]:
    site = card["query"].get("site", "")
    seen = {(each["site"], each["of"], each["subject"], each.get("whose")) for each in known}
    for each in histograms:
        if (site, each["of"], subject, each.get("whose")) not in seen:
            yield {"site": site, "subject": subject, **each}


def _kinds(layers: Sequence[str]) -> dict[str, str]:
    """Return the kind of each layer, `model.layers.*.mlp.down_proj`, so that there are at most `MOST_KINDS`."""
    for count in (1, 0):
        kinds = {layer: kind_of(layer, count) for layer in layers}
        members = Counter(kinds.values())
        if len(members) > 1:
            kinds = {layer: kind if members[kind] > 1 else OTHERS for layer, kind in kinds.items()}
        if len({*kinds.values()}) <= MOST_KINDS:
            return kinds
    return dict.fromkeys(layers, "")


def _badness(row: Plain) -> tuple[bool, float]:
    return (not row["out"], -(row["used"] if row["used"] is not None else -1.0))


def strips_of(rows: Sequence[Plain], columns: Sequence[Card], *, several: bool) -> list[Variables]:
    """Return a heat strip over depth for each kind of layer and each subject, those with a finding first.

    A strip has `name`, `subject` (where there are several), `out` and `near`, how many of its layers are so, and
    `cells`, each with the index of its row, its `heat` from 0 to 1, its `state` and its `used`.
    """
    strips: dict[tuple[str, str], list[Variables]] = {}
    for subject in dict.fromkeys(card["subject"] for card in columns):
        own = [index for index, card in enumerate(columns) if card["subject"] == subject]
        for index, row in enumerate(rows):
            cells = [cell for cell in map(row["cells"].__getitem__, own) if cell]
            if not cells:
                continue
            used = _worst(cells)
            cell = {"row": index, "used": used, "heat": heat_of(used), "state": _state(cells)}
            strips.setdefault((row["kind"], subject), []).append(cell)
    found = []
    for (kind, subject), cells in strips.items():
        counts = {state: sum(cell["state"] == state for cell in cells) for state in ("out", "near")}
        state = "out" if counts["out"] else "near" if counts["near"] else ""
        found.append({"name": kind, "subject": subject if several else "", "cells": cells, "state": state, **counts})
    return sorted(found, key=lambda strip: (-strip["out"], -strip["near"]))


def _worst(cells: Sequence[Plain]) -> float | None:
    # Every comparison with NaN is false, so that `max` would depend on the order.
    return max((cell["used"] for cell in cells if "used" in cell and not math.isnan(cell["used"])), default=None)


def _state(cells: Sequence[Plain]) -> str:
    states = {cell["state"] for cell in cells}
    return next((state for state in ("out", "near") if state in states), "")


def _column(card: Card, *, several: bool) -> Variables:
    return {
        "id": card["id"],
        "subject": card["subject"] if several else "",
        "anchor": card["anchor"],
        "kind": card["kind"],
        "metric": card["query"].get("metric", ""),
        "unit": card["query"].get("unit", ""),
        "site": card["query"].get("site", ""),
        "text": card["query"].get("text", ""),
        "bound": card["bound"],
        "threshold": (card["query"].get("parameters") or {}).get("threshold"),
    }


def _finished(entry: Variables, kind: str) -> Variables:
    cells = [cell for cell in entry["cells"] if cell]
    used, state = _worst(cells), _state(cells)
    return {**entry, "kind": kind, "used": used, "out": state == "out", "heat": heat_of(used), "state": state}

"""All layers of a report in one table: layer × assertion, with what a click on a layer shows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MOST_STRIPS = 16
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_FIELDS = ("value", "low", "high", "baseline", "reference", "used", "excess", "waived")


def is_out(row: Mapping[str, Any]) -> bool:
    """Say whether a layer is out of bounds with no waiver that covers it."""
    return bool(row.get("excess")) and not row.get("waived")


def layer_table(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the rows of all cards by layer, in the order of their names, numbers by size.

    Returns `columns` (an assertion each), `rows`: layer, worst share used, out, cells (one a column, or None), and
    `histograms`: those of its sites; and `strips`: the rows by kind of layer.
    """
    shown = [card for card in cards if card["rows"] and not card["query"].get("over") and _of_layers(card)]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for index, card in enumerate(shown):
        for row in card["rows"]:
            key = (card["subject"], row["layer"])
            entry = rows.setdefault(key, {"layer": row["layer"], "cells": [None] * len(shown), "histograms": []})
            entry["cells"][index] = {name: row[name] for name in _FIELDS if row.get(name) is not None}
    for card in cards:
        site = card["query"].get("site", "")
        for layer, histograms in (card.get("histograms") or {}).items():
            entry = rows.setdefault(
                (card["subject"], layer), {"layer": layer, "cells": [None] * len(shown), "histograms": []}
            )
            known = {(each["site"], each["of"]) for each in entry["histograms"]}
            new = [{"site": site, **each} for each in histograms if (site, each["of"]) not in known]
            entry["histograms"] += new
    ordered = sorted(rows, key=lambda key: (key[0], _by_number(key[1])))
    subjects = {subject for subject, _ in rows}
    finished = [_finished(rows[key], key[0] if len(subjects) > 1 else "") for key in ordered]
    return {
        "columns": [_column(card, several=len(subjects) > 1) for card in shown],
        "rows": finished,
        "strips": strips_of(finished),
    }


def _of_layers(card: Mapping[str, Any]) -> bool:
    """Say whether an assertion is about layers: tasks and the many experts of a layer have their card's own table."""
    return bool(card["query"].get("of", "layers") == "layers")


def strips_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Group rows into a few heat strips over depth: those of one kind, `model.layers.*.mlp.down_proj`, stand together.

    Experts and other second numbers share a strip where each by itself would make too many.
    """
    for count in (1, 0):
        strips: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            kind = _NUMBER.sub("*", row["layer"], count=count)
            strips.setdefault(f"{row['subject']} {kind}".strip(), []).append(index)
        if len(strips) <= MOST_STRIPS:
            return [{"name": name, "rows": members} for name, members in strips.items()]
    return [{"name": "", "rows": [*range(len(rows))]}]


def _column(card: Mapping[str, Any], *, several: bool) -> dict[str, Any]:
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


def _finished(entry: dict[str, Any], subject: str) -> dict[str, Any]:
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

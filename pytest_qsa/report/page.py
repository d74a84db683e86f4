"""The HTML page: results → one self-contained file. The template decides the looks, this module order and words."""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..captures import Provenance
from .html import flattened, render
from .page_layers import is_out, layer_table

KINDS = ("REGRESSION", "ANOMALOUS", "INFRA", "WARNED", "PASSED")
"""The kinds of verdict, worst first."""
MEANING = {
    "REGRESSION": "a bound was exceeded",
    "ANOMALOUS": "nothing sound was seen",
    "INFRA": "could not load, fetch or fit",
    "WARNED": "a bound was exceeded; the suite only warns, or a waiver covers it",
    "PASSED": "within what is allowed",
}
_PLOTS = {"value": "Value by layer", "outliers": "Outlier tokens", "magnitude": "Magnitudes by layer"}
_POSITIONS = {
    "all": "all positions, sinks included",
    "no_sink": "positions without the attention sinks",
    "sink": "the attention sinks only",
}  # fmt: skip
_COLUMNS = ("low", "high", "baseline", "reference", "excess", "used")
_EMPTY: dict[str, Any] = {
    "id": "", "subject": "", "kind": "INFRA", "headline": "", "bound": "", "where": "", "reason": None, "sinks": "",
    "since": "", "origin": {}, "hints": [], "findings": [], "command": "", "accept": "", "failed": False,
}  # fmt: skip


def render_page(results: Sequence[Mapping[str, Any]], session: Mapping[str, Any]) -> str:
    """Return the page of a session's results, which are as `to_plain` gives them."""
    cards = [card_of(result, index) for index, result in enumerate(worst_first(results))]
    counts = Counter(card["kind"] for card in cards)
    definitions = sorted({card["query"]["definition"] for card in cards if card["query"].get("definition")})
    return render(
        "report.html.j2", cards=cards, session=session, meaning=MEANING, overall=overall(cards),
        counts={kind: counts[kind] for kind in KINDS if counts[kind]}, subjects=subjects_of(cards),
        table=layer_table(cards), definitions=definitions,
    )  # fmt: skip


def worst_first(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sort by kind, and within a kind by how much of the budget the worst layer uses."""
    return sorted(results, key=lambda result: (_rank(result.get("kind", "INFRA")), -_worst_used(result)))


def _rank(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else 0


def _worst_used(result: Mapping[str, Any]) -> float:
    used = (row.get("used") for row in result.get("rows", ()))
    return max((value for value in used if isinstance(value, float | int) and not math.isnan(value)), default=0.0)


def overall(cards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the verdict over all: its kind and the sentence at the top of the page."""
    failed = sum(card["failed"] for card in cards)
    warned = sum(card["kind"] == "WARNED" for card in cards)
    noun = "assertion" if len(cards) == 1 else "assertions"
    if not cards:
        return {"kind": "ANOMALOUS", "text": "No assertion was judged"}
    if failed:
        return {"kind": cards[0]["kind"], "text": f"{failed} of {len(cards)} {noun} failed"}
    text = f"All {len(cards)} assertions hold" if len(cards) > 1 else "The assertion holds"
    return {"kind": "WARNED" if warned else "PASSED", "text": text + (f", {warned} with a warning" if warned else "")}


def card_of(result: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return all that the template shows of one result; keys that a result lacks are empty."""
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


def strip_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a cell of the heat strip for each layer: its heat from 0 to 1, by budget used, else by value."""
    values = [row["value"] for row in rows if math.isfinite(row["value"])]
    low, high = min(values, default=0.0), max(values, default=0.0)
    for row in rows:
        heat = row.get("used")
        if heat is None:
            heat = (row["value"] - low) / (high - low) if high > low else 0.0
        heat = min(max(heat, 0.0), 1.0) if not math.isnan(heat) else 1.0
        yield {"layer": row["layer"], "value": row["value"], "heat": round(heat, 3), "out": is_out(row)}


def grouped_tokens(evidence: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join the sightings of one token at several layers; the strongest speaks for all."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
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


def plots_of(artefacts: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the pictures with their content; a picture that isn't there any more says so."""
    for title, path in artefacts.items():
        if not path.endswith(".png"):
            continue
        try:
            picture = Path(path).read_bytes()
        except OSError:
            picture = b""
        width, height = struct.unpack(">II", picture[16:24]) if len(picture) > 24 else (0, 0)
        data = base64.b64encode(picture).decode("ascii")
        yield {"title": _PLOTS.get(title, title), "path": path, "data": data, "width": width, "height": height}


def subjects_of(cards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was tested on what, one entry for each distinct run: the main facts, and all of it, flattened."""
    found: dict[str, dict[str, Any]] = {}
    for card in cards:
        provenance = Provenance.of(card["run"])
        flat = {key: text for key, text in flattened(card["run"]) if not key.startswith(("evals.", "execution."))}
        if provenance.execution:
            flat["model.executed_as"] = provenance.executed_as
        empty = {"name": card["subject"], "all": flat, "facts": provenance.facts(), "cards": 0, "failed": 0}
        entry = found.setdefault(repr((card["subject"], flat)), empty)
        entry["cards"] += 1
        entry["failed"] += card["failed"]

    def place(entry: Mapping[str, Any]) -> tuple[str, str]:
        return entry["name"], entry["all"].get("model.path", "")

    ran = {place(entry): entry for entry in found.values() if "model.class" in entry["all"]}
    entries = []
    for entry in found.values():
        whole = ran.get(place(entry), entry)
        if whole is entry or "model.class" in entry["all"]:
            entries.append(entry)
        else:  # what read the files of a model, or could not run it, beside what ran it
            whole["all"] = {**entry["all"], **whole["all"]}
            whole["cards"] += entry["cards"]
            whole["failed"] += entry["failed"]
    told = {entry["name"] for entry in entries if entry["all"]}
    return [entry for entry in entries if entry["all"] or entry["name"] not in told]

"""The HTML page of a session: each result as a card, all layers in one table, and the sections in their order.

A new section is a function here, a line in `PAGE_SECTIONS` and a template of that name in `templates/report/`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markupsafe import Markup

from ..captures import PositionRange, Provenance
from ..checkpoint import kind_of
from .comparison import Column, Size, comparison_of
from .comparison_forms import MOST_LAYERS
from .html import PagePicture, flattened, render
from .layer_table import Card, Plain, Variables, heat_of, is_out, layer_table, state_of
from .report import PlainVerdict
from .verdict_text import patch_text, worst_layer

NO_CURVES: Mapping[str, object] = {}
MOST_FINDINGS = 3
"""How many findings stand at the top of the page."""
MOST_ROWS, MOST_LISTED = 10_000, 1_000
"""How many layers and problems of a result the page has."""
_PLOTS = {
    "value": "Value by layer",
    "outliers": "Outlier tokens",
    "magnitude": "Magnitudes by layer",
    "margins": "Margins of the decisions",
    "answers": "Answers, prompt by prompt",
}
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


def worst_first(results: Iterable[PlainVerdict], ranks: Mapping[str, int]) -> list[PlainVerdict]:
    """Sort by the rank of the kind, and within a kind by how much of the budget the worst layer uses."""
    return sorted(results, key=lambda result: (ranks.get(result.get("kind", "INFRA"), 0), -_worst_used(result)))


def shortened(result: PlainVerdict) -> PlainVerdict:
    """Return a result with the worst of very many layers and the first of very many problems, and a hint that says so.

    A page of 100,000 layers would have 120 MB, with which no browser copes.
    """
    rows, findings = result.get("rows") or (), result.get("findings") or ()
    if len(rows) <= MOST_ROWS and len(findings) <= MOST_LISTED:
        return result
    layers = f"the {MOST_ROWS:,} worst of {len(rows):,} layers" if len(rows) > MOST_ROWS else ""
    problems = f"the first {MOST_LISTED:,} of {len(findings):,} problems" if len(findings) > MOST_LISTED else ""
    hint = f"this page has {' and '.join(filter(None, (layers, problems)))}; report.json has all"
    shown = {"rows": rows[:MOST_ROWS], "findings": findings[:MOST_LISTED]}  # a result has the worst first
    return {**result, **shown, "hints": [*(result.get("hints") or ()), hint]}


def _worst_used(result: PlainVerdict) -> float:
    used = (row.get("used") for row in result.get("rows", ()))
    return max((value for value in used if isinstance(value, float | int) and not math.isnan(value)), default=0.0)


def anchors_of(results: Sequence[PlainVerdict]) -> Iterator[str]:
    """Yield the anchor of each result, made of its id, so that a link to it holds in the report of the next run too."""
    seen: Counter[str] = Counter()
    for result in results:
        name = re.sub(r"[^a-z0-9]+", "-", str(result.get("id", "")).lower())[:60].strip("-") or "assertion"
        seen[name] += 1
        yield f"a-{name}" if seen[name] == 1 else f"a-{name}-{seen[name]}"


def card_of(result: PlainVerdict, anchor: str) -> Card:
    """Return a result with what the template shows of it; keys that the result lacks are empty."""
    rows = sorted(result.get("rows") or (), key=lambda row: row["depth"])
    used = _worst_used(result)
    # A share of 0 % would say that a bound was compared where none was.
    measured = any(row.get("used") is not None for row in rows)
    return {
        **_EMPTY,
        **result,
        "anchor": anchor,
        # The rows of a result have the worst first.
        "worst": worst_layer({**_EMPTY, "rows": (), **result, "query": result.get("query") or {}}),
        "rows": rows,
        "query": result.get("query") or {},
        "run": result.get("run") or {},
        "used": used if measured else None,
        "near": {*map(state_of, rows)} & {"out", "near"} == {"near"},
        "strip": list(strip_of(rows)),
        "evidence": grouped_tokens(result.get("evidence") or ()),
        "positions": positions_text(result.get("positions")),
        "plots": list(plots_of(result.get("artefacts") or {}, result.get("curves") or {})),
        "curves": result.get("curves") or {},
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
        state = state_of(row)
        yield {"layer": row["layer"], "value": row["value"], "heat": heat_of(heat), "state": state}


def grouped_tokens(evidence: Sequence[Plain]) -> list[Variables]:
    """Join the entries of one token at several layers; the first one, which is the strongest, stands for all."""
    groups: dict[tuple[int, int, str], Variables] = {}
    for token in evidence:
        key = (token["sample"], token["position"], token["text"])
        groups.setdefault(key, {**token, "also": [], "outline": outline_of(token.get("patch"))})
        if groups[key]["layer"] != token["layer"]:
            groups[key]["also"].append(token["layer"])
    return list(groups.values())


def outline_of(patch: Sequence[int] | None) -> Variables | None:
    """Return where a patch lies in its picture, in percent, and its name."""
    if not patch:
        return None
    row, column, rows, columns = patch
    place = {"left": column / columns, "top": row / rows, "width": 1 / columns, "height": 1 / rows}
    style = ";".join(f"{side}:{100 * share:.3g}%" for side, share in place.items())
    return {"style": style, "text": patch_text(patch)}


def positions_text(positions: str | None) -> str:
    """Say in words which positions counted."""
    if not positions:
        return ""
    if span := PositionRange.parse(positions):
        return span.text
    skipped = positions.partition("skip_first:")[2]
    return f"all positions but the first {skipped}" if skipped else _POSITIONS.get(positions, positions)


def plots_of(artefacts: Mapping[str, str], curves: Mapping[str, object] = NO_CURVES) -> Iterator[PagePicture]:
    """Yield the pictures that the page doesn't draw from curves, with their content; one that is gone has none."""
    for title, path in artefacts.items():
        # The path of the report itself is an artefact as well.
        if path.endswith((".png", ".json")) and title not in curves:
            png, chart = (_content(Path(path).with_suffix(suffix)) for suffix in (".png", ".json"))
            chart = json.loads(chart) if chart else {}
            yield PagePicture(_PLOTS.get(title, title), Path(path).name if chart else path, png, chart=chart)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


MEANINGS = {
    "REGRESSION": "a bound was exceeded",
    "ANOMALOUS": "nothing sound was seen",
    "INFRA": "the machine or the installation failed; nothing is known of the model",
    "WARNED": "a bound was exceeded; the suite only warns, or a waiver covers it",
    "PASSED": "within what is allowed",
}
"""The kinds of verdict, worst first, and what each means."""


@dataclass(frozen=True)
class Page:
    """What the sections are made of. `cards`: the results, worst first. `session`: command, start, version, counts."""

    cards: Sequence[Card]
    session: Plain

    @cached_property
    def table(self) -> Variables:
        """All layers, as `layer_table` returns them."""
        return layer_table(self.cards)

    @cached_property
    def subjects(self) -> list[Variables]:
        """What was tested, one entry for each distinct run."""
        return subjects_of(self.cards)


def _subjects(page: Page) -> Variables:
    return {"subjects": page.subjects}


def _finding(page: Page) -> Variables | None:
    """Put first what was found: the worst layers with the failures that are about them, or what is nearest to fail."""
    found: dict[tuple[str, str], list[Card]] = {}
    for card in page.cards:
        if card["failed"]:
            # Without a layer, a failure is a finding of its own.
            found.setdefault((card["subject"], card["worst"] or f"#{card['anchor']}"), []).append(card)
    findings = [finding_of(layer, cards) for (_, layer), cards in found.items()]
    shown = [strip for strip in page.table["strips"] if strip["out"]]
    if not findings:
        close = max((card for card in page.cards if card["used"] is not None), key=lambda c: c["used"], default=None)
        return {"findings": [], "closest": close, "strips": []} if close else None
    return {
        "findings": findings[:MOST_FINDINGS],
        "more": len(findings) - MOST_FINDINGS,
        "strips": shown[: 2 * MOST_FINDINGS],
        "rows": page.table["rows"],
        "several": len(page.subjects) > 1,
    }


def finding_of(layer: str, cards: Sequence[Card]) -> Variables:
    """Return a finding: what the card says that compares with a baseline, else the first; why; and all its cards."""
    plainest = next((card for card in cards if any(row["baseline"] is not None for row in card["rows"])), cards[0])
    why = [card["origin"].get(key) for card in cards for key in ("suspect", "files") if card["origin"].get(key)]
    why += [f"{finding['tensor']}: {finding['what']}" for card in cards for finding in card["findings"][:1]]
    return {
        "layer": "" if layer.startswith("#") else layer,
        "what": plainest["headline"],
        "why": next(iter(why), ""),
        "cards": cards,
        "card": plainest,
    }


def _assertions(page: Page) -> Variables:
    counts = Counter(card["kind"] for card in page.cards)
    columns = {column["anchor"]: index for index, column in enumerate(page.table["columns"])}
    failed = [card["anchor"] for card in page.cards if card["failed"]]
    following = dict(itertools.pairwise(failed))
    # A plot needs two layers.
    drawn = {card["anchor"] for card in page.cards if len(card["rows"]) > 1}
    return {
        "cards": [
            {
                **card,
                "column": columns.get(card["anchor"]) if card["anchor"] in drawn else None,
                "next": following.get(card["anchor"], ""),
            }
            for card in page.cards
        ],
        "counts": {kind: counts[kind] for kind in MEANINGS if counts[kind]},
        "meaning": MEANINGS,
        "several": len(page.subjects) > 1,
    }


def _comparison(page: Page) -> Variables | None:
    """Put several checkpoints side by side: a row a metric, then a row a layer."""
    results: dict[str, list[Card]] = {}
    for card in page.cards:
        results.setdefault(card["subject"], []).append(card)
    if len(results) < 2:
        return None
    sizes: Mapping[str, Sequence[int]] = page.session.get("sizes") or {}
    columns = [
        Column(name, own, Size(*sizes[name]) if name in sizes else None, str(page.session.get("machine", "")))
        for name, own in sorted(results.items())
    ]
    compared = comparison_of(columns, strict=False)
    # subjects of different suites may have nothing in common
    joined = [line for line in compared.lines if sum(cell is not None for cell in line.cells) > 1]
    return {"comparison": compared, "most": MOST_LAYERS} if joined else None


def _kinds(page: Page) -> Variables | None:
    """Count the layers out of bounds by kind: one layer is a damaged tensor, a whole kind a wrong setting."""
    several = len(page.subjects) > 1
    found: list[Variables] = []
    for card in page.cards:
        kinds: dict[str, list[Plain]] = {}
        for row in card["rows"]:
            kinds.setdefault(kind_of(row["layer"], 1), []).append(row)
        for kind, rows in kinds.items():
            out = [row for row in rows if is_out(row)]
            # One row alone says nothing about a kind of layer.
            if not out or len(card["rows"]) == 1:
                continue
            worst = max(out, key=lambda row: abs(row["excess"]))
            found.append(
                {
                    "kind": kind,
                    "out": len(out),
                    "layers": len(rows),
                    "id": card["id"],
                    "anchor": card["anchor"],
                    "subject": card["subject"] if several else "",
                    "worst": worst["layer"],
                    "value": worst["value"],
                }
            )
    found.sort(key=lambda row: (-row["out"] / row["layers"], -row["out"], row["kind"]))
    return {"kinds": found} if found else None


def _layers(page: Page) -> Variables | None:
    return {"table": page.table} if len(page.table["rows"]) > 1 else None


def _left_out(page: Page) -> Variables | None:
    left_out = page.session.get("not_run")
    return {"left_out": left_out, "tier": page.session["tier"]} if left_out else None


def _provenance(page: Page) -> Variables:
    queries = [card["query"] for card in page.cards]
    definitions = sorted({query["definition"] for query in queries if query.get("definition")})
    return {"subjects": page.subjects, "session": page.session, "definitions": definitions}


PAGE_SECTIONS: Mapping[str, Callable[[Page], Variables | None]] = {
    "finding": _finding,
    "assertions": _assertions,
    "comparison": _comparison,
    "kinds": _kinds,
    "layers": _layers,
    "left_out": _left_out,
    "subjects": _subjects,
    "provenance": _provenance,
}
"""The page from top to bottom: the name of a template → what it shows, or None where it has nothing to show."""
CONTENTS = {
    "assertions": "Assertions",
    "comparison": "Side by side",
    "kinds": "Kinds of layers",
    "layers": "All layers",
    "subjects": "What was tested",
    "provenance": "Provenance",
}
"""The sections that the table of contents names, by their templates, which are their anchors as well."""


def render_page(results: Sequence[PlainVerdict], session: Plain) -> str:
    """Return the page of a session's results, which are as `to_plain` gives them."""
    ranks = {kind: rank for rank, kind in enumerate(MEANINGS)}
    ordered = worst_first(map(shortened, results), ranks)
    page = Page([*map(card_of, ordered, anchors_of(ordered))], session)
    contents = {name: content for name, section in PAGE_SECTIONS.items() if (content := section(page)) is not None}
    return render(
        "report.html.j2",
        sections=[Markup(render(f"report/{name}.html.j2", **content)) for name, content in contents.items()],
        contents={name: title for name, title in CONTENTS.items() if name in contents},
        session=session,
        subjects=page.subjects,
        overall=overall(page.cards),
    )


def overall(cards: Sequence[Card]) -> dict[str, str]:
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


def subjects_of(cards: Sequence[Card]) -> list[Variables]:
    """Return what was tested on what, one entry for each distinct run: the main facts, and all of it, flattened."""
    runs: dict[str, Variables] = {}
    for card in cards:
        provenance = Provenance.of(card["run"])
        # The execution follows as one text.
        flat = {key: text for key, text in flattened(card["run"]) if not key.startswith(("evals.", "execution."))}
        if provenance.execution:
            flat["model.executed_as"] = provenance.executed_as
        empty = {"name": card["subject"], "all": flat, "facts": provenance.facts(), "cards": 0, "failed": 0}
        run = runs.setdefault(repr((card["subject"], flat)), empty)
        run["cards"] += 1
        run["failed"] += card["failed"]
    return _joined(list(runs.values()))


def _joined(runs: Sequence[Variables]) -> list[Variables]:
    """Join the runs that only read the files of a model, or failed to run it, with the run that ran it.

    A run of which nothing is known is left out where another of the same name is known.
    """

    def key(run: Plain) -> tuple[str, str]:
        return run["name"], run["all"].get("model.path", "")

    # Static checks and errors know less of a checkpoint than its pass, and would show it a second time.
    passes = {key(run): run for run in runs if "model.class" in run["all"]}
    joined = []
    for run in runs:
        whole = passes.get(key(run), run)
        if whole is run or "model.class" in run["all"]:
            joined.append(run)
        else:
            whole["all"] = {**run["all"], **whole["all"]}
            whole["cards"] += run["cards"]
            whole["failed"] += run["failed"]
    known = {run["name"] for run in joined if run["all"]}
    return [run for run in joined if run["all"] or run["name"] not in known]

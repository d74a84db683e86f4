"""The HTML page of a session: its sections in order, each a function of the results and a template.

A new section is a function here, a line in `PAGE_SECTIONS` and a template of that name in `templates/report/`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from ..captures import Provenance
from .cards import Card, Plain, Variables, card_of, is_out, kind_of_layer, layer_table, worst_first
from .html import flattened, render
from .report import PlainVerdict

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
    def subjects(self) -> list[Variables]:
        """What was tested, one entry for each distinct run."""
        return subjects_of(self.cards)


def _subjects(page: Page) -> Variables:
    return {"subjects": page.subjects}


def _assertions(page: Page) -> Variables:
    counts = Counter(card["kind"] for card in page.cards)
    return {
        "cards": page.cards,
        "counts": {kind: counts[kind] for kind in MEANINGS if counts[kind]},
        "meaning": MEANINGS,
        "several": len(page.subjects) > 1,
    }


def _kinds(page: Page) -> Variables | None:
    """Count the layers out of bounds by kind: one layer is a damaged tensor, a whole kind a wrong setting."""
    several = len(page.subjects) > 1
    found: list[Variables] = []
    for card in page.cards:
        kinds: dict[str, list[Plain]] = {}
        for row in card["rows"]:
            kinds.setdefault(kind_of_layer(row["layer"]), []).append(row)
        for kind, rows in kinds.items():
            out = [row for row in rows if is_out(row)]
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
    table = layer_table(page.cards)
    return {"table": table} if len(table["rows"]) > 1 else None


def _left_out(page: Page) -> Variables | None:
    left_out = page.session.get("not_run")
    return {"left_out": left_out, "tier": page.session["tier"]} if left_out else None


def _provenance(page: Page) -> Variables:
    queries = [card["query"] for card in page.cards]
    definitions = sorted({query["definition"] for query in queries if query.get("definition")})
    return {"subjects": page.subjects, "session": page.session, "definitions": definitions}


PAGE_SECTIONS: Mapping[str, Callable[[Page], Variables | None]] = {
    "subjects": _subjects,
    "assertions": _assertions,
    "kinds": _kinds,
    "layers": _layers,
    "left_out": _left_out,
    "provenance": _provenance,
}
"""The page from top to bottom: the name of a template → what it shows, or None where it has nothing to show."""


def render_page(results: Sequence[PlainVerdict], session: Plain) -> str:
    """Return the page of a session's results, which are as `to_plain` gives them."""
    ranks = {kind: rank for rank, kind in enumerate(MEANINGS)}
    page = Page([card_of(result, index) for index, result in enumerate(worst_first(results, ranks))], session)
    sections = [
        Markup(render(f"report/{name}.html.j2", **content))
        for name, section in PAGE_SECTIONS.items()
        if (content := section(page)) is not None
    ]
    return render("report.html.j2", sections=sections, session=session, overall=overall(page.cards))


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

"""Why a verdict is what it is: a list of explainers, each for some metrics and kinds of verdict."""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..captures import LOGITS, SINKS, Capture, exactly
from ..checkpoint import Files, Finding, problems_of
from ..common import InfraError, QsaError, logger
from ..metrics import METRICS, Metric, made_by_loader
from .origins import origin_of
from .tokens import token_evidence
from .verdict import Kind, Row, Verdict

OUT_OF_BOUNDS = frozenset({Kind.REGRESSION, Kind.WARNED})
ANY = frozenset(Kind)
LAYER_CHECKS = ("checkpoint_scales", "checkpoint_weights", "checkpoint_formats", "checkpoint_keys")
"""The static checks that name a layer. Settings are of the whole checkpoint, and take longer than all of these."""


@dataclass(frozen=True)
class Context:
    """What a verdict is explained from.

    `files`: returns the files of the checkpoint; raises `InfraError` where there are none. `origins`: the origins that
    were found before, by capture; filled here, for all verdicts on a capture share one origin.
    """

    capture: Capture
    files: Callable[[], Files]
    origins: MutableMapping[Capture, dict[str, str]]


@dataclass(frozen=True)
class Explainer:
    """Explains the verdicts of some metrics and kinds: returns the verdict with what it found."""

    explain: Callable[[Verdict, Context], Verdict]
    metrics: Callable[[Metric], bool]
    kinds: frozenset[Kind] = ANY


def explain(verdict: Verdict, context: Context) -> Verdict:
    """Run the explainers that apply to a verdict, in their order."""
    metric = METRICS.get(verdict.query.get("metric", ""))
    if metric is None or not verdict.rows:
        return verdict
    for explainer in EXPLAINERS:
        if explainer.metrics(metric) and verdict.kind in explainer.kinds:
            verdict = explainer.explain(verdict, context)
    return verdict


def blame_loader(verdict: Verdict, context: Context) -> Verdict:
    """Say of each weight that differs from its file what the loader made of it."""
    if verdict.query.get("over"):  # one number for all layers names none of them
        return verdict
    rows = [replace(row, detail=made_by_loader(context.capture.sites[row.layer, "weight"])) for row in verdict.rows]
    verdict = replace(verdict, rows=rows)
    if not verdict.failing_rows:
        return verdict
    advice = "the files were unpacked by their quantizer's own library: the loader is at fault, not the checkpoint"
    headline = f"{verdict.headline}; {verdict.failing_rows[0].detail}"
    return replace(verdict, headline=headline, hints=[*verdict.hints, advice])


def tell_design(verdict: Verdict, context: Context) -> Verdict:
    """Say that layers differ from the reference by design, where the checkpoint was smoothed or rotated.

    Whole blocks of a smoothed model can be compared, so an excess there stays a regression.
    """
    if context.capture.reference is None:
        return verdict
    try:
        relation = context.files().relation
    except InfraError as error:  # a model of a fixture or a factory has no files
        logger.debug("no files to tell by whether layers differ by design: %s", error)
        return verdict
    blocks = relation.compare == "blocks" and any(row.layer in context.capture.blocks for row in _out(verdict))
    if relation.compare == "layers" or blocks:
        return verdict
    headline = f"by design single layers can't be held against model.reference: {relation.why} ({relation.kind})"
    instead = {
        "blocks": "compare whole blocks (sqnr at the output of the blocks) or predictions (kl_divergence, same_top)",
        "logits": "compare what the model predicts: kl_divergence, same_top, ln_ppl_ratio",
    }
    kind = verdict.kind if verdict.kind is Kind.WARNED else Kind.ANOMALOUS
    return replace(verdict, kind=kind, headline=headline, hints=[*verdict.hints, instead[relation.compare]])


def _out(verdict: Verdict) -> list[Row]:
    return [row for row in verdict.rows if row.excess]


def find_origin(verdict: Verdict, context: Context) -> Verdict:
    """Name the layer that adds most of the difference from the reference."""
    capture = context.capture
    if capture.reference is None:
        return verdict
    if capture not in context.origins:
        context.origins[capture] = origin_of(capture, partial(_findings, context.files))
    return replace(verdict, origin=context.origins[capture])


def _findings(files: Callable[[], Files], layer: str) -> Sequence[Finding]:
    """Return what the first check that finds something says of a layer and of all below it."""
    for check in LAYER_CHECKS:
        try:
            if found := problems_of(files(), check, rf"^{re.escape(layer)}(\.|$)")[1]:
                return found
        except QsaError as error:  # no files, or nothing there that this check looks at
            logger.debug("%s says nothing of %s: %s", check, layer, error)
    return ()


def show_reference(verdict: Verdict, context: Context) -> Verdict:
    """Give each row the value of the reference, as far as the pass kept what the metric needs."""
    query, reference = verdict.query, context.capture.reference
    if reference is None or query.get("over") or query.get("site", LOGITS) == LOGITS:
        return verdict
    known = [row.layer for row in verdict.rows if _is_known(reference, row.layer, verdict)]
    if not known or (query["positions"] in ("sink", "no_sink") and not reference.sinks.searched):
        return verdict
    try:
        series = reference.select(exactly(known), query["site"]).series(
            query["metric"], query["reduce"], query["positions"] or "all", **query["parameters"]
        )
    except QsaError as error:  # these values are shown, never judged
        logger.debug("no value of the reference beside %s: %s", verdict.id, error)
        return verdict
    values = dict(zip(series.layers, series.values.tolist(), strict=True))
    return replace(verdict, rows=[replace(row, reference=values.get(row.layer)) for row in verdict.rows])


def _is_known(reference: Capture, layer: str, verdict: Verdict) -> bool:
    query = verdict.query
    numbers = reference.sites.get((layer, query["site"]))
    if numbers is None or not numbers.populations or not numbers.token_axis:
        return False
    needed = METRICS[query["metric"]].needs(query["site"], query["positions"] or "all", query["parameters"])
    return needed <= numbers.statistics | {SINKS}


def show_tokens(verdict: Verdict, context: Context) -> Verdict:
    """Show the tokens that stand out most: in the worst layer, or in all where one number is of all of them."""
    query = verdict.query
    layers = [] if query["over"] else [row.layer for row in verdict.failing_rows[:1]]
    layers = layers or context.capture.select(query["layers"], query["site"], query["exclude"]).layers
    return replace(verdict, evidence=token_evidence(context.capture, layers, verdict))


EXPLAINERS = (
    Explainer(blame_loader, lambda metric: metric.name == "loaded_weights"),
    # before the origin: what differs by design is ANOMALOUS then, and has no origin
    Explainer(tell_design, lambda metric: metric.against and metric.per != "logits", OUT_OF_BOUNDS),
    Explainer(find_origin, lambda metric: metric.against, OUT_OF_BOUNDS),
    # a metric against the reference has no value of the reference's own: the value itself is the distance
    Explainer(show_reference, lambda metric: not metric.against),
    Explainer(show_tokens, lambda metric: metric.positional, ANY - {Kind.PASSED}),
)

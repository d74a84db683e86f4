"""Why a verdict is what it is: a list of explainers, each for some metrics and kinds of verdict."""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..captures import LOGITS, SINKS, Capture, exactly, names_sinks
from ..checkpoint import Files, Finding, Suspicion, by_kind, problems_of, suspicions_of, weight_names
from ..common import AnomalyError, InfraError, QsaError, logger
from ..metrics import (
    METRICS,
    Metric,
    group_gain,
    made_by_loader,
)
from .origins import origin_of
from .tokens import token_evidence
from .verdict import Kind, Verdict

MOST_SUSPICIONS = 2
"""The number of suspicions that a headline names; `suspect` has all."""
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


def place_group(verdict: Verdict, context: Context) -> Verdict:
    """Say of each weight which of its scale groups is farthest from the reference's, and by which factor."""
    if verdict.query.get("over"):  # one number for all layers names none of them
        return verdict
    rows = [replace(row, detail=group_gain(context.capture.sites[row.layer, "weight"])) for row in verdict.rows]
    verdict = replace(verdict, rows=rows)
    if not verdict.failing_rows:
        return verdict
    return replace(verdict, headline=f"{verdict.headline}; {verdict.failing_rows[0].detail}")


def place_nonfinite(verdict: Verdict, context: Context) -> Verdict:
    """Begin with the first layer that has NaN or Inf, and with the dtype where that is the likely cause."""
    first = verdict.first_failing
    if first is None or verdict.query.get("over"):  # one number for all layers names none of them
        return verdict
    numbers = context.capture.sites.get((first.layer, verdict.query.get("site", "output")))
    narrow = numbers is not None and numbers.dtype == "float16"
    cause = ", in float16, whose largest number is 65504" if narrow else ""
    return replace(verdict, headline=f"NaN or Inf from {first.layer} on{cause}; {verdict.headline}")


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
    except AnomalyError as error:  # the verdict stands; static checks judge the files
        return replace(verdict, hints=[*verdict.hints, f"whether layers differ by design can't be said: {error}"])
    out = {row.layer for row in verdict.rows if row.excess}
    blocks = relation.compare == "blocks" and not out.isdisjoint(context.capture.blocks)
    if relation.compare == "layers" or blocks:
        return verdict
    headline = f"by design single layers can't be held against model.reference: {relation.why} ({relation.kind})"
    instead = {
        "blocks": "compare whole blocks (sqnr at the output of the blocks) or predictions (kl_divergence, same_top)",
        "logits": "compare what the model predicts: kl_divergence, same_top, ln_ppl_ratio",
    }
    kind = verdict.kind if verdict.kind is Kind.WARNED else Kind.ANOMALOUS
    return replace(verdict, kind=kind, headline=headline, hints=[*verdict.hints, instead[relation.compare]])


def find_origin(verdict: Verdict, context: Context) -> Verdict:
    """Name the layer that adds most of the difference from the reference.

    No error reaches a weight, or a layer on the reference's input, from elsewhere: there no layer is named that is
    within its own bounds.
    """
    capture = context.capture
    if capture.reference is None:
        return verdict
    if capture not in context.origins:
        context.origins[capture] = origin_of(capture, partial(_findings, context.files))
    origin = context.origins[capture]
    named = origin.get("adds most", "").partition(":")[0]
    alone = verdict.query.get("site") == "weight" or verdict.query["metric"] == "local_sqnr"
    if alone and not verdict.query.get("over") and named in capture.modules:
        origin = origin if any(row.layer == named for row in verdict.failing_rows) else {}
    return replace(verdict, origin=origin)


def recognize(verdict: Verdict, context: Context) -> Verdict:
    """Begin with what the weights of the layers out of bounds are in the reference, where they are not their own.

    What was recognized takes the place of guesses from the size of the error. Where nothing was, many layers are summed
    up by kind.
    """
    found = _recognized(verdict, context)
    if not found:
        summary = by_kind([row.layer for row in verdict.failing_rows], [row.layer for row in verdict.rows])
        return replace(verdict, headline=f"{summary}; {verdict.headline}") if summary else verdict
    told = [each.what for each in found[:MOST_SUSPICIONS]]
    layer, colon, rest = verdict.headline.partition(": ")
    named = colon and any(text.startswith(f"{layer} ") for text in told)
    headline = "; ".join([*told, f"measured: {rest}" if named else verdict.headline])
    suspects, origin = [each.what for each in found], {}
    most = verdict.origin.get("adds most", "")
    layer = most.partition(":")[0]
    if len(found) == 1 and found[0].layers == {layer}:
        origin = {"adds most": most}
        suspects += [f"{finding.tensor}: {finding.what}" for finding in _findings(context.files, layer)[:1]]
    return replace(verdict, headline=headline, origin=origin | {"suspect": "; ".join(suspects)})


def _recognized(verdict: Verdict, context: Context) -> Sequence[Suspicion]:
    try:
        files = context.files()
        if files.reference is None and context.capture.reference is not None:  # it has no files to recognize weights in
            return ()
        return suspicions_of(files, _suspects(verdict, context.capture, files))
    except QsaError as error:  # no files, or damaged ones: static checks judge these
        logger.debug("no weight of %s was looked for in the reference: %s", verdict.id, error)
        return ()


def _suspects(verdict: Verdict, capture: Capture, files: Files) -> Sequence[str]:
    """Return the layers of the files that are out of bounds, or hold what is.

    All for a number of the whole model, and for one of its own activations: a weight earlier on may have moved them.
    """
    site = verdict.query.get("site", LOGITS)
    own = site != "weight" and not METRICS[verdict.query["metric"]].against
    if verdict.query.get("over") or site == LOGITS or own:
        return weight_names(files).all
    named = files.format.layers_of(capture.modules)
    out = tuple(row.layer for row in verdict.rows if row.excess)
    inside = tuple(f"{layer}." for layer in out)
    return [own for module, own in named.items() if module in out or module.startswith(inside)]


def tell_method(verdict: Verdict, context: Context) -> Verdict:
    """Say that bounds which were calibrated on rounded weights don't hold for GPTQ, where nothing else was found."""
    try:
        said = "" if "suspect" in verdict.origin else context.files().folder.by_gptq
    except QsaError as error:  # no files, or damaged ones: static checks judge these
        logger.debug("nothing says how the weights of %s were made: %s", verdict.id, error)
        return verdict
    advice = (
        f"GPTQ made it ({said}), and puts weights farther from the original than rounding does: where the suite was "
        "drafted on a checkpoint of another kind, draft one on this kind (qsa init)"
    )
    return replace(verdict, hints=[*verdict.hints, advice]) if said else verdict


def tell_files(verdict: Verdict, context: Context) -> Verdict:
    """Say what the files say of the worst layer, so that a moved number and a damaged tensor are seen as one fault."""
    if not verdict.failing_rows or verdict.query.get("over"):
        return verdict
    found = _findings(context.files, verdict.failing_rows[0].layer)
    if not found:
        return verdict
    said = {"files": f"{found[0].tensor}: {found[0].what}"}
    return replace(verdict, headline=f"{verdict.headline}; the files say so too", origin={**verdict.origin, **said})


def _findings(files: Callable[[], Files], layer: str) -> Sequence[Finding]:
    """Return what the first check that finds something says of a layer and of all below it."""
    for check in LAYER_CHECKS:
        try:
            found = problems_of(files(), check, rf"^{re.escape(layer)}(\.|$)")[1]
            if problems := [finding for finding in found if not finding.note]:
                return problems
        except QsaError as error:  # no files, or nothing there that this check looks at
            logger.debug("%s says nothing of %s: %s", check, layer, error)
    return ()


def show_reference(verdict: Verdict, context: Context) -> Verdict:
    """Give each row the value of the reference, as far as the pass kept what the metric needs."""
    query, reference = verdict.query, context.capture.reference
    if reference is None or query.get("over") or query.get("site", LOGITS) == LOGITS:
        return verdict
    known = [row.layer for row in verdict.rows if _is_known(reference, row.layer, verdict)]
    # Positions that refer to sinks can't be resolved where the reference's were not looked for.
    if not known or (names_sinks(query["positions"] or "all") and not reference.sinks.searched):
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
    Explainer(place_group, lambda metric: metric.name == "weight_gain"),
    Explainer(place_nonfinite, lambda metric: metric.name == "nonfinite", OUT_OF_BOUNDS),
    # before the origin: what differs by design is ANOMALOUS then, and has no origin
    Explainer(tell_design, lambda metric: metric.against and metric.per != "logits", OUT_OF_BOUNDS),
    Explainer(find_origin, lambda metric: metric.against, OUT_OF_BOUNDS),
    Explainer(recognize, lambda metric: True, OUT_OF_BOUNDS),
    Explainer(tell_method, lambda metric: metric.name == "weight_sqnr", OUT_OF_BOUNDS),
    # one against the reference has its origin, which names what the files say
    Explainer(tell_files, lambda metric: not metric.against and metric.name != "loaded_weights", OUT_OF_BOUNDS),
    # a metric against the reference has no value of the reference's own: the value itself is the distance
    Explainer(show_reference, lambda metric: not metric.against),
    Explainer(show_tokens, lambda metric: metric.positional or metric.per == "logits", ANY - {Kind.PASSED}),
)

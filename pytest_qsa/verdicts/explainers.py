"""Why a verdict is what it is: a list of explainers, each for some metrics and kinds of verdict."""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..captures import LOGITS, SINKS, Capture, Sinks, SiteNumbers, exactly, lower_median
from ..checkpoint import Files, Finding, Suspicion, by_kind, problems_of, suspicions_of, weight_names
from ..common import AnomalyError, InfraError, QsaError, logger
from ..metrics import (
    LARGEST,
    METRICS,
    NOISE,
    SIGNAL,
    Metric,
    PlainQuery,
    View,
    compared_tokens,
    group_gain,
    local_tokens,
    made_by_loader,
)
from .origins import origin_of
from .verdict import Kind, TokenEvidence, Verdict

NEIGHBOURS = 6
"""The tokens of context before and after a token."""


def token_evidence(capture: Capture, layers: Sequence[str], verdict: Verdict, *, most: int = 5) -> list[TokenEvidence]:
    """Return the tokens of the layers that stand out most, by their multiple of the median, the largest first.

    For a metric against the reference these are the tokens with the largest error, where the pass kept the error of
    each token. Where the metric has a threshold, only tokens above it are returned, else the one nearest to it.
    """
    site, positions = verdict.query["site"], verdict.positions or "all"
    metric, sinks = METRICS[verdict.query["metric"]], sinks_behind(capture, verdict.query)
    found: list[TokenEvidence] = []
    for layer in layers:
        numbers = capture.sites.get((layer, site))
        # A weight has no tokens.
        if numbers is None or site == "weight":
            continue
        view = View(numbers, site, positions, sinks, layer)
        errors = _of_errors(capture, view, verdict.query, most) if metric.against and not metric.tokenwise else []
        if not errors and "token_max" in numbers:
            errors = _of_magnitudes(capture, view, most)
        found += errors
    found = sorted(found, key=lambda token: -token.ratio)[:most]
    threshold = verdict.query["parameters"].get("threshold", 0.0)
    return [token for token in found if token.ratio > threshold] or found[:1]


def sinks_behind(capture: Capture, query: PlainQuery) -> Sinks:
    """Return the sinks that `positions` refers to: the reference's for a metric against it, else the model's."""
    metric = METRICS.get(query.get("metric", ""))  # an error may have come before there was a query
    against = metric is not None and metric.against
    return capture.reference.sinks if against and capture.reference is not None else capture.sinks


def _of_magnitudes(capture: Capture, view: View, most: int) -> list[TokenEvidence]:
    numbers = view.numbers
    candidates: list[tuple[float, int, int]] = []
    for population in range(numbers.populations):
        ratios = view.ratios(population)
        # Stable: of equal tokens the first is shown, on every machine.
        top = np.argsort(-ratios, kind="stable")[:most]
        candidates += [(float(ratios[i]), population, int(i)) for i in top if np.isfinite(ratios[i])]
    largest = sorted(candidates, key=lambda item: -item[0])[:most]
    found = []
    for ratio, population, position in largest:
        magnitude = float(numbers.tokens_of(population)[position])
        found.append(_token(capture, view, population, position, magnitude=magnitude, ratio=ratio))
    return found


def _of_errors(capture: Capture, view: View, query: PlainQuery, most: int) -> list[TokenEvidence]:
    """Return the tokens with the largest error; none where the pass kept no errors of tokens, or all are 0."""
    numbers, local = view.numbers, query["metric"] == "local_sqnr"
    if ("local" if local else "error") not in numbers or not numbers.token_axis:
        return []
    tokens_of = partial(local_tokens, rows=query["parameters"]["rows"]) if local else compared_tokens
    kept = [tokens_of(view, population) for population in range(numbers.populations)]
    populations = np.repeat(np.arange(len(kept)), [len(at) for at, _ in kept])
    positions = np.concatenate([at for at, _ in kept])
    powers = np.concatenate([rows for _, rows in kept])
    of, sizes = _sizes(query, powers)
    # ‖x − x̂‖ / ‖x‖ of a token that is all zeros is not finite: it can't be ranked.
    sizes = np.where(np.isfinite(sizes), sizes, 0.0)
    whole, apart = float(powers[:, NOISE].sum()), sizes[sizes > 0]
    if not apart.size or not np.isfinite(whole):
        return []
    # The median of the tokens that differ at all: equal ones would make it 0.
    median = lower_median(apart)
    largest = [i for i in np.argsort(-sizes, kind="stable")[:most].tolist() if sizes[i] > 0]
    found = []
    for i in largest:
        population, position = int(populations[i]), int(positions[i])
        token = _token(capture, view, population, position, magnitude=float(sizes[i]), ratio=float(sizes[i]) / median)
        # The channel of the largest |x| says nothing of where the error is: −1, unknown.
        found.append(replace(token, of=of, share=float(powers[i, NOISE]) / whole, channel=-1))
    return found


def _sizes(query: PlainQuery, powers: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
    """Return the quantity that ranks the tokens of a metric, in words, and its values: [N] of energies [N, 3 or 4]."""
    if query["metric"] == "max_abs_diff":
        return "max |x − x̂|", powers[:, LARGEST]
    error = np.sqrt(powers[:, NOISE])
    if query["parameters"].get("by") != "token":
        return "‖x − x̂‖", error
    with np.errstate(divide="ignore", invalid="ignore"):
        return "‖x − x̂‖ / ‖x‖", error / np.sqrt(powers[:, SIGNAL])


def _token(
    capture: Capture, view: View, population: int, position: int, *, magnitude: float, ratio: float
) -> TokenEvidence:
    numbers = view.numbers
    sample = int(numbers.sample[population])
    before, text, after = context(capture, sample, position)
    sinks = view.sinks.mask(sample, int(numbers.lengths[population]), view.layer)
    return TokenEvidence(
        view.layer, sample, position, text, before, after, magnitude, ratio,
        channel_of(numbers, population, position), bool(sinks[position]), int(numbers.call[population]),
    )  # fmt: skip


def channel_of(numbers: SiteNumbers, population: int, position: int) -> int:
    """Return the channel of a token's maximum; −1 where the pass didn't keep it, as for all but the largest tokens."""
    if "peaks" not in numbers:
        return -1
    at = np.flatnonzero(numbers.peaks[population] == position)
    return int(numbers.peak_channels[population, at[0]]) if at.size else -1


def context(capture: Capture, sample: int, position: int) -> tuple[str, str, str]:
    """Return the text before a token, of the token, and after it; its id where the texts were not kept."""
    if sample >= len(capture.tokens) or position >= len(capture.tokens[sample]):
        return "", "", ""
    ids = capture.tokens[sample].tolist()

    def text(tokens: list[int]) -> str:
        return "".join(capture.pieces.get(token, f"⟨{token}⟩") for token in tokens)

    return (
        text(ids[max(0, position - NEIGHBOURS) : position]),
        text(ids[position : position + 1]),
        text(ids[position + 1 : position + 1 + NEIGHBOURS]),
    )


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
    """Name the layer that adds most of the difference from the reference."""
    capture = context.capture
    if capture.reference is None:
        return verdict
    if capture not in context.origins:
        context.origins[capture] = origin_of(capture, partial(_findings, context.files))
    return replace(verdict, origin=context.origins[capture])


def recognize(verdict: Verdict, context: Context) -> Verdict:
    """Begin with what the weights of the layers out of bounds are in the reference, where they are not their own.

    What was recognized takes the place of guesses from the size of the error. Where nothing was, many layers are summed
    up by kind.
    """
    found = _recognized(verdict, context)
    if not found:
        summary = by_kind([row.layer for row in verdict.failing_rows], [row.layer for row in verdict.rows])
        return replace(verdict, headline=f"{summary}; {verdict.headline}") if summary else verdict
    headline = "; ".join([*(each.what for each in found[:MOST_SUSPICIONS]), verdict.headline])
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
        return suspicions_of(files, _suspects(verdict, context.capture, files)) if files.reference else ()
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
    Explainer(place_group, lambda metric: metric.name == "weight_gain"),
    Explainer(place_nonfinite, lambda metric: metric.name == "nonfinite", OUT_OF_BOUNDS),
    # before the origin: what differs by design is ANOMALOUS then, and has no origin
    Explainer(tell_design, lambda metric: metric.against and metric.per != "logits", OUT_OF_BOUNDS),
    Explainer(find_origin, lambda metric: metric.against, OUT_OF_BOUNDS),
    Explainer(recognize, lambda metric: True, OUT_OF_BOUNDS),
    # one against the reference has its origin, which names what the files say
    Explainer(tell_files, lambda metric: not metric.against and metric.name != "loaded_weights", OUT_OF_BOUNDS),
    # a metric against the reference has no value of the reference's own: the value itself is the distance
    Explainer(show_reference, lambda metric: not metric.against),
    Explainer(show_tokens, lambda metric: metric.positional, ANY - {Kind.PASSED}),
)

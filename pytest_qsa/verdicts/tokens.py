"""The tokens behind a number: those that stand out most, have the largest error, or are decided otherwise."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..captures import (
    GENERATION,
    GENERATION_NAMES,
    LOGITS,
    BoundaryTokens,
    Capture,
    Patch,
    PredictionMargins,
    Sinks,
    SiteNumbers,
    lower_median,
)
from ..metrics import LARGEST, METRICS, NOISE, SIGNAL, PlainQuery, View, compared_tokens, local_tokens
from .verdict import TokenEvidence, Verdict

NEIGHBOURS = 6
"""The tokens of context before and after a token."""
ENDING = 16
"""The last tokens of an answer that are shown."""
PARTED = 32
"""The tokens of an answer that are shown from the one on in which it differs."""
MOST_ANSWERS = 12
"""The pairs of answers that a report shows; a terminal shows fewer."""


def token_evidence(capture: Capture, layers: Sequence[str], verdict: Verdict, *, most: int = 5) -> list[TokenEvidence]:
    """Return the tokens of the layers that stand out most, by their multiple of the median, the largest first.

    For a metric against the reference these are the tokens with the largest error, where the pass kept the error of
    each token. Where the metric has a threshold, only tokens above it are returned, else the one nearest to it.
    """
    site, positions = verdict.query["site"], verdict.positions or "all"
    if site == LOGITS and verdict.query["metric"] == "generation":
        return _of_answers(capture, verdict.query)
    if site == LOGITS:
        return _of_decisions(capture, verdict.query, positions, most)
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


def _of_decisions(capture: Capture, query: PlainQuery, positions: str, most: int) -> list[TokenEvidence]:
    """Return the positions where the reference's token is given up, the most clearly preferred first.

    One for each pair of tokens and what follows, for text that repeats itself would fill the list with one place.
    """
    numbers = capture.sites.get((LOGITS, LOGITS))
    if numbers is None or PredictionMargins().key not in numbers:
        return []
    view = View(numbers, LOGITS, positions, capture.sinks, LOGITS).within(())
    numbers = view.numbers
    margins = numbers.arrays[PredictionMargins().key]
    least, below = query["parameters"].get("margin_from", 0.0), query["parameters"].get("margin_to") or np.inf
    lost = (margins[:, 1] < 0) & (margins[:, 0] >= least) & (margins[:, 0] < below)
    if (tokens := query["parameters"].get("tokens")) is not None:
        table = numbers.arrays[BoundaryTokens(tokens).key]
        spurious = query["parameters"]["stat"] == "spurious"
        lost &= (table[:, 2] >= 0) & (table[:, 0] == -1) if spurious else table[:, 0] >= 0
    ends = np.cumsum(numbers.lengths)
    found: dict[tuple[object, ...], TokenEvidence] = {}
    for i in sorted(np.flatnonzero(lost).tolist(), key=lambda i: -margins[i, 0]):
        population = int(np.searchsorted(ends, i, side="right"))
        position = int(i - ends[population] + numbers.lengths[population])
        margin, own, token, other = margins[i].tolist()
        writes, instead = (capture.pieces.get(int(each), f"⟨{int(each)}⟩") for each in (token, other))
        one = _token(capture, view, population, position, magnitude=margin, ratio=margin)
        decided = (f"{margin:.2g}", writes, f"{-own:.2g}", instead)
        one = replace(one, of="margin", decided=decided, channel=-1)
        found.setdefault((writes, instead, one.text, one.before), one)
        if len(found) == most:
            break
    return list(found.values())


def _of_answers(capture: Capture, query: PlainQuery) -> list[TokenEvidence]:
    """Return the prompts whose answers lose most against the reference's, then those that part from it first.

    None where the texts were not kept, nor pairs that are alike to the end.
    """
    numbers = capture.sites[GENERATION, LOGITS]
    if "answers" not in numbers:
        return []
    table = dict(zip(GENERATION_NAMES, numbers.arrays["generation"].T, strict=True))
    stat = str(query["parameters"]["stat"])
    column = {"valid_json": "json", "markup_kept": "markup", "length_ratio": "length"}.get(stat, stat)
    lost = -table["equal"] if stat == "diverged_at" else table[f"reference_{column}"] - table[column]
    if stat in ("repetition", "length_ratio"):  # more of it, or another length
        lost = np.abs(lost)
    lost = np.where(np.isnan(lost), 0.0, lost)
    longest = np.maximum(table["length"], table["reference_length"])
    differ = np.flatnonzero((lost > 0) | (table["equal"] < longest))
    found = []
    for prompt in differ[np.lexsort((table["equal"][differ], -lost[differ]))][:MOST_ANSWERS].tolist():
        equal = int(table["equal"][prompt])
        theirs, own = (_pieces(capture, numbers.arrays[name][prompt]) for name in ("reference_answers", "answers"))
        same, text, after = _around(own, equal)
        evidence = TokenEvidence(GENERATION, prompt, equal, text, same, after, float(lost[prompt]), 1.0, -1, sink=False)
        ends, rest = (_ending(theirs), _ending(own)), (_from(theirs, equal), _from(own, equal))
        found.append(replace(evidence, of=stat, answers=ends, parted=rest))
    return found


def _pieces(capture: Capture, ids: NDArray[np.int32]) -> list[str]:
    """Return the text of each token of an answer, its id where the text wasn't kept."""
    return [capture.pieces.get(token, f"⟨{token}⟩") for token in ids[ids >= 0].tolist()]


def _ending(pieces: Sequence[str]) -> str:
    return f"{'…' if len(pieces) > ENDING else ''}{''.join(pieces[-ENDING:])}"


def _from(pieces: Sequence[str], position: int) -> str:
    """Return what an answer writes from a position on, as far as it is shown."""
    more = len(pieces) > position + PARTED
    return f"{''.join(pieces[position : position + PARTED])}{'…' if more else ''}"


def _around(pieces: Sequence[str], position: int) -> tuple[str, str, str]:
    """Return the text before a token of an answer, of the token, and after it."""
    before = pieces[max(0, position - NEIGHBOURS) : position]
    return "".join(before), "".join(pieces[position : position + 1]), "".join(pieces[position + 1 :][:NEIGHBOURS])


def _token(
    capture: Capture, view: View, population: int, position: int, *, magnitude: float, ratio: float
) -> TokenEvidence:
    numbers = view.numbers
    sample = int(numbers.sample[population])
    length = int(numbers.lengths[population])
    # A tower's tokens are none of the prompt's.
    of_prompt = not capture.pictures or sample >= len(capture.tokens) or length == len(capture.tokens[sample])
    before, text, after = context(capture, sample, position) if of_prompt else ("", "", "")
    sinks = view.sinks.mask(sample, length, view.layer)
    patch, picture = _patch(capture, sample, position, length)
    return TokenEvidence(
        view.layer, sample, position, text, before, after, magnitude, ratio,
        channel_of(numbers, population, position), bool(sinks[position]), int(numbers.call[population]),
        patch=patch, picture=picture,
    )  # fmt: skip


def _patch(capture: Capture, sample: int, position: int, length: int) -> tuple[Patch | None, str]:
    """Return the patch of a picture that a token stands for, and the picture as a data URI."""
    seen = capture.pictures.get(sample)
    tokens = len(capture.tokens[sample]) if sample < len(capture.tokens) else 0
    patch = seen.patch_at(position, length, tokens) if seen is not None else None
    return (patch, _data_uri(seen.pixels)) if seen is not None and patch is not None else (None, "")


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


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

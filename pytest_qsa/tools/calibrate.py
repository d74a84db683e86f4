"""How much an assertion's numbers vary over parts of the data, and the bounds that a healthy model keeps.

The engine makes the captures; the rest is numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from .. import engine
from ..captures import STORED, Capture, Request, merge, merge_requests
from ..checkpoint import HEALTHY, capture_weights
from ..common import AnomalyError, InfraError, SuiteError, logger, number, shown_path, status, step, text_table
from ..metrics import METRICS, TWO_SIDED_95, Series
from ..suite import (
    SIDES,
    Assertion,
    MeasuredAssertion,
    NamedSubject,
    Noise,
    Relative,
    Side,
    Stated,
    SuiteFile,
    files_of,
)
from ..verdicts import SPARE, checked_series, key_of, outward

ROOM_OF_PERFECT = 0.01
"""How far a bound stays from a perfect value that every part of the data has had."""
FIGURES = 4
"""Significant digits of a mean and a sigma in a suite."""
IDENTICAL = 200.0
"""dB that stand for +∞, where nothing differs from the reference, so that a mean and a sigma exist. The rounding of
float32 is at 150 dB, so no measured difference is above it."""
ROOMS = {"tensor": 4.0, "channel": 6.0}
"""By how many dB a healthy quantization of a weight, or of its worst row, may lie below round to nearest in the same
scheme: stochastic rounding lies 3 dB below it, in the worst row 5 dB (SmolLM2 in 3 to 8 bits), GPTQ in between."""
PARTS_ENOUGH, TOKENS_ENOUGH = 8, 1024
"""From as many parts, and tokens in each, sigma is known to about a quarter (docs/bounds.md)."""
MOST_TEXT = 100.0
"""More than this multiple of the text is not proposed: the mean is about 0, and hardly moves away from it."""
WEIGHT_ERRORS = ("weight_sqnr", "sqnr")
ANSWER_SIGMAS = 3.0
"""The most standard errors of room for a bound on answers: with 10 of them and few prompts, nothing would be found."""
USEFUL = 0.5
"""The share of what the reference has that a bound on answers must be able to miss, to be of use."""
STANDARD_ERRORS = 2 * TWO_SIDED_95
"""The width of a 95 % interval, in standard errors."""


@dataclass(frozen=True)
class Proposal:
    """A bound that the noise allows.

    `group`: the group of layers that it is for; empty for a bound of all layers. `layer`: the layer that decides.
    `bound`: the number in the suite now.
    """

    side: Side
    group: str
    layer: str
    bound: float
    proposed: float
    noise: Noise


@dataclass(frozen=True)
class Spread:
    """The values of each layer on each part of the data, [parts, L], and on all of it, [L].

    `errors` [L]: the standard error of a part's value, where it is an estimate from that part's tokens; else 0.
    `unit`: of the values. `rounded` [L]: of weights, the value that rounding the original to nearest gives; `room` [L]:
    by how much another healthy quantization may differ from that.
    """

    layers: Sequence[str]
    parts: NDArray[np.float64]
    whole: NDArray[np.float64]
    errors: NDArray[np.float64]
    unit: str = ""
    rounded: NDArray[np.float64] | None = None
    room: NDArray[np.float64] | float = 0.0

    @classmethod
    def of(cls, parts: Sequence[Series], whole: Series) -> Spread:
        """Stack the series of the parts.

        Raises:
            AnomalyError: the parts have different layers, or there are fewer than two.
        """
        if len(parts) < 2:
            raise AnomalyError("one part of the data says nothing of the noise: give two at least")
        if any(series.layers != whole.layers for series in parts):
            raise AnomalyError("the parts of the data have different layers, so their noise can't be measured")
        errors = np.mean([_errors(part) for part in parts], axis=0)
        return cls(whole.layers, np.stack([_finite(part) for part in parts]), _finite(whole), errors, whole.query.unit)

    def of_layers(self, series: Series) -> NDArray[np.float64]:
        """Return the values of another series for these layers, [L]; where it has none, that on all the data."""
        values = dict(zip(series.layers, _finite(series).tolist(), strict=True))
        own = zip(self.layers, self.whole.tolist(), strict=True)
        return np.array([values.get(layer, value) for layer, value in own], dtype=np.float64)

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """The standard deviation of each layer over the parts, [L]; exactly 0 where all parts are equal.

        That of an estimate is at least its standard error, because a few parts can agree by chance.
        """
        # The mean of equal floats is rounded, so that their standard deviation may come out above 0.
        apart = np.where(np.ptp(self.parts, axis=0) > 0, self.parts.std(axis=0, ddof=1), 0.0)
        return np.maximum(apart, self.errors)

    def noise(self, index: int, k: float) -> Noise:
        """Return the noise of one layer, rounded to what a suite holds."""
        if self.rounded is not None:
            apart, room = self.is_apart(index), float(f"{np.broadcast_to(self.room, self.whole.shape)[index]:.3g}")
            mean = float(f"{(self.whole if apart else self.rounded)[index]:.{FIGURES}g}")
            return Noise(mean=mean, sigma=0.0, n=len(self.parts), k=k, room=room)
        mean, sigma = (float(f"{of[index]:.{FIGURES}g}") for of in (self.parts.mean(axis=0), self.sigmas))
        return Noise(mean=mean, sigma=sigma, n=len(self.parts), k=k)

    @property
    def distances(self) -> NDArray[np.float64]:
        """How far each weight's value is from that of round to nearest, beyond the room, [L]; 0 within it."""
        apart = np.abs(self.whole - (self.whole if self.rounded is None else self.rounded))
        return np.where(apart > self.room, apart, 0.0)

    def is_apart(self, index: int) -> bool:
        """Say whether a weight's value is farther from round to nearest than a healthy quantization's."""
        return bool(self.distances[index] > 0)

    def relative(self, k: float) -> tuple[str, float]:
        """Return the layer with the largest k·sigma / |mean|, and that ratio: the drift that another text makes.

        Of weights, the drift that another quantization makes.
        """
        room = k * self.sigmas if self.rounded is None else np.broadcast_to(self.room, self.whole.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(room > 0, room / np.abs(self.parts.mean(axis=0)), 0.0)
        worst = int(np.argmax(shares))
        return self.layers[worst], float(shares[worst])


def _finite(series: Series) -> NDArray[np.float64]:
    """Return the values, [L], with `IDENTICAL` in the place of +∞ dB."""
    return np.minimum(series.values, IDENTICAL) if series.query.unit == "dB" else series.values


def _errors(series: Series) -> NDArray[np.float64]:
    """Return the standard error of each value, [L]; 0 where it is no estimate."""
    ends = [series.intervals.get(layer, (0.0, 0.0, 0)) for layer in series.layers]
    # An interval that ends at +∞ dB has no width.
    errors = [(high - low) / STANDARD_ERRORS if math.isfinite(high) else 0.0 for low, high, _ in ends]
    return np.array(errors, dtype=np.float64)


def proposals_of(assertion: Assertion, spread: Spread, schemes: Mapping[str, str] | None, k: float) -> list[Proposal]:
    """Return a proposal for each number that an assertion states as its `min` or `max`.

    A bound holds for all layers of its group, so the layer whose mean ± k·sigma reaches farthest decides. The bound is
    rounded outward to two digits (to a whole number where all values are whole), and it is never tighter than the value
    on all the data. A count of tokens that was the same in all n parts gets room for one more token, because something
    rarer than one part in n may not have come up.

    Raises:
        AnomalyError: a layer is in no group.
    """
    found = []
    measured = assertion if isinstance(assertion, MeasuredAssertion) else None
    perfect = measured and METRICS[measured.metric].best(measured.parameters)
    for side in SIDES:
        stated = assertion.stated.get(side)
        for group, bound in _plain_bounds(stated):
            layers = [i for i, name in enumerate(spread.layers) if _group_of(side, stated, name, schemes) == group]
            if layers:
                proposal = _proposal(side, group, bound, spread, layers, k)
                # Beyond what the number can be, a bound would check nothing.
                least, most = assertion.reach
                proposed = min(max(proposal.proposed, least), most)
                if proposed == perfect:  # which no number of samples shows
                    proposed += ROOM_OF_PERFECT if side == "max" else -ROOM_OF_PERFECT
                found.append(replace(proposal, proposed=proposed))
    return found


def _plain_bounds(stated: Stated | None) -> list[tuple[str, float]]:
    """Return the group and the number of each bound that doesn't follow the last release."""
    if isinstance(stated, dict):
        return [(group, bound) for group, bound in stated.items() if isinstance(bound, float)]
    return [] if stated is None or isinstance(stated, Relative) else [("", stated)]


def _group_of(side: Side, stated: Stated | None, layer: str, schemes: Mapping[str, str] | None) -> str:
    """Return the group that gives a layer its bound; empty for a bound of all layers."""
    assert stated is not None
    # `key_of` gives the side alone, or the side and the group.
    return (*key_of(side, stated, layer, schemes), "")[1]


def _proposal(side: Side, group: str, bound: float, spread: Spread, layers: Sequence[int], k: float) -> Proposal:
    farthest = max if side == "max" else min
    noises = {index: spread.noise(index, k) for index in layers}
    decides = farthest(layers, key=lambda index: noises[index].floor(side))
    # The suite itself runs on all the data, so the bound has to hold there as well.
    reached = farthest(noises[decides].floor(side), *spread.whole[layers].tolist())
    whole = bool((spread.parts[:, layers] == np.round(spread.parts[:, layers])).all())
    if spread.unit == "tokens" and side == "max" and noises[decides].steady:
        reached += SPARE
    proposed = float(math.ceil(reached) if side == "max" else math.floor(reached)) if whole else outward(side, reached)
    return Proposal(side, group, spread.layers[decides], bound, proposed, noises[decides])


@dataclass(frozen=True)
class Calibrated:
    """The result of one assertion: a proposal for each of its bounds, and a remark on what has no plain bound."""

    id: str
    proposals: Sequence[Proposal] = ()
    remark: str = ""


def of_answers(assertion: MeasuredAssertion, whole: Series, k: float) -> Calibrated:
    """Return the proposals for a number of answers: what chance makes of a perfect one, by the error of its interval.

    No part of the data changes what a model answers; another quantization does, by chance. A number that lies beyond
    that room takes the place of the perfect one. `k`: as for `Sampled.finding`, but no more than `ANSWER_SIGMAS`.

    Raises:
        AnomalyError: there are too few prompts for an interval, or for a bound that checks anything.
    """
    layer, perfect = whole.layers[0], METRICS[assertion.metric].best(assertion.parameters)
    value, (low, high, count) = float(whole.values[0]), whole.intervals[layer]
    if math.isnan(low):
        raise AnomalyError(f"{count} prompts give no interval: 8 such answers do (generation.num_prompts)")
    # Where no answer differs, another quantization may still lose one.
    k, sigma = min(k, ANSWER_SIGMAS), max((high - low) / STANDARD_ERRORS, 1 / count)
    odd = perfect is not None and abs(value - perfect) > k * sigma
    centre = value if perfect is None or odd else perfect
    spread = Spread([layer], np.full((2, 1), centre), whole.values, np.array([sigma]), whole.query.unit)
    found = []
    for each in proposals_of(assertion, spread, None, k):
        noise = each.noise.model_copy(update={"n": max(2, count), "over": "prompts"})
        reached = (max if each.side == "max" else min)(noise.floor(each.side), value)
        # Not as counts are rounded, for a perfect 0 or 1 is whole by chance.
        found.append(replace(each, noise=noise, proposed=outward(each.side, reached)))
        end = max(assertion.reach[0], whole.least.get(layer, -math.inf)) if each.side == "min" else assertion.reach[1]
        _check_useful(abs(found[-1].proposed - centre), abs(end - centre), count)
    room = max((abs(each.proposed - centre) for each in found), default=0.0)
    text = f"{count} prompts leave room of {number(room)}; {4 * count} would leave half of it (generation.num_prompts)"
    beyond = f"; {number(value)} is more than chance makes of {perfect:g}: look at it before you trust this bound"
    return Calibrated(assertion.id, found, f"{text}{beyond if odd else ''}" if found else "")


def _check_useful(room: float, most: float, count: int) -> None:
    """Refuse a bound that lets everything be lost. `room`: that it leaves; `most`: by how much the number can differ.

    Raises:
        AnomalyError: with how many prompts it would take.
    """
    if room >= most:
        needed = math.ceil(count * (room / max(USEFUL * most, 1 / count)) ** 2)
        raise AnomalyError(
            f"by chance {count} prompts may differ by {number(room)}, and {number(most)} is all that they could: "
            f"about {needed} such prompts would show half of it (generation.num_prompts)"
        )


@dataclass(frozen=True)
class Sampled:
    """Captures: one for each part of the data, one of all of it, and those of repeated passes over the first part.

    `again`: of the weights, as each healthy way of quantizing the original again makes them (`HEALTHY`), round to
    nearest first; none where no weight is asked for. `wanted`: how many samples the suite itself runs on.
    """

    parts: Sequence[Capture]
    whole: Capture
    repeated: Sequence[Capture]
    again: Sequence[Capture] = ()
    wanted: int = 0

    @classmethod
    def of(cls, subject: NamedSubject, file: SuiteFile, parts: int, passes: int, *, allow_code: bool) -> Sampled:
        """Run a suite's subject over parts of its data, and again over the first part until there are `passes`.

        Raises:
            SuiteError: no assertion needs a pass.
            InfraError: the subject can't be run.
        """
        requests = merge_requests(each.request for each in file.assertions if isinstance(each, MeasuredAssertion))
        if not requests:
            raise SuiteError(f"{shown_path(file.path)}:1: no assertion measures anything that could vary")
        with status(subject.name) as progress:
            captures, repeated = engine.capture_parts(
                subject, requests, parts, passes, allow_code=allow_code, progress=progress
            )
        whole = merge(captures)
        asked = [each.request for each in file.assertions if _of_stored_weights(each)]
        again = _quantized_again(subject, asked, whole) if asked else ()
        return cls(captures, whole, repeated, again, file.suite.data.num_samples)

    def finding(self, assertion: Assertion, k: float) -> Calibrated:
        """Return the proposals for an assertion.

        Raises:
            AnomalyError: a part gives no sound number.
        """
        if not isinstance(assertion, MeasuredAssertion):
            return Calibrated(assertion.id, remark="reads files, which do not vary")
        if assertion.metric == "weight_gain":
            return Calibrated(
                assertion.id, remark="its bound follows from the bits of the weights: the metric has its own room"
            )
        whole = checked_series(assertion, self.whole)
        if METRICS[assertion.metric].drawn_from(assertion.parameters) == "prompts":
            return of_answers(assertion, whole, k)
        try:
            spread = Spread.of([checked_series(assertion, part) for part in self.parts], whole)
        except AnomalyError as error:
            if not whole.intervals or self.size >= self.wanted:
                raise
            # The suite runs on more than a part: an estimate that takes as much still has its error on all of it.
            spread = Spread.of([whole] * 2, whole)
            remark = f"no part shows it alone ({error}): sigma is the standard error on all of the data"
            return Calibrated(assertion.id, proposals_of(assertion, spread, self.whole.schemes, k), remark)
        if _of_stored_weights(assertion):
            spread = self._with_room(assertion, spread, k)
        proposals = proposals_of(assertion, spread, self.whole.schemes, k)
        remarks = [*_remarks(assertion, spread, k), *self._thin(spread, proposals)]
        return Calibrated(assertion.id, proposals, "; ".join(remarks))

    def _thin(self, spread: Spread, proposals: Sequence[Proposal]) -> Iterator[str]:
        """Yield why too little was measured for these bounds to be trusted, and what would be enough."""
        if spread.rounded is not None or not proposals or not self.whole.tokens:
            return
        parts, tokens = len(self.parts), sum(map(len, self.whole.tokens)) // len(self.parts)
        why, enough, times = [], [], TOKENS_ENOUGH / tokens
        if parts < PARTS_ENOUGH:
            why.append(f"{parts} parts tell sigma to ± {1 / math.sqrt(2 * (parts - 1)):.0%}")
            enough.append(f"--parts {PARTS_ENOUGH}")
        if times > 1:
            why.append(f"a part has {tokens} tokens")
        # a count of a few tokens is Poisson's, and its room is a few tokens
        wide = [each for each in proposals if 0 < abs(each.noise.mean) <= each.noise.k * each.noise.sigma]
        if wide and spread.unit != "tokens":
            most = max(wide, key=lambda each: each.noise.sigma / abs(each.noise.mean)).noise
            share = most.k * most.sigma / abs(most.mean)
            why.append(f"{most.k:g} sigma are {share:.2g} × the mean")
            times = max(times, share**2)  # sigma of a mean falls as the root of the tokens
        if times > MOST_TEXT:
            enough.append("more text hardly helps where the mean is about 0: state the bound by hand")
        elif times > 1:
            enough.append(f"data.num_samples: {math.ceil(times * self.size)} in the suite")
        if why:
            yield f"thin: {', '.join(why)}; enough: {' and '.join(enough)}"

    @property
    def size(self) -> int:
        """How many windows of the text, or other samples, a part has."""
        return self.samples // len(self.parts)

    @property
    def samples(self) -> int:
        """How many samples all parts have; 0 where the model never ran."""
        runs = (numbers.sample for (_, site), numbers in self.whole.sites.items() if site != "weight")
        return len(self.whole.tokens) or max((int(each.max()) + 1 for each in runs if len(each)), default=0)

    def _with_room(self, assertion: MeasuredAssertion, spread: Spread, k: float) -> Spread:
        """Return a spread of weights with the room that another quantization of the same original needs."""
        ways = [spread.of_layers(checked_series(assertion, capture)) for capture in self.again] or [spread.whole]
        if assertion.metric in WEIGHT_ERRORS and "max" not in assertion.stated:
            return replace(spread, rounded=ways[0], room=ROOMS[assertion.parameters.get("by", "tensor")])
        room = k * np.std(ways, axis=0, ddof=1) if self.again else np.zeros(len(spread.whole))
        return replace(spread, rounded=ways[0], room=room)

    def finding_at(self, file: SuiteFile, index: int, k: float) -> Calibrated:
        """Return the proposals for the assertion at an index of a suite.

        Raises:
            InfraError: a part gives no sound number.
        """
        assertion = file.assertions[index]
        try:
            return self.finding(assertion, k)
        except AnomalyError as error:
            raise InfraError(f"{file.place_of(index)}: {assertion.id} can't be calibrated: {error}") from None

    def data_text(self, file: SuiteFile) -> str:
        """Return what was measured in words: `8 parts of 5 × 512 tokens`; `its files` where no model ran."""
        if not self.samples and self.whole.provenance.model.files:
            return "its files"
        if file.suite.data.answers is not None:
            return f"{len(self.parts)} parts of {self.size} prompts"
        if not self.whole.tokens or any(len(ids) != file.suite.data.seq_len for ids in self.whole.tokens):
            return f"{len(self.parts)} parts of {self.size} samples"  # pictures, sounds
        return f"{len(self.parts)} parts of {self.size} × {file.suite.data.seq_len} tokens"

    def lines(self, findings: Sequence[Calibrated], file: SuiteFile, *, stated: bool = True) -> Iterator[str]:
        """Yield what was measured, a table of the proposals, and the remarks. `stated`: show the suite's own bounds."""
        model, data = file.suite.model, file.suite.data
        assert model is not None
        ran = f" of {data.source}; {self._repeats_text(file)}" if self.samples else ", which no data changes"
        yield f"{model.id}: {self.data_text(file)}{ran}"
        if self.samples and self.size < data.num_samples:
            what = "windows" if data.answers is None else "prompts"
            less = f"a part has {self.size} {what}, the suite {data.num_samples}: {data.source} has too little text"
            yield f"{less} for {len(self.parts)} parts as large as the suite's data, which vary less"
        rows = [_cells(each.id, proposal, stated=stated) for each in findings for proposal in each.proposals]
        if rows:
            yield from text_table([["assertion", "bound", "mean ± sigma", "floor", "proposed", "decided by"], *rows])
        yield from (f"{each.id}: {each.remark}" for each in findings if each.remark)

    def _repeats_text(self, file: SuiteFile) -> str:
        """Say by how much, relatively, any number of a repeated pass differs from the first pass at most."""
        if not self.repeated:
            return "no pass was repeated"
        own = [each for each in file.assertions if isinstance(each, MeasuredAssertion)]
        apart = max((_apart(each, self.parts[0], again) for each in own for again in self.repeated), default=0.0)
        return f"deterministic: {f'no, repeated passes differ by {apart:.2g}' if apart else 'yes'}"


def _of_stored_weights(assertion: Assertion) -> TypeGuard[MeasuredAssertion]:
    """Say whether an assertion is on numbers of weights that another quantization changes and no text does."""
    if not isinstance(assertion, MeasuredAssertion) or assertion.site != "weight":
        return False
    # what a loader makes of a file is the same in every quantization
    return assertion.metric != "weight_gain" and STORED not in assertion.request.statistics


def _quantized_again(subject: NamedSubject, requests: Sequence[Request], whole: Capture) -> list[Capture]:
    """Return the weights as each of `HEALTHY` makes them of the original; none where its files aren't read."""
    of_files = bool(whole.provenance.weights_read and not whole.tokens)
    modules = () if of_files else whole.modules
    try:
        files, made = files_of(subject), []
        with status(subject.name) as progress:
            for number, way in enumerate(HEALTHY, 1):
                step(number, len(HEALTHY))
                made.append(capture_weights(files, requests, modules=modules, again=way, progress=progress))
        return made
    except (AnomalyError, InfraError) as error:
        logger.debug("no weights are quantized again: %s", error)
        return []


def _cells(name: str, each: Proposal, *, stated: bool) -> list[str]:
    noise, floor = each.noise, f"{each.noise.floor(each.side):.4g}"
    bound = each.side + (f" of {each.group}" if each.group else "") + (f" {each.bound:g}" if stated else "")
    return [name, bound, f"{noise.mean:g} ± {noise.sigma:g}", floor, f"{each.proposed:g}", each.layer]


def _apart(assertion: MeasuredAssertion, one: Capture, other: Capture) -> float:
    """Return the largest relative difference between two passes over the same data; 0 where one gives no number."""
    try:
        first, again = (_finite(checked_series(assertion, capture)) for capture in (one, other))
    except (AnomalyError, InfraError):  # `finding` reports what has no sound number
        return 0.0
    apart = np.abs(again - first)
    # Where nothing differs, 0 / 0 must not arise.
    return float((apart[apart > 0] / np.abs(first[apart > 0])).max(initial=0.0))


def _remarks(assertion: MeasuredAssertion, spread: Spread, k: float) -> Iterator[str]:
    """Yield how the numbers under a baseline, an `equals` or a relative bound vary, and what is odd in them."""
    if spread.rounded is not None:
        yield from _weight_remarks(assertion, spread, k)
    elif assertion.baseline is not None:
        layer, share = spread.relative(k)
        yield f"a baseline is held on its own text; another one moves {layer} by {share:.0%} ({k:g} sigma)"
    if assertion.equals is not None:
        differing = sorted(set(np.unique(spread.parts).tolist()))
        values = ", ".join(f"{value:g}" for value in differing[:4])
        yield f"equals {assertion.equals}: {values} in the {len(spread.parts)} parts"
    if assertion.follows:
        yield f"{assertion.follows} follows the last release"


def _weight_remarks(assertion: MeasuredAssertion, spread: Spread, k: float) -> Iterator[str]:
    """Yield which weights are farther from round to nearest than usual, and what moves those under a baseline."""
    assert spread.rounded is not None
    decibels = assertion.metric in WEIGHT_ERRORS
    if odd := np.flatnonzero(spread.distances).tolist():
        at = max(odd, key=lambda index: spread.distances[index])
        more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
        usual = float(np.broadcast_to(spread.room, spread.whole.shape)[at])
        below, away = spread.rounded[at] - spread.whole[at], number(float(spread.distances[at]))
        where = f"{below:.1f} dB below" if decibels else f"{away} away from"
        room = f"{usual:g} dB" if decibels else number(usual)
        text = f"{spread.layers[at]}{more} is {where} the original rounded to nearest in its scheme, where {room} are"
        yield f"{text} usual: look at it before you trust this bound"
    if assertion.baseline is None:
        return
    layer, share = spread.relative(k)
    if decibels:
        most = float(np.max(spread.room))
        yield f"no text moves it, and another quantization may, by {most:g} dB: baseline: {{abs: {most:g}}}"
    elif share:
        yield f"no text moves it, and another quantization may move {layer} by {share:.2g} of its value"

"""What moved between two sides, worst first; which outlier tokens only one of them has; and conditions on both.

A condition, `--fail-on 'magnitude.top1 > 5%'`, fails a comparison. It is parsed, never evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from ...captures import Capture, LayerSite
from ...common import AnomalyError, SuiteError, did_you_mean
from ...metrics import METRICS, View
from ...verdicts import channel_of, context
from .sides import USUAL, DiffMeasure, DiffSide, MeasureTable, compute_table, compute_tables, tokens_hash

TOKEN_COUNTS = ("new_outliers", "lost_outliers")
_FORM = re.compile(
    r"\s*(?P<name>[a-z_0-9]+)(?:\.(?P<stat>[\w.]+))?(?:\s*@(?P<site>" + "|".join(get_args(LayerSite)) + r"))?"
    r"\s*(?P<sign>[<>])\s*(?P<number>[+\-−]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?P<percent>%?)\s*"
)
HOW = "write METRIC[.STAT][@SITE] > NUMBER[%], such as 'magnitude.top1 > 5%', 'rms@weight > +1%' or 'new_outliers > 0'"


@dataclass(frozen=True)
class Change:
    """A layer's number on both sides. `depth`: the layer's index in the model's order."""

    measure: DiffMeasure
    layer: str
    old: float
    new: float
    depth: int

    @property
    def delta(self) -> float:
        """New − old."""
        return self.new - self.old

    @property
    def relative(self) -> float:
        """(new − old) / |old|; ±∞ from zero and between a number and ∞ dB, else NaN where one is not finite."""
        if not (math.isfinite(self.old) and math.isfinite(self.new)):
            odd = [value for value in (self.old, self.new) if not math.isfinite(value)]
            known = len(odd) == 1 and self.measure.is_perfect(odd[0])
            return self.delta if known else 0.0 if self.old == self.new else math.nan
        if self.delta == 0:
            return 0.0
        return self.delta / abs(self.old) if self.old else math.copysign(math.inf, self.delta)

    @property
    def text(self) -> str:
        """The relative change in words: `+5.2 %`, or that the layer is equal to the reference now, or no longer."""
        if math.isinf(self.relative) and self.measure.is_perfect(self.new):
            return "better: equal now"
        if math.isinf(self.relative) and self.measure.is_perfect(self.old):
            return "equal no more"
        return relative_text(self.relative)

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Layer, measure, old and new value, and how far it moved, for a table."""
        return self.layer, str(self.measure), self.measure.text_of(self.old), self.measure.text_of(self.new), self.text

    @property
    def size(self) -> float:
        """The sort key, the magnitude of the relative change; ∞ where it is not finite."""
        return math.inf if math.isnan(self.relative) else abs(self.relative)


def relative_text(change: float) -> str:
    """Write a relative change: `+5.2 %`."""
    if math.isnan(change):
        return "not finite"
    if math.isinf(change):
        return "from 0"
    if abs(change) < 5e-5:
        return "0 %" if not change else "≈ 0 %"
    return f"{change * 100:+.3g} %".replace("-", "−")


@dataclass(frozen=True)
class OutlierToken:
    """A token that is an outlier on one side only. `ratio`: its largest multiple of the median, over `layers`."""

    sample: int
    position: int
    before: str
    text: str
    after: str
    layers: tuple[str, ...]
    ratio: float
    channel: int


@dataclass(frozen=True)
class Diff:
    """Two sides compared. `changes`: every layer of every common measure, worst first.

    `appeared`, `vanished`: measure → layers that one side lacks. `skipped`: measures that one side lacks.
    `outlier_tokens`: those of one side only, as `new` and `lost`; empty where they are not known, which takes captures
    of the same tokens on both sides.
    """

    old: DiffSide
    new: DiffSide
    changes: Sequence[Change]
    appeared: Mapping[DiffMeasure, Sequence[str]]
    vanished: Mapping[DiffMeasure, Sequence[str]]
    skipped: Sequence[DiffMeasure]
    outlier_tokens: Mapping[str, Sequence[OutlierToken]]
    threshold: float

    @property
    def measures(self) -> list[DiffMeasure]:
        """The measures that both sides have, in the order of their largest changes."""
        return list(dict.fromkeys(change.measure for change in self.changes))


def compare_sides(
    old: DiffSide, new: DiffSide, also: Iterable[tuple[str, str | None]] = (), threshold: float = 64.0
) -> Diff:
    """Compare two sides. `also`: metrics (with their stat) beyond the usual ones; `threshold`: of outlier tokens.

    Raises:
        AnomalyError: nothing can be compared: other tokens, other definitions, or no measure in common.
    """
    wanted = [*USUAL, *also]
    left, right = _tables(old, new, wanted), _tables(new, old, wanted)
    common = [measure for measure in left if measure in right]
    if not common:
        held = [", ".join(sorted({str(measure) for measure in side})) or "nothing" for side in (left, right)]
        raise AnomalyError(f"nothing to compare: {old.path} has {held[0]}; {new.path} has {held[1]}")
    for measure in common:
        _check(measure, left[measure], right[measure])
    changes = [change for measure in common for change in _changes(measure, left[measure], right[measure])]
    if not changes:
        raise AnomalyError(f"{old.path} and {new.path} have no layer in common")
    return Diff(
        old,
        new,
        changes=sorted(changes, key=lambda change: (-change.size, change.depth)),
        appeared={measure: only for measure in common if (only := _only(right[measure], left[measure]))},
        vanished={measure: only for measure in common if (only := _only(left[measure], right[measure]))},
        skipped=[measure for measure in {**left, **right} if measure not in common],
        outlier_tokens=_tokens(old, new, threshold),
        threshold=threshold,
    )


def _tables(
    side: DiffSide, other: DiffSide, wanted: Sequence[tuple[str, str | None]]
) -> Mapping[DiffMeasure, MeasureTable]:
    """Return the tables of a side. From a capture those are computed that `wanted` names or that the other side has."""
    if side.capture is None:
        return side.tables
    if other.capture is not None:
        # Of two captures more can be computed than both sides have written down.
        return compute_tables(side.capture, wanted)
    made = {measure: compute_table(side.capture, measure, table.values) for measure, table in other.tables.items()}
    return {measure: table for measure, table in made.items() if table is not None}


def _check(measure: DiffMeasure, old: MeasureTable, new: MeasureTable) -> None:
    if old.definition != new.definition:
        raise AnomalyError(
            f"{measure} was measured by another definition: {old.definition} and {new.definition}; "
            "make both sides with the same version"
        )
    # Weights don't depend on the tokens.
    if measure.site != "weight" and old.data is not None and new.data is not None and old.data != new.data:
        hashes = [digest.partition(":")[2][:12] for digest in (old.data, new.data)]
        raise AnomalyError(
            f"the two sides were measured on other tokens ({' and '.join(hashes)}): "
            "run both over the same data, tokenizer, seed, num_samples and seq_len"
        )


def _changes(measure: DiffMeasure, old: MeasureTable, new: MeasureTable) -> list[Change]:
    # In the new side's order, which is the model's: `depth` is the place in it.
    common = [layer for layer in new.values if layer in old.values]
    return [Change(measure, layer, old.values[layer], new.values[layer], depth) for depth, layer in enumerate(common)]


def _only(side: MeasureTable, other: MeasureTable) -> list[str]:
    return [layer for layer in side.values if layer not in other.values]


def _tokens(old: DiffSide, new: DiffSide, threshold: float) -> dict[str, list[OutlierToken]]:
    # At the same position of other data there is another token.
    if old.capture is None or new.capture is None or tokens_hash(old.capture) != tokens_hash(new.capture):
        return {}
    left, right = find_outlier_tokens(old.capture, threshold), find_outlier_tokens(new.capture, threshold)
    return {
        "new": [token for position, token in right.items() if position not in left],
        "lost": [token for position, token in left.items() if position not in right],
    }


def find_outlier_tokens(capture: Capture, threshold: float) -> dict[tuple[int, int], OutlierToken]:
    """Return the tokens above threshold × median at any site: (sample, position) → token, furthest out first."""
    seen: dict[tuple[int, int], list[tuple[float, str, int]]] = {}
    for (layer, site), numbers in capture.sites.items():
        if "token_max" not in numbers or site == "weight" or not numbers.token_axis:
            continue
        view = View(numbers, site, "all", capture.sinks, layer)
        for population in range(numbers.populations):
            ratios = view.ratios(population)
            for position in np.flatnonzero(ratios > np.float32(threshold)).tolist():  # float32, as the metric compares
                sighting = (float(ratios[position]), f"{layer} {site}", channel_of(numbers, population, position))
                seen.setdefault((int(numbers.sample[population]), position), []).append(sighting)
    found = {}
    for (sample, position), sightings in sorted(seen.items(), key=lambda item: -max(item[1])[0]):
        before, text, after = context(capture, sample, position)
        ratio, _, channel = max(sightings)
        layers = tuple(dict.fromkeys(layer for _, layer, _ in sightings))
        found[sample, position] = OutlierToken(sample, position, before, text, after, layers, ratio, channel)
    return found


@dataclass(frozen=True)
class Condition:
    """A limit on changes. `limit`: relative if `percent`. `direction`: ±1 of a signed limit, 0 for both directions."""

    text: str
    name: str
    stat: str | None
    site: str | None
    limit: float
    direction: int
    percent: bool

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse a condition.

        Raises:
            SuiteError: it has another form, or names an unknown metric.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise SuiteError(f"--fail-on '{text}': {HOW}")
        name, number = match["name"], match["number"].replace("−", "-")
        if name not in METRICS and name not in TOKEN_COUNTS:
            raise SuiteError(
                f"--fail-on '{text}': unknown metric '{name}'{did_you_mean(name, [*METRICS, *TOKEN_COUNTS])}"
            )
        if name in METRICS and match["stat"] and "stat" not in METRICS[name].parameters:
            raise SuiteError(f"--fail-on '{text}': {name} has no stat")
        direction = -1 if number[0] == "-" else 1 if number[0] == "+" else 0
        # `< 5%` would hold of every change that is small, and `> -5%` of nearly all: neither is what was
        # meant.
        if (match["sign"] == "<") != (direction < 0):
            raise SuiteError(f"--fail-on '{text}': a rise is '> +5%', a fall is '< -5%', either is '> 5%'")
        scale = 0.01 if match["percent"] else 1.0
        limit = abs(float(number)) * scale
        return cls(text.strip(), name, match["stat"], match["site"], limit, direction, bool(match["percent"]))

    @property
    def metric(self) -> tuple[str, str | None] | None:
        """The metric and stat that it needs; None for outlier tokens."""
        return None if self.name in TOKEN_COUNTS else (self.name, self.stat)

    def violations(self, diff: Diff) -> list[str]:
        """Return a line for each change that breaks the condition, worst first.

        Raises:
            AnomalyError: the comparison has no such measure, so the condition would check nothing.
        """
        if self.name in TOKEN_COUNTS:
            return self._of_tokens(diff)
        changes = [change for change in diff.changes if self._concerns(change)]
        if not changes:
            shown = ", ".join(sorted({str(measure) for measure in diff.measures}))
            # A condition that concerns nothing would always hold.
            raise AnomalyError(f"--fail-on '{self.text}': the two sides don't have it in common; they share {shown}")
        lines = [
            f"{layer}: {measure} {old} → {new} ({moved})"
            for layer, measure, old, new, moved in (change.cells for change in self.broken_by(diff))
        ]
        measures = {change.measure for change in changes}
        for word, sides in (("vanished", diff.vanished), ("appeared", diff.appeared)):
            # A layer that one side lacks has no change to judge, and must not pass for one that did not move.
            lines += [
                f"{layer}: {word}, so {measure} has nothing to compare"
                for measure, layers in sides.items()
                if measure in measures
                for layer in layers
            ]
        return lines

    def broken_by(self, diff: Diff) -> list[Change]:
        """Return the changes that break the condition, worst first."""
        if self.name in TOKEN_COUNTS:
            return []
        return [change for change in diff.changes if self._concerns(change) and self._broken(change)]

    def _concerns(self, change: Change) -> bool:
        measure = change.measure
        return (
            measure.metric == self.name
            and self.stat in (None, measure.arguments.get("stat"))
            and self.site in (None, measure.site)
        )

    def _broken(self, change: Change) -> bool:
        moved = change.relative if self.percent else change.delta
        if math.isnan(moved):
            # Two equal infinities have no difference and did not move; of any other NaN no limit can say that
            # it is harmless.
            return change.size > 0
        return (moved * self.direction if self.direction else abs(moved)) > self.limit

    def _of_tokens(self, diff: Diff) -> list[str]:
        tokens = diff.outlier_tokens.get(self.name.removesuffix("_outliers"))
        if tokens is None:
            raise AnomalyError(
                f"--fail-on '{self.text}': the outlier tokens are known only with a capture on both sides"
            )
        return [f"{len(tokens)} {self.name.replace('_', ' ')}"] if len(tokens) > self.limit else []


def parse_all(texts: Sequence[str]) -> list[Condition]:
    """Parse all conditions of a command line."""
    return [Condition.parse(text) for text in texts]

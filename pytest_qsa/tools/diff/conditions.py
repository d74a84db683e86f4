"""`--fail-on 'magnitude.top1 > 5%'`: conditions that fail a comparison. They are parsed, never evaluated."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...common import AnomalyError, SuiteError, did_you_mean
from ...metrics import METRICS
from .changes import Change, Diff

TOKEN_COUNTS = ("new_outliers", "lost_outliers")
_FORM = re.compile(
    r"\s*(?P<name>[a-z_0-9]+)(?:\.(?P<stat>[\w.]+))?(?:\s*@(?P<site>input|output|weight))?"
    r"\s*(?P<sign>[<>])\s*(?P<number>[+\-−]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?P<percent>%?)\s*"
)
HOW = "write METRIC[.STAT][@SITE] > NUMBER[%], such as 'magnitude.top1 > 5%', 'rms@weight > +1%' or 'new_outliers > 0'"


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
            raise AnomalyError(f"--fail-on '{self.text}': the two sides don't have it in common; they share {shown}")
        lines = [
            f"{layer}: {measure} {old} → {new} ({moved})"
            for layer, measure, old, new, moved in (change.cells for change in changes if self._broken(change))
        ]
        measures = {change.measure for change in changes}
        for word, sides in (("vanished", diff.vanished), ("appeared", diff.appeared)):
            lines += [f"{layer}: {word}, so {measure} has nothing to compare" for measure, layers in sides.items()
                      if measure in measures for layer in layers]  # fmt: skip
        return lines

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

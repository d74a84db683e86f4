"""What can be compared: a measure is a metric as it was asked for, and a table is its number at each layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...common import number
from ...metrics import METRICS
from ...verdicts import BaselineFile


@dataclass(frozen=True)
class Measure:
    """A metric with its parameters at a site, and how samples and layers were folded. `parameters`: sorted JSON."""

    metric: str
    site: str
    parameters: str = "{}"
    positions: str | None = None
    reduce: str | None = None
    over: str | None = None

    @classmethod
    def of(cls, query: Mapping[str, Any]) -> Measure:
        """Read it from a query as a report keeps it, or from a baseline's, where the parameters are not nested."""
        named = {"definition", "site", "positions", "reduce", "over"}
        parameters = query["parameters"] if "metric" in query else {k: v for k, v in query.items() if k not in named}
        return cls(
            query["definition"].partition("/")[0], query["site"], json.dumps(parameters, sort_keys=True),
            query.get("positions"), query.get("reduce"), query.get("over"),
        )  # fmt: skip

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters as a mapping."""
        arguments: dict[str, Any] = json.loads(self.parameters)
        return arguments

    @property
    def name(self) -> str:
        """The name by which `--fail-on` knows it: `magnitude.top1`."""
        stat = self.arguments.get("stat")
        return f"{self.metric}.{stat}" if stat is not None else self.metric

    def is_perfect(self, value: float) -> bool:
        """Say whether a value is the +∞ dB of what does not differ from the reference at all."""
        return value == math.inf and self.metric in METRICS and METRICS[self.metric].unit == "dB"

    def text_of(self, value: float) -> str:
        """Write one of its values: `12.3`, `∞ dB`."""
        return "∞ dB" if self.is_perfect(value) else number(value)

    def __str__(self) -> str:
        """Write it as short as a table's cell has to be: `magnitude.top1 @output`."""
        more = [f"positions {self.positions}"] if self.positions not in (None, "all") else []
        more += [f"{self.over} over layers"] if self.over else []
        return f"{self.name} @{self.site}" + (f" ({', '.join(more)})" if more else "")


@dataclass(frozen=True)
class Table:
    """A measure's numbers. `values`: layer → number. `data`: the hash of the tokens, where known."""

    definition: str
    data: str | None
    values: Mapping[str, float]

    @classmethod
    def of_baseline(cls, baseline: BaselineFile) -> Table:
        """Take the numbers of a baseline."""
        return cls(baseline.query["definition"], baseline.data, baseline.values)

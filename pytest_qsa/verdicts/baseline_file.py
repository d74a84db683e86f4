"""The text of a baseline: small, ordered, rounded to what is meaningful, so that its diff reads as a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..captures import UNKNOWN_MODEL, ModelProvenance
from ..common import BaselineError
from ..metrics import Series

FORMAT = "qsa-baseline/1"
DIGITS = 5


@dataclass(frozen=True)
class BaselineFile:
    """A baseline. `query`: all that defines the number. `data`: the tokens' hash. `made_with`: for the reader."""

    values: Mapping[str, float]
    query: Mapping[str, Any]
    data: str | None
    made_with: ModelProvenance = UNKNOWN_MODEL

    @classmethod
    def of(cls, series: Series, data: str | None, made_with: ModelProvenance = UNKNOWN_MODEL) -> BaselineFile:
        """Make the baseline of a series."""
        query = series.query
        asked = {
            "definition": query.definition, "site": query.site, "positions": query.positions, "reduce": query.reduce,
            "over": query.over, **query.parameters,
        }  # fmt: skip
        values = {layer: rounded(value) for layer, value in zip(series.layers, series.values.tolist(), strict=True)}
        return cls(values, {k: v for k, v in asked.items() if v is not None}, data, made_with)

    def dump(self) -> str:
        """Write it; the layers stay in the model's order, one a line."""
        content = {
            "data": self.data,
            "format": FORMAT,
            "made_with": dict(sorted(self.made_with.for_baseline().items())),
            "query": dict(sorted(self.query.items())),
            "values": {layer: _written(value) for layer, value in self.values.items()},
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> BaselineFile:
        """Read it.

        Raises:
            BaselineError: it is not a baseline of this format; a merge conflict left in it, say.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
            values = {layer: float(value) for layer, value in content["values"].items()}
            return cls(values, content["query"], content["data"], ModelProvenance.of_baseline(content["made_with"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaselineError(f"the baseline can't be read ({error}); make it anew with --snapshot-update") from None


def is_baseline(path: Path) -> bool:
    """Say whether a file is a baseline of ours, by its content; a foreign file must never be touched."""
    if path.suffix != ".json":
        return False
    try:
        return f'"format": "{FORMAT.partition("/")[0]}/' in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _written(value: float) -> int | float | str:
    """Write a number as JSON knows it: whole ones without a point, an SQNR of +∞ dB as a string, as in report.json."""
    if not math.isfinite(value):
        return str(value).replace("inf", "Infinity")
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def rounded(value: float) -> float:
    """Round to the digits that a baseline keeps."""
    return float(f"{value:.{DIGITS}g}")

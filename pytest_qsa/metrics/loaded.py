"""The weights of a loaded model against the checkpoint's own files: what the loader made of them. numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..captures import STORED, Site, SiteNumbers, Statistic
from .quantization import decibels
from .registry import View, metric

if TYPE_CHECKING:
    from ..captures import Capture
    from ..verdicts import Verdict

ONE_FACTOR = 40.0
"""So many dB above what is left of a difference, one factor explains it."""
ALIKE = 0.95
"""The cosine above which several factors, near each other, do: projections that were packed together, say."""


def _needs(site: Site, positions: str, parameters: Mapping[str, Any]) -> frozenset[Statistic]:
    return frozenset({STORED})


@metric(_needs, reduce=None, sites=("weight",))
def loaded_weights(view: View) -> float:
    """Take ‖w − w₀‖ / ‖w₀‖, w the loaded model's dequantized weight, w₀ the file's by its quantizer's own library."""
    assert view.numbers.stored is not None
    signal, error, _, _ = view.numbers.stored.tolist()
    if not signal:
        return 0.0 if not error else math.inf
    return math.sqrt(error / signal)


def blame(numbers: SiteNumbers) -> str:
    """Say what the loader made of a weight: a factor where one explains the difference."""
    if numbers.stored is None:
        return ""
    signal, error, product, own = numbers.stored.tolist()
    if not error:
        return "as in the file"
    if not own:
        return "the loader left zeros"
    gain = product / signal if signal else math.nan
    left = own - gain * product
    if math.isfinite(gain) and decibels(own, max(left, 0.0)) > ONE_FACTOR:
        return f"the loader made it × {gain:.4g}"
    cosine = product / math.sqrt(signal * own) if signal else math.nan
    if cosine > ALIKE:
        return f"the loader made it about × {gain:.4g}"
    return f"the loader made another of it, cosine {cosine:.2f}"


def blamed(verdict: Verdict, capture: Capture) -> Verdict:
    """Say of each weight that is not as in its file what the loader made of it."""
    if verdict.query.get("metric") != "loaded_weights" or verdict.query.get("over"):
        return verdict
    rows = [replace(row, detail=blame(capture.sites[row.layer, "weight"])) for row in verdict.rows]
    if not verdict.failing_rows:
        return replace(verdict, rows=rows)
    text = f"{verdict.headline}; {rows[0].detail}"
    return replace(verdict, rows=rows, headline=text, hints=[*verdict.hints, _ADVICE])


_ADVICE = "the files were unpacked by their quantizer's own library: the loader is at fault, not the checkpoint"

"""The weights of a loaded model against the checkpoint's own files: what the loader made of them. numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..captures import STORED, Site, SiteNumbers, Statistic
from .fidelity import decibels
from .registry import View, metric

ONE_FACTOR = 40.0
"""One factor explains a difference if it leaves this many dB less of it."""
ALIKE = 0.95
"""Above this cosine several factors near each other explain it: those of projections packed together, say."""


def _needs(site: Site, positions: str, parameters: Mapping[str, Any]) -> frozenset[Statistic]:
    return frozenset({STORED})


@metric(_needs, reduce=None, sites=("weight",))
def loaded_weights(view: View) -> float:
    """Take ‖w − w₀‖ / ‖w₀‖, w the loaded model's dequantized weight, w₀ the file's by its quantizer's own library."""
    signal, error, _, _ = view.numbers.stored.tolist()
    if not signal:
        return 0.0 if not error else math.inf
    return math.sqrt(error / signal)


def made_by_loader(numbers: SiteNumbers) -> str:
    """Say what the loader made of a weight: a factor where one explains the difference."""
    if "stored" not in numbers:
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

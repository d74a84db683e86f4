"""The words on the figures: what is drawn, of how many samples, and which positions count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...captures import Capture, Site

POSITIONS = {"all": "all positions", "no_sink": "positions without the sinks", "sink": "sinks only"}


def metric_title(query: Mapping[str, Any]) -> str:
    """Write the metric with its parameters and site: `outlier_tokens(threshold=64) at the output`."""
    parameters = {name: value for name, value in (query.get("parameters") or {}).items() if value != "auto"}
    arguments = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in parameters.items())
    name = query.get("metric", "value") + (f"({arguments})" if arguments else "")
    return f"{name} at the {query['site']}" if query.get("site") else name


def samples_of(capture: Capture, layers: Sequence[str], site: Site) -> int:
    """Count the samples behind the layers; 0 where the capture doesn't hold them."""
    numbers = capture.sites.get((layers[0], site)) if layers and site != "weight" else None
    return len(set(numbers.sample.tolist())) if numbers is not None else 0


def counted(count: int, noun: str) -> str:
    """Write `1 sample`, `8 samples`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def population(reduce: str | None, samples: int, positions: str | None) -> str:
    """Say how samples were folded and which positions count: `max over 8 samples · all positions`."""
    parts = []
    if samples:
        parts.append(f"{reduce or 'pooled'} over {counted(samples, 'sample')}")
    if positions:
        skipped = positions.partition(":")[2]
        parts.append(POSITIONS.get(positions) or (f"without the first {skipped} positions" if skipped else positions))
    return " · ".join(parts)


def bound_label(low: float | None, high: float | None) -> str:
    """Name a line that is drawn: `max 1`."""
    if low is not None and low == high:
        return f"equals {low:g}"
    return f"max {high:g}" if high is not None else f"min {low or 0.0:g}"

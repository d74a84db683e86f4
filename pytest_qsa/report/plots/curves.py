"""What the page draws its plots from: the numbers of a verdict's figures, as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ...captures import Capture
from ...common import counted
from ...verdicts import Verdict
from .figures import CHARTED, judged_layers
from .magnitudes import Outliers, judged_outliers, magnitudes_of, texts_of

MOST_BARS = 12
Curve = dict[str, Any]
"""`title`; `layers` in the model's order; `lines`: name → a number for each layer; `bars`: lists of bars, titled."""


def curves_of(verdict: Verdict, capture: Capture) -> dict[str, Curve]:
    """Return the numbers of the figures that fit a verdict: the figure's name, as `draw` has it, → its curve."""
    kinds = {"value": _value_curve, "outliers": _outlier_curve, "magnitude": _magnitude_curve}
    curves = {name: curve_of(verdict, capture) for name, curve_of in kinds.items()}
    return {name: curve for name, curve in curves.items() if curve is not None}


def drawn_by_page(verdict: Verdict) -> set[str]:
    """Return the names of the figures that the page draws itself: from a verdict's rows and curves, or from data."""
    return {*verdict.curves, *CHARTED, *(["value"] if len(verdict.rows) > 1 else [])}


def _value_curve(verdict: Verdict, capture: Capture) -> Curve | None:
    # The rows of a verdict on each layer are on the page already.
    judged = judged_layers(verdict, capture) if verdict.query.get("over") else None
    if judged is None:
        return None
    lines = {verdict.query["metric"]: _short(row.value for row in judged.rows)}
    return {"title": f"Value by layer, of which {verdict.query['over']} is judged", "lines": lines,
            "layers": [row.layer for row in judged.rows]}  # fmt: skip


def _magnitude_curve(verdict: Verdict, capture: Capture) -> Curve | None:
    found = magnitudes_of(verdict, capture)
    if found is None:
        return None
    lines = {str(stat): _short(series.values.tolist()) for stat, series in found.series.items()}
    layers = next(iter(found.series.values())).layers
    return {"title": f"{found.title}, {found.note}" if found.note else found.title, "layers": [*layers], "lines": lines}


def _outlier_curve(verdict: Verdict, capture: Capture) -> Curve | None:
    found = judged_outliers(verdict, capture)
    if found is None:
        return None
    outliers, threshold, _ = found
    count, sinks = len(outliers.layer), int(outliers.sink.sum())
    positions = Counter(outliers.position.tolist())
    where = f", all at position {next(iter(positions))}" if len(positions) == 1 and count > 1 else ""
    known = (
        f", {'all' if sinks == count else sinks or 'none'} of them attention sinks" if capture.sinks.searched else ""
    )
    title = f"{counted(count, 'outlier token')} above {threshold:g} × the median{known}{where}"
    numbers = range(len(outliers.layers))
    lines = {
        "outlier tokens": [int((outliers.layer == index).sum()) for index in numbers],
        "of these sinks": [int((outliers.layer[outliers.sink] == index).sum()) for index in numbers],
    }
    texts = [(f"“{text}”", number) for text, number, _ in texts_of(capture, outliers)]
    bars = {"By text": texts, "By position": [] if where else _by_position(outliers)}
    return {"title": title, "layers": outliers.layers, "lines": lines if sinks else dict([*lines.items()][:1]),
            "bars": [_bars(name, each) for name, each in bars.items() if each]}  # fmt: skip


def _by_position(outliers: Outliers) -> list[tuple[str, int]]:
    most = Counter(outliers.position.tolist()).most_common()
    return [(str(position), count) for position, count in most]


def _bars(title: str, bars: list[tuple[str, int]]) -> Curve:
    largest = max(count for _, count in bars)
    shown = [{"name": name, "count": count, "share": round(count / largest, 3)} for name, count in bars[:MOST_BARS]]
    return {"title": title, "bars": shown, "more": max(len(bars) - MOST_BARS, 0)}


def _short(values: Iterable[float]) -> list[float]:
    # Five digits are more than a plot can show, and keep the page small.
    return [float(f"{value:.5g}") for value in values]

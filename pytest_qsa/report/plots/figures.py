"""Figures of a verdict, drawn from the capture that it was judged on. matplotlib's object interface and Agg only."""

from __future__ import annotations

from pathlib import Path

from ...captures import Capture
from ...verdicts import Verdict
from .magnitudes import magnitude_figure
from .outliers import outlier_figure
from .style import save_png
from .values import value_figure

_FIGURES = {"value": value_figure, "outliers": outlier_figure, "magnitude": magnitude_figure}


def draw(capture: Capture, verdict: Verdict, folder: Path) -> dict[str, str]:
    """Draw all figures that fit a verdict as PNG into a folder; return title → absolute path, most telling first.

    Raises:
        OSError: the folder can't be written.
    """
    figures = {title: function(verdict, capture) for title, function in _FIGURES.items()}
    return {title: save_png(figure, folder / f"{title}.png") for title, figure in figures.items() if figure is not None}

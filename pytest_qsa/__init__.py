r"""pytest-qsa: gate model checkpoints on their activation and weight statistics.

As a library, without pytest::

    from pytest_qsa import Capture, capture

    cap = capture(model, batches, sites=[(r"layers\.\d+$", "output")])
    counts = cap.output(r"layers\.\d+$").outlier_tokens(threshold=64)

Importing the package imports nothing heavy; torch comes with the first call of `capture`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captures.capture import Capture
    from .engine import capture
    from .metrics.series import Series

__all__ = ["Capture", "Series", "capture"]

_HOMES = {"Capture": "captures.capture", "Series": "series", "capture": "engine"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

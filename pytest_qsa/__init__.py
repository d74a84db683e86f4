r"""pytest-qsa: gate model checkpoints on their activation and weight statistics.

As a library, without pytest::

    from pytest_qsa import Capture, capture

    cap = capture(model, batches, sites=[(r"layers\.\d+$", "output")])
    counts = cap.output(r"layers\.\d+$").outlier_tokens(threshold=64)

Importing the package imports nothing heavy; torch comes with the first call of `capture`.
"""

from .common import face

__getattr__, __dir__ = face(__name__, __file__)

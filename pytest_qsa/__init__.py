r"""pytest-qsa: gate model checkpoints on their activation and weight statistics.

As a library, without pytest::

    from pytest_qsa import Capture, capture

    cap = capture(model, batches, sites=[(r"layers\.\d+$", "output")])
    counts = cap.output(r"layers\.\d+$").outlier_tokens(threshold=64)

Importing the package imports nothing heavy; torch comes with the first call of `capture`.
"""

import lazy_loader

from .common import find_moved_modules

find_moved_modules()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

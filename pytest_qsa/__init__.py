r"""pytest-qsa: gate model checkpoints on their activation and weight statistics.

As a library, without pytest::

    from pytest_qsa import Capture, capture

    cap = capture(model, batches, sites=[(r"layers\.\d+$", "output")])
    counts = cap.output(r"layers\.\d+$").outlier_tokens(threshold=64)

Importing the package imports nothing heavy; torch comes with the first call of `capture`.
"""

from .common import face

_import, _names = face(__name__, __file__)


def __getattr__(name: str) -> object:
    """Import a public name when it is used; the version as well, for looking it up takes milliseconds."""
    if name == "__version__":
        from importlib.metadata import version

        return version("pytest-qsa")
    return _import(name)


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return [*_names(), "__version__"]

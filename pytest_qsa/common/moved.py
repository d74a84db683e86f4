"""Import paths that earlier releases documented: they work for one more release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "pytest_qsa.checkpoint.smoothing": "pytest_qsa.checkpoint",
    "pytest_qsa.divergence": "pytest_qsa.metrics",
    "pytest_qsa.errors": "pytest_qsa",
}
"""Old module → the module that has its names now."""


class MovedModules:
    """Finds and loads an old module as one that looks every name up in the new module."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a moved module; None for any other name."""
        return ModuleSpec(name, MovedModules) if name in MOVED else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """Let Python make the module."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Warn with the new path, and answer for the old module's names."""
        new = MOVED[module.__name__]
        text = f"{module.__name__} has moved: import its names from {new}"
        try:
            warnings.warn(text, DeprecationWarning, stacklevel=2)
        except DeprecationWarning:
            # With `filterwarnings = ["error", "default::pytest_qsa.errors.QsaWarning"]` pytest imports the class of the
            # second filter under the first, and an exception here would make its whole configuration a usage error.
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                warnings.warn(text, DeprecationWarning, stacklevel=2)
        vars(module)["__getattr__"] = importlib.import_module(new).__getattr__


def find_moved_modules() -> None:
    """Install the finder behind all others, so that it is asked only for a module that does not exist; once."""
    if MovedModules not in sys.meta_path:
        sys.meta_path.append(MovedModules)

"""How names are imported: those of a room when they are used, those of earlier releases with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType

from .collector import uncollected


def face(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package (PEP 562): a name of its stub is imported when it is used.

    The stub, `__init__.pyi`, has lines `from .module import name as name` alone.
    """

    # Read for the first name that is used: a start of pytest imports faces of which it uses none. By cutting the text,
    # for a syntax tree takes ten times as long, which every start would pay for.
    @cache
    def modules() -> dict[str, str]:
        text = Path(f"{file}i").read_text("utf-8").replace(",", " ")
        imports = (part.partition(" import ") for part in f"\n{text}".split("\nfrom ")[1:])
        return {name.split(maxsplit=1)[0]: module for module, _, names in imports for name in names.split(" as ")[1:]}

    def of(name: str) -> object:
        if name == "__all__":
            return sorted(modules())
        if name not in modules():
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(_imported(modules()[name], package), name)

    return of, lambda: sorted(modules())


def _imported(module: str, package: str) -> ModuleType:
    if resolve_name(module, package) in sys.modules:
        return importlib.import_module(module, package)
    with uncollected():
        return importlib.import_module(module, package)


class Room:
    """A package that is imported when a name of it is used: to look for six of them takes a start of pytest 2 ms."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        return getattr(importlib.import_module(self._name), name)


MOVED = {
    "pytest_qsa.checkpoint.smoothing": "pytest_qsa.checkpoint",
    "pytest_qsa.divergence": "pytest_qsa.metrics",
    "pytest_qsa.errors": "pytest_qsa",
}
"""Module that an earlier release documented → the module that has its names now; it works for one more release."""


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

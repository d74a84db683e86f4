"""Registries that other packages add to. Entry points are loaded only where no built-in answers."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Generic, TypeVar

from .errors import InfraError
from .text import logger

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things that the modules of a package register when they are imported.

    `group`: the entry points by which other packages register theirs. `package`: the package whose modules are the
    built-ins, so that a new module needs no list that names it.
    """

    def __init__(self, group: str, package: str) -> None:
        self.group = group
        self._package = package
        self._known: dict[str, T] = {}
        self._pending: list[str] | None = None
        self._entry_points_loaded = False

    def add(self, name: str, thing: T) -> None:
        """Register a thing.

        Raises:
            InfraError: another one has the name.
        """
        known = self._known.get(name)
        if known is not None and _origin(known) != _origin(thing):
            raise InfraError(f"{self.group}: '{name}' is defined twice, by {_origin(known)} and by {_origin(thing)}")
        self._known[name] = thing

    def built_in(self) -> Sequence[T]:
        """Return what is registered without loading entry points, the built-ins first."""
        if self._pending is None:
            path = importlib.import_module(self._package).__path__
            self._pending = sorted(module.name for module in pkgutil.iter_modules(path))
        while self._pending:  # a module is taken off before it is imported, for its import may ask for the built-ins
            importlib.import_module(f"{self._package}.{self._pending.pop(0)}")
        return sorted(self._known.values(), key=lambda thing: not _origin(thing).startswith(f"{self._package}."))

    def all(self) -> Sequence[T]:
        """Return everything, entry points included.

        Raises:
            InfraError: an entry point can't be loaded.
        """
        self.built_in()
        if not self._entry_points_loaded:
            # Before the loop, because a module that is loaded may itself ask for everything.
            self._entry_points_loaded = True
            # By name, so that the order does not depend on which package was installed first.
            for entry in sorted(metadata.entry_points(group=self.group), key=lambda entry: entry.name):
                logger.debug("loading the entry point %s = %s of the group %s", entry.name, entry.value, self.group)
                try:
                    entry.load()
                except Exception as error:  # a user's module may raise anything when it is imported
                    raise InfraError(
                        f"the entry point {entry.name} = {entry.value} of the group {self.group} can't be loaded: "
                        f"{type(error).__name__}: {error}"
                    ) from error
        return self.built_in()

    def find(self, name: str) -> T | None:
        """Return the thing of a name, from an entry point if no built-in has it; None for none.

        Raises:
            InfraError: an entry point can't be loaded.
        """
        self.built_in()
        if name not in self._known:
            self.all()
        return self._known.get(name)


def _origin(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"

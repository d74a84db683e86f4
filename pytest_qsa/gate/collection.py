"""A suite file as a pytest.Module of generated functions: pytest and its plugins see ordinary tests.

A function is compiled under the name of the YAML file that holds the assertion, at its line, and a failure is raised
from the line of the bound: locations, tracebacks, JUnit and annotations then point into the YAML without any help.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from ..common import QsaWarning, SuiteError

if TYPE_CHECKING:
    from ..suite import Assertion, Place, SuiteFile

Run = Callable[[pytest.FixtureRequest, "QsaSuite", int], None]


@dataclass
class Overrides:
    """The overrides of a run. One that names an assertion applies to the suites that have it: at least one must."""

    given: tuple[str, ...]
    used: set[str] = field(default_factory=set)
    misfits: dict[str, str] = field(default_factory=dict)

    def of(self, suite: Path) -> list[str]:
        """Return the overrides that apply to a suite, and note the others."""
        from ..suite import misfit

        taken = []
        for override in self.given:
            problem = misfit(suite, override)
            if problem is None:
                taken.append(override)
                self.used.add(override)
            else:
                self.misfits.setdefault(override, problem)
        return taken

    def problem(self) -> str | None:
        """Return the text of an error where an override applied to no suite; call it when all suites are read."""
        lost = (f"--qsa-set {o}: {why}" for o, why in self.misfits.items() if o not in self.used)
        return next(lost, None)


def compiled(source: str, place: Place) -> types.CodeType:
    """Compile one line of Python as if it stood at a place of a suite."""
    return compile("\n" * (place.line - 1) + source, str(place.path), "exec")


def raise_at(place: Place, name: str, error: Exception) -> NoReturn:
    """Raise an error from a line of a suite: its frame is the last of the traceback that pytest shows."""
    __tracebackhide__ = True
    exec(compiled("raise error", place).replace(co_name=name, co_qualname=name), {"error": error})
    raise AssertionError("unreachable")


class QsaSuite(pytest.Module):
    """One `*.qsa.yaml` file."""

    overrides: Overrides
    run: Run

    @functools.cached_property
    def file(self) -> SuiteFile:
        """The suite, validated.

        Raises:
            CollectError: one line that says where and what is wrong.
        """
        from ..suite import load_suite

        try:
            return load_suite(self.path, self.overrides.of(self.path), conftests=True)
        except SuiteError as error:
            raise self.CollectError(str(error)) from None

    @functools.cached_property
    def obj(self) -> types.ModuleType:
        """The module that pytest collects: a function for each assertion, in the order of the file."""
        module = types.ModuleType(self.path.name)
        module.__file__ = str(self.path)
        for index, assertion in enumerate(self.file.assertions):
            setattr(module, assertion.id, self._function(index, module.__name__))
        if self.file.suite.assertions is None:
            warnings.warn_explicit(
                QsaWarning(f"{self.path.name} has no assertions: nothing is checked"), None, str(self.path), 1
            )
        return module

    def assertion_of(self, item: pytest.Item) -> Assertion:
        """Return the assertion that an item of this suite stands for."""
        name = getattr(item, "originalname", item.name)
        return next(assertion for assertion in self.file.assertions if assertion.id == name)

    def _function(self, index: int, module: str) -> Callable[[pytest.FixtureRequest], None]:
        name, place = self.file.assertions[index].id, self.file.place_of(index)
        scope = {"run": functools.partial(self._call, index=index)}
        exec(compiled("def assertion(request): run(request)", place), scope)
        function: types.FunctionType = scope["assertion"]  # type: ignore[assignment]
        function.__code__ = function.__code__.replace(co_name=name, co_qualname=name)
        function.__name__ = function.__qualname__ = name
        function.__module__ = module
        function.__doc__ = self.file.assertions[index].reason
        gate: Callable[[pytest.FixtureRequest], None] = pytest.mark.usefixtures("qsa_checkpoint")(function)
        return pytest.mark.qsa(tier=self.file.assertions[index].tier)(gate)

    def _call(self, request: pytest.FixtureRequest, index: int) -> None:
        __tracebackhide__ = True
        self.run(request, self, index)

    def istestfunction(self, obj: object, name: str) -> bool:
        """Collect what was generated, whatever its name."""
        return isinstance(obj, types.FunctionType)

    def istestclass(self, obj: object, name: str) -> bool:
        """Collect no class."""
        return False

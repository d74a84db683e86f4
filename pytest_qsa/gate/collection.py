"""A suite file as a pytest.Module of generated functions, and what each item asks for.

pytest and its plugins see ordinary tests. A function is compiled under the name of the YAML file that holds the
assertion, at its line, and a failure is raised from the line of the bound: locations, tracebacks, JUnit and annotations
then point into the YAML without any help.
"""

from __future__ import annotations

import functools
import linecache
import shlex
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ..captures import ALL_STATISTICS, Massive, Request
from ..common import QsaWarning, SuiteError, did_you_mean, shown_path, visible
from ..metrics import METRICS, positions_of
from ..suite import (
    Assertion,
    Checkpoint,
    Data,
    MeasuredAssertion,
    Memory,
    Model,
    Place,
    Roots,
    Subject,
    SuiteFile,
    load_suite,
    misfit,
    subject_on,
)
from .options import Options

Run = Callable[[pytest.FixtureRequest, "QsaSuite", int], None]


@dataclass
class Overrides:
    """The overrides of a run. One that names an assertion applies to the suites that have it: at least one must.

    `roots`: where suites may read beside their repositories.
    """

    given: tuple[str, ...]
    roots: Roots
    used: set[str] = field(default_factory=set)
    misfits: dict[str, str] = field(default_factory=dict)

    def of(self, suite: Path) -> list[str]:
        """Return the overrides that apply to a suite, and note the others."""
        taken = []
        for override in self.given:
            problem = misfit(suite, override, self.roots)
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


def unknown_assertions(arguments: Iterable[str], folder: Path, suites: Iterable[QsaSuite]) -> list[str]:
    """Say of each `SUITE::ID` that a run was given, and that names no test, what the suite has. `folder`: pytest's."""
    found = {suite.path: suite for suite in suites}
    texts = []
    for argument in arguments:
        path, _, named = argument.partition("::")
        suite, (name, bracket, model) = found.get((folder / path).resolve()), named.partition("[")
        if suite is None or not name:
            continue
        try:
            known = [assertion.id for assertion in suite.file.assertions]
        except suite.CollectError:  # pytest shows it
            continue
        if name not in known:
            hint = did_you_mean(name, known) or f"; it has {', '.join(known[:5]) or 'none'}{', …' * (len(known) > 5)}"
            texts.append(f"{shown_path(suite.path)} has no assertion '{name}'{hint}")
        elif bracket:
            texts.append(f"{shown_path(suite.path)}: {name} runs on no checkpoint [{model}: --qsa-model names them")
    return texts


def suites_without_assertions(suites: Iterable[QsaSuite], config: Path | None) -> str | None:
    """Return what is wrong with the first suite that checks nothing; None where all check something.

    One that others extend is a base, and `config` gives Python tests their subject.
    """
    read = [suite for suite in suites if suite.is_read]
    bases = _extended_by(read)
    for suite in read:
        if suite.file.suite.assertions is None and suite.path not in bases and suite.path != config:
            return (
                f"{shown_path(suite.path)}:1: has no assertions: nothing of it would be checked; add some, or begin "
                "its name with an underscore if it is a base of others"
            )
    return None


def uncollected(near: Iterable[Path], suites: Iterable[QsaSuite], patterns: Iterable[str]) -> list[str]:
    """Say of each file that looks like a suite that it isn't collected; bases of the collected suites aside."""
    bases = _extended_by(suite for suite in suites if suite.is_read)
    advice = f"suites are named {' or '.join(patterns)}; begin its name with an underscore if it is a base of others"
    return [f"{shown_path(path)} isn't collected: {advice}" for path in near if path not in bases]


def _extended_by(suites: Iterable[QsaSuite]) -> set[Path]:
    return {place.path.resolve() for suite in suites for place in suite.file.source.places.values()} - {
        suite.path for suite in suites
    }


def not_for(item: pytest.Item) -> tuple[str, str, str] | None:
    """Return the suite and the model of an assertion that isn't for this model, and whose it is; None of any other."""
    if not isinstance(item.parent, QsaSuite):
        return None
    name, assertion = _name(item.parent.file, checkpoint_of(item)), item.parent.assertion_of(item)
    return None if assertion.is_for(name) else (shown_path(item.path), name, str(assertion.models))


def split_by_model(
    items: Iterable[pytest.Item], suites: Iterable[QsaSuite]
) -> tuple[list[pytest.Item], list[pytest.Item], list[tuple[str, str]]]:
    """Return the tests that are for their models, those that aren't, and what a reader has to know of these.

    A text has the level "note", or "warning" where an assertion is for none of the models: its `models` may be a slip.
    """
    some = [suite for suite in suites if suite.is_read and any(each.models for each in suite.file.assertions)]
    mine, others = list[pytest.Item](), list[pytest.Item]()
    left: dict[tuple[str, str, str], list[str]] = {}
    for item in items:
        why = not_for(item) if item.parent in some else None
        (others if why else mine).append(item)
        if why:
            left.setdefault(why, []).append(getattr(item, "originalname", item.name))
    run = {(shown_path(item.path), getattr(item, "originalname", item.name)) for item in mine}
    texts = [
        (
            "note" if all((path, each) in run for each in ids) else "warning",
            f"{path}: {', '.join(ids)} {'is' if len(ids) == 1 else 'are'} not for {name} (models: {pattern})",
        )
        for (path, name, pattern), ids in left.items()
    ]
    return mine, others, texts


def compiled(source: str, place: Place) -> types.CodeType:
    """Compile one line of Python as if it stood at a place of a suite."""
    return compile("\n" * (place.line - 1) + source, str(place.path), "exec")


def _show_visible(files: Iterable[Path]) -> None:
    """Let Python quote the lines of suites in tracebacks and warnings as `visible` writes them."""
    for file in files:
        lines = [f"{visible(line)}\n" for line in file.read_text(encoding="utf-8").split("\n")]
        # Without a time of modification, which `linecache.checkcache` would compare with the file's.
        linecache.cache[str(file)] = (sum(map(len, lines)), None, lines, str(file))


def raise_at(place: Place, name: str, error: Exception) -> NoReturn:
    """Raise an error from a line of a suite: its frame is the last of the traceback that pytest shows."""
    __tracebackhide__ = True
    # pytest shows a frame by its function's name: here the assertion's id.
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
        try:
            return load_suite(self.path, self.overrides.of(self.path), conftests=True, roots=self.overrides.roots)
        except SuiteError as error:
            raise self.CollectError(str(error)) from None

    @property
    def is_read(self) -> bool:
        """Whether the file was read, and is right."""
        return "file" in vars(self)

    @functools.cached_property
    def obj(self) -> types.ModuleType:
        """The module that pytest collects: a function for each assertion, in the order of the file."""
        # In the place of pytest's own `obj`, which would import the YAML file as Python.
        module = types.ModuleType(self.path.name)
        module.__file__ = str(self.path)
        _show_visible({place.path for place in self.file.source.places.values()})
        for index, assertion in enumerate(self.file.assertions):
            setattr(module, assertion.id, self._function(index, module.__name__))
        if self.file.suite.assertions is None:
            warnings.warn_explicit(
                QsaWarning(f"{self.path.name} has no assertions: nothing is checked"), None, str(self.path), 1
            )
        return module

    def assertion_of(self, item: pytest.Item) -> Assertion:
        """Return the assertion that an item of this suite stands for."""
        # `name` may end with the id of a checkpoint, `[new]`.
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
        # `pytest --collect-only -v` prints the docstring of a test.
        function.__doc__ = visible(self.file.assertions[index].reason or "") or None
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


EVERYTHING = ALL_STATISTICS | {Massive(100.0, 1000.0)}
"""The statistics that a Python test gets where it names no metric."""


@dataclass
class Subjects:
    """The subjects of a session's items."""

    options: Options

    @functools.cached_property
    def config_suite(self) -> SuiteFile | None:
        """The file of `--qsa-config`, which gives Python tests their subject."""
        if self.options.config is None:
            return None
        return load_suite(self.options.config, self.options.overrides, conftests=True, roots=self.options.roots)

    def of(self, item: pytest.Item) -> Subject | None:
        """Return the subject that an item tests; None for an item that is no gate."""
        checkpoint = checkpoint_of(item)
        if isinstance(item.parent, QsaSuite):
            subject = self._with_vllm(subject_on(item.parent.file, checkpoint))
            return subject if subject.model else replace(subject, fixture=fixture_source(item, "qsa_model"))
        if "qsa" not in getattr(item, "fixturenames", ()):
            return None
        if self.config_suite is not None:
            return self._with_vllm(subject_on(self.config_suite, checkpoint))
        model = Model(path=checkpoint.path) if checkpoint else None
        name = (checkpoint.name if checkpoint else None) or (model.id if model else "model")
        source = "" if model else fixture_source(item, "qsa_model")
        return Subject(name, model, Data(), Memory(), item.path.parent, checkpoint.path if checkpoint else None, source)

    def _with_vllm(self, subject: Subject) -> Subject:
        """Hand on where vLLM is, if the subject runs in it."""
        runs_there = subject.model is not None and subject.model.engine.name == "vllm"
        return replace(subject, vllm=self.options.vllm) if runs_there else subject


def _name(file: SuiteFile, checkpoint: Checkpoint | None) -> str:
    model = file.suite.model
    return (checkpoint.name if checkpoint else None) or (model.id if model else "model")


def checkpoint_of(item: pytest.Item) -> Checkpoint | None:
    """Return the `--qsa-model` under which an item runs."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("qsa_checkpoint") if callspec else None


def plain_name(item: pytest.Item) -> str:
    """Return a test's name without the id that `--qsa-model` adds, so that every checkpoint meets the same baseline."""
    name = item.nodeid.partition("::")[2].replace("::", ".")
    callspec, checkpoint = getattr(item, "callspec", None), checkpoint_of(item)
    if callspec is not None and checkpoint is not None:
        others = f"-{callspec.id}-".replace(f"-{checkpoint.label}-", "-", 1).strip("-")
        base = name.removesuffix(f"[{callspec.id}]")
        name = f"{base}[{others}]" if others and base != name else base
    # The name becomes that of a baseline's file, on Windows too.
    return "".join(c if c not in '/\\?*:|"<>' and c.isprintable() else f"%{ord(c):02X}" for c in name)


def command_of(item: pytest.Item, options: Options) -> str:
    """Return the shortest command that runs this one test again."""
    path, test = shown_path(item.path), item.nodeid.partition("::")[2]
    words = ["pytest", f"{path}::{test}", *options.as_arguments(checkpoint_of(item))]
    if not isinstance(item.parent, QsaSuite) and options.config is not None:
        words.append(f"--qsa-config={shown_path(options.config)}")
    return shlex.join(words)


def requests_of(item: pytest.Item) -> list[Request]:
    """Return the requests of one item.

    Raises:
        SuiteError: a mark is wrong.
    """
    if isinstance(item.parent, QsaSuite):
        assertion = item.parent.assertion_of(item)
        return [assertion.request] if isinstance(assertion, MeasuredAssertion) else []
    wanted = ((mark.args, {k: v for k, v in mark.kwargs.items() if k != "tier"}) for mark in item.iter_markers("qsa"))
    return [_marked(item, args, keys) for args, keys in wanted if args or keys]


def _marked(item: pytest.Item, args: tuple[object, ...], wanted: dict[str, Any]) -> Request:
    try:
        if args:
            raise SuiteError("layers and site are named: layers=r'…', site='output'")
        layers, site = wanted.pop("layers"), wanted.pop("site")
        exclude, metric = wanted.pop("exclude", None), wanted.pop("metric", None)
        statistics = EVERYTHING
        if metric is not None:
            if METRICS.find(metric) is None:
                raise SuiteError(f"there is no metric '{metric}'{did_you_mean(metric, METRICS)}")
            unknown = set(wanted) - {*METRICS[metric].parameters, "positions"}
            if unknown:
                raise SuiteError(f"{metric} has no parameter {', '.join(sorted(unknown))}")
            statistics = METRICS[metric].needs(site, positions_of(metric, site, wanted.pop("positions", None)), wanted)
        elif wanted:
            raise SuiteError(f"unknown keys {', '.join(wanted)}")
        return Request(layers, site, exclude, statistics)
    except (KeyError, ValueError) as error:
        raise SuiteError(
            f"{item.nodeid}: the mark is wrong: {error}; write @pytest.mark.qsa(layers=r'…', site='output') "
            "with exclude, or metric and its parameters, where needed"
        ) from None


def fixture_source(item: pytest.Item, name: str) -> str:
    """Say which of the fixtures of a name an item gets: where it is defined, and its parameter."""
    # pytest has no public name for it; in one that has moved it, all items are taken to get the same fixture.
    manager = getattr(item.session, "_fixturemanager", None)
    definitions = manager.getfixturedefs(name, item) if manager else None
    callspec = getattr(item, "callspec", None)
    parameter = callspec.indices.get(name, "") if callspec else ""
    return f"{definitions[-1].baseid if definitions else ''}[{parameter}]"

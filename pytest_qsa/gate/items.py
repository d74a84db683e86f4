"""What a pytest item asks for: its subject, what it needs of the pass, its name and its command."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest

from ..captures import ALL_STATISTICS, Massive, Request
from ..common import SuiteError, did_you_mean, shown_path
from ..metrics import METRICS, positions_of
from ..suite import Checkpoint, Data, MeasuredAssertion, Memory, Model, Subject, SuiteFile, load_suite
from ._compat import fixture_source
from .collection import QsaSuite
from .options import Options

EVERYTHING = ALL_STATISTICS | {Massive(100.0, 1000.0)}
"""The statistics that a Python test gets where it names no metric."""


@dataclass
class Subjects:
    """The subjects of a session's items."""

    options: Options

    @cached_property
    def config_suite(self) -> SuiteFile | None:
        """The file of `--qsa-config`, which gives Python tests their subject."""
        return load_suite(self.options.config, self.options.overrides, conftests=True) if self.options.config else None

    def of(self, item: pytest.Item) -> Subject | None:
        """Return the subject that an item tests; None for an item that is no gate."""
        checkpoint = checkpoint_of(item)
        if isinstance(item.parent, QsaSuite):
            subject = _subject(item.parent.file, checkpoint)
            return subject if subject.model else replace(subject, fixture=fixture_source(item, "qsa_model"))
        if "qsa" not in getattr(item, "fixturenames", ()):
            return None
        if self.config_suite is not None:
            return _subject(self.config_suite, checkpoint)
        model = Model(path=checkpoint.path) if checkpoint else None
        name = (checkpoint.name if checkpoint else None) or (model.id if model else "model")
        source = "" if model else fixture_source(item, "qsa_model")
        return Subject(name, model, Data(), Memory(), item.path.parent, checkpoint.path if checkpoint else None, source)


def _subject(file: SuiteFile, checkpoint: Checkpoint | None) -> Subject:
    suite = file.suite
    name = (checkpoint.name if checkpoint else None) or (suite.model.id if suite.model else "model")
    model = suite.model
    if checkpoint is not None:
        base = model.model_dump(exclude={"factory", "path", "served", "logprobs"}) if model else {}
        model = Model(**base, path=checkpoint.path)
    return Subject(name, model, suite.data, suite.memory, file.path.parent, checkpoint.path if checkpoint else None)


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

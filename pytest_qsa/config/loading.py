"""A suite file → a validated Suite whose every value knows its line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import SuiteError, did_you_mean, shown_path
from .suite import ASSERTIONS, Assertion, Suite
from .yaml_source import LocatedError, Location, YamlSource, read_value, read_yaml

ID = re.compile(r"[A-Za-z0-9_.\-]+")


@dataclass(frozen=True)
class SuiteFile:
    """A suite and the file that it came from."""

    path: Path
    suite: Suite
    source: YamlSource

    @property
    def assertions(self) -> Sequence[Assertion]:
        """The assertions in the order of the file; none for a seed configuration."""
        return self.suite.assertions or ()

    def line_of(self, index: int) -> int:
        """Return the line at which an assertion begins."""
        return self.source.line(("assertions", index))

    def bound_line_of(self, index: int) -> int:
        """Return the line of the assertion's bound; of its baseline where it has no bound."""
        keys = ("max", "min", "equals", "baseline")
        lines = [self.source.lines.get(("assertions", index, key)) for key in keys]
        return next((line for line in lines if line is not None), self.line_of(index))


def misfit(path: Path, override: str) -> str | None:
    """Say why an override of an assertion is not for this suite: it has none of that name; None where it fits."""
    source = read_yaml(path)
    if isinstance(source.data, dict) and override.startswith("assertions."):
        try:
            _split(source, override.partition("=")[0])
        except SuiteError as error:
            return str(error)
    return None


def load_suite(path: Path, overrides: Iterable[str] = (), option: str = "--qsa-set ") -> SuiteFile:
    """Read and validate a suite, with `KEY=VALUE` overrides applied first. `option`: what the user wrote before them.

    Raises:
        SuiteError: `file:line: what is wrong (did you mean …?)`, for the first mistake of the file.
    """
    source = read_yaml(path)
    if not isinstance(source.data, dict):
        raise source.error((), "a suite is a mapping with the sections model, data, memory and assertions")
    overridden = {_apply(source, override, option): f"{option}{override}" for override in overrides}
    try:
        _check_assertions(source)
        suite = Suite.model_validate(source.data)
    except ValidationError as error:
        raise _explain(source, error, overridden) from None
    except LocatedError as error:
        override = overridden.get(error.location)
        raise SuiteError(f"{override}: {error.what}") if override else error from None
    return SuiteFile(path, suite, source)


def _apply(source: YamlSource, override: str, option: str) -> Location:
    key, _, text = override.partition("=")
    try:
        *parents, last = _split(source, key)
    except SuiteError as error:
        raise SuiteError(f"{option}{override}: {error}") from None
    here: Any = source.data
    for part in parents:
        here = here.setdefault(part, {}) if isinstance(here, dict) else here[part]
        if not isinstance(here, (dict, list)):
            raise SuiteError(f"{option}{override}: '{part}' is a value, not a section")
    here[last] = read_value(text)
    return (*parents, last)


def _split(source: YamlSource, key: str) -> Location:
    """Split a dotted key; an assertion is named by its id, which may hold dots itself."""
    head, _, rest = key.partition(".")
    if head != "assertions":
        return tuple(key.split("."))
    entries = source.data.get("assertions") or []
    ids = {str(entry["id"]): index for index, entry in enumerate(entries) if isinstance(entry, dict) and "id" in entry}
    name = max((known for known in ids if rest.startswith(f"{known}.")), key=len, default=None)
    if name is None:
        wrong = rest.partition(".")[0]
        raise SuiteError(f"no assertion '{wrong}' in {shown_path(source.path)}{did_you_mean(wrong, ids)}")
    return ("assertions", ids[name], *rest[len(name) + 1 :].split("."))


def check_override(override: str, option: str = "--qsa-set ") -> None:
    """Check an override before any suite is read: its form, and that its key exists.

    Raises:
        SuiteError: naming the key.
    """
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise SuiteError(f"{option}{override}: write KEY=VALUE, such as data.num_samples=8")
    model: Any = Suite
    parts = key.split(".")
    if parts[0] == "assertions":
        return
    for index, part in enumerate(parts):
        fields = model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}
        if part not in fields:
            raise SuiteError(
                f"{option}{override}: there is no key '{'.'.join(parts[: index + 1])}'{did_you_mean(part, fields)}"
            )
        annotation = fields[part].annotation
        model = next((a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)), None)


def _check_assertions(source: YamlSource) -> None:
    """Find what a schema can't say, or would say badly: an empty list, an unknown metric, an id used twice."""
    if "assertions" not in source.data:
        return
    entries = source.data["assertions"]
    if entries and not isinstance(entries, list):
        raise source.error(("assertions",), "assertions is a list, whose entries begin with `- id: …`")
    if not entries:
        raise source.error(
            ("assertions",), "assertions is empty: nothing would be checked; list one at least, or leave the key out"
        )
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        here: Location = ("assertions", index)
        if not isinstance(entry, dict):
            raise source.error(here, "an assertion is a mapping that begins with `- id: …`")
        metric = entry.get("metric")
        if metric is None:
            raise source.error(here, "the key 'metric' is missing")
        if not isinstance(metric, str) or metric not in ASSERTIONS:
            hint = did_you_mean(str(metric), ASSERTIONS) or f"; the metrics are {', '.join(ASSERTIONS)}"
            raise source.error((*here, "metric"), f"unknown metric '{metric}'{hint}")
        name = str(entry.get("id"))
        if name in seen:
            raise source.error(
                (*here, "id"), f"the id '{name}' is taken by line {source.line(('assertions', seen[name], 'id'))}"
            )
        seen[name] = index


def _explain(source: YamlSource, error: ValidationError, overridden: dict[Location, str]) -> SuiteError:
    """Turn pydantic's first error into one line at the right place."""
    problems = error.errors(include_url=False)
    first = min(
        problems, key=lambda problem: (problem["type"] != "extra_forbidden", source.line(_location(problem["loc"])))
    )
    cause = first.get("ctx", {}).get("error")
    location = _location(first["loc"])
    if isinstance(cause, SuiteError) and cause.key:
        location = (*location, cause.key)
    message = _message(first, location)
    override = next((text for key, text in overridden.items() if location[: len(key)] == key), None)
    if override is not None:
        return SuiteError(f"{override}: {message}")
    return source.error(location, message)


def _location(loc: tuple[int | str, ...]) -> Location:
    """Drop what pydantic adds to a location: the tag of the assertion's model, and the arms of a union."""
    if loc[:1] == ("assertions",) and len(loc) > 2:
        loc = (*loc[:2], *loc[3:])
    return tuple(
        part for part in loc if isinstance(part, int) or ("[" not in part and part not in ("str", "float", "int"))
    )


def _message(problem: Any, location: Location) -> str:
    key = location[-1] if location else "suite"
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"unknown key '{key}'{did_you_mean(str(key), _keys_at(location, problem['loc']))}"
    if kind == "missing":
        return f"the key '{key}' is missing"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "string_pattern_mismatch" and key == "id":
        return f"the id '{given}' may hold letters, digits and _ . - only"
    if kind == "literal_error":
        expected = problem["ctx"]["expected"]
        choices = re.findall(r"'([^']+)'", expected)
        return f"{key}: '{given}' is none of {expected}{did_you_mean(str(given), choices)}"
    what = str(problem["msg"]).removeprefix("Input ")
    return f"{key}: {what}, not {given!r}"


def _keys_at(location: Location, loc: tuple[int | str, ...]) -> list[str]:
    if location[0] == "assertions" and len(loc) >= 4:
        if len(location) == 3:
            return list(ASSERTIONS[str(loc[2])].model_fields)
        return ["rel", "abs", "direction"]
    model: Any = Suite
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation
        model = next(
            a
            for a in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(a, type) and issubclass(a, BaseModel)
        )
    return list(model.model_fields)

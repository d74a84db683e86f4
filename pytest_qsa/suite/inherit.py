"""Suites that extend others → one document that still knows the file and the line of every value.

Mappings merge key by key and assertions by id; what the extending suite says comes first and wins, and `null` takes out
what a base said. Everything else replaces the base's value as a whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common import SuiteError, did_you_mean, shown_path
from .yaml_source import Location, Place, YamlSource, read_yaml

ASSERTIONS: Location = ("assertions",)
FOLDERS = (("model", "path"), ("model", "reference"), ("model", "previous"))
"""The keys whose value is a path if there is one, and the id of something else if not."""
FILES = ("file", "reference")
"""The keys of an assertion whose value is a path."""


def read_suite(path: Path) -> YamlSource:
    """Read a suite and all that it extends, merged; `assertions` is a list, whichever form the files gave it.

    Raises:
        SuiteError: a file is no suite, a base is missing, or the bases go in a circle; with the chain of files.
    """
    return _read(path, ())


def _read(path: Path, extending: tuple[Path, ...]) -> YamlSource:
    source = read_yaml(path)
    if not isinstance(source.data, dict):
        raise source.error((), "a suite is a mapping with the sections model, data, memory and assertions")
    _check_entries(source)
    chain = (*extending, path)
    merged = YamlSource(path, {})
    for index, named in enumerate(_named_bases(source)):
        base = _base(source, index, named, chain)
        _rebase(base, path.parent)
        merged = _laid_over(merged, base)
    return _laid_over(merged, source)


def _named_bases(source: YamlSource) -> list[str]:
    named = source.data.get("extends", [])
    bases = [named] if isinstance(named, str) else named
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise source.error(("extends",), f"extends is the path of a suite, or a list of them, not {named!r}")
    return bases


def _base(source: YamlSource, index: int, named: str, chain: tuple[Path, ...]) -> YamlSource:
    path = Path(os.path.normpath(source.path.parent / named))
    location: Location = ("extends", index) if isinstance(source.data["extends"], list) else ("extends",)
    files = " → ".join(shown_path(file) for file in (*chain, path))
    if path.resolve() in {file.resolve() for file in chain}:
        raise source.error(location, f"extends goes in a circle: {files}")
    if not path.is_file():
        raise source.error(location, f"extends '{named}': there is no such file ({files})")
    try:
        return _read(path, chain)
    except SuiteError as error:
        text = str(error)
        raise SuiteError(text if " → " in text else f"{text} ({files})") from None


def _rebase(base: YamlSource, folder: Path) -> None:
    """Make the relative paths of a base relative to the folder of the suite that extends it."""
    for section, key in FOLDERS:
        values = base.data.get(section)
        named = values.get(key) if isinstance(values, dict) else None
        if isinstance(named, str) and named and (base.path.parent / named).exists():
            values[key] = _relative(base.path.parent / named, folder)
    entries = base.data.get("assertions") or ()
    for entry in [base.data.get("defaults"), *(entries.values() if isinstance(entries, dict) else entries)]:
        for key in FILES:
            if isinstance(entry, dict) and isinstance(entry.get(key), str):
                entry[key] = _relative(base.path.parent / Path(entry[key]).expanduser(), folder)
    data = base.data.get("data")
    named = data.get("source") if isinstance(data, dict) else None
    if isinstance(named, str) and named.startswith("custom:"):
        data["source"] = f"custom:{_relative(base.path.parent / Path(named[7:]).expanduser(), folder)}"


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder)


def _check_entries(source: YamlSource) -> None:
    """Check the form of the assertions of one file, before they merge with those of others."""
    if "assertions" not in source.data:
        return
    entries = source.data["assertions"]
    if entries and not isinstance(entries, list | dict):
        raise source.error(ASSERTIONS, "assertions is a list, whose entries begin with `- id: …`")
    if not entries:
        raise source.error(
            ASSERTIONS, "assertions is empty: nothing would be checked; list one at least, or leave the key out"
        )
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        here: Location = ("assertions", index)
        if not isinstance(entry, dict):
            raise source.error(here, "an assertion is a mapping that begins with `- id: …`")
        name = str(entry.get("id"))
        if name in seen:
            line = source.place(("assertions", seen[name], "id")).line
            raise source.error((*here, "id"), f"the id '{name}' is taken by line {line}")
        seen[name] = index


@dataclass(frozen=True)
class _Part:
    """A value of a document, and where it stands there."""

    source: YamlSource
    at: Location
    value: Any

    @property
    def place(self) -> Place:
        return self.source.place(self.at)

    def items(self) -> dict[Any, _Part]:
        """Return the values of a mapping by key, or assertions, in either of their forms, by id."""
        if self.at == ASSERTIONS and isinstance(self.value, list):
            parts = [_Part(self.source, (*self.at, index), entry) for index, entry in enumerate(self.value)]
            return {str(part.value.get("id", index)): part for index, part in enumerate(parts)}
        parts_of = {key: _Part(self.source, (*self.at, str(key)), value) for key, value in self.value.items()}
        if self.at != ASSERTIONS:
            return parts_of
        return {
            str(key): replace(part, value={"id": str(key), **part.value}) if isinstance(part.value, dict) else part
            for key, part in parts_of.items()
        }


def _laid_over(base: YamlSource, over: YamlSource) -> YamlSource:
    """Return one document: what `over` says, and of `base` what it leaves."""
    merged = YamlSource(over.path, None)
    merged.data = _merged(_Part(base, (), base.data), _Part(over, (), over.data), (), merged.places)
    return merged


def _merged(base: _Part | None, over: _Part | None, to: Location, places: dict[Location, Place]) -> Any:
    """Merge two values, of which one may be absent, into what lies at `to`; note the places of all that is in it."""
    top = over or base
    assert top is not None
    places[to] = top.place
    parts = [part for part in (over, base) if part is not None]
    if to == ASSERTIONS:
        return _merged_assertions(base.items() if base else {}, over.items() if over else {}, places)
    if all(isinstance(part.value, dict) for part in parts):
        new, old = over.items() if over else {}, base.items() if base else {}
        kept = [key for key in {**new, **old} if not (key in old and key in new and new[key].value is None)]
        return {key: _merged(old.get(key), new.get(key), (*to, str(key)), places) for key in kept}
    if isinstance(top.value, list):
        items = [replace(top, at=(*top.at, index), value=item) for index, item in enumerate(top.value)]
        return [_merged(None, item, (*to, index), places) for index, item in enumerate(items)]
    return top.value


def _merged_assertions(old: dict[str, _Part], new: dict[str, _Part], places: dict[Location, Place]) -> list[Any]:
    """Merge assertions by id: those of the base in its order, then those that are new."""
    entries: list[Any] = []
    for name in {**old, **new}:
        over = new.get(name)
        if over is not None and not isinstance(over.value, dict):
            _check_removal(name, over, old)
        else:
            entries.append(_merged(old.get(name), over, ("assertions", len(entries)), places))
    return entries


def _check_removal(name: str, over: _Part, old: dict[str, _Part]) -> None:
    if over.value is not None:
        raise over.source.error(over.at, f"assertions: '{name}' is a mapping of an assertion's keys, or null")
    if name not in old:
        raise over.source.error(
            over.at, f"no suite that this one extends has an assertion '{name}'{did_you_mean(name, old)}"
        )

"""What a suite takes from elsewhere: the suites that it `extends`, and its own `defaults`.

The result is one document in which every value still knows the file and the line that it comes from. Mappings merge key
by key and assertions by id; the extending suite wins, and its `null` removes what a base has. Any other value replaces
the base's as a whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common import SuiteError, did_you_mean, shown_path
from ..metrics import METRICS
from .assertion import ASSERTIONS
from .yaml_source import Location, Place, YamlSource, read_yaml

ENTRIES: Location = ("assertions",)
DEFAULTS: Location = ("defaults",)
FOLDERS = (("model", "path"), ("model", "reference"), ("model", "previous"))
"""Keys whose value is a path if such a path exists, and the id of something on the hub if not."""
FILES = ("file", "reference")
"""Keys of an assertion whose value is always a path."""


def read_suite(path: Path) -> YamlSource:
    """Read a suite and everything that it extends, merged; `assertions` becomes a list in either of its forms.

    Raises:
        SuiteError: a file is no suite, a base is missing, or the bases form a circle; it names the chain of files.
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
        merged = _merge(merged, base)
    return _merge(merged, source)


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

    def moved(named: str) -> str:
        return os.path.relpath(base.path.parent / Path(named).expanduser(), folder)

    for section, key in FOLDERS:
        values = base.data.get(section)
        named = values.get(key) if isinstance(values, dict) else None
        if isinstance(named, str) and named and (base.path.parent / named).exists():
            values[key] = moved(named)
    entries = base.data.get("assertions") or ()
    for entry in [base.data.get("defaults"), *(entries.values() if isinstance(entries, dict) else entries)]:
        for key in FILES:
            if isinstance(entry, dict) and isinstance(entry.get(key), str):
                entry[key] = moved(entry[key])
    data = base.data.get("data")
    named = data.get("source") if isinstance(data, dict) else None
    if isinstance(named, str) and named.startswith("custom:"):
        data["source"] = f"custom:{moved(named.removeprefix('custom:'))}"


def _check_entries(source: YamlSource) -> None:
    """Check the form of one file's assertions before they are merged with those of others."""
    if "assertions" not in source.data:
        return
    entries = source.data["assertions"]
    if entries and not isinstance(entries, list | dict):
        raise source.error(ENTRIES, "assertions is a list, whose entries begin with `- id: …`")
    if not entries:
        raise source.error(
            ENTRIES, "assertions is empty: nothing would be checked; list one at least, or leave the key out"
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
    """A value of a document and its location there."""

    source: YamlSource
    at: Location
    value: Any

    def items(self) -> dict[Any, _Part]:
        """Return the values of a mapping by key; of `assertions`, in either of its forms, by id."""
        if self.at == ENTRIES and isinstance(self.value, list):
            parts = [_Part(self.source, (*self.at, index), entry) for index, entry in enumerate(self.value)]
            return {str(part.value.get("id", index)): part for index, part in enumerate(parts)}
        parts_of = {key: _Part(self.source, (*self.at, str(key)), value) for key, value in self.value.items()}
        if self.at != ENTRIES:
            return parts_of
        return {
            str(key): replace(part, value={"id": str(key), **part.value}) if isinstance(part.value, dict) else part
            for key, part in parts_of.items()
        }


def _merge(base: YamlSource, over: YamlSource) -> YamlSource:
    """Return one document: all that `over` says, and of `base` what `over` leaves open."""
    merged = YamlSource(over.path, None)
    merged.data = _merged(_Part(base, (), base.data), _Part(over, (), over.data), (), merged.places)
    return merged


def _merged(base: _Part | None, over: _Part | None, to: Location, places: dict[Location, Place]) -> Any:
    """Merge two values, of which one may be absent, into the value at `to`; record the place of every value in it."""
    parts = [part for part in (over, base) if part is not None]
    top = parts[0]
    places[to] = top.source.place(top.at)
    if to == ENTRIES:
        return _merged_assertions(base.items() if base else {}, over.items() if over else {}, places)
    if all(isinstance(part.value, dict) for part in parts):
        old, new = base.items() if base else {}, over.items() if over else {}
        removed = {key for key in old if key in new and new[key].value is None}
        keys = [key for key in {**new, **old} if key not in removed]
        return {key: _merged(old.get(key), new.get(key), (*to, str(key)), places) for key in keys}
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


def apply_defaults(source: YamlSource) -> None:
    """Give each assertion the defaults that its metric takes and that it doesn't say itself; `null` keeps one away.

    Raises:
        SuiteError: a default is no key of any assertion.
    """
    shared = source.data.get("defaults")
    if shared is None:
        return
    if not isinstance(shared, dict):
        raise source.error(DEFAULTS, "defaults is a mapping of keys that assertions share")
    known = {name for model in ASSERTIONS.values() for name in model.model_fields} - {"id"}
    for key in shared:
        if key not in known:
            raise source.error((*DEFAULTS, str(key)), f"unknown key '{key}'{did_you_mean(str(key), known)}")
    for index, entry in enumerate(source.data.get("assertions") or ()):
        for key, value in shared.items():
            if _takes({**shared, **entry}, key):
                _complete(source, entry, key, value, ("assertions", index, key), (*DEFAULTS, key))


def _takes(entry: dict[str, Any], key: str) -> bool:
    """Return whether a key means something to an assertion's metric; a wrong metric is reported later, on its own."""
    name = str(entry.get("metric"))
    if name in ASSERTIONS and key not in ASSERTIONS[name].model_fields:
        return False
    metric = METRICS.get(name)
    if metric is not None and key == "positions":
        return metric.positional and entry.get("site", metric.sites[0]) != "weight"
    return metric is None or key != "reduce" or metric.reduce is not None


def _complete(source: YamlSource, entry: Any, key: Any, default: Any, to: Location, at: Location) -> None:
    if key not in entry:
        entry[key] = default
        inner = {place[len(at) :]: where for place, where in source.places.items() if place[: len(at)] == at}
        source.places |= {(*to, *rest): where for rest, where in inner.items()}
    elif entry[key] is None:
        del entry[key]
    elif isinstance(entry[key], dict) and isinstance(default, dict):
        for name, value in default.items():
            _complete(source, entry[key], name, value, (*to, str(name)), (*at, str(name)))

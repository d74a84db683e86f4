"""What a suite takes from elsewhere: the suites that it `extends`, and its own `defaults`.

The result is one document in which every value still knows the file and the line that it comes from. Mappings merge key
by key and assertions by id; the extending suite wins, and its `null` removes what a base has. Any other value replaces
the base's as a whole.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common import SuiteError, content_hash, did_you_mean, one_line, shown_path
from ..metrics import METRICS
from .assertion_models import ASSERTIONS
from .bounds import DEFAULT
from .paths import Boundary, Roots
from .yaml_source import Location, Node, Place, YamlSource, disk_text, is_there, read_yaml, reads_disk, suites_read_by

ENTRIES: Location = ("assertions",)
DEFAULTS: Location = ("defaults",)
FOLDERS = (("model", "path"), ("model", "reference"), ("model", "previous"))
"""Keys whose value is a path if such a path exists, and the id of something on the hub if not."""
FILES = ("file", "reference")
"""Keys of an assertion whose value is always a path."""
MAX_CHAIN = 100
"""How many files may extend one another in a row; Python's stack ends at a few hundred."""
Chain = dict[Path, Path]
"""The files from the suite to the one that is read: each with links resolved, because a circle may go through one, and
as messages show it."""


def read_suite(path: Path, roots: Roots | None = None) -> YamlSource:
    """Read a suite and everything that it extends, merged; `assertions` becomes a list in either of its forms.

    `roots`: where bases may lie beside the suite's repository.

    Raises:
        SuiteError: a file is no suite, a base is missing or lies elsewhere, or the bases form a circle; it names the
            chain of files.
    """
    roots = roots or Roots()
    boundary = roots.around(path)
    if problem := boundary.problem(path):
        raise SuiteError(f"{path}:1: the suite {problem}")  # not where the link leads
    document = _read(path, {}, {}, boundary)
    return YamlSource(path, document.plain(), dict(document.places()), roots)


def suite_hash(path: Path, roots: Roots | None = None) -> str:
    """Return the SHA-256 of a suite with all that it extends, whatever its layout and wherever it lies.

    Raises:
        SuiteError: as `read_suite`.
    """
    with suites_read_by(disk_text):
        return content_hash(read_suite(path, roots).data)


def _read(path: Path, extending: Chain, done: dict[Path, Node], boundary: Boundary) -> Node:
    """Read a file and what it extends. `done`: the files that are read already, so that each is read once."""
    resolved = path.resolve()
    if resolved in done:
        return done[resolved]
    source = read_yaml(path)
    if not isinstance(source.data, dict):
        raise source.error((), "a suite is a mapping with the sections model, data, memory and assertions")
    _check_entries(source)
    if extending:  # a base: its paths are used from the suite that the user named
        _rebase(source, next(iter(extending.values())).parent)
    chain = {**extending, resolved: path}
    # A suite without bases is merged with nothing, which turns a mapping of assertions into a list as well.
    merged = Node({}, Place(path, 1))
    for index, named in enumerate(_named_bases(source)):
        merged = _extended(merged, _base(source, index, named, chain, done, boundary))
    done[resolved] = _extended(merged, Node.of(source, source.data))
    return done[resolved]


def _named_bases(source: YamlSource) -> list[str]:
    named = source.data.get("extends", [])
    bases = [named] if isinstance(named, str) else named
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise source.error(("extends",), f"extends is the path of a suite, or a list of them, not {named!r}")
    return bases


def _base(source: YamlSource, index: int, named: str, chain: Chain, done: dict[Path, Node], boundary: Boundary) -> Node:
    path = Path(os.path.normpath(source.path.parent / named))  # not `resolve`: messages show the path as it is written
    location: Location = ("extends", index) if isinstance(source.data["extends"], list) else ("extends",)

    def files() -> str:
        shown = [shown_path(file) for file in (*chain.values(), path)]
        return " → ".join(shown if len(shown) <= 8 else [*shown[:4], "…", *shown[-3:]])

    # Before anything is looked up: whether a file is there is nobody's business either.
    if problem := boundary.problem(path):
        raise source.error(location, f"extends '{named[:80]}' {problem}")
    try:
        resolved, there = path.resolve(), is_there(path)
    except (OSError, ValueError) as error:  # a name that is too long for the system
        raise source.error(location, f"extends '{named[:40]}…': {one_line(error)[:60]}") from None
    if resolved in chain:
        raise source.error(location, f"extends goes in a circle: {files()}")
    if len(chain) >= MAX_CHAIN:
        raise source.error(location, f"more than {MAX_CHAIN} suites extend one another in a row: {files()}")
    if not there:
        raise source.error(location, f"extends '{named}': there is no such file ({files()})")
    try:
        return _read(path, chain, done, boundary)
    except SuiteError as error:
        text = str(error)  # the innermost file has appended the longest chain already
        raise SuiteError(text if " → " in text else f"{text} ({files()})") from None


def _rebase(source: YamlSource, folder: Path) -> None:
    """Make the relative paths of a suite relative to another folder."""

    def moved(named: str) -> str:
        return os.path.relpath(source.path.parent / Path(os.path.expanduser(named)), folder)

    # Whether a checkpoint is here must not change what a suite is compared by.
    for section, key in FOLDERS if reads_disk() else ():
        values = source.data.get(section)
        named = values.get(key) if isinstance(values, dict) else None
        # A name that is too long for the system is refused later, at its line.
        with suppress(OSError):
            if isinstance(named, str) and named and (source.path.parent / named).exists():
                values[key] = moved(named)
    entries = source.data.get("assertions") or ()
    for entry in [source.data.get("defaults"), *(entries.values() if isinstance(entries, dict) else entries)]:
        for key in FILES:
            if isinstance(entry, dict) and isinstance(entry.get(key), str):
                entry[key] = moved(entry[key])
    data = source.data.get("data")
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


def _extended(base: Node, over: Node) -> Node:
    """Return a suite that extends another as one document: all that `over` says, and of `base` what it leaves open."""
    merged = _merged(base, over)
    if "assertions" in merged.value:
        entries = _merged_assertions(_by_id(base.value.get("assertions")), _by_id(over.value.get("assertions")))
        merged.value["assertions"] = replace(merged.value["assertions"], value=entries)
    return merged


def _merged(base: Node, over: Node) -> Node:
    """Merge two values: mappings key by key, where `null` removes a key of the base; anything else is replaced."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    values: dict[Any, Node] = {}
    for key, new in over.value.items():
        if key not in base.value:
            values[key] = new
        # Of a bound by group `default: null` is a value: the other layers have no bound.
        elif new.value is not None or key == DEFAULT:
            values[key] = _merged(base.value[key], new)
    values |= {key: old for key, old in base.value.items() if key not in over.value}
    return replace(over, value=values)


def _by_id(assertions: Node | None) -> dict[str, Node]:
    """Return assertions, in either of their forms, by id."""
    if assertions is None:
        return {}
    if isinstance(assertions.value, list):
        ids = [entry.value.get("id") for entry in assertions.value]
        # An entry without an id keeps its place under its index, so that the missing key is reported at its
        # line.
        return {str(id_.value if id_ else index): assertions.value[index] for index, id_ in enumerate(ids)}
    return {
        str(name): replace(entry, value={"id": Node(str(name), entry.place), **entry.value})
        if isinstance(entry.value, dict)
        else entry
        for name, entry in assertions.value.items()
    }


def _merged_assertions(old: dict[str, Node], new: dict[str, Node]) -> list[Node]:
    """Merge assertions by id: those of the base in its order, then those that are new."""
    entries = []
    for name in {**old, **new}:
        if name not in new:
            entries.append(old[name])
        elif not isinstance(new[name].value, dict):
            _check_removal(name, new[name], old)
        else:
            entries.append(_merged(old[name], new[name]) if name in old else new[name])
    return entries


def _check_removal(name: str, over: Node, old: dict[str, Node]) -> None:
    if over.value is not None:
        if name in ("id", "metric"):
            raise SuiteError(f"{over.place}: assertions is a list: begin each assertion with a dash, `- id: …`")
        raise SuiteError(f"{over.place}: assertions: '{name}' should have the keys of an assertion, or be null")
    if name not in old:
        hint = did_you_mean(name, old)
        raise SuiteError(f"{over.place}: no suite that this one extends has an assertion '{name}'{hint}")


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
    document = Node.of(source, source.data)
    defaults, entries = document.value["defaults"], document.value.get("assertions")
    for index, entry in enumerate(source.data.get("assertions") or ()):
        # Which keys mean something depends on the metric and the site, and these may be defaults themselves.
        taken = {key: node for key, node in defaults.value.items() if _takes({**shared, **entry}, key)}
        entries.value[index] = _merged(replace(defaults, value=taken), entries.value[index])
    source.data, source.places = document.plain(), dict(document.places())


def _takes(entry: dict[str, Any], key: str) -> bool:
    """Return whether a key means something to an assertion's metric; a wrong metric is reported later, on its own."""
    name = str(entry.get("metric"))
    if name in ASSERTIONS and key not in ASSERTIONS[name].model_fields:
        return False
    metric = METRICS.get(name)
    if metric is not None and key == "positions":
        ranged = isinstance(entry[key], dict) and "skip_first" not in entry[key]
        return (metric.of_tokens if ranged else metric.positional) and entry.get("site", metric.sites[0]) != "weight"
    return metric is None or key != "reduce" or metric.reduce is not None

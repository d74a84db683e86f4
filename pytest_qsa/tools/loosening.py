"""What a change of suites and baselines takes from a gate: every assertion and baseline that allows more than before.

A change that is proved to allow no more is left out. Of any other that could, nobody can say without a run whether it
does, so it is listed: another pattern of layers, other data, another parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import BaselineError, SuiteError, code_span, counted, markdown_table, number, shown_path
from ..suite import (
    TIERS,
    Assertion,
    ExternalAssertion,
    Location,
    Relative,
    Roots,
    Stated,
    SuiteFile,
    Waiver,
    disk_text,
    load_suite,
    local_path,
    suites_read_by,
)
from ..verdicts import BASELINES, BaselineFile, baseline_folder, stated_text
from .revision import Revision

LENIENT_ABOVE = ("sigmas", "implausible_gain")
"""Keys of an assertion on an eval of which a larger number allows more."""
SIZES = ("num_samples", "seq_len")
"""Keys of `data` of which a larger number checks more."""
PATTERNS = ("layers", "exclude", "tasks")
NO_CHECK = ("id", "metric", "reason", "noise", "min", "max", "equals", "baseline", "waive", "tier", "level", *PATTERNS)
"""Keys of an assertion that are compared by rules of their own, or allow nothing."""
OF_MODEL = (
    "name", "reference", "previous", "tail", "dtype", "attn_implementation", "submodule", "weights", "allow_unexpected",
    "allow_idle", "require",
)  # fmt: skip
"""Keys of `model` that decide what is checked and against what."""
OF_CANDIDATE = ("path", "factory", "served", "logprobs", "revision", "gguf_file", "base")
"""Keys of `model` that name the checkpoint, which a release changes: told, and no loosening."""

MOST_ROWS = 200
"""The rows of a comment; GitHub takes 65,536 characters."""


@dataclass(frozen=True)
class Loosening:
    """One thing that allows more than before. `place`: file:line. `of`: the assertion, or what else it is about.

    `counts`: whether it is a loosening; else it is only told.
    """

    place: str
    of: str
    what: str
    counts: bool = True

    def __str__(self) -> str:
        """Write it in one line."""
        return f"{self.place}: {self.of}: {self.what}{'' if self.counts else ' (another checkpoint: no loosening)'}"


def compared(paths: Sequence[Path], suites: Sequence[SuiteFile], revision: Revision, roots: Roots) -> list[Loosening]:
    """Return what suites and baselines allow more than in a commit. `paths`: suites and folders, as they were named.

    Raises:
        SuiteError: a suite of the commit is none to this version; the text names the commit.
        InfraError: git can't read it.
    """
    found = [*_of_suites(paths, suites, revision, roots)]
    for path in paths:
        folder = path if path.is_dir() else path.parent
        for file in revision.baselines_below(folder):
            if (path.is_dir() or file.parent.name == _stem(path)) and not revision.is_same(file):
                found += moved(file, revision.text(file) or "", _text(file), revision.shown)
        found += _own_of_classes(path, folder, revision)
    return list(dict.fromkeys(found))


def _of_suites(
    paths: Sequence[Path], suites: Sequence[SuiteFile], revision: Revision, roots: Roots
) -> Iterator[Loosening]:
    now = {revision.relative(suite.path) for suite in suites}
    then = dict.fromkeys(old for path in paths for old in _suites_then(path, revision))
    for path in then:
        try:
            with suites_read_by(revision.text):
                old = load_suite(path, roots=roots)
        except SuiteError as error:
            raise SuiteError(f"at {revision.shown}: {error}") from None
        if revision.relative(path) in now:
            with suites_read_by(disk_text):
                new = load_suite(path, roots=roots)
            yield from loosened(old, new, revision.shown)
            yield from _other_content(new, revision)
        elif not path.exists():  # one that is wrong now has been told
            yield from removed_suite(old, revision.shown)


def _other_content(suite: SuiteFile, revision: Revision) -> Iterator[Loosening]:
    """Yield the files that a suite names and that decide what it checks, where their content changed."""
    for location, of, path in _named_files(suite):
        for file in revision.changed(path):
            yield Loosening(str(suite.source.place(location)), of, f"{shown_path(file)} has other content")


def _named_files(suite: SuiteFile) -> Iterator[tuple[Location, str, Path]]:
    folder, model = suite.path.parent, suite.suite.model
    if (data := local_path(suite.suite.data, folder)) is not None:
        yield ("data", "source"), "data.source", data
    for key in ("reference", "previous"):
        # As a base writes it, relative to that base's folder.
        named, written = getattr(model, key, None), suite.source.place(("model", key)).path.parent
        if named and (written / named).is_file():
            yield ("model", key), f"model.{key}", written / named
    for index, assertion in enumerate(suite.assertions):
        if isinstance(assertion, ExternalAssertion) and assertion.reference is not None:
            yield ("assertions", index, "reference"), assertion.id, folder / assertion.reference


def _suites_then(path: Path, revision: Revision) -> Iterator[Path]:
    if path.is_dir() or not revision.text(path):
        yield from revision.suites_below(path)
    elif path.suffix != ".py":
        yield path


def _own_of_classes(path: Path, folder: Path, revision: Revision) -> Iterator[Loosening]:
    """Yield the new baselines of a class of devices: they stand in for the shared one."""
    for file in sorted(folder.rglob(f"{BASELINES}/**/*@*.json")):
        shared = file.with_name(f"{file.stem.rpartition('@')[0]}.json")
        own = path.is_dir() or file.parent.name == _stem(path)
        if own and revision.text(file) is None and revision.text(shared) is not None:
            yield Loosening(f"{shown_path(file)}:1", file.stem, f"is new, and stands in for {shared.name}")


def _stem(suite: Path) -> str:
    return baseline_folder(suite, "").name


def _text(file: Path) -> str | None:
    return file.read_bytes().decode("utf-8", "replace") if file.is_file() else None


def removed_suite(old: SuiteFile, revision: str) -> Iterator[Loosening]:
    """Yield what is lost with a suite that is there no more."""
    for index, assertion in enumerate(old.assertions):
        yield Loosening(f"{old.place_of(index)} at {revision}", assertion.id, f"is removed with {shown_path(old.path)}")


def loosened(old: SuiteFile, new: SuiteFile, revision: str) -> Iterator[Loosening]:
    """Yield what a suite allows more than it did. `revision`: the old one's, for places that are there no more."""
    own = {assertion.id: index for index, assertion in enumerate(new.assertions)}
    for index, before in enumerate(old.assertions):
        if before.id not in own:
            yield Loosening(f"{old.place_of(index)} at {revision}", before.id, "is removed")
            continue
        after = new.assertions[own[before.id]]
        for key, what in _of_assertion(before, after):
            place = new.source.place(("assertions", own[before.id], *key))
            yield Loosening(str(place), before.id, what)
    yield from _of_subject(old, new)


def _of_subject(old: SuiteFile, new: SuiteFile) -> Iterator[Loosening]:
    for section, keys in (("model", (*OF_MODEL, *OF_CANDIDATE)), ("data", tuple(type(old.suite.data).model_fields))):
        before, after = (getattr(file.suite, section) for file in (old, new))
        for key in keys:
            one, other = (getattr(each, key, None) for each in (before, after))
            more = key in SIZES and isinstance(one, int) and isinstance(other, int) and other > one
            if one != other and not more and key != "batch_size":
                place = str(new.source.place((section, key)))
                yield Loosening(place, f"{section}.{key}", _change(one, other), counts=key not in OF_CANDIDATE)


def _of_assertion(old: Assertion, new: Assertion) -> Iterator[tuple[Location, str]]:
    """Yield the key of each change that may allow more, and the change in words."""
    if old.metric != new.metric:
        yield ("metric",), f"metric {old.metric} → {new.metric}"
        return
    if TIERS.index(new.tier) > TIERS.index(old.tier):
        yield ("tier",), f"tier {old.tier} → {new.tier}"
    if (old.level, new.level) == ("fail", "warn"):
        yield ("level",), "level fail → warn"
    yield from _of_bounds(old.stated, new.stated)
    yield from _of_baseline(getattr(old, "baseline", None), getattr(new, "baseline", None))
    yield from _of_layers(old, new)
    for waiver in new.waivers:
        if not any(_covers(known, waiver) for known in old.waivers):
            text = f"waived for '{waiver.layers}' until {waiver.until} by {waiver.owner}: {waiver.reason}"
            yield ("waive",), text
    for key in type(old).model_fields.keys() - set(NO_CHECK):
        one, other = getattr(old, key), getattr(new, key)
        if one != other and not _checks_more(old, key, one, other):
            yield (key,), f"{key} {_change(one, other)}"


def _covers(known: Waiver, waiver: Waiver) -> bool:
    return known.layers == waiver.layers and waiver.until <= known.until


def _checks_more(assertion: Assertion, key: str, old: Any, new: Any) -> bool:
    """Say whether a changed parameter is proved to allow no more than before."""
    if isinstance(assertion, ExternalAssertion) and key in LENIENT_ABOVE:
        return bool(new < old)
    if key == "models":
        return _names_all_of(old or ".", new or ".")
    # A lower threshold counts more tokens, of which a `max` allows no more.
    counted = assertion.metric == "outlier_tokens" and key == "threshold"
    return counted and set(assertion.stated) == {"max"} and bool(new < old)


def _of_bounds(old: Mapping[str, Stated], new: Mapping[str, Stated]) -> Iterator[tuple[Location, str]]:
    for side, before in old.items():
        after, exact = new.get(side), new.get("equals")
        if side == "equals":
            looser = after != before
        elif after is None and exact is not None:
            looser = _allows_more(side, before, exact)
        else:
            looser = after is None or _allows_more(side, before, after)
        if looser:
            yield (side,), f"{side} {stated_text(before)} → {stated_text(after)}"


def _allows_more(side: str, old: Stated | None, new: Stated | None) -> bool:
    """Say whether a bound isn't proved to allow no more than another one; None of a group allows all."""
    if old is None or new is None:
        return old is not None
    if isinstance(old, dict) and isinstance(new, dict):
        kept = [group for group in new if group in old]
        # The first group that fits a layer counts, so that their order matters.
        if kept != list(old) or any(_allows_more(side, old[group], new[group]) for group in kept):
            return True
        added = [bound for group, bound in new.items() if group not in old]
        return any(_allows_more(side, one, other) for one in old.values() for other in added)
    if isinstance(old, dict):
        return any(_allows_more(side, one, new) for one in old.values())
    if isinstance(new, dict):
        return any(_allows_more(side, old, other) for other in new.values())
    if isinstance(old, Relative) and isinstance(new, Relative):
        pairs = zip(_extents(old), _extents(new), strict=True)
        return any(_beyond(side, one, other) for one, other in pairs)
    return isinstance(old, Relative) or isinstance(new, Relative) or _beyond(side, old, new)


def _extents(bound: Relative) -> tuple[float, ...]:
    """Return the numbers of a bound that follows the last release, of which each larger one makes it larger."""
    least = float("-inf") if bound.at_least is None else bound.at_least
    most = float("inf") if bound.at_most is None else bound.at_most
    return bound.times, bound.plus, least, most


def _beyond(side: str, old: float, new: float) -> bool:
    return new > old if side == "max" else new < old


def _of_baseline(old: Any, new: Any) -> Iterator[tuple[Location, str]]:
    if old is None or old == new:
        return
    if new is None:
        yield ("baseline",), "is held against its baseline no more"
        return
    for key in ("rel", "abs"):
        if getattr(new, key) > getattr(old, key):
            yield ("baseline", key), f"baseline {key} {getattr(old, key):g} → {getattr(new, key):g}"
    for key in ("direction", "per"):
        one, other = getattr(old, key), getattr(new, key)
        if one != other and other not in ("both", None):
            yield ("baseline", key), f"baseline {key} {_change(one, other)}"


def _of_layers(old: Assertion, new: Assertion) -> Iterator[tuple[Location, str]]:
    for key in PATTERNS:
        one, other = getattr(old, key, None), getattr(new, key, None)
        # What names less excludes less; what is one number of all layers is another one with any other layers.
        fewer, more = (other, one) if key == "exclude" else (one, other)
        if one != other and (old.over is not None or not _names_all_of(fewer, more)):
            yield (key,), f"{key} {_change(one, other)}"


def _names_all_of(one: str | None, other: str | None) -> bool:
    """Say whether a pattern is proved to match all that another one does: it has all of its alternatives."""
    if one is None or other == ".":
        return True
    return other is not None and set(_alternatives(one)) <= set(_alternatives(other))


def _alternatives(pattern: str) -> list[str]:
    """Return what stands between the `|` of a pattern that are in no group, class or escape."""
    parts, depth, escaped, in_class = [""], 0, False, False
    for character in pattern:
        if character == "|" and not (depth or escaped or in_class):
            parts.append("")
            continue
        if not escaped:
            depth += {"(": 1, ")": -1}.get(character, 0) if not in_class else 0
            in_class = character != "]" if in_class else character == "["
        escaped = character == "\\" and not escaped
        parts[-1] += character
    return parts


def _change(old: Any, new: Any) -> str:
    return f"{_shown(old)} → {_shown(new)}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str | float):
        return f"'{value}'" if isinstance(value, str) else f"{value:g}"
    return json.dumps(value.model_dump(mode="json") if hasattr(value, "model_dump") else value, default=str)


def moved(path: Path, old: str, new: str | None, revision: str) -> Iterator[Loosening]:
    """Yield what of a baseline's file moved. `old`, `new`: its text then and now; None: it is gone."""
    file, name = shown_path(path), path.stem
    try:
        before = BaselineFile.parse(old)
    except BaselineError:  # it held nothing that a gate could have met
        return
    if new is None:
        yield Loosening(f"{file}:1 at {revision}", name, "the baseline is removed")
        return
    try:
        after = BaselineFile.parse(new)
    except BaselineError as error:
        yield Loosening(f"{file}:1", name, str(error))
        return
    for key, of, what in _between(before, after):
        yield Loosening(f"{file}:{_line(new, key)}", name, f"{of}{what}")


def _between(old: BaselineFile, new: BaselineFile) -> Iterator[tuple[str, str, str]]:
    """Yield each difference of two baselines: the key of the file where it stands, and its text in two parts."""
    for key in sorted({*old.query, *new.query}):
        if old.query.get(key) != new.query.get(key):
            yield "query", f"{key} ", _change(old.query.get(key), new.query.get(key))
    if old.data != new.data:
        yield "data", "", "is of other tokens"
    for layer, value in old.values.items():
        now = new.values.get(layer)
        if now is None:
            yield "values", f"{layer} ", "is in it no more"
        elif now != value:
            yield layer, f"{layer} ", f"{number(value)} → {number(now)}{_percent(value, now)}"


def _percent(old: float, new: float) -> str:
    finite = old and abs(old) < float("inf") and abs(new) < float("inf")
    return f" ({(new - old) / abs(old):+.1%})".replace("-", "−") if finite else ""


def _line(text: str, key: str) -> int:
    """Return the line of a key of a JSON text, counted from 1; 1 where it has none of its own."""
    quoted = json.dumps(key, ensure_ascii=False) + ":"
    found = (index for index, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith(quoted))
    return next(found, 1)


def loosening_markdown(found: Sequence[Loosening], revision: Revision) -> str:
    """Return the comment of a pull request: what was loosened, or that nothing was."""
    loose, told = ([each for each in found if each.counts is counts] for counts in (True, False))
    title = f"### The gate is looser than at {code_span(revision.shown)} in {counted(len(loose), 'place')}"
    lines = [title if loose else f"The gate is as strict as at {code_span(revision.shown)}."]
    if loose or told:
        rows = [(each.place, each.of, each.what) for each in (*loose, *told)]
        lines += ["", *markdown_table([("where", "what", "change"), *rows[:MOST_ROWS]])]
    if len(found) > MOST_ROWS:
        lines += ["", f"… and {len(found) - MOST_ROWS} more, which `qsa check --against` lists."]
    return "\n".join(lines) + "\n"

"""Patterns: the regexes that find layers by name, within limits, and what is said where one finds none."""

from __future__ import annotations

import difflib
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from ..common import AnomalyError, SuiteError
from .kinds import check_kind, is_kind, known_kinds, of_kind


def exactly(layers: Sequence[str]) -> str:
    """Write the pattern that finds these layers and no other."""
    return f"^(?:{'|'.join(map(re.escape, layers))})$"


MAX_PATTERN = 1_000
"""How many characters a pattern of a suite may have; those of `exactly` are longer."""
MAX_REPEATS = 10_000
"""How often a part of a pattern may repeat by counts such as `{3}`, with those around it multiplied."""
MATCH_SECONDS = 2.0
"""The processor time that a pattern may take for all names. A million names take a harmless one about as long."""
_ALTERNATIVES = re.compile(r"\^\(\?:(?:[^\\()\[\]{}*+?^$]|\\.)*\)\$")
_TOKEN = re.compile(
    r"\\N\{[^}]*\}|\\.|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|\{(?P<least>\d*)(?:,(?P<most>\d*))?\}|.", re.DOTALL
)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    r"""Compile a layer pattern.

    Raises:
        SuiteError: it is not a regular expression, repeats too often, or holds a control character, as `"\b"` in
            double quotes does; or it is a portable name of no kind.
    """
    if is_kind(pattern):
        check_kind(pattern)
    if min(pattern, default=" ") < " ":
        raise SuiteError(
            f"the regex {pattern!r} holds a control character: in YAML's double quotes \\b is a backspace; "
            "write it without quotes or in single ones"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read otherwise, `[[`
            compiled = re.compile(pattern)
    # A count too large for C is an OverflowError, a hundred nested groups a RecursionError.
    except (re.error, OverflowError, RecursionError) as error:
        glob = "; a glob's * is .* here" if pattern.startswith("*") else ""
        raise SuiteError(f"'{pattern}' is not a regular expression: {error}{glob}") from None
    if (repeats := _repeats(pattern)) > MAX_REPEATS:
        raise SuiteError(f"the regex '{pattern}' repeats a part {repeats:,} times; at most {MAX_REPEATS:,}")
    return compiled


def check_pattern(pattern: str) -> str:
    """Return a pattern of a suite that can be compiled and isn't too long.

    Raises:
        SuiteError: it is; or as `compile_pattern`.
    """
    if len(pattern) > MAX_PATTERN:
        raise SuiteError(f"the regex '{pattern[:40]}…' has {len(pattern):,} characters; at most {MAX_PATTERN:,}")
    compile_pattern(pattern)
    return pattern


def _repeats(pattern: str) -> int:
    """Return the largest product of nested counts: 12 for `(a{3}b){2,4}`."""
    groups, last, most = [1], 1, 1  # the largest product in each open group; that of the last part
    for token in _TOKEN.finditer(pattern):
        text = token[0]
        if text == "(":
            groups.append(1)
        elif text == ")":
            last = groups.pop() if groups[1:] else 1
        elif text.startswith("{") and text[1:-1].strip(","):
            last *= max(int(token["least"] or 0), int(token["most"] or 0), 1)
        elif not text.isspace():  # which verbose patterns may have before a count
            last = 1
        groups[-1] = max(groups[-1], last)
        most = max(most, groups[-1])
    return most


@lru_cache(maxsize=256)
def _matcher(pattern: str) -> Any:
    """Compile a pattern of Python's `re` for the package `regex`, which can be stopped: `re` can't.

    What only `regex` reads as syntax is escaped: fuzzy counts `{e<=1}` and sets in sets.
    """
    import regex  # only what matches names pays for the import

    compile_pattern(pattern)

    def meant(token: re.Match[str]) -> str:
        text = token[0]
        if token["set"]:
            return "[" + re.sub(r"(\\.)|\[", lambda part: part[1] or r"\[", text[1:], flags=re.DOTALL)
        return r"\{" if text in ("{", "{}") else text

    try:
        return regex.compile(_TOKEN.sub(meant, pattern), regex.VERSION0)
    except (regex.error, RecursionError) as error:
        raise SuiteError(f"'{pattern}' can't be matched: {error}") from None


def found_by(
    pattern: str, names: Iterable[str], *, from_start: bool = False, seconds: float = MATCH_SECONDS
) -> list[str]:
    """Return the names that a pattern finds, anywhere in them or from their start on.

    Raises:
        SuiteError: as `compile_pattern`; or it takes more than `seconds` of processor time for all names.
    """
    if is_kind(pattern):
        return of_kind(pattern, names)
    # Made by `exactly`: nothing in it repeats, and `regex` is slow to compile thousands of names.
    if len(pattern) > MAX_PATTERN and _ALTERNATIVES.fullmatch(pattern):
        compiled = re.compile(pattern)
        return [name for name in names if (compiled.match(name) if from_start else compiled.search(name))]
    matcher = _matcher(pattern)
    match = matcher.match if from_start else matcher.search
    found, began, left = [], time.process_time(), seconds
    try:
        for name in names:
            if match(name, timeout=left):
                found.append(name)
            if (left := seconds - (time.process_time() - began)) <= 0:
                raise TimeoutError
    except TimeoutError:
        raise SuiteError(
            f"the regex '{pattern}' takes more than {seconds:g} s for the names: write it without a repeat in a "
            "repeat, such as (.*)*"
        ) from None
    return found


def match_layers(modules: Sequence[str], pattern: str, exclude: str | None = None) -> list[str]:
    """Return the names that the pattern finds (`re.search`, as in the seed) and `exclude` doesn't, in model order.

    Either may be a portable name, `kind:blocks`, where the names know what they are (`LayerName`).

    Raises:
        SuiteError: as `found_by`.
    """
    found = found_by(pattern, modules)
    unwanted = set(found_by(exclude, found)) if exclude is not None else ()
    return [name for name in found if name not in unwanted]


FEW_NAMES = 20
"""A model with so few layers is told by their names, where a pattern matches none of them."""


def no_match(modules: Sequence[str], pattern: str, exclude: str | None) -> AnomalyError:
    """Return the error for a pattern that finds nothing; it names the layers nearest to the pattern."""
    if exclude is not None and match_layers(modules, pattern):
        return AnomalyError(
            f"exclude '{exclude}' leaves none of the layers that '{pattern}' matches: loosen one of the two"
        )
    if is_kind(pattern):
        return AnomalyError(_no_kind(modules, pattern))
    if len(modules) <= FEW_NAMES:  # all of them say more than the nearest, also of a fixture's model
        return AnomalyError(f"no layer matches '{pattern}'; the model has {', '.join(modules) or 'no layer'}")
    # difflib compares plain text, so the pattern is first made to look like the name of a layer.
    plain = re.sub(r"\\d[+*]?", "0", pattern).replace("\\.", ".").strip("^$")
    near = difflib.get_close_matches(plain, modules, n=3, cutoff=0.3) or list(modules[:3])
    return AnomalyError(
        f"no layer matches '{pattern}'; the nearest names of {len(modules)}: {', '.join(near)}. "
        "`qsa layers` lists them all"
    )


def _no_kind(modules: Sequence[str], pattern: str) -> str:
    has = ", ".join(f"kind:{kind} ({len(layers)})" for kind, layers in known_kinds(modules).items())
    if not has:
        return f"what '{pattern}' stands for is known of a model's layers alone: write a regex of these names"
    return f"no layer is '{pattern}'; the model has {has}"

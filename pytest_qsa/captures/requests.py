"""Requests: which statistics a capture has to hold of which sites. numpy only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..common import AnomalyError, SuiteError
from .statistics import ALL_STATISTICS, Statistic, against_reference

Site = Literal["input", "output", "weight", "logits"]
SITES: tuple[Site, ...] = get_args(Site)
SiteKey = tuple[str, Site]
"""A layer and its site."""
LayerSite = Literal["input", "output", "weight"]
LOGITS: Site = "logits"
"""The site of the whole model's output, the scores of every next token. All other sites belong to a layer."""


def exactly(layers: Sequence[str]) -> str:
    """Write the pattern that finds these layers and no other."""
    return f"^(?:{'|'.join(map(re.escape, layers))})$"


@dataclass(frozen=True, order=True)
class Request:
    """One demand on a capture: these statistics of every layer that the pattern finds, at this site."""

    pattern: str
    site: Site
    exclude: str | None = None
    statistics: frozenset[Statistic] = ALL_STATISTICS

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise SuiteError(f"unknown site '{self.site}': a site is one of {', '.join(SITES)}")
        for pattern in (self.pattern, self.exclude):
            if pattern is not None:
                compile_pattern(pattern)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    r"""Compile a layer pattern.

    Raises:
        SuiteError: it is not a regular expression, or holds a control character, as `"\b"` in double quotes does.
    """
    if min(pattern, default=" ") < " ":
        raise SuiteError(
            f"the regex {pattern!r} holds a control character: in YAML's double quotes \\b is a backspace; "
            "write it without quotes or in single ones"
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SuiteError(f"'{pattern}' is not a regular expression: {error}") from None


def match_layers(modules: Sequence[str], pattern: str, exclude: str | None = None) -> list[str]:
    """Return the names that the pattern finds (`re.search`, as in the seed) and `exclude` doesn't, in model order."""
    wanted = compile_pattern(pattern)
    unwanted = compile_pattern(exclude) if exclude is not None else None
    return [name for name in modules if wanted.search(name) and not (unwanted and unwanted.search(name))]


def no_match(modules: Sequence[str], pattern: str, exclude: str | None) -> AnomalyError:
    """Return the error for a pattern that finds nothing; it names the layers nearest to the pattern."""
    if exclude is not None and match_layers(modules, pattern):
        return AnomalyError(
            f"exclude '{exclude}' leaves none of the layers that '{pattern}' matches: loosen one of the two"
        )
    plain = re.sub(r"\\d[+*]?", "0", pattern).replace("\\.", ".").strip("^$")
    near = difflib.get_close_matches(plain, modules, n=3, cutoff=0.3) or list(modules[:3])
    return AnomalyError(
        f"no layer matches '{pattern}'; the nearest names of {len(modules)}: {', '.join(near)}. "
        "`qsa layers` lists them all"
    )


def compares(requests: Iterable[Request]) -> bool:
    """Say whether some of the requests need a reference."""
    return any(against_reference(request.statistics) for request in requests)


def merge_requests(requests: Iterable[Request]) -> tuple[Request, ...]:
    """Union the statistics of equal sites; sorted, so that equal demands make equal plans."""
    union: dict[tuple[str, Site, str | None], frozenset[Statistic]] = {}
    for request in requests:
        key = (request.pattern, request.site, request.exclude)
        union[key] = union.get(key, frozenset()) | request.statistics
    ordered = sorted(union.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or ""))
    return tuple(Request(pattern, site, exclude, stats) for (pattern, site, exclude), stats in ordered)

"""What a capture has to measure: the union of the sites and statistics that the selected assertions need.

Plain data, so that the planner, the cache and the engine speak of the same thing without importing one another.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..common import AnomalyError, SuiteError

Site = Literal["input", "output", "weight", "logits"]
SITES: tuple[Site, ...] = get_args(Site)
SiteKey = tuple[str, Site]
"""A layer and its site."""
LayerSite = Literal["input", "output", "weight"]
LOGITS: Site = "logits"
"""What the whole model returns: the scores of every next token. It is no layer's; the others are a layer's."""

TOKENS = "tokens"
CHANNELS = "channels"
ELEMENTS = "elements"
MOMENTS = "moments"
COUNTS = "counts"
SIGNED_COUNTS = "signed_counts"
SINKS = "sinks"
EXPERTS = "experts"
CHANNEL_COUNTS = "channel_counts"
SCORES = "scores"
"""The statistics: token-wise maxima; channel-wise maxima; order statistics of the elements; power sums; counts of |x|
and of x; at the outputs of the blocks, the tokens that may be sinks; the tokens of each expert, where there are some;
counts of x in each channel; and how likely the model found each token that came."""

STORED = "stored"
"""How far a loaded weight is from what the checkpoint's own files hold."""

ERROR = "error"
AGREEMENT = "agreement"
REFERENCE_TOKENS = "reference_tokens"
REFERENCE_SINKS = "reference_sinks"
"""The statistics that a second model is run for: the powers of each token's error; how far the two models' predictions
are apart; the reference's own token-wise maxima; and those at its blocks' outputs, where sinks are found."""

ALL_STATISTICS = frozenset({TOKENS, CHANNELS, ELEMENTS, MOMENTS, COUNTS, SIGNED_COUNTS, SINKS, EXPERTS})
"""What is kept where nothing is chosen: all but what costs much, which only a site that names it gets."""


def massive_statistic(absolute: float, ratio: float) -> str:
    """Name the statistic of massive activations, which has to know its two thresholds during the pass."""
    return f"massive:{absolute:.17g}:{ratio:.17g}"


def quantization_statistic(scheme: str, by: str, group_size: int) -> str:
    """Name the statistic of a simulated quantization whose scales are those of tokens, channels or groups."""
    return f"quantized:{scheme}:{by}:{group_size if by == 'group' else 0}"


def features_statistic(absolute: float) -> str:
    """Name the statistic of outlier features, which has to know its threshold during the pass."""
    return f"features:{absolute:.17g}"


def local_statistic(rows: int) -> str:
    """Name the statistic of a layer's own error, on so many sampled tokens of a sample."""
    return f"local:{rows}"


def channel_error_statistic(positions: str) -> str:
    """Name the statistic of the error of each channel, which has to know during the pass which tokens count."""
    return f"channel_error:{positions}"


def against_reference(statistics: frozenset[str]) -> frozenset[str]:
    """Return those of the statistics that a second model is run for."""
    kinds = {ERROR, AGREEMENT, REFERENCE_TOKENS, REFERENCE_SINKS, "local", "channel_error"}
    return frozenset(statistic for statistic in statistics if statistic.partition(":")[0] in kinds)


def pairwise(statistics: frozenset[str]) -> frozenset[str]:
    """Return those of the statistics for which the tensors of both models have to meet."""
    return against_reference(statistics) - {REFERENCE_TOKENS, REFERENCE_SINKS}


def need_tokens(statistics: frozenset[str]) -> bool:
    """Say whether some of the statistics exist only at a site with a token axis."""
    kinds = {statistic.partition(":")[0] for statistic in statistics}
    return not kinds.isdisjoint({TOKENS, CHANNELS, CHANNEL_COUNTS, REFERENCE_TOKENS, "quantized", "features", "local"})


def map_statistic(sample: int) -> str:
    """Name the statistic that keeps a bounded picture of |x| of one sample."""
    return f"map:{sample}"


def exactly(layers: Sequence[str]) -> str:
    """Write the pattern that finds these layers and no other."""
    return f"^(?:{'|'.join(map(re.escape, layers))})$"


@dataclass(frozen=True, order=True)
class Request:
    """One demand on a capture: these statistics of every layer that the pattern finds, at this site."""

    pattern: str
    site: Site
    exclude: str | None = None
    statistics: frozenset[str] = ALL_STATISTICS

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
    """Make the error for a pattern that finds nothing: it names the layers that come nearest to it."""
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
    """Say whether some of the requests need the reference beside the subject."""
    return any(against_reference(request.statistics) for request in requests)


def merge_requests(requests: Iterable[Request]) -> tuple[Request, ...]:
    """Union the statistics of equal sites; sorted, so that equal demands make equal plans."""
    union: dict[tuple[str, Site, str | None], frozenset[str]] = {}
    for request in requests:
        key = (request.pattern, request.site, request.exclude)
        union[key] = union.get(key, frozenset()) | request.statistics
    ordered = sorted(union.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or ""))
    return tuple(Request(pattern, site, exclude, stats) for (pattern, site, exclude), stats in ordered)

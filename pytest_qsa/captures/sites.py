"""Sites: the tensor streams of a model, which statistics are asked of them, and the numbers of each. numpy only."""

from __future__ import annotations

import difflib
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from ..common import AnomalyError, SuiteError
from .arrays import MOMENT_NAMES, PER_POPULATION, PER_TOKEN, POPULATIONS, RAGGED, Array
from .kinds import check_kind, is_kind, known_kinds, of_kind
from .statistics import ALL_STATISTICS, GENERATED, LAYOUTS, Statistic

Site = Literal["input", "output", "key", "value", "latent", "rope_key", "weight", "logits"]
SITES: tuple[Site, ...] = get_args(Site)
SiteKey = tuple[str, Site]
"""A layer and its site."""
LayerSite = Literal["input", "output", "key", "value", "latent", "rope_key", "weight"]
LOGITS: Site = "logits"
"""The site of the whole model's output, the scores of every next token. All other sites belong to a layer."""
GENERATION = "generation"
"""What stands in the place of a layer, at the site `logits`, for the numbers of answers: a population is a prompt."""
KEY_AND_VALUE: tuple[Site, Site] = ("key", "value")
"""What a layer of attention puts into the KV cache, [sample, token, head × channel]."""
LATENT_AND_ROPE_KEY: tuple[Site, Site] = ("latent", "rope_key")
"""What one of multi-head latent attention (MLA) puts there: a tensor for keys and values, and a key with positions."""
CACHE_SITES: frozenset[Site] = frozenset({*KEY_AND_VALUE, *LATENT_AND_ROPE_KEY})
"""The sites of the layers that fill a KV cache."""


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
        raise SuiteError(f"'{pattern}' is not a regular expression: {error}") from None
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


def at_experts(site: Site, statistics: frozenset[Statistic]) -> frozenset[Statistic]:
    """Return those of the statistics that the layers of packed experts have at a site: weights that nothing calls."""
    return statistics if site == "weight" else frozenset(each for each in statistics if each.alone and site == "output")


@dataclass(frozen=True)
class LayerNames:
    """The names of a model's layers, in model order. `experts`: those of packed experts among them.

    `caching`: those that may fill a KV cache.
    """

    all: Sequence[str]
    experts: frozenset[str] = frozenset()
    caching: frozenset[str] = frozenset()

    @property
    def called(self) -> Sequence[str]:
        """The layers that the forward calls."""
        return [name for name in self.all if name not in self.experts] if self.experts else self.all

    def at(self, site: Site, statistics: frozenset[Statistic] = frozenset()) -> Sequence[str]:
        """Return those that a pattern can find at a site. `statistics`: what is asked of them there."""
        if site in CACHE_SITES:
            return [name for name in self.all if name in self.caching]
        return self.all if site == "weight" or at_experts(site, statistics) else self.called

    def find(
        self, pattern: str, site: Site, exclude: str | None = None, statistics: frozenset[Statistic] = frozenset()
    ) -> list[str]:
        """Return those that a pattern finds at a site.

        Raises:
            AnomalyError: it finds none, or no layer has such a site.
        """
        names = self.at(site, statistics)
        if site in CACHE_SITES and not names:
            raise AnomalyError(NO_CACHE)
        found = match_layers(names, pattern, exclude)
        if not found:
            raise no_match(names, pattern, exclude)
        return found


@dataclass(frozen=True)
class Outline:
    """What is known of a model before a weight of it is read: the names of its layers.

    `bare`: the layers that own no tensor, so that they have no weight. `blocks`: its repeated layers; None where they
    aren't known. `mixtures`: the layers that keep several experts in one tensor. `of_ids`: those whose input is token
    ids. `headless`: the class of a model that returns no logits.
    """

    names: LayerNames
    bare: frozenset[str] = frozenset()
    blocks: Sequence[str] | None = None
    mixtures: frozenset[str] | None = None
    of_ids: frozenset[str] = frozenset()
    headless: str = ""

    def find(self, request: Request) -> list[str]:
        """Return the layers that a request finds; of the logits, none.

        Raises:
            AnomalyError: it finds none, or asks them for a weight and they own none, or for an input that is token ids;
                or for logits, and there are none.
        """
        if request.site == LOGITS:
            if self.headless:
                raise no_logits(self.headless)
            return []
        found = self.names.find(request.pattern, request.site, request.exclude, request.statistics)
        if request.site == "weight" and self.bare.issuperset(found):
            raise no_weight(found, request.pattern)
        if request.site == "input" and (dead := [layer for layer in found if layer in self.of_ids]):
            raise never_fired(dead, request.site)
        return found


NO_CACHE = (
    "the model has no layer that fills a KV cache: key, value, latent and rope_key are sites of attention that keeps "
    "earlier tokens in transformers' Cache"
)
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


def no_weight(found: Sequence[str], pattern: str) -> AnomalyError:
    """Return the error for layers that a pattern finds and that own no weight."""
    return AnomalyError(f"none of the {len(found)} layers that '{pattern}' matches owns a weight")


def never_fired(dead: Sequence[str], site: Site) -> AnomalyError:
    """Return the error for layers whose sites no floating-point tensor reaches."""
    more = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
    return AnomalyError(
        f"the hook at {dead[0]}{more} never fired with a floating-point tensor: the model doesn't call this layer in "
        f"its forward pass, or its {site} is token ids; exclude it, or look at what replaced it"
    )


def no_logits(kind: str) -> AnomalyError:
    """Return the error for a model of a class that predicts no tokens."""
    return AnomalyError(
        f"{kind} returns no logits for every token, which this metric reads: compare its layers instead, as with sqnr"
    )


def against_reference(statistics: Iterable[Statistic]) -> frozenset[Statistic]:
    """Return those of the statistics that a second model is run for."""
    return frozenset(statistic for statistic in statistics if statistic.reference)


def pairwise(statistics: Iterable[Statistic]) -> frozenset[Statistic]:
    """Return those of the statistics for which the tensors of both models have to meet."""
    return frozenset(statistic for statistic in statistics if statistic.reference == "pair")


def need_tokens(statistics: Iterable[Statistic]) -> bool:
    """Say whether some of the statistics exist only at a site with a token axis."""
    return any(statistic.needs_tokens for statistic in statistics)


def compares(requests: Iterable[Request]) -> bool:
    """Say whether some of the requests need a reference."""
    return any(against_reference(request.statistics) for request in requests)


def without_answers(requests: Iterable[Request]) -> list[Request]:
    """Return the requests that a pass over the data answers: all but those of answers to prompts."""
    left = (
        replace(each, statistics=each.statistics - {GENERATED}) for each in requests if each.statistics != {GENERATED}
    )
    return list(left)


def asks_for_answers(requests: Iterable[Request]) -> bool:
    """Say whether some of the requests are of answers to prompts."""
    return any(GENERATED in request.statistics for request in requests)


def merge_requests(requests: Iterable[Request]) -> tuple[Request, ...]:
    """Union the statistics of equal sites; sorted, so that equal demands make equal plans."""
    union: dict[tuple[str, Site, str | None], frozenset[Statistic]] = {}
    for request in requests:
        key = (request.pattern, request.site, request.exclude)
        union[key] = union.get(key, frozenset()) | request.statistics
    # `exclude` may be None, which can't be sorted among texts.
    ordered = sorted(union.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or ""))
    return tuple(Request(pattern, site, exclude, stats) for (pattern, site, exclude), stats in ordered)


D = TypeVar("D", bound=np.generic)


class KeptArray(Generic[D]):
    """An attribute of `SiteNumbers`: one of its arrays by name; a KeyError where the pass didn't keep it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, numbers: SiteNumbers, owner: type) -> NDArray[D]:
        return numbers.arrays[self.name]


# eq=False: the generated `==` would compare arrays, which have no single truth value.
@dataclass(frozen=True, eq=False)
class SiteNumbers:
    """The numbers of one tensor stream. A population is one call of the layer for one sample (a row of a batch).

    `sample`, `call` [P]: whose population it is. `lengths` [P]: its tokens, 0 where the site has no token axis.
    `statistics`: what the site has. `arrays`: what they keep, by the names that the classes of `statistics` give and
    explain; most are attributes as well.
    """

    dtype: str
    shape: tuple[int, ...]
    token_axis: bool
    statistics: frozenset[Statistic]
    sample: NDArray[np.int32]
    call: NDArray[np.int32]
    lengths: NDArray[np.int64]
    arrays: Mapping[str, Array] = field(default_factory=dict)

    token_max = KeptArray[np.float32]()
    peaks = KeptArray[np.int32]()
    peak_channels = KeptArray[np.int32]()
    channel_top = KeptArray[np.float32]()
    channel_max = KeptArray[np.float32]()
    element_top = KeptArray[np.float32]()
    moments = KeptArray[np.float64]()
    extremes = KeptArray[np.float32]()
    bins = KeptArray[np.uint16]()
    counts = KeptArray[np.int64]()
    signed_bins = KeptArray[np.uint16]()
    signed_counts = KeptArray[np.int64]()
    channel_bins = KeptArray[np.uint16]()
    channel_counts = KeptArray[np.uint32]()
    channel_extremes = KeptArray[np.float32]()
    experts = KeptArray[np.int64]()
    error = KeptArray[np.float32]()
    local_rows = KeptArray[np.int32]()
    local = KeptArray[np.float32]()
    scores = KeptArray[np.float64]()
    stored = KeptArray[np.float64]()

    def __contains__(self, array: str) -> bool:
        """Say whether the pass kept an array."""
        return array in self.arrays

    @property
    def populations(self) -> int:
        """How many populations there are; 0 means that the hook never fired."""
        return len(self.sample)

    @property
    def counted_exactly(self) -> bool:
        """Whether each bin of the counts is exactly one value: the dtype has 16 bits or fewer."""
        return self.dtype in ("bfloat16", "float16")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each population begins in `token_max`, and where the last one ends: [P + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def tokens_of(self, population: int) -> NDArray[np.float32]:
        """Return the token-wise maxima of one population, [T], −1 at padding."""
        return self.token_max[self.offsets[population] : self.offsets[population + 1]]

    def error_of(self, population: int) -> NDArray[np.float32]:
        """Return `ERROR_NAMES` of the tokens of one population, [T, 4]; one row where there is no token axis."""
        if not self.token_axis:
            return self.error[population : population + 1]
        return self.error[self.offsets[population] : self.offsets[population + 1]]

    def moment(self, name: str) -> NDArray[np.float64]:
        """Return one column of `moments`, [P]."""
        return self.moments[:, MOMENT_NAMES.index(name)]

    def only(self, populations: NDArray[np.bool_]) -> SiteNumbers:
        """Return it with some of the populations, [P] booleans; what is pooled over all of them stays as it is."""
        if populations.all():
            return self
        tokens = np.repeat(populations, self.lengths)
        masks = {
            PER_TOKEN: tokens if self.token_axis else populations,
            PER_POPULATION: populations,
            RAGGED: populations,
        }
        layouts = {name: LAYOUTS[name.partition("/")[0]] for name in self.arrays}
        arrays = {n: a[masks[layouts[n]]] if layouts[n] in masks else a for n, a in self.arrays.items()}
        placed = {name: getattr(self, name)[populations] for name in POPULATIONS}
        return replace(self, **placed, arrays=arrays)

    @property
    def only_zeros(self) -> bool:
        """Whether every element that was seen is 0; False where nothing that was kept says so."""
        if "moments" in self:
            return not (self.moment("absmax").any() or self.moment("nonfinite").any())
        names = ("extremes", "channel_extremes", "element_top", "channel_max", "token_max")
        values = next((self.arrays[name] for name in names if name in self), None)
        # Padding is −1 in `token_max`; where signs aren't counted, the extremes are NaN after the first two.
        return values is not None and bool(values.size) and not (np.isnan(values[:2]).any() or np.any(values > 0))

    def having(self, statistics: Iterable[Statistic], arrays: Mapping[str, Array]) -> SiteNumbers:
        """Return a copy with more statistics and their arrays."""
        return replace(self, statistics=self.statistics | {*statistics}, arrays={**self.arrays, **arrays})

    def to_arrays(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Split into named arrays and a JSON header; `from_arrays` is the way back."""
        header = {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "token_axis": self.token_axis,
            # Sorted, because equal captures have equal bytes.
            "statistics": sorted(map(str, self.statistics)),
        }
        return {**{name: getattr(self, name) for name in POPULATIONS}, **self.arrays}, header

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], header: Mapping[str, Any]) -> SiteNumbers:
        """Join what `to_arrays` split.

        Raises:
            ValueError: there is an array that no statistic keeps.
        """
        kept = {name: array for name, array in arrays.items() if name not in POPULATIONS}
        # Behind a slash are the parameters of the statistic.
        if unknown := sorted({name.partition("/")[0] for name in kept} - {*LAYOUTS}):
            raise ValueError(f"no statistic keeps an array '{unknown[0]}'")
        return cls(
            dtype=header["dtype"],
            shape=tuple(header["shape"]),
            token_axis=header["token_axis"],
            statistics=frozenset(map(Statistic.parse, header["statistics"])),
            **{name: arrays[name] for name in POPULATIONS},
            arrays=kept,
        )


def renumbered(numbers: Mapping[SiteKey, SiteNumbers], first: int) -> dict[SiteKey, SiteNumbers]:
    """Return the numbers with their samples counted from 0, where the first one here is `first`."""
    if not first:
        return dict(numbers)
    # Sites of one tensor go on sharing their numbers; a weight has no samples.
    own = {id(n): n if site[1] == "weight" else replace(n, sample=n.sample - first) for site, n in numbers.items()}
    return {site: own[id(n)] for site, n in numbers.items()}

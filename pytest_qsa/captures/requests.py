"""Requests: which statistics are asked of which layers, held against the layers that a model has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..common import AnomalyError, SuiteError
from .patterns import compile_pattern, match_layers, no_match
from .sites import CACHE_SITES, LOGITS, SITES, Site
from .statistics import ALL_STATISTICS, GENERATED, Statistic


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

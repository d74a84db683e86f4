"""Selection: a site of some layers, and every metric as a method. This is the Python form of an assertion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..captures import (
    CACHE_SITES,
    COUNTS,
    GENERATED,
    GENERATION,
    LOGITS,
    PADDING,
    REFERENCE_SINKS,
    SIGNED_COUNTS,
    SINKS,
    STORED,
    BandStat,
    Request,
    Site,
    Statistic,
    at_experts,
    channel_bands,
    is_kind,
    match_layers,
    names_sinks,
    need_tokens,
    never_fired,
    no_weight,
)
from ..common import AnomalyError, InfraError, SuiteError, counted
from .activations import MagnitudeStat, magnitudes
from .methods import MetricMethods
from .query import Positions, Query, check_arguments, positions_of, query_of
from .registry import AGGREGATIONS, METRICS, Estimate, Metric, Parameters, Reduce
from .series import Judge, Series, sound
from .view import View

if TYPE_CHECKING:
    from ..captures import Capture


NO_BLOCKS = (
    "no outputs of blocks were measured, in which sinks could be found, as in a model without a list of blocks; say "
    "positions: all or {skip_first: n}"
)


class NotMeasuredError(AnomalyError):
    """The capture lacks the site or the statistic; a second pass can bring it."""


# repr=False: that of the class itself, which is short.
@dataclass(frozen=True, repr=False)
class Selection(MetricMethods):
    """The layers of a capture that a regex finds, at one site. Each metric returns a `Series`, in model order.

    All methods take `reduce` (how samples are aggregated: max, mean, sum, p95) where the metric has samples, and
    `positions` where it counts tokens. They raise `AnomalyError` where there is nothing to compute from, and
    `InfraError` for a weight in a format that isn't known here.
    """

    capture: Capture
    pattern: str
    site: Site
    exclude: str | None = None
    judge: Judge | None = None

    def __repr__(self) -> str:
        without = f" without '{self.exclude}'" if self.exclude is not None else ""
        return f"<Selection: {self.site} of '{self.pattern}'{without}, of {self.capture!r}>"

    def magnitudes(
        self,
        stats: Sequence[MagnitudeStat],
        *,
        reduce_dim: Literal[-1, -2, "auto"] | None = "auto",
        reduce: Reduce | None = None,
        positions: Positions = "all",
    ) -> dict[MagnitudeStat, Series]:
        """Compute several statistics of `magnitude` in the time of little more than one."""
        asked = {
            stat: self._asked("magnitude", reduce, positions, {"stat": stat, "reduce_dim": reduce_dim})
            for stat in stats
        }
        # The queries differ in the statistic only, so that any of them gives the same view.
        layers, first, _ = asked[stats[0]]
        found = {layer: magnitudes(self._view(layer, first), stats, reduce_dim) for layer in layers}
        return {
            stat: self._series(query, {layer: result[stat] for layer, result in found.items()})
            for stat, (_, query, _) in asked.items()
        }

    def channel_bands(self, *, signed: bool = False) -> dict[str, dict[BandStat, NDArray[np.float64]]]:
        """Return the numbers behind `channel_band`, for plots: layer → statistic → a number for each channel, [C]."""
        self._check_measured(METRICS["channel_band"], self.layers, "all", {})
        return {layer: channel_bands(self.capture.sites[layer, self.site], signed=signed) for layer in self.layers}

    @property
    def layers(self) -> list[str]:
        """The names that the pattern finds and the capture holds, in model order.

        Raises:
            AnomalyError: the pattern finds nothing in the model.
            InfraError: the weight of one of them is refused.
            NotMeasuredError: the model has such layers, the capture doesn't.
        """
        return self._layers()

    def _layers(self, needs: frozenset[Statistic] = frozenset()) -> list[str]:
        if self.site == LOGITS:
            return self._logits(needs)
        found = self._found(needs)
        if self.site == "weight":
            _check_readable(found, self.capture.refused, "the weight of {} can't be read")
        measured = [layer for layer in found if (layer, self.site) in self.capture.sites]
        if self.site in CACHE_SITES:
            return self._caching(found, measured)
        # A layer without a weight has no numbers there, which isn't a gap in the capture.
        looked_at = set(measured) if self.site != "weight" else self.capture.weights_looked_at
        if not looked_at.issuperset(found):
            raise NotMeasuredError(f"the capture holds the {self.site} of {len(measured)} of the {len(found)} layers")
        if not measured:
            raise no_weight(found, self.pattern)
        return measured

    def _caching(self, found: list[str], measured: list[str]) -> list[str]:
        """Return those of the layers that were found to put something into the KV cache at this site."""
        if not {*measured, *self.capture.uncached}.issuperset(found):
            raise NotMeasuredError(f"the capture holds the {self.site} of {len(measured)} of the {len(found)} layers")
        if not measured:
            why = f"{found[0]} {self.capture.uncached[found[0]]}"
            raise AnomalyError(f"no layer that '{self.pattern}' matches has a {self.site}: {why}")
        return measured

    def _found(self, needs: frozenset[Statistic] = frozenset()) -> list[str]:
        names = self.capture.names.at(self.site, needs)
        found = self.capture.names.find(self.pattern, self.site, self.exclude, needs)
        if self.site == "weight" or not self.capture.experts:
            return found
        # Not all packed experts can be run alone, nor those of a reference that was recorded.
        experts = self.capture.names.experts
        run = [name for name in found if name not in experts or (name, self.site) in self.capture.sites]
        asked = [r for r in self.capture.plan if r.site == self.site and at_experts(r.site, r.statistics)]
        if not run and any(set(found) <= set(match_layers(names, r.pattern, r.exclude)) for r in asked):
            raise AnomalyError(
                f"the {len(found)} layers of packed experts that '{self.pattern}' matches can't be run by themselves "
                "here (a recorded reference, codes, or experts as Llama 4 has them): use weight_sqnr"
            )
        return run or found

    def _stored(self, needs: frozenset[Statistic]) -> list[str]:
        """Return those of the layers that are quantized in the checkpoint's files.

        Raises:
            AnomalyError: there are none, or some of the files' have no place in the model where they could be compared.
            InfraError: one of them can't be compared.
            NotMeasuredError: the capture was made without the files.
        """
        found = self._found()
        if not self.capture.covers([Request(self.pattern, self.site, self.exclude, needs)]):
            raise NotMeasuredError("the capture holds nothing of what is in the checkpoint's files")
        if unmatched := self.capture.provenance.unmatched:
            more = f" (and {len(unmatched) - 1} more)" if unmatched[1:] else ""
            raise AnomalyError(
                f"the files hold {unmatched[0]}{more} quantized, and the loaded model has no weight of its own for it, "
                "so that what the loader made of it can't be told: use weight_sqnr against model.reference"
            )
        _check_readable(found, self.capture.uncompared, "what the loader made of {} can't be told")
        layers = [x for x in found if (n := self.capture.sites.get((x, self.site))) and "stored" in n]
        if not layers:
            raise AnomalyError(f"none of the {len(found)} layers that '{self.pattern}' matches is stored quantized")
        return layers

    def _logits(self, needs: frozenset[Statistic]) -> list[str]:
        asked = [GENERATION] if GENERATED in needs else [LOGITS] if needs else [LOGITS, GENERATION]
        found = [name for name in asked if (name, LOGITS) in self.capture.sites]
        if not found:
            what = "answers" if GENERATED in needs else "logits"
            raise NotMeasuredError(f"the capture holds nothing of the model's {what}")
        return found[:1]

    def series(
        self, metric: str, reduce: Reduce | None = None, positions: Positions | None = None, **parameters: Any
    ) -> Series:
        """Compute a metric by name, as a suite does.

        Raises:
            AnomalyError: no layer, a hook that never fired, no tokens, or a metric that the site can't have.
            InfraError: it needs a weight that is refused.
            SuiteError: an argument is none that the metric takes.
        """
        layers, query, left_out = self._asked(metric, reduce, positions, parameters)
        definition = METRICS[metric]
        views = {layer: self._view(layer, query) for layer in layers}
        results: dict[str, Any]
        if definition.per == "model":
            results = {f"whole of {len(layers)} layers": definition.compute(list(views.values()), **parameters)}
        else:
            results = {layer: definition.compute(view, **parameters) for layer, view in views.items()}
        if definition.per == "expert":
            results = {f"{layer}[{e}]": of for layer, each in results.items() for e, of in enumerate(each.T)}
        return replace(self._series(query, results), nothing=self._nothing(layers), left_out=left_out)

    def _asked(
        self, metric: str, reduce: Reduce | None, positions: Positions | None, parameters: Parameters
    ) -> tuple[list[str], Query, list[str]]:
        """Check that the capture can answer; return the layers, what is asked for, and which layers are left out."""
        definition = METRICS[metric]
        where = positions_of(metric, self.site, positions)
        check_arguments(definition, self.site, where, reduce, parameters)
        needs = definition.needs(self.site, where, parameters)
        layers = self._stored(needs) if STORED in needs else self._layers(needs)
        if definition.against and self.site == "weight" and self.capture.reference is not None:
            _check_readable(layers, self.capture.reference.refused, "the weight of {} can't be compared")
        odd = self._unfit(layers, needs) if is_kind(self.pattern) and not self.pattern.endswith("blocks") else []
        # A portable name is no choice of the user's: what of it can't have a number is left out, and told.
        layers = [layer for layer in layers if layer not in odd] or layers
        self._check_measured(definition, layers, where, parameters)
        query = query_of(metric, self.site, self.pattern, self.exclude, parameters, where, reduce)
        # float32 is counted by its upper half: what follows from these counts is an estimate, and says so.
        wide = not all(self.capture.sites[layer, self.site].counted_exactly for layer in layers)
        estimated = wide and not needs.isdisjoint({COUNTS, SIGNED_COUNTS})
        read = self.site == "weight" and self.capture.provenance.weights_read
        return layers, replace(query, estimated=estimated, from_files=read), odd

    def unfit(self, metric: str, positions: Positions | None = None, **parameters: Any) -> list[str]:
        """Return the layers of which a metric can have no number: the model never calls them, or sees no tokens there.

        Raises:
            QsaError: as `layers`.
        """
        needs = METRICS[metric].needs(self.site, positions_of(metric, self.site, positions), parameters)
        return self._unfit(self._layers(needs), needs)

    def _unfit(self, layers: Sequence[str], needs: frozenset[Statistic]) -> list[str]:
        if self.site in ("weight", LOGITS):
            return []
        sites = {layer: self.capture.sites[layer, self.site] for layer in layers}
        tokens = need_tokens(needs)
        return [name for name, own in sites.items() if not own.populations or (tokens and not own.token_axis)]

    def _view(self, layer: str, query: Query) -> View:
        numbers, where = self.capture.sites[layer, self.site], query.positions or "all"
        reference, metric = self.capture.reference, METRICS[query.metric]
        needs = metric.needs(self.site, where, query.parameters)
        if reference is None or not metric.against:
            return View(numbers, self.site, where, self.capture.sinks, layer).within(needs)
        theirs, sampled = reference.sites.get((layer, self.site)), reference.provenance.rows is not None
        return View(numbers, self.site, where, reference.sinks, layer, theirs, sampled).within(needs)

    def _series(self, query: Query, results: Mapping[str, Any]) -> Series:
        """Fold what a metric returned for each layer: one number, or one for each population."""
        populations = {layer: result for layer, result in results.items() if isinstance(result, np.ndarray)}
        if populations and query.reduce is None:
            where = METRICS[query.metric].place
            raise SuiteError(f"{where}: {query.metric} returns a number for each population: say reduce=, of them all")
        # Without populations nothing is folded, so that any of them does.
        fold = AGGREGATIONS[query.reduce or "max"]
        estimates = {layer: result for layer, result in results.items() if isinstance(result, Estimate)}
        plain = {**results, **{layer: estimate.value for layer, estimate in estimates.items()}}
        values = {layer: float(fold(result) if layer in populations else result) for layer, result in plain.items()}
        bad = [layer for layer, value in values.items() if not sound(value, query.unit)]
        problems = {
            name: why_not_finite(self._view(name, query)) if (name, self.site) in self.capture.sites else
            "one of the layers holds NaN or Inf; the metric nonfinite says which" for name in bad
        }  # fmt: skip
        array = np.array(list(values.values()), dtype=np.float64)
        intervals = {layer: (of.low, of.high, of.count) for layer, of in estimates.items()}
        least = {layer: of.least for layer, of in estimates.items() if math.isfinite(of.least)}
        return Series(list(values), array, query, populations, problems, self.judge, intervals, least=least)

    def _nothing(self, layers: Sequence[str]) -> str:
        """Say that all layers hold nothing but zeros; empty where one doesn't."""
        if not all(self.capture.sites[name, self.site].only_zeros for name in layers):
            return ""
        more = f" and {counted(len(layers) - 1, 'other layer')}" if layers[1:] else ""
        return f"the {self.site} of {layers[0]}{more} holds nothing but zeros"

    def _check_measured(self, metric: Metric, layers: list[str], positions: str, parameters: Parameters) -> None:
        needs = metric.needs(self.site, positions, parameters)
        # Nothing passes vacuously: a site that no tensor reached has no number, and no bound holds of it.
        dead = [layer for layer in layers if not self.capture.sites[layer, self.site].populations]
        if odd := next((layer for layer in dead if f"{self.site} of {layer}" in self.capture.unfit), None):
            why = self.capture.unfit[f"{self.site} of {odd}"]
            raise AnomalyError(f"the {self.site} of {odd} can have no number: {why}; exclude it")
        if dead:
            raise never_fired(dead, self.site)
        for layer in layers:
            numbers = self.capture.sites[layer, self.site]
            if (metric.tokenwise and self.site == "weight") or (need_tokens(needs) and not numbers.token_axis):
                shape = "×".join(map(str, numbers.shape))
                raise AnomalyError(
                    f"{metric.name} needs a token axis, which the {self.site} of {layer} (shape {shape}) doesn't have; "
                    "elementwise metrics such as absmax, rms, kurtosis or quantile work there"
                )
            # Sinks are found at the outputs of blocks and belong to the whole capture, so a site need not have them.
            if not needs <= numbers.statistics | {SINKS, REFERENCE_SINKS}:
                missing = ", ".join(map(str, sorted(needs - numbers.statistics)))
                raise NotMeasuredError(f"the capture has no statistics '{missing}' of the {self.site} of {layer}")
        finder = self.capture.reference if metric.against and self.capture.reference else self.capture
        if needs_sinks(metric.name, positions) and not finder.sinks.searched:
            raise AnomalyError(NO_BLOCKS)


def needs_sinks(metric: str, positions: str | None) -> bool:
    """Say whether a metric counts sinks, or tokens by whether they are sinks."""
    return metric == "sink_tokens" or names_sinks(positions or "all")


def _check_readable(layers: Iterable[str], refused: Mapping[str, str], what: str) -> None:
    """Check that none of the layers is refused. `what`: what can't be said of one, {} in the place of its name.

    Raises:
        InfraError: one is.
    """
    found = [layer for layer in layers if layer in refused]
    if found:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise InfraError(f"{what.format(f'{found[0]}{more}')}: {refused[found[0]]}")


def _spot(view: View, population: int) -> str:
    """Name a population that holds NaN or Inf, and the first such token where tokens were kept."""
    sample = f"sample {view.numbers.sample[population]}"
    if "token_max" not in view.numbers:
        return sample
    return f"{sample} at position {np.flatnonzero(~np.isfinite(view.numbers.tokens_of(population)))[0]}"


def why_not_finite(view: View) -> str:
    """Say what stands in the way of a finite number at a site."""
    numbers = view.numbers
    if "stored" in numbers:
        return "the loader made NaN or Inf of what is finite in the file, or the file's weight holds them"
    if "moments" in numbers and (bad := int(numbers.moment("nonfinite").sum())):
        where = next((f", first in {_spot(view, int(p))}" for p in np.flatnonzero(numbers.moment("nonfinite"))), "")
        return f"{bad} elements are NaN or Inf{where}"
    if "token_max" not in numbers:
        return "its formula divides by zero, or there are too few elements"
    for population in range(numbers.populations):
        tokens = numbers.tokens_of(population)
        at = np.flatnonzero(~np.isfinite(tokens))
        where = f"sample {numbers.sample[population]}"
        if at.size:
            return f"NaN or Inf in {at.size} of {tokens.size} tokens of {where}, first at position {at[0]}"
        kept: NDArray[np.float32] = tokens[view.kept(population) & (tokens != PADDING)]
        if not kept.size:
            return f"no token of {where} counts under positions: {view.positions}"
        if not kept.max() > 0:
            return f"all values of {where} are zero"
    return "too few tokens, or the median is zero"

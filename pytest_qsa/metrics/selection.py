"""Selection: a site of some layers, and every metric as a method. This is the Python form of an assertion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..captures import (
    COUNTS,
    LOGITS,
    REFERENCE_SINKS,
    SIGNED_COUNTS,
    SINKS,
    STORED,
    BandStat,
    Request,
    Site,
    Statistic,
    channel_bands,
    match_layers,
    need_tokens,
    no_match,
)
from ..common import AnomalyError
from .activations import METRICS, AcrossChannels, MagnitudeStat, ServedDtype, SinkStat, magnitudes
from .fidelity import By, WeightBy
from .predictions import DeltaStat, KlStat
from .quantization import Granularity, Scheme
from .query import Positions, check_arguments, positions_of, query_of
from .registry import REDUCTIONS, Estimate, Metric, Reduce, View
from .series import Judge, Query, Series, sound
from .unsound import why_not_finite

if TYPE_CHECKING:
    from ..captures import Capture


class NotMeasuredError(AnomalyError):
    """The capture lacks the site or the statistic; a second pass can bring it."""


@dataclass(frozen=True)
class Selection:
    """The layers of a capture that a regex finds, at one site. Each metric returns a `Series`, in model order.

    All methods take `reduce` (how samples are folded: max, mean, sum, p95) where the metric has samples, and
    `positions` where it counts tokens. They raise `AnomalyError` where there is nothing to compute from.
    """

    capture: Capture
    pattern: str
    site: Site
    exclude: str | None = None
    judge: Judge | None = None

    def outlier_tokens(
        self, threshold: float = 64.0, *, reduce: Reduce | None = None, positions: Positions = "all"
    ) -> Series:
        """Tokens above threshold × the sample's median token, strictly (metrics.md; PrefixQuant)."""
        return self.series("outlier_tokens", reduce, positions, threshold=float(threshold))

    def outlier_ratio(self, *, reduce: Reduce | None = None, positions: Positions = "all") -> Series:
        """The largest token-wise maximum over their lower median."""
        return self.series("outlier_ratio", reduce, positions)

    def magnitude(
        self,
        stat: MagnitudeStat = "top1",
        *,
        reduce_dim: Literal[-1, -2, "auto"] | None = "auto",
        reduce: Reduce | None = None,
        positions: Positions = "all",
    ) -> Series:
        """An order statistic of the token-wise (−1) or channel-wise (−2) maxima, or of the elements (None)."""
        return self.series("magnitude", reduce, positions, stat=stat, reduce_dim=reduce_dim)

    def magnitudes(
        self,
        stats: Sequence[MagnitudeStat],
        *,
        reduce_dim: Literal[-1, -2, "auto"] | None = "auto",
        reduce: Reduce | None = None,
        positions: Positions = "all",
    ) -> dict[MagnitudeStat, Series]:
        """Several statistics of `magnitude` for little more than the price of one."""
        asked = {
            stat: self._asked("magnitude", reduce, positions, {"stat": stat, "reduce_dim": reduce_dim})[1]
            for stat in stats
        }
        first = asked[stats[0]]
        found = {layer: magnitudes(self._view(layer, first), stats, reduce_dim) for layer in self.layers}
        return {
            stat: self._series(query, {layer: result[stat] for layer, result in found.items()})
            for stat, query in asked.items()
        }

    def sink_tokens(self, stat: SinkStat = "count", *, reduce: Reduce | None = None) -> Series:
        """The attention sinks of a sample: their count, channel, or multiple of the median."""
        return self.series("sink_tokens", reduce, "all", stat=stat)

    def massive_activations(self, abs: float = 100.0, ratio: float = 1000.0, *, reduce: Reduce | None = None) -> Series:
        """Elements with |x| > abs and |x| ≥ ratio × the sample's median |x|."""
        return self.series("massive_activations", reduce, "all", abs=float(abs), ratio=float(ratio))

    def absmax(self, *, positions: Positions = "all") -> Series:
        """The largest |x|."""
        return self.series("absmax", None, positions)

    def rms(self) -> Series:
        """The root mean square over all elements."""
        return self.series("rms")

    def mean(self) -> Series:
        """The mean over all elements."""
        return self.series("mean")

    def std(self) -> Series:
        """The standard deviation over all elements."""
        return self.series("std")

    def kurtosis(self, *, reduce: Reduce | None = None) -> Series:
        """Pearson's kurtosis of a sample's elements; 3 for a Gaussian."""
        return self.series("kurtosis", reduce)

    def crest_factor(self) -> Series:
        """Absmax / rms."""
        return self.series("crest_factor")

    def quantile(self, q: float = 0.999, *, signed: bool = False) -> Series:
        """A quantile of |x|, or of x; exact for 16-bit tensors."""
        return self.series("quantile", q=float(q), signed=signed)

    def channel_band(self, stat: BandStat = "p99", *, across: AcrossChannels = "max", signed: bool = False) -> Series:
        """A percentile or an extreme of |x| (of x) in each channel, folded over the channels."""
        return self.series("channel_band", stat=stat, across=across, signed=signed)

    def channel_bands(self, *, signed: bool = False) -> dict[str, dict[BandStat, NDArray[np.float64]]]:
        """The numbers behind `channel_band`, for plots: layer → statistic → one number for each channel, [C]."""
        self._check_measured(METRICS["channel_band"], self.layers, "all", {})
        return {layer: channel_bands(self.capture.sites[layer, self.site], signed=signed) for layer in self.layers}

    def quantization_sqnr(
        self, scheme: Scheme = "int8", *, by: Granularity = "tensor", group_size: int = 128
    ) -> Series:
        """What the tensor would keep of itself in dB, rounded to a grid and back."""
        return self.series("quantization_sqnr", scheme=scheme, by=by, group_size=group_size)

    def int8_outlier_features(
        self, abs: float = 6.0, *, layer_share: float = 0.25, position_share: float = 0.06
    ) -> Series:
        """Channels with |x| ≥ abs in that share of the layers and of all their tokens: one number (LLM.int8)."""
        return self.series(
            "int8_outlier_features",
            abs=float(abs),
            layer_share=float(layer_share),
            position_share=float(position_share),
        )

    def expert_tokens(self, *, reduce: Reduce | None = None) -> Series:
        """Tokens that the router sends to each expert of packed experts; a number for `layer[0]`, `layer[1]`, …."""
        return self.series("expert_tokens", reduce)

    def sqnr(self, by: By = "tensor", *, positions: Positions | None = None) -> Series:
        """Signal over error against the reference in dB: of the tensor, or of its worst token or channel."""
        return self.series("sqnr", None, positions, by=by)

    def nmse(self, *, positions: Positions | None = None) -> Series:
        """Σ(x − x̂)² / Σx², x the reference's."""
        return self.series("nmse", None, positions)

    def relative_l2(self, *, positions: Positions | None = None) -> Series:
        """‖x − x̂‖ / ‖x‖, x the reference's."""
        return self.series("relative_l2", None, positions)

    def cosine(self, *, positions: Positions | None = None) -> Series:
        """The cosine between x and x̂; blind to scale."""
        return self.series("cosine", None, positions)

    def max_abs_diff(self, *, positions: Positions | None = None) -> Series:
        """The largest |x − x̂|."""
        return self.series("max_abs_diff", None, positions)

    def local_sqnr(self, rows: int = 32, *, positions: Positions | None = None) -> Series:
        """The layer's own SQNR: its output on the reference's input, of some drawn tokens a sample."""
        return self.series("local_sqnr", None, positions, rows=rows)

    def weight_sqnr(self, by: WeightBy = "tensor") -> Series:
        """The SQNR of the dequantized weight against the reference's."""
        return self.series("weight_sqnr", by=by)

    def loaded_weights(self) -> Series:
        """How far the loaded model's weights are from what the checkpoint's own files hold, relative."""
        return self.series("loaded_weights")

    def new_outliers(
        self, threshold: float = 64.0, *, reduce: Reduce | None = None, positions: Positions | None = None
    ) -> Series:
        """Outlier tokens that the reference doesn't have."""
        return self.series("new_outliers", reduce, positions, threshold=float(threshold))

    def lost_outliers(
        self, threshold: float = 64.0, *, reduce: Reduce | None = None, positions: Positions | None = None
    ) -> Series:
        """Outlier tokens that only the reference has."""
        return self.series("lost_outliers", reduce, positions, threshold=float(threshold))

    def kl_divergence(self, stat: KlStat = "mean") -> Series:
        """How far the predictions are from the reference's, in nats; of `logits()`."""
        return self.series("kl_divergence", stat=stat)

    def same_top(self) -> Series:
        """The share of positions where both models find the same token likeliest; of `logits()`."""
        return self.series("same_top")

    def delta_p(self, stat: DeltaStat = "rms") -> Series:
        """By how much the probability of the token that came differs from the reference's; of `logits()`."""
        return self.series("delta_p", stat=stat)

    def perplexity(self) -> Series:
        """The perplexity over all samples; of `logits()`."""
        return self.series("perplexity")

    def ln_ppl_ratio(self) -> Series:
        """The logarithm of the perplexity over the reference's; of `logits()`."""
        return self.series("ln_ppl_ratio")

    def zero_fraction(self) -> Series:
        """The share of exact zeros."""
        return self.series("zero_fraction")

    def nonfinite(self, *, reduce: Reduce | None = None) -> Series:
        """The number of NaN and Inf."""
        return self.series("nonfinite", reduce)

    def headroom(self, dtype: ServedDtype = "float16") -> Series:
        """Absmax / the largest finite value of the dtype that the model will be served in."""
        return self.series("headroom", dtype=dtype)

    @property
    def layers(self) -> list[str]:
        """The names that the pattern finds and the capture holds, in model order.

        Raises:
            AnomalyError: the pattern finds nothing in the model.
            NotMeasuredError: the model has such layers, the capture doesn't.
        """
        if self.site == LOGITS:
            return self._logits()
        found = match_layers(self.capture.modules, self.pattern, self.exclude)
        if not found:
            raise no_match(self.capture.modules, self.pattern, self.exclude)
        measured = [layer for layer in found if (layer, self.site) in self.capture.sites]
        looked_at = set(measured) if self.site != "weight" else self.capture.weights_looked_at
        if not looked_at.issuperset(found):
            raise NotMeasuredError(f"the capture holds the {self.site} of {len(measured)} of the {len(found)} layers")
        if not measured:
            raise AnomalyError(f"none of the {len(found)} layers that '{self.pattern}' matches owns a weight")
        return measured

    def _stored(self, needs: frozenset[Statistic]) -> list[str]:
        """Return those of the layers that the checkpoint's files hold quantized.

        Raises:
            AnomalyError: there are none, or some of the files' have no place in the model where they could be compared.
            NotMeasuredError: the capture was made without the files.
        """
        found = match_layers(self.capture.modules, self.pattern, self.exclude)
        if not found:
            raise no_match(self.capture.modules, self.pattern, self.exclude)
        if not self.capture.covers([Request(self.pattern, self.site, self.exclude, needs)]):
            raise NotMeasuredError("the capture holds nothing of what is in the checkpoint's files")
        if unmatched := self.capture.provenance.unmatched:
            more = f" (and {len(unmatched) - 1} more)" if unmatched[1:] else ""
            raise AnomalyError(
                f"the files hold {unmatched[0]}{more} quantized, and the loaded model has no weight of its own for it, "
                "so that what the loader made of it can't be told: use weight_sqnr against model.reference"
            )
        layers = [x for x in found if (n := self.capture.sites.get((x, self.site))) and n.stored is not None]
        if not layers:
            raise AnomalyError(f"none of the {len(found)} layers that '{self.pattern}' matches is stored quantized")
        return layers

    def _logits(self) -> list[str]:
        if (LOGITS, LOGITS) not in self.capture.sites:
            raise NotMeasuredError("the capture holds nothing of the model's logits")
        return [LOGITS]

    def series(
        self, metric: str, reduce: Reduce | None = None, positions: Positions | None = None, **parameters: Any
    ) -> Series:
        """Compute a metric by name, as a suite does.

        Raises:
            AnomalyError: no layer, a hook that never fired, no tokens, or a metric that the site can't have.
            SuiteError: an argument is none that the metric takes.
        """
        layers, query = self._asked(metric, reduce, positions, parameters)
        definition = METRICS[metric]
        views = {layer: self._view(layer, query) for layer in layers}
        if definition.per == "model":
            whole = definition.compute(list(views.values()), **parameters)
            return self._series(query, {f"whole of {len(layers)} layers": whole})
        results = {layer: definition.compute(view, **parameters) for layer, view in views.items()}
        if definition.per == "expert":
            results = {f"{layer}[{e}]": of for layer, each in results.items() for e, of in enumerate(each.T)}
        return self._series(query, results)

    def _asked(
        self, metric: str, reduce: Reduce | None, positions: Positions | None, parameters: Mapping[str, Any]
    ) -> tuple[list[str], Query]:
        """Check that the capture can answer; return the layers, and what is asked for."""
        definition = METRICS[metric]
        where = positions_of(metric, self.site, positions)
        check_arguments(definition, self.site, where, reduce, parameters)
        needs = definition.needs(self.site, where, parameters)
        layers = self._stored(needs) if STORED in needs else self.layers
        self._check_measured(definition, layers, where, parameters)
        query = query_of(metric, self.site, self.pattern, self.exclude, parameters, where, reduce)
        wide = not all(self.capture.sites[layer, self.site].counted_exactly for layer in layers)
        return layers, replace(query, estimated=wide and not needs.isdisjoint({COUNTS, SIGNED_COUNTS}))

    def _view(self, layer: str, query: Query) -> View:
        numbers, where = self.capture.sites[layer, self.site], query.positions or "all"
        reference = self.capture.reference
        if reference is None or not METRICS[query.metric].against:
            return View(numbers, self.site, where, self.capture.sinks, layer)
        theirs, sampled = reference.sites.get((layer, self.site)), reference.provenance.rows is not None
        return View(numbers, self.site, where, reference.sinks, layer, theirs, sampled)

    def _series(self, query: Query, results: Mapping[str, Any]) -> Series:
        """Fold what a metric returned for each layer: one number, or one for each population."""
        populations = {layer: result for layer, result in results.items() if isinstance(result, np.ndarray)}
        fold = REDUCTIONS[query.reduce or "max"]
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
        return Series(list(values), array, query, populations, problems, self.judge, intervals)

    def _check_measured(self, metric: Metric, layers: list[str], positions: str, parameters: Mapping[str, Any]) -> None:
        needs = metric.needs(self.site, positions, parameters)
        dead = [layer for layer in layers if not self.capture.sites[layer, self.site].populations]
        if dead:
            more = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
            raise AnomalyError(
                f"the hook at {dead[0]}{more} never fired with a floating-point tensor: the model doesn't call this "
                f"layer in its forward pass, or its {self.site} is token ids; exclude it, or look at what replaced it"
            )
        for layer in layers:
            numbers = self.capture.sites[layer, self.site]
            if (metric.tokenwise and self.site == "weight") or (need_tokens(needs) and not numbers.token_axis):
                shape = "×".join(map(str, numbers.shape))
                raise AnomalyError(
                    f"{metric.name} needs a token axis, which the {self.site} of {layer} (shape {shape}) doesn't have; "
                    "elementwise metrics such as absmax, rms, kurtosis or quantile work there"
                )
            if not needs <= numbers.statistics | {SINKS, REFERENCE_SINKS}:
                missing = ", ".join(map(str, sorted(needs - numbers.statistics)))
                raise NotMeasuredError(f"the capture has no statistics '{missing}' of the {self.site} of {layer}")
        finder = self.capture.reference if metric.against and self.capture.reference else self.capture
        if (metric.name == "sink_tokens" or positions in ("sink", "no_sink")) and not finder.sinks.searched:
            raise AnomalyError(
                "no outputs of blocks were measured, in which sinks could be found, as in a model without a list of "
                "blocks; say positions: all or {skip_first: n}"
            )

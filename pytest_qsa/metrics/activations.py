"""The metrics of one model's tensors: the arrays of a site → a number per population, or one of all. numpy only.

A metric is a plain function. Its keyword parameters, with their types and defaults, are its parameters in a suite; the
decorator adds what the planner and the baselines must know of it. A changed definition gets a new version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

from ..captures import (
    CACHE_SCALE,
    CACHE_SITES,
    CHANNEL_COUNTS,
    CHANNELS,
    COUNTS,
    ELEMENTS,
    EXPERTS,
    MOMENTS,
    PADDING,
    SIGNED_COUNTS,
    TOKENS,
    TOP_NAMES,
    UNKNOWN,
    BandStat,
    FeatureCounts,
    Massive,
    PositionRange,
    QuantizationPowers,
    Site,
    SiteNumbers,
    Statistic,
    channel_bands,
    counted_quantile,
    lower_median,
    order_statistics,
)
from ..common import AnomalyError, SuiteError
from .fidelity import LARGEST_CODE, Granularity, Scheme, counted_beyond, counted_powers, decibels
from .registry import DTYPE_MAX, NOT_NEGATIVE, SHARE, Parameters, Values, metric
from .view import View

MagnitudeStat = Literal["top1", "top2", "top3", "median", "min", "min2", "min3"]
AcrossChannels = Literal["max", "median", "min", "mean"]
GroupSize = Annotated[int, Ge(2)]
SinkStat = Literal["count", "channel", "ratio"]
OF_CACHE = ("token_head", "checkpoint")
"""The granularities that only what enters a KV cache has."""
ServedDtype = Literal["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
Share = Annotated[float, Ge(0), Le(1)]

ACROSS: Mapping[str, Callable[[Values], float]] = {
    "max": lambda values: float(np.max(values)),
    "median": lower_median,
    "min": lambda values: float(np.min(values)),
    "mean": lambda values: float(np.mean(values)),
}


@metric(TOKENS, reduce="max", unit="tokens", tokenwise=True, span=NOT_NEGATIVE)
def outlier_tokens(view: View, *, threshold: float = 64.0) -> Values:
    """Count the tokens whose maximum is above threshold × the lower median of the sample (arXiv 2410.05265)."""
    return np.array([_above(maxima, threshold) for maxima in view.token_maxima()], dtype=np.float64)


def _above(maxima: NDArray[np.float32], threshold: float) -> float:
    """Compare ratios in float32, as quant-smooth-ana does, so that a token on the threshold falls on the same side."""
    if not _countable(maxima):
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = maxima / np.float32(lower_median(maxima))
    return float(np.count_nonzero(ratios > np.float32(threshold)))


@metric(TOKENS, reduce="max", unit="× median", tokenwise=True, span=NOT_NEGATIVE)
def outlier_ratio(view: View) -> Values:
    """Divide the largest token-wise maximum of a sample by their lower median."""
    ratios = []
    for maxima in view.token_maxima():
        median = lower_median(maxima) if _countable(maxima) else 0.0
        ratios.append(float(maxima.max()) / median if median > 0 else float("nan"))
    return np.array(ratios, dtype=np.float64)


def _magnitude_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    reduce_dim = _reduce_dim(site, parameters["reduce_dim"])
    return frozenset({{-1: TOKENS, -2: CHANNELS, None: ELEMENTS}[reduce_dim]})


def _reduce_dim(site: Site, reduce_dim: int | str | None) -> int | None:
    if reduce_dim == "auto":
        return -2 if site == "weight" else -1
    return reduce_dim  # type: ignore[return-value]


@metric(_magnitude_needs, reduce="mean", positional=True, span=NOT_NEGATIVE, sized=True)
def magnitude(
    view: View, *, stat: MagnitudeStat = "top1", reduce_dim: Literal[-1, -2, "auto"] | None = "auto"
) -> Values:
    """Take an order statistic of the maxima over channels (−1, one a token), over tokens (−2), or of |x| (null).

    The seed's and PrefixQuant's plots. `auto` is −1 for activations and, as in the seed, −2 for weights [out, in].
    """
    return magnitudes(view, [stat], reduce_dim)[stat]


def magnitudes(
    view: View, stats: Sequence[MagnitudeStat], reduce_dim: Literal[-1, -2, "auto"] | None = "auto"
) -> dict[MagnitudeStat, Values]:
    """Take several order statistics, as `magnitude` does each, in one pass over the numbers: name → [P]."""
    dim = _reduce_dim(view.site, reduce_dim)
    if dim == -1:
        rows = [order_statistics(maxima, stats) for maxima in view.token_maxima()]
        return {stat: np.array([row[stat] for row in rows], dtype=np.float64) for stat in stats}
    # Over tokens or elements the pass itself has taken the order statistics, because the elements are gone
    # after it.
    table = view.numbers.channel_top if dim == -2 else view.numbers.element_top
    return {stat: table[:, TOP_NAMES.index(stat)].astype(np.float64) for stat in stats}


@metric(TOKENS, reduce="max", tokenwise=True)
def sink_tokens(view: View, *, stat: SinkStat = "count") -> Values:
    """Describe the sinks of a sample at this layer: how many stand out here, the channel, the multiple of the median.

    Without a sink in the sample the count and the ratio are 0 and the channel is −1 (arXiv 2402.17762, 2508.04257).
    """
    rows = []
    for population in range(view.numbers.populations):
        maxima = view.numbers.tokens_of(population)
        rows.append(_sink_row(view, population, maxima, lower_median(maxima[maxima != PADDING])))
    return np.array([row[("count", "channel", "ratio").index(stat)] for row in rows], dtype=np.float64)


def _sink_row(view: View, population: int, maxima: NDArray[np.float32], median: float) -> tuple[float, float, float]:
    sinks = view.sinks.mask(int(view.numbers.sample[population]), len(maxima), view.layer)
    span = PositionRange.parse(view.positions)
    at = np.flatnonzero(sinks & span.among(maxima != PADDING) if span else sinks)
    if not at.size:
        return 0.0, -1.0, 0.0
    if not _countable(maxima):
        return float("nan"), float("nan"), float("nan")
    ratios = maxima[at] / np.float32(median)
    # The ratio by which `find_sinks` finds them.
    count = float(np.count_nonzero(ratios > 64))
    largest = at[int(np.argmax(ratios))]
    # The pass keeps the channels of the K largest tokens only, so that a sink may have none.
    where = np.flatnonzero(view.numbers.peaks[population] == largest)
    channel = float(view.numbers.peak_channels[population, where[0]]) if where.size else -1.0
    return count, channel, float(ratios.max())


def _massive_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    return frozenset({Massive(parameters["abs"], parameters["ratio"])})


@metric(_massive_needs, reduce="max", unit="elements", span=NOT_NEGATIVE)
def massive_activations(view: View, *, abs: float = 100.0, ratio: float = 1000.0) -> Values:
    """Count the elements with |x| > abs and |x| ≥ ratio × the sample's median |x| (Sun et al., arXiv 2402.17762)."""
    counts = view.numbers.arrays[Massive(abs, ratio).key]
    return np.where(counts == UNKNOWN, np.nan, counts.astype(np.float64))


def _absmax_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    # Moments are of all tokens: which of them count can be chosen among the maxima only.
    return frozenset({MOMENTS if positions == "all" else TOKENS})


@metric(_absmax_needs, reduce=None, positional=True, span=NOT_NEGATIVE, sized=True)
def absmax(view: View) -> float:
    """Take the largest |x|."""
    if view.positions == "all":
        return float(np.max(view.numbers.moment("absmax")))
    maxima = np.concatenate(list(view.token_maxima()))
    return float(maxima.max()) if maxima.size else float("nan")


@metric(MOMENTS, reduce=None, span=NOT_NEGATIVE, sized=True)
def rms(view: View) -> float:
    """Take the root of the mean square over all elements."""
    count, mean, m2 = pooled_moments(view.numbers)
    return float(np.sqrt(mean * mean + m2 / count))


@metric(MOMENTS, reduce=None, sized=True)
def mean(view: View) -> float:
    """Take the mean over all elements."""
    return pooled_moments(view.numbers)[1]


@metric(MOMENTS, reduce=None, span=NOT_NEGATIVE, sized=True)
def std(view: View) -> float:
    """Take the standard deviation over all elements, of the population (divided by n)."""
    count, _, m2 = pooled_moments(view.numbers)
    return float(np.sqrt(m2 / count))


@metric(MOMENTS, reduce="mean", span=NOT_NEGATIVE)
def kurtosis(view: View) -> Values:
    """Take Pearson's kurtosis E[(x−μ)⁴]/σ⁴ of a sample's elements; a Gaussian has 3."""
    count, m2, m4 = (view.numbers.moment(name) for name in ("n", "m2", "m4"))
    with np.errstate(divide="ignore", invalid="ignore"):
        return count * m4 / (m2 * m2)


@metric(MOMENTS, reduce=None, unit="× rms", span=NOT_NEGATIVE)
def crest_factor(view: View) -> float:
    """Divide the largest |x| by the root mean square."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(absmax(view)) / rms(view))


def _quantile_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    return frozenset({SIGNED_COUNTS if parameters["signed"] else COUNTS})


@metric(_quantile_needs, reduce=None, sized=True)
def quantile(view: View, *, q: Share = 0.999, signed: bool = False) -> float:
    """Take the q-quantile of |x| (of x if signed), interpolated linearly as numpy does.

    Exact for 16-bit tensors; for float32 within 2⁻⁸ of the value, and exact for the largest |x|.
    """
    if not 0 <= q <= 1:
        raise SuiteError(f"quantile: q is between 0 and 1, not {q:g}", "q")
    return counted_quantile(view.numbers, q, signed=signed)


@metric(CHANNEL_COUNTS, reduce=None, sized=True)
def channel_band(view: View, *, stat: BandStat = "p99", across: AcrossChannels = "max", signed: bool = False) -> float:
    """Take a percentile, or an extreme, of |x| (of x if signed) in each channel, then fold the channels by `across`.

    The extremes are exact, a percentile is within 1/16 of its value. Medians are lower ones.
    """
    band = channel_bands(view.numbers, signed=signed)[stat]
    if not np.isfinite(band).all():
        return float("nan")
    return ACROSS[across](band)


def _quantization_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    by, scheme = parameters["by"], parameters["scheme"]
    if by in OF_CACHE and site not in CACHE_SITES:
        raise SuiteError(f"by: {by} is of the KV cache, site: key or value; the {site} has none", "by")
    if by == "checkpoint" and scheme != "fp8_e4m3":
        raise SuiteError("by: checkpoint is the scale of a cache in FP8, scheme: fp8_e4m3", "by")
    if by == "checkpoint":
        return frozenset({COUNTS, CACHE_SCALE})
    return frozenset({COUNTS if by == "tensor" else _scaled(site, scheme, by, parameters["group_size"])})


def _scaled(site: Site, scheme: str, by: str, group_size: int) -> QuantizationPowers:
    """Return the statistic. A weight [out, in] has its output channels in its rows, where activations have tokens."""
    return QuantizationPowers(scheme, "token" if (site, by) == ("weight", "channel") else by, group_size)


@metric(_quantization_needs, reduce=None, unit="dB")
def quantization_sqnr(
    view: View, *, scheme: Scheme = "int8", by: Granularity = "tensor", group_size: GroupSize = 128
) -> float:
    """Take 10·log10(Σx² / Σ(x − x̂)²), where x̂ is x rounded to the grid of the scheme and back.

    One scale for the tensor over all samples, or, within a sample, one for each token, channel or group of neighbouring
    channels. A weight [out, in] has its channels in its rows, and its groups within them. What enters a KV cache has
    its channels by head, one head after the other, and may have a scale for each token and head (`token_head`), or that
    of its layer in the checkpoint (`checkpoint`), beyond which it is clipped; 1 where the files hold none, as in vLLM.
    """
    if by == "tensor":
        return decibels(*counted_powers(view.numbers, scheme))
    if by == "checkpoint":
        return decibels(*counted_powers(view.numbers, scheme, _cache_scale(view)))
    signal, error = view.numbers.arrays[_scaled(view.site, scheme, by, group_size).key].sum(axis=0).tolist()
    return decibels(signal, error)


def _cache_scale(view: View) -> float:
    if "cache_scale" not in view.numbers:
        raise AnomalyError("the scales of a KV cache are in a checkpoint's files, and this model has none here")
    scales = view.numbers.arrays["cache_scale"]
    if len(scales) > 1:  # the counts are of all heads together
        raise AnomalyError(
            f"the checkpoint has {len(scales)} scales, one for each head of {view.layer}, and one for the layer is "
            "needed here: gate kl_divergence with model.kv_cache: fp8_e4m3, which rounds each head by its own"
        )
    return float(scales[0])


@metric(
    {COUNTS, CACHE_SCALE}, reduce=None, unit="elements", sites=("key", "value", "latent", "rope_key"), span=NOT_NEGATIVE
)
def cache_clipping(view: View) -> float:
    """Count the elements beyond 448 × the layer's scale in the checkpoint, which a KV cache in FP8 (e4m3) clips.

    The scale is 1 where the files hold none, as in vLLM. Exact for 16-bit tensors.
    """
    return counted_beyond(view.numbers, LARGEST_CODE["fp8_e4m3"] * _cache_scale(view))


def _features_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    return frozenset({FeatureCounts(parameters["abs"])})


@metric(_features_needs, reduce=None, unit="channels", per="model", span=NOT_NEGATIVE)
def int8_outlier_features(
    views: Sequence[View], *, abs: float = 6.0, layer_share: Share = 0.25, position_share: Share = 0.06
) -> float:
    """Count the channels with |x| ≥ abs in layer_share of the layers and position_share of all their tokens (LLM.int8).

    Dettmers et al., arXiv 2208.07339. A layer counts where one of its tokens does. One number for all the
    layers that the pattern finds.
    """
    tables = [view.numbers.arrays[FeatureCounts(abs).key] for view in views]
    if len({len(table) for table in tables}) > 1:
        raise AnomalyError("int8_outlier_features follows channels through layers, and these have not the same number")
    counts = np.stack(tables)
    *channels, tokens, nonfinite = counts.T
    if nonfinite.any():
        return float("nan")
    hits = np.stack(channels, axis=1)
    in_layers = np.count_nonzero(hits, axis=0) / len(views) >= layer_share
    return float(np.count_nonzero(hits.any(axis=0) & in_layers & (hits.sum(axis=0) / tokens.sum() >= position_share)))


@metric(EXPERTS, reduce="sum", unit="tokens", per="expert", span=NOT_NEGATIVE)
def expert_tokens(view: View) -> Values:
    """Count the tokens that the router sends to each expert: [P, E]; one that chooses k experts counts k times."""
    if "experts" not in view.numbers:
        raise no_experts(view.site, view.layer)
    return view.numbers.experts.astype(np.float64)


def no_experts(site: Site, layer: str) -> AnomalyError:
    """Return the error for a site whose tokens are not sent to experts."""
    return AnomalyError(
        f"the {site} of {layer} has no experts that tokens are routed to: expert_tokens reads the indices that a "
        "module of packed experts gets, as in layers: mlp\\.experts$ with site: input"
    )


@metric(MOMENTS, reduce=None, span=SHARE)
def zero_fraction(view: View) -> float:
    """Take the share of exact zeros."""
    # A share of zeros among NaN or Inf would look sound.
    if view.numbers.moment("nonfinite").any():
        return float("nan")
    return float(view.numbers.moment("zeros").sum() / view.numbers.moment("n").sum())


@metric(MOMENTS, reduce="sum", unit="elements", span=NOT_NEGATIVE)
def nonfinite(view: View) -> Values:
    """Count NaN, +Inf and −Inf."""
    return view.numbers.moment("nonfinite").copy()


@metric(MOMENTS, reduce=None, span=NOT_NEGATIVE)
def headroom(view: View, *, dtype: ServedDtype = "float16") -> float:
    """Divide the largest |x| by the largest finite value of the dtype that will be served (float16: 65504)."""
    return float(absmax(view)) / DTYPE_MAX[dtype]


def pooled_moments(numbers: SiteNumbers) -> tuple[float, float, float]:
    """Merge the populations' n, mean and sum of squared deviations, in their order (Chan et al. 1979)."""
    count, mean_, m2 = 0.0, 0.0, 0.0
    rows = zip(
        numbers.moment("n").tolist(), numbers.moment("mean").tolist(), numbers.moment("m2").tolist(), strict=True
    )
    for n, population_mean, population_m2 in rows:
        # A first population without elements would make the division below 0 / 0.
        if not n:
            continue
        # A plain sum of squares minus the squared mean would cancel where the mean is large.
        total = count + n
        delta = population_mean - mean_
        mean_ += delta * n / total
        m2 += population_m2 + delta * delta * count * n / total
        count = total
    return count, mean_, m2


def _countable(maxima: NDArray[np.float32]) -> bool:
    """Say whether there are tokens, all finite, not all zero: a dead layer has no outliers to count."""
    return bool(maxima.size and np.isfinite(maxima).all() and maxima.max() > 0)

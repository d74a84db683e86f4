"""How close a model is to its reference, a loaded weight to its file, a tensor to its quantized self. numpy only.

By powers of signal and error: their sums are pooled over all tokens that count and divided once, for decibels are never
averaged. Simulated quantization is symmetric: the scale of a tensor (a token, a channel, a group) is its largest |x|
over the largest number of the grid; x is divided by it, rounded to the nearest number of the grid, halves to the even
one, and multiplied by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

from ..captures import (
    ERROR,
    ERROR_NAMES,
    EXTREME_NAMES,
    GAIN,
    GAIN_NAMES,
    NOT_COMPARED,
    PADDING,
    REFERENCE_TOKENS,
    STORED,
    TOKENS,
    ChannelError,
    LocalError,
    Site,
    SiteNumbers,
    Statistic,
    bin_values,
)
from ..common import AnomalyError
from .registry import NOT_NEGATIVE, TWO_SIDED_95, Estimate, Parameters, Values, metric
from .view import View

SIGNAL, NOISE, OWN, LARGEST = range(len(ERROR_NAMES))
By = Literal["tensor", "token", "channel"]
WeightBy = Literal["tensor", "channel"]
GainStat = Literal["room", "factor"]
Rows = Annotated[int, Ge(2), Le(4096)]


def _error_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    # `error` has sums for each token, from which no channel's can be had, so the pass sums these for the
    # positions.
    if parameters.get("by") == "channel" and site != "weight":
        return frozenset({ChannelError(positions)})
    return frozenset({ERROR})


@metric(_error_needs, reduce=None, unit="dB", positional=True, against=True)
def sqnr(view: View, *, by: By = "tensor") -> float | Estimate:
    """Take 10·log10(Σx² / Σ(x − x̂)²), x the reference's; of the tensor, or of its worst token or channel.

    torch.ao.ns `compute_sqnr`. Identical tensors have +∞. Over all samples at once; a token or channel of which the
    reference has only zeros is left out unless the model has something else there.
    """
    if by == "channel":
        return _worst(*_by_channel(view))
    tokens = compared(view)
    if by == "token":
        return _worst(tokens[:, SIGNAL], tokens[:, NOISE])
    return _estimated(view, tokens[:, SIGNAL], tokens[:, NOISE])


@metric(ERROR, reduce=None, positional=True, against=True, span=NOT_NEGATIVE)
def nmse(view: View) -> float | Estimate:
    """Take Σ(x − x̂)² / Σx², x the reference's (torch.ao, NNCF)."""
    tokens = compared(view)
    return _from_decibels(tokens, 10) if view.sampled else _ratio(tokens)


@metric(ERROR, reduce=None, positional=True, against=True, span=NOT_NEGATIVE)
def relative_l2(view: View) -> float | Estimate:
    """Take the root of `nmse`: ‖x − x̂‖ / ‖x‖."""
    tokens = compared(view)
    return _from_decibels(tokens, 20) if view.sampled else float(np.sqrt(_ratio(tokens)))


@metric(ERROR, reduce=None, positional=True, against=True, worst="lowest", span=(-1.0, 1.0))
def cosine(view: View) -> float | Estimate:
    """Take ⟨x, x̂⟩ / (‖x‖·‖x̂‖) of all elements (Polygraphy gates at 0.997); blind to scale."""
    signal, error, own = compared(view)[:, :LARGEST].T
    # ⟨x, x̂⟩ follows from the three powers, so that a pass keeps no fourth one.
    product = (signal + own - error) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(product.sum() / np.sqrt(signal.sum() * own.sum()))
        if not view.sampled or not np.isfinite(value):
            return value
        # The delta method, as in `_interval`.
        parts = product / product.sum() - signal / signal.sum() / 2 - own / own.sum() / 2
    half = TWO_SIDED_95 * abs(value) * _spread(parts)
    return Estimate(value, value - half, min(1.0, value + half), len(signal))


@metric(ERROR, reduce=None, positional=True, against=True, span=NOT_NEGATIVE)
def max_abs_diff(view: View) -> float:
    """Take the largest |x − x̂|; of the recorded tokens alone, where the reference is a file."""
    return float(compared(view)[:, LARGEST].max())


def _local_needs(site: Site, positions: str, parameters: Parameters) -> frozenset[Statistic]:
    return frozenset({LocalError(parameters["rows"])})


@metric(_local_needs, reduce=None, unit="dB", positional=True, against=True, sites=("output",))
def local_sqnr(view: View, *, rows: Rows = 32) -> Estimate:
    """Take the layer's own SQNR: its output on the reference's input against the reference's output.

    onnxruntime `qdq_err`. It is taken of `rows` tokens of each sample, drawn with a fixed seed.
    """
    powers = local_powers(view, rows)
    return _interval(_some(view, powers)[:, 0], powers[:, 1])


def local_powers(view: View, rows: int | None = None) -> NDArray[np.float64]:
    """Return Σx², Σ(x − x̂)², Σx̂² of the drawn tokens that count, [N, 3]; x̂ is the output for the reference's input.

    `rows`: how many tokens of each sample; None for the most that the site has.
    """
    return np.concatenate([local_tokens(view, population, rows)[1] for population in range(view.numbers.populations)])


def local_tokens(view: View, population: int, rows: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return which tokens of a population were drawn and count, [N], and their powers as of `local_powers`, [N, 3]."""
    numbers = view.numbers
    drawn_key, powers_key = LocalError(rows).keys if rows is not None else ("", "")
    at = numbers.arrays.get(drawn_key, numbers.local_rows)[population]
    # −1 fills up the rows of shorter samples.
    drawn = at >= 0
    drawn[drawn] = view.among(population, np.ones(numbers.lengths[population], dtype=bool))[at[drawn]]
    return at[drawn].astype(np.int64), numbers.arrays.get(powers_key, numbers.local)[population][drawn].astype(
        np.float64
    )


@metric(ERROR, reduce=None, unit="dB", against=True, sites=("weight",))
def weight_sqnr(view: View, *, by: WeightBy = "tensor") -> float:
    """Take the SQNR of the dequantized weight against the reference's; `channel`: its worst output channel, a row."""
    numbers = view.numbers
    powers = numbers.error.astype(np.float64)
    if by == "channel":
        return _worst(powers[:, SIGNAL], powers[:, NOISE])
    return decibels(*powers[:, :OWN].sum(axis=0).tolist())


LEAST_ROOM, MOST_ROOM = 0.05, 0.2
ROOM_SIGMAS, FEW_SIGMAS = 8.0, 4.0
"""The room of `weight_gain`, in standard deviations of what rounding does to a factor: of all n weights of a group, and
of the (Σw₀²)² / Σw₀⁴ that carry it. On SmolLM2 healthy groups of 4 bits reach 0.74 of it."""
UNEXPLAINED, CARRIED_SIGMAS = 2.0, 6.0
"""A group whose error is more than this multiple of what rounding explains has a room of these many standard errors of
its factor: of 1.7 million groups of SmolLM2 by GPTQ in 4 bits the farthest reaches 1.1 to 1.5 of it, without 12."""
FAINT = 0.01
"""The largest NMSE (20 dB) that counts as rounding where `weight_gain` leaves out groups below it."""


@metric(GAIN, reduce=None, against=True, sites=("weight",))
def weight_gain(view: View, *, stat: GainStat = "room") -> float:
    """Take the factor g = Σw·w₀ / Σw₀² of the scale group farthest from 1, w₀ the reference's weights of the group.

    `room`: how far g is from 1, beyond where round to nearest in the same scheme puts it, over max(0.05, 8·√(NMSE / n),
    4·√(NMSE·Σw₀⁴) / Σw₀²), at most 0.2, so that more than 1 is out; NMSE is the layer's, n the weights of the group. A
    group with more than twice the error that rounding explains, as GPTQ makes them, has at least 6 standard errors of
    g, 6·√((Σw² / Σw₀² − g²) / n). `factor`: g itself. Read from the files. Groups below the layer's rounding error
    don't count.
    """
    return float(view.numbers.arrays["gain"][GAIN_NAMES.index("share" if stat == "room" else "factor")])


def group_gain(numbers: SiteNumbers) -> str:
    """Say in words where the scale group of `weight_gain` lies, and its factor; empty where it wasn't measured."""
    found = numbers.arrays.get("gain")
    if found is None or not np.isfinite(found).all():
        return ""
    of = dict(zip(GAIN_NAMES, found.tolist(), strict=True))
    rows, columns = (_span(of, name) for name in ("row", "column"))
    place = ", ".join(each for each in (rows, columns) if each)
    return f"{place or 'its one scale group'}: × {of['factor']:.4g} of the reference's"


def _span(of: Mapping[str, float], name: str) -> str:
    first, count = int(of[name]), int(of[f"{name}s"])
    if first < 0:
        return "a group of columns out of order"
    return f"{name} {first}" if count == 1 else f"{name}s {first}–{first + count - 1}"


_of_outliers = metric(
    (TOKENS, REFERENCE_TOKENS),
    reduce="sum",
    unit="tokens",
    positional=True,
    tokenwise=True,
    against=True,
    span=NOT_NEGATIVE,
)


@_of_outliers
def new_outliers(view: View, *, threshold: float = 64.0) -> Values:
    """Count the tokens above threshold × the median of their sample here that are not in the reference."""
    return _outliers_of_one(view, view.of_reference(), threshold)


@_of_outliers
def lost_outliers(view: View, *, threshold: float = 64.0) -> Values:
    """Count the tokens above threshold × the median of their sample in the reference that are not here."""
    return _outliers_of_one(view.of_reference(), view, threshold)


def _outliers_of_one(one: View, other: View, threshold: float) -> Values:
    counts = []
    for population in range(one.numbers.populations):
        above = [view.ratios(population) > np.float32(threshold) for view in (one, other)]
        counts.append(float(np.count_nonzero(above[0] & ~above[1])))
    return np.array(counts, dtype=np.float64)


def compared(view: View) -> NDArray[np.float64]:
    """Return `ERROR_NAMES` of every token that counts and was compared, [N, 4].

    Raises:
        AnomalyError: there is none.
    """
    rows = [compared_tokens(view, population)[1] for population in range(view.numbers.populations)]
    return _some(view, np.concatenate(rows))


def compared_tokens(view: View, population: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return which tokens of a population count and were compared, [N], and their `ERROR_NAMES`, [N, 4]."""
    rows = view.numbers.error_of(population)
    counting = rows[:, SIGNAL] != PADDING
    if view.numbers.token_axis and view.site != "weight":
        counting = view.among(population, counting)
    at = np.flatnonzero(counting & (rows[:, SIGNAL] != NOT_COMPARED))
    return at, rows[at].astype(np.float64)


def _some(view: View, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    if not len(tokens):
        raise AnomalyError(f"no token at {view.layer} counts under positions: {view.positions}")
    return tokens


def _by_channel(view: View) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # The rows of a weight's `error` are its output channels.
    if view.site == "weight":
        tokens = compared(view)
        return tokens[:, SIGNAL], tokens[:, NOISE]
    signal, error = view.numbers.arrays[ChannelError(view.positions).key].sum(axis=0)
    return signal, error


def _estimated(view: View, signal: NDArray[np.float64], error: NDArray[np.float64]) -> float | Estimate:
    if view.sampled:
        return _interval(signal, error)
    return decibels(float(signal.sum()), float(error.sum()))


def _interval(signal: NDArray[np.float64], error: NDArray[np.float64]) -> Estimate:
    """Return the pooled SQNR of sampled tokens within its 95 % interval.

    The delta method on the logarithm of a ratio of sums (Cochran, Sampling Techniques, 6.4).
    """
    value = decibels(float(signal.sum()), float(error.sum()))
    if not np.isfinite(value):
        return Estimate(value, value, value, len(signal))
    half = 10 / np.log(10) * TWO_SIDED_95 * _spread(signal / signal.sum() - error / error.sum())
    return Estimate(value, value - half, value + half, len(signal))


def _spread(parts: NDArray[np.float64]) -> float:
    """Return the standard error of the logarithm of a quotient of sums. `parts`: the contribution of each token."""
    return float(np.sqrt(np.sum(parts**2) * len(parts) / max(1, len(parts) - 1)))


def _from_decibels(tokens: NDArray[np.float64], step: int) -> Estimate:
    """Convert an SQNR and its interval from dB to a quotient. `step`: 10 for powers, 20 for norms."""
    found = _interval(tokens[:, SIGNAL], tokens[:, NOISE])
    # More dB is a smaller error, so the two ends change places.
    value, high, low = (float(10 ** (-each / step)) for each in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.count)


def _worst(signal: NDArray[np.float64], error: NDArray[np.float64]) -> float:
    """Return the least SQNR of several, in dB: that of the least ratio, for the logarithm keeps the order."""
    counted = (signal != 0) | (error != 0)
    signal, error = signal[counted], error[counted]
    if not len(signal) or np.isnan(error).any() or not np.isfinite(signal).all():
        return float("nan")
    with np.errstate(divide="ignore", over="ignore"):
        at = int(np.argmin(signal / error))
    return decibels(float(signal[at]), float(error[at]))


def _ratio(tokens: NDArray[np.float64]) -> float:
    signal, error = tokens[:, :OWN].sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(error / signal)


def decibels(signal: float, error: float) -> float:
    """Return 10·log10(signal / error): +∞ for no error, −∞ for no signal, NaN for neither, and for NaN or Inf.

    A site where both models have only zeros shows nothing: NaN keeps a dead layer ANOMALOUS.
    """
    if np.isnan(signal) or np.isnan(error) or np.isinf(signal) or signal == error == 0:
        return float("nan")
    if error == 0:
        return float("inf")
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.float64(signal) / error))


ONE_FACTOR = 40.0
"""One factor explains a difference if it leaves this many dB less of it."""
ALIKE = 0.95
"""Above this cosine several factors near each other explain it: those of projections packed together, say."""


@metric(STORED, reduce=None, sites=("weight",), span=NOT_NEGATIVE)
def loaded_weights(view: View) -> float:
    """Take ‖w − w₀‖ / ‖w₀‖, w the loaded model's dequantized weight, w₀ the file's by its quantizer's own library."""
    signal, error, _, _ = view.numbers.stored.tolist()
    if not signal:
        return 0.0 if not error else math.inf
    return math.sqrt(error / signal)


def made_by_loader(numbers: SiteNumbers) -> str:
    """Say what the loader made of a weight: a factor where one explains the difference."""
    if "stored" not in numbers:
        return ""
    signal, error, product, own = numbers.stored.tolist()
    if not error:
        return "as in the file"
    if not own:
        return "the loader left zeros"
    gain = product / signal if signal else math.nan
    # What the least-squares fit w ≈ gain·w₀ leaves; rounding can make it negative.
    left = own - gain * product
    if math.isfinite(gain) and decibels(own, max(left, 0.0)) > ONE_FACTOR:
        return f"the loader made it × {gain:.4g}"
    cosine = product / math.sqrt(signal * own) if signal else math.nan
    if cosine > ALIKE:
        return f"the loader made it about × {gain:.4g}"
    return f"the loader made another of it, cosine {cosine:.2f}"


Scheme = Literal["int8", "int4", "fp8_e4m3"]
Granularity = Literal["tensor", "token", "channel", "group", "token_head", "checkpoint"]
LARGEST_CODE: Mapping[Scheme, float] = {"int8": 127.0, "int4": 7.0, "fp8_e4m3": 448.0}
"""The largest number of each grid: −128 and −8 are not used; fp8_e4m3 is the OCP's e4m3, without infinities."""
MANTISSA_BITS, LEAST_EXPONENT = 3, -6
"""Of e4m3: bits of the mantissa, and the least exponent; all numbers below 2⁻⁶ are equally spaced."""
FINER = 32
"""A bin of float32 is split into this many values, each with an equal share of its count."""
LOSSLESS = 300.0
"""The SQNR in dB that stood for no error at all in baselines made before it was +∞."""


def rounded_to(scheme: Scheme, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the numbers of the grid nearest to the values, whose magnitudes it covers."""
    if scheme != "fp8_e4m3":
        return np.rint(values)
    # frexp's mantissa is below 1, so that its exponent is one more than the float's.
    exponents = np.maximum(np.frexp(values)[1] - 1, LEAST_EXPONENT)
    steps = np.ldexp(1.0, exponents - MANTISSA_BITS)
    nearest: NDArray[np.float64] = np.rint(values / steps) * steps
    return nearest


def counted_powers(numbers: SiteNumbers, scheme: Scheme, scale: float | None = None) -> tuple[float, float]:
    """Return Σx² and Σ(x − x̂)² of a counted tensor that has one scale; NaN where it holds NaN or Inf.

    `scale`: a given one, beyond whose largest number x is clipped; None for the least that covers every x. Exact for
    16-bit tensors. A bin of float32 is as wide as a step of int8, so that its values are taken as evenly
    spread over it: an estimate.
    """
    largest = float(numbers.extremes[EXTREME_NAMES.index("largest")])
    if not np.isfinite(largest):
        return float("nan"), float("nan")
    values, weights = _magnitudes(numbers)
    # The middle of the last bin may be beyond the largest value, which is known exactly.
    values = np.minimum(values, largest)
    # 1 for a tensor of zeros.
    scale = scale or largest / LARGEST_CODE[scheme] or 1.0
    errors = values - rounded_to(scheme, np.minimum(values / scale, LARGEST_CODE[scheme])) * scale
    return float(np.sum(weights * values**2)), float(np.sum(weights * errors**2))


def counted_beyond(numbers: SiteNumbers, largest: float) -> float:
    """Return how many elements of a counted tensor have |x| > largest; NaN where it holds NaN or Inf."""
    if not np.isfinite(numbers.extremes[EXTREME_NAMES.index("largest")]):
        return float("nan")
    values, weights = _magnitudes(numbers)
    return float(np.sum(weights[values > largest]))


def _magnitudes(numbers: SiteNumbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if numbers.counted_exactly:
        return bin_values(numbers.bins, numbers.dtype), numbers.counts.astype(np.float64)
    # The middles of equal parts of the 2¹⁶ patterns in a bin.
    inside = (np.arange(FINER, dtype=np.uint32) * 2 + 1) * (0x8000 // FINER)
    patterns = (numbers.bins.astype(np.uint32)[:, None] << 16) | np.where(numbers.bins[:, None] > 0, inside, 0)
    values = patterns.astype(np.uint32).view(np.float32).astype(np.float64).reshape(-1)
    return values, np.repeat(numbers.counts / FINER, FINER)

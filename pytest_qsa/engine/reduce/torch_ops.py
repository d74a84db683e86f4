"""The reductions of one row by torch's operators: on accelerators, without numba, and as the kernels' oracle.

Every result stays on the tensor's device; nothing here waits for it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...captures import (
    CODES,
    FIRST_CODE,
    PADDING,
    SHIFT,
    SIGNED_COUNTS,
    TOP_NAMES,
    UNKNOWN,
    FeatureCounts,
    HeatMap,
    Massive,
    QuantizationPowers,
    Statistic,
    cell_size,
)
from ...metrics import LARGEST_CODE, LEAST_EXPONENT, MANTISSA_BITS
from .reductions import Plan, Row, Tables, blank_missing, peak_count, reduce_each, reduces
from .storage import Accumulator, own_pages


class TorchReducer:
    """Reduces rows of any dtype on any device."""

    def __init__(self, tables: Tables | None = None) -> None:
        self._tables = tables or Tables()

    def reduce(self, row: Tensor, kept: Tensor | None, sample: int, plan: Plan, into: Accumulator) -> None:
        """Reduce one population, [T, C] or [n]; `kept` says which tokens count."""
        counted = row if kept is None else row.index_select(0, kept)
        reduce_each(plan.steps, Row(row, kept, counted, sample, plan, self._tables), into)

    def reduce_packed(self, rows: Tensor, lengths: tuple[int, ...], plan: Plan, into: Accumulator) -> bool:
        """Do nothing: the operators reduce one population at a time."""
        return False

    def repeated(self, tokens: int, channels: int, plan: Plan, into: Accumulator) -> None:
        """Return nothing: each row goes through `reduce`."""

    def finish(self) -> None:
        """Do nothing: the numbers of every row are complete."""


@reduces("tokens")
def token_maxima(statistic: Statistic, row: Row, into: Accumulator) -> None:
    """Keep the largest |x| of each token, and where the largest of these are."""
    maxima = row.magnitudes.amax(dim=1).float()
    # Stable: of equal maxima the first token comes first, on every device.
    peaks = maxima.sort(descending=True, stable=True).indices[: peak_count(len(maxima), row.whole.shape[0])]
    channels = row.magnitudes.index_select(0, peaks).argmax(dim=1)
    into.take("token_max", row.spread(maxima, PADDING))
    into.take("peaks", (peaks if row.kept is None else row.kept.index_select(0, peaks)).int())
    into.take("peak_channels", channels.int())


@reduces("channels")
def channel_maxima(statistic: Statistic, row: Row, into: Accumulator) -> None:
    """Keep order statistics of the largest |x| of each channel, and the largest over all rows."""
    maxima = row.magnitudes.amax(dim=0).float()
    before = into.pooled.get("channel_max")
    into.pooled["channel_max"] = maxima if before is None else torch.maximum(before, maxima)
    count = maxima.numel()
    ranks = row.tables.ranks(count, row.whole.device)
    into.take("channel_top", blank_missing(maxima.sort().values[ranks.clamp(0, count - 1)], ranks, count))


@reduces("elements")
def element_order(statistic: Statistic, row: Row, into: Accumulator) -> None:
    """Keep order statistics of |x|."""
    into.take("element_top", row.order)


@reduces("counts", "signed_counts")
def pattern_counts(statistic: Statistic, row: Row, into: Accumulator) -> None:
    """Add the counts of the 16-bit patterns of |x| or x; widen the extremes."""
    into.add_up(statistic.name, row.pattern_counts if statistic == SIGNED_COUNTS else row.magnitude_counts)
    if statistic == SIGNED_COUNTS or not row.plan.signed:  # both statistics share the extremes: widen them once a row
        smallest = row.elements.nan_to_num(nan=float("inf")).min()
        unknown = torch.full_like(smallest, float("nan"))
        low, high = row.counted.aminmax() if row.plan.signed else (unknown, unknown)
        into.widen("extremes", torch.stack([end.float() for end in (row.elements.max(), smallest, low, high)]))


@reduces("moments")
def moments(statistic: Statistic, row: Row, into: Accumulator) -> None:
    """Keep `MOMENT_NAMES` in float64: central, so that fourth powers don't cancel, and scaled by a power of two."""
    x, largest = row.wide.flatten(), row.elements.max()
    count = x.numel()
    mean = x.sum(dtype=torch.float64) / count
    # Fourth powers of large values would overflow float32; a power of two scales without rounding.
    scale = torch.exp2(-torch.frexp(largest).exponent.clamp(-120, 120).to(x.dtype))
    squares = (x - mean.to(x.dtype)).mul_(scale).square_()
    # The mean is subtracted as x's dtype rounds it; what this adds to the squares is taken off again.
    drift = mean - mean.to(x.dtype).double()
    m2 = squares.sum(dtype=torch.float64) / scale.double() ** 2 - count * drift * drift
    m4 = squares.square_().sum(dtype=torch.float64) / scale.double() ** 4
    zeros = (row.elements == 0).sum()
    nonfinite = (~torch.isfinite(x)).sum()
    found = (torch.full_like(mean, count), mean, m2.clamp_min(0), m4, largest, zeros, nonfinite)
    into.take("moments", torch.stack([value.double() for value in found]))


@reduces("massive")
def massive(statistic: Massive, row: Row, into: Accumulator) -> None:
    """Count the elements above both thresholds, the second a multiple of the row's median."""
    least = statistic.ratio * row.order[TOP_NAMES.index("median")]
    count = ((row.elements > statistic.absolute) & (row.elements >= least)).sum()
    into.take(statistic.key, count.masked_fill(least.isnan(), UNKNOWN))


@reduces("channel_counts")
def channel_counts(statistic: Statistic, row: Row, into: Accumulator) -> None:
    """Add the counts of each channel, int32 [2 · CODES, C], in the bins of `CODES`; widen its extremes [4, C]."""
    x = row.floats
    count = _count_compiled if row.compiled else _count_channels
    count(x, into)
    low, high = x.aminmax(dim=0)
    magnitudes = x.abs()
    ends = torch.stack([magnitudes.amax(dim=0), magnitudes.amin(dim=0), low, high])
    into.widen("channel_extremes", ends + 0.0)  # turns −0 into 0


def _count_channels(x: Tensor, into: Accumulator) -> None:
    channels = x.shape[1]
    if "channel_counts" not in into.pooled:
        into.pooled["channel_counts"] = torch.zeros((2 * CODES, channels), dtype=torch.int32, device=x.device)
    patterns = x.contiguous().view(torch.int32)
    codes = (((patterns & 0x7FFFFFFF) >> SHIFT) - FIRST_CODE).clamp_(0, CODES - 1) + CODES * (patterns < 0)
    offsets = codes.long() * channels + torch.arange(channels, device=x.device)
    ones = torch.ones((), dtype=torch.int32, device=x.device).expand(offsets.numel())
    into.pooled["channel_counts"].view(-1).scatter_add_(0, offsets.flatten(), ones)


def _count_compiled(x: Tensor, into: Accumulator) -> None:
    from . import cpu_kernels as kernels  # numba may be absent

    if "channel_counts" not in into.pooled:
        counts = own_pages(4 * 2 * CODES * x.shape[1]).view(np.uint32)
        into.pooled["channel_counts"] = counts.reshape(2 * CODES, x.shape[1])
    patterns = x.view(torch.int32).numpy().view(np.uint32)
    threads = kernels.share_torchs_threads()
    kernels.count_channels(patterns, into.pooled["channel_counts"], threads, SHIFT, FIRST_CODE, CODES)


@reduces("features")
def features(statistic: FeatureCounts, row: Row, into: Accumulator) -> None:
    """Add to [C + 2] how often |x| reaches the threshold in each channel; the tokens; the NaN and Inf."""
    x = row.floats
    nonfinite = (~x.isfinite()).sum()
    reached = (x.abs() >= statistic.absolute).sum(dim=0)
    into.add_up(statistic.key, torch.cat([reached, nonfinite.new_full((1,), len(x)), nonfinite[None]]))


@reduces("map")
def heat_map(statistic: HeatMap, row: Row, into: Accumulator) -> None:
    """Keep |x| of the sample's first call as at most MAP_SIZE × MAP_SIZE maxima, float32; padding counts as 0."""
    if row.sample != statistic.sample or statistic.key in into.pooled:
        return
    magnitudes = row.whole.abs().float()
    if row.kept is not None:
        counted = magnitudes.index_select(0, row.kept)
        magnitudes = torch.zeros_like(magnitudes).index_copy_(0, row.kept, counted)
    cell = [cell_size(size) for size in magnitudes.shape]
    into.pooled[statistic.key] = torch.nn.functional.max_pool2d(magnitudes[None], cell, ceil_mode=True)[0]


@reduces("quantized")
def quantization_powers(statistic: QuantizationPowers, row: Row, into: Accumulator) -> None:
    """Keep Σx² and Σ(x − x̂)² as float64 [2]; metrics/fidelity.py defines the grids.

    The scales of tokens, channels and groups aren't known after the pass, so the pass must take the sums.
    """
    x = row.floats
    size = statistic.group_size or (row.plan.head_size if statistic.by == "token_head" else 0)
    scales = _scales(statistic, x, size)
    powers = _powers_compiled if row.compiled else _powers
    into.take(statistic.key, powers(statistic, x, scales, size))


def _powers(statistic: QuantizationPowers, x: Tensor, scales: Tensor, size: int) -> Tensor:
    if size:
        scales = scales.repeat_interleave(size, dim=1)[:, : x.shape[1]]
    scaled = x / scales
    if statistic.scheme == "fp8_e4m3":
        # frexp's mantissas are in [½, 1), those of floats in [1, 2).
        exponents = (torch.frexp(scaled).exponent - 1).clamp_min(LEAST_EXPONENT)
        steps = torch.exp2((exponents - MANTISSA_BITS).to(x.dtype))
        rounded = (scaled / steps).round() * steps
    else:
        rounded = scaled.round()
    wide = x.double()
    error = wide - (rounded * scales).double()
    return torch.stack([_total(wide.square()), _total(error.square())])


def _powers_compiled(statistic: QuantizationPowers, x: Tensor, scales: Tensor, size: int) -> Tensor:
    from . import cpu_kernels, grid_kernels  # numba may be absent

    channels = size or (1 if statistic.by == "channel" else x.shape[1])
    floating, threads = statistic.scheme == "fp8_e4m3", cpu_kernels.share_torchs_threads()
    grid = floating, LEAST_EXPONENT, MANTISSA_BITS, threads
    elements, steps = x.contiguous().numpy(), scales.contiguous().numpy()
    return torch.from_numpy(grid_kernels.powers_on_grid(elements, steps, channels, *grid))


def _scales(statistic: QuantizationPowers, x: Tensor, size: int) -> Tensor:
    """Return the scales of x [T, C] float32: [T, 1], [1, C] or [T, C / size rounded up]; 1 where all is zero.

    `size`: how many neighbouring channels share one, 0 where it is no group of them.
    """
    magnitudes = x.abs()
    if size:
        # The last group may be short; zeros don't change its largest |x|.
        magnitudes = torch.nn.functional.pad(magnitudes, (0, -x.shape[1] % size))
        largest = magnitudes.reshape(len(x), -1, size).amax(dim=2)
    else:
        largest = magnitudes.amax(dim=1 if statistic.by == "token" else 0, keepdim=True)
    scales: Tensor = largest / LARGEST_CODE[statistic.scheme]  # type: ignore[index]
    return scales.masked_fill(scales == 0, 1.0)


def _total(x: Tensor) -> Tensor:
    """Sum in an order that doesn't depend on the number of threads, which torch's does on the CPU."""
    return torch.from_numpy(np.asarray(x.numpy().sum())) if x.device.type == "cpu" else x.sum()

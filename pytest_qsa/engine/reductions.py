"""The reductions of one row by torch's operators: on accelerators, without numba, and as the kernels' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numbers import PADDING, TOP_NAMES, UNKNOWN
from .channel_counts import count_channels, count_features, widen_channels
from .wants import Wants, peak_count, ranks_of


class TorchReducer:
    """Keeps every result on the tensor's device; nothing here waits for it."""

    def __init__(self) -> None:
        self._ranks: dict[tuple[int, torch.device], Tensor] = {}

    def reduce(self, row: Tensor, kept: Tensor | None, wants: Wants, pooled: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reduce one population, [T, C] or [n]; `kept` says which tokens count. Pooled sums are added to `pooled`."""
        counted = row if kept is None else row.index_select(0, kept)
        wide = counted if counted.dtype in (torch.float32, torch.float64) else counted.float()
        magnitudes = wide.abs()
        found: dict[str, Tensor] = {}
        if row.dim() == 2 and wants.tokens:
            found |= _tokens(magnitudes, kept, row.shape[0])
        if row.dim() == 2 and wants.channels:
            found |= _channels(magnitudes, pooled, self._ranks_of(row.shape[1], row.device))
        if row.dim() == 2 and wants.on_request:
            found |= _on_request(wide.float(), wants, pooled)
        elements = magnitudes.flatten()
        ranks = self._ranks_of(elements.numel(), row.device) if wants.ordered else None
        order = _distribution(counted.flatten(), elements, wants, pooled, ranks) if wants.counted else None
        if wants.elements and order is not None:
            found["element_top"] = order
        if wants.moments:
            found["moments"] = _moments(wide.flatten(), elements)
        for name, (absolute, ratio) in wants.massive.items():
            assert order is not None
            least = ratio * order[TOP_NAMES.index("median")]
            count = ((elements > absolute) & (elements >= least)).sum()
            found[name] = count.masked_fill(least.isnan(), UNKNOWN)
        return found

    def _ranks_of(self, count: int, device: torch.device) -> Tensor:
        """Return `ranks_of` on a device, [7] int64. Filled there: a copy of numbers from the host would wait."""
        key = (count, device)
        if key not in self._ranks:
            filled = [torch.full((), rank, dtype=torch.int64, device=device) for rank in ranks_of(count)]
            self._ranks[key] = torch.stack(filled)
        return self._ranks[key]


def _tokens(magnitudes: Tensor, kept: Tensor | None, length: int) -> dict[str, Tensor]:
    maxima = magnitudes.amax(dim=1).float()
    peaks = maxima.sort(descending=True, stable=True).indices[: peak_count(len(maxima), length)]
    channels = magnitudes.index_select(0, peaks).argmax(dim=1)
    if kept is not None:
        peaks = kept.index_select(0, peaks)
        maxima = maxima.new_full((length,), PADDING).index_copy_(0, kept, maxima)
    return {"token_max": maxima, "peaks": peaks.int(), "peak_channels": channels.int()}


def _channels(magnitudes: Tensor, pooled: dict[str, Tensor], ranks: Tensor) -> dict[str, Tensor]:
    maxima = magnitudes.amax(dim=0).float()
    before = pooled.get("channel_max")
    pooled["channel_max"] = maxima if before is None else torch.maximum(before, maxima)
    count = maxima.numel()
    picked = maxima.sort().values[ranks.clamp(0, count - 1)]
    return {"channel_top": _blank_missing(picked, ranks, count)}


def _on_request(wide: Tensor, wants: Wants, pooled: dict[str, Tensor]) -> dict[str, Tensor]:
    if wants.channel_counts:
        count_channels(wide, pooled)
        widen_channels(wide, pooled)
    count_features(wide, wants.features, pooled)
    return {name: quantizer.powers(wide) for name, quantizer in wants.quantizers.items()}


def _distribution(
    raw: Tensor, elements: Tensor, wants: Wants, pooled: dict[str, Tensor], ranks: Tensor | None
) -> Tensor | None:
    """Count the row's 16-bit patterns; return its order statistics at `ranks`, where they are asked for."""
    counts = _count(raw, signed=wants.signed)
    folded = counts[: 1 << 15] + counts[1 << 15 :] if wants.signed else counts
    for name, wanted, new in (("counts", wants.counts, folded), ("signed_counts", wants.signed, counts)):
        if wanted:
            pooled[name] = pooled[name].add_(new) if name in pooled else new.clone()
    if wants.counts or wants.signed:
        ends = _extremes(raw, elements, signed=wants.signed)
        before = pooled.get("extremes")
        pooled["extremes"] = ends if before is None else _widened(before, ends)
    return None if ranks is None else _counted_order(folded, elements, raw.dtype, ranks)


def _extremes(raw: Tensor, elements: Tensor, *, signed: bool) -> Tensor:
    """Return the largest and the smallest |x|, and of x where the signs count."""
    smallest = elements.nan_to_num(nan=float("inf")).min()
    low, high = raw.aminmax() if signed else (torch.full_like(smallest, float("nan")),) * 2
    return torch.stack([end.float() for end in (elements.max(), smallest, low, high)])


def _widened(before: Tensor, ends: Tensor) -> Tensor:
    largest, least = torch.maximum(before, ends), torch.minimum(before, ends)
    return torch.stack([largest[0], least[1], least[2], largest[3]])


def _count(x: Tensor, *, signed: bool) -> Tensor:
    """Count 16-bit patterns, int64 [65,536] of x or [32,768] of |x|; float32 by its upper half."""
    if x.dtype in (torch.bfloat16, torch.float16):
        patterns = x.contiguous().view(torch.int16).int()
    else:
        patterns = x.float().contiguous().view(torch.int32) >> 16
    patterns = patterns & (0xFFFF if signed else 0x7FFF)
    size = 1 << (16 if signed else 15)
    if x.device.type == "cpu":
        return torch.bincount(patterns, minlength=size)
    counts = torch.zeros(size, dtype=torch.int64, device=x.device)
    ones = torch.ones((), dtype=torch.int64, device=x.device).expand(len(patterns))
    return counts.scatter_add_(0, patterns.long(), ones)


def _counted_order(counts: Tensor, magnitudes: Tensor, dtype: torch.dtype, ranks: Tensor) -> Tensor:
    """Return the seven order statistics of |x|: exact for 16 bits; else the median within 2⁻⁸, the ends exact."""
    count = magnitudes.numel()
    bins = torch.searchsorted(counts.cumsum(0), ranks.clamp(0, count - 1), right=True)
    if dtype in (torch.bfloat16, torch.float16):
        order = bins.to(torch.int16).view(dtype).float()
    else:
        order = ((bins << 16) | (bins > 0).long() << 15).to(torch.int32).view(torch.float32).clone()
        few = min(3, count)
        order[:few] = magnitudes.topk(few).values.float()
        order[7 - few :] = magnitudes.topk(few, largest=False).values.flip(0).float()
    return _blank_missing(order, ranks, count)


def _blank_missing(values: Tensor, ranks: Tensor, count: int) -> Tensor:
    return values.masked_fill((ranks < 0) | (ranks >= count) | ~values[0].isfinite(), float("nan"))


def _moments(x: Tensor, magnitudes: Tensor) -> Tensor:
    """Return `MOMENT_NAMES` in float64: central, so that fourth powers don't cancel, and scaled by a power of two."""
    count = x.numel()
    mean = x.sum(dtype=torch.float64) / count
    scale = torch.exp2(-torch.frexp(magnitudes.max()).exponent.clamp(-120, 120).to(x.dtype))
    squares = (x - mean.to(x.dtype)).mul_(scale).square_()
    drift = mean - mean.to(x.dtype).double()
    m2 = squares.sum(dtype=torch.float64) / scale.double() ** 2 - count * drift * drift
    m4 = squares.square_().sum(dtype=torch.float64) / scale.double() ** 4
    zeros = (magnitudes == 0).sum()
    nonfinite = (~torch.isfinite(x)).sum()
    found = (torch.full_like(mean, count), mean, m2.clamp_min(0), m4, magnitudes.max(), zeros, nonfinite)
    return torch.stack([value.double() for value in found])

"""The reductions of one row by torch's operators: on accelerators, without numba, and as the kernels' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ...captures import PADDING, TOP_NAMES, UNKNOWN
from .channel_counts import count_channels, count_features, widen_channels
from .storage import Kept
from .wanted import Wants, peak_count, ranks_of


class Tables:
    """Small tables on a device, made there once: a copy of numbers from the host would wait for it."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Tensor] = {}

    def ranks(self, count: int, device: torch.device) -> Tensor:
        """Return `ranks_of`, [7] int64."""
        key = (count, device)
        if key not in self._made:
            filled = [torch.full((), rank, dtype=torch.int64, device=device) for rank in ranks_of(count)]
            self._made[key] = torch.stack(filled)
        return self._made[key]

    def values(self, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what the first 16-bit patterns stand for, [bins] float32."""
        key = (bins, dtype, device)
        if key not in self._made:
            patterns = torch.arange(bins, dtype=torch.int32, device=device).to(torch.int16)
            self._made[key] = patterns.view(dtype).float()
        return self._made[key]


class TorchReducer:
    """Keeps every result on the tensor's device; nothing here waits for it."""

    def __init__(self, tables: Tables | None = None) -> None:
        self._tables = tables or Tables()

    def reduce(self, row: Tensor, kept: Tensor | None, wants: Wants, into: Kept) -> None:
        """Reduce one population, [T, C] or [n]; `kept` says which tokens count."""
        for name, value in self._reduced(row, kept, wants, into.pooled).items():
            into.take(name, value)

    def _reduced(self, row: Tensor, kept: Tensor | None, wants: Wants, pooled: dict[str, Tensor]) -> dict[str, Tensor]:
        counted = row if kept is None else row.index_select(0, kept)
        wide = counted if counted.dtype in (torch.float32, torch.float64) else counted.float()
        magnitudes = wide.abs()
        found: dict[str, Tensor] = {}
        if row.dim() == 2 and wants.tokens:
            found |= _tokens(magnitudes, kept, row.shape[0])
        if row.dim() == 2 and wants.channels:
            found |= _channels(magnitudes, pooled, self._tables.ranks(row.shape[1], row.device))
        if row.dim() == 2 and wants.on_request:
            found |= on_request(wide.float(), wants, pooled)
        elements = magnitudes.flatten()
        ranks = self._tables.ranks(elements.numel(), row.device) if wants.ordered else None
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

    def finish(self) -> None:
        """Do nothing: the numbers of every row are complete."""


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
    return {"channel_top": blank_missing(picked, ranks, count)}


def on_request(wide: Tensor, wants: Wants, pooled: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what only a site that asks for it has of x [T, C] float32, and pool the rest of it."""
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
        pooled["extremes"] = ends if before is None else widened(before, ends)
    return None if ranks is None else _counted_order(folded, elements, raw.dtype, ranks)


def _extremes(raw: Tensor, elements: Tensor, *, signed: bool) -> Tensor:
    """Return the largest and the smallest |x|, and of x where the signs count."""
    smallest = elements.nan_to_num(nan=float("inf")).min()
    low, high = raw.aminmax() if signed else (torch.full_like(smallest, float("nan")),) * 2
    return torch.stack([end.float() for end in (elements.max(), smallest, low, high)])


def widened(before: Tensor, ends: Tensor) -> Tensor:
    """Return `EXTREME_NAMES` of two tensors from those of each."""
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
    return blank_missing(order, ranks, count)


def blank_missing(values: Tensor, ranks: Tensor, count: int) -> Tensor:
    """Return order statistics [..., 7] with NaN for ranks that there are none of, and for all where the largest is."""
    return values.masked_fill((ranks < 0) | (ranks >= count) | ~values[..., :1].isfinite(), float("nan"))


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

"""Streaming reductions of one tensor stream: all that is kept of an activation is made here.

Results stay on the tensor's device until `numbers()`, so that no hook waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import plan
from ..numbers import PADDING, TOP_NAMES, SiteNumbers

PEAKS_MIN = 16
PEAKS_SHARE = 32
"""The largest max(16, T / 32) tokens of a population keep their channel: sinks and evidence come from them."""


class StreamObserver:
    """Reduces the populations of one site, one row at a time, so that batching can't change a definition."""

    def __init__(self, statistics: frozenset[str]) -> None:
        self.statistics = statistics
        self.dtype = ""
        self.shape: tuple[int, ...] = ()
        self.token_axis = False
        self.owners: list[tuple[int, int, int]] = []
        self.rows: dict[str, list[Tensor]] = {}
        self.pooled: dict[str, Tensor] = {}
        massive = (name.split(":") for name in sorted(statistics) if name.startswith("massive:"))
        self.massive = {":".join(parts): (float(parts[1]), float(parts[2])) for parts in massive}
        self.signed = plan.SIGNED_COUNTS in statistics
        self.ordered = plan.ELEMENTS in statistics or bool(self.massive)
        self.counted = self.signed or self.ordered or plan.COUNTS in statistics

    def add(
        self, x: Tensor, keep: Sequence[Tensor | None], samples: Sequence[int], call: int, token_axis: bool
    ) -> None:
        """Reduce one tensor: [B, T, C] with a token axis, else [B, n]. `keep`: the indices of the tokens that count."""
        self.dtype = str(x.dtype).removeprefix("torch.")
        self.shape = tuple(x.shape[1:])
        self.token_axis = token_axis
        for row, kept, sample in zip(x, keep, samples, strict=True):
            if kept is not None and not len(kept):
                continue
            self.owners.append((sample, call, row.shape[0] if token_axis else 0))
            self._add_row(row.detach(), kept)

    def _add_row(self, row: Tensor, kept: Tensor | None) -> None:
        counted = row if kept is None else row.index_select(0, kept)
        magnitudes = _wide(counted).abs()
        if self.token_axis:
            self._tokens(magnitudes, kept, row.shape[0])
            if plan.CHANNELS in self.statistics:
                self._channels(magnitudes)
        elements = magnitudes.flatten()
        order = self._distribution(counted.flatten(), elements) if self.counted else None
        if plan.MOMENTS in self.statistics:
            self._keep("moments", _moments(_wide(counted).flatten(), elements))
        for name, (absolute, ratio) in self.massive.items():
            assert order is not None
            median = order[TOP_NAMES.index("median")]
            self._keep(name, ((elements > absolute) & (elements >= ratio * median)).sum())

    def _tokens(self, magnitudes: Tensor, kept: Tensor | None, length: int) -> None:
        if plan.TOKENS not in self.statistics:
            return
        maxima = magnitudes.amax(dim=1).float()
        count = min(len(maxima), max(PEAKS_MIN, length // PEAKS_SHARE))
        peaks = maxima.topk(count).indices
        channels = magnitudes.index_select(0, peaks).argmax(dim=1)
        if kept is not None:
            peaks = kept.index_select(0, peaks)
            maxima = maxima.new_full((length,), PADDING).index_copy_(0, kept, maxima)
        self._keep("token_max", maxima)
        self._keep("peaks", peaks.int())
        self._keep("peak_channels", channels.int())

    def _channels(self, magnitudes: Tensor) -> None:
        maxima = magnitudes.amax(dim=0).float()
        self._keep("channel_top", _order_statistics(maxima))
        before = self.pooled.get("channel_max")
        self.pooled["channel_max"] = maxima if before is None else torch.maximum(before, maxima)

    def _distribution(self, raw: Tensor, elements: Tensor) -> Tensor | None:
        """Count the row's 16-bit patterns; return its order statistics where they are asked for."""
        counts = _count(raw, signed=self.signed)
        folded = counts[: 1 << 15] + counts[1 << 15 :] if self.signed else counts
        for name, wanted, new in (
            ("counts", plan.COUNTS in self.statistics, folded),
            ("signed_counts", self.signed, counts),
        ):
            if wanted:
                self.pooled[name] = self.pooled[name].add_(new) if name in self.pooled else new.clone()
        if not self.ordered:
            return None
        order = _counted_order(folded, elements, self.dtype)
        if plan.ELEMENTS in self.statistics:
            self._keep("element_top", order)
        return order

    def _keep(self, name: str, value: Tensor) -> None:
        self.rows.setdefault(name, []).append(value)

    def numbers(self, statistics: frozenset[str]) -> SiteNumbers:
        """Fetch everything from the device, once. `statistics`: what the site can say it has."""
        owners = np.array(self.owners, dtype=np.int64).reshape(-1, 3)
        arrays: dict[str, Any] = {}
        for name, rows in self.rows.items():
            if name in ("peaks", "peak_channels"):
                arrays[name] = _padded([row.cpu().numpy() for row in rows])
            elif name == "token_max":
                arrays[name] = torch.cat(rows).cpu().numpy()
            elif name not in self.massive:
                arrays[name] = torch.stack(rows).cpu().numpy()
        for name, pooled in self.pooled.items():
            if name == "channel_max":
                arrays[name] = pooled.cpu().numpy()
            else:
                arrays[name.replace("counts", "bins")], arrays[name] = _sparse(pooled)
        massive = {name: torch.stack(self.rows[name]).cpu().numpy() for name in self.massive if name in self.rows}
        return SiteNumbers(
            dtype=self.dtype,
            shape=self.shape,
            token_axis=self.token_axis,
            statistics=statistics,
            sample=owners[:, 0].astype(np.int32),
            call=owners[:, 1].astype(np.int32),
            lengths=owners[:, 2],
            massive=massive,
            **arrays,
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _moments(x: Tensor, magnitudes: Tensor) -> Tensor:
    """Return n, mean, m2, m4, absmax, zeros, nonfinite in float64; central, so that fourth powers don't cancel."""
    count = x.numel()
    mean = x.sum(dtype=torch.float64) / count
    squares = (x - mean.to(x.dtype)).square_()
    drift = mean - mean.to(x.dtype).double()
    m2 = squares.sum(dtype=torch.float64) - count * drift * drift
    m4 = squares.square_().sum(dtype=torch.float64)
    zeros = (magnitudes == 0).sum()
    nonfinite = (~torch.isfinite(x)).sum()
    return torch.stack(
        [v.double() for v in (torch.full_like(mean, count), mean, m2, m4, magnitudes.max(), zeros, nonfinite)]
    )


def _order_statistics(values: Tensor) -> Tensor:
    """Return top1, top2, top3, the lower median, min3, min2, min of a 1-D tensor; NaN where there are too few."""
    count = values.numel()
    ascending = values.sort().values
    ranks = _ranks(count)
    picked = ascending[torch.tensor([max(0, min(rank, count - 1)) for rank in ranks], device=values.device)]
    return _blank_missing(picked, ranks, count)


def _counted_order(counts: Tensor, magnitudes: Tensor, dtype: str) -> Tensor:
    """Return the same seven of |x| from its counts: exact for 16 bits; else the median within 2⁻⁸, the ends exact."""
    count = magnitudes.numel()
    ranks = _ranks(count)
    ends = counts.cumsum(0)
    wanted = torch.tensor([max(0, min(rank, count - 1)) for rank in ranks], device=counts.device)
    bins = torch.searchsorted(ends, wanted, right=True)
    if dtype in ("bfloat16", "float16"):
        order = bins.to(torch.int16).view(getattr(torch, dtype)).float()
    else:
        order = ((bins << 16) | 0x8000).to(torch.int32).view(torch.float32).clone()
        few = min(3, count)
        order[:few] = magnitudes.topk(few).values.float()
        order[7 - few :] = magnitudes.topk(few, largest=False).values.flip(0).float()
    return _blank_missing(order, ranks, count)


def _ranks(count: int) -> list[int]:
    return [count - 1, count - 2, count - 3, (count - 1) // 2, 2, 1, 0]


def _blank_missing(values: Tensor, ranks: list[int], count: int) -> Tensor:
    missing = torch.tensor([not 0 <= rank < count for rank in ranks], device=values.device)
    return values.masked_fill(missing, float("nan"))


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
    return counts.scatter_add_(
        0, patterns.long(), torch.ones((), dtype=torch.int64, device=x.device).expand(len(patterns))
    )


def _padded(rows: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def _sparse(counts: Tensor) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    dense = counts.cpu().numpy()
    bins = np.flatnonzero(dense)
    return bins.astype(np.uint16), dense[bins].astype(np.int64)

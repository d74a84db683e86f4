"""The reductions of one row on the CPU, by the kernels: the numbers of `reductions.py` in a fraction of the time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..channels import CODES, FIRST_CODE, SHIFT
from ..distributions import bin_values
from ..numbers import PADDING, TOP_NAMES, UNKNOWN
from . import kernels
from .channel_counts import count_features, widen_channels
from .keeping import bytes_apart
from .threads import share_torchs_threads
from .wants import Wants, peak_count, ranks_of
from .windows import Window, floats_of

WIDTHS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}


class CpuReducer:
    """Reduces rows of one dtype. The scratch counts are zero between two rows."""

    waits = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self.wide = WIDTHS[dtype] == 32
        self.integers = torch.int32 if self.wide else torch.int16
        self.patterns: Any = np.uint32 if self.wide else np.uint16
        self.token_maxima = kernels.token_maxima32 if self.wide else kernels.token_maxima16
        self.channel_maxima = kernels.channel_maxima32 if self.wide else kernels.channel_maxima16
        self.survey = kernels.survey32 if self.wide else kernels.survey16
        self.signless = kernels.SIGNLESS32 if self.wide else kernels.SIGNLESS16
        self.scratch = np.zeros((share_torchs_threads(), 1 << 16), dtype=np.uint32)
        self.smallest = np.zeros(len(self.scratch), dtype=self.patterns)
        self.values = bin_values(np.arange(1 << 15, dtype=np.uint16), self.name)
        self.padding = torch.tensor(PADDING, dtype=dtype).view(self.integers).numpy().view(self.patterns)

    def reduce(
        self, row: Tensor, kept: Tensor | None, wants: Wants, pooled: dict[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """Reduce one population, [T, C] or [n]; `kept` says which tokens count. Pooled sums are added to `pooled`."""
        counted = (row if kept is None else row.index_select(0, kept)).contiguous()
        patterns = counted.view(self.integers).numpy().view(self.patterns)
        lines = patterns if patterns.ndim == 2 else patterns[None]
        with_tokens = patterns.ndim == 2 and wants.tokens
        found: dict[str, NDArray[Any]] = {}
        maxima = np.empty(len(lines), dtype=self.patterns)
        surveyed = wants.counted or (wants.moments and not self.wide)
        if surveyed:
            self.survey(lines, maxima, self.smallest, self.scratch)
        elif wants.tokens or wants.moments:
            self.token_maxima(lines, maxima)
        top, smallest = self._tokens(lines, maxima, kept, row.shape[0] if with_tokens else 0, found)
        if patterns.ndim == 2 and wants.channels:
            self._channels(lines, pooled, found)
        if patterns.ndim == 2 and wants.on_request:
            self._on_request(counted.float(), wants, pooled, found)
        if surveyed:
            self._distribution(counted, lines, top, smallest, wants, pooled, found)
        elif wants.moments:
            found["moments"] = self._moments_of_values(counted, top)
        return found

    def finish(self) -> None:
        """Do nothing: the numbers of every row are complete."""

    def _tokens(
        self,
        lines: NDArray[Any],
        maxima: NDArray[Any],
        kept: Tensor | None,
        length: int,
        found: dict[str, NDArray[Any]],
    ) -> tuple[int, int]:
        """Find the peaks among `length` tokens, 0 for none; return the largest and the smallest pattern but zero.

        The maxima stay patterns, 2 bytes a token of a 16-bit tensor.
        """
        count = peak_count(len(lines), length) if length else 0
        peaks, channels = np.zeros(count, dtype=np.int32), np.zeros(count, dtype=np.int32)
        top, least = kernels.summarise(lines, self.signless, maxima, self.smallest, peaks, channels)
        if length:
            if kept is not None:
                index = kept.numpy()
                whole = np.full(length, self.padding, dtype=self.patterns)
                whole[index] = maxima
                maxima, peaks = whole, index[peaks].astype(np.int32)
            found["token_max"], found["peaks"], found["peak_channels"] = maxima, peaks, channels
        return top, least + 1

    def _channels(self, lines: NDArray[Any], pooled: dict[str, Any], found: dict[str, NDArray[Any]]) -> None:
        shares = np.zeros((len(self.scratch), lines.shape[1]), dtype=self.patterns)
        self.channel_maxima(lines, shares)
        maxima = shares.max(axis=0)
        floats = floats_of(maxima, self.name)
        if "channel_max" in pooled:
            np.maximum(pooled["channel_max"], floats, out=pooled["channel_max"])
        else:
            pooled["channel_max"] = bytes_apart(floats.nbytes).view(np.float32)
            pooled["channel_max"][:] = floats
        wanted, _, known = _ranks(len(maxima))
        found["channel_top"] = _blank_missing(floats_of(np.sort(maxima)[wanted], self.name), known)

    def _on_request(self, wide: Tensor, wants: Wants, pooled: dict[str, Any], found: dict[str, NDArray[Any]]) -> None:
        if wants.channel_counts:
            self._count_channels(wide, pooled)
        count_features(wide, wants.features, pooled)
        found |= {name: quantizer.powers(wide).numpy() for name, quantizer in wants.quantizers.items()}

    def _count_channels(self, wide: Tensor, pooled: dict[str, Any]) -> None:
        if "channel_counts" not in pooled:
            counts = bytes_apart(4 * 2 * CODES * wide.shape[1]).view(np.uint32)
            pooled["channel_counts"] = counts.reshape(2 * CODES, wide.shape[1])
        patterns = wide.view(torch.int32).numpy().view(np.uint32)
        kernels.count_channels(patterns, pooled["channel_counts"], len(self.scratch), SHIFT, FIRST_CODE, CODES)
        widen_channels(wide, pooled)

    def _distribution(
        self,
        counted: Tensor,
        lines: NDArray[Any],
        top: int,
        smallest: int,
        wants: Wants,
        pooled: dict[str, Any],
        found: dict[str, NDArray[Any]],
    ) -> None:
        row, low = self._settle(counted, top, smallest, wants, pooled)
        order = self._order(lines.reshape(-1), row, low) if wants.ordered else None
        if wants.elements and order is not None:
            found["element_top"] = order
        if wants.moments:
            wide = self.wide
            found["moments"] = self._moments_of_values(counted, top) if wide else self._moments(row, low)
        for name, (absolute, ratio) in wants.massive.items():
            assert order is not None
            least = float(np.float32(ratio) * order[TOP_NAMES.index("median")])
            if np.isnan(least):
                count = UNKNOWN
            elif self.wide:
                count = kernels.massive_of_values(counted.flatten().numpy(), absolute, least)
            else:
                count = kernels.massive_of_counts(row, low, self.values, absolute, least)
            found[name] = np.array(count, dtype=np.int64)

    def _settle(
        self, counted: Tensor, top: int, smallest: int, wants: Wants, pooled: dict[str, Any]
    ) -> tuple[NDArray[np.uint32], int]:
        """Add a surveyed row to the pooled counts; return its own, [2, bins] from the pattern `low` on, if needed."""
        shift = 16 if self.wide else 0
        high, low = top >> shift, max(1, min(smallest, top) >> shift)
        needed = wants.ordered or ((wants.moments or wants.signed) and not self.wide)
        row = np.empty((2, max(1, high - low + 2) if needed else 0), dtype=np.uint32)
        window = pooled.get("window") or Window(wants.counts, wants.signed, self.name)
        window.cover(low, high, counted.numel())
        zeros = kernels.settle(self.scratch, low, max(high, low - 1), window.sums, window.base, row)
        if wants.counts or wants.signed:
            pooled["window"] = window
            window.top, window.least = max(window.top, top), min(window.least, 0 if zeros else smallest)
        if wants.signed:
            window.widen(*(torch.aminmax(counted) if self.wide else kernels.signed_ends(row, low, self.values)))
        return row, low

    def _order(self, flat: NDArray[Any], row: NDArray[np.uint32], low: int) -> NDArray[np.float32]:
        wanted, ascending, known = _ranks(flat.size)
        found = np.empty(len(wanted), dtype=np.float32)
        kernels.order_of(row, low, self.values, wanted, ascending, found)
        if self.wide:
            few = min(3, flat.size)
            largest, least = np.empty(few, dtype=np.uint32), np.empty(few, dtype=np.uint32)
            kernels.extremes32(flat, largest, least)
            found[:few] = largest.view(np.float32)
            found[7 - few :] = least.view(np.float32)[::-1]
        return _blank_missing(found, known)

    def _moments(self, row: NDArray[np.uint32], low: int) -> NDArray[np.float64]:
        """Return `MOMENT_NAMES` of a 16-bit row from its counts."""
        found = np.empty(7, dtype=np.float64)
        kernels.moments_of_counts(row, low, self.values, found)
        return found

    def _moments_of_values(self, counted: Tensor, top: int) -> NDArray[np.float64]:
        """Return the same of a float32 row, summed in float64."""
        found, sums = np.zeros(7, dtype=np.float64), np.zeros(6, dtype=np.float64)
        kernels.moments_of_values(counted.flatten().numpy(), sums)
        found[:4], found[5:] = sums[:4], sums[4:]
        found[4] = floats_of(np.array([top], dtype=self.patterns), self.name)[0]
        return found


@lru_cache(1024)
def _ranks(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return the ranks of `TOP_NAMES` among `count` values, their order, and which of them there are."""
    ranks = np.array(ranks_of(count))
    wanted = np.clip(ranks, 0, count - 1)
    return wanted, np.argsort(wanted, kind="stable"), (ranks >= 0) & (ranks < count)


def _blank_missing(values: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(known & np.isfinite(values[0]), values, np.float32("nan"))

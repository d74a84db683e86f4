"""Observers: they reduce a tensor stream row by row, and copy the numbers from the device once, at the end."""

from __future__ import annotations

import importlib.util
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...captures import EXPERTS, LAYOUTS, Array, InRange, SiteNumbers, Statistic
from ...common import InfraError
from ..modules import Routing
from .reductions import Plan
from .storage import Accumulator, Arena, Column, Transfer, Window, floats_of, joined_records, table_of_records
from .torch_ops import TorchReducer


class Reducer(Protocol):
    """Reduces one population to named arrays, on its own device; they are complete after `finish`."""

    def reduce(self, row: Tensor, kept: Tensor | None, sample: int, plan: Plan, into: Accumulator) -> None:
        """Reduce [T, C], or [n] where there is no token axis."""

    def reduce_packed(self, rows: Tensor, lengths: tuple[int, ...], plan: Plan, into: Accumulator) -> bool:
        """Reduce populations that lie one after the other in rows [N, C] together; False: nothing was reduced."""

    def repeated(self, tokens: int, channels: int, plan: Plan, into: Accumulator) -> Callable[[int], None] | None:
        """Return what reduces further rows [T, C] of a site by their addresses, if there is a way that costs less."""

    def finish(self) -> None:
        """Complete the numbers of all rows."""


@dataclass
class Reducers:
    """The reducers of one pass, one for each device and dtype. `fused` off: by torch's operators only."""

    fused: bool = True
    arena: Arena = field(default_factory=Arena)
    _made: dict[tuple[str, torch.dtype], Reducer] = field(default_factory=dict)
    _owners: Owners | None = None

    def for_tensor(self, x: Tensor) -> Reducer:
        """Return the kernels for what they know, torch's operators for the rest."""
        key = (x.device.type, x.dtype)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._make(x)
        return made

    def _make(self, x: Tensor) -> Reducer:
        known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        if self.fused and known and x.device.type == "cpu" and importlib.util.find_spec("numba"):
            from .cpu import CpuReducer

            return CpuReducer(x.dtype)
        if self.fused and x.device.type == "cuda" and importlib.util.find_spec("triton"):
            from .cuda import CudaReducer

            return CudaReducer()
        return TorchReducer()

    def finish(self) -> None:
        """Complete the numbers of all rows that were reduced."""
        for reducer in self._made.values():
            reducer.finish()

    def owners_of(self, rows: array[int]) -> Owners:
        """Return whose rows a site has; most sites of a pass have the same ones, so that the last are shared."""
        if self._owners is None or self._owners.rows != rows:
            self._owners = Owners(rows)
        return self._owners


class Owners:
    """The sample and call of each row of a site. `rows`: sample, call and number of tokens, in the order of the pass.

    `order`: sorts the rows by sample, then call, as captures have them; a pass sees all samples of a call together.
    """

    def __init__(self, rows: array[int]) -> None:
        # A copy, for the site's own rows grow while the pass goes on.
        self.rows = rows[:]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        order = np.lexsort((table[:, 1], table[:, 0]))
        self.order: list[int] = order.tolist()
        self.sample, self.call = table[order, 0].astype(np.int32), table[order, 1].astype(np.int32)
        self.lengths = table[order, 2]
        # The one length of all rows, where they have one.
        self.length = int(self.lengths[0]) if len(order) and np.ptp(self.lengths) == 0 else None


@cache
def plan_of(statistics: frozenset[Statistic], head_size: int = 0) -> Plan:
    """Return the plan of some statistics; equal ones share one."""
    return Plan.of(statistics, head_size)


class StreamObserver:
    """Reduces the populations of one site, one row at a time, so that batching can't change a definition."""

    def __init__(
        self,
        statistics: frozenset[Statistic],
        reducers: Reducers | None = None,
        *,
        channels_first: bool = False,
        head_size: int = 0,
    ) -> None:
        """Observe what some statistics need. `channels_first`: dimension 1 of the layer's tensors is its channels.

        `head_size`: how many channels a head has, where the channels are those of heads.
        """
        self.plan = plan_of(statistics, head_size)
        self.channels_first = channels_first
        self.reducers = reducers or Reducers()
        self.dtype = ""
        self.last_shape: tuple[int, ...] = ()
        self.token_axis = False
        self.kept = Accumulator(self.reducers.arena)
        self._dtype: torch.dtype | None = None
        self._repeats = self.plan.repeats and not channels_first
        self._repeated: Callable[[int], None] | None = None
        self._reducer: Reducer
        self.owners = array("q")

    def add(
        self,
        x: Tensor,
        keep: Sequence[Tensor | None],
        samples: Sequence[int],
        call: int,
        token_axis: bool,
        routing: Routing | None = None,
    ) -> None:
        """Reduce one tensor: [B, T, C] with a token axis, else [B, n]. `keep`: the indices of the tokens that count."""
        # A site keeps its dtype, so that a further call costs one comparison.
        reducer = self._reducer if x.dtype is self._dtype else self._begin(x)
        self.token_axis, self._repeated = token_axis, None
        if token_axis and len(x) > 1 and x.ndim == 3 and routing is None and self._add_together(x, keep, samples, call):
            return
        # One unbind, and a detach only with gradients: every step here costs time for each tensor.
        rows = (x.detach() if x.requires_grad else x).unbind()
        for row, kept, sample in zip(rows, keep, samples, strict=True):
            # A sample of padding alone, or an expert that no token reached, is no population.
            if (kept is not None and not len(kept)) or not row.numel():
                continue
            self.owners.extend((sample, call, row.shape[0] if token_axis else 0))
            reducer.reduce(row, kept, sample, self.plan, self.kept)
        self.last_shape = x.shape
        if routing is not None and self.plan.experts:
            self._count_experts(routing, rows, keep)

    def repeat(self, x: Tensor, sample: int | None, call: int) -> bool:
        """Reduce a tensor that is the whole of a sample, if the site needs no more than a kernel does by its address.

        `sample`: None where the tensor has several, or some of its tokens don't count. Returns False where nothing was
        reduced.
        """
        if sample is None or not self._repeats or type(x) is not Tensor or not (x.is_cpu and x.is_contiguous()):
            return False
        if (self._repeated is None or x.dtype is not self._dtype or x.shape != self.last_shape) and not self._like(x):
            return False
        self.owners.extend((sample, call, self.last_shape[1]))
        self._repeated(x.data_ptr())  # type: ignore[misc]
        return True

    def _like(self, x: Tensor) -> bool:
        """Get ready for tensors of a shape [1, T, C]; say whether there is a way that costs less for them."""
        if x.ndim != 3 or len(x) != 1 or not x.numel():
            return False
        reducer = self._reducer if x.dtype is self._dtype else self._begin(x)
        self._repeated = reducer.repeated(x.shape[1], x.shape[2], self.plan, self.kept)
        self._repeats = self._repeated is not None
        self.last_shape, self.token_axis = x.shape, True
        return self._repeats

    def _add_together(self, x: Tensor, keep: Sequence[Tensor | None], samples: Sequence[int], call: int) -> bool:
        """Reduce samples without padding in one launch: 30 µs less for each, a quarter of a forward of 32 tokens."""
        count, length, channels = x.shape
        together = x.detach().reshape(-1, channels)
        if any(each is not None for each in keep) or not together.numel():
            return False
        if not self._reducer.reduce_packed(together, (length,) * count, self.plan, self.kept):
            return False
        for sample in samples:
            self.owners.extend((sample, call, length))
        self.last_shape = x.shape
        return True

    def add_packed(self, x: Tensor, lengths: tuple[int, ...], samples: Sequence[int], call: int) -> None:
        """Reduce the tokens of several samples, one after the other in x [N, C]; rows behind them don't count."""
        reducer = self._reducer if x.dtype is self._dtype else self._begin(x)
        x = x.detach() if x.requires_grad else x
        if not reducer.reduce_packed(x, lengths, self.plan, self.kept):
            for sample, rows in zip(samples, torch.split(x[: sum(lengths)], list(lengths)), strict=True):
                self.add(rows[None], [None], [sample], call, token_axis=True)
            return
        self.token_axis, self._repeated = True, None
        for sample, length in zip(samples, lengths, strict=True):
            self.owners.extend((sample, call, length))
        self.last_shape = (1, lengths[-1], *x.shape[1:])

    def _begin(self, x: Tensor) -> Reducer:
        dtype = str(x.dtype).removeprefix("torch.")
        if self.dtype not in ("", dtype):
            raise InfraError(f"one layer was called with {self.dtype} and with {dtype}: their counts can't be added")
        self.dtype, self._dtype, self._reducer = dtype, x.dtype, self.reducers.for_tensor(x)
        return self._reducer

    def _count_experts(self, routing: Routing, rows: Sequence[Tensor], keep: Sequence[Tensor | None]) -> None:
        for row, kept, route in zip(rows, keep, routing.of_rows(len(rows)), strict=True):
            if (kept is None or len(kept)) and row.numel():
                counting = route if kept is None else route.index_select(0, kept)
                self.kept.take(EXPERTS.key, routing.counts(counting))
                for each in self.plan.expert_ranges:
                    self.kept.of_range(str(each)).take(EXPERTS.key, routing.counts(counting[each.tokens]))

    def tensors(self) -> Iterator[Tensor]:
        """Yield the numbers that are tensors, complete."""
        self.reducers.finish()
        for kept in (self.kept, *self.kept.ranges.values()):
            for rows in kept.rows.values():
                if isinstance(rows, list):
                    yield from rows
            yield from (value for value in kept.pooled.values() if isinstance(value, Tensor))

    def numbers(self, statistics: frozenset[Statistic], fetched: Transfer | None = None) -> SiteNumbers:
        """Return the numbers in the host's memory. `statistics`: those that the site has."""
        self.reducers.finish()
        fetch = fetched or Transfer(self.tensors())
        owners = self.reducers.owners_of(self.owners)
        arrays = self._arrays_of(self.kept, owners, fetch)
        for text, kept in self.kept.ranges.items():
            found = self._arrays_of(kept, owners, fetch)
            arrays |= {InRange.named(text, name): array for name, array in found.items()}
        return SiteNumbers(
            dtype=self.dtype,
            shape=tuple(self.last_shape[1:]),
            token_axis=self.token_axis,
            statistics=statistics,
            sample=owners.sample,
            call=owners.call,
            lengths=owners.lengths,
            arrays=arrays,
        )

    def _arrays_of(self, kept: Accumulator, owners: Owners, fetch: Transfer) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for name, rows in kept.rows.items():
            if name == "tokens":
                maxima, arrays["peaks"], arrays["peak_channels"] = _records_of(rows, owners)
                arrays["token_max"] = floats_of(maxima, self.dtype)
            else:
                ordered = [fetch(rows[index]) for index in owners.order]
                arrays[name] = LAYOUTS[name.partition("/")[0]].join(ordered)
        return arrays | self._arrays_of_sums(kept, fetch)

    def _arrays_of_sums(self, kept: Accumulator, fetch: Transfer) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for name, pooled in kept.pooled.items():
            if isinstance(pooled, Window):
                arrays |= pooled.arrays()
            elif bins := LAYOUTS[name.partition("/")[0]].bins:
                arrays[bins], arrays[name] = _sparse(fetch(pooled))
            else:
                arrays[name] = np.array(fetch(pooled))  # a copy: the pass may go on
        return arrays


def _records_of(rows: Column, owners: Owners) -> tuple[Array, NDArray[np.int32], NDArray[np.int32]]:
    """Return what `joined_records` does of the records of a site, in the order of its owners."""
    if owners.length is not None and (table := rows.table(owners.order)) is not None:
        return table_of_records(table, owners.length)
    return joined_records([rows[index] for index in owners.order], owners.lengths.tolist())


def _sparse(counts: Array) -> tuple[NDArray[np.uint16], Array]:
    """Return the bins that occur, the first axis, and their counts; those of 32 bits are unsigned in a capture."""
    bins = np.flatnonzero(counts.any(axis=1) if counts.ndim == 2 else counts)
    return bins.astype(np.uint16), counts[bins].astype(np.uint32 if counts.itemsize == 4 else np.int64)

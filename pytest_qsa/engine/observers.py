"""Observers: all that is kept of a tensor stream, added up row by row, fetched from the device once at the end."""

from __future__ import annotations

import importlib.util
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import plan
from ..errors import InfraError
from ..numbers import SiteNumbers
from .keeping import Column, Store
from .modules import Routing
from .reductions import TorchReducer
from .transfers import Transfer
from .wants import MAP_SIZE, Wants
from .windows import Window, floats_of


class Reducer(Protocol):
    """Reduces one population to named arrays, on its own device, and adds to the pooled ones.

    `waits`: what `reduce` returns is complete only after `finish`.
    """

    waits: bool

    def reduce(self, row: Tensor, kept: Tensor | None, wants: Wants, pooled: dict[str, Any]) -> dict[str, Any]:
        """Reduce [T, C], or [n] where there is no token axis."""

    def finish(self) -> None:
        """Complete the numbers of all rows."""


@dataclass
class Reducers:
    """The reducers of one pass; `fused` off keeps to torch's operators."""

    fused: bool = True
    _made: dict[tuple[str, torch.dtype], Reducer] = field(default_factory=dict)

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


@cache
def wants_of(statistics: frozenset[str]) -> Wants:
    """Work out what is to be kept; equal statistics are worked out once."""
    return Wants.of(statistics)


class StreamObserver:
    """Reduces the populations of one site, one row at a time, so that batching can't change a definition."""

    def __init__(self, statistics: frozenset[str], reducers: Reducers | None = None) -> None:
        self.wants = wants_of(statistics)
        self.reducers = reducers or Reducers()
        self.dtype = ""
        self.shape: tuple[int, ...] = ()
        self.token_axis = False
        self.store = Store()
        self.owners = array("q")
        self.rows: dict[str, Any] = {}
        self.pooled: dict[str, Any] = {}
        self.maps: dict[str, Tensor] = {}

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
        dtype = str(x.dtype).removeprefix("torch.")
        if self.dtype not in ("", dtype):
            raise InfraError(f"one layer was called with {self.dtype} and with {dtype}: their counts can't be added")
        self.dtype = dtype
        self.shape = tuple(x.shape[1:])
        self.token_axis = token_axis
        reducer = self.reducers.for_tensor(x)
        routes = routing.of_rows(len(x)) if routing is not None and self.wants.experts else [None] * len(x)
        for row, kept, sample, route in zip(x.detach().unbind(), keep, samples, routes, strict=True):
            if (kept is not None and not len(kept)) or not row.numel():
                continue
            self.owners.extend((sample, call, row.shape[0] if token_axis else 0))
            for name, value in reducer.reduce(row, kept, self.wants, self.pooled).items():
                self._keep(name, value, waits=reducer.waits)
            if routing is not None and route is not None:
                counts = routing.counts(route if kept is None else route.index_select(0, kept))
                self._keep(plan.EXPERTS, counts)
            if sample in self.wants.maps and token_axis:
                self.maps.setdefault(self.wants.maps[sample], _map_of(row, kept))

    def _keep(self, name: str, value: Tensor | NDArray[Any], *, waits: bool = False) -> None:
        """Take what a population left; on an accelerator, or where it `waits` to be completed, as it is."""
        if isinstance(value, Tensor) and (waits or value.device.type != "cpu"):
            self.rows.setdefault(name, []).append(value)
            return
        value = value.numpy() if isinstance(value, Tensor) else value
        if name not in self.rows:
            self.rows[name] = Column(self.store, value.dtype, value.shape)
        self.rows[name].append(value)

    def tensors(self) -> Iterator[Tensor]:
        """Yield what is kept as tensors, complete."""
        self.reducers.finish()
        for rows in self.rows.values():
            yield from (row for row in rows if isinstance(row, Tensor))
        yield from (value for value in (*self.pooled.values(), *self.maps.values()) if isinstance(value, Tensor))

    def numbers(self, statistics: frozenset[str], fetched: Transfer | None = None) -> SiteNumbers:
        """Say what was kept, in the host's memory. `statistics`: what the site can say it has."""
        self.reducers.finish()
        fetch = fetched or Transfer(self.tensors())
        owners = np.array(self.owners, dtype=np.int64).reshape(-1, 3)
        order = np.lexsort((owners[:, 1], owners[:, 0]))  # a batch, or a streamed pass, visits all its samples by call
        owners = owners[order]
        arrays: dict[str, Any] = {}
        ordered = {name: [fetch(rows[index]) for index in order] for name, rows in self.rows.items()}
        for name, rows in ordered.items():
            if name in ("peaks", "peak_channels"):
                arrays[name] = _padded(rows)
            elif name == "token_max":
                joined = np.concatenate(rows)
                arrays[name] = joined if joined.dtype.kind == "f" else floats_of(joined, self.dtype)
            elif ":" not in name:
                arrays[name] = np.stack(rows)
        for name, pooled in self.pooled.items():
            if isinstance(pooled, Window):
                arrays |= pooled.arrays()
            elif name in ("counts", "signed_counts"):
                arrays[name.replace("counts", "bins")], arrays[name] = _sparse(fetch(pooled))
            elif name == "channel_counts":
                counts = fetch(pooled)
                occurring = np.flatnonzero(counts.any(axis=1))
                arrays["channel_bins"], arrays[name] = occurring.astype(np.uint16), counts[occurring].astype(np.uint32)
            else:
                arrays[name] = np.array(fetch(pooled))  # a copy: the pass may go on
        return SiteNumbers(
            dtype=self.dtype,
            shape=self.shape,
            token_axis=self.token_axis,
            statistics=statistics,
            sample=owners[:, 0].astype(np.int32),
            call=owners[:, 1].astype(np.int32),
            lengths=owners[:, 2],
            massive={name: np.stack(ordered[name]) for name in self.wants.massive if name in ordered},
            features={name: arrays.pop(name) for name in self.wants.features if name in arrays},
            quantized={name: np.stack(ordered[name]) for name in self.wants.quantizers if name in ordered},
            maps={name: fetch(picture) for name, picture in self.maps.items()},
            **arrays,
        )


def _map_of(row: Tensor, kept: Tensor | None) -> Tensor:
    """Return |x| of [T, C] as at most MAP_SIZE × MAP_SIZE maxima, float32; padding counts as 0."""
    magnitudes = row.abs().float()
    if kept is not None:
        magnitudes = torch.zeros_like(magnitudes).index_copy_(0, kept, magnitudes.index_select(0, kept))
    cell = [-(-size // MAP_SIZE) for size in magnitudes.shape]
    return torch.nn.functional.max_pool2d(magnitudes[None], cell, ceil_mode=True)[0]


def _padded(rows: list[NDArray[Any]]) -> NDArray[np.int32]:
    lengths = np.array([len(row) for row in rows])
    table = np.full((len(rows), lengths.max()), -1, dtype=np.int32)
    table[np.arange(table.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return table


def _sparse(dense: NDArray[Any]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    bins = np.flatnonzero(dense)
    return bins.astype(np.uint16), dense[bins].astype(np.int64)

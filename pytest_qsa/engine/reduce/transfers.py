"""Bringing what a pass has kept on a device to the host: all of it together, since each copy waits for the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AT_ONCE = 1 << 28
"""About so many bytes are copied together, beside which as many are taken on the device."""


class Transfer:
    """Some tensors as arrays on the host. A tensor that is not among them is brought when it is asked for."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._arrays: dict[int, tuple[Tensor, NDArray[Any]]] = {}
        for group in _groups(tensors):
            self._bring(group)

    def _bring(self, group: list[Tensor]) -> None:
        joint = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in group]).cpu().numpy()
        begin = 0
        for tensor in group:
            values = np.empty(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
            values.ravel().view(np.uint8)[:] = joint[begin : begin + tensor.nbytes]
            begin += tensor.nbytes
            self._arrays[id(tensor)] = tensor, values

    def __call__(self, value: Tensor | NDArray[Any]) -> NDArray[Any]:
        """Return the values of a tensor; an array as it is."""
        if not isinstance(value, Tensor):
            return np.asarray(value)
        known = self._arrays.get(id(value))
        return known[1] if known else value.cpu().numpy()


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield those that are on a device, by device and in portions."""
    waiting: dict[torch.device, list[Tensor]] = {}
    sizes: dict[torch.device, int] = {}
    for tensor in tensors:
        device = tensor.device
        if device.type == "cpu" or not tensor.numel():
            continue
        waiting.setdefault(device, []).append(tensor)
        sizes[device] = sizes.get(device, 0) + tensor.nbytes
        if sizes[device] > AT_ONCE:
            yield waiting.pop(device)
            sizes[device] = 0
    yield from waiting.values()

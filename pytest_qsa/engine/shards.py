"""Weights on disk: where each parameter lies in its safetensors file, and reading it into memory of its own.

safetensors maps a whole file into memory; what is read through such a map stays resident until the file is closed. A
streamed model must not hold more than it computes with, so the bytes are read directly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InfraError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a parameter lies. Equal places are one tensor: tied weights share theirs."""

    file: str
    name: str


@dataclass
class Shards:
    """The files of a checkpoint. `index`: parameter → its file, its name there and the dtype that it is wanted in."""

    index: Mapping[str, Mapping[str, str]]
    bytes_read: int = 0
    _headers: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def place(self, key: str) -> Place:
        """Return where a parameter lies."""
        entry = self.index[key]
        return Place(entry["safetensors_file"], entry.get("weight_name", key))

    def read(self, key: str, shape: Sequence[int]) -> Tensor:
        """Read a parameter, in the dtype that the model wants.

        Raises:
            InfraError: the file is missing, cut short, or holds no such tensor, or one of another shape.
        """
        place = self.place(key)
        start, header = self._header(place.file)
        if place.name not in header:
            raise InfraError(f"{place.file} holds no tensor {place.name}")
        stored = header[place.name]
        if stored["dtype"] not in _DTYPES:
            raise InfraError(f"{place.file}: {place.name} is of the type {stored['dtype']}, which torch doesn't know")
        if list(stored["shape"]) != list(shape):
            raise InfraError(
                f"{place.file}: {place.name} is {stored['shape']}, the model's is {list(shape)}: not its checkpoint"
            )
        begin, end = stored["data_offsets"]
        content = np.fromfile(place.file, dtype=np.uint8, count=end - begin, offset=start + begin)
        if content.size < end - begin:
            raise InfraError(f"{place.file} is cut short: {place.name} ends past its end; fetch the checkpoint again")
        self.bytes_read += content.size
        tensor = torch.from_numpy(content).view(_DTYPES[stored["dtype"]]) if content.size else torch.empty(0)
        wanted = self.index[key].get("dtype")
        shaped = tensor.reshape(stored["shape"]) if prod(stored["shape"]) else torch.empty(stored["shape"])
        return shaped.to(getattr(torch, wanted)) if wanted else shaped

    def _header(self, file: str) -> tuple[int, dict[str, Any]]:
        if file not in self._headers:
            try:
                with open(file, "rb") as stream:
                    size = int.from_bytes(stream.read(8), "little")
                    if size > os.fstat(stream.fileno()).st_size:
                        raise ValueError("its header is longer than the file")
                    self._headers[file] = 8 + size, json.loads(stream.read(size))
            except (OSError, ValueError) as error:
                raise InfraError(f"{file} can't be read as safetensors: {error}") from None
        return self._headers[file]

"""Weights on disk: where each parameter lies in its safetensors file, and reading it into memory of its own.

safetensors maps a whole file into memory; what is read through such a map stays resident until the file is closed. A
streamed model must not hold more than it computes with, so the bytes are read directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ...checkpoint import Tensor, tensors_of
from ...common import AnomalyError, InfraError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a parameter lies. Equal places are one tensor: tied weights share theirs."""

    file: str
    name: str


@dataclass
class Shards:
    """The files of a checkpoint. `index`: parameter → its file, its name there and the dtype that it is wanted in."""

    index: Mapping[str, Mapping[str, str]]
    bytes_read: int = 0
    _tables: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def locate(self, key: str) -> StoredTensor:
        """Return where a parameter lies."""
        entry = self.index[key]
        return StoredTensor(entry["safetensors_file"], entry.get("weight_name", key))

    def read(self, key: str, shape: Sequence[int]) -> torch.Tensor:
        """Read a parameter, in the dtype that the model wants.

        Raises:
            AnomalyError: the file is cut short, or holds no such tensor, or one of another shape.
            InfraError: the file is missing, or its dtype isn't known to torch.
        """
        stored = self._entry(self.locate(key))
        if stored.shape != tuple(shape):
            raise AnomalyError(
                f"{stored.path}: {stored.name} is {list(stored.shape)}, the model's is {list(shape)}: "
                "not its checkpoint"
            )
        if stored.dtype not in DTYPES:
            raise InfraError(f"{stored.path}: {stored.name} is of the type {stored.dtype}, which torch doesn't know")
        content = np.fromfile(stored.path, dtype=np.uint8, count=stored.stop - stored.start, offset=stored.start)
        self.bytes_read += content.size
        tensor = torch.from_numpy(content).view(DTYPES[stored.dtype]).reshape(stored.shape)
        wanted = self.index[key].get("dtype")
        return tensor.to(getattr(torch, wanted)) if wanted else tensor

    def _entry(self, stored: StoredTensor) -> Tensor:
        if stored.file not in self._tables:
            self._tables[stored.file] = {tensor.name: tensor for tensor in tensors_of(Path(stored.file))}
        if stored.name not in self._tables[stored.file]:
            raise AnomalyError(f"{stored.file} holds no tensor {stored.name}")
        return self._tables[stored.file][stored.name]

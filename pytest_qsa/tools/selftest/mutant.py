"""A lazy copy of a checkpoint: links to the original's files, and new files only where a fault changes something."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ...checkpoint import INDEX, BlockTensor, Folder, Tensor, encoded, metadata_of, scale_values
from ...common import write_atomically

CHUNK = 1 << 24


class ChangedTensor(NamedTuple):
    """A changed tensor: its dtype as safetensors names it, its shape, and its raw numbers."""

    dtype: str
    shape: tuple[int, ...]
    raw: Array


@dataclass
class Mutant:
    """A copy with changes. Nothing is written before `save`, and never into the original.

    `changes`: name of a tensor → its new content, None if it is left out. `texts`: name of a file → its new text.
    """

    source: Folder
    changes: dict[str, ChangedTensor | None] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def raw(self, name: str) -> Array:
        """Return a copy of a tensor's raw numbers, with the changes so far."""
        changed = self.changes.get(name)
        # A copy, because the raw numbers of the original are mapped from its file.
        return np.array(changed.raw if changed else self.source.tensors[name].raw())

    def put(self, name: str, raw: Array) -> None:
        """Replace the raw numbers of a tensor; its dtype and shape stay."""
        tensor = self.source.tensors[name]
        self.changes[name] = ChangedTensor(tensor.dtype, tensor.shape, raw)

    @contextmanager
    def edit(self, name: str) -> Iterator[Array]:
        """Yield a tensor's raw numbers, with the changes so far, to be changed in place."""
        raw = self.raw(name)
        yield raw
        self.put(name, raw)

    @contextmanager
    def edit_values(self, name: str) -> Iterator[NDArray[np.float64]]:
        """Yield the original's values of floats or of exponents, to be changed in place and rounded to its dtype.

        Of a tensor of blocks the scales and minima of its blocks, [blocks, per block].
        """
        tensor = self.source.tensors[name]
        if isinstance(tensor, BlockTensor):
            raw = self.raw(name)
            scales = tensor.scales(raw)
            yield scales
            self.put(name, tensor.with_scales(raw, scales))
            return
        values = scale_values(tensor)
        yield values
        self.put(name, encoded(values, "F8_E8M0" if tensor.dtype == "U8" else tensor.dtype))

    def replace(self, name: str, dtype: str, values: NDArray[np.float64]) -> None:
        """Replace a tensor by one of another dtype or shape."""
        self.changes[name] = ChangedTensor(dtype, values.shape, encoded(values, dtype))

    def drop(self, name: str) -> None:
        """Leave a tensor out."""
        self.changes[name] = None

    @property
    def changed(self) -> bool:
        """Whether anything differs from the original: a swap of equal scales makes no difference."""
        return bool(self.texts) or any(self._differs(name, content) for name, content in self.changes.items())

    def _differs(self, name: str, content: ChangedTensor | None) -> bool:
        tensor = self.source.tensors[name]
        # First, because numpy can't compare arrays of other shapes element by element.
        if content is None or (content.shape, content.dtype) != (tensor.shape, tensor.dtype):
            return True
        return bool((np.asarray(tensor.raw()) != content.raw).any())

    def save(self, folder: Path) -> Path:
        """Write the copy into a new folder, with links to the files that are unchanged.

        Raises:
            OSError: the folder can't be written.
        """
        folder.mkdir(parents=True)
        touched = {self.source.tensors[name].path for name in self.changes}
        for file in self.source.path.iterdir():
            if file.is_file() and file not in touched and file.name not in self.texts:
                _link(file, folder / file.name)
        for path in touched:
            if path.name == self.source.gguf_file:
                self._patch(path, folder / path.name)
            else:
                _rewrite(path, folder / path.name, self._contents(path))
        for name, text in self.texts.items():
            write_atomically(folder / name, text)
        # transformers looks a tensor up where the index says, so that the index must not name one that is
        # gone.
        if self.source.indexed and any(content is None for content in self.changes.values()):
            self._reindex(folder)
        return folder

    def _patch(self, path: Path, target: Path) -> None:
        """Copy a GGUF file and write the changed tensors over the original's, whose sizes they have."""
        shutil.copyfile(path, target)
        with target.open("r+b") as out:
            for name, content in self.changes.items():
                assert content is not None
                out.seek(self.source.tensors[name].start)
                out.write(np.ascontiguousarray(content.raw).tobytes())

    def _contents(self, path: Path) -> dict[str, Tensor | ChangedTensor]:
        own = {name: tensor for name, tensor in self.source.tensors.items() if tensor.path == path}
        contents = {name: self.changes.get(name, tensor) for name, tensor in own.items()}
        return {name: content for name, content in contents.items() if content is not None}

    def _reindex(self, folder: Path) -> None:
        index = dict(self.source.json(INDEX))
        dropped = {name for name, content in self.changes.items() if content is None}
        index["weight_map"] = {name: file for name, file in self.source.indexed.items() if name not in dropped}
        write_atomically(folder / INDEX, json.dumps(index))


def _link(file: Path, target: Path) -> None:
    try:
        # A link to the file itself: in the hub's cache the files of a snapshot are relative links.
        os.symlink(file.resolve(), target)
    except OSError:  # a file system or an account without links
        shutil.copyfile(file, target)


def _rewrite(path: Path, target: Path, contents: Mapping[str, Tensor | ChangedTensor]) -> None:
    """Write a safetensors file anew; unchanged tensors are copied in chunks, so that any size fits in memory."""
    header: dict[str, Any] = {"__metadata__": metadata_of(path) or {"format": "pt"}}
    offset = 0
    for name, content in contents.items():
        size = content.stop - content.start if isinstance(content, Tensor) else content.raw.nbytes
        ends = [offset, offset + size]
        header[name] = {"dtype": content.dtype, "shape": list(content.shape), "data_offsets": ends}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    with target.open("wb") as out, path.open("rb") as source:
        out.write(len(text).to_bytes(8, "little") + text)
        for content in contents.values():
            if isinstance(content, ChangedTensor):
                out.write(np.ascontiguousarray(content.raw).tobytes())
                continue
            source.seek(content.start)
            left = content.stop - content.start
            while left:
                piece = source.read(min(left, CHUNK))
                out.write(piece)
                left -= len(piece)

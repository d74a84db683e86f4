"""A lazy copy of a checkpoint: links to the original's files, and new files only where a fault changes something."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ...checkpoint import INDEX, BlockTensor, Folder, Tensor, encoded, format_of, layer_of, metadata_of, scale_values
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
    `moved`: name of a tensor → the file that it goes to. `added`: name of a file → what it holds besides: new tensors,
    or second copies of some whose first ones count for the index.
    """

    source: Folder
    changes: dict[str, ChangedTensor | None] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    added: dict[str, dict[str, ChangedTensor]] = field(default_factory=dict)

    def home(self, name: str) -> str:
        """Return the file that holds a tensor of the original in the copy."""
        return self.moved.get(name, self.source.tensors[name].file)

    @property
    def layers(self) -> set[str]:
        """The layers that the changes touch, those of packed experts by their names too."""
        own = {layer_of(name) for name in (*self.changes, *(name for each in self.added.values() for name in each))}
        packed = format_of(self.source).experts.items()
        return own | {name for name, (holder, _, place) in packed if {holder, f"{holder}.{place.tensor}"} & own}

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
        changed = (self._differs(name, content) for name, content in self.changes.items())
        return bool(self.texts or self.added) or any(changed)

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
        tensors = self.source.tensors
        touched = {tensors[name].file for name in (*self.changes, *self.moved)} | {*self.moved.values(), *self.added}
        for file in self.source.path.iterdir():
            if file.is_file() and file.name not in touched and file.name not in self.texts:
                _link(file, folder / file.name)
        for name in sorted(touched):
            if name == self.source.gguf_file:
                self._patch(self.source.path / name, folder / name)
            elif contents := self._contents(name):
                _rewrite(folder / name, contents)
        for name, text in self.texts.items():
            write_atomically(folder / name, text)
        # transformers looks a tensor up where the index says, so that the index must not name one that is
        # gone.
        new = any(name not in tensors for added in self.added.values() for name in added)
        if self.moved or (self.source.indexed and (new or None in self.changes.values())):
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

    def _contents(self, file: str) -> dict[str, Tensor | ChangedTensor]:
        own = {name: tensor for name, tensor in self.source.tensors.items() if self.home(name) == file}
        contents = {name: self.changes.get(name, tensor) for name, tensor in own.items()}
        kept = {name: content for name, content in contents.items() if content is not None}
        return kept | self.added.get(file, {})

    def _reindex(self, folder: Path) -> None:
        # an index of a checkpoint of one file is new
        index = dict(self.source.json(INDEX) or {"metadata": {}})
        names = [name for name in self.source.indexed or self.source.tensors if self.changes.get(name, ...) is not None]
        homes = {name: self.moved.get(name) or self.source.indexed[name] for name in names}
        for file, added in self.added.items():
            homes |= {name: file for name in added if name not in homes}
        write_atomically(folder / INDEX, json.dumps(index | {"weight_map": homes}))


def _link(file: Path, target: Path) -> None:
    try:
        # A link to the file itself: in the hub's cache the files of a snapshot are relative links.
        os.symlink(file.resolve(), target)
    except OSError:  # a file system or an account without links
        shutil.copyfile(file, target)


def _rewrite(target: Path, contents: Mapping[str, Tensor | ChangedTensor]) -> None:
    """Write a safetensors file anew; unchanged tensors are copied in chunks, so that any size fits in memory."""
    sources = {content.path for content in contents.values() if isinstance(content, Tensor)}
    metadata = {key: text for path in sources for key, text in metadata_of(path).items()}
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    offset = 0
    for name, content in contents.items():
        size = content.stop - content.start if isinstance(content, Tensor) else content.raw.nbytes
        ends = [offset, offset + size]
        header[name] = {"dtype": content.dtype, "shape": list(content.shape), "data_offsets": ends}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for content in contents.values():
            if isinstance(content, ChangedTensor):
                out.write(np.ascontiguousarray(content.raw).tobytes())
            else:
                _copy(content, out)


def _copy(tensor: Tensor, out: BinaryIO) -> None:
    with tensor.path.open("rb") as source:
        source.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            piece = source.read(min(left, CHUNK))
            out.write(piece)
            left -= len(piece)

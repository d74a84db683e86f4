"""A checkpoint's folder as the static checks see it: its tensors by name, its configuration, its layers in order."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common import InfraError
from .tensors import Tensor, tensors_of

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Folder:
    """A checkpoint on disk. Nothing is read before it is asked for; tensors come from the headers.

    `gguf_file`: the one file that is read instead of safetensors.
    """

    path: Path
    gguf_file: str | None = None

    @cached_property
    def _gguf(self) -> tuple[list[Tensor], dict[str, Any], dict[str, int]]:
        from .formats.gguf import read_gguf

        assert self.gguf_file is not None
        return read_gguf(self.path / self.gguf_file)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The tokens of a GGUF file by id; empty for a folder, whose tokenizer.json has more to say."""
        return self._gguf[2] if self.gguf_file else {}

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name, in the natural order of their names.

        Raises:
            InfraError: there are none, or a file is damaged.
        """
        files = sorted(self.path.glob("*.safetensors"))
        if self.gguf_file:
            found = {tensor.name: tensor for tensor in self._gguf[0]}
        elif files:
            found = {tensor.name: tensor for file in files for tensor in tensors_of(file)}
        else:
            raise InfraError(f"{self.path} holds no .safetensors file, which is what static checks read")
        return {name: found[name] for name in sorted(found, key=natural)}

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Each module that owns tensors, in natural order: its name → its tensors by part, as `weight_scale`."""
        layers: dict[str, dict[str, Tensor]] = {}
        for tensor in self.tensors.values():
            layers.setdefault(tensor.layer, {})[tensor.part] = tensor
        return layers

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json, or what a GGUF file says in its place.

        Raises:
            InfraError: it is missing or no JSON.
        """
        if self.gguf_file:
            return self._gguf[1]
        content = self.json("config.json")
        if not isinstance(content, dict):
            raise InfraError(f"{self.path} holds no config.json")
        return content

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The configuration of the language model: config.json, or its part of that name in a multimodal one."""
        part = self.config.get("text_config")
        return {**self.config, **part} if isinstance(part, dict) else self.config

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The `quantization_config`; empty for a checkpoint that declares none."""
        declared = self.text_config.get("quantization_config")
        return declared if isinstance(declared, dict) else {}

    def json(self, name: str) -> Any:
        """Return a JSON file's content; None where there is no such file.

        Raises:
            InfraError: it is no JSON.
        """
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InfraError(f"{file} is no JSON: {error}") from None

    @cached_property
    def indexed(self) -> Mapping[str, str]:
        """What the index of a sharded checkpoint says: tensor → file; empty for one of a single file."""
        index = self.json(INDEX) or {}
        return dict(index.get("weight_map") or {})


def open_folder(path: str | Path, revision: str | None = None, gguf_file: str | None = None) -> Folder:
    """Open a folder, or the local copy of a hub id; nothing is fetched.

    Raises:
        InfraError: there is no such folder and no such id in the local cache.
    """
    if Path(path).is_dir():
        return Folder(Path(path), gguf_file)
    try:
        from huggingface_hub import snapshot_download

        return Folder(Path(snapshot_download(str(path), revision=revision, local_files_only=True)), gguf_file)
    except Exception:  # a malformed id and an absent one are the same to the reader
        raise InfraError(
            f"'{path}' is no folder here and no hub id in the local cache; static checks fetch nothing: "
            f"run `hf download {path}` first, or give a folder"
        ) from None


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sorting key by which layers.2 comes before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def kind_of(name: str) -> str:
    """Return a name with stars for its numbers: what it has in common with its siblings in other blocks."""
    return NUMBER.sub("*", name)

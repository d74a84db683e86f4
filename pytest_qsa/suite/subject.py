"""The subject: a model under test with its data. Plain values; nothing here loads anything."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..checkpoint import Files, open_folder
from ..common import InfraError
from .datasets import local_path
from .sections import Data, Memory, Model


@dataclass(frozen=True)
class Subject:
    """One model with its data: loaded once, run once. `folder`: what the suite's relative paths are relative to."""

    name: str
    model: Model | None
    data: Data
    memory: Memory
    folder: Path
    checkpoint: str | None = None
    fixture: str = ""
    """Which fixture gives the model, where the suite names none."""

    @cached_property
    def path(self) -> str:
        """The checkpoint's folder if there is one, else the hub id; empty for a factory or a fixture.

        Of a served model its address, or the file of what it said.
        """
        if self.checkpoint is not None:
            return self.checkpoint
        if self.model is not None and self.model.served is not None:
            return self.model.served.url
        named = (self.model.path or self.model.logprobs if self.model else None) or ""
        return located(self.folder, named) if named else named

    @property
    def key(self) -> str:
        """Equal for subjects that share one pass, whatever their names and suites."""
        model = self.model.measured if self.model else {}
        if self.model and self.model.reference:
            model["reference"] = located(self.folder, self.model.reference)
        data = self.data.model_dump()
        if (own := local_path(self.data, self.folder)) is not None:
            data["source"] = f"custom:{own.resolve()}"
        text = json.dumps([self.path, self.fixture, model, data, self.memory.model_dump()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def located(folder: Path, named: str) -> str:
    """Return the absolute path of what a suite in `folder` names, if it is there; else the name: a hub id."""
    local = folder / named
    return os.path.abspath(local) if local.exists() else named


def reference_of(subject: Subject) -> Subject:
    """Return the reference as a subject of the same data; `org/name@revision` pins a hub id."""
    assert subject.model is not None
    assert subject.model.reference is not None
    return replace(_other(subject, subject.model.reference), fixture="")


def is_kept(subject: Subject) -> bool:
    """Say whether the reference is a file that was kept, or is to be: its name says so before it is there."""
    named = subject.model.reference if subject.model else None
    return bool(named) and (str(named).endswith(".qsa") or kept_reference(subject) is not None)


def kept_reference(subject: Subject) -> Path | None:
    """Return the file of a reference that was kept as a capture; None where it is a model."""
    named = subject.model.reference if subject.model else None
    local = subject.folder / named if named else None
    return local if local is not None and local.is_file() else None


def files_of(subject: Subject) -> Files:
    """Return the files that static checks read: the subject's, and its reference's where that is a checkpoint.

    Raises:
        InfraError: the subject is no checkpoint, or isn't here.
    """
    model = subject.model
    if model is None or not subject.path or model.logprobs_only:
        raise InfraError("static checks read a checkpoint's files, and this subject has none here: give model.path")
    reference = None
    if model.reference is not None:
        local = subject.folder / model.reference
        if not local.is_file():  # a kept reference capture has no settings
            reference = open_folder(local if local.is_dir() else model.reference)
    return Files(open_folder(subject.path, model.revision, model.gguf_file), reference)


def stored_quantized(subject: Subject) -> list[str]:
    """Return the layers that the subject's files hold quantized; none without files, or for a part of a model."""
    if subject.model is None or subject.model.submodule:
        return []
    try:
        return files_of(subject).stored_quantized
    except InfraError:  # a factory, a fixture, another format than safetensors
        return []


def previous_of(subject: Subject) -> Subject:
    """Return the last release as a subject of the same data; `org/name@revision` pins a hub id."""
    assert subject.model is not None
    assert subject.model.previous is not None
    return _other(subject, subject.model.previous)


def _other(subject: Subject, named: str) -> Subject:
    """Return another checkpoint as a subject of the same data."""
    assert subject.model is not None
    path, _, revision = (named, "", "") if (subject.folder / named).exists() else named.partition("@")
    sources = {"path": path, "factory": None, "served": None, "logprobs": None, "gguf_file": None, "require": None}
    model = subject.model.model_copy(update={**sources, "revision": revision or None, "previous": None})
    return replace(subject, name=named, model=model, checkpoint=None)


@dataclass(frozen=True)
class Checkpoint:
    """One `--qsa-model [NAME=]PATH`. Without a name it meets the baselines of the suite's own model."""

    name: str | None
    path: str
    label: str
    """What stands in the ids of tests; no two are alike."""

    @classmethod
    def parse_all(cls, texts: Sequence[str]) -> list[Checkpoint]:
        """Read all options of a run."""
        checkpoints = [cls.parse(text) for text in texts]
        labels = Counter(checkpoint.label for checkpoint in checkpoints)
        return [
            replace(checkpoint, label=f"{checkpoint.label}.{index}") if labels[checkpoint.label] > 1 else checkpoint
            for index, checkpoint in enumerate(checkpoints, 1)
        ]

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read one option; a folder's path becomes absolute, relative to where one stands."""
        name, equals, path = text.partition("=")
        if not equals:
            name, path = "", text
        folder = Path(path).expanduser()
        return cls(name or None, os.path.abspath(folder) if folder.exists() else path, name or Path(path).name)

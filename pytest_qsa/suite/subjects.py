"""The subject: a model under test with its data; and data sets by name, with their copies in the hub's cache.

Plain values; nothing here loads anything, for the fingerprint reads the copies as well, without the loader.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from ..captures import Request
from ..checkpoint import ADAPTER, Files, Folder, base_of, open_folder
from ..common import InfraError, VllmProgram, VllmWords, vllm_program
from .resolved_settings import resolve_settings
from .sections import SELF, Data, Engine, Generation, Memory, Model

NO_WORDS = VllmWords()


@dataclass(frozen=True)
class Subject:
    """One model with its data: loaded once, run once. Where a suite names no model, a fixture gives it.

    `folder`: what the suite's relative paths are relative to. `checkpoint`: stands in for the model's own path.
    `fixture`: which fixture gives the model. `files_only`: it is read, and never run. `vllm`: what options say of
    where vLLM is. `generation`: which prompts it answers; None where the suite says nothing of them.
    """

    name: str
    model: Model | None
    data: Data
    memory: Memory
    folder: Path
    checkpoint: str | None = None
    fixture: str = ""
    files_only: bool = False
    vllm: VllmWords = NO_WORDS
    generation: Generation | None = None

    @property
    def baseline_name(self) -> str:
        """The name of the folder of its baselines: engines and quantized KV caches have their own, NAME@vllm."""
        if self.model is None or self.files_only:
            return self.name
        engine, cache = self.model.engine.name, self.model.kv_cache or self.model.engine.kv_cache_dtype
        apart = [engine] * (engine != "transformers") + [f"kv-{cache}"] * (cache is not None)
        return "@".join(filter(None, (self.name, "+".join(apart))))

    @cached_property
    def named(self) -> NamedSubject:
        """The same subject as a `NamedSubject`: a suite names its model.

        Raises:
            InfraError: no suite does.
        """
        if self.model is None:
            raise InfraError("the suite has no section 'model', and no fixture 'qsa_model' stands in for it")
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return NamedSubject(**own)

    @cached_property
    def of_files(self) -> NamedSubject:
        """The same checkpoint as far as its files alone say: nothing that decides how a model runs makes another one.

        Raises:
            InfraError: as `named`.
        """
        own = ("dtype", "engine", "attn_implementation", "kv_cache", "trust_remote_code")
        running = (*own, "allow_unexpected", "allow_idle", "require")
        defaults = {name: Model.model_fields[name].default for name in running}
        model = self.named.model.model_copy(update={**defaults, "weights": "files"})
        return replace(self.named, model=model, data=Data(), memory=Memory(), files_only=True, generation=None)

    def divided(self, requests: Iterable[Request]) -> tuple[list[Request], list[Request]]:
        """Return the requests that a pass answers, and those of weights that the files answer.

        These are all if the suite says so, else the statistics that only the files can answer.
        """
        of_pass: list[Request] = []
        of_files: list[Request] = []
        files = self.model is not None and self.model.weights == "files"
        for request in requests:
            if request.site != "weight":
                of_pass.append(request)
                continue
            own = frozenset(each for each in request.statistics if files or each.of_files)
            if own or files:
                of_files.append(replace(request, statistics=own))
            if request.statistics - own or not (own or files):
                of_pass.append(replace(request, statistics=request.statistics - own))
        return of_pass, of_files

    def sources(self, requests: Sequence[Request]) -> list[tuple[Subject, list[Request]]]:
        """Return what answers the requests: the subject by its pass, and its files by themselves."""
        of_pass, of_files = self.divided(requests)
        found: list[tuple[Subject, list[Request]]] = [(self.of_files, of_files)] if of_files else []
        return [*found, (self, of_pass)] if of_pass or not of_files else found

    @cached_property
    def reference(self) -> NamedSubject | Path | None:
        """What the model is compared with: another model with the same data, or the file of a recorded one.

        `org/name@revision` pins a hub id. A name that ends in `.qsa` is a file's before the file is there.
        """
        named = self.model.reference if self.model else None
        if named is None:
            return None
        if named == SELF:
            model = self.named.model.model_copy(update={"kv_cache": None, "reference": None, "previous": None})
            return replace(self.named, name=SELF, model=model)
        local = self.folder / named
        if local.is_file() or local.suffix == ".qsa":
            return local
        found = self.named.with_checkpoint(named)
        # The original is run by what everybody can compare with, whatever engine the subject is for.
        return replace(found, model=found.model.model_copy(update={"engine": Engine()}))

    @property
    def vllm_program(self) -> VllmProgram | None:
        """Where the vLLM is that runs the model; None where transformers does.

        Raises:
            InfraError: nobody says where it is.
        """
        if self.model is None or self.model.engine.name != "vllm" or self.files_only:
            return None
        return vllm_program(self.vllm)

    @property
    def is_answered_by_reference(self) -> bool:
        """Whether the data are answers that the reference gives."""
        return self.data.answers is not None and self.reference is not None

    @property
    def local_folder(self) -> Path | None:
        """The folder of the model's files: its path, or the hub's cache of its id; None where neither is here.

        Of an adapter it is the adapter's. Looked up each time, for loading the model may bring a hub id into the cache.

        Raises:
            InfraError: the hub's cache can't be read.
        """
        if self.model is None or not self.path or self.model.logprobs_only:
            return None
        return Path(self.path) if Path(self.path).is_dir() else cached_snapshot(self.path, self.model.revision)

    @property
    def base_folder(self) -> Path | None:
        """The folder of the model's configuration and weights, as `local_folder`: of an adapter it is its base's.

        Raises:
            AnomalyError: an adapter's configuration can't be read.
            InfraError: the hub's cache can't be read, or an adapter's base isn't known.
        """
        named = self._base_apart
        if named is None:
            return self.local_folder
        return Path(named[0]) if Path(named[0]).is_dir() else cached_snapshot(*named)

    @property
    def base_path(self) -> str:
        """The folder or hub id of an adapter's base, where it lies apart from the adapter; else empty.

        Raises:
            AnomalyError: the adapter's configuration can't be read.
            InfraError: its base isn't known.
        """
        return self._base_apart[0] if self._base_apart else ""

    @property
    def _base_apart(self) -> tuple[str, str | None] | None:
        folder = self.local_folder
        return base_of(folder, self.base) if folder is not None else None

    @cached_property
    def path(self) -> str:
        """The checkpoint's folder if there is one, else the hub id; empty for a factory or a fixture.

        For a served model its address, or the file of its answers.
        """
        if self.checkpoint is not None:
            return self.checkpoint
        if self.model is not None and self.model.served is not None:
            return self.model.served.url
        named = (self.model.path or self.model.logprobs if self.model else None) or ""
        return located(self.folder, named) if named else named

    @property
    def base(self) -> str:
        """What the suite names as the base of an adapter, as `path`; empty where it names none, or for no adapter."""
        if self.model is None or self.model.base is None:
            return ""
        # `--qsa-model` may give the merged model to the suite of its adapter
        if self.checkpoint is not None and Path(self.path).is_dir() and not (Path(self.path) / ADAPTER).is_file():
            return ""
        return located(self.folder, self.model.base)

    @property
    def key(self) -> str:
        """Equal for subjects that share one pass, whatever their names and suites."""
        model = self.model.measured if self.model else {}
        if self.model and self.model.reference:
            model["reference"] = located(self.folder, self.model.reference)
        data = self.data.model_dump()
        if (own := local_path(self.data, self.folder)) is not None:
            data["source"] = f"custom:{own.resolve()}"
        # Sorted keys, because the hash must not depend on the order in which settings were made.
        settings = [self.path, self.base, self.fixture, model, data, self.memory.model_dump(), self.files_only]
        if self.generation is not None:
            settings.append(self.generation.model_dump())
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class NamedSubject(Subject):
    """A subject whose model a suite names, so that it can be loaded."""

    model: Model

    @property
    def named(self) -> NamedSubject:
        """The subject itself."""
        return self

    def with_checkpoint(self, named: str) -> NamedSubject:
        """Return another checkpoint as a subject of the same data, without the keys that describe this one's files."""
        # The name of a folder may hold an @ as well.
        path, _, revision = (named, "", "") if (self.folder / named).exists() else named.partition("@")
        source = {"path": path, "factory": None, "served": None, "logprobs": None, "gguf_file": None, "require": None}
        # the last release of an adapter is one of the same base
        release = named == self.model.previous
        base = self.model.base if (self.folder / path / ADAPTER).is_file() and release else None
        # and ran as this one does; an original runs with a cache in its own dtype
        own = {"base": base, "kv_cache": self.model.kv_cache if release else None}
        model = self.model.model_copy(update={**source, **own, "revision": revision or None, "previous": None})
        return replace(self, name=named, model=model, checkpoint=None)


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """Return the folder of a hub id in the cache; None where it isn't there, or is no hub id.

    Raises:
        InfraError: the cache can't be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    # A path that does not exist is no valid hub id either.
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    except OSError as error:
        raise InfraError(f"{repository} can't be looked up in the hub's cache: {error}") from error


def located(folder: Path, named: str) -> str:
    """Return the absolute path of what a suite in `folder` names, if it is there; else the name: a hub id."""
    local = folder / named
    return os.path.abspath(local) if local.exists() else named


def files_of(subject: Subject, cache: Path | None = None) -> Files:
    """Return the files of a subject, and those of its reference where that is a checkpoint.

    `cache`: the folder that remembers what the model classes take for settings which a configuration doesn't state.

    Raises:
        InfraError: the subject is no checkpoint, or isn't here.
    """
    own, reference = own_folder(subject), subject.reference
    if not isinstance(reference, NamedSubject):  # a recorded one has neither settings nor weights
        return Files(own)
    return Files(own, own_folder(reference), partial(resolve_settings, cache=cache))


def own_folder(subject: Subject) -> Folder:
    """Return the files of the subject's own model, of an adapter those of its base.

    Raises:
        AnomalyError: an adapter's configuration can't be read.
        InfraError: the subject is no checkpoint, or isn't here.
    """
    model = subject.model
    if model is None or not subject.path or model.logprobs_only:
        raise InfraError("this reads a checkpoint's files, and the subject has none here: give model.path")
    return open_folder(subject.path, model.revision, model.gguf_file, subject.base)


def loaded_files(subject: Subject) -> Files | None:
    """Return the subject's own files; None where they don't tell what was loaded: without any, or for a part."""
    if subject.model is None or subject.model.submodule:
        return None
    try:
        # without the reference's files: damage there must not stop the pass over the subject
        files = Files(own_folder(subject))
        _ = files.folder.layers
    except InfraError:  # a factory, a fixture, another format than safetensors
        return None
    return files


def previous_of(subject: Subject) -> NamedSubject:
    """Return the last release as a subject of the same data; `org/name@revision` pins a hub id.

    Raises:
        InfraError: the suite names none.
    """
    own = subject.named
    if own.model.previous is None:
        raise InfraError("the suite names no last release, model.previous")
    return own.with_checkpoint(own.model.previous)


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
        folder = Path(os.path.expanduser(path))
        return cls(name or None, os.path.abspath(folder) if folder.exists() else path, name or Path(path).name)


DOCUMENTS = 10_000
"""How many documents of a set are read: the first ones, so that streaming and a copy in the cache give the same."""

Rule = Literal["packed", "stream", "document"]
"""How windows are drawn. `packed`: the texts are joined and cut into windows, of which the seed chooses. `stream`: at
random offsets of the joined texts. `document`: at a random offset of a random text that is long enough."""


@dataclass(frozen=True)
class HubSet:
    """A set of the hub. `large`: it is streamed unless a copy lies in the cache.

    `column`: None for `text`, or `messages` of conversations.
    """

    repository: str
    subset: str | None = None
    split: str = "train"
    column: str | None = None
    rule: Rule = "packed"
    large: bool = True
    data_files: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository} ({', '.join(filter(None, (self.subset, f'split {self.split}')))})"

    @property
    def files(self) -> dict[str, str] | None:
        """The `data_files` argument of `load_dataset`; a cached copy is found only by the same argument."""
        return {self.split: self.data_files} if self.data_files else None

    @property
    def fetch(self) -> str:
        """The command that downloads a copy into the cache."""
        words = [repr(self.repository), *([repr(self.subset)] if self.subset else [])]
        words += [f"data_files={self.files!r}"] if self.files else []
        words += [f"revision={self.revision!r}"] if self.revision else []
        return f'python -c "import datasets; datasets.load_dataset({", ".join([*words, f"split={self.split!r}"])})"'

    @property
    def copies(self) -> list[Path]:
        """The files of the copies in the cache; streaming leaves none."""
        # As `datasets` names the folder of a repository.
        folder = cache_folder() / self.repository.replace("/", "___")
        return sorted(file for file in folder.rglob("*") if file.suffix == ".arrow")


BUILTIN: Mapping[str, HubSet] = {
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", column="text", rule="stream", large=False),
    "pile": HubSet("mit-han-lab/pile-val-backup", split="validation", column="text", rule="document"),
    "c4": HubSet("allenai/c4", column="text", rule="document", data_files="en/c4-train.00000-of-01024.json.gz"),
    "redpajama": HubSet(
        "togethercomputer/RedPajama-Data-1T-Sample", column="text", rule="document", revision="refs/convert/parquet"
    ),
}  # fmt: skip
"""The calibration sets of PrefixQuant (arXiv 2410.05265) and SmoothQuant (2211.10438), with PrefixQuant's rules."""


def hub_set_of(data: Data) -> HubSet | None:
    """Return the set that a source names, `hf:NAME[:subset]` or a built-in one; None for another kind of source."""
    found = BUILTIN.get(data.source)
    # Any folder does for `local_path` here: only whether the source is local matters.
    if found is None and data.source.startswith("hf:") and local_path(data, Path()) is None:
        name, _, subset = data.source.removeprefix("hf:").partition(":")
        found = HubSet(name, subset or None) if name else None
    if found is None:
        return None
    return replace(
        found,
        subset=data.subset or found.subset,
        split=data.split or found.split,
        column=data.column or found.column,
        revision=data.revision or found.revision,
    )


def local_path(data: Data, folder: Path) -> Path | None:
    """Return the file or folder that `custom:PATH` names, or `hf:./PATH`; None for another kind of source."""
    kind, _, rest = data.source.partition(":")
    local = rest and (kind == "custom" or (kind == "hf" and rest.startswith((".", "/", "~"))))
    return folder / Path(os.path.expanduser(rest)) if local else None


def cache_folder() -> Path:
    """Return the cache folder of the library `datasets`."""
    # The order in which `datasets` itself looks; to import it would take longer than all else here.
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.path.expanduser(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets"))

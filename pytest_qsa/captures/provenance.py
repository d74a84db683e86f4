"""Where the numbers of a run come from: the model, its data, and how the model was executed.

In memory these are dataclasses; `plain` and `of` write and read the JSON of captures, reports and baselines. A reader
ignores the keys that it does not know, so that it opens the files of a newer version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..common import counted, short_hash, shown_path

Json = dict[str, Any]
"""A JSON object."""
FLOAT = "float"
"""What a model without quantized modules was executed as."""
NOTHING_RAN = "nothing, no forward ran"


@dataclass(frozen=True)
class _Record:
    """A dataclass that reads and writes its fields as a JSON object without those at their defaults."""

    @classmethod
    def of(cls, content: Json) -> Self:
        """Read it from JSON."""
        # A key that is unknown here was written by a newer version.
        known = {_key(each): each.name for each in fields(cls)}
        return cls(**{known[key]: value for key, value in content.items() if key in known})

    def plain(self) -> Json:
        """Return it as JSON."""
        values = ((each, getattr(self, each.name)) for each in fields(self))
        return {_key(each): value for each, value in values if value != each.default}


def _key(each: Any) -> str:
    return str(each.metadata.get("key", each.name))


@dataclass(frozen=True)
class ServedProvenance(_Record):
    """What a server, or a file of its answers, says of a model.

    `served`: which model, by which API. `logprobs`: how many tokens each position has logprobs of, at least. `outside`:
    the mean probability that the reference gives to all other tokens, None without a reference. `tail`: what is
    assumed of these.
    """

    served: str
    logprobs: int
    outside: float | None
    tail: str


@dataclass(frozen=True)
class FilesProvenance(_Record):
    """What was read of a checkpoint's files: how many files and tensors, and the quantization that it declares.

    `weights_read`: the numbers of weights are of the files, not of a loaded model.
    """

    files: int
    tensors: int
    quantization: str
    weights_read: bool = False

    def __str__(self) -> str:
        """Write it in words."""
        read = f"{self.tensors} tensors in {counted(self.files, 'file')}, {self.quantization}"
        return f"weights read from the files ({read})" if self.weights_read else f"{read}; no forward"


@dataclass(frozen=True)
class ModelProvenance(_Record):
    """Which model ran, and on what.

    `path`: a folder, a hub id, the address of a server, or nothing for a fixture's model. `adapter`: what the adapter
    on it is (`LoRA of rank 8`), and `base` what that is on, where it lies apart. `revision`: the commit of a hub id.
    `class_name`, `attention`: of the loaded module, with its implementation of attention. `device_class`: what decides
    which kernels run (`cpu`, `sm_90`). `kv_cache`: the grid on which its keys and values were rounded, None for none.
    `weights`: the SHA-256 over the weight files. `format`: the quantization that its files declare, None for floats.
    `tokenizer` and `weights` are None where the model has none, and empty where they were not read. `threads`: of the
    CPU that ran it (`1 of 2`, where other programs kept the cores busy).
    """

    path: str = ""
    base: str = ""
    adapter: str | None = None
    revision: str | None = None
    served: ServedProvenance | None = None
    files: FilesProvenance | None = None
    # In the JSON the key is `class`, which can't be the name of an attribute in Python.
    class_name: str | None = field(default=None, metadata={"key": "class"})
    dtype: str | None = None
    device: str | None = None
    device_class: str | None = None
    attention: str | None = None
    kv_cache: str | None = None
    versions: Mapping[str, str] | None = None
    tokenizer: str | None = ""
    weights: str | None = ""
    format: str | None = None
    threads: str | None = None

    @classmethod
    def of(cls, content: Json) -> Self:
        """Read it from JSON, in which the keys of the parts stand among its own."""
        parts = {name: part.of(content) for name, part in _PARTS.items() if name in content}
        return super().of({**content, **parts})

    def plain(self) -> Json:
        """Return it as JSON, the keys of the parts among its own; empty where nothing is known."""
        content: Json = {}
        for key, value in super().plain().items():
            content |= value.plain() if isinstance(value, _Record) else {key: value}
        return {"path": self.path, **content} if content else {}  # a fixture's model has an empty path

    @classmethod
    def of_baseline(cls, header: Json) -> Self:
        """Read it from the header of a baseline, in which the versions stand among the other keys."""
        names = {"weights", "dtype", "device", "device_class", "format", "kv_cache"}
        versions = {name: str(version) for name, version in header.items() if name not in {*names, "model"}}
        known = {name: header[name] for name in names if name in header}
        return cls(path=str(header.get("model", "")), versions=versions, **known)

    def for_baseline(self) -> Json:
        """Return what a baseline records of the model that made it; of its path only what other machines share."""
        name = Path(self.path).name if Path(self.path).is_absolute() else self.path
        known = {"weights": self.weights or None, "dtype": self.dtype, "device": self.device}
        classes = {"device_class": self.device_class} if self.device_class is not None else {}
        # Of floats too: a baseline without it is of a version that may have read weights wrongly.
        quantized = {"format": self.format or "none"} if self.weights else {}
        cache = {"kv_cache": self.kv_cache} if self.kv_cache is not None else {}
        return {"model": name, **known, **(self.versions or {}), **classes, **quantized, **cache}

    def same_weights(self, other: Self) -> bool:
        """Say whether two models have the same files of weights; without hashes, whether they are of one path."""
        if self.weights or other.weights:
            return self.weights == other.weights
        return bool(self.path) and self.path == other.path

    def runs_as(self, other: Self) -> bool:
        """Say whether nothing else than their weights tells two models apart: adapter, dtype, and what runs them."""
        own = ("adapter", "base", "format", "dtype", "attention", "class_name", "device_class", "served", "kv_cache")
        return all(getattr(self, name) == getattr(other, name) for name in own)

    @property
    def place(self) -> str:
        """The path as a user would type it; an address as it is."""
        return self.path if not self.path or "://" in self.path else shown_path(Path(self.path))

    def __str__(self) -> str:
        """Write where it lies and which weights it has: `checkpoints/int8 (sha256 0123456789ab)`."""
        adapter = f"with an adapter, {self.adapter}" if self.adapter else ""
        if self.base:
            adapter = f"{self.adapter or 'an adapter'} on {shown_path(Path(self.base))}"
        text = f"{self.place} {f'({short_hash(self.weights)})' if self.weights else ''}".strip()
        return ", ".join(part for part in (text, adapter) if part)


_PARTS: Mapping[str, type[_Record]] = {"served": ServedProvenance, "files": FilesProvenance}
"""The parts of a model's provenance: the key by which one is recognized → its class."""


UNKNOWN_MODEL = ModelProvenance()


@dataclass(frozen=True)
class DataProvenance(_Record):
    """The data of a run. `fingerprint`: the SHA-256 of its tokens. `settings`: the rest of the suite's section `data`.

    `source`: as a suite names it; `fixture` for batches of a test's own. `media`: whether its samples are pictures or
    sounds. `unread`: the parts of the model, `vision` or `audio`, that it gave nothing to read. `prompts`: the SHA-256
    of the prompts that it answered beside the data, and of how long it might.
    """

    source: str = ""
    settings: Json = field(default_factory=dict)
    num_samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    fingerprint: str | None = None
    prompts: str | None = None
    media: bool = False
    unread: str = ""

    @classmethod
    def of(cls, content: Json) -> Self:
        """Read it from JSON, in which the settings stand among the other keys."""
        own = {each.name for each in fields(cls)}
        return super().of({**content, "settings": {k: v for k, v in content.items() if k not in own}})

    def plain(self) -> Json:
        """Return it as JSON, the settings among the other keys; empty where nothing is known."""
        content = super().plain()
        # A field with a default_factory is never equal to its `default`, so the parent always writes it.
        settings = content.pop("settings")
        return {"source": self.source} | settings | content if settings or content else {}

    @property
    def size(self) -> str:
        """How much data it is: `8 × 512 tokens of sample`."""
        if not self.num_samples:
            return self.source
        return f"{self.num_samples} {'samples' if self.media else f'× {self.seq_len} tokens'} of {self.source}"

    @property
    def note(self) -> str:
        """What of the model the data left out: `text alone, so that its vision tower saw nothing`."""
        return f"text alone, so that its {self.unread} tower read nothing" if self.unread else ""

    def __str__(self) -> str:
        """Write it in words: `8 × 512 tokens of sample, seed 0 (sha256 0123456789ab)`."""
        known = f" ({short_hash(self.fingerprint)})" if self.fingerprint else ""
        note = f", {self.note}" if self.note else ""
        if self.num_samples:
            return f"{self.size}, seed {self.seed}{note}{known}"
        source = "batches of the fixture" if self.source == "fixture" else f"the tokens of {self.source}"
        return f"{source}{note}{known}" if known or note else ""


class ExecutedModules(NamedTuple):
    """The modules that ran in one way: how many, and the name of the first."""

    modules: int
    first: str


@dataclass(frozen=True)
class Execution:
    """How the quantized modules of a model were executed, as the pass saw it.

    `forward`: whether any forward ran. `kinds`: words such as `W8A8 emulated` → the modules that ran so.
    `idle`: the quantized modules that never ran, experts aside. `idle_experts`: how many experts' modules never ran.
    """

    forward: bool
    kinds: Mapping[str, ExecutedModules] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    idle_experts: int = 0

    @classmethod
    def of(cls, content: Json) -> Self:
        """Read it from JSON."""
        kinds = {words: ExecutedModules(kind["modules"], kind["first"]) for words, kind in content["kinds"].items()}
        return cls(content["forward"], kinds, tuple(content["idle"]), content["idle_experts"])

    def plain(self) -> Json:
        """Return it as JSON."""
        kinds = {words: kind._asdict() for words, kind in self.kinds.items()}
        return {"forward": self.forward, "kinds": kinds, "idle": list(self.idle), "idle_experts": self.idle_experts}

    def __str__(self) -> str:
        """Write it in words: `W8A8 emulated (28 modules)`."""
        if not self.forward:  # only weights were measured
            return NOTHING_RAN
        text = ", ".join(f"{words} ({counted(kind.modules, 'module')})" for words, kind in self.kinds.items()) or FLOAT
        return text + (f"; {counted(self.idle_experts, 'module')} of experts saw no token" if self.idle_experts else "")


class SampleRange(NamedTuple):
    """The samples that a capture holds of all: from `first` up to `end`, of `total`."""

    first: int
    end: int
    total: int


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of a capture or of a verdict come from; all of it is empty where nothing is known.

    `samples`: which of all samples it holds, None for all. `unmatched`: the layers that the files hold quantized and
    the loaded model has no weight of its own for. `reference`: the model that it was compared with. `rows`, `kept`: of
    a kept reference, how many tokens of a sample and site it has, and its file. `evals`: the file of another program's
    results, and the conditions that they share.
    """

    model: ModelProvenance = UNKNOWN_MODEL
    data: DataProvenance = field(default_factory=DataProvenance)
    execution: Execution | None = None
    unmatched: tuple[str, ...] = ()
    samples: SampleRange | None = None
    reference: ModelProvenance | None = None
    rows: int | None = None
    kept: str = ""
    evals: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Json) -> Self:
        """Read it from JSON."""
        execution, reference, samples = (content.get(name) for name in ("execution", "reference", "samples"))
        return cls(
            model=ModelProvenance.of(content.get("model") or {}),
            data=DataProvenance.of(content.get("data") or {}),
            execution=Execution.of(execution) if execution else None,
            unmatched=tuple(content.get("unmatched") or ()),
            samples=SampleRange(*samples) if samples else None,
            reference=ModelProvenance.of(reference) if reference else None,
            rows=content.get("rows"),
            kept=content.get("kept") or "",
            evals=content.get("evals") or {},
        )

    def plain(self) -> Json:
        """Return it as JSON, without what is not known."""
        content = {
            "model": self.model.plain(),
            "data": self.data.plain(),
            "execution": self.execution.plain() if self.execution else None,
            "unmatched": list(self.unmatched),
            "samples": list(self.samples or ()),
            "reference": self.reference.plain() if self.reference else None,
            "rows": self.rows,
            "kept": self.kept,
            "evals": dict(self.evals),
        }
        return {key: value for key, value in content.items() if value}

    @property
    def weights_read(self) -> bool:
        """Whether the numbers of weights are those of the checkpoint's files, which no loader has changed."""
        return self.model.files is not None and self.model.files.weights_read

    @property
    def executed_as(self) -> str:
        """How the modules were executed, in words; empty where nothing is known."""
        return str(self.execution or "")

    @property
    def run_as(self) -> str:
        """What follows the word `executed`: `as …`, or that no forward ran; empty where nothing is known."""
        return "in no forward" if self.executed_as == NOTHING_RAN else self.executed_as and f"as {self.executed_as}"

    def facts(self) -> dict[str, str]:
        """Return what a reader asks first: label → text, without what is not known."""
        model, data, reference = self.model, self.data, self.reference or UNKNOWN_MODEL
        facts = {
            "Model": model.path,
            "Served": model.served.served if model.served else None,
            "Base": model.base,
            "Adapter": model.adapter,
            "Weights hash": model.weights,
            "Read from": str(model.files or ""),
            "Reference": reference.path or reference.class_name,
            "Its weights": reference.weights,
            "Class": model.class_name,
            "Tokenizer": model.tokenizer,
            "Dtype": model.dtype,
            "Device": model.device,
            "Threads": model.threads,
            "Executed as": self.executed_as,
            "Attention": model.attention,
            "KV cache": model.kv_cache,
            "Data": data.source,
            "Samples": data.num_samples,
            "Sequence length": data.seq_len,
            "Data hash": data.fingerprint,
        }
        return {label: str(fact) for label, fact in facts.items() if fact not in (None, "", "unknown")}

    @property
    def _against(self) -> str:
        """What it was compared with, in words; empty for nothing."""
        if self.reference is None or not self.reference.path:
            return ""
        without = self.model.kv_cache and self.reference.kv_cache is None and self.model.path == self.reference.path
        if without:
            return "against itself without that"
        recorded = f", recorded with {counted(self.rows, 'token')} of a sample at each layer" if self.rows else ""
        return f"against {self.reference.place}{recorded}"

    def summary(self, subject: str) -> str:
        """Write in one line what was run: the checkpoint with its hash, class, dtype, device, reference and tokens."""
        model, served = self.model, self.model.served
        how = f", executed {self.run_as}" if self.execution else ""
        threads = f" with {model.threads} threads" if " of " in (model.threads or "") else ""
        how += f", its KV cache rounded to {model.kv_cache}" if model.kv_cache else ""
        parts = [
            f"{subject}: {model}" if str(model) else subject,
            str(model.files or ""),
            ", ".join(f"{name} {text}" for name, text in self.evals.items()),
            f"{served.served}, {served.logprobs} logprobs of each position" if served else "",
            f"{model.class_name} {model.dtype} on {model.device}{threads}{how}" if model.class_name else "",
            self._against,
            str(self.data),
        ]
        return "; ".join(part for part in parts if part) if self != UNKNOWN_RUN else ""


UNKNOWN_RUN = Provenance()


def since_text(then: ModelProvenance, now: ModelProvenance) -> str:
    """Say what changed since a baseline was made, and what it was made with. A difference fails nothing."""
    before, after = then.for_baseline(), now.for_baseline()
    # The checkpoint is expected to be another one; its weights are named by their hash.
    names = sorted({*before, *after} - {"model", "weights"} - ({"format"} if then.format is None else set()))
    changed = [
        f"{name} was {before.get(name)}, is {after.get(name)}" for name in names if before.get(name) != after.get(name)
    ]
    if then.weights and now.weights and then.weights != now.weights:
        changed.insert(0, f"weights ({short_hash(then.weights)} → {short_hash(now.weights)})")
    elif then.weights and then.weights == now.weights:
        changed.append("weights unchanged")
    rest = "versions, dtype and device unchanged" if not [n for n in changed if " was " in n] else ""
    told = "; ".join(filter(None, [*changed, rest]))
    return f"changed since the baseline of {then}: {told}"


def data_fingerprint(tensors: Iterable[tuple[str, str, Sequence[int], bytes]]) -> str:
    """Return the SHA-256 of the data of a run, over the name, dtype (`int64`), shape and bytes of each tensor."""
    digest = hashlib.sha256()
    for name, dtype, shape, content in tensors:
        digest.update(f"{name}torch.{dtype}{tuple(shape)}".encode())  # as torch writes it: baselines hold these hashes
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"

"""The file of a recorded reference: drawn rows of its sites, its last hidden states, and where its head lies.

safetensors, with one JSON text under the metadata key `qsa`; docs/capture-format.md specifies it. A sample is known
by the hash of its content, a token by its index among those that are no padding: neither order nor batches matter.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...captures import Provenance, Site
from ...common import (
    BLANK,
    NO_CHECKSUM,
    InfraError,
    check_checksum,
    one_line,
    parsed_json,
    remark,
    shown_path,
    with_checksum,
)
from ..heads import Head
from ..load.batches import Batch, row_count
from .predicted import read_head

REFERENCE_FORMAT = "qsa-reference/1"
KEYS = ("rows", "hidden", "head", "blocks", "modules", "sinks")
"""What every header has beside what `ReferenceFile.open` reads."""
Call = tuple[str, Site, int]
"""A layer, its input or output, and which of the layer's calls in a forward."""
MASKS = {
    "input_ids": "attention_mask",
    "inputs_embeds": "attention_mask",
    "decoder_input_ids": "decoder_attention_mask",
}


def hashes_of(batch: Batch) -> list[str]:
    """Return the SHA-256 of each row of a batch, whatever its padding and the width of its integers."""
    named: Mapping[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    count = row_count(batch)
    tensors = {n: t for n, t in sorted(named.items()) if isinstance(t, Tensor) and t.dim() and len(t) == count}
    found = []
    for row in range(count):
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            # A mask counts only by the tokens that it leaves: padding depends on how samples are batched.
            if name in MASKS.values():
                continue
            values, mask = tensor[row].detach().cpu(), tensors.get(MASKS.get(name, ""))
            if mask is not None and mask.shape[1:] == values.shape[:1]:
                values = values[mask[row].bool().cpu()]
            # One width for all: int32 and int64 ids are the same sample. And numpy has no bfloat16.
            values = values.double() if values.is_floating_point() else values.long()
            digest.update(f"{name}{tuple(values.shape)}".encode() + values.contiguous().numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def drawn_tokens(seed: int, sample: str, count: int, rows: int) -> NDArray[np.int32]:
    """Return which of a sample's `count` tokens are recorded, ascending; it depends on the sample's hash alone."""
    if count <= rows:
        return np.arange(count, dtype=np.int32)
    generator = np.random.default_rng([seed, int(sample[:16], 16), count])
    return np.sort(generator.choice(count, rows, replace=False)).astype(np.int32)


@dataclass(frozen=True, eq=False)
class SiteRows:
    """The recorded numbers of one call of a site, all samples concatenated.

    `counts` [S]: the number of tokens of each sample. `rows` [N, C]: the tokens that were drawn. `at` [N]: their
    indices; None if all tokens were drawn. `maxima` [sum of counts]: the largest |x| of every token, if recorded.
    """

    counts: NDArray[np.int64]
    rows: Tensor | None = None
    at: NDArray[np.int32] | None = None
    maxima: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ReferenceContent:
    """All that a file holds. `samples`: their hashes. `sinks`: sample, place, channel and layers of each.

    `answers`: the tokens of each prompt and of the model's answer, where these are the data.
    `generated`: the prompts that it answered beside the data, as `Prompts.identity` has them, with the answers.
    `head`: where it lies, or its scaling alone where its weights are among the `tensors`.
    """

    provenance: Provenance
    seed: int
    rows: int
    samples: Sequence[str]
    modules: Sequence[str]
    blocks: Sequence[str]
    sinks: Sequence[Any]
    calls: Mapping[Call, SiteRows]
    hidden: SiteRows | None = None
    head: Mapping[str, Any] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    answers: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    generated: Mapping[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """Return the file; equal arrays are in it once."""
        tensors = _Tensors()
        for part, tensor in self.weights.items():
            tensors.named[f"head/{part}"] = tensor.contiguous()
        streams = [{"layer": of[0], "site": of[1], "call": of[2], **tensors.entry(r)} for of, r in self.calls.items()]
        hidden = None
        if self.hidden is not None and self.hidden.rows is not None:
            counts = tensors.add("counts", torch.from_numpy(self.hidden.counts))
            hidden = {"counts": counts, "rows": tensors.add("hidden", self.hidden.rows)}
        header = {
            "checksum": BLANK,
            "format": REFERENCE_FORMAT,
            "meta": self.provenance.plain(),
            "seed": self.seed,
            "rows": self.rows,
            "streams": streams,
            "samples": list(self.samples),
            "modules": list(self.modules),
            "blocks": list(self.blocks),
            "sinks": list(self.sinks),
            "hidden": hidden,
            "head": self.head,
        }
        if self.answers:
            header["answers"] = self.answers
        if self.generated:
            header["generated"] = self.generated
        # Sorted, so that equal content makes equal bytes.
        return with_checksum(save(tensors.named, metadata={"qsa": json.dumps(header, sort_keys=True)}))


@dataclass
class _Tensors:
    named: dict[str, Tensor] = field(default_factory=dict)
    _known: dict[Any, str] = field(default_factory=dict)

    def add(self, kind: str, tensor: Tensor) -> str:
        # As bytes, for numpy has no bfloat16.
        content = tensor.contiguous().flatten().view(torch.uint8).numpy()
        key = (kind, tensor.dtype, tuple(tensor.shape), hashlib.sha256(content.tobytes()).digest())
        if key not in self._known:
            self._known[key] = name = f"{kind}/{len(self._known)}"
            self.named[name] = tensor.contiguous()
        return self._known[key]

    def entry(self, rows: SiteRows) -> dict[str, str]:
        """Add the numbers of a call; return the names of their arrays."""
        entry = {"counts": self.add("counts", torch.from_numpy(rows.counts))}
        if rows.rows is not None:
            entry["rows"] = self.add("rows", rows.rows)
        if rows.at is not None:
            entry["at"] = self.add("at", torch.from_numpy(rows.at))
        if rows.maxima is not None:
            entry["dtype"] = str(rows.maxima.dtype).removeprefix("torch.")
            entry["maxima"] = self.add("maxima", _deflated(rows.maxima))
        return entry


def _deflated(values: Tensor) -> Tensor:
    """Compress numbers without loss, all first bytes before all second ones: neighbours have the same exponent."""
    planes = values.contiguous().view(torch.uint8).numpy().reshape(-1, values.element_size()).T
    # A copy, for torch warns of an array that can't be written to.
    return torch.from_numpy(np.frombuffer(zlib.compress(planes.tobytes(), 9), dtype=np.uint8).copy())


def _inflated(content: Tensor, dtype: torch.dtype) -> Tensor:
    planes = np.frombuffer(zlib.decompress(content.numpy().tobytes()), dtype=np.uint8)
    return torch.from_numpy(planes.reshape(dtype.itemsize, -1).T.copy()).view(dtype).flatten()


def _check_content(path: Path, header: Mapping[str, Any]) -> None:
    """Hold a whole file against its checksum, once, before any of its rows is used; warn where it has none.

    Raises:
        InfraError: it was damaged, or changed.
    """
    shown, again = shown_path(path), "make it anew with `qsa capture --for-reference`"
    if "checksum" not in header:
        remark(f"{shown} {NO_CHECKSUM}: {again}")
        return
    try:
        # Mapped, for the hidden states may be larger than memory.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            check_checksum(content, header["checksum"])
    except (OSError, InfraError) as error:
        raise InfraError(f"model.reference: {shown}: {error}; copy it again, or {again}") from None


@dataclass(eq=False)
class ReferenceFile:
    """A file that `ReferenceContent.to_bytes` made, open; its arrays are read where they are needed."""

    path: Path
    header: Mapping[str, Any]
    _file: Any

    @classmethod
    def open(cls, path: Path) -> ReferenceFile:
        """Open a file and read its header.

        Raises:
            InfraError: it is missing, damaged, or of another kind.
        """
        shown = shown_path(path)
        try:
            file: Any = safe_open(str(path), framework="pt")
            header = parsed_json((file.metadata() or {}).get("qsa", "{}"))
        except (OSError, SafetensorError, ValueError) as error:
            raise InfraError(
                f"model.reference: {shown} can't be read as a kept reference ({error}): copy it again, or make it anew "
                "with `qsa capture --for-reference`"
            ) from None
        form = header.get("format") if isinstance(header, dict) else None
        if form != REFERENCE_FORMAT:
            what = "a capture without rows to compare with" if str(form).startswith("qsa-capture") else "no reference"
            raise InfraError(
                f"model.reference: {shown} is {what} (format {form!r}, not {REFERENCE_FORMAT}): make it with "
                "`qsa capture --for-reference`"
            )
        _check_content(path, header)
        opened = cls(path, header, file)
        try:
            _ = opened.provenance, opened.samples, opened.calls, [header[key] for key in KEYS]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"its header is not whole ({type(error).__name__}: {one_line(error)})"
            raise InfraError(f"model.reference: {shown}: {what}; make it anew") from None
        return opened

    @property
    def shown(self) -> str:
        """Its path, for a message."""
        return shown_path(self.path)

    @cached_property
    def provenance(self) -> Provenance:
        """The model and the data that it was made of."""
        return Provenance.of(self.header["meta"])

    def origin(self, subject: Provenance) -> str:
        """Say of what data it was made, and whether by another tokenizer than the subject's."""
        data = self.provenance.data
        if data.num_samples is None:
            return ""
        theirs, ours = self.provenance.model.tokenizer, subject.model.tokenizer
        other = "" if theirs == ours else f", of the tokenizer {theirs}, here {ours}"
        return f" ({data.size}, seed {data.seed}{other})"

    @property
    def answers(self) -> list[tuple[list[int], list[int]]]:
        """The tokens of each prompt and of the answer that its model gave.

        Raises:
            InfraError: it was recorded over other data.
        """
        kept = self.header.get("answers")
        if not kept:
            raise InfraError(
                f"model.reference: {self.shown} was recorded without answers: make it anew, with this suite's data"
            )
        return [(prompt, answer) for prompt, answer in kept]

    def generated(self, prompts: Mapping[str, Any]) -> list[tuple[list[int], bool]]:
        """Return the tokens of each answer that its model gave to some prompts, and whether it ended by itself.

        `prompts`: their identity.

        Raises:
            InfraError: it was recorded without them, or with other ones.
        """
        kept = self.header.get("generated")
        if not isinstance(kept, dict) or kept.get("prompts") != prompts:
            what = "other prompts" if kept else "answers to prompts"
            raise InfraError(
                f"model.reference: {self.shown} was recorded with{'' if kept else 'out'} {what}: make it anew, of a "
                "suite with this generation and a metric that needs it"
            )
        return [(tokens, ended) for tokens, ended in kept["answers"]]

    @property
    def samples(self) -> dict[str, int]:
        """The samples by their hashes."""
        return {sample: index for index, sample in enumerate(self.header["samples"])}

    @cached_property
    def calls(self) -> dict[Call, Mapping[str, Any]]:
        """The entry of each call in the file's header."""
        return {(each["layer"], each["site"], each["call"]): each for each in self.header["streams"]}

    def rows(self, call: Call) -> tuple[list[Tensor], list[Tensor]]:
        """Return the rows [R, C] that are recorded of each sample, and which of its tokens they are, [R] int64."""
        entry = self.calls[call]
        # A sample with fewer tokens than were to be drawn has all of them in the file.
        sizes = np.minimum(self._counts(entry), self.header["rows"]).tolist()
        rows, at = self._tensor(entry["rows"]), self._tensor(entry["at"]).long()
        return list(torch.split(rows, sizes)), list(torch.split(at, sizes))

    def hidden(self, sample: int) -> Tensor:
        """Return the last hidden states of one sample, [T, H]; nothing else is read."""
        entry = self.header["hidden"]
        ends = np.cumsum(self._counts(entry)).tolist()
        first = ends[sample - 1] if sample else 0
        # A slice reads this sample alone: the hidden states of all samples may be larger than memory.
        found: Tensor = self._file.get_slice(entry["rows"])[first : ends[sample]]
        return found

    def maxima(self, call: Call) -> list[Tensor]:
        """Return the largest |x| of every token of each sample, [T]."""
        entry = self.calls[call]
        whole = _inflated(self._tensor(entry["maxima"]), getattr(torch, entry["dtype"]))
        return list(torch.split(whole.float(), self._counts(entry).tolist()))

    def head(self) -> Head:
        """Return the head that makes logits of the hidden states.

        Raises:
            InfraError: its checkpoint is gone or has changed.
        """
        entry = self.header["head"]
        if "path" in entry:
            return read_head(entry, self.path)
        parts = {part: self._tensor(f"head/{part}").to(getattr(torch, entry["dtype"])) for part in entry["kept"]}
        return Head(parts["weight"], parts.get("bias"), entry["scaling"])

    def _counts(self, entry: Mapping[str, Any]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self._tensor(entry["counts"]).numpy()
        return found

    def _tensor(self, name: str) -> Tensor:
        found: Tensor = self._file.get_tensor(name)
        return found

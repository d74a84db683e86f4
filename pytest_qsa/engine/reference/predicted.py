"""What a reference predicts: where a recorded one's head lies, and what a live one says of a served model's tokens.

For tokens that a server listed, the reference's whole distribution of a position is reduced at once and never kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checkpoint import Tensor as Stored, open_folder
from ...common import AnomalyError, InfraError, Progress
from ...suite import Subject
from ..heads import Head
from ..load.batches import token_ids
from ..load.data import batches_of
from ..load.models import Loaded, quiet
from ..load.tokenizer import TextTokenizer, load_tokenizer
from ..modules import device_of, evaluating, forward_errors, run_batch
from ..reduce.pairs import ROWS_AT_ONCE
from ..run.next_token import logits_of
from ..stream.disk import DTYPES


def located_head(head: Head, path: str, revision: str | None, folder: Path) -> dict[str, Any]:
    """Find the head's weights in the checkpoint, by their content; return where they are, for `read_head`.

    `folder`: what a path on this machine is written relative to.

    Raises:
        InfraError: they don't lie there as they are, in a safetensors file.
    """
    checkpoint = open_folder(path, revision)
    local = Path(path).is_dir()
    entry: dict[str, Any] = {
        "path": os.path.relpath(path, folder) if local else path,
        "revision": None if local else checkpoint.path.name,
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "scaling": dict(head.scaling),
    }
    for part, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is not None:
            # By content, not by name: a tied head is stored as the embeddings.
            stored = next((each for each in checkpoint.tensors.values() if _is(each, tensor)), None)
            if stored is None:
                raise InfraError(f"{path} holds no tensor that equals the head's {part}")
            entry[part] = {"name": stored.name, "sha256": hashlib.sha256(_bytes(stored)).hexdigest()}
    return entry


def read_head(entry: Mapping[str, Any], file: Path) -> Head:
    """Read a head alone from its checkpoint, as `located_head` found it. `file`: the reference file.

    Raises:
        InfraError: the checkpoint is gone or isn't what it was.
    """
    local = file.parent / entry["path"]
    way_out = "bring that checkpoint back, or make the reference anew (--with-head keeps the head in the file)"
    try:
        tensors = open_folder(local if local.is_dir() else entry["path"], entry["revision"]).tensors
    except InfraError:
        raise InfraError(
            f"{file}: the reference's head is read from {entry['path']}, which isn't here: {way_out}"
        ) from None
    parts: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        if part in entry:
            stored = tensors.get(entry[part]["name"])
            content = _bytes(stored) if stored is not None else None
            if stored is None or content is None or hashlib.sha256(content).hexdigest() != entry[part]["sha256"]:
                raise InfraError(
                    f"{file}: the reference's head, {entry[part]['name']} in {entry['path']}, isn't what it was when "
                    f"the reference was kept: {way_out}"
                )
            parts[part] = _decoded(stored, content).to(getattr(torch, entry["dtype"]))
    return Head(parts["weight"], parts.get("bias"), entry["scaling"])


def _is(stored: Stored, tensor: Tensor) -> bool:
    # Integers are codes, which may have the weight's shape, so that only floats are read.
    if stored.shape != tuple(tensor.shape) or stored.dtype not in DTYPES or not DTYPES[stored.dtype].is_floating_point:
        return False
    return torch.equal(_decoded(stored, _bytes(stored)).to(tensor.dtype), tensor.cpu())


def _bytes(stored: Stored) -> Any:
    return np.fromfile(stored.path, dtype=np.uint8, count=stored.stop - stored.start, offset=stored.start)


def _decoded(stored: Stored, content: Any) -> Tensor:
    return torch.from_numpy(content).view(DTYPES[stored.dtype]).reshape(stored.shape)


NO_TOKEN = -1
"""Fills the ids of a row that asks for fewer tokens than others."""
Answer = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""Of T − 1 positions: ln p of the k tokens that were asked for (−∞ where absent), ln p of the token that came, the
likeliest token, Σ p ln p, and by how much ln p of the likeliest is above that of the next; all in nats."""


def tokenizer_at(path: str) -> TextTokenizer | None:
    """Load a tokenizer alone; None for a folder that has none.

    Raises:
        AnomalyError: a tokenizer file is no JSON.
        InfraError: it can't be loaded for any other reason.
    """
    return load_tokenizer(path, {"trust_remote_code": False})


def windows(subject: Subject, tokenizer: TextTokenizer) -> list[list[int]]:
    """Return the token ids of each sample of the subject's data.

    Raises:
        InfraError: they are answers, which a model here has to give first; or the data can't be read.
    """
    if subject.data.answers is not None:
        raise InfraError("data.answers are made by a model that runs here: give the checkpoint, model.path")
    batches = batches_of(subject.data, tokenizer, subject.folder)
    return [row.tolist() for batch in batches for row in token_ids(batch)]


def answers_of(
    loaded: Loaded,
    samples: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]],
    progress: Progress | None = None,
) -> list[Answer]:
    """Run a model over the tokens of each sample; return what it says of the tokens that are asked for.

    `samples`: the tokens [T] of each, and which are asked for after each but the last, [T − 1, k].

    Raises:
        AnomalyError: the model has fewer tokens than are asked for, or predicts none, or NaN.
        InfraError: it can't be run.
    """
    # By index, for a streamed model ends its forwards in any order.
    found: dict[int, Answer] = {}
    device = loaded.stream.device if loaded.stream is not None else device_of(loaded.model)

    def answer(index: int) -> None:
        tokens, ids = samples[index]
        batch = torch.from_numpy(tokens.astype("int64"))[None]
        found[index] = _rows(logits_of(run_batch(loaded.model, batch, device), loaded.model)[0], tokens, ids)
        if progress is not None:
            progress(len(found), len(samples))

    with torch.no_grad(), evaluating(loaded.model), quiet(), forward_errors("the reference"):
        if loaded.stream is None:
            for index in range(len(samples)):
                answer(index)
        else:
            with loaded.stream.ready():
                for _ in loaded.stream.run(range(len(samples)), answer, lambda index: None):
                    pass
    return [found[index] for index in range(len(samples))]


def _rows(logits: Tensor, tokens: NDArray[np.int32], asked: NDArray[np.int32]) -> Answer:
    """Reduce the logits [T, V] of one sample to what is asked for."""
    ids = torch.from_numpy(asked.astype("int64"))
    if int(ids.max()) >= logits.shape[1]:
        raise AnomalyError(
            f"the served model predicts the token {int(ids.max())} and the reference has {logits.shape[1]} of them: "
            "another vocabulary"
        )
    following = torch.from_numpy(tokens[1:].astype("int64"))
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(ids), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(ids)))
        p = logits[rows].double().log_softmax(1).cpu()
        # gather refuses −1, so that missing ids ask for token 0 and are masked afterwards.
        known = p.gather(1, ids[rows].clamp_min(0)).masked_fill(ids[rows] == NO_TOKEN, float("-inf"))
        # A token of probability 0 adds nothing; 0 · −∞ would be NaN.
        negentropy = torch.where(p > float("-inf"), p.exp() * p, 0.0).sum(1)
        first, second = p.topk(2, dim=1).values.unbind(1)
        parts.append((known, p.gather(1, following[rows][:, None])[:, 0], p.argmax(1), negentropy, first - second))
    if any(torch.isnan(part[1]).any() for part in parts):
        raise AnomalyError("the reference predicts NaN or Inf: there is nothing sound to compare with")
    at_known, came, likeliest, entropies, margins = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return at_known, came, likeliest, entropies, margins

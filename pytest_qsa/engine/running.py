"""Load a subject, run its one pass, let the model go, and say what was run."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..captures import Capture
from ..errors import AnomalyError, InfraError
from ..fingerprint import local_folder
from ..plan import Request
from ..subjects import Subject, weights_hash
from .batches import Batch
from .capturing import Progress, run_pass
from .data import batches_of
from .models import Loaded, describe, load_model, quiet
from .schemes import schemes_of
from .tokens import decoder_of


def capture_subject(
    subject: Subject, requests: Sequence[Request], *, allow_code: bool = False, progress: Progress | None = None
) -> Capture:
    """Load the subject's checkpoint, run it once, and free it.

    Raises:
        InfraError: it can't be loaded or run, or its data can't be read.
    """
    if subject.model is None:
        raise InfraError("the suite has no section 'model', and no fixture 'qsa_model' stands in for it")
    loaded = load_model(subject.model, subject.path, subject.memory, allow_code=allow_code)
    try:
        return capture_loaded(subject, loaded, None, requests, progress)
    finally:
        loaded.close()
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def capture_loaded(
    subject: Subject,
    loaded: Loaded,
    batches: Iterable[Batch] | None,
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> Capture:
    """Run a model that is in memory, over its own batches or over the subject's data."""
    samples = list(batches) if batches is not None else _batches(subject, loaded)
    if not samples:
        raise AnomalyError("there are no batches: nothing would be measured")
    try:
        with quiet():  # compressed-tensors shows bars of its own at the first forward
            capture = run_pass(
                loaded.model,
                samples,
                requests,
                decode=decoder_of(loaded.tokenizer),
                progress=progress,
                stream=loaded.stream,
            )
    except InfraError:
        raise
    except torch.OutOfMemoryError as error:
        raise InfraError(
            f"the pass ran out of memory ({str(error).splitlines()[0]}); lower data.seq_len or batch_size"
        ) from error
    except RuntimeError as error:
        raise InfraError(
            f"the forward pass of {type(loaded.model).__name__} failed: {str(error).splitlines()[0]}"
        ) from error
    meta = _meta(subject, loaded.model, samples, own_batches=batches is not None)
    return replace(capture, meta=meta, schemes=schemes_of(loaded.model))


def _batches(subject: Subject, loaded: Loaded) -> list[Batch]:
    if loaded.tokenizer is None:
        raise InfraError(
            f"{subject.path or subject.name} has no tokenizer to make token batches with; save one beside the weights, "
            "or give batches in a fixture qsa_batches"
        )
    return batches_of(subject.data, loaded.tokenizer, subject.folder, getattr(loaded.model, "config", None))


def _meta(subject: Subject, model: nn.Module, batches: Sequence[Batch], *, own_batches: bool) -> dict[str, Any]:
    data = {"source": "fixture"} if own_batches else subject.data.model_dump(exclude={"custom", "batch_size"})
    folder = local_folder(subject)
    fetched = folder is not None and not Path(subject.path).is_dir()
    revision = {"revision": folder.name} if folder is not None and fetched else {}  # the hub's cache names it so
    return {
        "model": {
            "path": subject.path,
            "weights": weights_hash(str(folder)) if folder else None,
            **revision,
            **describe(model),
        },
        "data": {**data, "fingerprint": fingerprint(batches)},
    }


def fingerprint(batches: Iterable[Batch]) -> str:
    """Return the SHA-256 of all tensors of the batches; how the rows are batched doesn't matter."""
    digest = hashlib.sha256()
    for batch in batches:
        named: Mapping[str, Any] = {"": batch} if isinstance(batch, Tensor) else batch
        tensors = {name: value for name, value in sorted(named.items()) if isinstance(value, Tensor)}
        for rows in zip(*tensors.values(), strict=False):
            for name, row in zip(tensors, rows, strict=True):
                digest.update(f"{name}{row.dtype}{tuple(row.shape)}".encode())
                digest.update(row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if row.dim() else b"")
    return f"sha256:{digest.hexdigest()}"


def loaded_from_fixture(model: object, tokenizer: object | None) -> Loaded:
    """Take what the fixture `qsa_model` returned: a module, or a pair of a module and a tokenizer.

    Raises:
        InfraError: it is something else.
    """
    if isinstance(model, tuple) and len(model) == 2:
        model, tokenizer = model
    if not isinstance(model, nn.Module):
        raise InfraError(f"the fixture qsa_model returned {type(model).__name__}, not a torch.nn.Module")
    return Loaded(model, tokenizer)

"""Make the batches of a subject's data, and say where the numbers of a run come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...captures import DataProvenance, Provenance, data_fingerprint
from ...checkpoint import CacheScale, scales_of_cache
from ...common import AnomalyError, InfraError, phase
from ...suite import Subject, loaded_files
from ..load.answers import answer_batches, answered_batches
from ..load.batches import Batch, row_count, token_ids
from ..load.data import batches_of
from ..load.generation import check_cache
from ..load.media import has_media, media_batches, media_in
from ..load.models import Loaded, provenance_of
from ..load.tokenizer import compare_gguf_tokens, tokenizer_identity
from ..modules import SENSES, caching_layers, check_context, layers_of, towers_of
from ..reference.reference_file import ReferenceFile
from ..run.rounded_cache import cache_rounded


def subject_batches(subject: Subject, loaded: Loaded, reference: Loaded | ReferenceFile | None = None) -> list[Batch]:
    """Return the batches of a subject's data, made by the loaded model's tokenizer.

    `reference`: who answers, where the data are answers; without one the model itself.

    Raises:
        AnomalyError: there is no tokenizer, or it makes ids that the model has no rows for.
        InfraError: the data can't be read, or nobody can answer.
    """
    phase(f"reading {subject.data.source}")
    if subject.data.answers is not None and isinstance(reference, ReferenceFile):
        _check_phase(subject, loaded)
        return answered_batches(subject.data, reference.answers)
    if has_media(subject.data, subject.folder, loaded.model):
        revision = subject.model.revision if subject.model is not None else None
        batches = media_batches(subject.data, subject.folder, loaded, subject.path, revision)
        _check_ids(loaded.model, batches)
        return batches
    tokenizer = loaded.required_tokenizer(subject.path or subject.name)
    check_context(loaded.model, subject.data.seq_len)
    if subject.data.answers is not None:
        by, whose = (loaded, "the model") if reference is None else (reference, "the reference")
        assert isinstance(by, Loaded)
        _check_phase(subject, loaded)
        with own_cache(subject, loaded) if by is loaded else nullcontext():
            batches = answer_batches(subject.data, tokenizer, subject.folder, by, whose)
        _check_ids(loaded.model, batches)
        return batches
    batches = batches_of(subject.data, tokenizer, subject.folder, getattr(loaded.model, "config", None))
    _check_ids(loaded.model, batches)
    return batches


def _check_phase(subject: Subject, loaded: Loaded) -> None:
    if subject.data.answers is None or subject.data.answers.phase != "decode":
        return
    check_cache(loaded.model, "data.answers: phase: decode: the model")
    if loaded.stream is not None:
        raise InfraError(
            "data.answers: phase: decode needs the whole model at each token, and it is read block by block: leave "
            "offload_device out"
        )


def _check_ids(model: Any, batches: Sequence[Batch]) -> None:
    """Refuse token ids that the embedding has no rows for: a CPU says `index out of range`, a GPU stops for good."""
    embedding = None
    with suppress(AttributeError, NotImplementedError):  # transformers' own word for a model of several towers
        embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    largest = max((int(row.max()) for batch in batches for row in token_ids(batch) if row.numel()), default=-1)
    if isinstance(rows, int) and largest >= rows:
        raise AnomalyError(
            f"the tokenizer makes the token id {largest} of the data, and the embedding of {type(model).__name__} has "
            f"{rows} rows: take the tokenizer and the weights from one checkpoint"
        )


def own_cache(subject: Subject, loaded: Loaded) -> AbstractContextManager[None]:
    """Round what a subject's model puts into its KV cache, where the suite says so."""
    grid = subject.model.kv_cache if subject.model is not None else None
    return cache_rounded(loaded.model, grid, cache_scales(subject, loaded)) if grid else nullcontext()


def cache_scales(subject: Subject, loaded: Loaded) -> Mapping[str, tuple[CacheScale, CacheScale]]:
    """Return the scales of a static KV cache in FP8 that the subject's files hold, by the layers of its model."""
    files = loaded_files(subject)
    return {} if files is None else scales_of_cache(files.folder, caching_layers(layers_of(loaded.model)))


def tokens_note(subject: Subject, loaded: Loaded) -> str:
    """Compare the tokenizer of a GGUF's run with the file's own; return what is to be said of it.

    Raises:
        InfraError: they give other ids.
    """
    folder = subject.base_folder
    if subject.model is None or subject.model.gguf_file is None or loaded.tokenizer is None or folder is None:
        return ""
    return compare_gguf_tokens(folder / subject.model.gguf_file, loaded.tokenizer)


def run_provenance(
    subject: Subject, loaded: Loaded, batches: Sequence[Batch], *, own_batches: bool, note: str = ""
) -> Provenance:
    """Say where a run's numbers come from. `note`: what is to be said of the tokenizer."""
    # The batch size changes no sample: captures of different ones have the same data.
    data = {"source": "fixture"} if own_batches else subject.data.model_dump(exclude={"custom", "batch_size"})
    data = {k: v for k, v in data.items() if v is not None or k not in ("answers", "stride")}  # as earlier versions
    folder = subject.local_folder
    fetched = folder is not None and not Path(subject.path).is_dir()
    tokenizer = tokenizer_identity(loaded.tokenizer)
    model = replace(
        provenance_of(loaded.model, subject.path),
        kv_cache=subject.model.kv_cache if subject.model is not None else None,
        revision=folder.name if folder is not None and fetched else None,  # the hub's cache names the folder so
        tokenizer=f"{tokenizer}; {note}" if note else tokenizer,
    )
    made = DataProvenance.of({**data, "fingerprint": data_fingerprint(_tensors(batches))})
    read, towers = media_in(batches), set(towers_of(loaded.model).values())
    # A tower without a text model beside it can't be left out.
    unread = towers - {SENSES[medium] for medium in read} if _reads_text(batches) else set[str]()
    return Provenance(model, replace(made, media=bool(read), unread=" and ".join(sorted(unread))))


def _reads_text(batches: Sequence[Batch]) -> bool:
    return any(isinstance(batch, Tensor) or "input_ids" in batch for batch in batches)


def _tensors(batches: Iterable[Batch]) -> Iterator[tuple[str, str, Sequence[int], bytes]]:
    """Yield the tensors of each row for the hash of the data; how the rows are batched doesn't matter."""
    for batch in batches:
        named: Mapping[str, Any] = {"": batch} if isinstance(batch, Tensor) else batch
        tensors = {name: value for name, value in sorted(named.items()) if isinstance(value, Tensor)}
        count = row_count(batch)
        # The patches of a picture are rows of a tensor that belongs to its sample as a whole.
        parts = [value if value.dim() and len(value) == count else [value] for value in tensors.values()]
        for rows in zip(*parts, strict=False):
            for name, row in zip(tensors, rows, strict=True):
                # numpy has no bfloat16, so that a row is hashed as bytes; torch can't view a scalar as bytes.
                content = row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if row.dim() else b""
                yield name, str(row.dtype).removeprefix("torch."), row.shape, content

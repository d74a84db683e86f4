"""Data with pictures and sounds: drawn by the package or read from a folder → the arguments of a model's forward.

The model's own processor turns each record into them, through its chat template where it has one; a record is a batch,
for pictures differ in size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common import AnomalyError, InfraError, one_line, shown_path
from ...suite import MEDIA, Data, local_path, media_column
from ..modules import context_of
from .batches import Batch, MediaBatch
from .media_records import RATE, Record, is_folder_of_media, kept_names, kinds_of_folder, records_of
from .models import Loaded, quiet
from .patches import picture_of
from .sources import rows_of_set

ASKED = {"image": "What does this picture show?", "audio": "What can be heard in this recording?"}
INPUTS = {"image": frozenset({"pixel_values"}), "audio": frozenset({"input_features", "input_values"})}
"""What a record holds → the arguments of a forward that take it."""


def has_media(data: Data, folder: Path, model: Any) -> bool:
    """Say whether the samples of some data are pictures or sounds: by their source, or as the model reads no text.

    Raises:
        InfraError: as `media_of`.
    """
    return bool(media_of(data, folder, model))


def media_of(data: Data, folder: Path, model: Any) -> frozenset[str]:
    """Return what the samples of some data hold, of `image` and `audio`; nothing for texts.

    A set with a column of pictures is one of texts for a model that takes none.

    Raises:
        InfraError: the model takes nothing else, and the data have none; the data can't be read.
    """
    if data.source in MEDIA:
        return frozenset({MEDIA[data.source]})
    path, needed = local_path(data, folder), wanted_medium(model)
    if path is not None and is_folder_of_media(path):
        return kinds_of_folder(path)
    if data.source == "sample":
        return frozenset({needed} if needed else ())
    if _arguments(model).isdisjoint(INPUTS["image"] | INPUTS["audio"]):
        return frozenset()
    rows = rows_of_set(data, folder, 1)
    column = media_column(rows or [])
    if column is not None and not INPUTS[column[1]].isdisjoint(_arguments(model)):
        return frozenset({column[1]})
    if needed:
        known = f"it has {', '.join(rows[0])}" if rows and isinstance(rows[0], dict) else "it holds a text"
        raise InfraError(
            f"{data.source}: there is no column '{needed}'; {known}, and {type(model).__name__} takes nothing else"
        )
    return frozenset()


def media_in(batches: Sequence[Batch]) -> frozenset[str]:
    """Return what batches hold beside text, of `image` and `audio`."""
    names = {name for batch in batches if isinstance(batch, Mapping) for name in batch}
    return frozenset(kind for kind, inputs in INPUTS.items() if not inputs.isdisjoint(names))


def wanted_medium(model: Any) -> str:
    """Return what a model can't run without: `image`, `audio`, or nothing, as one that also reads text alone."""
    name = getattr(model, "main_input_name", "")
    if getattr(model, "config", None) is None or _has_marks(model):
        return ""
    if name in ("input_features", "input_values"):
        return "audio"
    generates = hasattr(model, "can_generate") and model.can_generate()
    return "image" if "pixel_values" in _arguments(model) and not generates else ""


def _has_marks(model: Any) -> bool:
    """Say whether a prompt holds tokens that stand for a picture or a sound."""
    marks = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    return any(getattr(getattr(model, "config", None), mark, None) is not None for mark in marks)


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def media_batches(data: Data, folder: Path, loaded: Loaded, path: str, revision: str | None = None) -> list[Batch]:
    """Return a batch of forward arguments for each record, tensors whose first dimension is the sample or the patch.

    Raises:
        InfraError: the processor can't be loaded, or takes no such record; a file can't be decoded; there are too few.
    """
    if data.answers is not None:
        raise InfraError("data.answers answers texts: leave it out where the samples are pictures or sounds")
    medium = wanted_medium(loaded.model)
    records = records_of(data, folder, medium)
    with quiet():
        processor = _processor(path, revision, whole=_has_marks(loaded.model))
        batches: list[Batch] = [_batch_of(record, processor, loaded) for record in records]
    reach = context_of(loaded.model)
    for record, batch in zip(records, batches, strict=True):
        tokens = batch["input_ids"].shape[1] if "input_ids" in batch and not isinstance(batch, Tensor) else 0
        if reach is not None and tokens > reach:
            raise InfraError(
                f"{record.name}: the prompt has {tokens:,} tokens with its {record.kind}, more than the {reach:,} "
                f"positions that {type(loaded.model).__name__} takes: a shorter text, or a smaller {record.kind}"
            )
    return batches


def _processor(path: str, revision: str | None, *, whole: bool) -> Any:
    """Load the processor of a checkpoint. `whole`: it has to make the prompt as well.

    Raises:
        InfraError: it has none, or a package is missing that it needs.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    name, problem = shown_path(Path(path)), ""
    # A folder with a tokenizer beside the processor of its pictures may give the tokenizer.
    kinds: tuple[Any, ...] = (AutoProcessor,) if whole else (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor)
    for kind in kinds:
        try:
            processor = kind.from_pretrained(path, revision=revision, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its parts raise
            problem = problem or one_line(error)[:300]
            continue
        if any(
            hasattr(processor, part) for part in ("image_processor", "feature_extractor", "preprocess", "sampling_rate")
        ):
            return processor
    advice = "save it beside the weights (preprocessor_config.json, processor_config.json)"
    if "torchvision" in problem.lower():
        advice = "install torchvision, the build that fits this torch"
    raise InfraError(
        f"{name}: no processor of pictures or sounds can be loaded{f' ({problem})' if problem else ''}: {advice}, or "
        "give batches in a fixture qsa_batches"
    )


def _batch_of(record: Record, processor: Any, loaded: Loaded) -> Mapping[str, Any]:
    medium: dict[str, Any] = {"images": [record.image]} if record.image is not None else {"audio": [record.audio]}
    extractor = getattr(processor, "feature_extractor", processor)
    if record.audio is not None:
        wanted = getattr(extractor, "sampling_rate", RATE)
        if wanted != record.rate:
            raise InfraError(
                f"{record.name} has {record.rate:,} samples a second, and the model's processor takes {wanted:,}: "
                "resample it"
            )
        medium["sampling_rate"] = wanted
    if hasattr(processor, "tokenizer") and "input_ids" in _arguments(loaded.model):
        medium["text"] = [_text_of(record, processor)]
    try:
        found = processor(return_tensors="pt", **medium)
    except Exception as error:  # a processor raises whatever its parts raise
        raise InfraError(
            f"the model's processor, {type(processor).__name__}, takes no {record.kind} ({record.name}): "
            f"{type(error).__name__}: {one_line(error)[:300]}"
        ) from None
    known = _arguments(loaded.model)
    tensors = {name: value for name, value in found.items() if name in known and isinstance(value, Tensor)}
    if not any(value.is_floating_point() for value in tensors.values()):
        raise InfraError(f"{type(loaded.model).__name__} takes nothing of what its processor makes of {record.name}")
    dtype = next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), torch.float32)
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    batch = MediaBatch(tensors | _decoder_ids(record, loaded))
    batch.picture = picture_of(record, tensors, processor, loaded.model) if record.image is not None else None
    return batch


def _text_of(record: Record, processor: Any) -> str:
    """Return the prompt of a record: through the chat template where there is one, with the mark of the medium."""
    text = record.text or ASKED[record.kind]
    if getattr(processor, "chat_template", None):
        content = [{"type": record.kind, f"{record.kind}_url": record.name}, {"type": "text", "text": text}]
        try:
            return str(
                processor.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # jinja2's errors
            raise InfraError(f"the processor's chat template can't format a {record.kind}: {one_line(error)}") from None
    mark: str = getattr(processor, f"{'boi' if hasattr(processor, 'boi_token') else record.kind}_token", "")
    return f"{mark}\n{text}" if mark else record.text or record.caption or text


def _decoder_ids(record: Record, loaded: Loaded) -> dict[str, Tensor]:
    """Return what a decoder reads beside an encoded sound: its start, and the text of the record."""
    config: Any = getattr(loaded.model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return {}
    if loaded.tokenizer is None:
        raise AnomalyError(f"{type(loaded.model).__name__} has a decoder, and the checkpoint no tokenizer")
    ids = list(
        loaded.tokenizer(record.text or record.caption or ASKED[record.kind], add_special_tokens=False)["input_ids"]
    )
    return {"decoder_input_ids": torch.tensor([[config.decoder_start_token_id, *ids]])}


def media_available(data: Data, folder: Path, most: int) -> int | None:
    """Return how many records a source has, at most `most`; None where each number draws another."""
    path = local_path(data, folder)
    if path is not None and is_folder_of_media(path):
        return len(kept_names(path))
    rows = None if data.source in {*MEDIA, "sample"} else rows_of_set(data, folder, most)
    return None if rows is None else len(rows)

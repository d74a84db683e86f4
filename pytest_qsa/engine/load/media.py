"""Data with pictures and sounds: drawn by the package or read from a folder → the arguments of a model's forward.

The model's own processor turns each record into them, through its chat template where it has one; a record is a batch,
for pictures differ in size.
"""

from __future__ import annotations

import inspect
import json
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common import MOST_TEXT, AnomalyError, InfraError, one_line, parsed_json, refuse_special, shown_path
from ...suite import MEDIA, Data, local_path
from ..modules import check_context
from .batches import Batch
from .models import Loaded, quiet

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SOUNDS = (".wav",)
OF_TEXTS = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".txt")
"""A folder with such a file is a data set of texts, whatever pictures lie beside."""
RECORDS = "metadata.jsonl"
"""The file of a folder that says more of its files, as the hub's data sets of pictures have it."""
SIDE = 96
"""The pixels of a drawn picture's sides."""
RATE, SECONDS = 16_000, 1.0
"""Of a drawn sound."""
MOST_PIXELS, MOST_BYTES = 50_000_000, 500_000_000
ASKED = {"image": "What does this picture show?", "audio": "What can be heard in this recording?"}


@dataclass(frozen=True)
class Record:
    """A picture, [height, width, 3] uint8, or a sound, [samples] float32 with its rate.

    `text`: what is asked about it, where a folder says so. `caption`: what a drawn one shows.
    """

    name: str
    text: str
    image: NDArray[np.uint8] | None = None
    audio: NDArray[np.float32] | None = None
    rate: int = RATE
    caption: str = ""

    @property
    def kind(self) -> str:
        """What it is: `image` or `audio`."""
        return "image" if self.image is not None else "audio"


def has_media(data: Data, folder: Path, model: Any) -> bool:
    """Say whether the samples of some data are pictures or sounds: by their source, or as the model reads no text."""
    if data.source in MEDIA:
        return True
    path = local_path(data, folder)
    if path is not None and path.is_dir():
        suffixes = {file.suffix.lower() for file in path.iterdir() if file.name != RECORDS}
        return not suffixes.isdisjoint(PICTURES + SOUNDS) and suffixes.isdisjoint(OF_TEXTS)
    return data.source == "sample" and wanted_medium(model) != ""


def media_of(data: Data, folder: Path, model: Any) -> frozenset[str]:
    """Return what the samples of some data hold, of `image` and `audio`; nothing for texts."""
    if not has_media(data, folder, model):
        return frozenset()
    path = local_path(data, folder)
    if path is None:
        return frozenset({MEDIA.get(data.source) or wanted_medium(model)})
    kinds = {file.suffix.lower() in SOUNDS for file in path.iterdir() if file.suffix.lower() in PICTURES + SOUNDS}
    return frozenset("audio" if sound else "image" for sound in kinds)


def wanted_medium(model: Any) -> str:
    """Return what a model can't run without: `image`, `audio`, or nothing, as one that also reads text alone."""
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", "")
    marks = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    if config is None or any(getattr(config, mark, None) is not None for mark in marks):
        return ""
    if name in ("input_features", "input_values"):
        return "audio"
    generates = hasattr(model, "can_generate") and model.can_generate()
    return "image" if "pixel_values" in _arguments(model) and not generates else ""


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
        processor = _processor(path, revision)
        batches: list[Batch] = [_batch_of(record, processor, loaded) for record in records]
    for batch in batches:
        if "input_ids" in batch and not isinstance(batch, Tensor):
            check_context(loaded.model, batch["input_ids"].shape[1])
    return batches


def records_of(data: Data, folder: Path, medium: str = "") -> list[Record]:
    """Return the records of some data, drawn or read.

    Raises:
        InfraError: a file can't be decoded, or there are too few.
    """
    path = local_path(data, folder)
    if path is not None and path.is_dir():
        return _read(path, data.num_samples)
    kind = MEDIA.get(data.source, medium)
    numbers = range(data.seed, data.seed + data.num_samples)
    return [drawn_picture(number) if kind == "image" else drawn_sound(number) for number in numbers]


def drawn_picture(number: int) -> Record:
    """Draw a picture: a gradient with stripes, a disc or a chequered field on it, and some noise. One for each number.

    The same on any machine: integers of a generator that numpy keeps stable.
    """
    chance = np.random.Generator(np.random.PCG64(number))
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    corners = chance.integers(0, 256, (2, 3))
    picture = (corners[0] * (SIDE - x[..., None]) + corners[1] * x[..., None]) // SIDE
    form, width = ("stripes", "disc", "chequers")[number % 3], int(chance.integers(6, 24))
    centre = chance.integers(SIDE // 4, 3 * SIDE // 4, 2)
    inside = {
        "stripes": (x + y) // width % 2 == 0,
        "disc": (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < (2 * width) ** 2,
        "chequers": (x // width + y // width) % 2 == 0,
    }[form]
    picture = np.where(inside[..., None], chance.integers(0, 256, 3), picture)
    picture = np.clip(picture + chance.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)
    return Record(f"picture {number}", "", image=picture, caption=f"a picture of {form}")


def drawn_sound(number: int) -> Record:
    """Make a sound: a rising tone, a chord or bursts of noise. One for each number."""
    chance = np.random.Generator(np.random.PCG64(number))
    t = np.arange(int(RATE * SECONDS)) / RATE
    low = float(chance.integers(110, 660))
    form = ("rising tone", "chord", "bursts of noise")[number % 3]
    wave_of = {
        "rising tone": np.sin(2 * np.pi * (low * t + low * t**2)),
        "chord": np.sin(2 * np.pi * low * np.outer((1.0, 1.25, 1.5), t)).mean(axis=0),
        "bursts of noise": (chance.integers(-1000, 1001, len(t)) / 1000) * (np.sin(2 * np.pi * 4 * t) > 0),
    }[form]
    return Record(f"sound {number}", "", audio=(0.5 * wave_of).astype(np.float32), caption=f"a {form}")


def _read(folder: Path, count: int) -> list[Record]:
    """Read the first records of a folder, by name; those of `metadata.jsonl` where it is there."""
    said = _said(folder)
    names = list(said) or sorted(f.name for f in folder.iterdir() if f.suffix.lower() in PICTURES + SOUNDS)
    if len(names) < count:
        raise InfraError(f"{shown_path(folder)}: it has {len(names)} records, and data.num_samples asks for {count}")
    return [_record(folder / name, said.get(name, "")) for name in names[:count]]


def _said(folder: Path) -> dict[str, str]:
    """Return file name → text of `metadata.jsonl`; the name is under `image`, `audio` or `file_name`."""
    file = folder / RECORDS
    if not file.is_file():
        return {}
    refuse_special(file, MOST_TEXT)
    found: dict[str, str] = {}
    for index, line in enumerate(filter(str.strip, file.read_text(encoding="utf-8-sig").split("\n"))):
        try:
            record = parsed_json(line)
        except (ValueError, json.JSONDecodeError) as error:
            raise InfraError(f"{shown_path(file)}: record {index} is no JSON: {one_line(error)}") from None
        name = next(
            (record[key] for key in ("image", "audio", "file_name") if isinstance(record, dict) and key in record), None
        )
        text = record.get("text", "") if isinstance(record, dict) else ""
        if not isinstance(name, str) or not isinstance(text, str):
            raise InfraError(f"{shown_path(file)}: record {index} names no file under image, audio or file_name")
        if name != Path(name).name:
            raise InfraError(f"{shown_path(file)}: record {index} names {name!r}, which is no file of this folder")
        found[name] = text
    return found


def _record(file: Path, text: str) -> Record:
    if not file.is_file():
        raise InfraError(f"{shown_path(file)}: there is no such file, which {RECORDS} names")
    refuse_special(file, MOST_BYTES)
    if file.suffix.lower() in SOUNDS:
        audio, rate = _sound(file)
        return Record(file.name, text, audio=audio, rate=rate)
    return Record(file.name, text, image=_picture(file))


def _picture(file: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InfraError(f"{shown_path(file)}: {image.width} × {image.height} pixels are too many")
            return np.asarray(image.convert("RGB"))
    except InfraError:
        raise
    except Exception as error:  # Pillow raises whatever its decoders do
        raise InfraError(f"{shown_path(file)}: the picture can't be decoded: {one_line(error)}") from None


def _sound(file: Path) -> tuple[NDArray[np.float32], int]:
    try:
        with wave.open(str(file), "rb") as sound:
            channels, width, rate, frames = sound.getparams()[:4]
            content = sound.readframes(frames)
    except (wave.Error, EOFError, OSError) as error:
        raise InfraError(
            f"{shown_path(file)}: the sound can't be decoded: {one_line(error) or 'it ends early'}"
        ) from None
    if width not in (2, 4) or not content:
        raise InfraError(f"{shown_path(file)}: a sound is PCM in 16 or 32 bits, not in {8 * width}, and not empty")
    values = np.frombuffer(content, dtype=f"<i{width}").reshape(-1, channels).astype(np.float64)
    return (values.mean(axis=1) / 2.0 ** (8 * width - 1)).astype(np.float32), int(rate)


def _processor(path: str, revision: str | None) -> Any:
    """Load the processor of a checkpoint.

    Raises:
        InfraError: it has none, or a package is missing that it needs.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    name, problem = shown_path(Path(path)), ""
    # A folder with a tokenizer beside the processor of its pictures may give the tokenizer.
    kinds: tuple[Any, ...] = (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor)
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
    raise InfraError(
        f"{name}: no processor of pictures or sounds can be loaded{f' ({problem})' if problem else ''}: save it beside "
        "the weights (preprocessor_config.json, processor_config.json), or give batches in a fixture qsa_batches"
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
    return tensors | _decoder_ids(record, loaded)


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


def media_available(data: Data, folder: Path) -> int | None:
    """Return how many records a source has; None where each number draws another."""
    path = local_path(data, folder)
    if path is None or not path.is_dir():
        return None
    return len(_said(path)) or sum(file.suffix.lower() in PICTURES + SOUNDS for file in path.iterdir())

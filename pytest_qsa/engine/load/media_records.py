"""Records with pictures and sounds: drawn by the package, files of a folder, or columns of a set of data."""

from __future__ import annotations

import io
import json
import wave
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common import MOST_TEXT, InfraError, did_you_mean, one_line, parsed_json, refuse_special, shown_path
from ...suite import MEDIA, PICTURES, SOUNDS, Data, cache_folder, local_path, media_column
from .sources import rows_of_set

OF_TEXTS = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".txt")
"""A folder with such a file is a data set, whatever pictures lie beside."""
RECORDS = "metadata.jsonl"
"""The file of a folder that says more of its files, as the hub's data sets of pictures have it."""
SIDE = 96
"""The pixels of a drawn picture's sides."""
RATE, SECONDS = 16_000, 1.0
"""Of a drawn sound."""
MOST_PIXELS, MOST_BYTES = 50_000_000, 500_000_000


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


def is_folder_of_media(path: Path) -> bool:
    """Say whether a folder holds pictures or sounds as files, and no set of data."""
    if not path.is_dir():
        return False
    suffixes = {file.suffix.lower() for file in path.iterdir() if file.name != RECORDS}
    return not suffixes.isdisjoint(PICTURES + SOUNDS) and suffixes.isdisjoint(OF_TEXTS)


def kinds_of_folder(path: Path) -> frozenset[str]:
    """Return what the files of a folder are, of `image` and `audio`."""
    suffixes = {file.suffix.lower() for file in path.iterdir()}
    kinds = {"image": PICTURES, "audio": SOUNDS}
    return frozenset(kind for kind, known in kinds.items() if not suffixes.isdisjoint(known))


def kept_names(folder: Path) -> list[str]:
    """Return the names of a folder's files in their order; those of `metadata.jsonl` where it is there."""
    return list(_said(folder)) or sorted(f.name for f in folder.iterdir() if f.suffix.lower() in PICTURES + SOUNDS)


def records_of(data: Data, folder: Path, medium: str = "") -> list[Record]:
    """Return the records of some data, drawn or read: the first ones, in their order.

    `medium`: what is drawn for `sample`.

    Raises:
        InfraError: a file can't be decoded, or there are too few.
    """
    path = local_path(data, folder)
    if path is not None and is_folder_of_media(path):
        return _read(path, data.num_samples)
    if data.source not in {*MEDIA, "sample"}:
        return _of_rows(data, folder)
    kind = MEDIA.get(data.source, medium)
    numbers = range(data.seed, data.seed + data.num_samples)
    return [drawn_picture(number) if kind == "image" else drawn_sound(number) for number in numbers]


def _of_rows(data: Data, folder: Path) -> list[Record]:
    """Return the records of a set that has a column of pictures or sounds."""
    rows = rows_of_set(data, folder, data.num_samples) or []
    found, named = media_column(rows), shown_path(path) if (path := local_path(data, folder)) else data.source
    if found is None:
        raise InfraError(f"{named}: there is no column 'image' or 'audio'")
    _check_count(named, len(rows), data.num_samples)
    column, text = found[0], _text_column(rows[0], data, named)
    # A set's own files lie in its folder, and those that a file of records names beside that file.
    base = cache_folder() if path is None else path if path.is_dir() else path.parent
    pictures_inside = path is not None and path.suffix == ".parquet"
    records = []
    for index, row in enumerate(rows):
        where = f"{named}: record {index}"
        if not isinstance(row, dict) or not row.get(column):
            raise InfraError(f"{where} has nothing under '{column}'")
        if not isinstance(said := (row.get(text) or "") if text else "", str):
            raise InfraError(f"{where} has no text under '{text}' but a {type(said).__name__}")
        records.append(_of_value(row[column], said, where, None if pictures_inside else base, found[1]))
    return records


def _text_column(row: dict[str, Any], data: Data, named: str) -> str:
    """Return the column of the texts; nothing where none is named and there is none."""
    asked = data.column or (data.custom.text_column if data.custom.text_column != "text" else None)
    if asked is not None and asked not in row:
        raise InfraError(f"{named}: there is no column '{asked}'; it has {', '.join(row)}{did_you_mean(asked, row)}")
    return asked or ("text" if "text" in row else "")


def _of_value(value: Any, text: str, where: str, base: Path | None, kind: str) -> Record:
    """Return the record of a value as a set has it: a path, bytes with their path, or a list of one of these.

    `base`: the folder below which its file lies; None where it has to be bytes.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise InfraError(f"{where} has {len(value)} of them, and a sample is a prompt with one {kind}")
        value = value[0]
    content, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if isinstance(content, bytes):
        return _decoded(content, f"{where} ({name})" if isinstance(name, str) else where, text, kind)
    if not isinstance(name, str):
        raise InfraError(f"{where} has no {kind} but a {type(value).__name__}")
    if base is None:
        raise InfraError(
            f"{where} names {name!r} and holds no bytes: write them into the column, or name paths in a JSONL file"
        )
    file = base / name
    if "://" in name or not file.resolve().is_relative_to(base.resolve()):
        raise InfraError(f"{where} names {name!r}, which doesn't lie below {shown_path(base)}: paths count from there")
    return _record(file, text, f"{where} names {name!r}, and there is no such file below {shown_path(base)}", kind)


def _decoded(content: bytes, name: str, text: str, kind: str) -> Record:
    if kind == "audio":
        audio, rate = _sound(io.BytesIO(content), name)
        return Record(name, text, audio=audio, rate=rate)
    return Record(name, text, image=_picture(io.BytesIO(content), name))


def _check_count(named: str, count: int, wanted: int) -> None:
    if count < wanted:
        raise InfraError(f"{named}: it has {count} records, and data.num_samples asks for {wanted}")


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
    """Read the first records of a folder."""
    said, names = _said(folder), kept_names(folder)
    _check_count(shown_path(folder), len(names), count)
    missing = f"there is no such file, which {RECORDS} names"
    return [
        _record(file, said.get(file.name, ""), f"{shown_path(file)}: {missing}")
        for file in (folder / name for name in names[:count])
    ]


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


def _record(file: Path, text: str, missing: str, kind: str = "") -> Record:
    """Read a file. `missing`: what to say where there is none. `kind`: what it is; by its suffix where it is empty."""
    if not file.is_file():
        raise InfraError(missing)
    refuse_special(file, MOST_BYTES)
    sound = file.suffix.lower() in SOUNDS or kind == "audio"
    found = _decoded(file.read_bytes(), shown_path(file), text, "audio" if sound else "image")
    return replace(found, name=file.name)


def _picture(content: io.BytesIO, name: str) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(content) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InfraError(f"{name}: {image.width} × {image.height} pixels are too many")
            return np.asarray(image.convert("RGB"))
    except InfraError:
        raise
    except Exception as error:  # Pillow raises whatever its decoders do
        # Pillow names the object that it read of, which says nothing.
        said = "it is no picture" if "cannot identify" in str(error) else one_line(error)
        raise InfraError(f"{name}: the picture can't be decoded: {said}") from None


def _sound(content: io.BytesIO, name: str) -> tuple[NDArray[np.float32], int]:
    try:
        with wave.open(content, "rb") as sound:
            channels, width, rate, frames = sound.getparams()[:4]
            values = sound.readframes(frames)
    except (wave.Error, EOFError, OSError) as error:
        raise InfraError(
            f"{name}: the sound can't be decoded: {one_line(error) or 'it ends early'}; WAV in PCM is read"
        ) from None
    if width not in (2, 4) or not values:
        raise InfraError(f"{name}: a sound is PCM in 16 or 32 bits, not in {8 * width}, and not empty")
    frames_of = np.frombuffer(values[: len(values) // (width * channels) * width * channels], dtype=f"<i{width}")
    mono = frames_of.reshape(-1, channels).astype(np.float64).mean(axis=1)
    return (mono / 2.0 ** (8 * width - 1)).astype(np.float32), int(rate)

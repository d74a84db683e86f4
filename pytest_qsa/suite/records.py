"""Records of a file that a suite names, JSON, JSON Lines or CSV, and their columns with pictures or sounds."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common import MOST_TEXT, parsed_json, refuse_special
from .sections import Data

SUFFIXES = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "jsonl", ".csv": "csv"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SOUNDS = (".wav",)
MEDIA_COLUMNS = {"image": "image", "images": "image", "audio": "audio"}
"""The names of columns with pictures or sounds → what they hold."""
FIRST_RECORD = 1 << 20
"""Bytes in which the first record of a file names its columns."""


def file_records(path: Path, data: Data) -> Sequence[Any] | None:
    """Return the records of a file; None of one that is a text.

    Raises:
        OSError, ValueError, csv.Error: it can't be read.
    """
    form: str = data.custom.format
    if form == "auto":
        form = SUFFIXES.get(path.suffix, "text")
    refuse_special(path, MOST_TEXT)
    if form in ("text", "txt"):
        return None
    text = path.read_text(encoding="utf-8-sig")
    if form == "csv":
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a document may be longer than 131,072 characters
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if form == "jsonl":
        # not splitlines, which cuts at separators that JSON allows inside of a string
        return [parsed_json(line) for line in text.split("\n") if line.strip()]
    loaded = parsed_json(text)
    return loaded if isinstance(loaded, list) else [loaded]


def media_column(rows: Sequence[Any]) -> tuple[str, str] | None:
    """Return the column of a set's records that holds pictures or sounds, and its kind, `image` or `audio`."""
    first = rows[0] if rows and isinstance(rows[0], dict) else {}
    for name, value in first.items():
        value = value[0] if isinstance(value, list) and value else value
        suffix = Path(value).suffix.lower() if isinstance(value, str) else ""
        if name in MEDIA_COLUMNS and value:
            return name, MEDIA_COLUMNS[name]
        if name == "file_name" and suffix in PICTURES + SOUNDS:
            return name, "audio" if suffix in SOUNDS else "image"
        if isinstance(value, dict) and {*value} == {"bytes", "path"}:  # of another name (CIFAR: img)
            return name, "audio" if Path(value["path"] or "").suffix.lower() in SOUNDS else "image"
    return None


def named_media(path: Path, data: Data) -> list[Path]:
    """Return the files that the records of a file name as their pictures or sounds; none where it can't be read."""
    if path.suffix == ".parquet" or data.custom.format == "parquet":
        return []  # they lie in it
    with path.open("rb") as content:
        head = content.read(FIRST_RECORD)
    if not any(name.encode() in head for name in (*MEDIA_COLUMNS, "file_name")):
        return []  # a text, or a long file of texts, isn't parsed for it
    try:
        rows = file_records(path, data) or []
    except (OSError, ValueError, csv.Error):
        return []
    if (column := media_column(rows)) is None:
        return []
    values = [row.get(column[0]) for row in rows[: data.num_samples] if isinstance(row, dict)]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [path.parent / name for name in names if isinstance(name, str)]

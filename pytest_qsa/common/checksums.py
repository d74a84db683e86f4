"""The checksum that a file of this program carries of itself, so that every reader tells what was damaged or edited.

It is the SHA-256 of the file's bytes while `BLANK` stands in its place: any program can compute it again. It shows
damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from mmap import mmap
from typing import Any

from .errors import InfraError
from .files import parsed_json

_PREFIX = b"sha256:"
BLANK = f"sha256:{'0' * 64}"
"""Stands in a file where its checksum goes, until all else is written."""
NO_CHECKSUM = "has no checksum, as those of earlier versions, so damage to it can't be seen"
_HEAD = 1 << 20
"""How many bytes are searched at a time for a checksum: a mapped file may be larger than memory."""


def with_checksum(content: bytes) -> bytes:
    """Return the content of a file with its checksum in the place of the first `BLANK`."""
    return b"".join(parts_with_checksum([content]))


def parts_with_checksum(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return the parts of a file with its checksum in the place of `BLANK`, in the first; the others aren't copied."""
    first, *others = parts
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    at, view = bytes(first).index(BLANK.encode()), memoryview(first)
    return [view[:at], _PREFIX, digest.hexdigest().encode(), view[at + len(BLANK) :], *others]


def check_checksum(content: bytes | mmap, stated: object) -> None:
    """Hold the content of a file against the checksum that it states.

    Raises:
        InfraError: it is another one.
    """
    text = str(stated).encode()
    digest = hashlib.sha256()
    with memoryview(content) as view:
        at = _find(view, text)
        if at is not None:
            digest.update(view[:at])
            digest.update(BLANK.encode())
            digest.update(view[at + len(text) :])
    if at is None or text != _PREFIX + digest.hexdigest().encode():
        raise InfraError("its checksum differs: it was damaged, or changed after it was written")


def _find(view: memoryview, text: bytes) -> int | None:
    for start in range(0, len(view), _HEAD):
        found = bytes(view[start : start + _HEAD + len(text)]).find(text)
        if found >= 0:
            return start + found
    return None


def json_with_checksum(content: Mapping[str, Any]) -> bytes:
    """Return JSON as a file whose first key is its checksum."""
    return with_checksum(json.dumps({"checksum": BLANK, **content}).encode())


def checked_json(content: bytes) -> dict[str, Any]:
    """Read what `json_with_checksum` made, without its checksum.

    Raises:
        InfraError: it was damaged or changed, is no such file, or has no checksum.
    """
    try:
        read = parsed_json(content)
        stated = read.pop("checksum")
    except (ValueError, AttributeError, KeyError, TypeError):
        raise InfraError("it is damaged, or has no checksum") from None
    check_checksum(content, stated)
    return dict(read)


def content_hash(content: Any) -> str:
    """Return the SHA-256 of JSON whatever its layout: of its canonical form, sorted, without spaces, `1.0` as `1`."""
    text = json.dumps(_canonical(content), sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()}"


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""Token ids → the texts that failures and plots show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], Mapping[int, str]] | None:
    """Return a function that decodes each token by itself; what is no whole character shows the vocabulary's form."""
    if tokenizer is None:
        return None

    def decode(ids: Sequence[int]) -> Mapping[int, str]:
        return {token: _piece(tokenizer, token) for token in ids}

    return decode


def _piece(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token]))
    if REPLACEMENT in text and hasattr(tokenizer, "convert_ids_to_tokens"):
        return str(tokenizer.convert_ids_to_tokens(token))
    return text


def tokenizer_identity(tokenizer: Any) -> str | None:
    """Return the class, size and hash of a tokenizer, so that a report can say which one it was; None for none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # What stands before are truncation and padding, which each call sets anew.
        text = backend.to_str().partition('"added_tokens"')[2]
    elif hasattr(tokenizer, "get_vocab"):
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        return type(tokenizer).__name__
    size = f", {len(tokenizer):,} entries" if hasattr(tokenizer, "__len__") else ""
    return f"{type(tokenizer).__name__}{size}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"

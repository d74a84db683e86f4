"""Token ids → the texts that failures and plots show."""

from __future__ import annotations

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

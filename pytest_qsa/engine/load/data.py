"""Calibration data: the texts of a source (sources.py) → windows of tokens, without padding.

The same seed gives the same windows, on any machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common import (
    AnomalyError,
    InfraError,
    one_line,
)
from ...suite import (
    Data,
    hub_set_of,
)
from .batches import Batch
from .sources import read_texts
from .tokenizer import TextTokenizer, templated

TRAINING_SHARE = 0.9
"""PrefixQuant draws its calibration windows from the first nine tenths of a set."""
DOCUMENT_TRIES = 200
"""The number of documents that are tried for each window before a set counts as too short."""


def batches_of(data: Data, tokenizer: TextTokenizer, folder: Path, config: Any = None) -> list[Batch]:
    """Return the batches of token windows, [batch_size, seq_len] each.

    `folder`: what a relative `custom:` path is relative to. `config`: the model's, which says whether it has a decoder.

    Raises:
        InfraError: the source is unknown or unreadable, or there is too little text for the windows.
    """
    texts = read_texts(data, folder)
    spec = hub_set_of(data)
    draw = {"packed": windows_of, "stream": stream_windows, "document": document_windows}[
        spec.rule if spec else "packed"
    ]
    windows = draw(_prepared(texts, data, tokenizer), data, tokenizer)
    rows = [windows[start : start + data.batch_size] for start in range(0, len(windows), data.batch_size)]
    if getattr(config, "is_encoder_decoder", False):
        return [{"input_ids": row, "decoder_input_ids": _shifted(row, config)} for row in rows]
    return [{"input_ids": row} for row in rows]


def windows_available(data: Data, tokenizer: TextTokenizer, folder: Path) -> int | None:
    """Return the number of disjoint windows of a source; None where its rule draws them at random places.

    Raises:
        InfraError: as `batches_of`.
    """
    spec = hub_set_of(data)
    if spec is not None and spec.rule != "packed":
        return None
    texts = _prepared(read_texts(data, folder), data, tokenizer)
    return _available(len(_stream(texts, tokenizer)), _frame(data, tokenizer)[2], data)


def windows_of(texts: Sequence[str], data: Data, tokenizer: TextTokenizer) -> Tensor:
    """Pack the texts into one stream and cut it into [num_samples, seq_len]; each window has its special tokens.

    Where there are more windows than asked for, the seed chooses. With `data.stride` they follow one another at that
    distance, and the seed chooses the first.
    """
    prefix, suffix, inner = _frame(data, tokenizer)
    stream = _stream(texts, tokenizer)
    available, step = _available(len(stream), inner, data), data.stride or inner
    if available < data.num_samples:
        raise InfraError(
            f"too little text in '{data.source}': {len(stream)} tokens make {available} windows of {data.seq_len}"
            f"{f' that begin {data.stride} apart' if data.stride else ''}, "
            f"and data.num_samples asks for {data.num_samples}: ask for fewer, or name a longer text"
        )
    random = np.random.default_rng(data.seed)
    if data.stride is None:
        chosen = np.sort(random.choice(available, data.num_samples, replace=False))
    else:
        chosen = np.arange(data.num_samples) + random.integers(available - data.num_samples + 1)
    return torch.tensor([[*prefix, *stream[i * step : i * step + inner], *suffix] for i in chosen.tolist()])


def _available(tokens: int, inner: int, data: Data) -> int:
    """Return the number of windows of `inner` tokens that a text of that many has, at the distance of the data."""
    return max(0, (tokens - inner) // (data.stride or inner) + 1)


def _stream(texts: Sequence[str], tokenizer: TextTokenizer) -> list[int]:
    return [token for text in texts for token in _ids(tokenizer, text)]


def stream_windows(texts: Sequence[str], data: Data, tokenizer: TextTokenizer) -> Tensor:
    """Join the texts by blank lines and cut windows at random places, which may overlap (PrefixQuant's WikiText-2)."""
    prefix, suffix, inner = _frame(data, tokenizer)
    stream = _ids(tokenizer, "\n\n".join(texts))
    last = int(len(stream) * TRAINING_SHARE) - inner - 1
    if last < 0:
        raise InfraError(f"too little text in '{data.source}': {len(stream)} tokens are too few for {data.seq_len}")
    chance = random.Random(data.seed)
    starts = [chance.randint(0, last) for _ in range(data.num_samples)]
    return torch.tensor([[*prefix, *stream[start : start + inner], *suffix] for start in starts])


def document_windows(texts: Sequence[str], data: Data, tokenizer: TextTokenizer) -> Tensor:
    """Cut each window at a random place of a random text that is longer than it (PrefixQuant's Pile, C4, RedPajama)."""
    prefix, suffix, inner = _frame(data, tokenizer)
    chance = random.Random(data.seed)
    known: dict[int, list[int]] = {}
    rows: list[list[int]] = []
    for _ in range(data.num_samples * DOCUMENT_TRIES):
        if len(rows) == data.num_samples:
            break
        # One generator draws texts and positions, so that their order is part of what a seed means.
        index = chance.randint(0, max(int(len(texts) * TRAINING_SHARE) - 1, 0))
        if index not in known:
            known[index] = _ids(tokenizer, texts[index])
        tokens = known[index]
        if len(tokens) > inner:
            start = chance.randint(0, len(tokens) - inner - 1)
            rows.append([*prefix, *tokens[start : start + inner], *suffix])
    if len(rows) < data.num_samples:
        raise InfraError(
            f"too few texts of '{data.source}' are longer than {inner} tokens: {len(rows)} windows were found, and "
            f"data.num_samples asks for {data.num_samples}; lower data.seq_len"
        )
    return torch.tensor(rows)


def _frame(data: Data, tokenizer: TextTokenizer) -> tuple[list[int], list[int], int]:
    """Return the special tokens before and after a window, and how many tokens of text fit between them."""
    prefix, suffix = _special_tokens(tokenizer) if data.add_special_tokens else ([], [])
    inner = data.seq_len - len(prefix) - len(suffix)
    if inner < 1:
        raise InfraError(
            f"data.seq_len {data.seq_len} leaves no room beside {len(prefix) + len(suffix)} special tokens"
        )
    return prefix, suffix, inner


def _ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Return the token ids of a text.

    Raises:
        AnomalyError: the tokenizer can't make any, for lack of its unknown token say.
    """
    try:
        # Not verbose: transformers warns of a text that is longer than the model's context, and here it is cut.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # tokenizers raises plain Exceptions
        where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise AnomalyError(f"the tokenizer of {where} can't encode {text[:20]!r}: {one_line(error)}") from error


def _prepared(texts: Sequence[Any], data: Data, tokenizer: TextTokenizer) -> Sequence[str]:
    return templated(texts, tokenizer) if data.chat_template else texts


def _special_tokens(tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after a text."""
    # Templates, post-processors or flags may add them, so an encoded text is looked at instead of settings.
    bare, whole = _ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _shifted(row: Tensor, config: Any) -> Tensor:
    # A decoder reads, at each position, the token before the one that it predicts there.
    start = getattr(config, "decoder_start_token_id", None)
    return torch.cat([torch.full_like(row[:, :1], start if start is not None else 0), row[:, :-1]], dim=1)

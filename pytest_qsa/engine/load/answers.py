"""A model's own greedy answers as data, and where in a text it ends, begins or marks something: its boundary tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...captures import LOGITS, Array, BoundaryTokens, Capture, PredictionMargins, Request, with_shifts
from ...common import AnomalyError, InfraError, one_line, phase
from ...suite import ANSWERED_AT_ONCE, Conversation, Data, conversation_of
from ..modules import check_context, device_of, evaluating
from .batches import Batch
from .models import Loaded, quiet
from .sources import read_texts
from .tokenizer import TextTokenizer, offered

NO_TOKEN = 2**31 - 1
"""Beyond every vocabulary."""


class Answers(dict[str, Tensor]):
    """A batch of prompts with their answers. `starts`: the position of the first token of each answer."""

    starts: Sequence[int] = ()


class Steps(dict[str, Tensor]):
    """An answer [1, T] that goes through a model token by token, after its `prompt` has."""

    prompt: Sequence[int] = ()


def in_steps(samples: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Batch]:
    """Return prompts with their answers as batches of one answer each, for the decode phase."""
    found: list[Batch] = []
    for prompt, answer in samples:
        batch = Steps({"input_ids": torch.tensor([list(answer)])})
        batch.prompt = prompt
        found.append(batch)
    return found


def answer_batches(data: Data, tokenizer: TextTokenizer, folder: Path, by: Loaded, whose: str) -> list[Batch]:
    """Return the batches of the prompts of some data, each with the greedy answer that a model gives to it.

    `by`: the model that answers. `whose`: what an error calls it.

    Raises:
        InfraError: the source has fewer prompts, one is longer than `data.seq_len`, or the model can't generate.
    """
    assert data.answers is not None
    prompts = prompts_of(data, tokenizer, folder)
    longest = max(map(len, prompts))
    if longest >= data.seq_len:
        raise InfraError(
            f"a prompt of '{data.source}' has {longest} tokens, and data.seq_len {data.seq_len} leaves no room"
        )
    check_context(by.model, data.seq_len)
    answers = answers_by(by, prompts, data.answers.max_new_tokens, data.seq_len, f"data.answers: {whose}")
    return answered_batches(data, list(zip(prompts, answers, strict=True)))


def answered_batches(data: Data, samples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Batch]:
    """Return prompts with their answers as the batches of some data, which say in which phase the model reads them."""
    assert data.answers is not None
    return in_steps(samples) if data.answers.phase == "decode" else batched(samples, data.batch_size)


def batched(samples: Sequence[tuple[Sequence[int], Sequence[int]]], size: int) -> list[Batch]:
    """Return prompts with their answers as batches, padded on the right."""
    found: list[Batch] = []
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        width = max(len(prompt) + len(answer) for prompt, answer in part)
        ids, mask = torch.zeros((2, len(part), width), dtype=torch.long)
        for row, (prompt, answer) in enumerate(part):
            whole = [*prompt, *answer]
            ids[row, : len(whole)], mask[row, : len(whole)] = torch.tensor(whole), 1
        batch = Answers({"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask})
        batch.starts = [len(prompt) for prompt, _ in part]
        found.append(batch)
    return found


def unbatched(batches: Iterable[Batch]) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of prompts and answers; the way back from `batched`."""
    samples = []
    for batch in batches:
        if isinstance(batch, Steps):
            samples.append((list(batch.prompt), batch["input_ids"][0].tolist()))
        if not isinstance(batch, Answers):
            continue
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for ids, kept, start in zip(batch["input_ids"], mask, batch.starts, strict=True):
            whole = ids[kept].tolist()
            samples.append((whole[:start], whole[start:]))
    return samples


def prompts_of(data: Data, tokenizer: TextTokenizer, folder: Path) -> list[list[int]]:
    """Return the token ids of the prompts that are drawn, in the model's template, up to where the answer begins.

    Raises:
        InfraError: the source has too few, or the tokenizer can't format a conversation for an answer.
    """
    conversations = conversations_of(data, folder, "data.num_samples")
    drawn = np.random.default_rng(data.seed).choice(len(conversations), data.num_samples, replace=False)
    return [formatted(conversations[index], tokenizer, "data.answers") for index in np.sort(drawn).tolist()]


def conversations_of(data: Data, folder: Path, count: str) -> list[Conversation]:
    """Return all conversations of a source, each without its last answer. `count`: the key that says how many it takes.

    Raises:
        InfraError: it can't be read, or has fewer than `data.num_samples`.
    """
    conversations = _conversations(data, folder)
    if len(conversations) < data.num_samples:
        raise InfraError(f"'{data.source}' has {len(conversations)} prompts, and {count} asks for {data.num_samples}")
    return conversations


def prompts_available(data: Data, folder: Path) -> int:
    """Return the number of prompts of a source."""
    return len(_conversations(data, folder))


def _conversations(data: Data, folder: Path) -> list[Conversation]:
    texts = read_texts(data.model_copy(update={"chat_template": True}), folder)
    return [found for text in texts if (found := _waiting(conversation_of(text))).messages]


def _waiting(conversation: Conversation) -> Conversation:
    """Return a conversation without what an assistant has said last, so that it waits for an answer."""
    messages = list(conversation.messages)
    while messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        messages.pop()
    return replace(conversation, messages=messages)


def formatted(conversation: Conversation, tokenizer: Any, asked_by: str) -> list[int]:
    """Return the token ids of a conversation in the model's template, up to where the answer begins.

    `asked_by`: the section of the suite that asks for it.

    Raises:
        InfraError: the tokenizer has no template, or one that can't format it, or not for an answer.
    """
    try:
        messages, tools = offered(conversation, tokenizer, asked_by)
        bare, asked = (
            str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **tools))
            for prompt in (False, True)
        )
    except InfraError:
        raise
    except Exception as error:  # jinja2's errors, and transformers' for a tokenizer without a template
        raise InfraError(f"{asked_by}: the tokenizer can't format a conversation: {one_line(error)}") from None
    if asked == bare:
        raise InfraError(
            f"{asked_by}: the chat template writes nothing for add_generation_prompt, so that no answer can begin"
        )
    return list(tokenizer(asked, add_special_tokens=False, verbose=False)["input_ids"])


def answers_by(by: Loaded, prompts: Sequence[Sequence[int]], most: int, length: int, whose: str) -> list[list[int]]:
    """Return a loaded model's greedy answers, as `greedy` does.

    Raises:
        InfraError: it can't generate, or is read block by block.
    """
    if by.stream is not None:
        raise InfraError(f"{whose} is read block by block, and answers need the whole model: leave offload_device out")
    phase(f"{whose.rpartition(': ')[2]} answers {len(prompts)} prompts")
    with quiet():
        return greedy(by.model, prompts, most, length, whose)


def greedy(model: nn.Module, prompts: Sequence[Sequence[int]], most: int, length: int, whose: str) -> list[list[int]]:
    """Return the likeliest tokens after each prompt, up to one that ends it, `most`, or `length` with the prompt.

    `whose`: which section of the suite asks, and who answers, for messages: `data.answers: the reference`.

    Raises:
        InfraError: the model can't generate.
    """
    check_generates(model, whose)
    ends = eos_of(model)
    answers: list[list[int]] = []
    for start in range(0, len(prompts), ANSWERED_AT_ONCE):
        part = prompts[start : start + ANSWERED_AT_ONCE]
        width = max(map(len, part))
        rows = [[0] * (width - len(row)) + [*row] for row in part]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in part]
        answers += _generated(model, rows, mask, min(most, length - width), ends, whose)
    return answers


def check_generates(model: nn.Module, whose: str) -> None:
    """Refuse a model that can't continue a text.

    Raises:
        InfraError: it has no `generate`, or an encoder that reads the text.
    """
    if not hasattr(model, "generate") or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InfraError(f"{whose} ({type(model).__name__}) can't continue a text by itself")


def _generated(
    model: Any, rows: list[list[int]], mask: list[list[int]], most: int, ends: Sequence[int], whose: str
) -> list[list[int]]:
    found = []
    for row in greedily(model, rows, mask, most, ends, whose):
        end = next((index for index, token in enumerate(row) if token in ends), len(row) - 1)
        found.append(row[: end + 1])
    return found


def greedily(
    model: Any,
    rows: Sequence[Sequence[int]],
    mask: Sequence[Sequence[int]] | None,
    most: int,
    ends: Sequence[int],
    whose: str,
    forced: Sequence[int] = (),
) -> list[list[int]]:
    """Return the likeliest tokens after each row, with the model's cache, up to where all have ended, at most `most`.

    `rows` [B, T]: padded on the left, as `mask` says, None for no padding. `ends`: the tokens that end an answer, none
    for an answer of `most` tokens. `forced`: the tokens that are written instead of the likeliest ones, first of all.
    `whose`: as for `greedy`.

    Raises:
        InfraError: the model can't generate. What ends its forward early passes.
    """
    from transformers import LogitsProcessorList

    device = device_of(model)
    # What a generation_config changes in greedy decoding is off: the answer is the likeliest token, each time.
    plain: dict[str, Any] = {
        "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0,
        "temperature": None, "top_p": None, "top_k": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    ids = torch.tensor(rows, device=device)
    kept = torch.ones_like(ids) if mask is None else torch.tensor(mask, device=device)
    try:
        with torch.no_grad(), evaluating(model):
            made = model.generate(
                input_ids=ids,
                attention_mask=kept,
                max_new_tokens=max(1, most),
                pad_token_id=ends[0] if ends else 0,
                # Not None, which would be the configuration's own.
                eos_token_id=list(ends) or [NO_TOKEN],
                use_cache=True,
                logits_processor=LogitsProcessorList([_Forced(ids.shape[1], forced)] if forced else []),
                **plain,
            )
    except Exception as error:  # the code of models
        raise InfraError(f"{whose} can't answer: {one_line(error)}") from error
    found: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return found


class _Forced:
    """Makes the tokens of an answer the likeliest ones, whatever the model finds. `start`: the length of the prompt."""

    def __init__(self, start: int, answer: Sequence[int]) -> None:
        self._start, self._answer = start, answer

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        at = ids.shape[1] - self._start
        if at < len(self._answer):
            scores = torch.full_like(scores, float("-inf"))
            scores[:, self._answer[at]] = 0.0
        return scores


def eos_of(model: Any) -> list[int]:
    """Return the tokens that end an answer, as the model's generation configuration has them, else its own."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [int(each) for each in (ids if isinstance(ids, (list, tuple)) else [ids])]
    return []


def markups_of(tokens: str, model: nn.Module, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each boundary. `tokens`: `auto`, or texts with spaces between them.

    Automatic are the tokens that end an answer, and those added to the vocabulary that the chat template writes, but
    for the ones that begin a text, pad it or stand for unknown ones.

    Raises:
        AnomalyError: there is none.
    """
    if tokens != "auto":
        if tokenizer is None:
            raise AnomalyError("boundary_tokens: there is no tokenizer to look the tokens up in")
        found = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in tokens.split()]
        if not found or not all(found):
            raise AnomalyError(f"boundary_tokens: the tokenizer makes no tokens of '{tokens}'")
        return found
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    beside = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "pad", "unk")}
    ids = [*eos_of(model), *(i for i, token in added.items() if i not in beside and str(token) in template)]
    if not ids:
        raise AnomalyError("boundary_tokens: the model names no token that ends an answer: name them, tokens: '…'")
    return [[token] for token in dict.fromkeys(ids)]


def with_what_tokens_tell(
    capture: Capture,
    requests: Iterable[Request],
    model: nn.Module,
    tokenizer: Any,
    batches: Iterable[Batch],
    first: int = 0,
) -> Capture:
    """Add to a capture what its tokens tell without a pass, for those who ask: boundaries, and windows that overlap.

    `first`: which sample of the batches is the capture's first.
    """
    requests = list(requests)
    capture = with_shifts(capture, requests)
    wanted = {
        each for of in requests if of.site == LOGITS for each in of.statistics if isinstance(each, BoundaryTokens)
    }
    numbers = capture.sites.get((LOGITS, LOGITS))
    if not wanted or numbers is None:
        return capture
    starts = [start for batch in batches for start in getattr(batch, "starts", ())][first:]
    written = np.split(numbers.arrays[PredictionMargins().key][:, 3], numbers.offsets[1:-1])
    arrays: dict[str, Array] = {}
    for each in wanted:
        markups = markups_of(each.tokens, model, tokenizer)
        tables = [
            boundaries(capture.tokens[sample], own, markups, starts[sample] if starts else 0)
            for sample, own in zip(numbers.sample.tolist(), written, strict=True)
        ]
        arrays[each.key] = np.concatenate(tables)
    sites = {**capture.sites, (LOGITS, LOGITS): numbers.having((), arrays)}
    return replace(capture, sites=sites)


def boundaries(
    ids: NDArray[np.int32], written: NDArray[np.float64], markups: Sequence[Sequence[int]], start: int
) -> NDArray[np.float64]:
    """Return `BOUNDARY_NAMES` of the positions of a sample, [T, 3]. `written` [T]: what the model finds likeliest.

    `start`: where its answer begins; only what is written in it counts.
    """
    table = np.full((len(ids), 3), np.nan)
    known = ~np.isnan(written)
    # The row of a position is about the token after it. Padding has no margins.
    inside = np.flatnonzero(known[:-1] & known[1:])
    inside = inside[inside >= max(0, start - 1)]
    table[inside, :2] = -1.0
    all_ids = {token for markup in markups for token in markup[:1]}
    table[inside, 2] = np.where(np.isin(written[inside], list(all_ids)), written[inside], -1.0)
    counts = set(inside.tolist())
    # Longer ones first: one may begin as another does.
    for markup in sorted(markups, key=len, reverse=True):
        for first in np.flatnonzero(ids[1:] == markup[0]).tolist():
            rows = range(first, first + len(markup))
            whole = [int(token) for token in ids[first + 1 : first + 1 + len(markup)]] == list(markup)
            if whole and counts.issuperset(rows) and (table[list(rows), 0] == -1).all():
                table[list(rows), 0], table[list(rows), 1] = markup, range(len(markup))
    return table

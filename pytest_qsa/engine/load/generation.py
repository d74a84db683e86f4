"""Answers for the metric `generation`: each model's own to the same prompts, greedy, with its template and cache."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ...captures import GENERATION, LOGITS, Capture, SiteKey, SiteNumbers
from ...common import InfraError, QsaError
from ...metrics import Answer, answered
from ...suite import Conversation, Generation, NamedSubject, Subject
from ..modules import context_of
from .answers import answers_by, check_generates, conversations_of, eos_of, formatted
from .models import Loaded
from .outline import empty_of
from .tokenizer import decoder_of, load_tokenizer

CACHES = ("past_key_values", "past_key_value", "cache_params", "layer_past", "state")
"""The arguments by which modules of transformers take what they have kept of earlier tokens."""


def _with_answers(capture: Capture, numbers: SiteNumbers) -> dict[SiteKey, SiteNumbers]:
    """Return a capture's sites with the answers, in the order of merged captures: behind all layers."""
    layers = {site: own for site, own in capture.sites.items() if site[1] != LOGITS}
    return {**layers, (GENERATION, LOGITS): numbers, **capture.sites}


KeptAnswers = Callable[[Mapping[str, Any]], Sequence[tuple[Sequence[int], bool]]]
"""Returns the tokens of each answer that was recorded to some prompts, by their identity, and whether it ended."""


@dataclass(frozen=True)
class Prompts:
    """The conversations that a suite has answered. `asked`: its section, which says how many and how long."""

    asked: Generation
    conversations: Sequence[Conversation]

    @classmethod
    def of(cls, subject: Subject) -> Prompts:
        """Read them.

        Raises:
            InfraError: they can't be read, or there are too few.
        """
        asked = subject.generation or Generation()
        found = conversations_of(asked.as_data(subject.data), subject.folder, "generation.num_prompts")
        return cls(asked, found[: asked.num_prompts])

    @property
    def identity(self) -> dict[str, Any]:
        """What a recorded reference has to have answered: the settings, and the hash of the conversations."""
        text = json.dumps([asdict(each) for each in self.conversations], sort_keys=True, ensure_ascii=False)
        return {**self.asked.model_dump(), "sha256": hashlib.sha256(text.encode()).hexdigest()}

    @property
    def fingerprint(self) -> str:
        """The hash of the conversations and of the most tokens of an answer, wherever they come from."""
        return hashlib.sha256(f"{self.identity['sha256']} {self.asked.max_new_tokens}".encode()).hexdigest()

    def answers_by(self, by: Loaded, whose: str) -> list[Answer]:
        """Return a model's greedy answers. `whose`: who answers, for messages.

        Raises:
            AnomalyError: there is no tokenizer.
            InfraError: the prompts are too long, the template can't format them, or the model keeps no cache or can't
                generate.
        """
        tokenizer: Any = by.required_tokenizer(whose)
        prompts = [formatted(each, tokenizer, "generation") for each in self.conversations]
        check_cache(by.model, f"generation: {whose}")
        most = self.asked.max_new_tokens
        _check_lengths(by.model, prompts, most)
        answers = answers_by(by, prompts, most, max(map(len, prompts)) + most, f"generation: {whose}")
        return [answer_of(ids, eos_of(by.model), tokenizer) for ids in answers]


def why_no_answers(subject: NamedSubject) -> str:
    """Return why a subject can't answer its prompts, as far as its files and settings tell; empty where it may."""
    spec, path = subject.model, subject.base or subject.path
    if subject.memory.offload_device == "disk":
        return "the model is read block by block, and answers need it whole"
    gguf = {"gguf_file": spec.gguf_file} if spec.gguf_file else {}
    try:
        tokenizer: Any = load_tokenizer(path, {"revision": spec.revision, "trust_remote_code": False, **gguf})
        if not getattr(tokenizer, "chat_template", None):
            return "the tokenizer has no chat template"
        prompts = Prompts.of(subject)
        asked = [formatted(each, tokenizer, "generation") for each in prompts.conversations]
        model = empty_of(spec, subject.path, subject.base)
        check_generates(model, "the model")
        check_cache(model, "the model")
        _check_lengths(model, asked, prompts.asked.max_new_tokens)
    except QsaError as error:
        return str(error)
    return ""


def answer_of(ids: Sequence[int], ends: Sequence[int], tokenizer: Any) -> Answer:
    """Return an answer by its tokens. `ends`: the tokens that end one."""
    ended = bool(ids) and ids[-1] in ends
    text = str(tokenizer.decode([*ids[: len(ids) - ended]], skip_special_tokens=False))
    return Answer(ids, text, ended)


def check_cache(model: nn.Module, whose: str) -> None:
    """Refuse a model that can't keep what it has computed of earlier tokens: it is served in no such way.

    Raises:
        InfraError: no module of it takes a cache.
    """
    classes = {type(module) for module in model.modules()}
    taken = {name for each in classes for name in inspect.signature(each.forward).parameters}
    if taken.isdisjoint(CACHES):
        raise InfraError(
            f"{whose} ({type(model).__name__}) keeps no cache of earlier tokens, with which answers are made"
        )


def _check_lengths(model: nn.Module, prompts: Sequence[Sequence[int]], most: int) -> None:
    reach = context_of(model)
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    if reach is not None and len(prompts[longest]) + most > reach:
        raise InfraError(
            f"generation: prompt {longest} has {len(prompts[longest]):,} tokens, and with max_new_tokens {most:,} that "
            f"is more than the {reach:,} positions that {type(model).__name__} takes: lower it, or shorten the prompt"
        )


def answers_of_both(
    prompts: Prompts, loaded: Loaded, reference: Loaded | KeptAnswers, around: AbstractContextManager[object]
) -> AnsweredPrompts:
    """Return what a model and its reference answer. `around`: is open while the model answers, not its reference.

    Raises:
        QsaError: as `Prompts.answers_by`, of either; or a kept reference has other answers.
    """
    with around:
        own = prompts.answers_by(loaded, "the model")
    if isinstance(reference, Loaded):
        theirs = prompts.answers_by(reference, "the reference")
    else:
        theirs = [
            answer_of(ids, ids[-1:] if ended else (), loaded.tokenizer) for ids, ended in reference(prompts.identity)
        ]
    decode = decoder_of(loaded.tokenizer)
    assert decode is not None
    shown = sorted({token for answer in (*own, *theirs) for token in answer.tokens})
    return AnsweredPrompts(answered(own, theirs), decode(shown))


@dataclass(frozen=True)
class AnsweredPrompts:
    """The numbers of two models' answers, and the texts of their tokens."""

    numbers: SiteNumbers
    pieces: Mapping[int, str]

    def added_to(self, capture: Capture) -> Capture:
        """Return a capture with them."""
        pieces = dict(sorted({**capture.pieces, **self.pieces}.items()))
        return replace(capture, sites=_with_answers(capture, self.numbers), pieces=pieces)

"""Answers of a served model to prompts (/v1/chat/completions) as its server parsed them: text, thoughts, tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .. import engine
from ..captures import SiteNumbers
from ..common import Progress
from ..metrics import Answer, answered
from ..suite import Subject
from .served_client import Client

TOOL_CALL, THOUGHT = "tool call", "thought"
"""The kinds of markup that a server takes out of a text."""
_TOOL_TAGS = r"<[/|]?(?:tool|function|python)_?\w*[|]?>|\[TOOL_CALLS\]"
_CALLS = re.compile(rf"(?:{_TOOL_TAGS})[\s\S]*(?:{_TOOL_TAGS})|(?:{_TOOL_TAGS})[\s\S]*$", re.IGNORECASE)
# A template may have begun the thought, so that only its end is in the answer.
_THOUGHTS = re.compile(r"^[\s\S]*?</(?:think|thinking|reasoning)>", re.IGNORECASE)


def served_answers(
    subject: Subject, client: Client, reference: engine.Loaded, progress: Progress | None = None
) -> tuple[SiteNumbers, Mapping[int, str]]:
    """Return the numbers of a served model's answers against the reference's, and the texts of their tokens.

    Both texts are read by the reference's tokenizer; its own answer is parsed as a server does.

    Raises:
        AnomalyError: the reference has no tokenizer.
        InfraError: the prompts can't be read or answered, by either; or the server's answer has no message.
    """
    prompts = engine.Prompts.of(subject)
    tokenizer: Any = reference.required_tokenizer("the reference")
    theirs = [_parsed(each, tokenizer) for each in prompts.answers_by(reference, "the reference")]
    own = []
    for index, conversation in enumerate(prompts.conversations):
        messages, offered = engine.offered(conversation, tokenizer, "generation")
        tools = offered.get("tools", ())
        where = f"{client.served.url}, prompt {index}"
        choice = client.chat(messages, tools, prompts.asked.max_new_tokens, where)
        own.append(_answer(choice, tools, tokenizer))
        if progress is not None:
            progress(index + 1, len(prompts.conversations))
    decode = engine.decoder_of(tokenizer)
    assert decode is not None
    return answered(own, theirs), decode(sorted({token for each in (*own, *theirs) for token in each.tokens}))


def _answer(choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]], tokenizer: Any) -> Answer:
    """Return an answer as a server gave it. `tools`: those that were offered."""
    message = choice["message"]
    text = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning")
    calls = message.get("tool_calls") or []
    kinds = [THOUGHT] * bool(thought) + [TOOL_CALL] * bool(calls and all(_is_call(each, tools) for each in calls))
    ended = choice.get("finish_reason") in ("stop", "tool_calls", "function_call")
    return Answer(_tokens(text, tokenizer), text, ended, frozenset(kinds))


def _is_call(call: Any, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a tool call names a tool that was offered, with a JSON object of arguments."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return False
    offered = {tool.get("function", {}).get("name") for tool in tools}
    try:
        arguments = json.loads(function.get("arguments") or "")
    except (ValueError, TypeError, RecursionError):
        return False
    return isinstance(arguments, dict) and function.get("name") in offered


def _parsed(answer: Answer, tokenizer: Any) -> Answer:
    """Return an answer of the reference with its thoughts and tool calls taken out of the text, as a server does."""
    without = _THOUGHTS.sub("", answer.text)
    text = _CALLS.sub("", without)
    kinds = [THOUGHT] * (without != answer.text) + [TOOL_CALL] * (text != without)
    # Special tokens are no part of what a server returns.
    shown = str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True))
    return Answer(_tokens(shown, tokenizer), shown, answer.ended, frozenset(kinds))


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

"""A served model → tables: the prompt's logprobs as vLLM, SGLang and llama.cpp's server give them.

Prompts are sent as token ids, so that no server tokenizes anything again, and answers are checked against them: as many
tokens as were sent, and the same ones.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..common import AnomalyError, InfraError, parsed_json
from ..suite import Served
from .logprobs import LogprobTable, logprob_table, number_of, prompt_rows

SECOND_TRY_AFTER = 1.0
"""Seconds before the second try."""
BUSY_ANSWERS = (429, 500, 502, 503, 504)
"""HTTP statuses after which the next try may succeed."""
MOST_BYTES = 1 << 30
"""The largest answer in bytes: no logprobs of a prompt are longer."""
READ_SIZE = 1 << 16


class _Broken(Exception):  # noqa: N818 - a signal: the next try may succeed
    """The connection broke, or the server was busy; its text says how."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint. `url`: as the suite says it; `timeout`: seconds for a whole answer.

    `key`: sent with each request, and never shown.
    """

    url: str
    timeout: float
    key: str | None = field(default=None, repr=False)

    def get(self, path: str) -> object:
        """Return the JSON that lies at a path below the address; None where there is none (404).

        Raises:
            InfraError: there is no connection, no answer in time, or no JSON in it.
        """
        return self._twice("GET", path, None)

    def post(self, path: str, content: object) -> object:
        """Return the JSON that the address answers to a JSON; None where the path isn't known (404).

        Raises:
            InfraError: as `get`.
        """
        return self._twice("POST", path, json.dumps(content).encode())

    def _twice(self, method: str, path: str, body: bytes | None) -> object:
        try:
            return self._once(method, path, body)
        except _Broken:
            time.sleep(SECOND_TRY_AFTER)
        try:
            return self._once(method, path, body)
        except _Broken as broken:
            raise self._error(path, f"{broken} (tried twice)") from None

    def _once(self, method: str, path: str, body: bytes | None) -> object:
        deadline = time.monotonic() + self.timeout
        try:
            # http.client rather than a larger library: it follows no redirect and reads no proxy from the environment,
            # so that a suite reaches only the address that it shows.
            status, content = self._exchange(method, path, body, deadline)
        except (TimeoutError, socket.gaierror, ssl.SSLError) as error:
            what = f"no answer in {self.timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            raise self._error(path, what) from None
        except http.client.IncompleteRead:
            raise _Broken("the answer broke off") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(str(error) or type(error).__name__) from None
        if status in BUSY_ANSWERS:
            raise _Broken(f"answered {status}{_server_text(content)}")
        if status == 404:
            return None
        if 300 <= status < 400:
            raise self._error(path, f"answered {status}, a redirect, which is not followed: write the address itself")
        if status != 200:
            raise self._error(path, f"answered {status}{_server_text(content)}")
        return self._json(path, content)

    def _exchange(self, method: str, path: str, body: bytes | None, deadline: float) -> tuple[int, bytes]:
        headers = {"Accept": "application/json", "Content-Type": "application/json", "Connection": "close"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        with closing(self._connection()) as connection:
            connection.request(method, f"{urlsplit(self.url).path.rstrip('/')}{path}", body=body, headers=headers)
            with connection.getresponse() as response:
                return response.status, self._content(path, response, deadline)

    def _content(self, path: str, response: http.client.HTTPResponse, deadline: float) -> bytes:
        content = bytearray()
        while block := response.read1(READ_SIZE):
            content += block
            # The socket's timeout is for one read; a server that sends a byte now and then would never reach it.
            if time.monotonic() > deadline:
                raise TimeoutError
            if len(content) > MOST_BYTES:
                raise self._error(path, f"an answer of more than {MOST_BYTES >> 20} MiB")
        # read1 returns nothing at the end of a connection, also where the announced length was not reached.
        if response.length:
            raise http.client.IncompleteRead(bytes(content))
        return bytes(content)

    def _connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if parts.scheme == "https":
            secure = ssl.create_default_context()
            return http.client.HTTPSConnection(host, parts.port, timeout=self.timeout, context=secure)
        return http.client.HTTPConnection(host, parts.port, timeout=self.timeout)

    def _json(self, path: str, content: bytes) -> object:
        try:
            return parsed_json(content)
        except ValueError:
            start = content[:60].decode("utf-8", "replace").split("\n")[0]
            raise self._error(path, f"no JSON in the answer: {start!r}") from None

    def _error(self, path: str, what: str) -> InfraError:
        text = f"{self.url.rstrip('/')}{path}: {what}"
        # A server may repeat the key in its message.
        return InfraError(text.replace(self.key, "…") if self.key else text)


def _server_text(content: bytes) -> str:
    """Return the server's own words, in one line."""
    try:
        said = parsed_json(content)
    except ValueError:
        return ""
    error = said.get("error", said) if isinstance(said, dict) else said
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return f": {' '.join(str(message).split())[:200]}" if message else ""


def api_key(variable: str | None) -> str | None:
    """Return the key that an environment variable holds.

    Raises:
        InfraError: it isn't set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InfraError(f"the environment variable {variable} is not set: it holds the key of the served model")
    return key


@dataclass(frozen=True)
class Client:
    """A served model. `model`: its name there; `longest`: the tokens that a request may have, None for unknown."""

    served: Served
    endpoint: Endpoint
    model: str
    longest: int | None = None

    @classmethod
    def connect(cls, served: Served) -> Client:
        """Find the model that is meant among those that the endpoint serves.

        Raises:
            InfraError: it serves none of this name, or can't be asked.
        """
        endpoint = Endpoint(served.root, served.timeout, api_key(served.api_key_env))
        listed = endpoint.get("/v1/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InfraError(
                f"{served.url} lists no models: is it an OpenAI-compatible endpoint, such as http://host:8000/v1?"
            )
        models = {str(entry.get("id")): entry for entry in entries}
        name = served.model or (next(iter(models)) if len(models) == 1 else None)
        if name not in models:
            meant = f"'{served.model}' is not served" if served.model else "say which model is meant, served.model"
            raise InfraError(f"{served.url}: {meant}; there are {', '.join(models) or 'none'}")
        # vLLM lists it; of other servers it stays unknown.
        longest = models[name].get("max_model_len")
        return cls(served, endpoint, name, longest if isinstance(longest, int) else None)

    def table(self, tokens: Sequence[int], sample: int) -> LogprobTable:
        """Ask for the logprobs of one sample.

        Raises:
            InfraError: the server refuses, breaks off, or counts other tokens.
            AnomalyError: what it gives are no log-probabilities.
        """
        where = f"{self.served.url}, sample {sample}"
        # One more, for each request asks for one generated token.
        if self.longest is not None and len(tokens) + 1 > self.longest:
            raise InfraError(
                f"{self.served.url} takes {self.longest} tokens and a sample has {len(tokens)} and one more: lower "
                "data.seq_len"
            )
        ask = {"vllm": self._vllm, "sglang": self._sglang, "llama.cpp": self._llama_cpp}[self.served.api]
        rows = ask([int(token) for token in tokens], where)
        return logprob_table(tokens, rows, where)

    def chat(
        self, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]], most: int, where: str
    ) -> Mapping[str, Any]:
        """Ask for a greedy answer to a conversation; return the choice, with its `message` and `finish_reason`.

        `tools`: those that may be called, as OpenAI describes them. `most`: the most tokens. `where`: for messages.

        Raises:
            InfraError: the server refuses, breaks off, or answers without a message.
        """
        content = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": most, "seed": 0}
        answer = self._answer("/v1/chat/completions", {**content, "tools": tools} if tools else content, where)
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            raise InfraError(f"{where}: the answer has no message")
        for key, kind in (("content", str), ("reasoning_content", str), ("tool_calls", list)):
            if message.get(key) is not None and not isinstance(message[key], kind):
                raise InfraError(f"{where}: {key} of the answer is {type(message[key]).__name__}")
        return choice

    def _answer(self, path: str, content: Mapping[str, object], where: str) -> dict[str, Any]:
        answer = self.endpoint.post(path, content)
        if answer is None:
            raise InfraError(f"{where}: there is no {path}: is it a server of the kind '{self.served.api}'?")
        if not isinstance(answer, dict):
            raise InfraError(f"{where}: the answer is no object")
        return answer

    def _vllm(self, tokens: list[int], where: str) -> Sequence[Mapping[int, float]]:
        content = {
            "model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 0,
            "prompt_logprobs": self.served.top_logprobs,
        }  # fmt: skip
        answer = self._answer("/v1/completions", content, where)
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        positions = choice.get("prompt_logprobs", answer.get("prompt_logprobs"))
        if positions is None:
            raise InfraError(
                f"{where}: the answer has no prompt_logprobs: the server is another one, or too old; SGLang and "
                "llama.cpp have served.api of their own"
            )
        self._check(answer, positions, tokens, where)
        rows = prompt_rows(positions, where)
        for at, row in enumerate(rows, 1):
            # vLLM lists the token that came in addition to the likeliest ones: without it the answer is of another
            # prompt.
            if tokens[at] not in row:
                raise InfraError(
                    f"{where}: the token {tokens[at]} at position {at} is not in the answer: another prompt"
                )
        return rows

    def _check(self, answer: Mapping[str, Any], positions: object, tokens: list[int], where: str) -> None:
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        found = len(positions) if isinstance(positions, list) else 0
        if found != len(tokens) or counted not in (None, len(tokens)):
            raise InfraError(f"{where}: {len(tokens)} tokens were sent, the answer is about {counted or found}")
        if answer.get("model") not in (None, self.model):
            raise InfraError(f"{where}: the answer is of the model '{answer['model']}', not '{self.model}'")

    def _sglang(self, tokens: list[int], where: str) -> Sequence[Mapping[int, float]]:
        content = {
            "input_ids": tokens, "sampling_params": {"max_new_tokens": 1, "temperature": 0}, "return_logprob": True,
            "logprob_start_len": 0, "top_logprobs_num": self.served.top_logprobs,
        }  # fmt: skip
        meta = self._answer("/generate", content, where).get("meta_info")
        came = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
        top = meta.get("input_top_logprobs") if isinstance(meta, dict) else None
        if not isinstance(came, list) or not isinstance(top, list) or not len(came) == len(top) == len(tokens):
            told = f"{len(came)} tokens" if isinstance(came, list) else "no input_token_logprobs"
            raise InfraError(f"{where}: {len(tokens)} tokens were sent, the answer has {told}")
        try:
            # The token that came may be missing among the likeliest: SGLang lists it apart.
            rows = [{**_pairs(entries), **_pairs([own])} for own, entries in zip(came[1:], top[1:], strict=True)]
            if [int(entry[1]) for entry in came] != tokens:
                raise InfraError(f"{where}: the answer is of other tokens than were sent")
        except (TypeError, ValueError, KeyError, IndexError):
            raise AnomalyError(f"{where}: the logprobs are no lists of [logprob, token id, text]") from None
        return rows

    def _llama_cpp(self, tokens: list[int], where: str) -> Sequence[Mapping[int, float]]:
        return [self._next(tokens[:end], f"{where}, position {end}") for end in range(1, len(tokens))]

    def _next(self, prefix: list[int], where: str) -> Mapping[int, float]:
        """Ask for the prediction after a prefix: llama.cpp's server gives no logprobs of a prompt, but keeps it."""
        content = {
            # Below 0, not 0: greedy as well, but at 0 llama.cpp computes no probabilities (llama.cpp#3813).
            "prompt": prefix, "n_predict": 1, "n_probs": self.served.top_logprobs, "temperature": -1.0,
            "cache_prompt": True, "post_sampling_probs": False,
        }  # fmt: skip
        answer = self._answer("/completion", content, where)
        if answer.get("tokens_evaluated") not in (None, len(prefix)):
            raise InfraError(
                f"{where}: {len(prefix)} tokens were sent, the answer is about {answer['tokens_evaluated']}"
            )
        try:
            return {
                int(entry["id"]): number_of(entry) for entry in answer["completion_probabilities"][0]["top_logprobs"]
            }
        except (TypeError, ValueError, KeyError, IndexError):
            raise AnomalyError(f"{where}: the answer has no top_logprobs with ids") from None


def _pairs(entries: Any) -> dict[int, float]:
    return {int(entry[1]): number_of(entry[0]) for entry in entries}

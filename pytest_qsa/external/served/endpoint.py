"""Asking one address for JSON. The standard library's client, for it follows no redirect and knows no proxy.

Every call ends within its time, however slowly the server answers, and reads no more than it must.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...common import InfraError

PAUSE = 1.0
"""Seconds before the second try."""
BUSY = (429, 500, 502, 503, 504)
"""Answers after which the next try may succeed."""
MOST = 1 << 30
"""Bytes of an answer; a longer one is none of a prompt's logprobs."""
BLOCK = 1 << 16


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

    def get(self, path: str) -> Any:
        """Return the JSON that lies at a path below the address; None where there is none (404).

        Raises:
            InfraError: there is no connection, no answer in time, or no JSON in it.
        """
        return self._twice("GET", path, None)

    def post(self, path: str, content: Any) -> Any:
        """Return the JSON that the address answers to a JSON; None where the path isn't known (404).

        Raises:
            InfraError: as `get`.
        """
        return self._twice("POST", path, json.dumps(content).encode())

    def _twice(self, method: str, path: str, body: bytes | None) -> Any:
        try:
            return self._once(method, path, body)
        except _Broken:
            time.sleep(PAUSE)
        try:
            return self._once(method, path, body)
        except _Broken as broken:
            raise self._error(path, f"{broken} (tried twice)") from None

    def _once(self, method: str, path: str, body: bytes | None) -> Any:
        deadline = time.monotonic() + self.timeout
        try:
            status, content = self._exchange(method, path, body, deadline)
        except (TimeoutError, socket.gaierror, ssl.SSLError) as error:
            what = f"no answer in {self.timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            raise self._error(path, what) from None
        except http.client.IncompleteRead:
            raise _Broken("the answer broke off") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(str(error) or type(error).__name__) from None
        if status in BUSY:
            raise _Broken(f"answered {status}{_told(content)}")
        if status == 404:
            return None
        if 300 <= status < 400:
            raise self._error(path, f"answered {status}, a redirect, which is not followed: write the address itself")
        if status != 200:
            raise self._error(path, f"answered {status}{_told(content)}")
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
        while block := response.read1(BLOCK):
            content += block
            if time.monotonic() > deadline:
                raise TimeoutError
            if len(content) > MOST:
                raise self._error(path, f"an answer of more than {MOST >> 20} MiB")
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

    def _json(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            start = content[:60].decode("utf-8", "replace").split("\n")[0]
            raise self._error(path, f"no JSON in the answer: {start!r}") from None

    def _error(self, path: str, what: str) -> InfraError:
        text = f"{self.url.rstrip('/')}{path}: {what}"
        return InfraError(text.replace(self.key, "…") if self.key else text)


def _told(content: bytes) -> str:
    """Return the server's own words, in one line."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    error = said.get("error", said) if isinstance(said, dict) else said
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return f": {' '.join(str(message).split())[:200]}" if message else ""


def key_of(variable: str | None) -> str | None:
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

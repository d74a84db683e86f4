"""One more try, where it can help: a download that broke off, never a refusal and never a lack of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

PAUSE = 2.0
"""Seconds before the second try."""
BROKEN = ("ConnectError", "ConnectTimeout", "ReadError", "ReadTimeout", "RemoteProtocolError", "WriteTimeout")
"""Errors of the hub's HTTP client, by name: which client it is changes with the hub's library."""
BUSY = (429, 500, 502, 503, 504)


def once_more(attempt: Callable[[], T], *, pause: float = PAUSE) -> T:
    """Return what the attempt returns; after an error of the network, of a second attempt.

    Raises:
        Exception: whatever the last attempt raised.
    """
    try:
        return attempt()
    except Exception as error:
        if not is_transient(error):
            raise
    time.sleep(pause)
    return attempt()


def is_transient(error: BaseException) -> bool:
    """Say whether the network broke or the server was busy: whether the next try may succeed."""
    chain = list(_causes(error))
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in chain):
        return False
    return any(
        isinstance(cause, (ConnectionError, TimeoutError))
        or type(cause).__name__ in BROKEN
        or getattr(getattr(cause, "response", None), "status_code", None) in BUSY
        for cause in chain
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__

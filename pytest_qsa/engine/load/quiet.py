"""Keeping what loading libraries write out of pytest's output; exceptions still come."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn of the machine and of each other when torchao is imported: kernels for other GPUs, enums."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars of transformers and of what it calls out of pytest's output; exceptions still come."""
    from transformers.utils import logging as transformers_logging

    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), _errors_only(NOISY):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _errors_only(names: tuple[str, ...]) -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

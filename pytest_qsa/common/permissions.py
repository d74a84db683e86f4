"""What only an operator may allow, on the command line or by the environment: code, and paths outside a repository."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .errors import SuiteError

CODE_VARIABLE, PATH_VARIABLE = "QSA_ALLOW_CODE", "QSA_ALLOW_PATH"
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def allowed_code() -> bool | None:
    """Return what `QSA_ALLOW_CODE` says; None where it isn't set.

    Raises:
        SuiteError: it says neither yes nor no.
    """
    text = os.environ.get(CODE_VARIABLE)
    if text is None:
        return None
    if text.lower() not in (*YES, *NO):
        raise SuiteError(f"{CODE_VARIABLE}={text}: write 1 or 0")
    return text.lower() in YES


def allowed_paths(given: Iterable[str], option: str = "--qsa-allow-path") -> tuple[Path, ...]:
    """Return the folders of an option, absolute, and those of `QSA_ALLOW_PATH`, which holds several as PATH does.

    Raises:
        SuiteError: there is no such folder.
    """
    named = [(option, text) for text in given]
    named += [(PATH_VARIABLE, text) for text in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if text]
    found = []
    for source, text in named:
        path = Path(os.path.abspath(os.path.expanduser(text)))
        if not path.is_dir():
            raise SuiteError(f"{source} {text}: there is no such folder")
        found.append(path)
    return tuple(found)

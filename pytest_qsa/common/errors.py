"""The errors and warnings that a user meets. Each text is one line: where, what, and what to do."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from .text import visible

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
"""The variables that hold the token by which gated hub models are fetched."""
SECRETS = r"\bhf_[A-Za-z0-9]{8,}|(?<=://)[^/\s@]+(?=@)|(?<=Bearer )\S+"
"""Not compiled here: every start of pytest would pay for it."""


def scrubbed(text: str) -> str:
    """Replace the hub's token and passwords in URLs: libraries put both into the texts of their errors."""
    # By value as well, for not every token begins with hf_. An empty variable must not get here: to replace
    # '' would put … between all characters.
    for token in filter(None, map(os.environ.get, TOKEN_VARIABLES)):
        text = text.replace(token, "…")
    return re.sub(SECRETS, "…", text)


class QsaError(Exception):
    """The base of all errors of this package; `kind` is the first word of a failure."""

    kind = "INFRA"

    def __init__(self, message: str) -> None:
        # Here, so that nothing that prints or stores an error has to think of it.
        super().__init__(visible(scrubbed(message)))


# A ValueError too: pydantic catches it in a validator and adds where in the suite it was raised.
class SuiteError(QsaError, ValueError):
    """A suite, an override or a regular expression is wrong. `key`: the key of an assertion that it is about."""

    kind = "SUITE"

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class InfraError(QsaError):
    """The subject could not be loaded, fetched or run: the machine or the installation is at fault, not the numbers."""


class UnloadableFormatError(InfraError):
    """The installed libraries can't load the format of a checkpoint, whose files may be sound and readable."""


class AnomalyError(QsaError):
    """There is nothing sound to judge: no layer matches, no token was seen, a number is not finite."""

    kind = "ANOMALOUS"


class BaselineError(AnomalyError):
    """A baseline is missing or can't be compared; `--snapshot-update` writes a new one."""


class ToldError(QsaError):
    """What stopped this test has stopped another one before, which has its text. `by`: that test's id."""

    def __init__(self, message: str, kind: str, by: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.by = by


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text that isn't empty; the name of its class where there is none.

    A line that only announces others, as `Validation error for field 'hidden_size':`, is followed by what it announces.
    """
    try:
        text = str(error)
    except Exception:  # an error of someone else's may fail to say what it is
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    more = 2 if re.match(r"\d+ validation errors? for ", lines[0]) else lines[0].endswith(":")  # pydantic; the hub's
    return " ".join(lines[: 1 + more])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known word nearest to `word`; empty if none is near."""
    import difflib  # as slow as all else that every start of pytest imports of this package

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def shown_path(path: Path) -> str:
    """Return a path as a user would type it: relative to the current folder if it is in it."""
    # As it was typed first: a link in the current folder may lead out of it.
    for one, folder in ((Path(os.path.abspath(path)), Path.cwd()), (path.resolve(), Path.cwd().resolve())):
        with contextlib.suppress(ValueError):
            return str(one.relative_to(folder))
    return str(path)


class QsaWarning(UserWarning):
    """The base of all warnings of this package: a softened excess, a suite without assertions."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(scrubbed(message)))


def remark(text: str) -> None:
    """Warn of what a reader should know and what must fail nothing, even where warnings are errors."""
    try:
        warnings.warn(QsaWarning(text), stacklevel=3)
    except QsaWarning:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(QsaWarning(text), stacklevel=3)


class QsaUnplannedCaptureWarning(QsaWarning):
    """A Python test asked for sites that no `qsa` mark announces, which took a second pass."""

"""What only an operator may say, on the command line or by the environment.

That code runs, where a suite may read outside its repository, and which interpreter has vLLM.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InfraError, SuiteError

CODE_VARIABLE, PATH_VARIABLE, VLLM_VARIABLE = "QSA_ALLOW_CODE", "QSA_ALLOW_PATH", "QSA_VLLM_PYTHON"
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


class VllmWords(NamedTuple):
    """What options say of vLLM: an interpreter, empty for none, and `KEY=VALUE` of more arguments."""

    python: str = ""
    arguments: tuple[str, ...] = ()


class VllmProgram(NamedTuple):
    """The interpreter of an environment that has vLLM, and more arguments of vLLM's `LLM()`."""

    python: str
    arguments: Mapping[str, Any]


FIXED = ("enforce_eager", "enable_prefix_caching", "worker_extension_cls", "model", "skip_tokenizer_init")
"""Arguments of vLLM's that the capture needs as they are."""


def vllm_program(words: VllmWords) -> VllmProgram:
    """Return where vLLM is: by an option, else by `QSA_VLLM_PYTHON`.

    Raises:
        InfraError: neither says it, or there is no such program.
        SuiteError: as `vllm_arguments`.
    """
    named = words.python or os.environ.get(VLLM_VARIABLE, "")
    if not named:
        raise InfraError(
            "model.engine: vllm runs in an environment of its own: name its interpreter with --qsa-vllm-python or "
            f"{VLLM_VARIABLE}"
        )
    path = os.path.abspath(os.path.expanduser(named))  # no real path: that would leave the virtual environment
    if not os.access(path, os.X_OK) or os.path.isdir(path):
        raise InfraError(f"{'--qsa-vllm-python' if words.python else VLLM_VARIABLE} {named}: there is no such program")
    return VllmProgram(path, vllm_arguments(words.arguments))


def vllm_arguments(texts: Iterable[str], option: str = "--qsa-vllm-arg") -> dict[str, Any]:
    """Read `KEY=VALUE`, the value as JSON, or as it is where it is none.

    Raises:
        SuiteError: one isn't of this form, or the capture needs the argument as it is.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise SuiteError(f"{option} {text}: write KEY=VALUE, an argument of vLLM's LLM()")
        if key in FIXED:
            raise SuiteError(f"{option} {text}: the capture needs {key} as it is")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found

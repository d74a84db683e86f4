"""`--data.num_samples 128`: any key of a suite as an option. pydantic types it, as it does in the file."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from ..suite import Suite, Visualization, check_override, section_of

SECTIONS = ("model", "data", "memory", "visualization")


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command whose options are its own and every key; return them and `KEY=VALUE` for each override.

    Raises:
        SuiteError: an unknown option looks like a key; it names the nearest one.
    """
    add_overrides(parser)
    options, unknown = parser.parse_known_args(arguments)
    overrides = read_overrides(options, unknown)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options, overrides


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Offer every key of the sections, with its type and default in the help.

    A key of `visualization` may stand without that word: `--outlier.threshold 100`.
    """
    for section in SECTIONS:
        group = parser.add_argument_group(f"keys of {section}", "each overrides the file's own value")
        model = section_of(Suite.model_fields[section].annotation)
        assert model is not None
        for key, kind, text in _keys(model, section):
            short = key.removeprefix("visualization.")
            words = [f"--{key}"] if short == key else [f"--{short}", f"--{key}"]
            group.add_argument(*words, dest=key, metavar=kind, default=argparse.SUPPRESS, help=text)


def read_overrides(options: argparse.Namespace, unknown: Sequence[str]) -> list[str]:
    """Return `KEY=VALUE` for each override; paths, relative to where one stands, become absolute.

    Raises:
        SuiteError: an unknown option looks like a key; it names the nearest one.
    """
    for word in unknown:
        key, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and "." in key:
            prefix = "visualization." if key.partition(".")[0] in Visualization.model_fields else ""
            check_override(f"{prefix}{key}={value}", "--")
    given = {key: value for key, value in vars(options).items() if key.partition(".")[0] in SECTIONS and "." in key}
    return [f"{key}={_located(key, value)}" for key, value in given.items()]


def _located(key: str, value: str) -> str:
    here = Path(value.removeprefix("custom:")).expanduser()
    if key == "visualization.save_dir" or (key in ("model.path", "model.reference") and here.exists()):
        return str(here.absolute())
    return f"custom:{here.absolute()}" if key == "data.source" and value.startswith("custom:") else value


def _keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted key, type, help) of every value that a section can hold."""
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}"
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _keys(inner, key)
            continue
        stated = not field.is_required() and field.default is not None
        default = f"default: {_written(field.get_default())}" if stated else ""
        text = "; ".join(part for part in (field.description, default) if part)
        yield key, _shown(field.annotation), text.replace("%", "%%")


def _written(value: Any) -> str:
    """Write a value as a suite does."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, list) else str(value)


def _shown(annotation: Any) -> str:
    """Write a type as a user would: `int`, `cpu|disk`, `[str, …]`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _shown(inner[0])
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return "|".join("null" if arm is type(None) else _shown(arm) for arm in inner)
    if origin is list:
        return f"[{_shown(inner[0])}, …]"
    return str(getattr(annotation, "__name__", annotation))

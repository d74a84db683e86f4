"""Every key of a suite as an option, `--data.num_samples 128`. pydantic checks the value as it does in the file."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

SECTIONS = ("model", "data", "memory", "visualization")


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command that takes every key of a suite as an option; return its options and `KEY=VALUE` overrides.

    Raises:
        SuiteError: an unknown option looks like a key; the text names the nearest key.
    """
    parser.allow_abbrev = False  # `--data.num` would set the first key that begins so
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
    from ..suite import Suite

    for section in SECTIONS:
        group = parser.add_argument_group(f"keys of {section}", "each overrides the file's own value")
        for key, field in _values(section, Suite.model_fields[section]):
            short = key.removeprefix("visualization.")
            words = [f"--{key}"] if short == key else [f"--{short}", f"--{key}"]
            stated = not field.is_required() and field.default is not None
            default = f"default: {_written(field.get_default())}" if stated else ""
            text = "; ".join(part for part in (field.description, default) if part).replace("%", "%%")
            kind = _shown(field.annotation)
            group.add_argument(*words, dest=key, metavar=kind, default=argparse.SUPPRESS, help=text)


def _values(key: str, field: FieldInfo) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted key and the field of every plain value at a key or below it."""
    from ..suite import section_of

    section = section_of(field.annotation)
    if section is None:
        yield key, field
    else:
        for name, inner in section.model_fields.items():
            yield from _values(f"{key}.{name}", inner)


def read_overrides(options: argparse.Namespace, unknown: Sequence[str]) -> list[str]:
    """Return `KEY=VALUE` for each override; paths, relative to the current folder, become absolute.

    Raises:
        SuiteError: an unknown option looks like a key; the text names the nearest key.
    """
    from ..suite import Visualization, check_override

    for word in unknown:
        key, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and "." in key:
            prefix = "visualization." if key.partition(".")[0] in Visualization.model_fields else ""
            check_override(f"{prefix}{key}={value}", "--")
    given = {key: value for key, value in vars(options).items() if key.partition(".")[0] in SECTIONS and "." in key}
    return [f"{key}={_absolute(key, value)}" for key, value in given.items()]


def _absolute(key: str, value: str) -> str:
    here = Path(value.removeprefix("custom:")).expanduser()
    if key == "visualization.save_dir" or (key in ("model.path", "model.reference") and here.exists()):
        return str(here.absolute())
    return f"custom:{here.absolute()}" if key == "data.source" and value.startswith("custom:") else value


def _written(value: Any) -> str:
    """Return a value as it is written in a suite."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, list) else str(value)


def _shown(annotation: Any) -> str:
    """Return a type as a user would write it: `int`, `cpu|disk`, `[str, …]`."""
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

"""Portable names: `kind:blocks` stands for a model's own list of layers wherever a regex of layers may stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ..common import SuiteError, did_you_mean

KINDS = ("blocks", "linears", "experts", "norms", "attention")
PREFIX = "kind:"
_KIND = re.compile(r"kind:(?:(\*|\w+)\.)?(\w+)")


class LayerName(str):
    """The name of a layer that knows what it is: `blocks`, and with the part of the model in front, `vision.blocks`.

    It is equal to the plain name, which finds it in any table.
    """

    __slots__ = ("kinds",)
    kinds: frozenset[str]

    def __new__(cls, name: str, kinds: Iterable[str] = ()) -> LayerName:
        """Make a name of some kinds."""
        made = super().__new__(cls, name)
        made.kinds = frozenset(kinds)
        return made

    def __reduce__(self) -> tuple[type[LayerName], tuple[str, frozenset[str]]]:
        return LayerName, (str(self), self.kinds)


def is_kind(pattern: str) -> bool:
    """Say whether a pattern is a portable name."""
    return pattern.startswith(PREFIX)


def check_kind(pattern: str) -> None:
    """Check that a portable name can stand for something.

    Raises:
        SuiteError: there is no such kind.
    """
    found = _KIND.fullmatch(pattern)
    if found is None or found[2] not in KINDS:
        near = did_you_mean(found[2], KINDS) if found else ""
        raise SuiteError(
            f"'{pattern}' names no kind of layer{near}: write kind: and {', '.join(KINDS)}, with a part of the model "
            "in front where it has several, kind:vision.blocks, or kind:*.blocks for those of all parts"
        )


def of_kind(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a portable name stands for; none where nothing says what they are.

    Raises:
        SuiteError: as `check_kind`.
    """
    check_kind(pattern)
    wanted = pattern.removeprefix(PREFIX)
    if wanted.startswith("*."):
        kind = wanted.removeprefix("*.")
        return [name for name in names if any(own.rpartition(".")[2] == kind for own in kinds_of_name(name))]
    return [name for name in names if wanted in kinds_of_name(name)]


def kinds_of_name(name: str) -> frozenset[str]:
    """Return what a layer's name says that it is; nothing of a plain name."""
    return name.kinds if isinstance(name, LayerName) else frozenset()


def known_kinds(names: Sequence[str]) -> dict[str, list[int]]:
    """Return kind → the positions of its layers among the names, sorted by kind."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        for kind in kinds_of_name(name):
            found.setdefault(kind, []).append(index)
    return dict(sorted(found.items()))


def with_kinds(names: Sequence[str], kinds: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Return the names with their kinds: the way back from `known_kinds`."""
    own: dict[int, list[str]] = {}
    for kind, positions in kinds.items():
        for index in positions:
            own.setdefault(index, []).append(kind)
    return tuple(LayerName(name, own.get(index, ())) for index, name in enumerate(names)) if own else tuple(names)

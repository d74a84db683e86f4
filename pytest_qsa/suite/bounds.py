"""How a suite states a bound: a number, one that follows the last release, or either by group of layers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from ..captures import compile_pattern
from ..common import SuiteError
from .fields import Strict

DEFAULT, SCHEME = "default", "scheme:"
"""Keys of a bound by group: every other layer; layers that are quantized in one way."""
SCHEMES = re.compile(r"none|mixed|w\d+a\d+(_(int|fp))?")
"""`none` is not quantized; `mixed` holds layers of several schemes; `w4a16_int` has weights and activations of so many
bits, the weights integers. Without its type a scheme stands for both."""


class Relative(Strict):
    """A bound that follows the last release: times · its value + plus, held between `at_least` and `at_most`."""

    of: Annotated[Literal["previous"], Field(description="model.previous, layer by layer")]
    times: Annotated[float, Field(gt=0)] = 1.0
    plus: float = 0.0
    at_least: float | None = None
    at_most: float | None = None

    def number(self, previous: float) -> float:
        """Return the bound for a layer whose value in the last release is known."""
        number = self.times * previous + self.plus
        number = number if self.at_most is None else min(number, self.at_most)
        return number if self.at_least is None else max(number, self.at_least)

    def __str__(self) -> str:
        """Write it in words: `1.1 × previous, at most 4`."""
        parts = [f"{self.times:g} × previous" + (f" {self.plus:+g}" if self.plus else "")]
        parts += [f"at least {self.at_least:g}"] if self.at_least is not None else []
        return ", ".join([*parts, *([f"at most {self.at_most:g}"] if self.at_most is not None else [])])


def _form(value: Any) -> str:
    if isinstance(value, Relative) or (isinstance(value, dict) and ({"of", "times"} & value.keys())):
        return "[relative]"
    return "[groups]" if isinstance(value, dict) else "[number]"


Bound = Annotated[Annotated[float, Tag("[number]")] | Annotated[Relative, Tag("[relative]")], Discriminator(_form)]


def _groups(groups: dict[str, Bound]) -> dict[str, Bound]:
    for key in groups:
        scheme = key.removeprefix(SCHEME)
        if scheme == key:
            compile_pattern(key)
        elif not SCHEMES.fullmatch(scheme):
            raise SuiteError(
                f"'{key}' names no scheme: write scheme:w8a8, scheme:w4a16_int, scheme:w8a8_fp or scheme:none"
            )
    return groups


Groups = Annotated[
    dict[str, Bound],
    Field(min_length=1, description="regex of layers, `scheme:w8a8`, or `default` → bound; the first that fits counts"),
    AfterValidator(_groups),
]
Stated = Annotated[
    Annotated[float, Tag("[number]")] | Annotated[Relative, Tag("[relative]")] | Annotated[Groups, Tag("[groups]")],
    Discriminator(_form),
]


def follows(stated: Stated) -> bool:
    """Say whether a bound needs the numbers of the last release."""
    return any(isinstance(bound, Relative) for bound in (stated.values() if isinstance(stated, dict) else [stated]))

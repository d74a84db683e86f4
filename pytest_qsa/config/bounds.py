"""How a suite states a bound: one number for every layer, or numbers by group of layers."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag

from ..errors import SuiteError
from ..plan import compile_pattern

DEFAULT, SCHEME = "default", "scheme:"
"""Keys of a bound by group: every other layer; layers that are quantized in one way."""
SCHEMES = re.compile(r"none|mixed|w\d+a\d+(_(int|fp))?")
"""`none` is not quantized; `mixed` holds layers of several schemes; `w4a16_int` has weights and activations of so many
bits, the weights integers. Without its type a scheme stands for both."""


def _groups(groups: dict[str, float]) -> dict[str, float]:
    for key in groups:
        scheme = key.removeprefix(SCHEME)
        if scheme == key:
            compile_pattern(key)
        elif not SCHEMES.fullmatch(scheme):
            raise SuiteError(
                f"'{key}' names no scheme: write scheme:w8a8, scheme:w4a16_int, scheme:w8a8_fp or scheme:none"
            )
    return groups


def _form(value: Any) -> str:
    return "[groups]" if isinstance(value, dict) else "[number]"


Groups = Annotated[
    dict[str, float],
    Field(min_length=1, description="regex of layers, `scheme:w8a8`, or `default` → bound; the first that fits counts"),
    AfterValidator(_groups),
]
Stated = Annotated[Annotated[float, Tag("[number]")] | Annotated[Groups, Tag("[groups]")], Discriminator(_form)]

"""What a suite requires of how its subject is run, before any number counts."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

from .fields import Strict

WAY = re.compile(r"(W\d+A\d+ )?(FP )?(emulated|by kernels|kernels|weights only)|(W\d+A\d+)( FP)?|float", re.IGNORECASE)


def _ways(value: object) -> object:
    ways = [value] if isinstance(value, str) else value
    for way in ways if isinstance(ways, list) else ():
        if not isinstance(way, str) or not WAY.fullmatch(way):
            raise ValueError(
                f"executed_as '{way}' is no way to run: write W8A8 emulated, W8A8 kernels, W4A16 weights only, weights "
                "only, emulated or float, or a list of them"
            )
    return ways


Ways = Annotated[list[str], BeforeValidator(_ways, json_schema_input_type=str | list[str]), Field(min_length=1)]


class Require(Strict):
    """What must be so of the running model; else every assertion on it is an INFRA failure."""

    executed_as: Annotated[Ways, Field(description="how its quantized modules must run: W8A8 emulated, weights only")]

"""A definition: what a metric or a static check is called, in which version, and what its parameters are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Definition:
    """A plain function under its name; its keyword arguments are its parameters in suites, Python and the schema."""

    name: str
    version: int
    compute: Callable[..., Any]

    @property
    def definition(self) -> str:
        """The id under which a baseline remembers it: `outlier_tokens/1`."""
        return f"{self.name}/{self.version}"

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword parameters: name → type and default."""
        parameters = inspect.signature(self.compute, eval_str=True).parameters
        return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

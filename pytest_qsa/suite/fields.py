"""What the sections of a suite have in common: no unknown key, no coerced type, no infinite number, sound regexes."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict

from ..captures import compile_pattern


class Strict(BaseModel):
    """A section: frozen, strict, and closed to unknown keys.

    A suite's own schema holds those of all its sections: building each by itself as well would double the start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key may hold, through unions and what annotates them; None where it holds a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := section_of(part)) is not None), None)


def _regex(pattern: str) -> str:
    compile_pattern(pattern)
    return pattern


Regex = Annotated[str, AfterValidator(_regex)]

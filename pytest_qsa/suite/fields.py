"""The base class of a suite's sections, and what their fields share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from ..captures import compile_pattern


class Strict(BaseModel):
    """A section of a suite: frozen, no unknown keys, no coerced types, no infinite numbers."""

    # defer_build: the validator of `Suite` contains those of all sections; building each on its own would double
    # the time to start.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the first section among the types of an annotation such as `Noise | dict[str, Noise] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := section_of(part)) is not None), None)


def fields_at(section: type[BaseModel], keys: Iterable[str | int]) -> Mapping[str, FieldInfo]:
    """Return the fields of the section that a path of keys leads to; none where it leads to a plain value.

    Indices of lists and names of groups (`max: {'down_proj$': …}`) are no fields, so they are skipped.
    """
    inner: type[BaseModel] | None = section
    for key in keys:
        if inner is not None and key in inner.model_fields:
            inner = section_of(inner.model_fields[str(key)].annotation)
    return inner.model_fields if inner else {}


def _regex(pattern: str) -> str:
    compile_pattern(pattern)
    return pattern


Regex = Annotated[str, AfterValidator(_regex)]

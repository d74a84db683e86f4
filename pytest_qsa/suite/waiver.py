"""A waiver: an excess that is known, until a day, by someone's name."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from .fields import Regex, Strict


def _date(value: Any) -> Any:
    if isinstance(value, date) and type(value) is date:
        return value
    try:
        return date.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"until: write a day, such as 2027-01-31, not {value!r}") from None


Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Waiver(Strict):
    """Softens the excess of the layers that it names, up to and including its last day."""

    layers: Regex
    owner: Annotated[Text, Field(description="who answers for it")]
    reason: Text
    until: Annotated[date, BeforeValidator(_date), Field(description="its last day")]


def _form(value: Any) -> str:
    return "[many]" if isinstance(value, list) else "[one]"


Waivers = Annotated[
    Annotated[Waiver, Tag("[one]")] | Annotated[list[Waiver], Field(min_length=1), Tag("[many]")],
    Discriminator(_form),
]

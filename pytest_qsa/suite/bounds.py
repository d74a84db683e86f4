"""What an assertion allows: its bounds, the noise that they have to leave room for, and its waivers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from ..captures import check_pattern
from ..common import SuiteError
from ..metrics import MOST_RELATIVE
from .sections import Regex, Strict

DEFAULT, SCHEME = "default", "scheme:"
"""Keys of a bound by group: all other layers; the layers of one quantization scheme."""
SCHEMES = re.compile(r"none|mixed|w\d+a\d+(_(int|fp))?")
"""`none`: not quantized. `mixed`: holds layers of several schemes. `w4a16_int`: the bits of weights and activations,
then the type of the weights; without a type the scheme stands for both."""


class Relative(Strict):
    """A bound that follows the last release: times · its value + plus, clamped to `at_least` and `at_most`."""

    of: Annotated[Literal["previous"], Field(description="model.previous, layer by layer")]
    times: Annotated[float, Field(gt=0, le=1 + MOST_RELATIVE)] = 1.0
    plus: float = 0.0
    at_least: float | None = None
    at_most: float | None = None

    def number(self, previous: float) -> float:
        """Return the bound of a layer, given its value in the last release."""
        # `at_least` comes last, so that it wins where the two limits cross.
        number = self.times * previous + self.plus
        number = number if self.at_most is None else min(number, self.at_most)
        return number if self.at_least is None else max(number, self.at_least)

    def __str__(self) -> str:
        """Return the bound in words: `1.1 × previous, at most 4`."""
        parts = [f"{self.times:g} × previous" + (f" {self.plus:+g}" if self.plus else "")]
        parts += [f"at least {self.at_least:g}"] if self.at_least is not None else []
        return ", ".join([*parts, *([f"at most {self.at_most:g}"] if self.at_most is not None else [])])


def _form(value: Any) -> str:
    if isinstance(value, Relative) or (isinstance(value, dict) and ({"of", "times"} & value.keys())):
        return "[relative]"
    return "[groups]" if isinstance(value, dict) else "[number]"


# A union with tags: without them pydantic reports the mistakes of all arms, and none of them at the right key.
Bound = Annotated[Annotated[float, Tag("[number]")] | Annotated[Relative, Tag("[relative]")], Discriminator(_form)]


def _groups(groups: dict[str, Bound | None]) -> dict[str, Bound | None]:
    for key, bound in groups.items():
        if bound is None and key != DEFAULT:
            raise SuiteError(f"'{key}' has no number: only `default: null` means no bound, so leave the group out")
        scheme = key.removeprefix(SCHEME)
        if scheme == key:
            check_pattern(key)
        elif not SCHEMES.fullmatch(scheme):
            raise SuiteError(
                f"'{key}' names no scheme: write scheme:w8a8, scheme:w4a16_int, scheme:w8a8_fp or scheme:none"
            )
    if not any(bound is not None for bound in groups.values()):
        raise SuiteError("no group has a bound, so nothing would be checked")
    return groups


Groups = Annotated[
    dict[str, Bound | None],
    Field(
        min_length=1,
        description="regex of layers, `scheme:w8a8`, or `default` → bound; the first that fits counts. "
        "`default: null`: the other layers have none",
    ),
    AfterValidator(_groups),
]
Stated = Annotated[
    Annotated[float, Tag("[number]")] | Annotated[Relative, Tag("[relative]")] | Annotated[Groups, Tag("[groups]")],
    Discriminator(_form),
]
"""A bound as the suite states it."""


def is_relative(stated: Stated) -> bool:
    """Return whether a bound, or that of a group, follows the last release."""
    return any(isinstance(bound, Relative) for bound in (stated.values() if isinstance(stated, dict) else [stated]))


Side = Literal["min", "max"]
SIDES: tuple[Side, ...] = get_args(Side)


class Noise(Strict):
    """How a number varied over n parts of the data on a healthy model. `sigma`: with n − 1 in its denominator.

    Of a weight, which no data changes: the number that rounding the original to nearest gives, and the room below it.
    Of answers, which no text changes either: the number of all prompts and its standard error.
    """

    mean: float
    sigma: Annotated[float, Field(ge=0)]
    n: Annotated[int, Field(ge=2, description="parts of the data")]
    k: Annotated[float, Field(ge=0, description="how many sigmas a bound has to leave")]
    room: Annotated[float, Field(ge=0, description="what another healthy quantization may differ by")] = 0.0
    over: Annotated[Literal["parts", "prompts"], Field(description="of what n is the number")] = "parts"

    @property
    def elsewhere(self) -> str:
        """Where the number varies, in words."""
        return "where it is quantized again" if self.room or self.over == "prompts" else "on other text"

    @property
    def steady(self) -> bool:
        """Whether the number was the same in all parts."""
        return not self.sigma

    def floor(self, side: Side) -> float:
        """Return the tightest bound on a side: mean + k·sigma for a `max`, mean − k·sigma for a `min`."""
        apart = self.k * self.sigma + self.room
        return self.mean + apart if side == "max" else self.mean - apart

    def text(self, side: Side) -> str:
        """Return the floor and how it is computed."""
        sign = "+" if side == "max" else "−"
        figures = f"mean {self.mean:g} {sign} {self.k:g} × sigma {self.sigma:g} over {self.n} {self.over}"
        if self.room:
            figures = f"rounded to nearest {self.mean:g} {sign} {self.room:g} for another quantization"
        return f"{self.floor(side):.4g} ({figures})"


ByGroup = Annotated[
    Annotated[Noise, Tag("[noise]")] | Annotated[dict[str, Noise], Tag("[groups]")],
    # Every noise has a `mean`.
    Discriminator(lambda value: "[groups]" if isinstance(value, dict) and "mean" not in value else "[noise]"),
]


class Noises(Strict):
    """The noise under each bound of an assertion, in the form of the bound: one, or one for each group."""

    min: ByGroup | None = None
    max: ByGroup | None = None

    @property
    def floors(self) -> dict[tuple[str, ...], float]:
        """The tightest allowed number of each bound, by (side,) or (side, group)."""
        return {(side, group) if group else (side,): noise.floor(side) for side, group, noise in self._each()}

    @property
    def steady(self) -> frozenset[tuple[str, ...]]:
        """The bounds, as in `floors`, whose number was the same in all parts."""
        return frozenset((side, group) if group else (side,) for side, group, noise in self._each() if noise.steady)

    def check(self, stated: dict[str, Stated], span: tuple[float, float]) -> None:
        """Check that no bound is tighter than its noise allows. `span`: the least and the most that the number can be.

        Raises:
            SuiteError: a bound is tighter than its noise allows, is missing, or has another form than its noise.
        """
        for side, group, noise in self._each():
            if side not in stated:
                raise SuiteError(f"noise.{side} stands beside no {side}: take it out, or calibrate again", "noise")
            bound = stated[side]
            own = bound.get(group) if group and isinstance(bound, dict) else bound
            _check_bound(side, group, own, noise, span)

    def _each(self) -> Iterator[tuple[Side, str, Noise]]:
        """Yield (side, group, noise); the group is empty for a bound of all layers."""
        for side in SIDES:
            noise: Noise | dict[str, Noise] | None = getattr(self, side)
            for group, own in (noise if isinstance(noise, dict) else {"": noise} if noise else {}).items():
                yield side, group, own


def _check_bound(side: Side, group: str, bound: Any, noise: Noise, span: tuple[float, float]) -> None:
    # Only a plain number can be held against a noise floor.
    if isinstance(bound, Relative | dict) or bound is None:
        raise SuiteError(f"noise.{side} is of another form than {side}: calibrate again, or take it out", "noise")
    # Beyond what the number can be no bound would check anything.
    floor = min(noise.floor(side), span[1]) if side == "max" else max(noise.floor(side), span[0])
    if bound < floor if side == "max" else bound > floor:
        name = f"{side} of '{group}'" if group else side
        word = "below" if side == "max" else "above"
        raise SuiteError(
            f"{name} {bound:g} is {word} the noise floor {noise.text(side)}: a healthy model would fail "
            f"{noise.elsewhere}; give it more room, or run qsa calibrate again",
            side,
        )


def _date(value: Any) -> Any:
    # YAML makes a date of 2027-01-31 and a datetime, which is a date too, of a day with a time.
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


Waivers = Annotated[
    Annotated[Waiver, Tag("[one]")] | Annotated[list[Waiver], Field(min_length=1), Tag("[many]")],
    Discriminator(lambda value: "[many]" if isinstance(value, list) else "[one]"),
]

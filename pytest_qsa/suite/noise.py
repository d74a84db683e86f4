"""What `qsa calibrate` leaves beside a bound: how much a healthy model's number varies, and so how tight it may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag

from ..common import SuiteError
from .bounds import Relative, Stated
from .fields import Strict

Side = Literal["min", "max"]
SIDES: tuple[Side, ...] = get_args(Side)


class Noise(Strict):
    """What a number was over n parts of the data when nothing was wrong. `sigma`: with n − 1 in its denominator."""

    mean: float
    sigma: Annotated[float, Field(ge=0)]
    n: Annotated[int, Field(ge=2, description="parts of the data")]
    k: Annotated[float, Field(ge=0, description="how many sigmas a bound has to leave")]

    @property
    def steady(self) -> bool:
        """Whether the number was the same in all parts."""
        return not self.sigma

    def floor(self, side: Side) -> float:
        """Return the tightest bound on that side: mean + k·sigma for a `max`, mean − k·sigma for a `min`."""
        return self.mean + self.k * self.sigma if side == "max" else self.mean - self.k * self.sigma

    def text(self, side: Side) -> str:
        """Write the floor with its figures."""
        sign = "+" if side == "max" else "−"
        figures = f"mean {self.mean:g} {sign} {self.k:g} × sigma {self.sigma:g} over {self.n} parts"
        return f"{self.floor(side):.4g} ({figures})"


def _form(value: Any) -> str:
    return "[groups]" if isinstance(value, dict) and "mean" not in value else "[noise]"


ByBound = Annotated[
    Annotated[Noise, Tag("[noise]")] | Annotated[dict[str, Noise], Tag("[groups]")], Discriminator(_form)
]


class Noises(Strict):
    """The noise under each bound of an assertion, in the form of the bound: a number, or one for each group."""

    min: ByBound | None = None
    max: ByBound | None = None

    @property
    def floors(self) -> dict[tuple[str, ...], float]:
        """The tightest number for each bound, by the keys that lead to it: its name, and its group if it has one."""
        return {
            (side, group) if group else (side,): own.floor(side)
            for side in SIDES
            for group, own in _by_group(getattr(self, side))
        }

    @property
    def steady(self) -> frozenset[tuple[str, ...]]:
        """The bounds whose number was the same in all parts, by the keys that lead to them."""
        return frozenset(
            (side, group) if group else (side,)
            for side in SIDES
            for group, own in _by_group(getattr(self, side))
            if own.steady
        )

    def check(self, stated: dict[str, Stated]) -> None:
        """Check that no bound is tighter than its noise allows.

        Raises:
            SuiteError: one is, with the figure; or there is no such bound.
        """
        for side in SIDES:
            noise = getattr(self, side)
            if noise is not None and side not in stated:
                raise SuiteError(f"noise.{side} stands beside no {side}: take it out, or calibrate again", "noise")
            bounds = stated.get(side)
            for group, own in _by_group(noise):
                _check_bound(side, group, bounds.get(group) if group and isinstance(bounds, dict) else bounds, own)


def _by_group(noise: Noise | dict[str, Noise] | None) -> list[tuple[str, Noise]]:
    if noise is None:
        return []
    return [("", noise)] if isinstance(noise, Noise) else list(noise.items())


def _check_bound(side: Side, group: str, bound: Any, noise: Noise) -> None:
    if isinstance(bound, Relative | dict) or bound is None:
        raise SuiteError(f"noise.{side} is of another form than {side}: calibrate again, or take it out", "noise")
    floor = noise.floor(side)
    if bound < floor if side == "max" else bound > floor:
        name = f"{side} of '{group}'" if group else side
        word = "below" if side == "max" else "above"
        raise SuiteError(
            f"{name} {bound:g} is {word} the noise floor {noise.text(side)}: a healthy model would fail on other text; "
            "give it more room, or run qsa calibrate again",
            side,
        )

"""What every assertion of a suite has, whatever it is about."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ..common import SuiteError
from ..metrics import Over, Query
from .bounds import Stated, follows
from .fields import Strict
from .noise import Noises
from .tiers import Tier
from .waiver import Waiver, Waivers

RESERVED = re.compile(r"__.*|pytest.*|(setup|teardown|setUp|tearDown)(_?(module|function|Module|class|method))?")


def _id(name: str) -> str:
    if RESERVED.fullmatch(name):
        raise SuiteError(f"the id '{name}' means something to pytest itself: choose another")
    return name


BUDGET = ("max", "min", "equals")
"""The keys of an assertion that bound it absolutely, in the order in which a failure names their place."""


class Assertion(Strict, ABC):
    """What every assertion has, whatever its metric."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$"), AfterValidator(_id)]
    metric: str
    over: Over | None = None
    min: Stated | None = None
    max: Stated | None = None
    equals: Stated | None = None
    noise: Annotated[Noises | None, Field(description="what qsa calibrate measured; no bound may be tighter")] = None
    level: Literal["fail", "warn"] = "fail"
    tier: Tier = "pr"
    waive: Waivers | None = None
    reason: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> Assertion:
        if isinstance(self.min, float) and isinstance(self.max, float) and self.min > self.max:
            raise SuiteError(f"min {self.min:g} is above max {self.max:g}: nothing can satisfy both", "min")
        if self.equals is not None and (self.min is not None or self.max is not None):
            raise SuiteError("equals stands beside min or max, and they can't both be meant", "equals")
        grouped = next((key for key, stated in self.stated.items() if isinstance(stated, dict)), None)
        if grouped and self.over is not None:
            raise SuiteError(f"over makes one number of all layers, so {grouped} can't go by group", grouped)
        if self.noise is not None:
            self.noise.check(self.stated)
        return self

    @property
    def follows(self) -> str | None:
        """The key of a bound that follows the last release; None where there is none."""
        return next((key for key, stated in self.stated.items() if follows(stated)), None)

    @property
    def waivers(self) -> list[Waiver]:
        """The waivers, however many the suite writes."""
        return self.waive if isinstance(self.waive, list) else [self.waive] if self.waive else []

    @property
    def stated(self) -> dict[str, Stated]:
        """The bounds by their keys, as the suite states them."""
        return {key: stated for key in BUDGET if (stated := getattr(self, key)) is not None}

    @property
    @abstractmethod
    def query(self) -> Query:
        """What the assertion asks, for the text of a failure that came before any number."""

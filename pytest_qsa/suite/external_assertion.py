"""An assertion on what another program has measured: the results of an eval, beside those of a reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from pydantic import AfterValidator, Field, model_validator

from ..common import SuiteError
from ..metrics import EVALS, Query
from .assertion import Assertion
from .fields import Regex

NAME = "{name}"
"""What stands in a path for the subject's name, so that one suite serves the evals of many checkpoints."""


def _pointer(pointer: str) -> str:
    if pointer and not pointer.startswith("/"):
        raise ValueError(f"a JSON Pointer begins with a slash, such as /scores/gsm8k, not '{pointer}'")
    return pointer


Pointer = Annotated[str, AfterValidator(_pointer)]


class ExternalAssertion(Assertion):
    """Judge what another program has measured: lm-eval's results, or a number of any JSON. No model runs for it."""

    metric: Literal["external"]
    file: Annotated[str, Field(min_length=1, description="of results, or a folder of lm-eval's; {name}: the subject's")]
    reference: Annotated[str | None, Field(min_length=1, description="the results of the original")] = None
    tasks: Annotated[Regex, Field(description="which of lm-eval's tasks")] = "."
    exclude: Regex | None = None
    score: Annotated[str | None, Field(description="`metric`, or `metric,filter`, of lm-eval")] = None
    pointer: Annotated[Pointer | None, Field(description="a JSON Pointer to the number, of any other JSON")] = None
    stderr: Annotated[Pointer | None, Field(description="a JSON Pointer to its standard error")] = None
    higher_is_better: Annotated[bool | None, Field(description="default: as lm-eval says, or by the name")] = None
    compare: Literal["value", "recovery", "drop"] = "value"
    sigmas: Annotated[float, Ge(0), Field(description="standard errors of the difference that are allowed more")] = 0.0
    implausible_gain: Annotated[float, Gt(0), Field(description="share of the reference")] = 0.1

    @model_validator(mode="after")
    def _sound(self) -> ExternalAssertion:
        if not self.stated:
            raise ValueError("an assertion on an eval needs a bound: min, max or equals")
        if (self.score is None) == (self.pointer is None):
            raise ValueError("say which number: score: exact_match,strict-match of lm-eval, or pointer: /scores/gsm8k")
        self._check_pointed()
        self._check_compared()
        return self

    def _check_pointed(self) -> None:
        if self.pointer is None and self.stderr is not None:
            raise SuiteError("lm-eval's results have their standard errors: stderr stands beside a pointer", "stderr")
        if self.pointer is not None and (self.tasks != "." or self.exclude is not None):
            raise SuiteError("a pointer leads to one number, so it takes no tasks and no exclude", "pointer")

    def _check_compared(self) -> None:
        if self.compare != "value" and self.reference is None:
            raise SuiteError(f"{self.compare} is against a reference: name its file", "compare")
        if self.compare == "value" and self.reference is not None:
            raise SuiteError("say how the reference counts: compare: recovery or compare: drop", "reference")
        if self.sigmas and self.reference is None:
            raise SuiteError(
                "sigmas are of the difference to a reference: a tolerance from the suspect alone lets through what is "
                "uncertain because it is broken",
                "sigmas",
            )
        if self.sigmas and self.equals is not None:
            raise SuiteError("sigmas let out min and max, and equals is neither", "sigmas")

    @property
    def query(self) -> Query:
        """What the assertion asks, for the text of a failure that came before any number."""
        names = ("file", "score", "reference", "compare", "sigmas")
        parameters: dict[str, Any] = {name: value for name in names if (value := getattr(self, name))}
        where = self.tasks if self.pointer is None else self.pointer
        return Query("external", "external/1", EVALS, where, self.exclude, parameters, over=self.over)

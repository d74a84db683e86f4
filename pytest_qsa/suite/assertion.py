"""The assertions of a suite, typed: what each kind states, what it refuses, and what it asks of a pass."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from ..captures import LOGITS, MOMENTS, FeatureCounts, LayerSite, Massive, Request, match_layers
from ..checkpoint import CHECKS, query_of_check
from ..common import SuiteError
from ..metrics import (
    ANY,
    DTYPE_MAX,
    EVALS,
    METRICS,
    MOST_RELATIVE,
    Metric,
    Over,
    Parameters,
    Query,
    Reduce,
    canonical_positions,
    positions_of,
    query_of,
)
from .bounds import SIDES, Noises, Relative, Side, Stated, Waiver, Waivers, is_relative
from .sections import LONGEST_NAME, Regex, Strict
from .tiers import Tier

RESERVED = re.compile(r"__.*|pytest.*|(setup|teardown|setUp|tearDown)(_?(module|function|Module|class|method))?")
"""Names that pytest acts on when it finds them in a module: hooks, and setup and teardown."""


def _id(name: str) -> str:
    if RESERVED.fullmatch(name):
        raise SuiteError(f"the id '{name}' means something to pytest itself: choose another")
    return name


BOUND_KEYS = ("max", "min", "equals")
"""In the order in which a failure looks for the line of the bound."""


class Assertion(Strict, ABC):
    """The keys that every assertion has, whatever its metric."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=LONGEST_NAME), AfterValidator(_id)]
    metric: str
    over: Over | None = None
    min: Stated | None = None
    max: Stated | None = None
    equals: Stated | None = None
    noise: Annotated[Noises | None, Field(description="what qsa calibrate measured; no bound may be tighter")] = None
    level: Literal["fail", "warn"] = "fail"
    tier: Tier = "pr"
    waive: Waivers | None = None
    models: Annotated[
        Regex | None, Field(description="names of the models that it is for; a run says which others it leaves out")
    ] = None
    reason: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Assertion:
        # A bound by group, or one that follows the last release, has no single number to compare.
        if isinstance(self.min, float) and isinstance(self.max, float) and self.min > self.max:
            raise SuiteError(f"min {self.min:g} is above max {self.max:g}: nothing can satisfy both", "min")
        if self.equals is not None and (self.min is not None or self.max is not None):
            raise SuiteError("equals stands beside min or max, and they can't both be meant", "equals")
        grouped = next((key for key, stated in self.stated.items() if isinstance(stated, dict)), None)
        if grouped and self.over is not None:
            raise SuiteError(f"over makes one number of all layers, so {grouped} can't go by group", grouped)
        if self.noise is not None:
            self.noise.check(self.stated, self.reach)
        return self

    @property
    def reach(self) -> tuple[float, float]:
        """The least and the most that its number can be."""
        return METRICS[self.metric].reach(self.over, _stat_of(self)) if self.metric in METRICS else ANY

    @property
    def follows(self) -> str | None:
        """The key of the first bound that follows the last release; None where there is none."""
        return next((key for key, stated in self.stated.items() if is_relative(stated)), None)

    def is_for(self, model: str) -> bool:
        """Say whether it is for a model of that name."""
        return self.models is None or bool(match_layers([model], self.models))

    @property
    def waivers(self) -> list[Waiver]:
        """The waivers as a list, whichever form the suite has."""
        return self.waive if isinstance(self.waive, list) else [self.waive] if self.waive else []

    @property
    def stated(self) -> dict[str, Stated]:
        """The bounds as the suite states them, by `max`, `min` and `equals`."""
        return {key: stated for key in BOUND_KEYS if (stated := getattr(self, key)) is not None}

    @property
    @abstractmethod
    def query(self) -> Query:
        """What the assertion asks for; a failure that comes before any number shows it."""


def _stat_of(assertion: Assertion) -> str:
    """Return which statistic of its metric an assertion is about; empty for a metric of one."""
    return str(getattr(assertion, "stat", ""))


def _positions(value: object) -> object:
    canonical_positions(value)  # type: ignore[arg-type]
    return value


PositionsKey = Annotated[
    Literal["all", "no_sink", "sink"]
    | dict[Literal["skip_first"], int]
    | dict[Literal["from", "to", "sinks"], int | Literal["in", "out"]],
    BeforeValidator(_positions),
]


class Baseline(Strict):
    """How far a layer may be from its baseline: max(abs, rel·|baseline|), in one direction or both."""

    rel: Annotated[float, Field(ge=0, le=MOST_RELATIVE)] = 0.0
    abs: Annotated[float, Field(ge=0)] = 0.0
    direction: Literal["both", "up", "down"] = "both"
    per: Annotated[
        Literal["device_class"] | None,
        Field(description="a class of devices (cpu, sm_90, …) whose numbers don't fit the shared baseline has its own"),
    ] = None


def _baseline(value: object) -> object:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(
            f"baseline: write {{rel: {value:g}}} for a relative tolerance, {{abs: {value:g}}} for an absolute one"
        )
    return value


class MeasuredAssertion(Assertion):
    """An assertion on the numbers that a pass measures at a site."""

    layers: Regex
    exclude: Regex | None = None
    site: LayerSite
    positions: PositionsKey | None = None
    reduce: Reduce | None = None
    baseline: Annotated[Baseline | None, BeforeValidator(_baseline)] = None

    @model_validator(mode="after")
    def _sound(self) -> MeasuredAssertion:
        definition = METRICS[self.metric]
        if self.baseline is None and not self.stated:
            raise ValueError("an assertion needs a bound or a baseline: min, max, equals or baseline")
        if self.over is not None and definition.per == "model":
            raise SuiteError(f"{self.metric} is one number for all layers, so it takes no over", "over")
        if self.reduce is not None and definition.reduce is None:
            raise SuiteError(f"{self.metric} pools all samples itself, so it takes no reduce", "reduce")
        if self.site not in definition.sites:
            raise SuiteError(f"{self.metric} is a metric of the {' or '.join(definition.sites)} only", "site")
        definition.needs(self.site, self.where, self.parameters)  # some have no such parameters at this site
        # `all` is what happens without positions too, so that every metric may state it.
        chosen = self.positions not in (None, "all")
        if chosen and (problem := definition.refuses(self.site, self.where, self.parameters)):
            raise SuiteError(problem, "positions")
        self._check_span(definition)
        if self.baseline is not None and definition.counts == "prompts":
            raise SuiteError(
                f"{self.metric} compares answers to prompts, which no baseline knows: give a bound", "baseline"
            )
        if definition.tokenwise and self.site == "weight":
            raise SuiteError(f"{self.metric} counts tokens, and a weight has none: site is input or output", "site")
        return self

    def _check_span(self, definition: Metric) -> None:
        """Check that no bound, and no tolerance, holds whatever is measured."""
        if (vacuous := self.vacuous()) is not None:
            raise SuiteError(vacuous[1], vacuous[0])
        if self.baseline is not None and (problem := definition.allows_all(self.baseline.abs)):
            raise SuiteError(problem, "baseline")

    def vacuous(self, dtype: str = "float32") -> tuple[Side, str] | None:
        """Return the first bound that holds whatever a model of this dtype has, and why; None where none does."""
        definition, summed = METRICS[self.metric], "sum" in (self.over, self.reduce)
        for side in SIDES:
            stated: Stated | None = getattr(self, side)
            for bound in stated.values() if isinstance(stated, dict) else [stated]:
                if isinstance(bound, Relative):  # the number that it reaches, whatever the last release had
                    bound = bound.at_least if side == "max" else bound.at_most
                if bound is None:
                    continue
                problem = definition.checks_nothing(side, bound, "sum" if summed else self.over, dtype, _stat_of(self))
                if self.metric == "headroom" and side == "max" and not summed:
                    problem = problem or self._beyond_served(bound, dtype)
                if problem:
                    return side, problem
        return None

    def _beyond_served(self, bound: float, dtype: str) -> str | None:
        served = str(self.parameters["dtype"])
        if bound * DTYPE_MAX[served] <= DTYPE_MAX[dtype]:
            return None
        return f"max {bound:g} of {served} is beyond what {dtype} holds, so it checks nothing"

    @property
    def parameters(self) -> Parameters:
        """The values of the metric's own parameters."""
        return {name: getattr(self, name) for name in METRICS[self.metric].parameters}

    @property
    def where(self) -> str:
        """The positions in canonical form."""
        return positions_of(self.metric, self.site, self.positions)  # type: ignore[arg-type]

    @property
    def query(self) -> Query:
        """See `Assertion`."""
        return replace(
            query_of(self.metric, self.site, self.layers, self.exclude, self.parameters, self.where, self.reduce),
            over=self.over,
        )

    @property
    def request(self) -> Request:
        """The site and the statistics that a capture must hold to answer the assertion."""
        needs = METRICS[self.metric].needs(self.site, self.where, self.parameters)
        # These count what is above a threshold, and don't tell a dead model from a calm one.
        if any(isinstance(each, Massive | FeatureCounts) for each in needs):
            needs |= {MOMENTS}
        return Request(self.layers, self.site, self.exclude, needs)


LOADED_MAX = 0.005
"""How far a loaded weight may be from the file's: bfloat16 rounds by 0.002."""


class LoadedAssertion(MeasuredAssertion):
    """An assertion on how far loaded weights are from the files. Without a bound it allows what rounding explains."""

    layers: Regex = "."
    site: Literal["weight"] = "weight"

    @property
    def stated(self) -> dict[str, Stated]:
        """The bounds of the suite; without any, and without a baseline, the rounding of a dtype."""
        # A baseline is a bound already, which this one would come on top of.
        return super().stated or ({} if self.baseline else {"max": LOADED_MAX})


class LogitsAssertion(MeasuredAssertion):
    """An assertion on what the whole model predicts."""

    layers: Literal[""] = ""
    site: Literal["logits"] = "logits"  # type: ignore[assignment]


GAP_MAX = 6.0
"""How many floors engines may be apart: healthy SmolLM2 in int8 reaches 4.0, a kernel that is wrong by 1.1 is at 24."""


class EngineAssertion(MeasuredAssertion):
    """An assertion on how far two engines are apart: at layers, or, with `stat: kl`, in what they predict.

    Without a bound it allows `GAP_MAX` floors.
    """

    layers: Regex = ""
    site: Literal["input", "output", "logits"] = "logits"  # type: ignore[assignment]

    @property
    def stated(self) -> dict[str, Stated]:
        """The bounds of the suite; without any, and without a baseline, so many floors; none of an absolute gap."""
        default = not self.baseline and self.parameters["relative"]
        return super().stated or ({"max": GAP_MAX} if default else {})

    @model_validator(mode="after")
    def _of_layers(self) -> EngineAssertion:
        if _stat_of(self) == "kl" and (self.layers or self.exclude):
            raise SuiteError("stat: kl is of the predictions: leave layers, exclude and site out", "layers")
        if self.site != LOGITS and not self.layers:
            raise SuiteError("engine_gap at a site is of layers: name them", "layers")
        return self


class ReferenceAssertion(MeasuredAssertion):
    """An assertion on the distance of a layer's tensors from the reference's."""

    site: LayerSite = "output"


class CheckpointAssertion(Assertion):
    """An assertion on a checkpoint's files, before any forward. Without a bound it allows no problem."""

    layers: Regex = "."
    exclude: Regex | None = None

    @model_validator(mode="after")
    def _sound(self) -> CheckpointAssertion:
        if self.max is None and isinstance(self.min, float) and self.min <= 0:
            raise SuiteError(
                f"a number of problems is never below 0, so min {self.min:g} checks nothing: leave it out, and no "
                "problem is allowed",
                "min",
            )
        return self

    @property
    def parameters(self) -> Parameters:
        """The values of the check's own parameters."""
        return {name: getattr(self, name) for name in CHECKS[self.metric].parameters}

    @property
    def stated(self) -> dict[str, Stated]:
        """The bounds of the suite; without any, no problem is allowed."""
        return super().stated or {"max": 0.0}

    @property
    def query(self) -> Query:
        """See `Assertion`."""
        return replace(query_of_check(self.metric, self.layers, self.exclude, self.parameters), over=self.over)


MOST_SIGMAS = 10.0
"""The most standard errors by which a bound is widened; more would let anything through."""
NAME_PLACEHOLDER = "{name}"
"""A path may hold it in place of the subject's name, so that one suite serves the evals of many checkpoints."""


def _pointer(pointer: str) -> str:
    if pointer and not pointer.startswith("/"):
        raise ValueError(f"a JSON Pointer begins with a slash, such as /scores/gsm8k, not '{pointer}'")
    return pointer


Pointer = Annotated[str, AfterValidator(_pointer)]


class ExternalAssertion(Assertion):
    """An assertion on results of another program: lm-eval's, or a number in any JSON file. No model runs for it."""

    metric: Literal["external"]
    file: Annotated[str, Field(min_length=1, description="of results, or a folder of lm-eval's; {name}: the subject's")]
    reference: Annotated[str | None, Field(min_length=1, description="the results of the original")] = None
    tasks: Annotated[Regex, Field(description="which of lm-eval's tasks")] = "."
    exclude: Regex | None = None
    score: Annotated[str | None, Field(description="`metric`, or `metric,filter`, of lm-eval")] = None
    pointer: Annotated[Pointer | None, Field(description="a JSON Pointer to the number, of any other JSON")] = None
    stderr: Annotated[Pointer | None, Field(description="a JSON Pointer to its standard error")] = None
    higher_is_better: Annotated[bool | None, Field(description="default: as lm-eval says, or by the name")] = None
    compare: Literal["value", "recovery", "drop", "paired"] = "value"
    samples: Annotated[
        str | None, Field(min_length=1, description="names of lm-eval's samples beside the results, TASK: the task's")
    ] = None
    sigmas: Annotated[
        float, Field(ge=0, le=MOST_SIGMAS, description="standard errors of the difference that are allowed more")
    ] = 0.0
    implausible_gain: Annotated[float, Field(gt=0, le=MOST_RELATIVE, description="share of the reference")] = 0.1

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
        self._check_paired()
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
        if self.compare == "recovery" and isinstance(self.min, float) and self.min <= 0:
            raise SuiteError(
                f"recovery is a ratio of positive scores and never 0, so min {self.min:g} checks nothing", "min"
            )

    def _check_paired(self) -> None:
        if self.samples is not None and (self.compare != "paired" or {"..", ""} & set(self.samples.split("/"))):
            raise SuiteError("samples are files beside the results, for compare: paired", "samples")
        if self.compare != "paired":
            return
        if self.pointer is not None:
            raise SuiteError("samples are paired by lm-eval's files: name score instead of pointer", "pointer")
        if self.max is None or self.min is not None or self.equals is not None:
            raise ValueError("a paired comparison needs one bound, the drop that may be lost: max: 0.02")
        for key in ("sigmas", "over"):
            if getattr(self, key):
                raise SuiteError(f"a paired comparison has an interval for each task, and takes no {key}", key)

    @property
    def query(self) -> Query:
        """See `Assertion`."""
        names = ("file", "score", "reference", "compare", "samples", "sigmas")
        parameters: Parameters = {name: value for name in names if (value := getattr(self, name))}
        where = self.tasks if self.pointer is None else self.pointer
        return Query("external", "external/1", EVALS, where, self.exclude, parameters, over=self.over)

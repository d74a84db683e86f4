"""The class of a metric's assertions: a pydantic model, made when a suite names the metric.

Its fields are the parameters of the metric, taken from the signature of its function, so that YAML, Python and the JSON
Schema accept the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce as fold
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from ..checkpoint import CHECKS, Check
from ..common import SuiteError
from ..metrics import (
    METRICS,
    Metric,
)
from .assertion import (
    Assertion,
    CheckpointAssertion,
    EngineAssertion,
    ExternalAssertion,
    LoadedAssertion,
    LogitsAssertion,
    MeasuredAssertion,
    ReferenceAssertion,
)


def _base_of(metric: Metric | Check) -> type[Assertion]:
    if isinstance(metric, Check):
        return CheckpointAssertion
    if metric.per == "logits":
        return LogitsAssertion
    if metric.name == "engine_gap":
        return EngineAssertion
    if metric.name == "loaded_weights":
        return LoadedAssertion
    return ReferenceAssertion if metric.against else MeasuredAssertion


@cache
def _assertion_model(metric: Metric | Check) -> type[Assertion]:
    base = _base_of(metric)
    own: dict[str, Any] = {name: (p.annotation, p.default) for name, p in metric.parameters.items()}
    # A metric of one site needs no key for it.
    if isinstance(metric, Metric) and len(metric.sites) == 1:
        own["site"] = (Literal[metric.sites[0]], metric.sites[0])
    if taken := own.keys() & base.model_fields.keys() - {"site"}:
        where, key = metric.place, min(taken)
        raise SuiteError(f"{where}: '{key}' is a key of every assertion: rename the parameter of {metric.name}")
    title = "".join(word.title() for word in metric.name.split("_"))
    doc = (metric.compute.__doc__ or "").partition("\n")[0]
    return create_model(title, __base__=base, __doc__=doc, metric=(Literal[metric.name], ...), **own)  # type: ignore[arg-type]


def _in_order() -> list[str]:
    """Return the names of this package's metrics, those on activations of one model first, as messages list them."""
    return sorted(
        # A user's metric comes and goes with its conftest, so that it is no part of the union.
        (name for name, metric in METRICS.items() if not metric.origin),
        key=lambda name: METRICS[name].against or METRICS[name].per == "logits" or METRICS[name].sites == ("weight",),
    )


BUILT_IN: Sequence[str] = (*_in_order(), *CHECKS, "external")
"""The metrics of this package, in the order of messages and of the JSON Schema."""


class Assertions(Mapping[str, type[Assertion]]):
    """Metric → the class of its assertions, made when it is asked for: a suite uses few of fifty."""

    def __getitem__(self, name: str) -> type[Assertion]:
        if name == "external":
            return ExternalAssertion
        metric = CHECKS.get(name) or METRICS.find(name)
        if metric is None:
            raise KeyError(name)
        return _assertion_model(metric)

    def __contains__(self, name: object) -> bool:
        # `find` looks for an entry point, which `in` does not.
        return isinstance(name, str) and (name in BUILT_IN or METRICS.find(name) is not None)

    def __iter__(self) -> Iterator[str]:
        yield from BUILT_IN
        yield from (name for name in METRICS if name not in BUILT_IN)

    def __len__(self) -> int:
        return len({*BUILT_IN, *METRICS})


ASSERTIONS = Assertions()


@cache
def _of_built_in() -> TypeAdapter[Assertion]:
    """Return what validates any assertion on a metric of this package: slow to make."""
    union = fold(or_, (ASSERTIONS[name] for name in BUILT_IN))
    return TypeAdapter(Annotated[union, Field(discriminator="metric")])  # type: ignore[arg-type]


def _validated(entry: object) -> Assertion:
    """Validate an assertion by the class of its metric; its errors get the metric as a tag, as those of a union."""
    name = entry.get("metric") if isinstance(entry, dict) else None
    if not isinstance(name, str) or name not in ASSERTIONS:
        return _of_built_in().validate_python(entry)  # whose error names the metrics there are
    try:
        return ASSERTIONS[name].model_validate(entry)
    except ValidationError as error:
        problems: list[Any] = [
            {key: problem[key] for key in ("type", "input", "ctx") if key in problem} | {"loc": (name, *problem["loc"])}
            for problem in error.errors()
        ]
        raise ValidationError.from_exception_data(error.title, problems) from None


class _ByMetric:
    """Makes a field that is validated by `_validated`, and is a union of all classes in the JSON Schema.

    pydantic's own union would build the validators of all of them for every suite, a quarter of the time of a run that
    measures nothing.
    """

    @staticmethod
    def __get_pydantic_core_schema__(source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_validated)

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(_of_built_in().core_schema)


AnyAssertion = Annotated[Assertion, _ByMetric]

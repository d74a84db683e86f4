"""The typed suite: the seed's sections, key for key, and the assertions.

Each metric gets a model of its own whose fields are the metric's parameters, made from the signature of its function,
so that a suite, Python and the JSON Schema can't disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce as fold
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, create_model, model_validator

from ..captures import LayerSite, Request
from ..checkpoint import CHECKS, Check, query_of_check
from ..common import SuiteError
from ..metrics import METRICS, Metric, Query, Reduce, canonical_positions, positions_of, query_of
from .assertion import Assertion
from .bounds import Stated
from .external_assertion import ExternalAssertion
from .fields import Regex, Strict
from .requirement import Require
from .served_model import Served, Tail
from .visualization import Visualization


def _positions(value: object) -> object:
    canonical_positions(value)  # type: ignore[arg-type]
    return value


Positions = Annotated[Literal["all", "no_sink", "sink"] | dict[Literal["skip_first"], int], BeforeValidator(_positions)]


LOADED = 0.005
"""How far a loaded weight may be from the file's: bfloat16 rounds by 0.002."""
DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")


def _device(name: str) -> str:
    if not DEVICE.fullmatch(name):
        raise ValueError(f"device '{name}' is none of auto, cpu, cuda, cuda:N, xpu, mps")
    return name


class Model(Strict):
    """The subject. `path` is a folder, relative to the suite, if there is one, else a hub id; or a `factory`."""

    path: str | None = None
    factory: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$", description="package.module:function")] | None = None
    served: Served | None = None
    logprobs: Annotated[str | None, Field(description="a file of what a served model said: .json or .jsonl")] = None
    tail: Annotated[Tail, Field(description="what may be assumed of the tokens that aren't told")] = "unknown"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-/]+$")] | None = None
    reference: str | None = None
    previous: Annotated[
        str | None, Field(description="the last release: a capture's file, a name under qsa_baselines, or a checkpoint")
    ] = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    gguf_file: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    submodule: str | None = None
    allow_unexpected: Annotated[
        Regex | None, Field(description="tensors of the checkpoint that loading may drop; others are an error")
    ] = None
    allow_idle: Annotated[
        Regex | None, Field(description="quantized modules that need not run; others that never do are an error")
    ] = None
    require: Annotated[Require | None, Field(description="what must be so for any number to count")] = None

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if sum(source is not None for source in (self.path, self.factory, self.served, self.logprobs)) != 1:
            raise ValueError("give one of path, factory, served and logprobs")
        return self

    @property
    def told(self) -> bool:
        """Whether only what a served model says of tokens is known, not its layers."""
        return self.served is not None or self.logprobs is not None

    @property
    def measured(self) -> dict[str, Any]:
        """What a capture depends on, but for where model and reference are."""
        beside = {"name", "path", "reference", "previous", "allow_idle", "require"}
        return {**self.model_dump(exclude=beside), "runs": self.require is not None}

    @property
    def id(self) -> str:
        """The subject's name: the folder of its baselines."""
        served = (self.served.model or "served") if self.served else self.logprobs
        return self.name or (self.path or self.factory or served or "model").rstrip("/").rpartition("/")[2]


class CustomData(Strict):
    """How a `custom:` file is read."""

    format: Literal["auto", "text", "txt", "json", "jsonl", "csv", "parquet"] = "auto"
    text_column: str = "text"


class Data(Strict):
    """The calibration data, as windows of tokens.

    `sample` is shipped with the package; `custom:PATH` is a file or a data set's folder; `wikitext2`, `pile`, `c4`,
    `redpajama` and `hf:NAME[:subset]` are sets of the hub, with `subset`, `split`, `column` and `revision`.
    """

    source: str = "sample"
    subset: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    num_samples: Annotated[int, Field(gt=0)] = 16
    seq_len: Annotated[int, Field(gt=0)] = 512
    seed: int = 0
    batch_size: Annotated[int, Field(gt=0)] = 1
    add_special_tokens: bool = True
    chat_template: bool = False
    custom: CustomData = CustomData()


class Memory(Strict):
    """Where the model runs, and where the part of it that doesn't fit is kept."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    auto_offload: bool = True
    offload_device: Literal["cpu", "disk"] = "cpu"


class Baseline(Strict):
    """How far from its baseline a layer may be: max(abs, rel·|baseline|), in one direction or both."""

    rel: Annotated[float, Field(ge=0)] = 0.0
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
    """An assertion on what a pass measures: the numbers of a site."""

    layers: Regex
    exclude: Regex | None = None
    site: LayerSite
    positions: Positions | None = None
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
        chosen = self.positions not in (None, "all")
        if chosen and not definition.positional:
            raise SuiteError(f"{self.metric} counts elements, not tokens, so it takes no positions", "positions")
        if chosen and not definition.counts_tokens(self.site, self.where, self.parameters):
            raise SuiteError(
                f"{self.metric} counts no tokens with these parameters, so it takes no positions", "positions"
            )
        if definition.tokenwise and self.site == "weight":
            raise SuiteError(f"{self.metric} counts tokens, and a weight has none: site is input or output", "site")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The metric's own parameters with their values."""
        return {name: getattr(self, name) for name in METRICS[self.metric].parameters}

    @property
    def where(self) -> str:
        """The positions in canonical form."""
        return positions_of(self.metric, self.site, self.positions)  # type: ignore[arg-type]

    @property
    def query(self) -> Query:
        """What the assertion asks, for the text of a failure that came before any number."""
        return replace(
            query_of(self.metric, self.site, self.layers, self.exclude, self.parameters, self.where, self.reduce),
            over=self.over,
        )

    @property
    def request(self) -> Request:
        """What this assertion needs of a capture."""
        needs = METRICS[self.metric].needs(self.site, self.where, self.parameters)
        return Request(self.layers, self.site, self.exclude, needs)


class CheckpointAssertion(Assertion):
    """An assertion on a checkpoint's files, before any forward. Without a bound it allows no problem at all."""

    layers: Regex = "."
    exclude: Regex | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The check's own parameters with their values."""
        return {name: getattr(self, name) for name in CHECKS[self.metric].parameters}

    @property
    def stated(self) -> dict[str, Stated]:
        """The bounds by their keys: no problem, where the suite gives none."""
        return super().stated or {"max": 0.0}

    @property
    def query(self) -> Query:
        """What the assertion asks, for the text of a failure that came before any number."""
        return replace(query_of_check(self.metric, self.layers, self.exclude, self.parameters), over=self.over)


class LoadedAssertion(MeasuredAssertion):
    """An assertion on what the loader made of the files. Without a bound it allows what rounding explains."""

    layers: Regex = "."
    site: Literal["weight"] = "weight"

    @property
    def stated(self) -> dict[str, Stated]:
        """The bounds by their keys: the rounding of a dtype, where the suite gives none."""
        return super().stated or ({} if self.baseline else {"max": LOADED})


class LogitsAssertion(MeasuredAssertion):
    """An assertion on what the whole model predicts."""

    layers: Literal[""] = ""
    site: Literal["logits"] = "logits"  # type: ignore[assignment]


class ReferenceAssertion(MeasuredAssertion):
    """An assertion on how close a layer is to the reference's."""

    site: LayerSite = "output"


def _measured(metric: Metric) -> type[Assertion]:
    """Return what the assertions on a metric have in common."""
    if metric.per == "logits":
        return LogitsAssertion
    if metric.name == "loaded_weights":
        return LoadedAssertion
    return ReferenceAssertion if metric.against else MeasuredAssertion


def _assertion_model(metric: Metric | Check, base: type[Assertion]) -> type[Assertion]:
    own: dict[str, Any] = {name: (p.annotation, p.default) for name, p in metric.parameters.items()}
    if isinstance(metric, Metric) and len(metric.sites) == 1:
        own["site"] = (Literal[metric.sites[0]], metric.sites[0])
    title = "".join(word.title() for word in metric.name.split("_"))
    doc = (metric.compute.__doc__ or "").splitlines()[0]
    return create_model(title, __base__=base, __doc__=doc, metric=(Literal[metric.name], ...), **own)  # type: ignore[arg-type]


def _in_order() -> list[str]:
    """Return the metrics' names, those of the tensors that one model's pass sees first."""
    return sorted(
        METRICS,
        key=lambda name: METRICS[name].against or METRICS[name].per == "logits" or METRICS[name].sites == ("weight",),
    )


ASSERTIONS: Mapping[str, type[Assertion]] = {
    **{name: _assertion_model(METRICS[name], _measured(METRICS[name])) for name in _in_order()},
    **{name: _assertion_model(check, CheckpointAssertion) for name, check in CHECKS.items()},
    "external": ExternalAssertion,
}
AnyAssertion = Annotated[fold(or_, ASSERTIONS.values()), Field(discriminator="metric")]  # type: ignore[valid-type]


class Suite(Strict):
    """A suite: the seed's configuration plus `assertions`. Without `model` the fixture `qsa_model` is the subject.

    `extends` and `defaults` have done their work when a suite is made: `inheritance` and `defaults` read them.
    """

    extends: str | list[str] | None = None
    defaults: dict[str, Any] = Field(default={})
    model: Model | None = None
    data: Data = Data()
    memory: Memory = Memory()
    visualization: Visualization = Visualization()
    assertions: list[AnyAssertion] | None = None  # type: ignore[valid-type]

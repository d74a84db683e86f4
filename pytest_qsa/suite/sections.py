"""The sections of a suite that say what is measured: model, data and memory.

They are the configuration of quant-smooth-ana, key for key, with additions.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Gt, Le
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from .fields import Regex, Strict


def _url(url: str) -> str:
    parts = urlsplit(url)
    try:
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.query or parts.fragment:
        raise ValueError(f"url: write an address such as http://localhost:8000/v1, not '{url}'")
    if parts.username or parts.password:
        raise ValueError("url: a password has no place in a suite: name the variable that holds the key, api_key_env")
    return url


class Floor(Strict):
    """A lower bound on ln q of the tokens that a server leaves out of its answer."""

    at_least: Annotated[float, Le(0), Field(description="nats, such as -25")]


Tail = Annotated[
    Annotated[Literal["unknown", "as_reference"], Tag("[word]")] | Annotated[Floor, Tag("[floor]")],
    Discriminator(lambda value: "[floor]" if isinstance(value, dict | Floor) else "[word]"),
]


class Served(Strict):
    """A model behind an OpenAI-compatible endpoint that returns the logprobs of a prompt. No other address is asked."""

    url: Annotated[str, AfterValidator(_url)]
    model: Annotated[str | None, Field(min_length=1, description="its name there, if there are several")] = None
    api: Literal["vllm", "sglang", "llama.cpp"] = "vllm"
    top_logprobs: Annotated[
        int, Gt(0), Field(description="tokens that it returns for each position; vLLM: --max-logprobs")
    ] = 20
    timeout: Annotated[float, Gt(0), Field(description="seconds for an answer")] = 120.0
    tokenizer: Annotated[str | None, Field(description="a folder or hub id; default: that of model.reference")] = None
    api_key_env: Annotated[
        str | None, Field(pattern=r"^QSA_[A-Z0-9_]+$", description="the environment variable that holds the key")
    ] = None

    @property
    def root(self) -> str:
        """The address without the `/v1` that OpenAI's clients append."""
        return self.url.rstrip("/").removesuffix("/v1")


EXECUTION = re.compile(
    r"(W\d+A\d+ )?(FP )?(emulated|by kernels|kernels|weights only)|(W\d+A\d+)( FP)?|float", re.IGNORECASE
)


def _executions(value: object) -> object:
    executions = [value] if isinstance(value, str) else value
    for each in executions if isinstance(executions, list) else ():
        if not isinstance(each, str) or not EXECUTION.fullmatch(each):
            raise ValueError(
                f"executed_as '{each}' is no way to run: write W8A8 emulated, W8A8 kernels, W4A16 weights only, "
                "weights only, emulated or float, or a list of them"
            )
    return executions


Executions = Annotated[
    list[str], BeforeValidator(_executions, json_schema_input_type=str | list[str]), Field(min_length=1)
]


class Require(Strict):
    """What must hold of the running model; otherwise every assertion on it fails as INFRA."""

    executed_as: Annotated[
        Executions, Field(description="how its quantized modules must run: W8A8 emulated, weights only")
    ]


DEVICES = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")


def _device(name: str) -> str:
    if not DEVICES.fullmatch(name):
        raise ValueError(f"device '{name}' is none of auto, cpu, cuda, cuda:N, xpu, mps")
    return name


class Model(Strict):
    """The subject. `path` is a folder, relative to the suite, if there is one, else a hub id; or a `factory`."""

    path: str | None = None
    factory: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$", description="package.module:function")] | None = None
    served: Served | None = None
    logprobs: Annotated[str | None, Field(description="a file of a served model's answers: .json or .jsonl")] = None
    tail: Annotated[Tail, Field(description="what to assume of the tokens that an answer leaves out")] = "unknown"
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
    require: Annotated[Require | None, Field(description="what must hold for any number to count")] = None

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if sum(source is not None for source in (self.path, self.factory, self.served, self.logprobs)) != 1:
            raise ValueError("give one of path, factory, served and logprobs")
        return self

    @property
    def logprobs_only(self) -> bool:
        """Whether the subject is known by the logprobs of a served model alone, so that it has no layers here."""
        return self.served is not None or self.logprobs is not None

    @property
    def measured(self) -> dict[str, Any]:
        """The settings that a capture depends on, without the locations of model and reference."""
        other = {"name", "path", "reference", "previous", "allow_idle", "require"}
        # `require` is about a forward: a capture of weights alone, made without one, can't answer it.
        return {**self.model_dump(exclude=other), "runs": self.require is not None}

    @property
    def id(self) -> str:
        """The subject's name, which is also the folder of its baselines."""
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
    """Where the model runs, and where the part of it goes that doesn't fit there."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    auto_offload: bool = True
    offload_device: Literal["cpu", "disk"] = "cpu"

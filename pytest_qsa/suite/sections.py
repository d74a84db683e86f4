"""The sections of a suite but for `visualization`: model, data, generation, memory; their base class.

They are the configuration of quant-smooth-ana, key for key, with additions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from annotated_types import Gt, Le
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic.fields import FieldInfo

from ..captures import check_pattern
from ..common import SuiteError


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


Regex = Annotated[str, AfterValidator(check_pattern)]


def _url(url: str) -> str:
    parts = urlsplit(url)
    try:
        # `parts.port` raises ValueError where the port is no number or too large.
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.query or parts.fragment:
        raise ValueError(f"url: write an address such as http://localhost:8000/v1, not '{url}'")
    # Suites are committed, and reports show the address.
    if parts.username or parts.password:
        raise ValueError("url: a password has no place in a suite: name the variable that holds the key, api_key_env")
    return url


class Floor(Strict):
    """A lower bound on ln q of the tokens that a server leaves out of its answer."""

    at_least: Annotated[float, Le(0), Field(description="nats, such as -25")]


def _path(text: str) -> str:
    # The system raises an error of its own where a longer one is looked up.
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(f"'{text[:40]}…' is no path: a name has at most 255 bytes, and all of it 4,000")
    return text


PathText = Annotated[str, AfterValidator(_path)]
"""A path, the id of something on the hub, or `custom:PATH`."""


def _file_inside(name: str) -> str:
    if not name or os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise ValueError(f"gguf_file is a file of the checkpoint's folder, such as model-q4_k_m.gguf, not '{name}'")
    return name


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
        int, Gt(0), Field(description="top logprobs that it returns for each position; vLLM: --max-logprobs")
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


WORD = r"^[A-Za-z0-9_]+$"
"""A setting of vLLM's that is one word; with dots it could name code."""


class Require(Strict):
    """What must hold of the running model; otherwise every assertion on it fails as INFRA."""

    executed_as: Annotated[
        Executions, Field(description="how its quantized modules must run: W8A8 emulated, weights only")
    ]


class Engine(Strict):
    """What runs the model. Of vLLM's settings only those that name no code; the operator gives the others."""

    name: Annotated[Literal["transformers", "vllm"], Field(description="what runs the model")] = "transformers"
    tensor_parallel_size: Annotated[int | None, Gt(0)] = None
    pipeline_parallel_size: Annotated[int | None, Gt(0)] = None
    enable_expert_parallel: bool | None = None
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"] | None, Field(description="default: model.dtype")
    ] = None
    kv_cache_dtype: Annotated[str | None, Field(pattern=WORD)] = None
    max_model_len: Annotated[int | None, Gt(0), Field(description="default: what the data need")] = None
    max_num_batched_tokens: Annotated[
        int | None, Gt(0), Field(description="fewer than a sample has: it runs in parts, chunked prefill")
    ] = None
    max_num_seqs: Annotated[int | None, Gt(0)] = None
    gpu_memory_utilization: Annotated[float | None, Gt(0), Le(1)] = None
    quantization: Annotated[str | None, Field(pattern=WORD)] = None
    attention_backend: Annotated[str | None, Field(pattern=WORD)] = None
    timeout: Annotated[float, Gt(0), Field(description="seconds that loading and running may take")] = 3600.0

    @model_validator(mode="after")
    def _of_vllm(self) -> Engine:
        if self.name == "transformers" and (given := sorted(self.settings)):
            raise SuiteError(f"{given[0]} is vLLM's: say engine: {{name: vllm, …}}", given[0])
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the suite gives, by vLLM's names."""
        return self.model_dump(exclude={"name", "timeout"}, exclude_none=True)


def _engine(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


DEVICES = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?")


def _device(name: str) -> str:
    if not DEVICES.fullmatch(name):
        raise ValueError(f"device '{name}' is none of auto, cpu, cuda, cuda:N, xpu, mps")
    return name


LONGEST_NAME, LONGEST_NAMES = 200, 1000
"""Bytes of the name of a folder or file that is made of a user's text, and characters of several; systems take 255."""


def name_problem(name: str) -> str | None:
    """Return why a subject can't have a name, under which its baselines lie in `qsa_baselines`; None where it can."""
    if not name.isprintable():
        return "a character in it can't be shown"
    if os.path.splitdrive(name)[0] or {"", ".", ".."} & set(re.split(r"[/\\]", name)):  # a drive: on Windows
        return "its baselines would lie outside qsa_baselines, or in no folder of their own"
    if len(name) > LONGEST_NAMES or any(len(part.encode()) > LONGEST_NAME for part in name.split("/")):
        return f"it is longer than the name of a folder may be, {LONGEST_NAME} bytes"
    return None


KvCache = Literal[
    "fp8_e4m3", "fp8_per_token_head", "fp8_ds_mla", "int8_per_token_head", "int4_per_token_head", "q8_0", "q4_0"
]
"""The grids of a quantized KV cache: vLLM's, then llama.cpp's."""
SELF = "self"
"""As `model.reference`: the same checkpoint without `model.kv_cache`."""


class Model(Strict):
    """The subject. `path` is a folder, relative to the suite, if there is one, else a hub id; or a `factory`."""

    path: Annotated[PathText | None, Field(description="a checkpoint's folder, or a hub id")] = None
    factory: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$", description="package.module:function")] | None = None
    served: Served | None = None
    logprobs: Annotated[PathText | None, Field(description="a file of a served model's answers: .json or .jsonl")] = (
        None
    )
    tail: Annotated[Tail, Field(description="what to assume of the tokens that an answer leaves out")] = "unknown"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-/]+$")] | None = None
    base: Annotated[
        PathText | None,
        Field(description="the base of an adapter: a folder or hub id; default: what the adapter names"),
    ] = None
    reference: Annotated[
        PathText | None,
        Field(description="the original: a folder, a hub id, a reference file; or self: the same without kv_cache"),
    ] = None
    reference_is_copy: Annotated[
        bool, Field(description="the reference is the model itself or a copy: its numbers show the floor of the noise")
    ] = False
    previous: Annotated[
        PathText | None,
        Field(description="the last release: a capture's file, a name under qsa_baselines, or a checkpoint"),
    ] = None
    revision: Annotated[str | None, Field(description="the commit of a hub id")] = None
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Field(description="what the model is loaded in; auto: what its files hold"),
    ] = "auto"
    gguf_file: Annotated[str, AfterValidator(_file_inside)] | None = None
    attn_implementation: str | None = None
    trust_remote_code: Annotated[bool, Field(description="run code of the checkpoint; needs --qsa-allow-code")] = False
    engine: Annotated[
        Engine,
        BeforeValidator(_engine, json_schema_input_type=Literal["transformers", "vllm"] | Engine),
        Field(description="transformers, or vllm: the numbers of the engine that serves (docs/engines.md)"),
    ] = Engine()
    kv_cache: Annotated[
        KvCache | None, Field(description="run with keys and values rounded as this quantized KV cache has them")
    ] = None
    submodule: Annotated[str | None, Field(description="gate a part of the model, such as language_model")] = None
    weights: Annotated[
        Literal["loaded", "files"],
        Field(description="what is measured at site: weight: what the loader made, or what the files hold"),
    ] = "loaded"
    allow_unexpected: Annotated[
        Regex | None, Field(description="tensors of the checkpoint that loading may drop; others are an error")
    ] = None
    allow_idle: Annotated[
        Regex | None, Field(description="regex of quantized modules that are allowed to stay unused")
    ] = None
    require: Annotated[Require | None, Field(description="what must hold for any number to count")] = None

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if sum(source is not None for source in (self.path, self.factory, self.served, self.logprobs)) != 1:
            raise ValueError("give one of path, factory, served and logprobs")
        if self.weights == "files" and self.path is None:
            raise ValueError("weights: files reads a checkpoint's files: give its path, or leave it out")
        if self.engine.name == "vllm":
            self._check_engine()
        self._check_cache()
        if self.base is not None and self.path is None:
            raise ValueError("base is that of an adapter in path, and there is no path")
        if problem := name_problem(self.id):
            keys = ("name", "path", "factory", "served", "logprobs")
            key = next(key for key in keys if getattr(self, key) is not None)
            advice = "choose another" if self.name else "give model.name"
            raise SuiteError(f"the name '{self.id}' can't be that of a subject: {problem}; {advice}", key)
        return self

    def _check_cache(self) -> None:
        if self.kv_cache is not None and self.logprobs_only:
            raise SuiteError("kv_cache is of a model that runs here: start the server with its own", "kv_cache")
        if self.kv_cache is not None and self.engine.name != "transformers":
            raise SuiteError("kv_cache is for transformers: vLLM has its own, engine: kv_cache_dtype", "kv_cache")
        if self.reference == SELF and self.kv_cache is None:
            raise SuiteError("self is the model without kv_cache: name a kv_cache, or the original", "reference")

    def _check_engine(self) -> None:
        if self.path is None:
            raise SuiteError("vLLM loads a checkpoint: give model.path", "engine")
        unfit = [key for key in ("base", "gguf_file", "submodule", "attn_implementation") if getattr(self, key)]
        if unfit:
            raise SuiteError(f"{unfit[0]} is for transformers: leave it out with engine: vllm", unfit[0])

    @property
    def logprobs_only(self) -> bool:
        """Whether the subject is known by the logprobs of a served model alone, so that it has no layers here."""
        return self.served is not None or self.logprobs is not None

    @property
    def measured(self) -> dict[str, Any]:
        """The settings that a capture depends on, without the locations of model and reference."""
        # Files count by their content, which the fingerprint hashes; the other keys do not change what a pass
        # measures.
        other = {"name", "path", "base", "reference", "reference_is_copy", "previous", "allow_idle", "require"}
        # Captures that were kept before there was such a key are still those of a model without it.
        other |= {"kv_cache"} if self.kv_cache is None else set()
        # `require` is about a forward: a capture of weights alone, made without one, can't answer it.
        # An engine that nothing says is left out: the captures that were kept before there was a choice stay.
        other |= {"engine"} if self.engine == Engine() else set()
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


PROMPTS = "prompts"
"""The source of the conversations that the package brings."""
MEDIA = {"pictures": "image", "sounds": "audio"}
"""The sources that the package draws → what a record of each holds, as processors call it."""
MOST_SAMPLES, MOST_TOKENS = 1_000_000, 10_000_000
"""Far above what a gate runs, so that a slip of the keyboard isn't a run without an end."""


class AnswersOf(Strict):
    """Greedy answers to the prompts of the data, of the reference or, where there is none, of the model itself."""

    max_new_tokens: Annotated[int, Field(description="the most tokens of an answer", gt=0, le=100_000)] = 128
    phase: Annotated[
        Literal["prefill", "decode"],
        Field(description="decode: only the answers count, and go through the model one token at a time"),
    ] = "prefill"


class Data(Strict):
    """The calibration data, as windows of tokens; or pictures and sounds, each a sample of its own.

    `sample`, `document`, one text of 200 kB, `prompts`, `pictures` and `sounds` come with the package; `custom:PATH` is
    a file or a folder; `wikitext2`, `pile`, `c4`, `redpajama` and `hf:NAME[:subset]` are sets of the hub, with
    `subset`, `split`, `column` and `revision`.
    """

    source: Annotated[
        PathText,
        Field(
            description="sample, document, prompts, pictures, sounds, custom:PATH, wikitext2, pile, c4, redpajama, hf:…"
        ),
    ] = "sample"
    subset: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    num_samples: Annotated[int, Field(description="how many windows of tokens", gt=0, le=MOST_SAMPLES)] = 16
    seq_len: Annotated[int, Field(description="tokens of a window", gt=0, le=MOST_TOKENS)] = 512
    stride: Annotated[
        int | None,
        Field(description="windows begin this many tokens apart and overlap; absent: they are disjoint", gt=0),
    ] = None
    seed: Annotated[int, Field(description="which windows are drawn", ge=0, lt=2**64)] = 0
    batch_size: Annotated[int, Field(description="windows of one forward; changes no number", gt=0)] = 1
    add_special_tokens: bool = True
    chat_template: Annotated[bool, Field(description="apply the chat template to records of messages")] = False
    custom: CustomData = CustomData()
    answers: Annotated[
        AnswersOf | None,
        Field(description="samples are prompts with the reference's own greedy answers; {} takes the defaults"),
    ] = None

    @model_validator(mode="after")
    def _of_prompts(self) -> Data:
        if self.source == PROMPTS and self.answers is None and not self.chat_template:
            raise SuiteError("prompts are conversations: say answers: {}, or chat_template: true", "source")
        if self.stride is not None and self.answers is not None:
            raise SuiteError("answers are samples of their own: stride is for windows of one text", "stride")
        if self.stride is not None and self.stride >= self.seq_len:
            raise SuiteError(f"windows of {self.seq_len:,} tokens overlap only where stride is less", "stride")
        return self


ANSWERED_AT_ONCE = 16
"""Prompts that are answered together. Fixed, for `data.batch_size` must change no number."""
BUILTIN_PROMPTS = "builtin"


def _prompts(text: str) -> str:
    if text not in (BUILTIN_PROMPTS, "data") and not text.startswith("custom:"):
        raise ValueError(f"prompts are builtin, data or custom:FILE.jsonl, not '{text}'")
    return text


class Generation(Strict):
    """Prompts that a model and its reference answer, greedily and each by itself, for the metric `generation`.

    `builtin` ones come with the package: questions, code, JSON, a tool call, other scripts. `data`: the conversations
    of `data.source`. `custom:FILE`: a file of them, a record with `messages`, or with its text. The first `num_prompts`
    count.
    """

    prompts: Annotated[
        PathText, AfterValidator(_prompts), Field(description="builtin, data, or custom:FILE.jsonl of conversations")
    ] = BUILTIN_PROMPTS
    num_prompts: Annotated[int, Field(description="how many prompts are answered", gt=0, le=MOST_SAMPLES)] = 32
    max_new_tokens: Annotated[int, Field(description="the most tokens of an answer", gt=0, le=100_000)] = 128

    def as_data(self, data: Data) -> Data:
        """Return its prompts as data of that many samples. `data`: the suite's own, for `prompts: data`."""
        source = {BUILTIN_PROMPTS: PROMPTS, "data": data.source}.get(self.prompts, self.prompts)
        own = {"source": source, "num_samples": self.num_prompts, "chat_template": True, "answers": None}
        return data.model_copy(update=own) if self.prompts == "data" else Data.model_validate(own)


class Memory(Strict):
    """Where the model runs, and where the part of it goes that doesn't fit there."""

    device: Annotated[str, AfterValidator(_device), Field(description="auto, cpu, cuda, cuda:N, xpu or mps")] = "auto"
    auto_offload: Annotated[bool, Field(description="move what does not fit on the device to offload_device")] = True
    offload_device: Annotated[
        Literal["cpu", "disk"], Field(description="where the rest of the model goes; disk: read block by block")
    ] = "cpu"

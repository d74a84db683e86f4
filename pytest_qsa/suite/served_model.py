"""A served model as the subject of a suite: where it is, and what may be assumed of what it doesn't tell."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Gt, Le
from pydantic import AfterValidator, Discriminator, Field, Tag

from .fields import Strict


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
    """What is known of the tokens that a server doesn't tell: ln q is at least so much."""

    at_least: Annotated[float, Le(0), Field(description="nats, such as -25")]


def _form(value: Any) -> str:
    return "[floor]" if isinstance(value, dict | Floor) else "[word]"


Tail = Annotated[
    Annotated[Literal["unknown", "as_reference"], Tag("[word]")] | Annotated[Floor, Tag("[floor]")],
    Discriminator(_form),
]


class Served(Strict):
    """A model behind an OpenAI-compatible endpoint that tells the logprobs of a prompt. No other address is asked."""

    url: Annotated[str, AfterValidator(_url)]
    model: Annotated[str | None, Field(min_length=1, description="its name there, if there are several")] = None
    api: Literal["vllm", "sglang", "llama.cpp"] = "vllm"
    top_logprobs: Annotated[int, Gt(0), Field(description="tokens told of each position; vLLM: --max-logprobs")] = 20
    timeout: Annotated[float, Gt(0), Field(description="seconds for an answer")] = 120.0
    tokenizer: Annotated[str | None, Field(description="a folder or hub id; default: that of model.reference")] = None
    api_key_env: Annotated[
        str | None, Field(pattern=r"^QSA_[A-Z0-9_]+$", description="the environment variable that holds the key")
    ] = None

    @property
    def root(self) -> str:
        """The address without the `/v1` that OpenAI's clients want."""
        return self.url.rstrip("/").removesuffix("/v1")

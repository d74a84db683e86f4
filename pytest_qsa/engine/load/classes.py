"""The class that a configuration stands for, and an empty model of it: names and shapes, and no weight in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...common import InfraError

OWN_CODE = "has code of its own: set model.trust_remote_code and allow it with --qsa-allow-code"


def wants_code(error: Exception) -> bool:
    """Say whether transformers refused to run the code of a checkpoint; it has no class of error for that."""
    return "trust_remote_code" in str(error)


def fetching_kernels(config: Any) -> list[Any]:
    """Return those of a configuration and its parts that name a repository of the hub, where a kernel is fetched."""
    parts = (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()))
    return [part for part in parts if "/" in str(getattr(part, "_attn_implementation", None) or "")]


def class_of(config: Any, *, remote: bool, gguf: bool) -> Any:
    """Return the class that the configuration names, whatever its task; AutoModel would leave its head out."""
    import transformers

    names = list(getattr(config, "architectures", None) or ())
    auto_map = getattr(config, "auto_map", None) or {}
    # Only transformers' Auto classes read `auto_map`, which leads to the checkpoint's code.
    if remote and auto_map:
        return getattr(transformers, next((name for name in auto_map if name.startswith("AutoModel")), "AutoModel"))
    known = next((name for name in names if hasattr(transformers, name)), None)
    if known:
        return getattr(transformers, known)
    if names and auto_map:
        raise InfraError(f"the checkpoint's class {names[0]} {OWN_CODE}")
    return transformers.AutoModelForCausalLM if gguf else transformers.AutoModel  # a GGUF names no class


def empty_model(config: Any, *, gguf: bool = False) -> nn.Module:
    """Return the model of a configuration on the meta device, where no weight takes memory.

    Raises:
        Exception: whatever the model's class raises of settings that it can't take.
    """
    for part in fetching_kernels(config):  # names and shapes don't depend on it
        part._attn_implementation = "eager"
    kind = class_of(config, remote=False, gguf=gguf)
    make = kind._from_config if hasattr(kind, "_from_config") else kind.from_config  # the latter of an Auto class
    with torch.device("meta"):
        return make(config)  # type: ignore[no-any-return]

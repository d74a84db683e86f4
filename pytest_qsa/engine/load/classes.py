"""The class that a configuration stands for, and an empty model of it: names and shapes, and no weight in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...common import AnomalyError, InfraError, did_you_mean

OWN_CODE = "has code of its own: set model.trust_remote_code and allow it with --qsa-allow-code"


def wants_code(error: Exception) -> bool:
    """Say whether transformers refused to run the code of a checkpoint; it has no class of error for that."""
    return "trust_remote_code" in str(error)


def fetching_kernels(config: Any) -> list[Any]:
    """Return those of a configuration and its parts that name a repository of the hub, where a kernel is fetched."""
    parts = (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()))
    return [part for part in parts if "/" in str(getattr(part, "_attn_implementation", None) or "")]


def class_of(config: Any, *, remote: bool, gguf: bool) -> Any:
    """Return the class that the configuration names, whatever its task; AutoModel would leave its head out.

    Raises:
        AnomalyError: transformers has no class of that name, and the checkpoint has no code of its own.
        InfraError: it has, and that isn't allowed.
    """
    import transformers

    names = list(getattr(config, "architectures", None) or ())
    auto_map = getattr(config, "auto_map", None) or {}
    # Only transformers' Auto classes read `auto_map`, which leads to the checkpoint's code.
    if remote and auto_map:
        return getattr(transformers, next((name for name in auto_map if name.startswith("AutoModel")), "AutoModel"))
    found = (getattr(transformers, name, None) for name in names)
    known = next((kind for kind in found if _loads_a_model(kind)), None)
    if known is not None:
        return known
    if names and auto_map:
        raise InfraError(f"the checkpoint's class {names[0]} {OWN_CODE}")
    if names:
        raise AnomalyError(_unknown_class(config, names))
    return transformers.AutoModelForCausalLM if gguf else transformers.AutoModel  # a GGUF names no class


def _loads_a_model(kind: Any) -> bool:
    # `_backends`: what stands for a class whose libraries aren't installed; it names them when it is used
    return hasattr(kind, "from_pretrained") and any(
        hasattr(kind, name) for name in ("base_model_prefix", "_model_mapping", "_backends")
    )


def _unknown_class(config: Any, names: Sequence[str]) -> str:
    """Say that a configuration names a class which transformers doesn't have, with the nearest of its own family."""
    import transformers
    from transformers.models.auto import modeling_auto

    kind = str(getattr(config, "model_type", ""))
    mappings = (each for key, each in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES"))
    found = (each.get(kind) for each in mappings if isinstance(each, Mapping))
    listed = (name for each in found if each for name in ([each] if isinstance(each, str) else each))
    family = {name for name in listed if not name.endswith("Config")}
    near = did_you_mean(names[0], family) or f"; of {kind} it has {', '.join(sorted(family)[:3]) or 'none'}"
    return (
        f"{getattr(config, 'name_or_path', '')}/config.json: architectures names {names[0]}, a class that transformers "
        f"{transformers.__version__} doesn't have for a model{near}; correct it, or install the version that has it"
    )


def empty_model(config: Any, *, gguf: bool = False, as_loaded: bool = False) -> nn.Module:
    """Return the model of a configuration on the meta device, where no weight takes memory.

    `as_loaded`: with the modules that the loader of a quantized checkpoint replaces or adds.

    Raises:
        Exception: whatever the model's class raises of settings that it can't take.
    """
    for part in fetching_kernels(config):  # names and shapes don't depend on it
        part._attn_implementation = "eager"
    kind = class_of(config, remote=False, gguf=gguf)
    make = kind._from_config if hasattr(kind, "_from_config") else kind.from_config  # the latter of an Auto class
    with torch.device("meta"):
        model: nn.Module = make(config)
        return _with_quantized_modules(model, config) if as_loaded else model


def _with_quantized_modules(model: nn.Module, config: Any) -> nn.Module:
    """Let the quantizer of a configuration prepare an empty model for its tensors, as `from_pretrained` does."""
    from transformers.quantizers.auto import get_hf_quantizer

    quantizer, _, placement = get_hf_quantizer(config, None, None, True, {})  # type: ignore[no-untyped-call]
    if quantizer is not None:
        files = sorted(map(str, Path(config.name_or_path).glob("*.safetensors")))  # some look into their headers
        quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map=placement, checkpoint_files=files)
    return model

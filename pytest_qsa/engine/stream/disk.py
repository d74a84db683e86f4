"""A model whose weights stay on disk: loaded through transformers' own conversion, so that every checkpoint is known.

transformers leaves a parameter in the checkpoint's file where it only renames it, and writes the rest (packed experts)
into a folder of its own; both come with an index, which is all that streaming needs.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from torch import nn

from ...checkpoint import streams_from_disk
from ...common import InfraError, QsaWarning
from ..formats.format import owner_of
from ..modules import blocks_of
from .shards import Shards
from .stream import Stream


def check_format(path: str, config: Any, *, gguf: bool) -> None:
    """Refuse what transformers can't leave on disk.

    Raises:
        InfraError: GGUF, or a quantization other than compressed-tensors.
    """
    settings = getattr(config, "quantization_config", None) or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = getattr(method, "value", method)  # an enum in the library's own configuration
    if gguf or not streams_from_disk(method or ""):
        raise InfraError(
            f"{path} is {'GGUF' if gguf else method}, which transformers can't leave on disk (memory.offload_device: "
            "disk): write offload_device: cpu, or convert it to safetensors in float or compressed-tensors"
        )


def skipping_packed(kind: type[Any]) -> type[Any]:
    """Return the class such that loading doesn't fill quantized weights, which are on disk, with random numbers."""

    class Streamed(kind):  # type: ignore[misc]
        def initialize_weights(self) -> None:
            for module in self.modules():
                if owner_of(module) is not None:
                    module._is_hf_initialized = True
            super().initialize_weights()

    Streamed.__name__, Streamed.__qualname__, Streamed.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Streamed


def stream_of(model: nn.Module, device: torch.device) -> Stream | None:
    """Take a model's weights over from accelerate's hooks; None, with a warning, where it has no blocks to stream."""
    if not blocks_of(model):
        warnings.warn(
            QsaWarning(
                f"{type(model).__name__} has no list of blocks to stream: accelerate offloads it instead, which reads "
                "its weights again for every batch"
            ),
            stacklevel=2,
        )
        return None
    index = _index(model)
    remove_hook_from_module(model, recurse=True)
    for form in {type(form): form for module in model.modules() if (form := owner_of(module))}.values():
        form.prepare_streaming(model)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
    return Stream(model, Shards(index), device)


def _index(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return accelerate's index of what is on disk: parameter → file, name there, dtype."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for single in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            weights = getattr(single, "weights_map", None) if isinstance(single, AlignDevicesHook) else None
            loader = getattr(weights, "dataset", weights)
            index: dict[str, dict[str, str]] = getattr(loader, "index", None) or {}
            if index:
                return dict(index)
    raise InfraError(f"transformers left no index of the weights of {type(model).__name__} that are on disk")

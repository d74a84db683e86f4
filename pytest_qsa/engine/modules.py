"""What the engine has to know of a model's structure: its layers, its blocks, and the tensor of a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_CHANNELS_FIRST = (_ConvNd, _BatchNorm)
_PREFERRED = ("last_hidden_state", "logits", "hidden_states", "inputs_embeds")


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers by name, in model order: every module but the root and the containers."""
    return {name: module for name, module in model.named_modules() if name and not isinstance(module, _CONTAINERS)}


def blocks_of(model: nn.Module) -> list[str]:
    """Return the names of the repeated layers of the trunk: the entries of outermost lists of one class."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or any(name.startswith(f"{b}.") for b in blocks):
            continue
        if len({type(child) for child in module}) == 1 and any(True for _ in module.parameters()):
            blocks += [f"{name}.{index}" for index in range(len(module))]
    return blocks


def tensor_of(value: Any) -> Tensor | None:
    """Return the floating-point tensor that stands for an output: the first one, in tuples, dicts and model outputs."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        ordered: Iterable[Any] = [value[key] for key in _PREFERRED if key in value] + list(value.values())
    elif isinstance(value, (tuple, list)):
        ordered = value
    else:
        return None
    return next((tensor for item in ordered if (tensor := tensor_of(item)) is not None), None)


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the floating-point tensor that stands for an input: the first positional one, else the first keyword."""
    positional = next((item for item in args if isinstance(item, Tensor) and item.is_floating_point()), None)
    if positional is not None:
        return positional
    tensors = {name: item for name, item in kwargs.items() if isinstance(item, Tensor)}
    return tensor_of(tensors)


def channels_first(module: nn.Module) -> bool:
    """Say whether dimension 1 of the module's tensors is its channels, as in convolutions."""
    return isinstance(module, _CHANNELS_FIRST)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that takes the batches: the first one that holds weights."""
    tensors = (tensor for source in (model.parameters(), model.buffers()) for tensor in source)
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))

"""Running a model with hooks at its sites, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...captures import EXPERTS, SiteKey
from ..load.batches import Batch
from ..modules import input_of, packed_experts, routing_of, tensor_of
from .visits import Visits


def run_batch(model: nn.Module, batch: Batch, device: torch.device) -> Any:
    """Run one batch; return what the model returns. What the device is at is not waited for."""
    if isinstance(batch, Tensor):
        return model(batch.to(device, non_blocking=True))
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return model(**{**batch, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()}})


@contextmanager
def hooked(modules: Mapping[str, nn.Module], state: Visits, inputs: frozenset[SiteKey] = frozenset()) -> Iterator[None]:
    """Let `state` see every site that it wants; at the outputs of `inputs`, what went into the layer as well."""
    handles = []
    for layer, site in state.wanted:
        module = modules[layer]
        if site == "input":
            experts = packed_experts(module) if EXPERTS in state.wanted[layer, site] else 0
            handles.append(module.register_forward_pre_hook(_input_hook(state, layer, experts), with_kwargs=True))
        elif (layer, site) in inputs:
            handles.append(module.register_forward_hook(_both_hook(state, layer), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_output_hook(state, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(state: Visits, layer: str, experts: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = routing_of(experts, args, kwargs) if experts else None
        state.visit((layer, "input"), input_of(args, kwargs), routing)

    return hook


def _output_hook(state: Visits, layer: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        state.visit((layer, "output"), tensor_of(output))

    return hook


def _both_hook(state: Visits, layer: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        state.visit((layer, "output"), tensor_of(output), inputs=input_of(args, kwargs))

    return hook


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode and its cache off, and back afterwards."""
    training = {name: module.training for name, module in model.named_modules()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if isinstance(use_cache, bool):
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        if isinstance(use_cache, bool):
            config.use_cache = use_cache  # type: ignore[union-attr]

"""The decode phase: answers that go through a model one token at a time, with its cache, as a server generates them.

What each site sees of all steps is put together and handed to the pass as the tensors of one forward, so that whoever
takes part in it need not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...captures import CACHE_SITES, EXPERTS, Site, SiteKey
from ...common import AnomalyError
from ..load.answers import Steps, greedily
from ..load.batches import Batch
from ..modules import Routing, input_of, packed_experts, routing_of, run_batch, tensor_of
from .kv_cache import watched
from .next_token import logits_of
from .site_statistics import Observe, SiteStatistics, cache_hook


@dataclass
class _Seen:
    """What a site saw in one of its calls, step by step. `before`: the shape of its tensor over the prompt."""

    before: tuple[int, ...] | None = None
    tensors: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    inputs_before: tuple[int, ...] | None = None
    indices: list[Tensor] = field(default_factory=list)
    experts: int = 0


def run_forward(model: nn.Module, batch: Batch, device: torch.device, statistics: SiteStatistics) -> object:
    """Run a batch as `run_batch` does; answers in steps one token at a time. `statistics`: whose hooks see its sites.

    Raises:
        AnomalyError: the model returns no logits, or did not run once for each token.
    """
    if not isinstance(batch, Steps):
        return run_batch(model, batch, device)
    forward, statistics.forward = statistics.forward, None  # the hooks of the pass see nothing of single steps
    try:
        steps = _Recorder(model, statistics)
        logits = steps.run(batch)
    finally:
        statistics.forward = forward
    for (site, _), seen in steps.seen.items():
        if not seen.tensors:  # a call over the prompt alone
            continue
        inputs = [_joined(seen.inputs, seen.inputs_before)] if seen.inputs else []
        routing = Routing(torch.cat(seen.indices), seen.experts) if seen.indices else None
        statistics.hooks[site](_joined(seen.tensors, seen.before), routing, *inputs)
    return {"logits": logits}


class _Recorder:
    """Runs a model through an answer and keeps copies of what its wanted sites see of each token of it."""

    def __init__(self, model: nn.Module, statistics: SiteStatistics) -> None:
        self.model = model
        self.seen: dict[tuple[SiteKey, int], _Seen] = {}
        self._statistics = statistics
        self._calls: dict[SiteKey, int] = {}
        self._logits: list[Tensor] = []
        self._over_prompt = True

    def run(self, batch: Steps) -> Tensor:
        """Return the logits [1, T, V] after each of the T tokens of the answer."""
        answer = batch["input_ids"][0].tolist()
        with self._hooked():
            greedily(self.model, [batch.prompt], None, len(answer) + 1, (), "the decode phase", forced=answer)
        steps = self._logits[1:]  # the first are of the prompt
        if len(steps) != len(answer):
            raise AnomalyError(
                f"{type(self.model).__name__} ran {len(steps)} times for {len(answer)} tokens: it can't be measured "
                "one token at a time"
            )
        return torch.cat(steps, dim=1)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        statistics = self._statistics
        with ExitStack() as exits:
            caching: dict[str, dict[Site, Observe]] = {}
            for layer, at in statistics.wanted:
                module, site = statistics.modules[layer], (layer, at)
                if at in CACHE_SITES:
                    caching.setdefault(layer, {})[at] = partial(self._keep, site)
                    continue
                if at == "input":
                    handle = module.register_forward_pre_hook(self._input_hook(site, module), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(self._output_hook(site), with_kwargs=True)
                exits.callback(handle.remove)
            exits.callback(self.model.register_forward_hook(self._step_hook).remove)
            takes = {layer: cache_hook(statistics, layer, observers) for layer, observers in caching.items()}
            if takes:
                exits.enter_context(watched(statistics.modules, takes))
            yield

    def _step_hook(self, module: nn.Module, args: object, output: object) -> None:
        """Note that the model has read the prompt, or one more token of the answer."""
        self._logits.append(logits_of(output, self.model)[:, -1:].clone())
        self._calls.clear()
        self._over_prompt = False

    def _input_hook(self, site: SiteKey, module: nn.Module) -> Any:
        experts = packed_experts(module) if EXPERTS in self._statistics.wanted[site] else 0

        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            seen = self._note(site, input_of(args, kwargs))
            routing = routing_of(experts, args, kwargs) if experts else None
            if seen is not None and routing is not None and not self._over_prompt:
                seen.indices.append(routing.indices.clone())
                seen.experts = experts

        return hook

    def _output_hook(self, site: SiteKey) -> Any:
        with_inputs = site in self._statistics.input_sites

        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            self._note(site, tensor_of(output), input_of(args, kwargs) if with_inputs else None)

        return hook

    def _keep(self, site: SiteKey, tensor: Tensor) -> None:
        self._note(site, tensor)

    def _note(self, site: SiteKey, tensor: Tensor | None, inputs: Tensor | None = None) -> _Seen | None:
        if tensor is None:
            return None
        call = self._calls.get(site, 0)
        self._calls[site] = call + 1
        seen = self.seen.setdefault((site, call), _Seen())
        if self._over_prompt:
            seen.before = tuple(tensor.shape)
            seen.inputs_before = tuple(inputs.shape) if inputs is not None else None
        else:
            # Copies, for a model may change its tensors in place later on.
            seen.tensors.append(tensor.clone())
            if inputs is not None:
                seen.inputs.append(inputs.clone())
        return seen


def _joined(steps: Sequence[Tensor], before: tuple[int, ...] | None) -> Tensor:
    """Join what a site saw of one token each along its axis of tokens. `before`: the shape over the prompt's tokens."""
    shape = tuple(steps[0].shape)
    # The axis of tokens is the one that had as many entries as the prompt has tokens, and has one now.
    longer = [axis for axis, size in enumerate(shape) if before and len(before) == len(shape) and before[axis] != size]
    axis = longer[0] if len(longer) == 1 else 1 if len(shape) >= 3 else 0
    return torch.cat(list(steps), dim=axis)

"""A model's head: the layer that makes logits of the last hidden states, found, read alone, and run on some tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.functional import linear

from ..captures import SiteKey
from ..common import InfraError
from .formats.format import dequantized

SCALINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""The keys of configurations for scaling a head's output before it is returned (Gemma, Cohere, Granite)."""
PAIRS_AT_ONCE = 4096
"""Rows of a head that are widened to float64 at a time."""


@dataclass(frozen=True)
class Head:
    """The weights [V, H] and perhaps a bias [V]. `scaling`: one of `SCALINGS` with its number, or nothing."""

    weight: Tensor
    bias: Tensor | None
    scaling: Mapping[str, float]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., H], as the model computes them."""
        return self.scaled(linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def logits_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return one logit of each hidden state: of states [N, H] and tokens [N], [N] float64, summed in float64."""
        parts = []
        for start in range(0, len(ids), PAIRS_AT_ONCE):
            rows = slice(start, start + PAIRS_AT_ONCE)
            weight = self.weight.index_select(0, ids[rows]).double()
            found = (hidden[rows].double() * weight).sum(1)
            parts.append(found if self.bias is None else found + self.bias.index_select(0, ids[rows]).double())
        return self.scaled(torch.cat(parts)) if parts else hidden.new_zeros(0, dtype=torch.float64)

    def scaled(self, found: Tensor) -> Tensor:
        """Return the head's output as the model returns it."""
        if cap := self.scaling.get("final_logit_softcapping"):
            found = torch.tanh(found / cap) * cap
        if factor := self.scaling.get("logit_scale"):
            found = found * factor
        if divisor := self.scaling.get("logits_scaling"):
            found = found / divisor
        return found

    def to(self, device: torch.device) -> Head:
        """Return it on a device."""
        return Head(self.weight.to(device), None if self.bias is None else self.bias.to(device), self.scaling)


@dataclass(frozen=True)
class LastHidden:
    """The last hidden states of a batch, [B, T, H], and the head that made logits of them.

    `heads`: that head with each scaling that the model may apply; its logits show which one it does.
    """

    states: Tensor
    heads: Sequence[Head]


def head_of(model: nn.Module) -> str | None:
    """Return the name of the layer whose output is the logits, as transformers' models tell; None where none does."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if getter is not None else None
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(found)) if isinstance(found, nn.Module) else None


def loaded_head(model: nn.Module, name: str, *, stays: bool = False) -> Head:
    """Return the head of a model that is loaded, its weight dequantized. `stays`: it is in memory as long as the model.

    Raises:
        InfraError: it isn't a weight and a bias.
    """
    module = model.get_submodule(name)
    with torch.no_grad(), align_module_device(module):
        weight, bias = dequantized(module), getattr(module, "bias", None)
        if weight is None or weight.dim() != 2:
            raise InfraError(f"{name} has no weight of a row for each token of the vocabulary")
        bias = bias.detach() if isinstance(bias, Tensor) else None
        if stays:
            return Head(weight.detach(), bias, {})
        # Copies: an offloaded weight leaves memory again when the block ends.
        return Head(weight.clone(), None if bias is None else bias.clone(), {})


def scalings_of(model: nn.Module) -> Iterator[dict[str, float]]:
    """Yield the scalings that the head's output may have: none, or those of the configuration."""
    # Whether a model applies what its configuration states shows only when its logits are made again.
    yield {}
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = ((name, getattr(config, name, None)) for name in SCALINGS)
    found = {name: float(value) for name, value in named if isinstance(value, (int, float)) and value}
    if found:
        yield found


class HeadInputs:
    """Keeps what goes into a model's head, forward by forward, for whoever makes some of its logits more exactly.

    `site`: where that is seen; None where the model has no head, or one that is no weight and bias. `stays`: its
    weights are in memory as long as the model.
    """

    def __init__(self, model: nn.Module, *, stays: bool) -> None:
        self._model, self._stays = model, stays
        self._name = head_of(model)
        self._heads: Sequence[Head] | None = None
        self._states: dict[int, Tensor] = {}
        self.site: SiteKey | None = None if self._name is None else (self._name, "input")

    def keep(self, first_sample: int, states: Tensor) -> None:
        """Keep the states of a forward, which its first sample names."""
        self._states[first_sample] = states

    def take(self, first_sample: int) -> LastHidden | None:
        """Return what was kept of a forward, and let go of it; None where there is nothing to make logits of."""
        states = self._states.pop(first_sample, None)
        if states is None or states.dim() != 3 or self._name is None:
            return None
        if self._heads is None:
            # Now, while the weights of a streamed head are still there.
            try:
                head = loaded_head(self._model, self._name, stays=self._stays)
                self._heads = [replace(head, scaling=scaling) for scaling in scalings_of(self._model)]
            except InfraError:
                self._heads = []
        return LastHidden(states, self._heads) if self._heads else None

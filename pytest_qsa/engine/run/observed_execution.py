"""How the quantized modules of a model are run: what their own calls did, not what a configuration says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.functional import linear

from ...captures import ExecutedModules, Execution, SiteKey
from ...common import InfraError
from ...suite import EMULATED, KERNELS, UNPACKED, UNPROVED, WEIGHTS_ONLY
from ..formats.format import bits_of, dequantized, is_quantized, owner_of, schemes_of
from ..modules import input_of, layers_of, tensor_of

TRIES = 2
"""So many calls of a module are looked at, if the first one, all zeros say, tells nothing."""
ROWS = 8
"""So many tokens of a call are multiplied again."""
TOLERANCE: Mapping[torch.dtype, float] = {torch.bfloat16: 4e-3}
"""How far two multiplications by the same weight may differ in a dtype; rounding to 8 bits changes over 0.5 %."""
OTHERWISE = 1e-3


@dataclass
class Witness:
    """Counts the calls of every quantized module, and multiplies a few tokens of its first one again.

    Where a module gives what its inputs times its dequantized weight are, it rounds no inputs; where it gives what its
    rounded inputs would, it does.
    `required`: a forward is to run, even where only weights are measured.
    """

    model: nn.Module
    required: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    rounds: dict[str, bool] = field(default_factory=dict)
    _ran: bool = False
    _unseen: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        schemes = schemes_of(self.model) or {}
        layers = layers_of(self.model)
        self.modules = {name: layer for name, layer in layers.items() if name in schemes or is_quantized(layer)}
        self._schemes = schemes

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every call while it is entered."""
        handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True) for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def ended(self, last: SiteKey | None) -> None:
        """Take note that a forward ran. `last`: the site after which every forward was stopped; None for none."""
        self._ran = True
        if last is not None:
            layer, site = last
            names = list(layers_of(self.model))
            after = names[names.index(layer) :]
            self._unseen = frozenset(n for n in after if not (site == "output" and n.startswith(f"{layer}.")))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            if name in self.rounds or self.calls[name] > TRIES:
                return
            inputs, outputs = input_of(args, kwargs), tensor_of(output)
            if inputs is not None and outputs is not None:
                rounds = rounds_inputs(module, inputs, outputs)
                if rounds is not None:
                    self.rounds[name] = rounds

        return hook

    def execution(self, stored: Sequence[str] = ()) -> Execution:
        """Return what was seen. `stored`: the layers that the checkpoint's files hold quantized."""
        kinds: dict[str, list[str]] = {}
        never = [name for name in self.modules if name not in self.calls and name not in self._unseen]
        for name in self.modules:
            if name in self.calls:
                kinds.setdefault(self._words(name), []).append(name)
        if unpacked := _absent(stored, self.modules):
            kinds[UNPACKED] = unpacked
        return Execution(
            self._ran,
            {words: ExecutedModules(len(names), names[0]) for words, names in kinds.items()},
            idle=tuple(name for name in never if "expert" not in name) if self._ran else (),
            idle_experts=sum("expert" in name for name in never) if self._ran else 0,
        )

    def _words(self, name: str) -> str:
        scheme = self._schemes.get(name)
        weights, activations = bits_of(scheme) if scheme else (None, None)
        kind = f"W{weights}" if weights else "quantized"
        floats = " FP" if scheme and scheme.endswith("_fp") else ""
        rounds = self.rounds.get(name)
        if rounds is None and activations in (None, 16):
            rounds = False
        if rounds is None:
            return f"{kind}A{activations}{floats} {UNPROVED}"
        if not rounds:
            return f"{kind}A16{floats} {WEIGHTS_ONLY}" if weights else WEIGHTS_ONLY
        form = owner_of(self.modules[name])
        how = EMULATED if form and form.emulates(self.modules[name]) else KERNELS
        return f"{kind}A{activations if activations and activations < 16 else '?'}{floats} {how}"


def _absent(stored: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return what is quantized in the files and not in the model; names may differ in their fronts."""
    suffixes = {name[start:] for name in modules for start in _starts(name)}
    return [name for name in stored if not any(name[start:] in suffixes for start in _starts(name)[:3])]


def _starts(name: str) -> list[int]:
    return [0, *(index + 1 for index, character in enumerate(name) if character == ".")]


def rounds_inputs(module: nn.Module, inputs: Tensor, outputs: Tensor) -> bool | None:
    """Say whether a linear module rounded the inputs of a call; None where that can't be told.

    `inputs`: [..., in]; `outputs`: [..., out].
    """
    if "Linear" not in type(module).__name__:
        return None
    try:
        with torch.no_grad(), align_module_device(module):
            weight = dequantized(module)
            if weight is None or weight.shape != (outputs.shape[-1], inputs.shape[-1]):
                return None
            return _compare(module, inputs, outputs.flatten(0, -2), weight.to(inputs.dtype))
    except (InfraError, RuntimeError, NotImplementedError, AttributeError):
        return None


def _compare(module: nn.Module, inputs: Tensor, outputs: Tensor, weight: Tensor) -> bool | None:
    """Compare a call's outputs [rows, out] with those of the inputs [..., in] as they are, and rounded if declared."""
    chosen = torch.linspace(0, len(outputs) - 1, min(ROWS, len(outputs)), device=inputs.device).long()
    bias = getattr(module, "bias", None)

    def distances(x: Tensor) -> Tensor:
        made = linear(x.flatten(0, -2)[chosen], weight, None if bias is None else bias.to(x.dtype)).float()
        far: Tensor = (outputs[chosen].float() - made).norm(dim=1) / made.norm(dim=1)
        return far

    plain = distances(inputs)
    plain = plain[plain.isfinite()]
    if not len(plain):
        return None
    form = owner_of(module)
    rounded_inputs = form.rounded_inputs(module, inputs) if form else None
    if rounded_inputs is not None:
        rounded = distances(rounded_inputs)
        nearer = float(plain.sum() - rounded[rounded.isfinite()].sum())
        return nearer > 0 if nearer else None
    return bool(plain.median() > TOLERANCE.get(inputs.dtype, OTHERWISE))

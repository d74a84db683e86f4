"""The weight of a layer that peft has put an adapter onto: the base's and the delta, where the adapter is a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...common import InfraError

NO_MATRIX = ("MultiheadAttention", "ParamWrapper")
"""peft's LoRA layers whose delta is that of other tensors than their weight."""


def adapted_weight(module: Any, weight_of: Callable[[nn.Module], Tensor | None]) -> Tensor | None:
    """Return the weight by which a layer with an adapter multiplies, in float32 at least; None where it has none.

    W = W₀ + scaling · B · A (Hu et al., arXiv 2106.09685, section 4.1), of all adapters that are active. `weight_of`:
    returns that of a module without an adapter.

    Raises:
        InfraError: it isn't known what the adapter makes of the weight.
    """
    if type(module).__name__ == "ModulesToSaveWrapper":
        saved = [name for name in module.active_adapters if name in module.modules_to_save]
        own = bool(saved) and not module.disable_adapters
        return _in_memory(module.modules_to_save[saved[0]] if own else module.original_module, weight_of)
    kind = adapter_class(module)
    variants = [type(v).__name__ for v in getattr(module, "lora_variant", {}).values()]
    if not kind.startswith("lora.") or type(module).__name__ in NO_MATRIX or variants:
        what = f"{kind}, {variants[0]}" if variants else kind
        raise InfraError(f"its weight has an adapter ({what}), and only a plain LoRA's delta is known here")
    base = _in_memory(module.base_layer, weight_of)
    # a merged adapter is in the base's weight already
    if base is None or module.disable_adapters or module.merged:
        return base
    total = base.to(torch.promote_types(base.dtype, torch.float32))
    for name in module.active_adapters:
        if name in module.scaling:
            total = total + _delta(module, name).to(total)
    return total


def adapter_class(module: nn.Module) -> str:
    """Return the kind and class of a layer of peft: `lora.Linear`."""
    return f"{type(module).__module__.removeprefix('peft.tuners.').partition('.')[0]}.{type(module).__name__}"


def _in_memory(module: nn.Module, weight_of: Callable[[nn.Module], Tensor | None]) -> Tensor | None:
    with align_module_device(module):
        weight = weight_of(module)
        return None if weight is None else weight.clone()  # an offloaded one leaves memory when the block ends


def _delta(module: Any, name: str) -> Tensor:
    """Return an adapter's delta in the shape of the base's weight, in float32 at least."""
    if name in module.lora_embedding_A:
        delta = _product(module.lora_embedding_A[name], module.lora_embedding_B[name], across=True)
        return delta * float(module.scaling[name])
    with ExitStack() as held:
        for factor in (module.lora_A[name], module.lora_B[name]):
            held.enter_context(align_module_device(factor))
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        if a.dim() > 2:  # of a convolution: its kernel is peft's to put together
            kernel: Tensor = module.get_delta_weight(name)
            return kernel
        return _product(a, b, across=bool(module.fan_in_fan_out)) * float(module.scaling[name])


def _product(a: Tensor, b: Tensor, *, across: bool) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    delta = b.to(wide) @ a.to(wide)
    return delta.T if across else delta

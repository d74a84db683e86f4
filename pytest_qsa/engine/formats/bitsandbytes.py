"""bitsandbytes: modules of 8 bits with the scales of their rows, and of 4 bits; the configuration states the scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .format import EngineFormat, scheme_name


class BitsAndBytesModules(EngineFormat):
    """LLM.int8, which rounds inputs too; and the declared scheme of 4 bits, which round none."""

    name = "bitsandbytes"

    def owns(self, module: nn.Module) -> bool:
        """Say whether a module has int8 codes and the scales of their rows."""
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and weight.dtype == torch.int8 and _scales(module) is not None

    def weight(self, module: nn.Module) -> Tensor | None:
        """Multiply codes by the largest |w| of their row, in the order of the library's own operator."""
        codes: Any = module.weight
        scales = _scales(module)
        assert scales is not None
        # Another order would round otherwise than the library does.
        weight: Tensor = codes.detach() * scales.view(-1, 1) * (1 / 127)
        return weight

    def declared_scheme(self, settings: Mapping[str, Any]) -> str | None:
        """Return 8 bits for weights and inputs, or 4-bit floats for weights alone."""
        if settings["quant_method"] != self.name:
            return None
        return scheme_name(8, 8, floats=False) if settings.get("load_in_8bit") else scheme_name(4, 16, floats=True)


class BitsAndBytes4BitModules(EngineFormat):
    """NF4 and FP4, dequantized by the library's own operator."""

    name = "bitsandbytes_4bit"

    def owns(self, module: nn.Module) -> bool:
        """Say whether a module's weight has the state of 4-bit codes."""
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        return getattr(state, "quant_type", None) in ("nf4", "fp4")

    def weight(self, module: nn.Module) -> Tensor | None:
        """Dequantize a module's weight [out, in], in the dtype of its state."""
        from bitsandbytes import functional

        packed: Any = module.weight
        codes, state = packed.data, packed.quant_state
        # on a CPU with AVX512-BF16 the first forward moves the codes into an order of its own
        if getattr(state, "packing_format_for_cpu", False):
            codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        weight: Tensor = functional.dequantize_4bit(codes, state)
        return weight


def _scales(module: nn.Module) -> Tensor | None:
    """Return the scales of the rows, which the first forward moves from the weight to the module's state."""
    holders = (getattr(module, "weight", None), getattr(module, "state", None))
    return next((scales for holder in holders if isinstance(scales := getattr(holder, "SCB", None), Tensor)), None)

"""bitsandbytes: modules of 8 bits with the scales of their rows, and of 4 bits; the configuration states the scheme."""

from __future__ import annotations

import copy
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
        """Dequantize a module's weight [out, in], in the dtype of its state.

        On a CPU with AVX512-BF16 the first forward moves the codes into an order of its own, and rounds the scales to
        bfloat16: from then on the weight is that of the rounded scales, at most 2⁻⁹ away.
        """
        from bitsandbytes import functional

        packed: Any = module.weight
        codes, state = packed.data, packed.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            codes, state = _in_order(codes, state)
        weight: Tensor = functional.dequantize_4bit(codes, state)
        return weight


def _in_order(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return the bytes of a weight and its state as they were before the forward of a CPU moved them.

    Moved, a byte holds the codes of two rows that are 16 apart, [out / 32, in / 2, 16 rows, 2 columns], and the scales
    stand in columns, [in / block, out]. The library's own inverse changes the state that the next forward uses, and
    leaves the scales as they are.
    """
    out, columns = state.shape
    tiles = packed.view(torch.uint8).view(out // 32, columns // 2, 16, 2)
    halves = torch.stack([tiles & 15, tiles >> 4])
    codes = halves.permute(1, 0, 3, 2, 4).reshape(-1, 2)
    own = copy.copy(state)
    own.absmax, own.packing_format_for_cpu = state.absmax.float().T.contiguous().flatten(), False
    return codes[:, :1] << 4 | codes[:, 1:], own


def _scales(module: nn.Module) -> Tensor | None:
    """Return the scales of the rows, which the first forward moves from the weight to the module's state."""
    holders = (getattr(module, "weight", None), getattr(module, "state", None))
    return next((scales for holder in holders if isinstance(scales := getattr(holder, "SCB", None), Tensor)), None)

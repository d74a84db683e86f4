"""Quark: modules of its own, each with a quantizer for its weight and one for its inputs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from .format import EngineFormat, scheme_name


class QuarkModules(EngineFormat):
    """Dequantized by the library's own quantizers; inputs are rounded in floats, in the forward of the module."""

    name = "quark"

    def owns(self, module: nn.Module) -> bool:
        """Say whether a module is the library's own, with a quantizer for its weight."""
        own = type(module).__module__.partition(".")[0] == "quark"
        return own and getattr(module, "weight_quantizer", None) is not None

    def weight(self, module: nn.Module) -> Tensor | None:
        """Dequantize the weight, as the forward does."""
        own: Any = module
        with torch.no_grad():
            weight: Tensor = own.weight_quantizer(own.weight)
        return weight.detach()

    def scheme(self, module: nn.Module) -> str | None:
        """Read the types that the library leaves on a module; None for those of two stages."""
        settings: Any = getattr(module, "_quant_config", None)
        weight = _type(getattr(settings, "weight", None))
        inputs = _type(getattr(settings, "input_tensors", None))
        bits = [int(found[1]) if (found := re.search(r"(\d+)", kind)) else 16 for kind in (weight, inputs)]
        return scheme_name(*bits, floats=weight.startswith("fp")) if bits[0] < 16 else None

    def emulates(self, module: nn.Module) -> bool:
        """Say yes: the library rounds to the grid and multiplies as floats, on any device."""
        return True

    def rounded_inputs(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """Round inputs as the module's forward does."""
        quantizer: Any = getattr(module, "input_quantizer", None)
        if quantizer is None:
            return None
        rounded: Tensor = quantizer(inputs)
        return rounded


def _type(spec: Any) -> str:
    """Return the name of a type in Quark's settings, `uint4`; empty where nothing is rounded."""
    dtype = getattr(spec, "dtype", None)
    return str(getattr(dtype, "value", dtype) or "")

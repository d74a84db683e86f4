"""torchao: plain modules whose weight is a tensor subclass that dequantizes itself."""

from __future__ import annotations

import json
import re
from typing import Any

from torch import Tensor, nn

from ...checkpoint import Format
from .format import EngineFormat, read_layer, read_metadata, scheme_name


class TorchAoModules(EngineFormat):
    """The subclass knows its codes, scales and zero points; its own `dequantize()` is what its kernels compute with."""

    name = "torchao"

    def owns(self, module: nn.Module) -> bool:
        """Say whether a module's weight is a tensor subclass of the library.

        A `dequantize` method proves nothing: every tensor has one, and that of bitsandbytes' 4 bits returns bytes.
        """
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and type(weight).__module__.partition(".")[0] == "torchao"

    def weight(self, module: nn.Module) -> Tensor | None:
        """Dequantize the weight, as the inputs are multiplied by it."""
        return _dequantized(module.weight)

    def scheme(self, module: nn.Module) -> str | None:
        """Read the scheme off a tensor: its dtype or that which its class is named by, and what it rounds inputs to."""
        weight: Any = module.weight
        dtypes = (getattr(weight, name, None) for name in ("target_dtype", "elem_dtype"))
        number = _number(next((str(dtype) for dtype in dtypes if dtype), type(weight).__name__))
        return scheme_name(number[0], _inputs_of(weight)[0], floats=number[1]) if number else None

    def emulates(self, module: nn.Module) -> bool:
        """Say whether the codes lie unpacked: then there are no kernels for them, and the product is of floats."""
        return "Unpacked" in type(module.weight).__name__

    def rounds_to_floats(self, module: nn.Module) -> bool:
        """Read the type of inputs off a tensor."""
        bits, floats = _inputs_of(module.weight)
        return bits < 16 and floats

    def stored_weight(self, stored: Format, layer: str) -> Tensor | None:
        """Put a tensor together again by the metadata of its file, and dequantize it."""
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        codes = stored.codes_of(layer)
        if codes is None:
            return None
        name = f"{layer}.weight"
        # The function rebuilds every tensor that the metadata lists, but only this layer's parts are read.
        own = {key: value for key, value in read_metadata(codes).items() if key == name}
        tensors = {f"{layer}.{part}": tensor for part, tensor in read_layer(stored, layer).items()}
        made: Any = unflatten_tensor_state_dict(tensors, {**own, "tensor_names": json.dumps(list(own))})
        # Some versions also return the tensors that they left over.
        made = made[0] if isinstance(made, tuple) else made
        return _dequantized(made[name])


def _number(name: str) -> tuple[int, bool] | None:
    """Return the bits that a dtype or a class is named by, and whether they are a float's: NVFP4Tensor, torch.int4."""
    found = re.search(r"(int|float|fp|nf)(\d+)", name, re.IGNORECASE)
    return (int(found[2]), found[1].lower() != "int") if found else None


def _inputs_of(weight: Any) -> tuple[int, bool]:
    """Return the bits to which a tensor subclass rounds inputs, 16 if it rounds none, and whether they are floats."""
    rounded = getattr(weight, "act_quant_kwargs", None)
    stated = (
        getattr(weight, "activation_quantization", None),
        getattr(rounded, "elem_dtype", None),
        type(rounded).__name__ if rounded is not None else None,
        getattr(weight, "activation_dtype", None),
    )
    return next((number for each in stated if each and (number := _number(str(each)))), (16, True))


def _dequantized(stored: Any) -> Tensor:
    """Dequantize a tensor subclass, and scale its columns by what its kernels multiply the inputs by (SmoothQuant)."""
    weight: Tensor = stored.dequantize()
    scale: Tensor | None = getattr(stored, "act_pre_scale", None)
    return weight if scale is None else weight * scale

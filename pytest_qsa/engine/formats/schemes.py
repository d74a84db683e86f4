"""How the layers of a loaded model are quantized, as its quantizer left them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..modules import layers_of


def schemes_of(model: nn.Module) -> dict[str, str] | None:
    """Return quantized layer → scheme, `w<bits of weights>a<bits of activations>_<int or fp>`, in model order.

    None where the checkpoint is quantized in a way that can't be told from the model.
    """
    stated = getattr(getattr(model, "config", None), "quantization_config", None)
    settings = stated if isinstance(stated, dict) else stated.to_dict() if stated is not None else {}
    layers = layers_of(model)
    own = {name: scheme for name, layer in layers.items() if (scheme := _own_scheme(layer)) is not None}
    if own or not settings:
        return own
    scheme = _whole(settings)
    return None if scheme is None else {name: scheme for name, layer in layers.items() if _replaced(layer)}


def bits_of(scheme: str) -> tuple[int, int]:
    """Return the bits of the weights and of the activations of a scheme."""
    weights, activations = re.findall(r"\d+", scheme)[:2]
    return int(weights), int(activations)


def keeps_codes(layer: nn.Module) -> bool:
    """Say whether a layer's own weight is kept in codes: it dequantizes itself, or has a byte an element."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return _dequantizes_itself(weight) or (weight.is_floating_point() and weight.dtype.itemsize == 1)


def _dequantizes_itself(weight: Any) -> bool:
    return type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "dequantize")


def _own_scheme(layer: nn.Module) -> str | None:
    return _compressed(layer) or _torchao(getattr(layer, "weight", None))


def _torchao(weight: Any) -> str | None:
    """Read the scheme off a tensor of torchao that says its own."""
    target = str(getattr(weight, "target_dtype", ""))
    if not _dequantizes_itself(weight) or not re.search(r"\d+$", target):
        return None
    inputs = getattr(weight, "activation_quantization", None)
    return _name(int(re.findall(r"\d+", target)[-1]), 8 if inputs else 16, floats="float" in target)


def _compressed(layer: nn.Module) -> str | None:
    """Read the scheme that compressed-tensors leaves on a layer."""
    scheme = getattr(layer, "quantization_scheme", None)
    weights, inputs = getattr(scheme, "weights", None), getattr(scheme, "input_activations", None)
    if weights is None:
        return None
    return _name(weights.num_bits, inputs.num_bits if inputs else 16, floats=str(weights.type).endswith("float"))


def _whole(settings: Mapping[str, Any]) -> str | None:
    """Read the one scheme of a quantizer that puts its own class in the place of every layer that it quantizes."""
    method = str(settings.get("quant_method", "")).lower()
    if method in ("gptq", "awq"):
        return _name(int(settings.get("bits") or 4), 16, floats=False)
    if method in ("fp8", "fbgemm_fp8", "finegrained_fp8"):
        return _name(8, 8, floats=True)
    if method == "bitsandbytes":
        if settings.get("load_in_8bit"):
            return _name(8, 8, floats=False)
        return _name(4, 16, floats=True)
    return None


def _replaced(layer: nn.Module) -> bool:
    return type(layer) is not nn.Linear and "Linear" in type(layer).__name__


def _name(weights: int, activations: int, *, floats: bool) -> str:
    return f"w{weights}a{activations}_{'fp' if floats else 'int'}"

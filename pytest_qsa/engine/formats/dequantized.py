"""The weight that a module multiplies by, in floating point, however its quantizer keeps it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...common import InfraError


def dequantized(module: nn.Module) -> Tensor | None:
    """Return a module's own weight as its forward uses it, a plain float tensor; None where it has none.

    compressed-tensors (packed, 8-bit, or rounded in the forward), tensor subclasses that can be dequantized (torchao),
    block-wise FP8, and plain weights, those that transformers has unpacked from a GGUF file with them. The module stays
    as it was; an offloaded weight must have been brought in.

    Raises:
        InfraError: it is kept in a format that is not known.
    """
    if getattr(module, "quantization_scheme", None) is not None:
        return _compressed_tensors(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
        weight = weight.dequantize()
    scale = getattr(module, "weight_scale_inv", None)
    if isinstance(scale, Tensor) and weight.dtype.itemsize == 1:
        return _scaled(weight.detach(), scale.detach())
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        raise InfraError(
            f"a weight of {type(module).__name__} is kept as {str(weight.dtype).removeprefix('torch.')} in a format "
            "that can't be dequantized here: leave its layers out of site: weight, or load the checkpoint dequantized"
        )
    return weight.detach()


def _compressed_tensors(module: nn.Module) -> Tensor | None:
    """Decompress a module of compressed-tensors, or round a weight as its forward will."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    scheme: Any = module.quantization_scheme
    status: Any = getattr(module, "quantization_status", None)
    with torch.no_grad():
        if status == QuantizationStatus.COMPRESSED:
            form = scheme.format or infer_module_format(type(module), scheme)
            own = {**module._parameters, **module._buffers}
            held = {name: tensor.detach() for name, tensor in own.items() if tensor is not None}
            compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
            weight: Tensor | None = compressor.decompress(held, scheme).get("weight")
            return weight
        weight = getattr(module, "weight", None)
        if weight is None or scheme.weights is None or status is None or status > QuantizationStatus.COMPRESSED:
            return None if weight is None else weight.detach()
        rounded: Tensor = forward_quantize(module, weight.detach(), "weight", scheme.weights)
        return rounded


def _scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """Multiply FP8 codes [rows, columns] by their scales [row blocks, column blocks], or by one."""
    values = codes.float()
    if scale.dim() == 2:
        for axis in (0, 1):
            block = -(-codes.shape[axis] // scale.shape[axis])
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, codes.shape[axis])
    return values * scale.float()

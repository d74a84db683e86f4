"""compressed-tensors: modules with a `quantization_scheme`, packed until their first forward."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import Format, matches
from .format import EngineFormat, read_layer, scheme_name


class CompressedTensorsModules(EngineFormat):
    """Decompressed by the library's own compressors; inputs are rounded in the forward of the module."""

    name = "compressed-tensors"

    def owns(self, module: nn.Module) -> bool:
        """Say whether a module has a scheme for its weight; attention modules have one for their KV cache alone."""
        return getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None

    def weight(self, module: nn.Module) -> Tensor | None:
        """Decompress a module's weight, or round it as the forward will."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import QuantizationStatus
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize

        scheme: Any = module.quantization_scheme
        status: Any = getattr(module, "quantization_status", None)
        with torch.no_grad():
            if status == QuantizationStatus.COMPRESSED:
                form = scheme.format or infer_module_format(type(module), scheme)
                # The codes, scales and zero points of a packed module may be parameters or buffers.
                own = {**module._parameters, **module._buffers}
                tensors = {name: tensor.detach() for name, tensor in own.items() if tensor is not None}
                compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
                weight: Tensor | None = compressor.decompress(tensors, scheme).get("weight")
                return weight
            weight = getattr(module, "weight", None)
            # A decompressed module multiplies by its weight as it is; before that stage its forward rounds
            # the weight.
            if weight is None or status is None or status > QuantizationStatus.COMPRESSED:
                return weight
            rounded: Tensor = forward_quantize(module, weight.detach(), "weight", scheme.weights)
            return rounded

    def scheme(self, module: nn.Module) -> str | None:
        """Read the scheme that the library leaves on a module."""
        scheme: Any = module.quantization_scheme
        weights, inputs = scheme.weights, scheme.input_activations
        floats = str(weights.type).endswith("float")
        return scheme_name(weights.num_bits, inputs.num_bits if inputs else 16, floats=floats)

    def emulates(self, module: nn.Module) -> bool:
        """Say yes: the library rounds to the grid and multiplies as floats, on any device."""
        return True

    def rounds_to_floats(self, module: nn.Module) -> bool:
        """Read the type of inputs off the scheme."""
        inputs: Any = getattr(module.quantization_scheme, "input_activations", None)
        return inputs is not None and str(inputs.type).endswith("float")

    def rounded_inputs(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """Round inputs as the module's forward does."""
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize

        scheme: Any = module.quantization_scheme
        if scheme.input_activations is None:
            return None
        rounded: Tensor = forward_quantize(module, inputs, "input", scheme.input_activations)
        return rounded

    def prepare_streaming(self, model: nn.Module) -> None:
        """Remove the hook that would decompress the whole model at its first forward."""
        hook: Any = getattr(model, "ct_decompress_hook", None)
        if hook is not None:
            hook.remove()

    def unpack(self, module: nn.Module) -> None:
        """Decompress a module, as the library's hook does for a whole model."""
        from compressed_tensors.compressors import decompress_module
        from compressed_tensors.quantization import QuantizationStatus

        if module.quantization_status == QuantizationStatus.COMPRESSED:
            with torch.no_grad():
                decompress_module(module)

    def stored_weight(self, stored: Format, layer: str) -> Tensor | None:
        """Decompress a layer of the files by the scheme of its config group."""
        from compressed_tensors.compressors import BaseCompressor

        config = _config(stored)
        groups = config.config_groups.values()
        scheme = next((s for s in groups if any(t == "Linear" or matches(layer, t) for t in s.targets)), None)
        if scheme is None:
            return None
        form = scheme.format or config.format
        compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
        weight: Tensor = compressor.decompress(read_layer(stored, layer), scheme)["weight"]
        return weight


@lru_cache(maxsize=4)
def _config(stored: Format) -> Any:
    from compressed_tensors.quantization import QuantizationConfig

    # transformers writes keys of its own, which the library tolerates only for now.
    known = QuantizationConfig.model_fields
    return QuantizationConfig.model_validate(
        {key: value for key, value in stored.folder.quantization.items() if key in known}
    )

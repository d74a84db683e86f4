"""Fine-grained FP8: a float8 weight with a scale a block, where transformers keeps it so; without a GPU it unpacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...common import InfraError
from .format import EngineFormat, scheme_name


class Fp8Modules(EngineFormat):
    """`weight` in float8 times `weight_scale_inv`."""

    name = "fp8"

    def owns(self, module: nn.Module) -> bool:
        """Say whether a module has codes of a byte and the scales of their blocks."""
        weight, scale = getattr(module, "weight", None), getattr(module, "weight_scale_inv", None)
        return isinstance(weight, Tensor) and isinstance(scale, Tensor) and weight.dtype.itemsize == 1

    def weight(self, module: nn.Module) -> Tensor | None:
        """Multiply codes [out, in] by their scales [row blocks, column blocks], or by one.

        Raises:
            InfraError: the scales don't divide the weight evenly, and the module doesn't say its block size.
        """
        codes: Any = module.weight
        scale: Any = module.weight_scale_inv
        codes, scale = codes.detach(), scale.detach()
        if scale.dim() == 2:
            for axis, stated in enumerate(getattr(module, "block_size", None) or (None, None)):
                length, count = codes.shape[axis], scale.shape[axis]
                block = length // count if stated is None or count in (1, length) else stated
                # Of 576 rows 5 blocks are 128 rows each and a last one of 64: dividing the lengths would make it 116.
                if block < 1 or -(-length // block) != count:
                    kind = type(module).__name__
                    raise InfraError(f"{kind} has {count} scales for {length} weights, and no block size that fits")
                scale = scale.repeat_interleave(block, axis).narrow(axis, 0, length)
        weight: Tensor = codes.float() * scale.float()
        return weight

    def declared_scheme(self, settings: Mapping[str, Any]) -> str | None:
        """Return 8 bits for weights and inputs."""
        known = settings["quant_method"] in ("fp8", "fbgemm_fp8", "finegrained_fp8")
        return scheme_name(8, 8, floats=True) if known else None

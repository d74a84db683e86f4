"""Fine-grained FP8, as DeepSeek and Qwen release it: a scale a block of 128 × 128 weights."""

from __future__ import annotations

import re
from functools import cached_property

from ..tensors import EIGHT_BITS, Tensor
from .format import Format, Matrix, decoded_rows, spread_scales
from .scheme import Declaration, LayerScheme, block_of


class Fp8(Format):
    """`weight` in FP8 times `weight_scale_inv` (which multiplies, its name notwithstanding) or `weight_scale`."""

    name = "fp8"
    codes = ("weight",)

    @cached_property
    def declaration(self) -> Declaration:
        """Every linear layer but the head and `modules_to_not_convert`."""
        config = self.folder.quantization
        required: list[tuple[str, ...]] = [("weight",), ("weight_scale_inv", "weight_scale")]
        if config.get("activation_scheme") == "static":
            required.append(("input_scale", "activation_scale"))
        block = block_of(config.get("weight_block_size"))
        allowed = frozenset({"bias", "input_scale", "k_scale", "v_scale"})
        strategy = "block" if block else "any"
        scheme = LayerScheme(self.name, 8, strategy, block, tuple(required), allowed, EIGHT_BITS)
        skipped = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
        ignore = ["lm_head", *(f"re:.*{re.escape(name)}" for name in skipped)]
        return Declaration([(["Linear"], scheme)], ignore, names_layers=True)

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Multiply codes by the scale of their block."""
        parts = self.parts(layer)
        scale = parts.get("weight_scale") or parts.get("weight_scale_inv")
        if scale is None or codes.dtype not in EIGHT_BITS:
            return None
        values = decoded_rows(codes, rows)
        return values * spread_scales(scale, (codes.shape[0], values.shape[1]), rows)

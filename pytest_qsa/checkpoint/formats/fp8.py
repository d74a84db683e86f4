"""Fine-grained FP8, as DeepSeek, Qwen and Mistral release it: a scale a block of 128 × 128 weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from ..folder import Finding, Folder
from ..tensors import EIGHT_BITS, Matrix, Tensor, decoded_rows, scale_values, spread_scales
from .format import AGAIN, Format
from .gptq import borrowed_layout
from .scheme import Declaration, LayerScheme, block_of

SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""The names of a weight's scales; transformers renames the last two, of DeepSeek and of Mistral, to the first."""
DEFAULT_BLOCK = (128, 128)
"""The rows and columns of a block where the configuration names none, as transformers takes it."""
INPUT_SCALES = ("input_scale", "activation_scale", "qscale_act")


class Fp8(Format):
    """`weight` in FP8 times `weight_scale_inv` (which multiplies, its name notwithstanding) or another of `SCALES`."""

    name = "fp8"
    libraries = ("kernels", "triton")
    gpu_only = True
    codes = ("weight",)
    scales = re.compile(rf"{Format.scales.pattern}|^qscale_(weight|act)$")

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize microscaling's variant, which transformers reads by the same class, and AutoRound's files."""
        return folder.quantization.get("quant_method") in (cls.name, "mxfp8") or borrowed_layout(folder) == "fp8"

    @cached_property
    def declaration(self) -> Declaration:
        """Every linear layer but the head and `modules_to_not_convert`."""
        config = self.folder.quantization
        required: list[tuple[str, ...]] = [("weight",), SCALES]
        if config.get("activation_scheme") == "static":
            required.append(INPUT_SCALES)
        block = block_of(config.get("weight_block_size"))
        allowed = frozenset({"bias", *INPUT_SCALES, "k_scale", "v_scale"})
        strategy = "block" if block else "any"
        scheme = LayerScheme(self.name, 8, strategy, block, tuple(required), allowed, EIGHT_BITS)
        skipped = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
        ignore = ["lm_head", *(f"re:.*{re.escape(name)}" for name in skipped)]
        return Declaration([(["Linear"], scheme)], ignore, names_layers=True)

    def scales_of(self, layer: str) -> dict[str, Tensor]:
        """Return the scales of a layer; `scale` alone, beside no codes, is the weight of some norms."""
        found = {part: tensor for part, tensor in self.parts(layer).items() if self.scales.search(part)}
        if self.codes_of(layer) is None:
            found.pop("scale", None)
        return found

    def weight_scale_of(self, layer: str) -> Tensor | None:
        """Return the scales of a layer's weight under whichever of their names."""
        found = self.scales_of(layer)
        return next((found[part] for part in SCALES if part in found), None)

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Multiply codes by the scale of their block."""
        scale = self.weight_scale_of(layer)
        if scale is None or codes.dtype not in EIGHT_BITS:
            return None
        values = decoded_rows(codes, rows)
        block = block_of(self.folder.quantization.get("weight_block_size")) or DEFAULT_BLOCK
        return values * spread_scales(scale, (codes.shape[0], values.shape[1]), rows, block)

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield also scales that are no powers of two, where the configuration declares exponents (`ue8m0`)."""
        yield from super().findings(layer)
        scale = self.weight_scale_of(layer)
        if scale is None or self.folder.quantization.get("scale_fmt") != "ue8m0":
            return
        values = scale_values(scale)
        values = values[np.isfinite(values) & (values > 0)]  # the others are reported as unsound
        count = int(np.count_nonzero(np.frexp(values)[0] != 0.5))
        if count:
            what = f"{count} of {values.size} are no powers of two, though scale_fmt is ue8m0"
            yield Finding.at(scale, what, AGAIN)

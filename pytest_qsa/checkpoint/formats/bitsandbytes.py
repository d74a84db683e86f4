"""bitsandbytes in 8 bits (LLM.int8): a code a byte, and the largest |w| of every row."""

from __future__ import annotations

import re
from functools import cached_property

import numpy as np

from ..folder import Folder
from ..tensors import Matrix, Tensor, decoded_rows, spread_scales
from .format import Format
from .scheme import Declaration, LayerScheme


class BitsAndBytes(Format):
    """w = `weight` · `SCB` / 127 (Dettmers et al., arXiv 2208.07339, eq. 3)."""

    name = "bitsandbytes"
    libraries = ("bitsandbytes",)
    codes = ("weight",)
    scales = re.compile(r"^SCB$")

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Say whether the configuration declares 8 bits; 4 bits are packed otherwise."""
        return super().declared_in(folder) and bool(folder.quantization.get("load_in_8bit"))

    @cached_property
    def declaration(self) -> Declaration:
        """Every linear layer but the head, which its loader keeps in floats without naming it, and those skipped."""
        scheme = LayerScheme("int8", 8, "channel", None, (("weight",), ("SCB",)), frozenset({"bias"}), ("I8",))
        skipped = self.folder.quantization.get("llm_int8_skip_modules") or ("lm_head",)
        return Declaration([(["Linear"], scheme)], [f"re:.*{re.escape(name)}" for name in skipped])

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Multiply codes by the largest |w| of their row, which is the code 127."""
        scale = self.parts(layer).get("SCB")
        if scale is None or codes.dtype != "I8":
            return None
        # float32, as the library computes it: c · (s / 127) differs from (c · s) / 127 in the last bit
        values = decoded_rows(codes, rows)
        weight = (values * spread_scales(scale, (codes.shape[0], values.shape[1]), rows)).astype(np.float32)
        return (weight * np.float32(1 / 127)).astype(np.float64)

"""torchao as transformers saves it: the parts of each tensor subclass under names of their own."""

from __future__ import annotations

from ..tensors import Tensor
from .format import Format, Matrix, decoded_rows, spread, spread_scales


class TorchAo(Format):
    """(`_weight_qdata` − `_weight_zero_point`) × `_weight_scale`, one code a byte.

    Its configuration doesn't say which layers are quantized, so that they are compared with their siblings.
    """

    name = "torchao"
    libraries = ("torchao",)
    codes = ("_weight_qdata", "weight")

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Multiply codes, less their zero points, by scales."""
        parts = self.parts(layer)
        scale, zero_point = parts.get("_weight_scale"), parts.get("_weight_zero_point")
        if scale is None:
            return None
        values = decoded_rows(codes, rows)
        shape = (codes.shape[0], values.shape[1])
        if zero_point is not None:
            values = values - spread(zero_point.values(), shape, rows)
        return values * spread_scales(scale, shape, rows)

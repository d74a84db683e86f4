"""Rows of a layer's weight out of the files, in float64: codes × scales. numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..folder import Folder
from ..tensors import FLOATS, Tensor, decoded
from .declared import codes_of, declared

ZERO_POINTS = {"weight_scale": "weight_zero_point", "_weight_scale": "_weight_zero_point"}
Matrix = NDArray[np.float64]


def weight_rows(folder: Folder, layer: str, rows: slice) -> Matrix | None:
    """Return some rows of a layer's weight [rows, in], dequantized; None for a packing that isn't known here.

    compressed-tensors (8 bits, and packed with symmetric scales), torchao's integers, FP8 by block, and plain floats.
    """
    parts = folder.layers[layer]
    codes = codes_of(parts)
    if codes is None:
        plain = parts.get("weight")
        return _decoded(plain, rows) if plain is not None and plain.dtype in FLOATS else None
    name = next((part for part in ("weight_scale", "_weight_scale", "weight_scale_inv") if part in parts), None)
    if name is None or codes.part == "qweight" or "weight_global_scale" in parts:
        return None
    values = _unpacked(folder, layer, codes, rows) if codes.part == "weight_packed" else _decoded(codes, rows)
    zero_point = parts.get(ZERO_POINTS.get(name, ""))
    if values is None or (zero_point is not None and codes.part == "weight_packed"):
        return None
    count = codes.shape[0]
    if zero_point is not None:
        values = values - _spread(zero_point, count, rows, values.shape[1])
    return values * _spread(parts[name], count, rows, values.shape[1])


def _decoded(tensor: Tensor, rows: slice) -> Matrix:
    return decoded(np.asarray(tensor.raw()[rows]), tensor.dtype).astype(np.float64)


def _unpacked(folder: Folder, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
    """Unpack words of compressed-tensors: the first code in the lowest bits, with half of the range added."""
    scheme = declared(folder).of(layer)
    if scheme is None or codes.dtype != "I32" or 32 % scheme.bits:
        return None
    words = np.asarray(codes.raw()[rows]).view(np.uint32)
    shifts = np.arange(0, 32, scheme.bits, dtype=np.uint32)
    numbers = (words[:, :, None] >> shifts) & np.uint32((1 << scheme.bits) - 1)
    return numbers.reshape(len(words), -1).astype(np.float64) - (1 << (scheme.bits - 1))


def _spread(scale: Tensor, count: int, rows: slice, columns: int) -> Matrix:
    """Return the scale of each element of some rows: scales are one, one a row, or one a block of rows and columns."""
    values = scale.values()
    table = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)
    down = np.repeat(table, -(-count // len(table)), axis=0)[:count][rows]
    spread: Matrix = np.repeat(down, -(-columns // table.shape[1]), axis=1)[:, :columns]
    return spread


def weight_columns(parts: Mapping[str, Tensor]) -> int | None:
    """Return how many inputs a layer's matrix has; None where it has none, or its packing isn't known."""
    tensor = codes_of(parts) or parts.get("weight")
    if tensor is None or len(tensor.shape) != 2:
        return None
    if tensor.part == "weight_packed" and "weight_shape" in parts:
        return int(parts["weight_shape"].values().ravel()[-1])
    return tensor.shape[1] if tensor.part != "qweight" else None

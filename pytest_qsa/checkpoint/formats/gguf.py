"""GGUF: quantized blocks of a tensor with their scales inside them, under llama.cpp's names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ..folder import Finding, Folder
from ..tensors import Tensor
from .format import AGAIN, Format, Matrix

BLOCKS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "Q4_0": (18, (0,)),
    "Q4_1": (20, (0, 2)),
    "Q5_0": (22, (0,)),
    "Q5_1": (24, (0, 2)),
    "Q8_0": (34, (0,)),
    "Q2_K": (84, (80, 82)),
    "Q3_K": (110, (108,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
}
"""The quantized types → the bytes of a block, and the offsets of its float16 scales and minima (ggml-common.h)."""
HEAD_COUNTS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


class Gguf(Format):
    """One GGUF file (`model.gguf_file`). It declares no layers to quantize: each tensor has the type that it has."""

    name = "gguf"
    libraries = ("gguf",)
    uniform = False
    codes = ("weight",)

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Say whether the folder is read as a GGUF file."""
        return folder.gguf_file is not None

    @property
    def label(self) -> str:
        """The name of the format as people write it."""
        return "GGUF"

    def layers_of(self, modules: Collection[str]) -> dict[str, str]:
        """Return module → tensor by the name map of the file's architecture."""
        import gguf

        arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}.get(self.folder.architecture)
        if arch is None:
            return {name: name for name in modules}
        known = gguf.get_tensor_name_map(arch, int(self.folder.config.get("num_hidden_layers") or 0))
        return {name: str(known.get_name(name) or name) for name in modules}

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Dequantize a tensor by the package gguf, its rows in the order of transformers."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        content = _bytes_of(codes).reshape(*codes.shape[:-1], -1)
        try:
            weight = dequantize(content, GGMLQuantizationType[codes.dtype]).reshape(codes.shape)
        except NotImplementedError:  # a type that the installed gguf can name and not read
            return None
        heads = HEAD_COUNTS.get(layer.rpartition(".")[2])
        if heads is not None and self.folder.architecture == "llama":
            # llama.cpp's converter interleaves the two halves of every head of llama's q and k, for its rotary kernel
            count = int(self.folder.config.get(heads) or self.folder.config["num_attention_heads"])
            halves = weight.reshape(count, len(weight) // count // 2, 2, -1)
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        return np.asarray(weight[rows], dtype=np.float64)

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield tensors with blocks whose scale is NaN or infinite."""
        yield from super().findings(layer)
        for tensor in self.parts(layer).values():
            scales = block_scales(tensor)
            bad = 0 if scales is None else int(np.count_nonzero(~np.isfinite(scales).all(axis=1)))
            if scales is not None and bad:
                what = f"{bad} of {len(scales)} blocks have a scale that is NaN or infinite"
                yield Finding.at(tensor, what, AGAIN)


def block_scales(tensor: Tensor) -> NDArray[np.float16] | None:
    """Return the float16 scales and minima of a quantized tensor, [blocks, per block]; None for another type."""
    if tensor.dtype not in BLOCKS:
        return None
    size, offsets = BLOCKS[tensor.dtype]
    blocks = _bytes_of(tensor).reshape(-1, size)
    columns = [np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")[:, 0] for offset in offsets]
    return np.stack(columns, axis=1)


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    return np.memmap(tensor.path, dtype=np.uint8, mode="r", offset=tensor.start, shape=tensor.stop - tensor.start)

"""GGUF: quantized blocks of a tensor with their scales inside them, under llama.cpp's names."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ..folder import Finding, Folder
from ..gguf_file import BLOCKS, BlockTensor, Bytes
from ..tensors import Matrix, Tensor
from .format import AGAIN, BUDGET, Format
from .scheme import ScaleGroups

HEAD_COUNTS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
ELEMENTS_READ = 1 << 18
"""About how many weights of a layer are dequantized to compare its rows with those of its siblings."""
BLOCKS_AT_ONCE = 1 << 20
"""How many blocks' scales are looked at together."""
PRUNED = 0x100
"""The word of a row of zeros, whatever the bytes of its codes are."""

PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron", "qwen3next")
"""The architectures whose norms the converter writes with 1 added (llama.cpp, convert_hf_to_gguf.py)."""

SCALE_GROUPS = {**dict.fromkeys(("Q2_K", "Q3_K", "Q6_K", "NVFP4"), 16), "TQ1_0": 256, "TQ2_0": 256, "Q1_0": 128}
"""The types of blocks whose scales aren't of 32 weights each."""


class Gguf(Format):
    """One GGUF file (`model.gguf_file`). It declares no layers to quantize: each tensor has the type that it has.

    A tensor `X.scale` multiplies the weight `X.weight`: NVFP4's scale of the whole tensor, BitNet's of the layer.
    """

    name = "gguf"
    libraries = ("gguf",)
    uniform = False
    codes = ("weight",)
    word_dtypes = dict.fromkeys(BLOCKS, "u2")

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

    def kept_names(self, reference: Folder) -> dict[str, str]:
        """Return the reference's tensor → the file's, but for those whose rows or axes the converter moves."""
        layers = self.layers_of(list(reference.layers))
        names = {name: f"{layers[theirs.layer]}.{theirs.part}" for name, theirs in reference.tensors.items()}
        return {name: own for name, own in names.items() if not self._is_moved(own, reference.tensors[name])}

    def _is_moved(self, own: str, theirs: Tensor) -> bool:
        mine = self.folder.tensors.get(own)
        if mine is None:
            return False
        turned = sorted(n for n in mine.shape if n > 1) == sorted(n for n in theirs.shape if n > 1)
        interleaved = self.folder.architecture == "llama" and mine.layer.rpartition(".")[2] in HEAD_COUNTS
        return interleaved or (mine.shape != theirs.shape and turned)

    def added_to(self, tensor: Tensor) -> float:
        """Return the 1 that the norms of some architectures get."""
        return float(self.folder.architecture in PLUS_ONE and tensor.layer.endswith("norm"))

    def scales_of(self, layer: str) -> dict[str, Tensor]:
        """Return the scales that are tensors of their own; those of blocks lie in the weight."""
        parts = self.parts(layer)
        return {part: parts[part] for part in ("scale", "input_scale") if part in parts and "weight" in parts}

    def weight_scale_of(self, layer: str) -> Tensor | None:
        """Return the weight itself, which holds the scales of its blocks; None for floats."""
        codes = self.codes_of(layer)
        return codes if isinstance(codes, BlockTensor) else None

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in]; of packed experts [experts · out, in]."""
        weight = self.weight_of(layer)
        return (prod(weight.shape[:-1]), weight.shape[-1]) if weight is not None and len(weight.shape) > 1 else None

    def scale_groups(self, layer: str, shape: tuple[int, int]) -> ScaleGroups:
        """Return the weights that share a scale within a block: 16 of some K-quants, all of the ternary types."""
        codes = self.codes_of(layer)
        if not isinstance(codes, BlockTensor):
            return ScaleGroups(1, shape[1])
        return ScaleGroups(1, SCALE_GROUPS.get(codes.dtype, 32))

    def code_bits(self, layer: str, codes: Tensor) -> int:
        """Return the bits of a word of `words`, which is a byte of codes or `PRUNED`."""
        return 16

    def words(self, layer: str, codes: Tensor) -> tuple[Array, int]:
        """Return the bytes of every row's codes, so that all are one where all codes are."""
        raw = _rows_of(codes)
        step = max(1, raw.nbytes // BUDGET)
        assert isinstance(codes, BlockTensor)
        words = _aligned(codes, raw[::step]).astype(np.uint16)
        same = np.flatnonzero((words == words[:, :1]).all(axis=1))
        for row in same:
            if not self._decoded(codes, raw[row * step : row * step + 1]).any():
                words[row] = PRUNED
        return words, step

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return the word that stands for zeros."""
        return (PRUNED,)

    def typical_row(self, layer: str) -> float | None:
        """Return the median rms of evenly spaced rows: siblings may be of several types, with scales of other meaning.

        The largest row says nothing: one of SmolLM2's blk.28.ffn_up is 7 times as large as the others.
        """
        codes, shape = self.codes_of(layer), self.weight_shape(layer)
        if not isinstance(codes, BlockTensor) or shape is None or 0 in shape:
            return None
        rows = self.dequantized(layer, codes, slice(None, None, max(1, prod(shape) // ELEMENTS_READ)))
        return None if rows is None else float(np.median(np.sqrt(np.square(rows).mean(axis=1))))

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Dequantize rows by the package gguf, in the order of transformers; None for a type that isn't read."""
        if not isinstance(codes, BlockTensor):
            return None
        raw = _rows_of(codes)
        wanted = self._order(layer, len(raw))[rows]
        weight = self._decoded(codes, raw[wanted])
        if whole := self.parts(layer).get("scale"):
            each = whole.values().ravel()
            weight = weight * np.repeat(each, len(raw) // len(each))[wanted, None]
        return weight

    def _order(self, layer: str, count: int) -> NDArray[np.intp]:
        """Return the row of the file that each row of the weight is."""
        order = np.arange(count)
        heads = HEAD_COUNTS.get(layer.rpartition(".")[2])
        if heads is None or self.folder.architecture != "llama":
            return order
        # llama.cpp's converter interleaves the two halves of every head of llama's q and k, for its rotary kernel
        number = int(self.folder.config.get(heads) or self.folder.config["num_attention_heads"])
        return order.reshape(number, -1, 2).swapaxes(1, 2).ravel()

    def _decoded(self, codes: BlockTensor, raw: Bytes) -> Matrix:
        """Return the numbers that rows of blocks stand for, [rows, in]."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        blocks = raw.reshape(-1, codes.block.size)
        if codes.dtype == "Q1_0":  # gguf names it and the next one, and doesn't read them
            signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float64) * 2 - 1
            weight = signs * codes.scales(raw)
        elif codes.dtype == "Q8_K":
            weight = np.ascontiguousarray(blocks[:, 4:260]).view(np.int8) * codes.scales(raw)
        else:
            with np.errstate(all="ignore"):  # scales that are NaN are reported, not raised
                weight = dequantize(np.ascontiguousarray(raw), GGMLQuantizationType[codes.dtype])
        return weight.reshape(len(raw), -1).astype(np.float64)

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield tensors with blocks whose scale is NaN, infinite, or lost in an exponent that was never written."""
        yield from super().findings(layer)
        for tensor in self.parts(layer).values():
            if not isinstance(tensor, BlockTensor):
                continue
            bad = lost = 0
            blocks = tensor.raw().reshape(-1, tensor.block.size)
            for start in range(0, len(blocks), BLOCKS_AT_ONCE):
                piece = blocks[start : start + BLOCKS_AT_ONCE]
                bad += int(np.count_nonzero(~np.isfinite(tensor.scales(piece)).all(axis=1)))
                if tensor.dtype == "MXFP4":  # an exponent of 0 is 2⁻¹²⁷, in which all other weights are lost
                    unwritten = piece[np.flatnonzero(piece[:, 0] == 0)]
                    lost += int(np.count_nonzero((unwritten[:, 1:] & 0x77).any(axis=1)))
            if bad:
                what = f"{bad} of {len(blocks)} blocks have a scale that is NaN or infinite"
                yield Finding.at(tensor, what, AGAIN)
            if lost:
                yield Finding.at(tensor, f"{lost} of {len(blocks)} scales are 0, and their weights aren't", AGAIN)


def _rows_of(codes: Tensor) -> Bytes:
    raw: Bytes = codes.raw()
    return raw.reshape(-1, raw.shape[-1])


def _aligned(codes: BlockTensor, raw: Bytes) -> Bytes:
    """Return the bytes of codes [rows, bytes], each run moved so that it begins with the row's first byte."""
    blocks = raw.reshape(len(raw), -1, codes.block.size)
    runs = [blocks[:, :, start:stop].reshape(len(raw), -1) for start, stop in codes.block.codes]
    # of one code the low bits lie in one run and the high ones in another, so that two constant bytes can be one code
    return np.concatenate([run ^ run[:, :1] ^ runs[0][:, :1] for run in runs], axis=1)

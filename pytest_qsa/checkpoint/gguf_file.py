"""A GGUF file as bytes: its tensors, its vocabulary, and its settings under the names of a config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..common import AnomalyError, InfraError, refuse_special
from .tensors import RAW, Tensor, decoded, encoded

if TYPE_CHECKING:
    from gguf import GGUFReader

MOST_READ = 2_500_000
"""The most counts, texts and lists before the weights; 262,144 tokens and twice as many merges take two thirds."""
Bytes = NDArray[np.uint8]
SPLIT = "F16 in quarters"
"""IQ1_M: a float16 in the upper 4 bits of four words of 16 bits, its lowest bits in the first word."""


class Block(NamedTuple):
    """The layout of a quantized type's block (ggml-common.h).

    `weights`: how many it holds. `size`: in bytes. `scales`: the offset and the dtype of each scale and minimum in
    floating point; the integers by which some types refine them are left aside. `codes`: the start and the end of each
    run of bytes that holds codes.
    """

    weights: int
    size: int
    scales: tuple[tuple[int, str], ...]
    codes: tuple[tuple[int, int], ...]


_D, _D_AND_MIN = ((0, "F16"),), ((0, "F16"), (2, "F16"))
BLOCKS: Mapping[str, Block] = {
    "Q1_0": Block(128, 18, _D, ((2, 18),)),
    "Q4_0": Block(32, 18, _D, ((2, 18),)),
    "Q4_1": Block(32, 20, _D_AND_MIN, ((4, 20),)),
    "Q5_0": Block(32, 22, _D, ((2, 6), (6, 22))),
    "Q5_1": Block(32, 24, _D_AND_MIN, ((4, 8), (8, 24))),
    "Q8_0": Block(32, 34, _D, ((2, 34),)),
    "Q2_K": Block(256, 84, ((80, "F16"), (82, "F16")), ((16, 80),)),
    "Q3_K": Block(256, 110, ((108, "F16"),), ((0, 32), (32, 96))),
    "Q4_K": Block(256, 144, _D_AND_MIN, ((16, 144),)),
    "Q5_K": Block(256, 176, _D_AND_MIN, ((16, 48), (48, 176))),
    "Q6_K": Block(256, 210, ((208, "F16"),), ((0, 128), (128, 192))),
    "Q8_K": Block(256, 292, ((0, "F32"),), ((4, 260),)),
    "IQ1_S": Block(256, 50, _D, ((2, 34),)),
    "IQ1_M": Block(256, 56, ((48, SPLIT),), ((0, 32),)),
    "IQ2_XXS": Block(256, 66, _D, ((2, 66),)),
    "IQ2_XS": Block(256, 74, _D, ((2, 66),)),
    "IQ2_S": Block(256, 82, _D, ((2, 34), (34, 66))),
    "IQ3_XXS": Block(256, 98, _D, ((2, 66),)),
    "IQ3_S": Block(256, 110, _D, ((2, 66), (74, 106))),
    "IQ4_NL": Block(32, 18, _D, ((2, 18),)),
    "IQ4_XS": Block(256, 136, _D, ((8, 136),)),
    "TQ1_0": Block(256, 54, ((52, "F16"),), ((0, 48),)),
    "TQ2_0": Block(256, 66, ((64, "F16"),), ((0, 64),)),
    "MXFP4": Block(32, 17, ((0, "F8_E8M0"),), ((1, 17),)),
    "NVFP4": Block(64, 36, tuple((offset, "F8_E4M3") for offset in range(4)), ((4, 36),)),
}
"""The quantized types that are read. Q8_1 isn't, for gguf gives its block 40 bytes and llama.cpp 36."""

SETTING_NAMES: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "nextn_predict_layers": "num_nextn_predict_layers",
}
"""The keys of an architecture → those of transformers, which doesn't count a head of several tokens as blocks."""


@dataclass(frozen=True)
class BlockTensor(Tensor):
    """A quantized tensor: rows of blocks, each with its scales and its codes inside."""

    @property
    def block(self) -> Block:
        """The layout of its blocks."""
        return BLOCKS[self.dtype]

    def raw(self) -> Bytes:
        """Return a memory map of the bytes, read-only: [..., bytes of a row]."""
        shape = (*self.shape[:-1], (self.stop - self.start) // max(1, prod(self.shape[:-1])))
        if not prod(shape):
            return np.zeros(shape, np.uint8)
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.start, shape=shape)

    def scales(self, raw: Bytes) -> NDArray[np.float64]:
        """Return the scales and minima in raw bytes, [blocks, per block]."""
        blocks = raw.reshape(-1, self.block.size)
        with np.errstate(invalid="ignore"):  # a signalling NaN is reported, not raised
            columns = [_numbers(blocks, offset, dtype) for offset, dtype in self.block.scales]
        return np.stack(columns, axis=1)

    def with_scales(self, raw: Bytes, scales: NDArray[np.float64]) -> Bytes:
        """Return raw bytes with other scales and minima, rounded to their dtype."""
        blocks = raw.reshape(-1, self.block.size).copy()
        for (offset, dtype), values in zip(self.block.scales, scales.T, strict=True):
            if dtype == SPLIT:
                bits = values.astype(np.float16).view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16)
                words = np.ascontiguousarray(blocks[:, offset : offset + 8]).view("<u2") & 0x0FFF
                blocks[:, offset : offset + 8] = (words | bits << 12).astype("<u2").view(np.uint8)
            else:
                numbers = encoded(values, dtype).reshape(-1, 1).view(np.uint8)
                blocks[:, offset : offset + numbers.shape[1]] = numbers
        return blocks.reshape(raw.shape)

    def codes(self, raw: Bytes) -> Bytes:
        """Return the bytes of codes in raw bytes, [rows, bytes of a row]."""
        blocks = raw.reshape(prod(raw.shape[:-1]), -1, self.block.size)
        return np.concatenate([blocks[:, :, a:b] for a, b in self.block.codes], axis=2).reshape(len(blocks), -1)

    def with_codes(self, raw: Bytes, codes: Bytes) -> Bytes:
        """Return raw bytes with other bytes of codes, [rows, bytes of a row]."""
        blocks = raw.reshape(prod(raw.shape[:-1]), -1, self.block.size).copy()
        parts, begin = codes.reshape(*blocks.shape[:2], -1), 0
        for a, b in self.block.codes:
            blocks[:, :, a:b] = parts[:, :, begin : begin + b - a]
            begin += b - a
        return blocks.reshape(raw.shape)


def _numbers(blocks: Bytes, offset: int, dtype: str) -> NDArray[np.float64]:
    """Return the number at an offset of each block."""
    if dtype == SPLIT:
        quarters = np.ascontiguousarray(blocks[:, offset : offset + 8]).view("<u2") >> 12
        bits = np.bitwise_or.reduce(quarters << np.array([0, 4, 8, 12], np.uint16), axis=1)
        halves: NDArray[np.float64] = bits.astype("<u2").view(np.float16).astype(np.float64)
        return halves
    kind = np.dtype(RAW[dtype])
    raw = np.ascontiguousarray(blocks[:, offset : offset + kind.itemsize]).view(kind)[:, 0]
    numbers: NDArray[np.float64] = decoded(raw, dtype).astype(np.float64)
    return numbers


@dataclass(frozen=True)
class GgufFile:
    """The content of a file. `settings`: as transformers names them; `vocabulary`: token → id."""

    architecture: str
    tensors: Sequence[Tensor]
    settings: Mapping[str, Any]
    vocabulary: Mapping[str, int]


def read_gguf(path: Path) -> GgufFile:
    """Read a file's headers; the tensors' bytes stay on disk.

    Raises:
        InfraError: the package gguf is not installed or doesn't know a type of the file, or there is no such file.
        AnomalyError: the file is damaged.
    """
    refuse_special(path)
    try:
        reader = _bounded_reader(path)
        found = path.stat()
        tensors = [_tensor(path, entry, (found.st_ino, found.st_mtime_ns)) for entry in reader.tensors]
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name == "tokenizer.ggml.tokens" or not name.startswith("tokenizer.")
        }
    except ImportError:
        raise InfraError(f"reading {path.name} takes the package gguf: pip install gguf") from None
    except OSError as error:
        raise InfraError(f"{path} can't be read: {error}") from None
    except (ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        if number := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
            what = f"{path} holds tensors of the type {number[1]}, which the installed gguf doesn't know"
            raise InfraError(f"{what}: upgrade it (pip install -U gguf)") from None
        raise AnomalyError(f"{path} can't be read as GGUF: {error}; copy or download it again") from None
    architecture = str(fields.get("general.architecture", ""))
    keys = {name: f"{architecture}.{key}" for key, name in SETTING_NAMES.items()}
    settings = {name: fields[key] for name, key in keys.items() if key in fields}
    blocks, several = settings.get("num_hidden_layers"), settings.get("num_nextn_predict_layers")
    if isinstance(blocks, int) and isinstance(several, int):
        settings["num_hidden_layers"] = blocks - several
    words = fields.get("tokenizer.ggml.tokens") or ()
    return GgufFile(architecture, tensors, settings, {word: index for index, word in enumerate(words)})


def _bounded_reader(path: Path) -> GGUFReader:
    """Return the package's reader of a file, which by itself reads on behind the file's end, up to any count.

    A list of numbers is read at once instead of number by number.

    Raises:
        ValueError: the file is cut short, or holds more than `MOST_READ` counts, lengths and values before its weights.
    """
    from gguf import GGUFReader, GGUFValueType

    class Bounded(GGUFReader):
        left = MOST_READ

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **orders: Any) -> NDArray[Any]:
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"it holds more than {MOST_READ:,} values before its weights")
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                what = f"its header states {count:,} more at byte {offset:,}"
                raise ValueError(f"it has {len(self.data):,} bytes, and {what}")
            found: NDArray[Any] = super()._get(offset, dtype, count, *order, **orders)
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
                if dtype := self.gguf_scalar_to_np.get(kind[0]):
                    values = self._get(orig_offs + 12, dtype, length[0])
                    types = [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
                    return 12 + values.nbytes, [kind, length, values], [2], types
            return super()._get_field_parts(orig_offs, raw_type)

    return Bounded(path)


def _tensor(path: Path, entry: Any, written: tuple[int, int]) -> Tensor:
    shape = tuple(int(length) for length in reversed(entry.shape))
    kind, start = entry.tensor_type.name, int(entry.data_offset)
    form = BlockTensor if kind in BLOCKS else Tensor
    return form(entry.name, kind, shape, path, start, start + int(entry.n_bytes), written)

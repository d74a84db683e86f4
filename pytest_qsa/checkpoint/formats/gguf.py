"""A GGUF file as the static checks see it: its tensors, and its settings under the names of a config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common import InfraError
from ..tensors import Tensor

BLOCKS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "Q4_0": (18, (0,)), "Q4_1": (20, (0, 2)), "Q5_0": (22, (0,)), "Q5_1": (24, (0, 2)), "Q8_0": (34, (0,)),
    "Q2_K": (84, (80, 82)), "Q3_K": (110, (108,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,)),
}  # fmt: skip
"""The quantized types → the bytes of a block, and where in it a float16 scale or minimum stands (ggml-common.h)."""
SETTINGS: Mapping[str, str] = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta", "vocab_size": "vocab_size", "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}  # fmt: skip
"""The keys of an architecture → those of transformers."""


def read_gguf(path: Path) -> tuple[list[Tensor], dict[str, Any], dict[str, int]]:
    """Return a file's tensors, its settings as transformers names them, and its vocabulary.

    Raises:
        InfraError: the package gguf is not installed, or the file is missing or damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InfraError(f"reading {path.name} takes the package gguf: pip install gguf") from None
    try:
        reader = GGUFReader(path)
        tensors = [_tensor(path, entry) for entry in reader.tensors]
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        settings = dict(_settings({name: field.contents() for name, field in fields.items()}))
        tokens = reader.fields.get("tokenizer.ggml.tokens")
        words = tokens.contents() if tokens is not None else []
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InfraError(f"{path} can't be read as GGUF: {error}; copy or download it again") from None
    return tensors, settings, {word: index for index, word in enumerate(words)}


def _tensor(path: Path, entry: Any) -> Tensor:
    shape = tuple(int(length) for length in reversed(entry.shape))
    kind, start = entry.tensor_type.name, int(entry.data_offset)
    return Tensor(entry.name, kind, shape, path, start, start + int(entry.n_bytes))


def _settings(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    architecture = fields.get("general.architecture", "")
    for key, name in SETTINGS.items():
        if f"{architecture}.{key}" in fields:
            yield name, fields[f"{architecture}.{key}"]


def block_scales(tensor: Tensor) -> NDArray[np.float16] | None:
    """Return the float16 scales and minima of a quantized tensor, [blocks, per block]; None for another type."""
    if tensor.dtype not in BLOCKS:
        return None
    size, offsets = BLOCKS[tensor.dtype]
    content = np.memmap(tensor.path, dtype=np.uint8, mode="r", offset=tensor.start, shape=tensor.stop - tensor.start)
    blocks = content.reshape(-1, size)
    columns = [np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")[:, 0] for offset in offsets]
    return np.stack(columns, axis=1)

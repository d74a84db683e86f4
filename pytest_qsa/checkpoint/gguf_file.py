"""A GGUF file as bytes: its tensors, its vocabulary, and its settings under the names of a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import AnomalyError, InfraError
from .tensors import Tensor

SETTING_NAMES: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
"""The keys of an architecture → those of transformers."""


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
        InfraError: the package gguf is not installed, or there is no such file.
        AnomalyError: the file is damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InfraError(f"reading {path.name} takes the package gguf: pip install gguf") from None
    try:
        reader = GGUFReader(path)
        tensors = [_tensor(path, entry) for entry in reader.tensors]
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name == "tokenizer.ggml.tokens" or not name.startswith("tokenizer.")
        }
    except OSError as error:
        raise InfraError(f"{path} can't be read: {error}") from None
    except (ValueError, KeyError, IndexError) as error:
        raise AnomalyError(f"{path} can't be read as GGUF: {error}; copy or download it again") from None
    architecture = str(fields.get("general.architecture", ""))
    keys = {name: f"{architecture}.{key}" for key, name in SETTING_NAMES.items()}
    settings = {name: fields[key] for name, key in keys.items() if key in fields}
    words = fields.get("tokenizer.ggml.tokens") or ()
    return GgufFile(architecture, tensors, settings, {word: index for index, word in enumerate(words)})


def _tensor(path: Path, entry: Any) -> Tensor:
    shape = tuple(int(length) for length in reversed(entry.shape))
    kind, start = entry.tensor_type.name, int(entry.data_offset)
    return Tensor(entry.name, kind, shape, path, start, start + int(entry.n_bytes))

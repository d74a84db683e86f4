"""How large a checkpoint is, from its configuration and the headers of its files: no weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from ..captures import (
    LayerNames,
)
from ..checkpoint import Folder, Format, format_of, streams_from_disk
from ..common import InfraError
from ..suite import Model

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FLOAT_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK_NAME = re.compile(r"^(.*?\.\d+)(?:\.|$)")
"""A name up to its first number: the block that a tensor belongs to."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a checkpoint.

    `units`: what is in memory together when it streams, in order → its parameters.

    `stored`: the bytes of its tensors in the files. `active`: the share of each unit's parameters that one token
    meets; below 1 in a mixture of experts. `tied`: the head is the embedding.
    """

    architecture: str
    method: str
    dtype: str
    stored: int
    files: int
    units: Mapping[str, int]
    active: Mapping[str, float]
    layers: LayerNames
    tied: bool
    hidden: int
    intermediate: int
    attention: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """The number of parameters, unpacked."""
        return sum(self.units.values())

    @property
    def width(self) -> int:
        """Bytes of a parameter in memory."""
        return BYTES[self.dtype]

    @property
    def weights(self) -> int:
        """Bytes of all weights in memory: unpacked, as compressed-tensors runs them; else as they are stored."""
        return self.parameters * self.width if self.streams else self.stored

    @property
    def streams(self) -> bool:
        """Whether transformers can leave the weights on disk."""
        return streams_from_disk(self.method)

    @cached_property
    def streamed(self) -> int:
        """Bytes of the weights in memory at once when they stream: two successive units, and a tied embedding."""
        sizes = list(self.units.values()) or [0]
        two = max((one + other for one, other in pairwise(sizes)), default=sizes[0])
        kept = self.units.get(self._embedding, 0) if self.tied else 0
        return (two + kept) * self.width

    @property
    def _embedding(self) -> str:
        return next((name for name in self.units if "embed" in name or name.endswith("wte")), "")

    @cached_property
    def trunk(self) -> float:
        """The parameters that a token is multiplied with, without embedding and head."""
        blocks = {name: count for name, count in self.units.items() if BLOCK_NAME.match(name)}
        return sum(count * self.active.get(name, 1.0) for name, count in blocks.items())


class _Stored(NamedTuple):
    """What a checkpoint's files say. `units`, `experts`: parameters by unit; `packed`: the layers of packed experts.

    `size`: bytes of all tensors.
    """

    units: Mapping[str, int]
    experts: Mapping[str, int]
    layers: Iterable[str]
    packed: Iterable[str]
    size: int
    files: int
    dtype: str | None


def sizes_of(folder: Folder, model: Model) -> Sizes:
    """Return the sizes of a checkpoint. Of a sharded one the index and the configuration are enough.

    Raises:
        InfraError: it holds no config.json, or neither weights nor an index.
    """
    config = folder.text_config
    found = _from_headers(folder) if folder.gguf_file or any(folder.path.glob("*.safetensors")) else _from_index(folder)
    named = (model.dtype, config.get("dtype"), config.get("torch_dtype"), found.dtype, "bfloat16")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    heads = _number(config, "num_attention_heads", "n_head", "num_heads")
    return Sizes(
        architecture=next(iter(folder.config.get("architectures") or ()), str(config.get("model_type") or "a model")),
        method=format_of(folder).name or format_of(folder).label,
        dtype=next(str(name) for name in named if name in BYTES),
        stored=found.size,
        files=found.files,
        units={unit: found.units[unit] for unit in sorted(found.units, key=_order)},
        active=_active(found.experts, found.units, config),
        layers=LayerNames((*_layers(found.layers), *found.packed), frozenset(found.packed)),
        tied=bool(config.get("tie_word_embeddings")) and not any("lm_head" in unit for unit in found.units),
        hidden=hidden,
        # GPT-2 and its kin name no intermediate size: it is four times the hidden one.
        intermediate=_number(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden,
        attention=heads * (_number(config, "head_dim") or (hidden // heads if heads else 0)),
        vocabulary=_number(config, "vocab_size"),
    )


def unit_of(name: str) -> str:
    """Return the unit that a layer is loaded with: its block, or itself."""
    block = BLOCK_NAME.match(name)
    return block[1] if block else name


def _from_headers(folder: Folder) -> _Stored:
    units, experts, dtypes = Counter[str](), Counter[str](), Counter[str]()
    form = format_of(folder)
    for layer, parts in folder.layers.items():
        count = _unpacked(form, layer)
        units[unit_of(layer)] += count
        if ".experts" in layer:
            experts[unit_of(layer)] += count
        for tensor in parts.values():
            dtypes[tensor.dtype] += prod(tensor.shape)
    floats = {FLOAT_NAMES[dtype]: count for dtype, count in dtypes.items() if dtype in FLOAT_NAMES}
    size = sum(tensor.stop - tensor.start for tensor in folder.tensors.values())
    files = len({tensor.path for tensor in folder.tensors.values()})
    dtype = max(floats, key=lambda name: floats[name], default=None)
    return _Stored(units, experts, folder.layers, list(form.experts), size, files, dtype)


def _unpacked(form: Format, layer: str) -> int:
    """Return the number of parameters of a layer after unpacking; scales and zero points don't count."""
    codes, parts = form.codes_of(layer), form.parts(layer)
    if codes is None:
        return sum(prod(tensor.shape) for tensor in parts.values())
    shape = form.weight_shape(layer)
    return prod(shape or codes.shape) + sum(prod(t.shape) for part, t in parts.items() if part == "bias")


def _from_index(folder: Folder) -> _Stored:
    """Divide the bytes of an index among the blocks; embedding and head have the size that the configuration gives."""
    names = folder.indexed
    stored = int(((folder.json("model.safetensors.index.json") or {}).get("metadata") or {}).get("total_size") or 0)
    if not names or not stored:
        raise InfraError(f"{folder.path} holds neither safetensors files nor an index that says how large they are")
    config = folder.text_config
    layers = dict.fromkeys(name.rpartition(".")[0] or name for name in sorted(names))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    outer = _number(config, "vocab_size") * _number(config, "hidden_size", "n_embd", "d_model")
    units = {unit_of(layer): outer if "embed" in layer or "lm_head" in layer else 0 for layer in layers}
    blocks = [unit for unit in units if BLOCK_NAME.match(unit)]
    # An index has one size for all files; blocks of one model are alike.
    rest = stored // BYTES.get(dtype, 2) - sum(units.values())
    units |= {unit: rest // len(blocks) for unit in blocks}
    return _Stored(units, {}, layers, (), stored, len(set(names.values())), None)


def _order(unit: str) -> tuple[int, int]:
    """Sort units in the order of a forward: the embedding, the blocks by number, norm and head."""
    number = unit.rpartition(".")[2]
    return (1, int(number)) if number.isdigit() else (0, 0) if "embed" in unit else (2, 0)


def _layers(owners: Iterable[str]) -> tuple[str, ...]:
    """Return the modules of the tensors and those around them. `layers` of `layers.0` is a list and no layer."""
    found: dict[str, None] = {}
    for owner in owners:
        words = [*owner.split("."), ""]
        ends = [end for end in range(1, len(words)) if not words[end].isdigit()]
        found |= dict.fromkeys(".".join(words[:end]) for end in ends)
    return tuple(found)


def _active(experts: Mapping[str, int], units: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, float]:
    total = _number(config, "num_local_experts", "num_experts", "n_routed_experts")
    chosen = _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
    if not total or not chosen:
        return {}
    return {unit: 1 - count / units[unit] * (1 - chosen / total) for unit, count in experts.items() if units[unit]}


def _number(config: Mapping[str, Any], *names: str) -> int:
    """Return the number at the first of several keys, for architectures name it differently; 0 if there is none."""
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)

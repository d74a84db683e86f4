"""How large a checkpoint is, from its configuration and the headers of its files; no weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

from ...checkpoint import Folder, Format, format_of, streams_from_disk
from ...common import InfraError
from ...suite import Model

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FLOAT_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")
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
    layers: tuple[str, ...]
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
        blocks = {name: count for name, count in self.units.items() if BLOCK.match(name)}
        return sum(count * self.active.get(name, 1.0) for name, count in blocks.items())


def sizes_of(folder: Folder, model: Model) -> Sizes:
    """Return the sizes of a checkpoint. Of a sharded one the index and the configuration are enough.

    Raises:
        InfraError: it holds no config.json, or neither weights nor an index.
    """
    config = folder.text_config
    found = _from_headers(folder) if folder.gguf_file or any(folder.path.glob("*.safetensors")) else _from_index(folder)
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    heads = _number(config, "num_attention_heads", "n_head", "num_heads")
    return Sizes(
        architecture=next(iter(folder.config.get("architectures") or ()), str(config.get("model_type") or "a model")),
        method=format_of(folder).name or format_of(folder).label,
        dtype=_dtype(folder, model, found["stored_dtype"]),
        stored=found["stored"],
        files=found["files"],
        units=found["units"],
        active=_active(found["experts"], found["units"], config),
        layers=found["layers"],
        tied=bool(config.get("tie_word_embeddings")) and not any("lm_head" in unit for unit in found["units"]),
        hidden=hidden,
        # GPT-2 and its kin name no intermediate size: it is four times the hidden one.
        intermediate=_number(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden,
        attention=heads * (_number(config, "head_dim") or (hidden // heads if heads else 0)),
        vocabulary=_number(config, "vocab_size"),
    )


def unit_of(name: str) -> str:
    """Return the unit that a layer is loaded with: its block, or itself."""
    block = BLOCK.match(name)
    return block[1] if block else name


def _from_headers(folder: Folder) -> dict[str, Any]:
    units: dict[str, int] = {}
    experts: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    form = format_of(folder)
    for layer, parts in folder.layers.items():
        count = _unpacked(form, layer)
        units[unit_of(layer)] = units.get(unit_of(layer), 0) + count
        if ".experts" in layer:
            experts[unit_of(layer)] = experts.get(unit_of(layer), 0) + count
        for tensor in parts.values():
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + prod(tensor.shape)
    floats = {FLOAT_NAMES[dtype]: count for dtype, count in dtypes.items() if dtype in FLOAT_NAMES}
    return {
        "units": {unit: units[unit] for unit in sorted(units, key=_order)},
        "experts": experts,
        "layers": _layers(folder.layers),
        "stored": sum(tensor.stop - tensor.start for tensor in folder.tensors.values()),
        "files": len({tensor.path for tensor in folder.tensors.values()}),
        "stored_dtype": max(floats, key=lambda dtype: floats[dtype], default=None),
    }


def _unpacked(form: Format, layer: str) -> int:
    """Return the number of parameters of a layer after unpacking; scales and zero points don't count."""
    codes, parts = form.codes_of(layer), form.parts(layer)
    if codes is None:
        return sum(prod(tensor.shape) for tensor in parts.values())
    shape = form.weight_shape(layer)
    return prod(shape or codes.shape) + sum(prod(t.shape) for part, t in parts.items() if part == "bias")


def _from_index(folder: Folder) -> dict[str, Any]:
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
    blocks = [unit for unit in units if BLOCK.match(unit)]
    # An index has one size for all files; blocks of one model are alike.
    rest = stored // BYTES.get(dtype, 2) - sum(units.values())
    units |= {unit: rest // len(blocks) for unit in blocks}
    return {
        "units": {unit: units[unit] for unit in sorted(units, key=_order)},
        "experts": {},
        "layers": _layers(layers),
        "stored": stored,
        "files": len(set(names.values())),
        "stored_dtype": None,
    }


def _order(unit: str) -> tuple[int, int]:
    """Sort units in the order of a forward: the embedding, the blocks by number, norm and head."""
    number = unit.rpartition(".")[2]
    return (1, int(number)) if number.isdigit() else (0, 0) if "embed" in unit else (2, 0)


def _layers(owners: Mapping[str, Any]) -> tuple[str, ...]:
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


def _dtype(folder: Folder, model: Model, stored: str | None) -> str:
    named = (model.dtype, folder.text_config.get("dtype"), folder.text_config.get("torch_dtype"), stored, "bfloat16")
    return next(str(name) for name in named if name in BYTES)


def _number(config: Mapping[str, Any], *names: str) -> int:
    """Return the number at the first of several keys, for architectures name it differently; 0 if there is none."""
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)

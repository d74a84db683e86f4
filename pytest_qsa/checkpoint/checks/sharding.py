"""Whether a server may cut the layers for tensor parallelism: each shard needs whole groups, blocks and words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..folder import Finding, Settings
from ..formats.format import Format
from ..tensors import Tensor

BY_OUTPUTS = re.compile(
    r"(^|\.)(q_proj|k_proj|v_proj|q_b_proj|kv_b_proj|gate_proj|up_proj|w1|w3|fc1|c_fc|gate_up_proj|qkv_proj|Wqkv|W_pack"
    r"|query_key_value|in_proj_(qkv|z|b|a|qkvz|ba))$"
)
"""The layers that servers cut along the outputs, each rank its own heads or channels."""
BY_INPUTS = re.compile(r"(^|\.)(o_proj|down_proj|w2|fc2|linear_attn\.out_proj)$")
"""Those that they cut along the inputs, and whose outputs the ranks add."""
QUERIES, KEYS = ("num_attention_heads",), ("num_key_value_heads", "num_attention_heads")
LINEAR_KEYS, LINEAR_VALUES = ("linear_num_key_heads",), ("linear_num_value_heads",)
FUSED = ("gate_up_proj",)
QKV = ("qkv_proj", "Wqkv", "W_pack", "query_key_value")
HEADS = {
    **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj"), (QUERIES,)),
    **dict.fromkeys(("k_proj", "v_proj"), (KEYS,)),
    **dict.fromkeys(QKV, (QUERIES, KEYS, KEYS)),
    "in_proj_qkv": (LINEAR_KEYS, LINEAR_KEYS, LINEAR_VALUES),
    **dict.fromkeys(("in_proj_z", "in_proj_b", "in_proj_a"), (LINEAR_VALUES,)),
    # rows of one key head, with those of its value heads, follow one another (Qwen3-Next)
    **dict.fromkeys(("in_proj_qkvz", "in_proj_ba"), (LINEAR_KEYS,)),
}
"""The settings that count the heads of each piece of a layer's outputs; of two names the first that is stated."""
SHARED = (KEYS,)
"""The heads of which several ranks may keep the same, where there are fewer of them."""


@dataclass(frozen=True)
class _Piece:
    """Some outputs of a layer that are cut by themselves. `heads`: of them, 0 where it isn't known."""

    outputs: int
    heads: int = 0
    shared: bool = False


def uneven_shards(form: Format, ranks: int) -> Iterator[Finding]:
    """Yield quantized layers that can't be cut for `ranks` ranks without cutting a group, a block, a word or a head.

    Outputs of keys and values are cut by KV heads, which ranks share where there are fewer of them; fused layers piece
    by piece. Of experts that lie packed in MXFP4 vLLM gives the ranks whole groups, the last one fewer: that is a note.
    """
    for layer in form.fitting if ranks > 1 else ():
        shape, codes = form.weight_shape(layer), form.codes_of(layer)
        if shape is None or codes is None:
            continue
        advice = f"serve it on another number of ranks than {ranks}, or quantize it otherwise"
        if layer in form.packed_shapes:
            yield from _uneven_experts(form, layer, codes, ranks)
            continue
        rows, columns = _units(form, layer, shape)
        problem = ""
        if BY_OUTPUTS.search(layer):
            pieces = _pieces(form, layer, shape[0])
            problem = next(filter(None, (_uneven_outputs(piece, ranks, rows) for piece in pieces)), "")
        elif BY_INPUTS.search(layer):
            problem = _uneven("inputs", shape[1], ranks, columns)
        if problem:
            yield Finding.at(codes, problem, advice)


def _uneven_experts(form: Format, layer: str, codes: Tensor, ranks: int) -> Iterator[Finding]:
    """Yield packed experts whose groups of inputs to down_proj the ranks can't share evenly."""
    _, outputs, inputs = form.packed_shapes[layer]
    scheme = form.scheme_of(layer)
    group = scheme.group if scheme is not None and isinstance(scheme.group, int) else 1
    width = inputs if layer.endswith("down_proj") else outputs // 2
    groups, each = width // group, -(-width // group // ranks)
    if (ranks - 1) * each >= groups:
        what = f"its {groups} groups of {group} are too few for {ranks} ranks: one would have none"
        yield Finding.at(codes, what, f"serve it on fewer ranks than {ranks}")
    elif groups % ranks:
        what = f"its {groups} groups of {group} aren't shared evenly by {ranks} ranks"
        yield Finding.at(codes, what, "vLLM gives the last rank fewer and pads them; others refuse it", note=True)


def _pieces(form: Format, layer: str, outputs: int) -> list[_Piece]:
    """Return the outputs of a layer piece by piece, in proportion to their heads."""
    config, last = form.folder.text_config, layer.rpartition(".")[2]
    if last in FUSED:
        return [_Piece(outputs // 2)] * 2
    named = HEADS.get(last, ())
    heads = [_stated(config, names) for names in named]
    if not heads or not all(heads):
        return [_Piece(outputs)]
    sizes = [count * _head_size(config, names) for count, names in zip(heads, named, strict=True)]
    if len(heads) == 1 or sum(sizes) != outputs:
        sizes = [outputs * count // sum(heads) for count in heads]
    return [_Piece(size, count, names in SHARED) for size, count, names in zip(sizes, heads, named, strict=True)]


def _stated(config: Settings, names: Sequence[str]) -> int:
    """Return the first of some settings that is a number above 0; 0 for none."""
    found = (config.get(name) for name in names)
    return next((each for each in found if isinstance(each, int) and each > 0), 0)


def _head_size(config: Settings, names: Sequence[str]) -> int:
    """Return the outputs of one of the heads that a setting counts; 1 where it isn't stated."""
    kind = "linear_key_head_dim" if names == LINEAR_KEYS else "head_dim"
    return _stated(config, ("linear_value_head_dim" if names == LINEAR_VALUES else kind,)) or 1


def _uneven_outputs(piece: _Piece, ranks: int, unit: int) -> str:
    """Say why the outputs of a piece can't be cut; empty where they can."""
    shards = min(piece.heads, ranks) if piece.shared and piece.heads else ranks
    if piece.heads and piece.heads % shards:
        return f"its {piece.heads} heads can't be shared out among {ranks} ranks"
    if piece.heads and ranks % shards:
        return f"{ranks} ranks can't share its {piece.heads} heads evenly"
    return _uneven("outputs", piece.outputs, shards, unit)


def _units(form: Format, layer: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Return how many outputs and how many inputs of a layer must stay together."""
    scheme, codes, scale = form.scheme_of(layer), form.codes_of(layer), form.weight_scale_of(layer)
    group = scheme.group if scheme is not None else None
    rows, columns = group if isinstance(group, tuple) else (1, group or 1)
    if group is None and scale is not None:
        scales = form.scale_values(layer, scale.part)
        if scales.ndim == 2 and len(scales) == shape[0] and scales.shape[1] > 1:
            columns = -(-shape[1] // scales.shape[1])
    if codes is not None and codes.part == "qweight" and codes.dtype == "I32":  # zero points are packed by outputs
        rows = max(rows, 32 // form.code_bits(layer, codes))
    return rows, columns


def _uneven(what: str, length: int, shards: int, unit: int) -> str:
    if length % (shards * unit) == 0:
        return ""
    each = f"{length / shards:g} each" + (f", no whole {unit}s" if length % shards == 0 else "")
    together = f" that share a scale or a word in {unit}s" if unit > 1 else ""
    return f"its {length} {what}{together} are {each} in {shards} shards"

"""Whether a server may cut the layers for tensor parallelism: each shard needs whole groups, blocks and words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..folder import Finding
from ..formats.format import Format

BY_OUTPUTS = re.compile(r"(^|\.)(q_proj|k_proj|v_proj|q_b_proj|kv_b_proj|gate_proj|up_proj|w1|w3|fc1|c_fc)$")
"""The layers that servers cut along the outputs, each rank its own heads or channels."""
BY_INPUTS = re.compile(r"(^|\.)(o_proj|down_proj|w2|fc2)$")
"""Those that they cut along the inputs, and whose outputs the ranks add."""
OF_HEADS = ("q_proj", "q_b_proj", "kv_b_proj")


def uneven_shards(form: Format, ranks: int) -> Iterator[Finding]:
    """Yield quantized layers that can't be cut for `ranks` ranks without cutting a group, a block, a word or a head.

    Outputs of k_proj and v_proj are cut by KV heads, which ranks share where there are fewer of them.
    """
    for layer in form.fitting if ranks > 1 else ():
        shape, codes = form.weight_shape(layer), form.codes_of(layer)
        if shape is None or codes is None:
            continue
        rows, columns = _units(form, layer, shape)
        last, problem = layer.rpartition(".")[2], ""
        if BY_OUTPUTS.search(layer):
            heads, shards = _heads(form, last, ranks)
            if heads and heads % shards:
                problem = f"its {heads} heads can't be shared out among {ranks} ranks"
            elif heads and ranks % shards:
                problem = f"{ranks} ranks can't share its {heads} heads evenly"
            else:
                problem = _uneven("outputs", shape[0], shards, rows)
        elif BY_INPUTS.search(layer):
            problem = _uneven("inputs", shape[1], ranks, columns)
        if problem:
            yield Finding.at(
                codes, problem, f"serve it on another number of ranks than {ranks}, or quantize it otherwise"
            )


def _heads(form: Format, last: str, ranks: int) -> tuple[int, int]:
    """Return the heads that are a layer's outputs, 0 where it isn't known, and how many shards they are cut into."""
    config = form.folder.text_config
    heads = config.get("num_attention_heads")
    if last in ("k_proj", "v_proj"):
        heads = config.get("num_key_value_heads") or heads
        return (heads, min(heads, ranks)) if isinstance(heads, int) and heads > 0 else (0, ranks)
    return (heads if last in OF_HEADS and isinstance(heads, int) else 0), ranks


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

"""Parts of a model that are gone, added or quantized as a whole: heads of several tokens, towers, routers, norms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ...common import counted
from ..folder import NUMBER, Finding, Folder, kind_of, natural
from ..formats.format import Format
from ..tensors import FLOATS
from .shards import absent_shards

SEVERAL_TOKENS = re.compile(r"(^|\.)(mtp|nextn)", re.IGNORECASE)
NEXTN = "num_nextn_predict_layers"
"""The key of DeepSeek and its heirs, whose head of several tokens is a block behind the last one."""
CONFIG = "config.json"
TOWERS = {
    "vision": re.compile(r"(^|\.|_)(vision|visual|vit|image)"),
    "audio": re.compile(r"(^|\.|_)(audio|speech)"),
}
"""The part of a configuration, `X_config` → the names of its layers."""
PRACTICE = {
    "router": (re.compile(r"(^|\.)(router|gate|wg)$"), "a router is kept in 16 bits, for it decides in which expert"),
    "tower": (re.compile(r"vision|visual|audio|projector"), "a vision or audio tower is mostly kept in 16 bits"),
    "head": (re.compile(r"(^|\.)(lm_head|embed_out|output)$"), "the output head is mostly kept in 16 bits"),
    "mtp": (SEVERAL_TOKENS, "a head of several tokens is mostly kept in 16 bits"),
}
"""Layers that most quantizers leave alone: their names, and the practice."""
BUFFERS = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb|inv_freq|position_ids|masked_bias)(\.|$)")
"""What some versions save and others compute: its loss changes nothing."""
_COPY = "copy its tensors from the reference"


def lost_parts(form: Format, reference: Folder) -> Iterator[Finding]:
    """Yield each part of the reference that is gone as a whole, once, however many layers it has.

    A layer beside which the checkpoint has others that the reference lacks was renamed or fused, and isn't gone.
    """
    own = form.folder
    if own.gguf_file:
        return  # its names are others
    if absent := list(absent_shards(own)):
        yield from absent
        return
    tied = bool(own.text_config.get("tie_word_embeddings"))
    mine = set(form.layers_of(list(reference.layers)).items())
    present = {name for name, layer in mine if layer in own.layers}
    ours, theirs = _children(own.layers), _children(reference.layers)
    gone: dict[str, list[str]] = {}
    for layer in reference.layers:
        replaced = layer in present or layer in ours or (tied and layer.rpartition(".")[2] == "lm_head")
        if replaced or BUFFERS.search(layer):
            continue
        top = _top(layer, ours)
        parent = top.rpartition(".")[0]
        if not ours.get(parent, set()) - theirs.get(parent, set()):
            gone.setdefault(top, []).append(layer)
    blocks = reference.text_config.get("num_hidden_layers")
    for top, layers in _joined(gone).items():
        held = "it" if layers == [top] else f"its {counted(len(layers), 'layer')}"
        what = f"gone, the reference has {held}"
        advice = _COPY
        if SEVERAL_TOKENS.search(top) or _beyond(top, blocks):
            what += ": a server's speculative decoding accepts nothing without it"
            advice = f"{_COPY}, and name them in ignore where they are in floats"
        yield Finding(top, top, "", what, advice)


def _children(layers: Mapping[str, object]) -> dict[str, set[str]]:
    """Return each module that holds others → the names of its direct members; the model itself is the empty name."""
    children: dict[str, set[str]] = {}
    for layer in layers:
        parts = layer.split(".")
        for depth in range(len(parts)):
            children.setdefault(".".join(parts[:depth]), set()).add(parts[depth])
    return children


def _top(layer: str, ours: Mapping[str, set[str]]) -> str:
    """Return the outermost module that holds a layer and of which the checkpoint has nothing."""
    parts = layer.split(".")
    for depth, name in enumerate(parts):
        if name not in ours.get(".".join(parts[:depth]), ()):
            return ".".join(parts[: depth + 1])
    return layer


def _joined(gone: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Join what is gone in every block under one name with stars, and leave single blocks as they are."""
    kinds: dict[str, list[str]] = {}
    for top in gone:
        kinds.setdefault(kind_of(top), []).append(top)
    joined: dict[str, list[str]] = {}
    for kind, tops in kinds.items():
        inside_blocks = len(tops) > 1 and not NUMBER.fullmatch(tops[0].rpartition(".")[2])
        for name, members in [(kind, tops)] if inside_blocks else [(top, [top]) for top in tops]:
            joined[name] = [layer for top in members for layer in gone[top]]
    return {name: joined[name] for name in sorted(joined, key=natural)}


def _beyond(name: str, blocks: object) -> bool:
    """Say whether a name is that of a block behind the last one, as DeepSeek stores its head of several tokens."""
    last = name.rpartition(".")[2]
    return isinstance(blocks, int) and last.isdecimal() and int(last) >= blocks


def promised_parts(form: Format) -> Iterator[Finding]:
    """Yield parts that the configuration promises and the files lack, where no reference tells."""
    folder, config = form.folder, form.folder.text_config
    if folder.gguf_file:
        return
    several = _several_key(folder)
    if several and not _has_several(folder):
        what = f"missing, though {several} is {config[several]}: speculative decoding accepts nothing without it"
        where = _place_of_several(folder, several)
        yield Finding(where, where, CONFIG, what, "copy its tensors from the original, or set the key to 0")
    for name, pattern in TOWERS.items():
        if folder.config.get(f"{name}_config") and not any(map(pattern.search, folder.layers)):
            what = f"no layer is named as one, though config.json has a {name}_config"
            yield Finding(name, f"{name}_config", CONFIG, what, "copy the tower from the original")


def of_several_tokens(folder: Folder, tensor: str) -> bool:
    """Say whether a tensor is of a head of several tokens that the configuration promises; transformers runs none."""
    block, blocks = re.match(r"(.+\.)?layers\.\d+(?=\.)", tensor), folder.text_config.get("num_hidden_layers")
    apart = SEVERAL_TOKENS.search(tensor) or (block and _beyond(block[0], blocks))
    return bool(apart and _several_key(folder))


def _several_key(folder: Folder) -> str:
    """Return the key by which the configuration promises a head of several tokens; empty if it doesn't."""
    keys = (NEXTN, "mtp_num_hidden_layers")
    return next((key for key in keys if folder.text_config.get(key)), "")


def _place_of_several(folder: Folder, key: str) -> str:
    """Return the module where the model's class would have the head: a block behind the last one, or `mtp`."""
    blocks = folder.text_config.get("num_hidden_layers")
    if key != NEXTN or not isinstance(blocks, int):
        return "mtp"
    stems = (re.match(r"(.+\.)?layers\.\d+\.", f"{layer}.") for layer in folder.layers)
    stem = next((found[1] or "" for found in stems if found), "model.")
    return f"{stem}layers.{blocks}"


def _has_several(folder: Folder) -> bool:
    blocks = folder.text_config.get("num_hidden_layers")
    numbers = (re.match(r"(.+\.)?layers\.(\d+)\.", f"{layer}.") for layer in folder.layers)
    behind = isinstance(blocks, int) and any(found and int(found[2]) >= blocks for found in numbers)
    return behind or any(map(SEVERAL_TOKENS.search, folder.layers))


def unusual_parts(form: Format, reference: Folder) -> Iterator[Finding]:
    """Yield notes of quantized layers of a kind that the reference has in floats and most quantizers leave alone."""
    found: dict[str, list[str]] = {}
    for layer in () if form.folder.gguf_file else form.folder.layers:
        kind = next((kind for kind, (pattern, _) in PRACTICE.items() if pattern.search(layer)), None)
        theirs = reference.layers.get(layer, {}).get("weight")
        if kind and theirs is not None and theirs.dtype in FLOATS and form.codes_of(layer) is not None:
            found.setdefault(kind, []).append(layer)
    for kind, layers in found.items():
        many = f" ({len(layers)} such layers)" if len(layers) > 1 else ""
        what = f"quantized{many}; {PRACTICE[kind][1]}"
        yield Finding(layers[0], kind_of(layers[0]), "", what, "leave it so only if its loss was measured", note=True)

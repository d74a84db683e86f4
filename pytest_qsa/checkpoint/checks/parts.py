"""Parts of a model that are gone, added or quantized as a whole: heads of several tokens, towers, routers, norms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ...common import counted
from ..folder import NUMBER, Finding, Folder, kind_of, natural
from ..formats.format import Format
from ..tensors import FLOATS, Tensor
from .shards import absent_shards

SEVERAL_TOKENS = re.compile(r"(^|\.)(mtp|nextn)", re.IGNORECASE)
NEXTN = "num_nextn_predict_layers"
"""The key of DeepSeek and its heirs, whose head of several tokens is a block behind the last one."""
BLOCK = re.compile(r"(?P<stem>([^.\d]+\.)*)layers\.(?P<number>\d+)\.")
"""A block of the language model, at the beginning of a layer's name."""
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
ADAPTED = re.compile(r"\.(lora_|ada_?lora|dora_)", re.IGNORECASE)
"""Matrices of an adapter, as PEFT names them within a layer."""
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
    for layer, parts in reference.layers.items():
        replaced = layer in present or layer in own.layers or (tied and layer.rpartition(".")[2] == "lm_head")
        if replaced or BUFFERS.search(layer):
            continue
        if layer in ours:  # its members are there, and its own numbers aren't: sinks, A_log, dt_bias
            renamed = ours[layer] - theirs.get(layer, set())
            gone |= {f"{layer}.{part}": [layer] for part, tensor in parts.items() if not renamed and _counts(tensor)}
            continue
        top = _top(layer, ours)
        parent = top.rpartition(".")[0]
        if not ours.get(parent, set()) - theirs.get(parent, set()):
            gone.setdefault(top, []).append(layer)
    blocks = reference.text_config.get("num_hidden_layers")
    for top, layers in _joined(gone).items():
        held = "it" if len(layers) == 1 and top.startswith(layers[0]) else f"its {counted(len(layers), 'layer')}"
        what = f"gone, the reference has {held}"
        advice = _COPY
        if SEVERAL_TOKENS.search(top) or _beyond(top, blocks):
            what += ": a server's speculative decoding accepts nothing without it"
            advice = f"{_COPY}, and name them in ignore where they are in floats"
        yield Finding(top, top, "", what, advice)


def _counts(tensor: Tensor) -> bool:
    """Say whether a tensor is a number of the model, and not a buffer such as GPT-2's causal mask, `attn.bias`."""
    return not BUFFERS.search(tensor.name) and (tensor.part != "bias" or len(tensor.shape) == 1)


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
    """Say whether a name lies in a block behind the last one, as DeepSeek stores its head of several tokens.

    Experts and the blocks of a tower have numbers of their own.
    """
    block = BLOCK.match(f"{name}.")
    tower = any(pattern.search(name) for pattern in TOWERS.values())
    return isinstance(blocks, int) and block is not None and not tower and int(block["number"]) >= blocks


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
    inner = [part for part in folder.config.values() if isinstance(part, dict)]  # as Qwen-Omni's thinker_config
    for name, pattern in TOWERS.items():
        promised = any(part.get(f"{name}_config") for part in (folder.config, *inner))
        if promised and not any(map(pattern.search, folder.layers)):
            what = f"no layer is named as one, though config.json has {name}_config"
            yield Finding(name, f"{name}_config", CONFIG, what, "copy the tower from the original")


def of_several_tokens(folder: Folder, tensor: str) -> bool:
    """Say whether a tensor is of a head of several tokens that the configuration promises; transformers runs none."""
    apart = SEVERAL_TOKENS.search(tensor) or _beyond(tensor, folder.text_config.get("num_hidden_layers"))
    return bool(apart and _several_key(folder))


def is_uncounted(folder: Folder, tensor: str) -> bool:
    """Say whether a tensor is of a block behind the last one that the configuration counts, and the first has it too.

    A head of several tokens has other tensors.
    """
    alike = BLOCK.sub(lambda found: f"{found['stem']}layers.0.", tensor, count=1)
    return _beyond(tensor, folder.text_config.get("num_hidden_layers")) and alike in folder.tensors


def _several_key(folder: Folder) -> str:
    """Return the key by which the configuration promises a head of several tokens; empty if it doesn't."""
    keys = (NEXTN, "mtp_num_hidden_layers")
    return next((key for key in keys if folder.text_config.get(key)), "")


def _place_of_several(folder: Folder, key: str) -> str:
    """Return the module where the model's class would have the head: a block behind the last one, or `mtp`."""
    blocks = folder.text_config.get("num_hidden_layers")
    if key != NEXTN or not isinstance(blocks, int):
        return "mtp"
    found = next(filter(None, (BLOCK.match(f"{layer}.") for layer in folder.layers)), None)
    return f"{found['stem'] if found else 'model.'}layers.{blocks}"


def _has_several(folder: Folder) -> bool:
    blocks = folder.text_config.get("num_hidden_layers")
    return any(SEVERAL_TOKENS.search(layer) or _beyond(layer, blocks) for layer in folder.layers)


def added_parts(form: Format, reference: Folder) -> Iterator[Finding]:
    """Yield each part that the reference lacks as a whole: a note, for a loader may have a place for it.

    The matrices of an adapter are a problem: they were to be merged, and loaders leave them out.
    """
    own = form.folder
    new = [layer for layer in (() if own.gguf_file else own.layers) if layer not in reference.layers]
    matrices = [layer for layer in new if any(len(tensor.shape) > 1 for tensor in own.layers[layer].values())]
    if not matrices:
        return
    ours, theirs = _children(own.layers), _children(reference.layers)
    tops: dict[str, list[str]] = {}
    for layer in matrices:
        # what the reference has and this one lacks there was renamed or fused; a head that is tied may be written
        top = _top(layer, theirs)
        parent = top.rpartition(".")[0]
        written = layer in theirs or PRACTICE["head"][0].search(layer) or BUFFERS.search(layer)
        fused = parent in reference.layers and parent not in own.layers  # experts in one tensor there
        if not written and not fused and not theirs.get(parent, set()) - ours.get(parent, set()):
            tops.setdefault(top, []).append(layer)
    merged = {top: layers for top, layers in tops.items() if not ADAPTED.search(layers[0])}
    for top, layers in _joined(merged).items():
        what = f"added ({counted(len(layers), 'layer')}), the reference has none"
        yield Finding(layers[0], top, "", what, "see that what serves it has a place for it", note=True)
    if adapted := [layer for layers in tops.values() for layer in layers if ADAPTED.search(layer)]:
        what = f"of an adapter that wasn't merged ({counted(len(adapted), 'such layer')}): loaders leave it out"
        yield Finding(adapted[0], adapted[0], "", what, "merge the adapter, or keep it in a folder of its own")


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

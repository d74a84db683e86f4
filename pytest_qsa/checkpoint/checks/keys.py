"""Which tensors there are: keys that are missing or unexpected, and layers in another format than declared."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from ..folder import NUMBER, Finding, Folder
from ..formats.format import Format
from ..formats.scheme import LayerScheme
from ..tensors import FLOATS, Tensor, element_count, layer_of

SAME_KIND = 0.7
"""Two blocks that share this much of their keys are of one kind: the keys that differ are then a fault."""
FIRST_LACKS = re.compile(r"attn_norm\.")
"""Keys that the first block lacks by design: in ModernBERT the embeddings' norm stands for its own."""
_SAVE = "a loader fills it with random numbers: save or copy the checkpoint again"
_DROPPED = "a loader drops it silently: rename it as its siblings are, or remove it"


def lost_keys(form: Format, reference: Folder | None = None) -> Iterator[Finding]:
    """Yield keys that are missing or unexpected by the number of blocks, or by the sibling blocks.

    What is as odd in the reference is no finding.

    Raises:
        AnomalyError: the configuration counts more blocks than any model has.
    """
    folder = form.folder
    folder.check_counts()
    same = {each.tensor for each in _by_blocks(reference)} if reference and not folder.gguf_file else set()
    yield from (each for each in _by_blocks(folder) if each.tensor not in same and not _left_out(form, each))
    yield from _by_shape(folder)
    yield from form.adapter_findings()


def _by_blocks(folder: Folder) -> Iterator[Finding]:
    containers = _containers(folder)
    trunks = [name for name in containers if _is_trunk(name)]
    for container, blocks in containers.items():
        stated = _stated_count(folder, container) if container in trunks else None
        yield from _by_number(container, blocks, stated)
        yield from _by_siblings(folder, container, blocks)
        if trunks == [container] and stated is not None:
            yield from _behind_the_last(folder, container, blocks, stated)


def _is_trunk(container: str) -> bool:
    """Say whether a list holds the blocks of the language model.

    A tower in front of it, an encoder or a head of several tokens has a count of its own.
    """
    named = container.rpartition(".")[2] in ("layers", "h", "blocks", "blk") and not NUMBER.search(container)
    return named and not any(word in container for word in ("vision", "visual", "audio", "encoder", "mtp"))


def _stated_count(folder: Folder, container: str) -> int | None:
    """Return how many blocks the configuration gives a trunk; None where it doesn't say."""
    own = ("decoder_layers", "num_decoder_layers") if "decoder" in container else ()  # beside an encoder of its own
    stated = (folder.text_config.get(key) for key in (*own, "num_hidden_layers"))
    return next((count for count in stated if isinstance(count, int)), None)


def _containers(folder: Folder) -> Mapping[str, Mapping[int, frozenset[str]]]:
    """Return each numbered list of modules: its name → the keys of its members, by number."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    shared: dict[str, str] = {}
    for name in folder.tensors:
        for match in NUMBER.finditer(name):
            if rest := name[match.end() + 1 :]:
                container = name[: match.start()].rstrip(".")
                found[container][int(match[0])].add(shared.setdefault(rest, rest))
    return {name: {i: frozenset(blocks[i]) for i in sorted(blocks)} for name, blocks in found.items()}


def _by_number(container: str, blocks: Mapping[int, frozenset[str]], stated: int | None) -> Iterator[Finding]:
    if stated is None and not any("." in key for keys in blocks.values() for key in keys):
        return  # the layers of a sequence, between which stand activations without tensors
    count = max(max(blocks) + 1, stated or 0)
    for number in range(count):
        if number not in blocks and len(blocks) > 1:
            name = f"{container}.{number}"
            yield Finding(name, name, "", f"missing: {len(blocks)} of {count} members of {container} are there", _SAVE)


def _behind_the_last(
    folder: Folder, container: str, blocks: Mapping[int, frozenset[str]], stated: int
) -> Iterator[Finding]:
    """Yield the blocks that the configuration doesn't count; a head of several tokens there has keys of its own."""
    kinds = {keys for number, keys in blocks.items() if number < stated}
    for number, keys in blocks.items():
        if number >= stated and keys in kinds:
            name = f"{container}.{number}"
            file = folder.tensors[f"{name}.{min(keys)}"].file
            what = f"unexpected: num_hidden_layers is {stated}, and {container} has {len(blocks)} members"
            yield Finding(
                name, name, file, what, "correct that number: a loader drops the blocks that it doesn't count"
            )


def _by_siblings(folder: Folder, container: str, blocks: Mapping[int, frozenset[str]]) -> Iterator[Finding]:
    """Yield the keys by which a single block differs from the kind of block that it resembles most."""
    kinds = Counter(blocks.values())
    for number, keys in blocks.items():
        if kinds[keys] > 1 or len(blocks) < 3:  # two blocks don't say which of them is wrong
            continue
        nearest = max((kind for kind in kinds if kinds[kind] > 1), key=lambda kind: _alike(kind, keys), default=keys)
        # a block that only lacks keys is damaged, however many; one with keys of its own may be of another kind
        if not keys < nearest and _alike(nearest, keys) < SAME_KIND:
            continue
        first = number == min(blocks)
        for rest in sorted(nearest - keys):
            if first and FIRST_LACKS.match(rest):
                continue
            name = f"{container}.{number}.{rest}"
            yield Finding(layer_of(name), name, "", f"missing: {kinds[nearest]} sibling blocks have it", _SAVE)
        # What is shared by all blocks lies in the first one, as T5's relative_attention_bias and RWKV's pre_ln.
        for rest in sorted(() if first and nearest < keys else keys - nearest):
            tensor = folder.tensors[f"{container}.{number}.{rest}"]
            yield Finding.at(tensor, f"unexpected: none of {kinds[nearest]} sibling blocks has it", _DROPPED)


def _left_out(form: Format, finding: Finding) -> bool:
    """Say whether a key is other than the siblings' because the configuration leaves its layer alone in floats."""
    layer, declaration = finding.layer, form.declaration
    if not declaration.names_layers or form.scheme_of(layer) is not None or "weight" not in form.parts(layer):
        return False
    schemes = [scheme for _, scheme in declaration.groups]
    quantized = {part for each in schemes for part in each.allowed.union(*each.required)} - {"bias"}
    return finding.tensor[len(layer) + 1 :] in quantized | {"weight"}


def _alike(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def _by_shape(folder: Folder) -> Iterator[Finding]:
    """Yield embeddings whose rows contradict the vocabulary, and an output head that a model without ties lacks."""
    config = folder.text_config
    vocabulary = config.get("vocab_size")
    tables = [tensor for tensor in folder.tensors.values() if _is_table(tensor)]
    for tensor in tables:
        if isinstance(vocabulary, int) and tensor.shape[0] < vocabulary:
            what = f"{tensor.shape[0]} rows, but the vocabulary has {vocabulary} tokens"
            yield Finding.at(tensor, what, "correct vocab_size, or take the embeddings from the original")
    causal = any("ForCausalLM" in str(name) for name in config.get("architectures") or ())
    heads = [layer for layer in folder.layers if layer.rpartition(".")[2] in ("lm_head", "output", "embed_out")]
    if causal and config.get("tie_word_embeddings") is False and tables and not heads:
        yield Finding("lm_head", "lm_head.weight", "", "missing, though tie_word_embeddings is false", _SAVE)


def _is_table(tensor: Tensor) -> bool:
    last = tensor.layer.rpartition(".")[2]
    return tensor.part == "weight" and len(tensor.shape) == 2 and last in ("embed_tokens", "wte", "tok_embeddings")


def misplaced_formats(form: Format) -> Iterator[Finding]:
    """Yield layers left unquantized or quantized against the configuration, and those stored in another format.

    Where the configuration names no layers (torchao, bitsandbytes), a layer is held against its siblings.
    """
    if not form.declaration.names_layers:
        yield from _against_siblings(form)
        return
    # a head that is tied to the embeddings is stored in floats, and the configuration may still target it
    tied = form.folder.text_config.get("tie_word_embeddings", False)
    for layer in form.folder.layers:
        if tied and layer.rpartition(".")[2] == "lm_head":
            yield from _tied_codes(form, layer)
        elif form.is_linear(layer):
            yield from _against_config(form, layer)


def _tied_codes(form: Format, layer: str) -> Iterator[Finding]:
    codes, table = form.codes_of(layer), next((each for each in form.folder.tensors.values() if _is_table(each)), None)
    if codes is not None and table is not None and table.dtype in FLOATS:
        what = f"quantized, though it is tied to {table.name}, which is in {table.dtype}: loaders differ here"
        yield Finding.at(codes, what, "leave it out of the files, or set tie_word_embeddings to false")


def _against_config(form: Format, layer: str) -> Iterator[Finding]:
    codes, scheme = form.codes_of(layer), form.scheme_of(layer)
    if codes is None:
        weight = form.parts(layer)["weight"]
        if scheme is not None and scheme.form != "dense":
            declared = f"though the configuration quantizes it ({form.label}, {scheme.form})"
            advice = "quantize it, or name it in ignore"
            yield Finding.at(weight, f"left in {weight.dtype}, {declared}", advice)
    elif scheme is None:
        advice = "restore it from the original, or take it out of ignore"
        yield Finding.at(codes, "quantized, though the configuration leaves it out", advice)
    elif scheme.dtypes and codes.dtype not in scheme.dtypes:
        what = f"stored as {codes.dtype}, but {scheme.form} with {scheme.bits} bits is stored as {scheme.dtypes[0]}"
        advice = "correct the format of its config group, or quantize the layer again"
        yield Finding.at(codes, what, advice)
    elif what := _beyond_bits(form, layer, codes, scheme):
        yield Finding.at(codes, what, "correct num_bits, or quantize the layer again")


def _beyond_bits(form: Format, layer: str, codes: Tensor, scheme: LayerScheme) -> str:
    """Say which codes of a byte each the declared bits can't hold, by a sample of the rows; empty for none."""
    if codes.dtype != "I8" or codes.part != "weight" or not 0 < scheme.bits < 8 or not element_count(codes):
        return ""
    values, most = form.words(layer, codes)[0].view(np.int8), 1 << (scheme.bits - 1)
    low, high = int(values.min()), int(values.max())
    if -most <= low and high < most:
        return ""
    return f"codes from {low} to {high}, but {scheme.bits} bits hold {-most} to {most - 1}"


def _against_siblings(form: Format) -> Iterator[Finding]:
    kinds: dict[str, dict[str, str]] = {}
    for layer in form.folder.layers:
        weight = form.weight_of(layer)
        if weight is not None and len(weight.shape) >= 2:
            kinds.setdefault(form.folder.kinds[layer], {})[layer] = weight.dtype
    for kind, members in kinds.items():
        (common, many), *_ = Counter(members.values()).most_common(1)
        for layer, dtype in members.items():
            weight = form.weight_of(layer)
            if weight is not None and dtype != common and many > len(members) / 2:
                what = f"stored as {dtype}, {many} of its siblings {kind} as {common}"
                advice = "quantize all of them alike, or name it in the configuration"
                yield Finding.at(weight, what, advice)

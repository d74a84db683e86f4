"""Faults within one layer's tensors: its scales, codes, zero points, biases and norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ...checkpoint import (
    FLOATS,
    FUSED_LAYERS,
    NUMBER,
    WHOLE_SCALES,
    BlockTensor,
    Folder,
    Tensor,
    element_count,
    format_of,
)
from .fault import Faults, Targets, codes_of, quantized, scale_of, spread_rows, stop_tokens
from .mutant import Mutant

TENSOR_FAULTS = Faults()


def _edit_scales(mutant: Mutant, layer: str) -> AbstractContextManager[NDArray[np.float64]]:
    return mutant.edit_values(scale_of(mutant.source, layer).name)


@contextmanager
def _edit_codes(mutant: Mutant, layer: str) -> Iterator[Array]:
    """Yield the raw codes of a layer [outputs, words], to be changed in place; of GGUF's blocks, the bytes of codes."""
    tensor = codes_of(mutant.source, layer)
    with mutant.edit(tensor.name) as raw:
        if not isinstance(tensor, BlockTensor):
            yield format_of(mutant.source).by_output(layer, raw)
            return
        codes = tensor.codes(raw)
        yield codes
        raw[...] = tensor.with_codes(raw, codes)


def _many_scales(folder: Folder) -> list[str]:
    return [name for name in quantized(folder) if element_count(scale_of(folder, name)) > 1]


def _packed(folder: Folder) -> list[str]:
    """Return the layers whose codes have 4 bits, two in a byte."""
    form = format_of(folder)
    return [name for name in quantized(folder) if form.code_bits(name, codes_of(folder, name)) == 4]


def _whole_codes(folder: Folder) -> list[str]:
    return [name for name in quantized(folder) if codes_of(folder, name).dtype == "I8"]


def _zero_points(folder: Folder) -> list[str]:
    form = format_of(folder)
    return [name for name in quantized(folder) if form.zero_point_of(name)] or _whole_codes(folder)


@TENSOR_FAULTS.add(quantized, "× scale", neutral=1.0, default=2.0, strongest=16.0)
def scale_layer(mutant: Mutant, layer: str, strength: float) -> None:
    """All scales of one layer × s."""
    with _edit_scales(mutant, layer) as values:
        values *= strength


@TENSOR_FAULTS.add(_many_scales, "× scale", neutral=1.0, default=8.0, strongest=4096.0)
def scale_channel(mutant: Mutant, layer: str, strength: float) -> None:
    """The scale of one channel × s."""
    _one_scale(mutant, layer, strength)


def _one_scale(mutant: Mutant, layer: str, factor: float, many: int = 1) -> None:
    with _edit_scales(mutant, layer) as values:
        values.flat[spread_rows(values.size, many / values.size)] *= factor


@TENSOR_FAULTS.add(_many_scales, "scales", default=1.0, strongest=256.0, whole=True)
def zero_scale(mutant: Mutant, layer: str, strength: float) -> None:
    """The scale of one group (of one channel, without groups) zeroed."""
    _one_scale(mutant, layer, 0.0, int(strength))


@TENSOR_FAULTS.add(quantized, "scales", default=1.0, strongest=256.0, whole=True)
def nan_scale(mutant: Mutant, layer: str, strength: float) -> None:
    """The scale of one group (of one channel, without groups) NaN."""
    _one_scale(mutant, layer, float("nan"), int(strength))


def _own_scales(folder: Folder) -> list[str]:
    return [name for name in quantized(folder) if not isinstance(scale_of(folder, name), BlockTensor)]


@TENSOR_FAULTS.add(_own_scales)
def scale_dropped(mutant: Mutant, layer: str, strength: float) -> None:
    """The scales of one layer left out of the file."""
    mutant.drop(scale_of(mutant.source, layer).name)


@TENSOR_FAULTS.add(quantized, "of the rows")
def weights_constant(mutant: Mutant, layer: str, strength: float) -> None:
    """The rows of one layer's weight one code throughout."""
    form, tensor = format_of(mutant.source), codes_of(mutant.source, layer)
    with _edit_codes(mutant, layer) as codes:
        # `or 1`: code 0 throughout would be a layer of zeros, which is another fault. Codes of 3 bits lie in two words
        # here and there, so that words which are equal aren't one code, but for words of ones.
        same = 32 % form.code_bits(layer, tensor) == 0
        codes[spread_rows(len(codes), strength)] = (codes.flat[0] or 1) if same else -1


@TENSOR_FAULTS.add(_packed, "of the rows")
def nibbles_swapped(mutant: Mutant, layer: str, strength: float) -> None:
    """The two 4-bit halves of each byte swapped (4-bit checkpoints)."""
    with _edit_codes(mutant, layer) as codes:
        rows = spread_rows(len(codes), strength)
        halves = np.ascontiguousarray(codes[rows]).view(np.uint8)
        codes[rows] = ((halves >> 4) | (halves << 4)).view(codes.dtype)


@TENSOR_FAULTS.add(quantized, "of the rows")
def rows_permuted(mutant: Mutant, layer: str, strength: float) -> None:
    """The rows of one layer's weight in another order, their scales in the old one."""
    with _edit_codes(mutant, layer) as codes:
        # One row alone has no other order.
        rows = spread_rows(len(codes), max(strength, 2 / len(codes)))
        codes[rows] = codes[np.roll(rows, 1)]


def _with_sibling(first: str, second: str) -> Targets:
    def targets(folder: Folder) -> list[str]:
        names = quantized(folder)
        found = [name for name in names if name.rpartition(".")[2] == first]
        return [name for name in found if f"{name.rpartition('.')[0]}.{second}" in names]

    return targets


@TENSOR_FAULTS.add(_with_sibling("q_proj", "k_proj"), "of the rows", names="q or k")
def scales_swapped(mutant: Mutant, layer: str, strength: float) -> None:
    """The scales of q and k swapped; where k has fewer rows, as many of them."""
    other = f"{layer.rpartition('.')[0]}.k_proj"
    with _edit_scales(mutant, layer) as q, _edit_scales(mutant, other) as k:
        # GPTQ has its outputs in the last dimension, so that any of them may be shorter in k.
        both = tuple(map(slice, map(min, q.shape, k.shape)))
        one, two = q[both or ...], k[both or ...]
        rows = spread_rows(len(one), strength) if one.ndim else ...
        # Copies, because a view of one side would already show the numbers of the other.
        one[rows], two[rows] = two[rows].copy(), one[rows].copy()


@TENSOR_FAULTS.add(_zero_points, "steps", default=1.0, strongest=16.0, whole=True)
def zero_point_shifted(mutant: Mutant, layer: str, strength: float) -> None:
    """The zero point of one layer + n; without zero points its codes + n, as a reader that is off by n sees them."""
    form, codes = format_of(mutant.source), codes_of(mutant.source, layer)
    tensor = form.zero_point_of(layer) or codes
    if tensor.dtype in FLOATS:
        with mutant.edit_values(tensor.name) as values:
            values += strength * form.zero_point_step(layer)
        return
    with mutant.edit(tensor.name) as raw:
        # Packed zero points: one int32 holds several of them.
        if raw.dtype == np.int32:
            raw[...] = _added(raw, int(strength), form.code_bits(layer, codes))
        else:
            info = np.iinfo(raw.dtype)
            raw[...] = np.clip(raw.astype(np.int32) + int(strength), info.min, info.max).astype(raw.dtype)


def _added(words: NDArray[np.int32], step: int, bits: int) -> NDArray[np.int32]:
    """Add a step to each number of packed words, without a carry; numbers of 3 bits go on in the next word of a row."""
    stream = np.unpackbits(np.ascontiguousarray(words, "<i4").view(np.uint8), axis=-1, bitorder="little")
    size = stream.shape[-1] // bits * bits
    digits = stream[..., :size].reshape(*stream.shape[:-1], -1, bits)
    numbers = np.packbits(digits, axis=-1, bitorder="little") + np.uint8(step % (1 << bits))
    stream[..., :size] = np.unpackbits(numbers, axis=-1, count=bits, bitorder="little").reshape(
        *stream.shape[:-1], size
    )
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def _readable_codes(folder: Folder) -> list[str]:
    form = format_of(folder)
    return [name for name in _whole_codes(folder) if form.stored_rows(name, slice(0, 1)) is not None]


@TENSOR_FAULTS.add(_readable_codes)
def layer_unquantized(mutant: Mutant, layer: str, strength: float) -> None:
    """One layer left unquantized: its weight in 16 bits, its scales gone (8-bit checkpoints)."""
    weight = format_of(mutant.source).stored_rows(layer)
    assert weight is not None
    mutant.replace(codes_of(mutant.source, layer).name, "BF16", weight)
    mutant.drop(scale_of(mutant.source, layer).name)


def _with_next(folder: Folder) -> list[str]:
    """Return the quantized layers whose namesake in the next block has tensors of the same dtypes and shapes."""
    shapes: dict[str | None, dict[str, tuple[str, tuple[int, ...]]]] = {
        layer: {part: (tensor.dtype, tensor.shape) for part, tensor in parts.items()}
        for layer, parts in folder.layers.items()
    }
    return [name for name in quantized(folder) if shapes[name] == shapes.get(_next(name))]


def _next(layer: str) -> str | None:
    match = NUMBER.search(layer)
    return f"{layer[: match.start()]}{int(match[0]) + 1}{layer[match.end() :]}" if match else None


@TENSOR_FAULTS.add(_with_next, names="one of the two")
def weights_exchanged(mutant: Mutant, layer: str, strength: float) -> None:
    """The weights of two neighbouring blocks exchanged, scales and all."""
    other = _next(layer)
    assert other is not None
    for part, tensor in mutant.source.layers[layer].items():
        mine, theirs = tensor.name, mutant.source.layers[other][part].name
        one, two = mutant.raw(mine), mutant.raw(theirs)
        mutant.put(mine, two)
        mutant.put(theirs, one)


def _norms(folder: Folder) -> list[str]:
    found = {name: parts for name, parts in folder.layers.items() if "norm" in name.rpartition(".")[2]}
    return [name for name, parts in found.items() if "weight" in parts and len(parts["weight"].shape) == 1]


def _stop_rows(folder: Folder) -> list[str]:
    """Return the layer that makes the logits, where it is in floats and the checkpoint says which token ends an answer.

    A head that is tied is the embedding, whose rows a norm follows, so that of one the size shows in the logits alone.
    """
    tied = [name for name in folder.layers if name.rpartition(".")[2] in ("embed_tokens", "wte", "embed_in")]
    heads = [name for name in folder.layers if name.rpartition(".")[2] in ("lm_head", "embed_out")] or tied[:1]
    found = [name for name in heads if (own := folder.tensors.get(f"{name}.weight")) and own.dtype in FLOATS]
    return found if not folder.gguf_file and _stop_row(folder) is not None else []


def _stop_row(folder: Folder) -> int | None:
    tokens = stop_tokens(folder) or stop_tokens(folder, "config.json")
    return tokens[0] if tokens else None


@TENSOR_FAULTS.add(_stop_rows, "× row", neutral=1.0, default=0.9, strongest=0.5)
def stop_row_scaled(mutant: Mutant, layer: str, strength: float) -> None:
    """The row of the head for the token that ends an answer × s: answers end later, or never."""
    row = _stop_row(mutant.source)
    assert row is not None
    with mutant.edit_values(f"{layer}.weight") as values:
        values[row] *= strength


@TENSOR_FAULTS.add(_norms, "× weight", neutral=1.0, default=1.5, strongest=16.0)
def norm_scaled(mutant: Mutant, layer: str, strength: float) -> None:
    """The weight of one norm × s."""
    with mutant.edit_values(f"{layer}.weight") as values:
        values *= strength


def _experts(folder: Folder) -> list[str]:
    """Return the layers of experts, those that lie packed in a tensor of all experts too."""
    form = format_of(folder)
    holders = {name for holder, _, place in form.experts.values() for name in (holder, f"{holder}.{place.tensor}")}
    own = [
        layer
        for layer, parts in folder.layers.items()
        if "experts" in layer.split(".") and (form.codes_of(layer) or len(next(iter(parts.values())).shape) >= 2)
    ]
    return [*(layer for layer in own if layer not in holders), *form.experts]


@TENSOR_FAULTS.add(_experts, "of the rows")
def expert_reinitialised(mutant: Mutant, layer: str, strength: float) -> None:
    """The weight of one expert random, as a loader leaves what it can't map (mixtures of experts)."""
    form = format_of(mutant.source)
    holder, index, place = form.experts.get(layer, ("", 0, None))
    name = f"{holder}.{place.tensor}" if place else layer
    # Experts that lie packed in floating point are tensors of the module that holds them.
    parts = mutant.source.layers.get(name) or {name: mutant.source.tensors[name]}
    tensor = form.codes_of(name) or next(t for t in parts.values() if len(t.shape) >= 2)
    # A fixed seed, so that a self-test finds the same again.
    random = np.random.default_rng(0)
    edit = mutant.edit_values if tensor.dtype in FLOATS else mutant.edit
    with edit(tensor.name) as whole:
        values = place.of(whole[index]) if place else whole
        rows = spread_rows(len(values), strength)
        if tensor.dtype in FLOATS:
            values[rows] = random.normal(0.0, 0.02, values[rows].shape)
        else:
            values[rows] = random.permutation(values[rows].ravel()).reshape(values[rows].shape)


def _embeddings(folder: Folder) -> list[str]:
    names = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "token_embd")
    return [name for name in folder.layers if name.rpartition(".")[2] in names]


@TENSOR_FAULTS.add(_embeddings, "rows", default=1.0, strongest=16384.0, whole=True)
def embedding_zeroed(mutant: Mutant, layer: str, strength: float) -> None:
    """One row of the embedding zeroed; of more than one, evenly spaced ones."""
    with mutant.edit(f"{layer}.weight") as raw:
        raw[spread_rows(len(raw), strength / len(raw)) if strength > 1 else [len(raw) // 2]] = 0


def _channelwise(folder: Folder) -> list[str]:
    """Return the layers with a scale a row: where the largest is the channel that stands out."""
    layers = [
        name
        for name in _many_scales(folder)
        if element_count(scale_of(folder, name)) == codes_of(folder, name).shape[0]
    ]
    return [name for name in layers if name.rpartition(".")[2] in ("down_proj", "o_proj")] or layers


@TENSOR_FAULTS.add(_channelwise, "÷ scale", neutral=1.0, default=4.0, strongest=4096.0)
def outlier_clipped(mutant: Mutant, layer: str, strength: float) -> None:
    """The channel that stands out clipped: the largest scale of a layer that writes the residual stream ÷ s."""
    with _edit_scales(mutant, layer) as values:
        values.flat[int(np.argmax(values))] /= strength


def _kv_biases(folder: Folder) -> list[str]:
    ends = ("k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "key", "value")
    return [n for n, parts in folder.layers.items() if "bias" in parts and n.rpartition(".")[2] in ends]


@TENSOR_FAULTS.add(_kv_biases, "of the bias")
def kv_bias_dropped(mutant: Mutant, layer: str, strength: float) -> None:
    """The bias of a key or value projection × (1 − s): zeros where it is dropped whole."""
    with mutant.edit_values(f"{layer}.bias") as values:
        values *= 1 - strength


def _signed(folder: Folder) -> list[str]:
    return _whole_codes(folder) or [name for name in quantized(folder) if codes_of(folder, name).dtype == "F8_E4M3"]


@TENSOR_FAULTS.add(_signed, "of the rows")
def signs_lost(mutant: Mutant, layer: str, strength: float) -> None:
    """The signs of one layer's weights lost (8-bit checkpoints)."""
    with _edit_codes(mutant, layer) as raw:
        rows = spread_rows(len(raw), strength)
        if raw.dtype == np.int8:
            # The absolute value of −128 does not fit into int8.
            raw[rows] = np.abs(np.maximum(raw[rows], -127))
        else:
            # The sign of an FP8 number is its highest bit.
            raw[rows] &= 0x7F


def _kv_scales(folder: Folder) -> list[Tensor]:
    """Return the static scales of the KV cache, in the order of the layers."""
    own = [tensor for tensor in folder.tensors.values() if tensor.part in ("k_scale", "v_scale", "kv_scale")]
    outputs = (tensor for tensor in folder.tensors.values() if tensor.part == "output_scale")
    return [*own, *(tensor for tensor in outputs if tensor.layer.endswith(("k_proj", "v_proj")))]


def _with_kv_scales(folder: Folder) -> list[str]:
    return [] if folder.gguf_file else list(dict.fromkeys(tensor.layer for tensor in _kv_scales(folder)))


def _share_of_kv_scales(folder: Folder, share: float) -> list[Tensor]:
    layers = _with_kv_scales(folder)
    chosen = {layers[index] for index in spread_rows(len(layers), share).tolist()}
    return [tensor for tensor in _kv_scales(folder) if tensor.layer in chosen]


@TENSOR_FAULTS.add(_with_kv_scales, "of the layers", names="one of the layers")
def kv_scales_one(mutant: Mutant, layer: str, strength: float) -> None:
    """The scales of the KV cache 1.0, as a calibration that saw no data leaves them."""
    for tensor in _share_of_kv_scales(mutant.source, strength):
        with mutant.edit_values(tensor.name) as values:
            values[...] = 1.0


@TENSOR_FAULTS.add(_with_kv_scales, "of the layers", names="one of the layers")
def kv_scales_lost(mutant: Mutant, layer: str, strength: float) -> None:
    """The scales of the KV cache left out of the file, though the configuration declares them."""
    for tensor in _share_of_kv_scales(mutant.source, strength):
        mutant.drop(tensor.name)


def _whole_scale(folder: Folder, layer: str) -> Tensor | None:
    """Return NVFP4's scale of the whole tensor, beside the scales of its blocks."""
    parts = folder.layers.get(layer, {})
    return next((parts[part] for part in WHOLE_SCALES if part in parts), None)


def _fused_whole_scales(folder: Folder) -> list[str]:
    """Return the last layer of each fused group whose members have one scale of the whole tensor."""
    found = []
    for layer in quantized(folder):
        stem, dot, last = layer.rpartition(".")
        for names in (names for names in FUSED_LAYERS if names[-1] == last):
            group = [_whole_scale(folder, f"{stem}{dot}{name}") for name in names]
            values = {scale and scale.raw().tobytes() for scale in group}
            if len(values) == 1 and None not in values:
                found.append(layer)
    return found


@TENSOR_FAULTS.add(_fused_whole_scales, "× scale", neutral=1.0, default=2.0, strongest=4.0)
def global_scale_unfused(mutant: Mutant, layer: str, strength: float) -> None:
    """The global scale of one layer of a fused group × s, its blocks' ÷ s: a server takes one of them for all."""
    whole = _whole_scale(mutant.source, layer)
    assert whole is not None
    with _edit_scales(mutant, layer) as blocks, mutant.edit_values(whole.name) as scale:
        blocks /= strength
        # compressed-tensors divides by its global scale, the others multiply
        scale *= 1 / strength if whole.part == "weight_global_scale" else strength

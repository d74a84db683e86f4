"""Faults of order: healthy numbers in the place of others, so that no statistic of a tensor shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ...checkpoint import AWQ_ORDER, NUMBER, Folder, Tensor, element_count, format_of, unpacked
from .fault import Faults, spread_rows
from .mutant import Mutant

ORDER_FAULTS = Faults()
OF_INPUTS = re.compile(r"^(input|output|k_|v_|q_)|g_idx|pre_quant_scale|weight_shape|weight\.(nested_)?quant_")
"""The parts of a layer that have no entry for an output of its weight."""


def _blocks(folder: Folder) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each block by the name of the block, under their names within it."""
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in folder.tensors.items():
        if match := NUMBER.search(name):
            blocks.setdefault(name[: match.end()], {})[name[match.end() :]] = tensor
    return blocks


def _before(block: str) -> str:
    stem, dot, number = block.rpartition(".")
    return f"{stem}{dot}{int(number) - 1}"


def _form(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {part: (tensor.dtype, tensor.shape) for part, tensor in tensors.items()}


def _with_block_before(folder: Folder) -> list[str]:
    forms = {block: _form(tensors) for block, tensors in _blocks(folder).items()}
    return [block for block, form in forms.items() if form == forms.get(_before(block))]


@ORDER_FAULTS.add(_with_block_before, names="a layer of the block")
def layer_copied(mutant: Mutant, layer: str, strength: float) -> None:
    """One block a copy of the one before it, as an export that counts the blocks wrongly writes it."""
    blocks = _blocks(mutant.source)
    for part, tensor in blocks[layer].items():
        mutant.put(tensor.name, mutant.raw(blocks[_before(layer)][part].name))


def _interleaved(folder: Folder, layer: str) -> dict[str, Array] | None:
    """Return a layer's tensors with the rows of each head as rope(x₀, x₁, x₂ …) has them; None if that can't be."""
    form, config = format_of(folder), folder.text_config
    weight, shape = form.weight_of(layer), form.weight_shape(layer)
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (width // heads if heads and width else 0)
    if weight is None or shape is None or not size or shape[0] % size or size % 2:
        return None
    outputs, bits = shape[0], form.code_bits(layer, codes) if (codes := form.codes_of(layer)) else 0
    lanes = AWQ_ORDER if getattr(form, "packing", "") == "gemm" else tuple(range(32 // bits if bits else 0))
    # AutoGPTQ's words have their outputs in columns, and so has what is beside them
    columns = weight.part == "qweight" and getattr(form, "packing", "") != "gemv"
    # bitsandbytes' 4 bits have their rows, and the blocks of them, one after the other
    flat = weight.part == "weight" and weight.shape[1:] == (1,)
    if len(weight.shape) != 2 or (weight.shape[0] != outputs and not columns and not flat):
        return None
    axis = -1 if columns else 0
    order = np.arange(outputs).reshape(-1, 2, size // 2).transpose(0, 2, 1).ravel()
    changed = {}
    for part, tensor in form.parts(layer).items():
        raw = tensor.raw()
        if OF_INPUTS.search(part) or not raw.ndim:
            continue
        if raw.shape[axis] == outputs:
            changed[tensor.name] = np.take(raw, order, axis)
        elif flat and part in ("weight", "weight.absmax") and raw.size % outputs == 0:
            changed[tensor.name] = raw.reshape(outputs, -1)[order].reshape(raw.shape)
        elif tensor.dtype == "I32" and raw.ndim == 2 and raw.shape[axis] * len(lanes) == outputs and 32 % bits == 0:
            words = raw if columns else raw.T
            moved = _moved(np.ascontiguousarray(words).view(np.uint32), bits, lanes, order)
            changed[tensor.name] = np.ascontiguousarray(moved if columns else moved.T)
        elif not _holds_whole_heads(tensor, raw, axis, outputs, size):
            return None
    return changed


def _moved(words: NDArray[np.uint32], bits: int, lanes: Sequence[int], order: NDArray[np.intp]) -> NDArray[np.int32]:
    """Return words [rows, words] that hold the numbers of several outputs each, the outputs in another order.

    `lanes`: the place in a word, from its lowest bits, of each of its outputs.
    """
    many, outputs = len(lanes), np.arange(len(order))
    place = outputs // many * many + np.asarray(lanes)[outputs % many]
    numbers = unpacked(words, bits)
    moved = np.empty_like(numbers)
    moved[:, place] = numbers[:, place[order]]
    parts = moved.reshape(len(words), -1, many).astype(np.uint32) << np.arange(0, 32, bits, dtype=np.uint32)
    found: NDArray[np.uint32] = np.bitwise_or.reduce(parts, axis=2)
    return found.view(np.int32)


def _holds_whole_heads(tensor: Tensor, raw: Array, axis: int, outputs: int, size: int) -> bool:
    """Say whether an order within the heads leaves a tensor as it is: one number, equal ones, or blocks of heads."""
    if element_count(tensor) == 1 or bool((raw == raw.flat[0]).all()):
        return True
    entries = int(raw.shape[axis])
    packed = tensor.dtype == "I32"  # numbers of a size that no word holds whole
    return not packed and outputs % entries == 0 and outputs // entries % size == 0


def _queries_and_keys(folder: Folder) -> list[str]:
    names = [name for name in folder.layers if name.rpartition(".")[2] in ("q_proj", "k_proj")]
    # llama.cpp's own order is the other one
    return [] if folder.gguf_file or any(_interleaved(folder, name) is None for name in names[:2]) else names


@ORDER_FAULTS.add(_queries_and_keys, "of the layers", names="one of the layers")
def rope_interleaved(mutant: Mutant, layer: str, strength: float) -> None:
    """The rows of q and k in the rope's other layout, real and imaginary parts alternating, scales and all."""
    layers = _queries_and_keys(mutant.source)
    for index in spread_rows(len(layers), strength).tolist():
        for name, raw in (_interleaved(mutant.source, layers[index]) or {}).items():
            mutant.put(name, raw)


def _expert_tensors(folder: Folder) -> dict[str, dict[str, Sequence[Tensor]]]:
    """Return the module of experts → name within an expert → the tensors of all experts, in the order of numbers."""
    found: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in folder.tensors.items():
        if match := re.match(r"(.*\.experts)\.(\d+)\.(.+)$", name):
            found.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
    return {
        module: {part: [tensors[number] for number in sorted(tensors)] for part, tensors in parts.items()}
        for module, parts in found.items()
    }


def _packed_expert_tensors(folder: Folder) -> dict[str, list[Tensor]]:
    """Return the module that holds packed experts → its tensors [experts, …]."""
    found: dict[str, list[Tensor]] = {}
    for holder, index, _ in format_of(folder).experts.values():
        if index == 0 and holder not in found:
            inside = (tensor for tensor in folder.tensors.values() if tensor.name.startswith(f"{holder}."))
            found[holder] = [tensor for tensor in inside if tensor.shape]
    return found


def _modules_of_experts(folder: Folder) -> list[str]:
    own = [
        module
        for module, parts in _expert_tensors(folder).items()
        if all(len({(tensor.dtype, tensor.shape) for tensor in tensors}) == 1 for tensors in parts.values())
        and len(next(iter(parts.values()))) > 1
    ]
    return own + list(_packed_expert_tensors(folder))


def _as_text(count: int) -> NDArray[np.int64]:
    """Return the numbers of experts sorted as text: 0, 1, 10, 11, 2; up to ten, which text sorts rightly, rolled."""
    order = sorted(range(count), key=str)
    return np.array(order if count > 10 else np.roll(order, 1))


@ORDER_FAULTS.add(_modules_of_experts, names="an expert of the block")
def experts_permuted(mutant: Mutant, layer: str, strength: float) -> None:
    """The experts of one block in another order than the router's: sorted as text (10 before 2), or moved on by one."""
    for tensors in _expert_tensors(mutant.source).get(layer, {}).values():
        for tensor, other in zip(tensors, _as_text(len(tensors)).tolist(), strict=True):
            mutant.put(tensor.name, mutant.source.tensors[tensors[other].name].raw())
    for tensor in _packed_expert_tensors(mutant.source).get(layer, []):
        mutant.put(tensor.name, np.array(tensor.raw())[_as_text(tensor.shape[0])])

"""Weights that a checkpoint has twice: a layer that was copied over another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..copies import Recognizer, place_of, recognizer_of
from ..files import Files
from ..folder import Finding
from ..tensors import Tensor

PIECE = 1 << 12
"""The bytes at the start, in the middle and at the end of a tensor that are hashed; equal hashes are then confirmed."""


def repeated_weights(files: Files) -> Iterator[Finding]:
    """Yield the weights that are another layer's to the last bit, though the reference has two different ones there.

    Without a reference it is one note, for a model that was made deeper by copies has such layers too.
    """
    groups = equal_weights(files)
    if files.reference is None or not files.reference.files:
        groups = equal_blocks(files)
        if groups:
            first, second = groups[0][:2]
            count = sum(len(group) - 1 for group in groups)
            more = f", and {count - 1} more repeat one" if count > 1 else ""
            what = f"the weight of {first.layer} to the last bit{more}"
            advice = "name model.reference: only the original shows whether they are meant so"
            yield Finding.at(second, what, advice, note=True)
        return
    recognizer = recognizer_of(files)
    for group in groups:
        own = next((tensor for tensor in group if _is_own(recognizer, tensor.layer)), None)
        for tensor in group:
            if own is None or tensor is own or not _differ_in_reference(recognizer, own.layer, tensor.layer):
                continue
            if (found := recognizer.find(tensor.layer)) is None or not found.own:
                what = f"the weight of {own.layer} to the last bit, and the reference's is another one"
                yield Finding.at(tensor, what, "one layer was written over another: convert the original again")


def equal_blocks(files: Files) -> list[Sequence[Tensor]]:
    """Return those of the `equal_weights` that lie in numbered blocks: a tied head may be written as well."""
    return [group for group in equal_weights(files) if all(place_of(tensor.layer).block for tensor in group)]


@lru_cache(maxsize=4)  # of the same files: a check and the suspicions of each verdict ask for them
def equal_weights(files: Files) -> list[Sequence[Tensor]]:
    """Return the groups of matrices that are equal to the last bit, in the order of the layers.

    Of quantized weights the codes are compared. A matrix whose sampled bytes are all equal, as of zeros, is left out.
    """
    form = files.format
    alike: dict[tuple[str, tuple[int, ...], bytes], list[Tensor]] = {}
    for layer in files.folder.layers:
        tensor = form.weight_of(layer)
        if tensor is not None and len(tensor.shape) > 1 and 0 not in tensor.shape:
            found = _signature(tensor.bytes())
            if found is not None:
                alike.setdefault((tensor.dtype, tensor.shape, found), []).append(tensor)
    groups = [[first, *(each for each in others if each.repeats(first))] for first, *others in alike.values()]
    return [group for group in groups if len(group) > 1]


def _signature(raw: NDArray[np.uint8]) -> bytes | None:
    """Return a hash of three pieces of a tensor; None where these are one number."""
    middle = len(raw) // 2 // 8 * 8
    pieces = np.concatenate([raw[:PIECE], raw[middle : middle + PIECE], raw[-PIECE:]])
    return None if (pieces == pieces[0]).all() else hashlib.blake2b(pieces.tobytes(), digest_size=16).digest()


def _is_own(recognizer: Recognizer, layer: str) -> bool:
    found = recognizer.find(layer)
    return layer in recognizer.pairs and found is not None and found.own


def _differ_in_reference(recognizer: Recognizer, one: str, other: str) -> bool:
    """Say whether the reference has both layers, and other weights in them."""
    pairs = [recognizer.pairs[layer] for layer in (one, other) if layer in recognizer.pairs]
    weights = [tensor for pair in pairs if (tensor := pair.form.weight_of(pair.layer)) is not None]
    return len(weights) == 2 and not weights[0].repeats(weights[1])

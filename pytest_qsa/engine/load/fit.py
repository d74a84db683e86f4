"""Whether a reference is the original of a model: their layers and their tokens, before the first forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...common import InfraError
from ...suite import Data
from ..modules import blocks_of, layers_of
from .batches import Batch
from .data import batches_of


def check_layers(model: nn.Module, reference: nn.Module) -> None:
    """Check that two models have the same blocks, and in them layers of the same names and widths.

    Raises:
        InfraError: they have not; the text names the first that differs.
    """
    own, theirs = blocks_of(model), blocks_of(reference)
    if own != theirs:
        raise InfraError(f"the reference has {_blocks(theirs)} and the model {_blocks(own)}{_ADVICE}")
    mine, originals = layers_of(model), layers_of(reference)
    for name, layer in originals.items():
        if not isinstance(layer, nn.Linear | nn.Embedding):
            continue
        if name not in mine:
            raise InfraError(f"the model has no layer {name}, which the reference has{_ADVICE}")
        one, other = _widths(mine[name]), _widths(layer)
        if one and one != other:
            raise InfraError(f"{name} is {one} here and {other} in the reference{_ADVICE}")


_ADVICE = ": is it the original of this model?"


def _blocks(names: list[str]) -> str:
    return f"{len(names)} blocks ({names[0]}, …)" if names else "no blocks"


def _widths(layer: nn.Module) -> str:
    """Return the sizes of a layer as `in→out`; empty where it does not say them."""
    sides = [("in_features", "out_features"), ("num_embeddings", "embedding_dim")]
    return next((f"{getattr(layer, i)}→{getattr(layer, o)}" for i, o in sides if hasattr(layer, o)), "")


def check_tokens(data: Data, own: Any, other: Any, folder: Path) -> None:
    """Check that two tokenizers make the same windows of the data; a reference without one has nothing to say.

    Raises:
        InfraError: they do not; the text says where the windows first differ.
    """
    if other is None:
        return
    try:
        theirs = batches_of(data, other, folder)
    except InfraError as error:
        raise InfraError(
            f"the reference's tokenizer makes other tokens of the data than the model's ({error})"
        ) from None
    for window, (one, two) in enumerate(zip(batches_of(data, own, folder), theirs, strict=True)):
        if (at := _differing(one, two)) is not None:
            raise InfraError(
                "the reference's tokenizer makes other tokens of the data than the model's: "
                f"batch {window} differs from token {at} on{_ADVICE}"
            )


def _differing(one: Batch, other: Batch) -> int | None:
    """Return the first position at which two batches of ids differ."""
    a, b = (batch if isinstance(batch, torch.Tensor) else batch["input_ids"] for batch in (one, other))
    differing = (a != b).any(dim=0).nonzero()
    return int(differing[0]) if len(differing) else None

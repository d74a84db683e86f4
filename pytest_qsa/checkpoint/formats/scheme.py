"""What a configuration declares: the quantization scheme of each layer, and the layers that it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ...captures import found_by
from ...common import AnomalyError, SuiteError


@dataclass(frozen=True, eq=False)
class ScaleGroups:
    """Which weights of a matrix share a scale: blocks of `rows` and `columns`, the last of which may be smaller.

    `order`: the columns in the order in which groups follow one another, [in]; None for their own.
    """

    rows: int
    columns: int
    order: NDArray[np.intp] | None = None


@dataclass(frozen=True)
class LayerScheme:
    """How the weight of a layer is quantized.

    `form`: the storage format by its own name, for messages; `dense` stores floats. `bits`: of one weight.
    `strategy`: what shares a scale: `tensor`, `channel` (a row), `group`, `tensor_group` or `block`; any other leaves
    it open. `group`: the columns of a group, or the rows and columns of a block. `required`: the parts that a layer
    must have, each a choice of names. `allowed`: parts that it may have. `dtypes`: those of the stored weight; empty
    where any is right. `zero_point`: what a symmetric scheme subtracts from all codes; None where each group may have
    another.
    """

    form: str
    bits: int
    strategy: str = "any"
    group: int | tuple[int, int] | None = None
    required: tuple[tuple[str, ...], ...] = ()
    allowed: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ()
    zero_point: int | None = None

    def scale_count(self, rows: int, columns: int) -> int | None:
        """Return how many scales a weight [rows, columns] has; None where the scheme leaves it open."""
        if self.strategy == "tensor":
            return 1
        if self.strategy == "channel":
            return rows
        if self.strategy in ("group", "tensor_group") and isinstance(self.group, int) and self.group > 0:
            return rows * ceil(columns / self.group)
        if self.strategy == "block" and isinstance(self.group, tuple):
            return ceil(rows / self.group[0]) * ceil(columns / self.group[1])
        return None


@dataclass(frozen=True)
class Declaration:
    """What a configuration declares of all layers.

    `groups`: targets and their scheme; the first group that targets a layer wins. `ignore`: layers that are left out.
    `names_layers`: the configuration decides for every linear layer whether it is quantized; without, a layer can only
    be compared with its siblings in the other blocks.
    """

    groups: Sequence[tuple[Sequence[str], LayerScheme]] = ()
    ignore: Sequence[str] = ()
    names_layers: bool = False

    def scheme_of(self, layer: str) -> LayerScheme | None:
        """Return the scheme that a linear layer of this name is declared to have; None for none."""
        if any(matches(layer, pattern) for pattern in self.ignore):
            return None
        for targets, scheme in self.groups:
            if any(target == "Linear" or matches(layer, target) for target in targets):
                return scheme
        return None


def matches(layer: str, pattern: str) -> bool:
    """Match a layer as compressed-tensors does: `re:` for a regex from the start, else the whole name.

    Files and modules of multimodal models name what stands before the block in several ways, so that a name which ends
    in the other counts as the same.

    Raises:
        AnomalyError: the pattern is no regular expression.
    """
    if pattern.startswith("re:"):
        return matches_from_start(pattern[3:], layer)
    return layer == pattern or layer.endswith(f".{pattern}") or pattern.endswith(f".{layer}")


def matches_from_start(regex: str, layer: str) -> bool:
    """Match a layer's name by a regex of a configuration, from its start on.

    Raises:
        AnomalyError: it is no regular expression.
    """
    try:
        return bool(found_by(regex, [layer], from_start=True, seconds=NAME_SECONDS))
    except SuiteError as error:
        what = f"quantization_config names layers by {regex[:100]!r}, which is no regular expression: {error}"
        raise AnomalyError(f"{what}; correct it, for loaders read it as one") from None


NAME_SECONDS = 0.05
"""The processor time that a regex of a configuration may take for one name."""


def block_of(size: object) -> tuple[int, int] | None:
    """Return [rows, columns] of a block as configurations write it; None for anything else."""
    return (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None

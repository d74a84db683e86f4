"""What a model saw of a picture: its pixels in small, and where the patches of its tokens lie. numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import Array

MOST_EXTRA = 8
"""Tokens that a vision tower puts before those of the patches: a class token, and registers."""


class Patch(NamedTuple):
    """A patch of a picture: its row and column, from 0, and how many of each there are."""

    row: int
    column: int
    rows: int
    columns: int


# eq=False: the generated `==` would compare arrays, which have no single truth value.
@dataclass(frozen=True, eq=False)
class Picture:
    """The picture of a sample.

    `pixels`: [h, w, 3] uint8, in small. `grid`: the rows and columns of its tokens in the prompt; `places` [n] int32:
    where these are. `tower`: the rows and columns of the vision tower's patches. (0, 0) where the patches have no grid.
    """

    pixels: NDArray[np.uint8]
    grid: tuple[int, int]
    places: NDArray[np.int32]
    tower: tuple[int, int]

    def patch_at(self, position: int, length: int, tokens: int) -> Patch | None:
        """Return the patch of a token of a layer, None where it stands for none.

        `length`: how many tokens the layer has of the sample. `tokens`: how many the prompt has.
        """
        if tokens and length == tokens:
            found = np.flatnonzero(self.places == position)
            return self._patch(self.grid, int(found[0])) if found.size else None
        if length == len(self.places):  # a projector
            return self._patch(self.grid, position)
        first = length - math.prod(self.tower)
        return self._patch(self.tower, position - first) if 0 <= first <= MOST_EXTRA else None

    @staticmethod
    def _patch(grid: tuple[int, int], index: int) -> Patch | None:
        rows, columns = grid
        return Patch(index // columns, index % columns, rows, columns) if 0 <= index < rows * columns else None


def picture_arrays(pictures: Mapping[int, Picture]) -> dict[str, Array]:
    """Return the arrays by which a capture's file keeps its pictures."""
    return {
        name: array
        for sample, each in pictures.items()
        for name, array in ((f"picture_{sample}", each.pixels), (f"picture_places_{sample}", each.places))
    }


def picture_headers(pictures: Mapping[int, Picture]) -> dict[str, Any]:
    """Return what the header of a capture's file says of its pictures; nothing where it has none."""
    found = {str(sample): [*each.grid, *each.tower] for sample, each in pictures.items()}
    return {"pictures": found} if found else {}


def read_pictures(arrays: Mapping[str, Array], header: Mapping[str, Any]) -> dict[int, Picture]:
    """Return the pictures of a capture's file."""
    return {
        int(sample): Picture(arrays[f"picture_{sample}"], (a, b), arrays[f"picture_places_{sample}"], (c, d))
        for sample, (a, b, c, d) in header.get("pictures", {}).items()
    }

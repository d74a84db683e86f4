"""Orders of rows that conversions leave: the rope's two layouts, heads, halves; a permutation → its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]
MOST_SHOWN = 4


class Order(NamedTuple):
    """How rows or columns were moved. `name`: the kind of move in words; `detail`: which, where that can be said."""

    name: str
    detail: str = ""


def heads_of(settings: Mapping[str, Any], rows: int) -> int:
    """Return the rows of a head by the configuration; 0 where it doesn't divide the rows."""
    heads = settings.get("num_attention_heads") or 0
    size = settings.get("head_dim") or (settings.get("hidden_size") or 0) // heads if heads else 0
    return int(size) if size and rows % size == 0 else 0


def interleaved(rows: int, head: int, rotated: int | None = None) -> Rows:
    """Return the order by which halves of each head alternate: row 2j + k is row k · rotated / 2 + j of its head.

    `rotated`: the first rows of a head that rope turns, all for None. Llama's original files alternate; transformers'
    keep halves (convert_llama_weights_to_hf.py, `permute`).
    """
    turned = head if rotated is None else rotated
    one = np.arange(head)
    one[:turned] = np.arange(turned).reshape(2, -1).T.ravel()
    return (np.arange(0, rows, head)[:, None] + one).ravel()


def named_order(order: Rows, head: int, of: str) -> Order:
    """Name a permutation. `order`: the original's row at each place; `head`: the rows of a head, 0 if unknown.

    `of`: rows or columns.
    """
    rows = len(order)
    if head and of == "rows":
        for turned in _rotated(order, head):
            if np.array_equal(order, interleaved(rows, head, turned)):
                return Order(f"{of} in the rope's interleaved layout")
            if np.array_equal(order, np.argsort(interleaved(rows, head, turned))):
                return Order(f"{of} in the rope's layout of halves, where the reference's are interleaved")
    if rows % 2 == 0:
        if np.array_equal(order, np.roll(np.arange(rows), rows // 2)):
            return Order("its two halves exchanged")
        if np.array_equal(order, interleaved(rows, rows)):
            return Order("its two halves interleaved")
        if np.array_equal(order, np.argsort(interleaved(rows, rows))):
            return Order("its interleaved halves one after the other")
    if head and (wrong := _other_heads(order, head)):
        return Order(f"{of} as a conversion of the rope's layout leaves them with heads of {wrong} rows", f"not {head}")
    return _blocks(order, head, of)


def _rotated(order: Rows, head: int) -> Iterator[int]:
    """Yield how many rows of a head may be turned: all, or those up to the last that moved and the fixed one after."""
    yield head
    moved = np.flatnonzero(order[:head] != np.arange(head))
    if moved.size and (moved[-1] + 2) % 2 == 0 and moved[-1] + 2 < head:
        yield int(moved[-1]) + 2


def _other_heads(order: Rows, head: int) -> int:
    """Return the size of the heads with which the rope's layout was converted there or back; 0 where it wasn't."""
    rows, own = len(order), interleaved(len(order), head)
    for size in range(2, rows + 1, 2):
        if rows % size or size == head:
            continue
        other = interleaved(rows, size)
        for there, back in ((own, other), (other, own)):
            if np.array_equal(order, there[np.argsort(back)]):
                return size
    return 0


def _blocks(order: Rows, head: int, of: str) -> Order:
    """Name an order in which blocks of neighbouring rows were moved: heads, where their size is a multiple of one."""
    steps = np.flatnonzero(np.diff(order) != 1) + 1
    size = int(np.gcd.reduce([*steps.tolist(), len(order)]))
    if size == 1:
        return Order(f"{of} in another order")
    heads = bool(head) and size % head == 0
    unit = head if heads else size
    moved = (order[::unit] // unit).tolist()
    shown = ", ".join(map(str, moved[:12])) + (", …" if len(moved) > 12 else "")
    return Order("heads in another order" if heads else f"blocks of {size} {of} in another order", shown)

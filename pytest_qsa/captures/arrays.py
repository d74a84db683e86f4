"""The arrays of a site: what their columns hold, how parts of one are put together, order statistics. numpy only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import parsed_json

Array = NDArray[Any]
"""An array of any dtype."""
TOP_NAMES = ("top1", "top2", "top3", "median", "min3", "min2", "min")
"""The columns of `channel_top` and `element_top`."""
MOMENT_NAMES = ("n", "mean", "m2", "m4", "absmax", "zeros", "nonfinite")
"""The columns of `moments`; m2 and m4 are the sums of powers of the deviations from the mean."""
EXTREME_NAMES = ("largest", "smallest", "low", "high")
"""What `extremes` holds: of |x|, then of x; the last two are NaN where the signs were not counted."""
ERROR_NAMES = ("signal", "error", "own", "largest")
"""The columns of `error`, of one token: Σx², Σ(x − x̂)², Σx̂², max |x − x̂|, where x is the reference's."""
STORED_NAMES = ("signal", "error", "product", "own")
"""What `stored` holds: Σw₀², Σ(w − w₀)², Σw·w₀, Σw², w₀ the file's weight and w the loaded one."""
GAIN_NAMES = ("share", "factor", "row", "rows", "column", "columns")
"""What `gain` holds of one scale group: its departure over its room, Σw·w₀ / Σw₀², and where it lies: its first row,
how many it has, and the same of its columns; −1 in `column` where the columns of a group don't follow one another."""
SCORE_NAMES = ("nll", "reference_nll", "kl", "same_top")
"""The columns of `scores`, of one position: −ln of the probability of the token that came next, by the model and by the
reference; Σ p·(ln p − ln q) over the vocabulary, p the reference's; 1 where both find the same token likeliest."""
MARGIN_NAMES = ("reference", "own", "token", "other")
"""The columns of `margins`, of one position, in logits: of the reference z_t − max z_v over all tokens v but t, the one
that it finds likeliest; of the model's own logits the same at that t, below 0 where it prefers another; then the id of
t, and that of the token which the model finds likeliest."""
BOUNDARY_NAMES = ("came", "part", "written")
"""The columns of `boundary`, of one position: the id of the token after it where that belongs to a boundary, which of
the boundary's tokens it is, from 0; the first token of a boundary that the model finds likeliest. −1 for none."""
GENERATION_NAMES = (
    *("equal", "length", "reference_length", "ended", "reference_ended", "repetition", "reference_repetition"),
    *("json", "reference_json", "markup", "reference_markup"),
)
"""The columns of `generation`, of one prompt and two answers: how many first tokens are equal; the tokens of each; 1
where it ended by itself; the share of its 4-grams that it had written before; 1 where it is JSON, NaN where neither is;
1 where it has all the markup that either of them has, NaN where neither has any."""
UNKNOWN = -1
"""Stands in a count of massive activations where the sample holds NaN or Inf."""
PADDING = -1.0
"""Stands in `token_max` and `error` where a token is padding; a maximum of magnitudes is never negative."""
NOT_COMPARED = -2.0
"""Stands in `error` at a token that a reference file has no row of."""
POPULATIONS = ("sample", "call", "lengths")
"""The arrays that say of which sample and call each population is, and how long it is; every site has them."""


_KINDS = {
    "u8": "U64", "i8": "I64", "f8": "F64", "f4": "F32", "u4": "U32", "i4": "I32",
    "f2": "F16", "u2": "U16", "i2": "I16", "i1": "I8", "u1": "U8", "b1": "BOOL",
}  # fmt: skip
"""A dtype of numpy → its name in a safetensors file, where the arrays lie in this order."""


def safetensors_parts(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Return a safetensors file in parts, the bytes that `safetensors.numpy.save` makes: a header, then each array.

    The library copies all arrays twice, which for a capture of many samples is more memory than its pass took.
    """
    order = list(_KINDS)
    named = sorted(arrays, key=lambda name: (order.index(arrays[name].dtype.str[1:]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in named:
        array, begin = arrays[name], end
        end += array.nbytes
        kind = _KINDS[array.dtype.str[1:]]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    flat = (np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8) for name in named)
    return [len(text).to_bytes(8, "little") + text, *(array.data for array in flat)]


def safetensors_header(content: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file: array → its dtype, shape and offsets; `__metadata__` → texts by name.

    Raises:
        ValueError: it holds none.
    """
    header = parsed_json(content[8 : _data_start(content)])
    if not isinstance(header, dict):
        raise ValueError("the header of a safetensors file is an object")
    return header


def safetensors_arrays(content: bytes, header: Mapping[str, Any]) -> dict[str, Array]:
    """Return the arrays of a safetensors file, by name. They are views of `content`, and can't be written to.

    The library's reader copies all of them, so that a large capture would take twice its size in memory.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: an array's header is damaged, or the file ends within it.
    """
    dtypes = {kind: np.dtype(f"<{code}") for code, kind in _KINDS.items()}
    found: dict[str, Array] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        array: Array = np.ndarray(entry["shape"], dtypes[entry["dtype"]], content, _data_start(content) + begin)
        if begin < 0 or array.nbytes != end - begin:
            raise ValueError(f"the array {name} of {array.nbytes} bytes can't lie at {begin} … {end}")
        found[name] = array
    return found


def _data_start(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


@dataclass(frozen=True)
class Layout:
    """How an array of a site is assembled. `join` makes it of its populations' parts, `merge` of captures'.

    `bins`: the name of the array that says for which bins this one holds counts; both are merged bin by bin.
    `partial`: only the captures that hold a certain sample have the array.
    """

    join: Callable[[Sequence[Array]], Array]
    merge: Callable[[Sequence[Array]], Array] | None
    bins: str = ""
    partial: bool = False


def _one(arrays: Sequence[Array]) -> Array:
    return arrays[0]


def padded(rows: Sequence[Array]) -> NDArray[np.int32]:
    """Return 1-D arrays of different lengths as one table, with −1 where there is nothing."""
    lengths = np.array([len(row) for row in rows])
    table = np.full((len(rows), lengths.max()), -1, dtype=np.int32)
    table[np.arange(table.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return table


def _ragged(tables: Sequence[Array]) -> Array:
    """Concatenate tables of different widths, with −1 where there is nothing."""
    # K follows the longest sample of a capture, so that the tables of its parts differ in width.
    width = max(table.shape[1] for table in tables)
    return np.concatenate(
        [np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=-1) for table in tables]
    )


def _extremes(arrays: Sequence[Array]) -> Array:
    """Fold `EXTREME_NAMES`: the largest and the smallest |x|, then the smallest and the largest x."""
    largest, smallest, low, high = np.stack(arrays).swapaxes(0, 1)
    # These ufuncs pass NaN on: if one part has not counted the signs, nothing is known of the whole.
    ends = [np.maximum.reduce(largest), np.minimum.reduce(smallest), np.minimum.reduce(low), np.maximum.reduce(high)]
    return np.array(ends, dtype=arrays[0].dtype)


PER_TOKEN = Layout(np.concatenate, np.concatenate)
"""A row, or a number, for each token, populations one after the other."""
PER_POPULATION = Layout(np.stack, np.concatenate)
RAGGED = Layout(padded, _ragged)
"""A row for each population, filled up with −1."""
SUM = Layout(_one, lambda arrays: np.sum(arrays, axis=0))
LARGEST = Layout(_one, lambda arrays: np.maximum.reduce(list(arrays)))
EXTREMES = Layout(_one, _extremes)
OF_A_SAMPLE = Layout(_one, lambda arrays: arrays[-1], partial=True)
OF_THE_WEIGHT = Layout(_one, None)
OF_THE_SITE = Layout(_one, _one)
"""The same in every part."""
BINS = Layout(_one, None)
"""Merged with the counts that name them."""


def counts_of(bins: str) -> Layout:
    """Return the layout of counts whose bins are in the array `bins`."""
    return Layout(_one, None, bins=bins)


def lower_median(values: Array) -> float:
    """Return the median of a 1-D array, the lower one for an even count, as `torch.median` does; NaN for none."""
    if not values.size:
        return float("nan")
    middle = (values.size - 1) // 2
    return float(np.partition(values, middle)[middle])


def ranks_of(count: int) -> list[int]:
    """Return the ascending ranks of `TOP_NAMES` among `count` values; missing ones are outside 0 … count − 1."""
    return [count - 1, count - 2, count - 3, (count - 1) // 2, 2, 1, 0]


def order_statistics(values: Array, names: Sequence[str]) -> dict[str, float]:
    """Return some of `TOP_NAMES` of a 1-D array by one partition; NaN for a missing rank, or if it holds NaN or Inf."""
    if not np.isfinite(values).all():
        return dict.fromkeys(names, float("nan"))
    size = values.size
    ranks = dict(zip(TOP_NAMES, ranks_of(size), strict=True))
    known = {name: ranks[name] for name in names if 0 <= ranks[name] < size}
    # Only these ranks must stand in their places, so a full sort is not needed.
    ordered = np.partition(values, sorted(set(known.values()))) if known else values
    return {name: float(ordered[known[name]]) if name in known else float("nan") for name in names}

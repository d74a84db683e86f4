"""bitsandbytes in 4 bits (NF4, FP4): two codes a byte, and the largest |w| of every block of the flattened weight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ...common import parsed_json
from ..folder import Finding, Folder
from ..tensors import FLOATS, Matrix, Tensor, decoded, element_count, encoded
from .format import AGAIN, Format
from .scheme import Declaration, LayerScheme, ScaleGroups

STATE = "weight.quant_state.bitsandbytes__"
_FP4 = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3], dtype=np.float32) / 12
CODE_VALUES: dict[str, NDArray[np.float32]] = {
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
        dtype=np.float32,
    ),
    "fp4": np.concatenate([_FP4, -_FP4]),
}  # fmt: skip
"""The value of each code: NF4 from Dettmers et al. (arXiv 2305.14314, appendix E), FP4 with a sign and 3 bits."""
FLOAT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class QuantState:
    """What the JSON beside a weight says of it.

    `kind`: nf4 or fp4. `shape`: [out, in]. `block`: weights a block. `dtype`: that of the dequantized weight.
    `nested_block`, `offset`: blocks that share a scale of the nested scales, and what is added to those.
    """

    kind: str
    shape: tuple[int, int]
    block: int
    dtype: str
    nested_block: int
    offset: float


class BitsAndBytes4Bit(Format):
    """w = `quant_map`[code] · `absmax`, the high half of a byte first.

    Nested, `absmax` is itself stored in codes: `nested_quant_map`[code] · `nested_absmax` + offset.
    """

    name = "bitsandbytes_4bit"
    libraries = ("bitsandbytes",)
    codes = ("weight",)
    scales = re.compile(r"^weight\.(nested_)?absmax$")

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Say whether the configuration declares bitsandbytes and 4 bits."""
        declared = folder.quantization
        return declared.get("quant_method") == "bitsandbytes" and bool(declared.get("load_in_4bit"))

    @cached_property
    def declaration(self) -> Declaration:
        """Every linear layer but the head and those skipped; the layers' own states say the rest."""
        required = (("weight",), ("weight.absmax",), ("weight.quant_map",), (f"{STATE}nf4", f"{STATE}fp4"))
        form = str(self.folder.quantization.get("bnb_4bit_quant_type") or "fp4")
        allowed = frozenset({"bias", "weight.nested_absmax", "weight.nested_quant_map"})
        scheme = LayerScheme(form, 4, "any", None, required, allowed)
        skipped = self.folder.quantization.get("llm_int8_skip_modules") or ("lm_head",)
        return Declaration([(["Linear"], scheme)], [f"re:.*{re.escape(name)}" for name in skipped])

    def codes_of(self, layer: str) -> Tensor | None:
        """Return the bytes of a layer's codes, whatever dtype they are stored under (`bnb_4bit_quant_storage`)."""
        weight = self.parts(layer).get("weight")
        own = any(part.startswith("weight.") for part in self.parts(layer))
        if weight is None or not (own or weight.dtype not in FLOATS):
            return None
        if weight.dtype == "U8":
            return weight
        return replace(weight, dtype="U8", shape=(weight.stop - weight.start, 1))

    def scales_of(self, layer: str) -> dict[str, Tensor]:
        """Return the scales that are stored as floats: `absmax`, or `nested_absmax` where that is in codes."""
        return {part: tensor for part, tensor in super().scales_of(layer).items() if tensor.dtype in FLOATS}

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return the shape that a layer's state says."""
        if self.codes_of(layer) is None:
            return super().weight_shape(layer)
        state = self.state_of(layer)
        return state.shape if state else None

    def scale_groups(self, layer: str, shape: tuple[int, int]) -> ScaleGroups:
        """Return the blocks, where none reaches from one row into the next."""
        state = self.state_of(layer) if self.codes_of(layer) is not None else None
        if state is None or shape[1] % state.block:
            return ScaleGroups(1, shape[1])
        return ScaleGroups(1, state.block)

    def by_output(self, layer: str, raw: Array) -> Array:
        """Return the bytes of every output in a row; the file has them in one column."""
        shape = self.weight_shape(layer)
        whole = shape is not None and shape[1] % 2 == 0 and prod(shape) == 2 * raw.size
        return raw.reshape(shape[0] if shape and whole else 1, -1)

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return the codes whose value is 0."""
        state = self.state_of(layer)
        return tuple(np.flatnonzero(CODE_VALUES[state.kind if state else "nf4"] == 0).tolist())

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix:
        """Multiply the values of codes by the scales of their blocks, which run on from row to row."""
        state = self._read_state(layer)
        columns = state.shape[1]
        first, last, step = rows.indices(state.shape[0])
        if step < 0 or last <= first:
            raise ValueError(f"the rows {rows} are no ascending range of {state.shape[0]}")
        index = np.arange(first * columns, last * columns)
        packed = np.asarray(codes.raw()).reshape(-1)[first * columns // 2 : (last * columns + 1) // 2]
        halves = np.stack([packed >> 4, packed & 15], axis=1).ravel()[first * columns % 2 :][: len(index)]
        # float32 and then the dtype of the state, as the library computes it
        table = self.parts(layer)["weight.quant_map"].values().astype(np.float32)
        values = table[halves] * self._scales(layer, state)[index // state.block]
        rounded = decoded(encoded(values.astype(np.float64), state.dtype), state.dtype).astype(np.float64)
        matrix: Matrix = rounded.reshape(-1, columns)[::step]
        return matrix

    def _scales(self, layer: str, state: QuantState) -> NDArray[np.float32]:
        """Return the largest |w| of each block; of nested ones by the library's order of operations."""
        parts = self.parts(layer)
        scales, nested = parts["weight.absmax"], parts.get("weight.nested_absmax")
        if nested is None:
            return scales.values().astype(np.float32)
        table = parts["weight.nested_quant_map"].values().astype(np.float32)
        codes = np.asarray(scales.raw()).ravel()
        found = table[codes] * nested.values().astype(np.float32)[np.arange(len(codes)) // state.nested_block]
        return np.asarray(found + np.float32(state.offset))

    def state_of(self, layer: str) -> QuantState | None:
        """Return what the JSON beside a layer's weight says of it; None where it can't be read."""
        try:
            return self._read_state(layer)
        except ValueError:
            return None

    def _read_state(self, layer: str) -> QuantState:
        """Read a layer's state, or raise a `ValueError` that says what is wrong with it."""
        part = next((part for part in self.parts(layer) if part.startswith(STATE)), None)
        if part is None:
            raise ValueError("its quant_state is missing")
        try:
            content = parsed_json(np.asarray(self.parts(layer)[part].raw()).tobytes())
            out, columns = content["shape"]
            state = QuantState(
                str(content["quant_type"]),
                (int(out), int(columns)),
                int(content["blocksize"]),
                FLOAT_DTYPES[content["dtype"]],
                int(content.get("nested_blocksize") or 256),
                float(content.get("nested_offset") or 0.0),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"its quant_state can't be read: {type(error).__name__}: {error}") from error
        if state.kind not in CODE_VALUES or part != f"{STATE}{state.kind}":
            raise ValueError(f"its quant_state is of {state.kind}, and its name says {part.removeprefix(STATE)}")
        if min(state.block, state.nested_block, *state.shape) < 1:
            raise ValueError(f"its quant_state has blocks of {state.block} and the shape {state.shape}")
        return state

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield also a state that contradicts the tensors or the configuration, and a table that isn't the format's."""
        yield from super().findings(layer)
        codes = self.codes_of(layer)
        if codes is None or not any(part.startswith(STATE) for part in self.parts(layer)):
            return  # the base class says what is missing
        try:
            state = self._read_state(layer)
        except ValueError as error:
            yield Finding.at(codes, str(error), AGAIN)
            return
        declared = str(self.folder.quantization.get("bnb_4bit_quant_type") or state.kind)
        if state.kind != declared:
            yield Finding.at(codes, f"is {state.kind}, though the configuration says {declared}", AGAIN)
        wrong = [*self._wrong_sizes(layer, codes, state), *self._wrong_tables(layer, state)]
        yield from wrong or self._negative_scales(layer, state)

    def _wrong_sizes(self, layer: str, codes: Tensor, state: QuantState) -> Iterator[Finding]:
        parts = self.parts(layer)
        blocks = ceil(prod(state.shape) / state.block)
        counts = {"weight": ceil(prod(state.shape) / 2), "weight.absmax": blocks, "weight.quant_map": 16}
        scales = parts.get("weight.absmax")
        if scales is not None and scales.dtype not in FLOATS:
            counts |= {"weight.nested_absmax": ceil(blocks / state.nested_block), "weight.nested_quant_map": 256}
        for part, count in counts.items():
            tensor = codes if part == "weight" else parts.get(part)
            if tensor is None and "nested" in part:
                yield Finding(layer, f"{layer}.{part}", codes.file, "missing, though absmax is stored in codes", AGAIN)
            elif tensor is not None and element_count(tensor) != count:
                weight = f"a weight {state.shape} in blocks of {state.block}"
                yield Finding.at(tensor, f"{element_count(tensor)} elements, but {weight} has {count}", AGAIN)

    def _wrong_tables(self, layer: str, state: QuantState) -> Iterator[Finding]:
        """Yield tables of values that aren't the format's, with which every weight is another one."""
        parts, table = self.parts(layer), CODE_VALUES[state.kind]
        for part in ("weight.quant_map", "weight.nested_quant_map"):
            values = parts[part].values().ravel() if part in parts else np.ones(1)
            if part == "weight.quant_map":
                wrong = len(values) == len(table) and not np.array_equal(values, table.astype(np.float64))
            else:  # the library's "dynamic" map; all of its variants ascend to 1
                wrong = not (np.diff(values) > 0).all() or values[-1] != 1
            if wrong:
                yield Finding.at(parts[part], f"isn't the table of values of {state.kind}", AGAIN)

    def _negative_scales(self, layer: str, state: QuantState) -> Iterator[Finding]:
        """Yield nested scales that are negative: a largest |w| can't be, so that their parts don't belong together."""
        nested = self.parts(layer).get("weight.nested_absmax")
        if nested is None:
            return
        values = self._scales(layer, state)
        # neighbours in the nested table are at most 0.015 apart, so that a block of zeros may miss 0 by half of that
        count = int(np.count_nonzero(values < -0.01 * nested.values().max()))
        if count:
            yield Finding.at(nested, f"{count} of {values.size} scales that are stored in it are negative", AGAIN)

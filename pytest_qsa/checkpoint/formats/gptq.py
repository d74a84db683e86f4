"""GPTQ, AutoRound and what AWQ shares with them: words of 32 bits in `qweight`, packed along inputs or outputs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ...common import AnomalyError
from ..folder import Finding, Folder, Settings
from ..tensors import Matrix, Tensor, element_count, unpacked
from .format import Format
from .scheme import Declaration, LayerScheme, ScaleGroups, matches_from_start

OLD_SETTINGS = "quantize_config.json"
READABLE_BITS = {
    "gptq": (2, 3, 4, 8),
    "gptq_v2": (2, 3, 4, 8),
    "gptq_p": (2, 3, 4, 5, 6, 7, 8),
    "gemm": (4,),
    **dict.fromkeys(("gemv", "gemv_fast", "llm-awq"), (4,)),
}
"""The packings that are read as numbers → the bits that their writers pack so."""
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""The bits of a code of `gptq_p` → the widths of its planes, the lowest bits first (GPTQModel's planar_packing)."""
ROUND_PACKINGS = {
    **dict.fromkeys(("auto", "auto_round:gptq", "auto_round:auto_gptq"), "gptq"),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), "gptq_v2"),
    **dict.fromkeys(("auto_round:awq", "auto_round:auto_awq"), "gemm"),
}
"""AutoRound's `packing_format` → the packing (its inference/backend.py: which of them stores zero points − 1)."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word, from its lowest bits, that holds each of 8 outputs in AWQ's packing `gemm`."""


class Gptq(Format):
    """`qweight` [in · bits / 32, out], `qzeros` [groups, out · bits / 32], `scales` [groups, out]: w = (q − z) · s.

    Frantar et al., arXiv 2210.17323; the files are those of AutoGPTQ and GPTQModel. `gptq` stores z − 1, `gptq_v2` and
    `gptq_p` z; the last one packs codes in planes of 4, 2 and 1 bits.
    """

    name = "gptq"
    libraries = ("gptqmodel", "optimum")
    codes = ("qweight", "weight")
    signed_scales = True  # AutoRound gives a scale the sign of the group's largest weight, which is then the code 0
    extra = frozenset({"g_idx", "bias"})

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize files from before config.json held the settings, which AutoGPTQ wrote beside it."""
        return super().declared_in(folder) or (
            cls is Gptq and not folder.gguf_file and not folder.quantization and bool(folder.json(OLD_SETTINGS))
        )

    @cached_property
    def config(self) -> Settings:
        """The settings, wherever they stand."""
        return self.folder.quantization or self.folder.json(OLD_SETTINGS) or {}

    @cached_property
    def packing(self) -> str:
        """How words are packed: a key of `READABLE_BITS`, or another name, of a packing that isn't read as numbers."""
        config = self.config
        return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()

    @cached_property
    def declaration(self) -> Declaration:
        """Every linear layer but the head, unless `lm_head` says otherwise; `dynamic` is looked up for each layer."""
        ignore = [] if self.config.get("lm_head") else ["lm_head"]
        some_blocks = bool(self.config.get("modules_in_block_to_quantize"))
        return Declaration([(["Linear"], self._scheme(self.config))], ignore, names_layers=not some_blocks)

    def scheme_of(self, layer: str) -> LayerScheme | None:
        """Return the scheme of a layer by the first pattern of `dynamic` that matches: `-:` leaves it out."""
        scheme = super().scheme_of(layer)
        for pattern, settings in (self.config.get("dynamic") or {}).items():
            # without a sign a pattern overrides, as `+:` does
            if scheme is not None and matches_from_start(re.sub("^[+-]:", "", pattern), layer):
                return None if pattern.startswith("-:") else self._scheme({**self.config, **(settings or {})})
        return scheme

    def _scheme(self, config: Settings) -> LayerScheme:
        stated = config.get("group_size") or -1, config.get("bits") or config.get("w_bit") or 4
        try:
            size, bits = map(int, stated)
        except (TypeError, ValueError):
            raise AnomalyError(
                f"{self.folder.path}: group_size {stated[0]!r} and bits {stated[1]!r} in quantization_config aren't "
                f"whole numbers, as {self.label} has them; correct them"
            ) from None
        required = (("qweight",), ("qzeros",), ("scales",))
        strategy, group = ("group", size) if size > 0 else ("channel", None)
        if self.packing == "gemv":  # its scales are padded to whole words of zero points
            strategy = "any"
        zero_point = 1 << (bits - 1) if self.is_symmetric(config) else None
        return LayerScheme(self.name, bits, strategy, group, required, self.extra, ("I32",), zero_point)

    def is_symmetric(self, config: Settings) -> bool:
        """Say whether settings state that all zero points are the middle of the range; without a word they needn't."""
        return config.get("sym") is True

    def code_bits(self, layer: str, codes: Tensor) -> int:
        """Return the bits that the configuration declares."""
        return self._own_scheme(layer).bits if codes.part == "qweight" else super().code_bits(layer, codes)

    def _own_scheme(self, layer: str) -> LayerScheme:
        """Return the scheme by which a layer's words are read; a layer that is declared unquantized has that of all."""
        return self.scheme_of(layer) or self._scheme(self.config)

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in] of a layer's weight, unpacked; None where its packing isn't read."""
        codes = self.codes_of(layer)
        if codes is None or codes.part != "qweight" or len(codes.shape) != 2:
            return super().weight_shape(layer)
        rows, columns = codes.shape
        bits = self.code_bits(layer, codes)
        if self.packing not in READABLE_BITS or bits not in READABLE_BITS[self.packing]:
            return None
        if self.packing == "gemm":
            return columns * 32 // bits, rows
        return (rows, columns * 32 // bits) if self.packing == "gemv" else (columns, rows * 32 // bits)

    def words(self, layer: str, codes: Tensor) -> tuple[Array, int]:
        """Return the words of every output in a row; the file has them in columns, but for AWQ's `gemv`.

        Where a word holds codes of several outputs, or parts of codes, they are unpacked into bytes.
        """
        words, step = super().words(layer, codes)
        bits = self.code_bits(layer, codes)
        if codes.part != "qweight" or self.packing == "gemv":
            return words, step
        if self.packing == "gemm" and bits in READABLE_BITS["gemm"]:
            return np.ascontiguousarray(_in_order(unpacked(words.T, bits)).T), step
        return (self._unpacked(words, bits) if 32 % bits else words), step

    def _unpacked(self, words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
        """Unpack words [rows, words] into codes."""
        if self.packing != "gptq_p" or bits not in PLANES:
            return unpacked(words, bits)
        # of every 32 codes the lowest bits come first, and the higher ones in words after them
        groups, codes, first, low = words.reshape(len(words), -1, bits), np.zeros((), np.uint8), 0, 0
        for width in PLANES[bits]:
            plane = unpacked(groups[:, :, first : first + width].reshape(len(words), -1), width)
            codes, first, low = codes | plane << np.uint8(low), first + width, low + width
        return codes

    def by_output(self, layer: str, raw: Array) -> Array:
        """Return the words of one output in each row; of AWQ's `gemm`, those of eight."""
        own = "qweight" in self.parts(layer) and self.packing != "gemv"
        return super().by_output(layer, raw).T if own else super().by_output(layer, raw)

    def unread(self, layer: str) -> str:
        """Name the packing and the bits."""
        codes = self.codes_of(layer)
        if codes is None or codes.part != "qweight":
            return super().unread(layer)
        return f"the packing {self.packing} isn't read in {self.code_bits(layer, codes)} bits"

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return both zero points that symmetric writers use."""
        middle = 1 << (self.code_bits(layer, codes) - 1)
        return (middle - 1, middle) if codes.part == "qweight" else super().zero_codes(layer, codes)

    def scale_values(self, layer: str, part: str) -> Matrix:
        """Return scales [groups, out], without the padding of AWQ's `gemv`."""
        values, shape = super().scale_values(layer, part), self.weight_shape(layer)
        if self.packing != "gemv" or shape is None or values.ndim != 2:
            return values
        return values[:, : self._group_count(layer, shape[1])].T

    def zero_point_values(self, layer: str) -> Matrix | None:
        """Return the zero points [groups, out]; None where their packing isn't read."""
        tensor, shape = self.parts(layer).get("qzeros"), self.weight_shape(layer)
        if tensor is None or shape is None or tensor.dtype != "I32" or len(tensor.shape) != 2:
            return None
        codes = self._unpacked(np.asarray(tensor.raw()).view("u4"), self._own_scheme(layer).bits)
        if self.packing == "gemm":
            codes = _in_order(codes)
        elif self.packing == "gemv":
            codes = codes[:, : self._group_count(layer, shape[1])].T
        return codes.astype(np.float64) + (self.packing == "gptq")

    def zero_point_range(self, layer: str) -> tuple[int, int] | None:
        """Return the range of the codes. v1 can store 2^bits too, which some readers take for 0."""
        return 0, (1 << self._own_scheme(layer).bits) - 1

    def _group_count(self, layer: str, inputs: int) -> int:
        return -(-inputs // (self._group_size(layer) or inputs))

    def _group_size(self, layer: str) -> int | None:
        group = self._own_scheme(layer).group
        return group if isinstance(group, int) else None

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Subtract from the codes of some outputs their zero points, and multiply by scales.

        Raises:
            AnomalyError: there are no scales or no zero points.
        """
        shape, parts = self.weight_shape(layer), self.parts(layer)
        if shape is None or codes.part != "qweight" or codes.dtype != "I32":
            return None
        if lost := [part for part in ("qzeros", "scales") if part not in parts]:
            raise AnomalyError(f"{codes.path}: {layer} has no {' and no '.join(lost)}")
        zero_points, scales = self.zero_point_values(layer), self.scale_values(layer, "scales")
        if zero_points is None or zero_points.shape != scales.shape or scales.shape[1] != shape[0]:
            sizes = ", ".join(f"{part} {parts[part].shape}" for part in ("qweight", "qzeros", "scales"))
            bits = self._own_scheme(layer).bits
            raise ValueError(f"{sizes} aren't those of {bits} bits in the packing {self.packing}")
        wanted, groups = np.arange(shape[0])[rows], self._groups(layer, shape[1], len(scales))
        values = self._codes_of_outputs(layer, codes, wanted).astype(np.float64)
        return (values - zero_points[:, wanted].T[:, groups]) * scales[:, wanted].T[:, groups]

    def _codes_of_outputs(self, layer: str, codes: Tensor, wanted: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Unpack the codes of some outputs, [outputs, in]."""
        raw, bits = codes.raw().view("u4"), self.code_bits(layer, codes)
        if self.packing == "gemv":
            return unpacked(np.asarray(raw[wanted]), bits)
        if self.packing != "gemm":
            return self._unpacked(np.ascontiguousarray(raw[:, wanted].T), bits)
        lanes = 32 // bits
        columns, position = np.unique(wanted // lanes, return_inverse=True)
        every = _in_order(unpacked(np.ascontiguousarray(raw[:, columns]), bits))
        return every[:, position * lanes + wanted % lanes].T

    def _groups(self, layer: str, inputs: int, count: int) -> NDArray[np.intp]:
        """Return the group of every input: by `g_idx`, which `desc_act` permutes, else one after the other."""
        stated = self.parts(layer).get("g_idx")
        size = self._group_size(layer) or inputs
        groups = np.arange(inputs) // size if stated is None else stated.values().astype(np.intp)
        if groups.shape != (inputs,) or groups.min() < 0 or groups.max() + 1 != count:
            what = f"in groups of {size}" if stated is None else "grouped by g_idx"
            raise ValueError(f"{inputs} inputs {what} don't have {count} scales an output")
        return groups

    def scale_groups(self, layer: str, shape: tuple[int, int]) -> ScaleGroups:
        """Return groups of inputs, in the order that `desc_act` gives them."""
        groups, stated = super().scale_groups(layer, shape), self.parts(layer).get("g_idx")
        if stated is None or element_count(stated) != shape[1]:
            return groups
        order = np.argsort(stated.values().ravel(), kind="stable")
        return groups if (np.diff(order) == 1).all() else replace(groups, order=order)

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield what all formats find, zero points of a wrong shape, and inputs in groups that aren't the declared."""
        yield from super().findings(layer)
        shape, codes = self.weight_shape(layer), self.codes_of(layer)
        if shape is None or codes is None or codes.part != "qweight":
            return
        qzeros, order = self.parts(layer).get("qzeros"), self.parts(layer).get("g_idx")
        if qzeros is not None and (what := self._wrong_shape(layer, qzeros, shape, self.code_bits(layer, codes))):
            yield Finding.at(qzeros, what, "correct bits, group_size and the packing in quantization_config")
        if order is not None and (what := self._wrong_order(order, shape[1], self._group_size(layer) or shape[1])):
            yield Finding.at(order, what, "correct desc_act and group_size, or quantize the layer again")

    def _wrong_shape(self, layer: str, qzeros: Tensor, shape: tuple[int, int], bits: int) -> str:
        """Say what is wrong with the shape of zero points; empty for nothing."""
        rows, numbers = self._group_count(layer, shape[1]), shape[0]
        if self.packing == "gemv":
            rows, numbers = numbers, rows
        words = -(-numbers * bits // 32)
        padded = self.packing == "gemv" and len(qzeros.shape) == 2 and qzeros.shape[-1] >= words
        if len(qzeros.shape) == 2 and qzeros.shape[0] == rows and (qzeros.shape[-1] == words or padded):
            return ""
        stored = "×".join(map(str, qzeros.shape))
        return f"shape {stored}, but zero points of {bits} bits in the packing {self.packing} are {rows}×{words}"

    def _wrong_order(self, order: Tensor, inputs: int, size: int) -> str:
        """Say what is wrong with a `g_idx`; empty for nothing."""
        groups = order.values().ravel()
        if len(groups) != inputs:
            return f"it has {len(groups)} entries, the weight {inputs} inputs"
        expected = np.arange(inputs) // size
        permuted = any((of or {}).get("desc_act") for of in (self.config, *(self.config.get("dynamic") or {}).values()))
        wrong = (np.sort(groups) if permuted else groups) != expected
        if not wrong.any():
            return ""
        if permuted:
            return f"its groups don't have {size} inputs each"
        return f"input {int(np.flatnonzero(wrong)[0])} isn't in its group of {size}, as without desc_act it must be"


METHODS = ("auto-round", "intel/auto-round")
"""The names by which AutoRound's files declare themselves."""


def borrowed_layout(folder: Folder) -> str | None:
    """Return whose layout AutoRound has packed a checkpoint in, `llm_compressor` or `fp8`; None for its own packings.

    None too where the files aren't AutoRound's.
    """
    config = folder.quantization
    layout = str(config.get("packing_format") or "").lower().rpartition(":")[2]
    return layout if config.get("quant_method") in METHODS and layout in ("llm_compressor", "fp8") else None


class AutoRound(Gptq):
    """GPTQ's or AWQ's packing; which layers it covers isn't read, so that they are compared with their siblings."""

    name = "auto-round"

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize all of its packings that no other format reads."""
        return folder.quantization.get("quant_method") in METHODS and borrowed_layout(folder) is None

    @cached_property
    def packing(self) -> str:
        """The packing that `packing_format` names, GPTQ's without it; older files name a kernel in `backend`."""
        stated = str(self.config.get("packing_format") or "").lower()
        if stated in ROUND_PACKINGS:
            return ROUND_PACKINGS[stated]
        kernel = stated or str(self.config.get("backend") or "gptq").lower()
        return "gemm" if "awq" in kernel else "gptq" if "gptq" in kernel and "gptqmodel" not in kernel else kernel

    @cached_property
    def declaration(self) -> Declaration:
        """The settings of all layers, and those of single ones in `extra_config`."""
        config, extra = self.config, self.config.get("extra_config") or {}
        own = [([name], self._scheme({**config, **(settings or {})})) for name, settings in extra.items()]
        return Declaration([*own, (["Linear"], self._scheme(config))])


def _in_order(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return codes [rows, out] of AWQ's words in the order of their outputs."""
    return codes.reshape(len(codes), -1, len(AWQ_ORDER))[:, :, AWQ_ORDER].reshape(len(codes), -1)

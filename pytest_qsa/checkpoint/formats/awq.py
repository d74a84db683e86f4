"""AWQ: codes packed along the outputs, or in tiles of outputs and inputs."""

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
from ..tensors import Matrix, Tensor, unpacked
from .format import Format
from .gptq import Gptq
from .scheme import Declaration, LayerScheme, matches_from_start

FAST = ("gemv_fast", "llm-awq")
FAST_ORDER = np.arange(32).reshape(4, 4, 2).transpose(1, 0, 2).reshape(4, 4, 2).transpose(0, 2, 1).ravel()
"""The input, of 32, that lies in each place of AWQ's packing `gemv_fast`."""


class Awq(Gptq):
    """`qweight` [in, out / 8] in an order of nibbles of its own (`gemm`), or [out, in / 8] (`gemv`).

    Lin et al., arXiv 2306.00978; the files are those of AutoAWQ.
    """

    name = "awq"
    extra = frozenset({"bias"})

    @cached_property
    def packing(self) -> str:
        """The kernel that the words are packed for."""
        return _awq_packing(self.config)

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Leave two packings to `AwqFast`."""
        return super().declared_in(folder) and _awq_packing(folder.quantization) not in FAST

    def is_symmetric(self, config: Settings) -> bool:
        """Say whether settings state that there are no zero points."""
        return config.get("zero_point") is False

    @cached_property
    def declaration(self) -> Declaration:
        """Every linear layer but the head and `modules_to_not_convert`."""
        return Declaration([(["Linear"], self._scheme(self.config))], ["lm_head"], names_layers=True)

    def scheme_of(self, layer: str) -> LayerScheme | None:
        """Return the scheme of a layer that isn't left out; where readers disagree, as the files have it."""
        part, whole = self._left_out(layer)
        left_out = part if part == whole else "qweight" not in self.parts(layer)
        return None if left_out else super().scheme_of(layer)

    def _left_out(self, layer: str) -> tuple[bool, bool]:
        """Say whether a layer is left out by AutoAWQ and vLLM, and whether by transformers.

        The first look for an entry anywhere in the name. transformers (`should_convert_module`) takes it for a regex
        from the name's start to the end of a part of it, or for the name's end.
        """
        keys = [str(key) for key in self.config.get("modules_to_not_convert") or ()]
        part = any(key in layer for key in keys)
        border = r"(?:(?<=\.)|(?=\.|$))"
        return part, any(layer.endswith(key) or matches_from_start(f"(?:{key}){border}", layer) for key in keys)

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield also a layer that one reader of `modules_to_not_convert` leaves out and another doesn't."""
        yield from super().findings(layer)
        part, whole = self._left_out(layer)
        weight = self.weight_of(layer)
        if part != whole and weight is not None and self.is_linear(layer):
            one, other = "AutoAWQ and vLLM", "transformers"
            out, kept = (one, other) if part else (other, one)
            what = f"modules_to_not_convert leaves it out for {out}, and not for {kept}"
            yield Finding.at(weight, what, "write whole names there, from the first part on")


class AwqFast(Awq):
    """`qweight` I16 [out / 4, in]: tiles of 4 outputs and 64 inputs; `scales` [groups, out], and zero points · −scales.

    AutoAWQ writes it as `gemv_fast` with `qzeros`, llm-awq with `scaled_zeros`. w = q · s + zeros.
    """

    name = "awq-fast"
    zero_points = re.compile("^(qzeros|scaled_zeros)$")

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize AWQ's two packings of this kind."""
        return folder.quantization.get("quant_method") == Awq.name and _awq_packing(folder.quantization) in FAST

    @property
    def label(self) -> str:
        """The name of the format as the configuration declares it."""
        return f"awq {self.packing}"

    def _scheme(self, config: Settings) -> LayerScheme:
        required = (("qweight",), ("qzeros", "scaled_zeros"), ("scales",))
        # scales and zero points are padded
        return replace(super()._scheme(config), required=required, strategy="any", dtypes=("I16",))

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in] of a layer's weight, unpacked."""
        codes = self.codes_of(layer)
        if codes is None or codes.part != "qweight" or len(codes.shape) != 2:
            return super().weight_shape(layer)
        return codes.shape[0] * 4, codes.shape[1]

    def words(self, layer: str, codes: Tensor) -> tuple[Array, int]:
        """Return the codes of every output in a row: a word holds those of four."""
        words, step = Format.words(self, layer, codes)
        return (_untiled(words), step) if codes.part == "qweight" else (words, step)

    def by_output(self, layer: str, raw: Array) -> Array:
        """Return the words of four outputs in each row."""
        return raw.reshape(-1, raw.shape[-1])

    def scale_values(self, layer: str, part: str) -> Matrix:
        """Return scales [groups, out], without padding."""
        values, shape = super().scale_values(layer, part), self.weight_shape(layer)
        return values if shape is None or values.ndim != 2 else values[: self._group_count(layer, shape[1])]

    def zero_point_values(self, layer: str) -> Matrix | None:
        """Return the zero points [groups, out] in codes, to the nearest: the products are rounded to float16."""
        shape, parts = self.weight_shape(layer), self.parts(layer)
        tensor = self.zero_point_of(layer)
        if tensor is None or shape is None or "scales" not in parts or tensor.shape != parts["scales"].shape:
            return None
        scales = self.scale_values(layer, "scales")
        with np.errstate(divide="ignore", invalid="ignore"):  # a scale of 0 has a finding of its own
            return np.round(-tensor.values()[: len(scales)] / scales)

    def zero_point_step(self, layer: str) -> Matrix:
        """Return the negative scales, padding included."""
        return -self.parts(layer)["scales"].values()

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Multiply the codes of some outputs by scales, and add the zero points, which are multiplied already."""
        shape, parts, zeros = self.weight_shape(layer), self.parts(layer), self.zero_point_of(layer)
        if shape is None or codes.part != "qweight" or codes.dtype != "I16" or self.code_bits(layer, codes) != 4:
            return None
        if zeros is None or "scales" not in parts:
            raise AnomalyError(f"{codes.path}: {layer} has no {'scales' if zeros else 'zero points'}")
        scales = self.scale_values(layer, "scales")
        if zeros.shape != parts["scales"].shape or scales.shape[1] != shape[0]:
            raise ValueError(f"scales {parts['scales'].shape}, {zeros.part} {zeros.shape}, qweight {codes.shape}")
        wanted, groups = np.arange(shape[0])[rows], self._groups(layer, shape[1], len(scales))
        tiles, position = np.unique(wanted // 4, return_inverse=True)
        values = _untiled(np.asarray(codes.raw()[tiles]))[position * 4 + wanted % 4]
        added = zeros.values()[: len(scales)]
        weight: Matrix = values * scales[:, wanted].T[:, groups] + added[:, wanted].T[:, groups]
        return weight

    def _wrong_shape(self, layer: str, qzeros: Tensor, shape: tuple[int, int], bits: int) -> str:
        """Say that the zero points of a layer have another shape than its scales; empty for nothing."""
        scales = self.parts(layer).get("scales")
        return f"shape {qzeros.shape}, its scales {scales.shape}" if scales and scales.shape != qzeros.shape else ""


def _awq_packing(config: Settings) -> str:
    """Return the packing by `version` or its later name `format`."""
    return str(config.get("version") or config.get("format") or "gemm").lower()


def _untiled(words: Array) -> NDArray[np.uint8]:
    """Unpack tiles [out / 4, in] of `gemv_fast` into codes [out, in]."""
    codes = unpacked(np.ascontiguousarray(words).view("<u4"), 4)  # four outputs of 64 inputs, one after the other
    rows = codes.reshape(len(words), -1, 4, 64).transpose(0, 2, 1, 3).reshape(-1, 32)
    return rows[:, np.argsort(FAST_ORDER)].reshape(len(words) * 4, -1)

"""GPTQ, AWQ and AutoRound: 32-bit words of codes in `qweight`, packed along the inputs or along the outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..folder import Folder
from ..tensors import Tensor
from .format import BUDGET, Format
from .scheme import Declaration, LayerScheme

OLD_SETTINGS = "quantize_config.json"


class Gptq(Format):
    """`qweight` [in · bits / 32, out] with `qzeros` and `scales` [groups, out]."""

    name = "gptq"
    codes = ("qweight", "weight")
    extra = frozenset({"g_idx", "bias"})

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize files from before config.json held the settings, which AutoGPTQ wrote beside it."""
        return super().declared_in(folder) or (
            cls is Gptq and not folder.gguf_file and not folder.quantization and bool(folder.json(OLD_SETTINGS))
        )

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The settings, wherever they stand."""
        return self.folder.quantization or self.folder.json(OLD_SETTINGS) or {}

    @cached_property
    def declaration(self) -> Declaration:
        """Every linear layer but the head, unless `lm_head` or `dynamic` say otherwise."""
        config = self.config
        ignore = [] if config.get("lm_head") else ["lm_head"]
        ignore += [f"re:.*{key[2:]}" for key in config.get("dynamic") or {} if str(key).startswith("-:")]
        some_blocks = bool(config.get("modules_in_block_to_quantize"))
        return Declaration([(["Linear"], self._scheme(config))], ignore, names_layers=not some_blocks)

    def _scheme(self, config: Mapping[str, Any]) -> LayerScheme:
        size, bits = int(config.get("group_size") or -1), int(config.get("bits") or config.get("w_bit") or 4)
        required = (("qweight",), ("qzeros",), ("scales",))
        strategy, group = ("group", size) if size > 0 else ("channel", None)
        return LayerScheme(self.name, bits, strategy, group, required, self.extra, ("I32",))

    def code_bits(self, layer: str, codes: Tensor) -> int:
        """Return the bits that the configuration declares."""
        scheme = self.scheme_of(layer)
        return scheme.bits if scheme is not None and codes.part == "qweight" else super().code_bits(layer, codes)

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in]; the number of scales tells along which axis the codes are packed."""
        codes = self.codes_of(layer)
        if codes is None or codes.part != "qweight" or len(codes.shape) != 2:
            return super().weight_shape(layer)
        rows, columns = codes.shape
        outputs = self._outputs(layer, columns)
        return outputs, rows * 32 // self.code_bits(layer, codes) if outputs == columns else rows

    def _outputs(self, layer: str, columns: int) -> int:
        scales = self.parts(layer).get("scales")
        return scales.shape[-1] if scales is not None else columns

    def words(self, layer: str, codes: Tensor) -> tuple[NDArray[Any], int]:
        """Return the words of every output in a row; the file has them in columns."""
        if codes.part != "qweight":
            return super().words(layer, codes)
        raw = codes.raw().view("u4")
        raw = raw.reshape(-1, raw.shape[-1])
        step = max(1, raw.nbytes // BUDGET)
        turned: NDArray[Any] = np.ascontiguousarray(raw[:, ::step].T)
        packed_outputs = self._outputs(layer, raw.shape[1]) != raw.shape[1]
        return (_one_code_a_word(turned, self.code_bits(layer, codes)) if packed_outputs else turned), step

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return both zero points that symmetric writers use."""
        middle = 1 << (self.code_bits(layer, codes) - 1)
        return (middle - 1, middle) if codes.part == "qweight" else super().zero_codes(layer, codes)


class Awq(Gptq):
    """`qweight` [in, out · bits / 32]; else as GPTQ."""

    name = "awq"
    extra = frozenset({"bias"})

    @cached_property
    def declaration(self) -> Declaration:
        """Every linear layer but the head and `modules_to_not_convert`."""
        config = self.config
        skipped = [f"re:.*{re.escape(name)}" for name in config.get("modules_to_not_convert") or ()]
        return Declaration([(["Linear"], self._scheme(config))], ["lm_head", *skipped], names_layers=True)


class AutoRound(Gptq):
    """GPTQ's or AWQ's layout; which layers it covers isn't read, so that they are compared with their siblings."""

    name = "auto-round"
    declaration = Declaration()


def _one_code_a_word(words: NDArray[Any], bits: int) -> NDArray[Any]:
    """Give each of the outputs that share AWQ's words a row of its own, its code repeated over the word."""
    rows = []
    for shift in range(0, 32, bits):
        code = (words >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
        rows.append(sum(code << np.uint32(other) for other in range(0, 32, bits)))
    return np.stack(rows, axis=1).reshape(-1, words.shape[1]).astype(np.uint32)

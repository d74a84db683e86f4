"""NVIDIA ModelOpt: FP8, FP4, INT8 and INT4, declared in `hf_quant_config.json` or in config.json."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...captures import Array
from ...common import InfraError
from ..folder import Finding, Folder, Settings
from ..tensors import Matrix, Tensor, decoded, element_count, encoded, spread_scales
from .format import BUDGET, Format
from .hqq import packed_again
from .scheme import Declaration, LayerScheme

SETTINGS_FILE = "hf_quant_config.json"
KV = frozenset({"k_scale", "v_scale", "k_bias", "v_bias"})
CAST_SINCE = (0, 43)
"""The version whose default for a KV cache, `fp8_cast`, writes no scales and means 1.0 (its changelog, 2026-04-16)."""
_OPTIONAL = KV | {"bias", "pre_quant_scale", "input_scale"}
_FLOAT8 = (("weight",), ("weight_scale",))
_NVFP4 = LayerScheme("NVFP4", 4, "group", 16, (*_FLOAT8, ("weight_scale_2",)), _OPTIONAL, ("U8",))
_MXFP4 = LayerScheme("W4A8_MXFP4_FP8", 4, "group", 32, _FLOAT8, _OPTIONAL, ("U8",))
_INT4 = LayerScheme("W4A16_AWQ", 4, "group", None, _FLOAT8, _OPTIONAL, ("U8",))
_INT8 = LayerScheme("W8A16", 8, "channel", None, _FLOAT8, _OPTIONAL, ("I8",))
_INPUT = ("input_scale",)
_LORA = ("weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b")
ALGORITHMS = {
    scheme.form: scheme
    for scheme in (
        LayerScheme("FP8", 8, "tensor", None, (*_FLOAT8, _INPUT), _OPTIONAL, ("F8_E4M3",)),
        LayerScheme("FP8_PER_CHANNEL_PER_TOKEN", 8, "channel", None, _FLOAT8, _OPTIONAL, ("F8_E4M3",)),
        LayerScheme("MXFP8", 8, "group", 32, _FLOAT8, _OPTIONAL, ("F8_E4M3",)),
        replace(_NVFP4, required=(*_NVFP4.required, _INPUT)),
        replace(_NVFP4, form="W4A16_NVFP4"),
        replace(_NVFP4, form="NVFP4_AWQ", required=(*_NVFP4.required, _INPUT)),  # a norm may have taken pre_quant_scale
        replace(_NVFP4, form="NVFP4_SVD", required=(*_NVFP4.required, _INPUT, *((part,) for part in _LORA))),
        replace(_NVFP4, form="W4A8_NVFP4_FP8", group=None, required=(*_NVFP4.required, _INPUT)),
        _MXFP4,
        _INT4,
        replace(_INT4, form="W4A8_AWQ", required=(*_FLOAT8, ("weight_scale_2",), _INPUT)),
        _INT8,
        replace(_INT8, form="W8A8_SQ_PER_CHANNEL", required=(*_FLOAT8, _INPUT)),
    )
}
"""The `quant_algo` that are read; any other is refused by name."""
_PACKED_BY_OUTPUTS = ("W4A16_AWQ", "W4A8_AWQ")
"""Those whose bytes hold the codes of two outputs, the first in the low half, as numbers of −8 … 7."""


class ModelOpt(Format):
    """w = (`weight` · `weight_scale` · `weight_scale_2` + b · a) · diag(`pre_quant_scale`), of what is there.

    Of NVFP4, `weight` holds two 4-bit floats a byte, and `weight_scale_2` multiplies (amax / (448 · 6)). b and a are
    the matrices of low rank of SVDQuant (Li et al., arXiv 2411.05007). `weight_scale_2` of W4A8_AWQ is the scale of a
    second rounding, to FP8. The layouts are those of nvidia-modelopt 0.47.
    """

    name = "modelopt"
    loads = False
    # until version 0.43 it clamped scales of a KV cache at 1.0
    unit_scales = True
    codes = ("weight",)
    scales = re.compile(r"^(weight_scale(_2)?|input_scale|[kv]_scale)$")

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Recognize it in either of its two configurations."""
        if folder.gguf_file or folder.quantization:
            return super().declared_in(folder)
        return bool(_settings(folder))

    @cached_property
    def declaration(self) -> Declaration:
        """What `hf_quant_config.json` declares, or config.json where there is no such file.

        Raises:
            InfraError: an algorithm isn't known here.
        """
        settings = _settings(self.folder)
        return self._declared(settings, SETTINGS_FILE) if settings else self._second or Declaration()

    @property
    def cache_scales_by(self) -> str:
        """What declares the scales: `kv_cache_quant_algo`, or as in every format."""
        algorithm = _settings(self.folder).get("kv_cache_quant_algo")
        named = isinstance(algorithm, str) and algorithm not in ("", "None", "MIXED_PRECISION")
        return f"kv_cache_quant_algo is {algorithm}" if named else super().cache_scales_by

    @property
    def cast_cache(self) -> bool:
        """Whether it was written since `fp8_cast`, which writes no scales, is the default: by version 0.43 or later."""
        content = self.folder.json(SETTINGS_FILE) or {}
        stated = (content.get("producer"), self.folder.quantization.get("producer"))
        versions = [str(each.get("version")) for each in stated if isinstance(each, dict)]
        numbers = [re.match(r"(\d+)\.(\d+)", version) for version in versions]
        return any((int(each[1]), int(each[2])) >= CAST_SINCE for each in numbers if each)

    @cached_property
    def _second(self) -> Declaration | None:
        stated = self.folder.quantization
        return self._declared(stated, "config.json") if stated.get("quant_algo") else None

    def _declared(self, settings: Settings, file: str) -> Declaration:
        algorithm = settings.get("quant_algo")
        if algorithm == "MIXED_PRECISION":
            layers = settings.get("quantized_layers") or {}
            groups = [([layer], self._scheme(each, file)) for layer, each in layers.items()]
        else:
            groups = [(["Linear"], self._scheme(settings, file))]
        excluded = settings.get("exclude_modules") or settings.get("ignore") or ()
        return Declaration(groups, [f"re:{fnmatch.translate(str(glob))}" for glob in excluded], names_layers=True)

    def _scheme(self, settings: Settings, file: str) -> LayerScheme:
        algorithm = str(settings.get("quant_algo"))
        if algorithm not in ALGORITHMS:
            raise InfraError(
                f"{self.folder.path / file}: ModelOpt's quant_algo {algorithm} is not known here; "
                f"known are {', '.join(ALGORITHMS)}"
            )
        scheme, size = ALGORITHMS[algorithm], settings.get("group_size")
        # the file states a group size for algorithms without groups too, as null or 0
        return replace(scheme, group=size) if scheme.strategy == "group" and isinstance(size, int) and size else scheme

    def scales_of(self, layer: str) -> dict[str, Tensor]:
        """Return the scales of a layer, without those that are one number by design.

        Scales of a KV cache are 1 at least; SmoothQuant divides inputs by their largest, so that theirs are 1 / 127.
        """
        constants = dict.fromkeys(KV, 1.0)
        if "pre_quant_scale" in self.parts(layer):
            constants["input_scale"] = 1 / 127
        found = {part: tensor for part, tensor in self.parts(layer).items() if self.scales.search(part)}
        return {
            part: tensor
            for part, tensor in found.items()
            if part not in constants or not np.allclose(tensor.values(), constants[part], rtol=1e-6)
        }

    def _packs_outputs(self, layer: str) -> bool:
        scheme = self.scheme_of(layer)
        return scheme is not None and scheme.form in _PACKED_BY_OUTPUTS

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in]: a byte holds two weights, of one output or of two."""
        shape, codes = super().weight_shape(layer), self.codes_of(layer)
        if shape is None or codes is None or codes.dtype != "U8":
            return shape
        return (shape[0] * 2, shape[1]) if self._packs_outputs(layer) else (shape[0], shape[1] * 2)

    def words(self, layer: str, codes: Tensor) -> tuple[Array, int]:
        """Return the codes of every output in a row, two a byte."""
        shape = self.weight_shape(layer)
        if shape is None or codes.dtype != "U8" or not self._packs_outputs(layer):
            return super().words(layer, codes)
        step = max(1, shape[0] * shape[1] // BUDGET)
        return packed_again(_of_outputs(codes, np.arange(0, shape[0], step)), 4), step

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return the codes of zero; of 4-bit floats there are two."""
        return (0,) if self._packs_outputs(layer) else super().zero_codes(layer, codes)

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix:
        """Multiply codes by scales, add the matrices of low rank, and multiply columns by `pre_quant_scale`."""
        parts, scheme, shape = self.parts(layer), self.scheme_of(layer), self.weight_shape(layer)
        if scheme is None or shape is None or codes.dtype not in scheme.dtypes:
            raise ValueError(f"{codes.dtype} isn't how {scheme.form if scheme else 'an excluded layer'} is stored")
        lost = next((choice[0] for choice in scheme.required if choice != _INPUT and choice[0] not in parts), None)
        if lost:
            raise ValueError(f"{lost} is missing")
        if scheme.form in _PACKED_BY_OUTPUTS:
            values = ((_of_outputs(codes, np.arange(shape[0])[rows]) ^ 8).astype(np.float64)) - 8
        else:
            raw = np.asarray(codes.raw()[rows])
            values = decoded(raw, "F4" if codes.dtype == "U8" else codes.dtype).astype(np.float64)
        weight = values * spread_scales(parts["weight_scale"], shape, rows, scheme.group)
        if (second := parts.get("weight_scale_2")) is not None:
            whole = second.values().ravel()
            awq = scheme.form in _PACKED_BY_OUTPUTS
            weight = decoded(encoded(weight / whole, "F8_E4M3"), "F8_E4M3") * whole if awq else weight * whole
        if scheme.form == "NVFP4_SVD":
            low, high = (parts[part].values() for part in _LORA)
            weight = weight + high[rows] @ low
        smoothing = parts.get("pre_quant_scale")
        return weight if smoothing is None else weight * smoothing.values().ravel()

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield also a layer that the two configurations declare differently, and columns' scales of another number."""
        yield from super().findings(layer)
        second, own = self._second, self.scheme_of(layer)
        weight = self.weight_of(layer)
        if weight is None or not self.is_linear(layer):
            return
        other = second.scheme_of(layer) if second is not None else own
        if (own and own.form) != (other and other.form):
            names = [scheme.form if scheme else "floats" for scheme in (own, other)]
            what = f"{SETTINGS_FILE} declares {names[0]}, config.json {names[1]}"
            yield Finding.at(weight, what, "which one a loader reads differs: correct the one that is wrong")
        smoothing, shape = self.parts(layer).get("pre_quant_scale"), self.weight_shape(layer)
        if smoothing is not None and shape is not None and element_count(smoothing) != shape[1]:
            what = f"{element_count(smoothing)} elements, but the weight has {shape[1]} inputs"
            yield Finding.at(smoothing, what, "export the checkpoint again")


def _of_outputs(codes: Tensor, wanted: NDArray[np.intp]) -> NDArray[np.uint8]:
    """Return the codes of some outputs [outputs, in], of bytes [out / 2, in]."""
    raw = np.asarray(codes.raw()[wanted // 2])
    return np.where((wanted % 2 == 0)[:, None], raw & 15, raw >> 4)


def _settings(folder: Folder) -> Settings:
    """Return the part `quantization` of `hf_quant_config.json`; empty where there is none."""
    settings = (folder.json(SETTINGS_FILE) or {}).get("quantization")
    return settings if isinstance(settings, dict) and settings.get("quant_algo") else {}

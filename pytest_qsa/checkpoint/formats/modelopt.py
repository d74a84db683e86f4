"""NVIDIA ModelOpt: FP8, NVFP4 and MXFP8, declared in `hf_quant_config.json` or in config.json."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from ...common import InfraError
from ..folder import Finding, Folder
from ..tensors import Tensor, decoded
from .format import Format, Matrix, element_count, spread_scales
from .scheme import Declaration, LayerScheme

SETTINGS = "hf_quant_config.json"
KV = frozenset({"k_scale", "v_scale", "k_bias", "v_bias"})
OPTIONAL = KV | {"bias", "pre_quant_scale", "input_scale"}
_FLOAT8 = (("weight",), ("weight_scale",))
_NVFP4 = LayerScheme("NVFP4", 4, "group", 16, (*_FLOAT8, ("weight_scale_2",)), OPTIONAL, ("U8",))
_INPUT = ("input_scale",)
ALGORITHMS = {
    scheme.form: scheme
    for scheme in (
        LayerScheme("FP8", 8, "tensor", None, (*_FLOAT8, _INPUT), OPTIONAL, ("F8_E4M3",)),
        LayerScheme("FP8_PER_CHANNEL_PER_TOKEN", 8, "channel", None, _FLOAT8, OPTIONAL, ("F8_E4M3",)),
        LayerScheme("MXFP8", 8, "group", 32, _FLOAT8, OPTIONAL, ("F8_E4M3",)),
        replace(_NVFP4, required=(*_NVFP4.required, _INPUT)),
        replace(_NVFP4, form="W4A16_NVFP4"),
        replace(_NVFP4, form="NVFP4_AWQ", required=(*_NVFP4.required, _INPUT, ("pre_quant_scale",))),
    )
}
"""The `quant_algo` that are read; any other is refused by name."""


class ModelOpt(Format):
    """w = (`weight` · `weight_scale` · `weight_scale_2`) · diag(`pre_quant_scale`); the last two where they are there.

    Of NVFP4, `weight` holds two 4-bit floats a byte, and `weight_scale_2` multiplies (amax / (448 · 6)).
    """

    name = "modelopt"
    loads = False
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
        return self._declared(settings, SETTINGS) if settings else self._second or Declaration()

    @cached_property
    def _second(self) -> Declaration | None:
        stated = self.folder.quantization
        return self._declared(stated, "config.json") if stated.get("quant_algo") else None

    def _declared(self, settings: Mapping[str, Any], file: str) -> Declaration:
        algorithm = settings.get("quant_algo")
        if algorithm == "MIXED_PRECISION":
            layers = settings.get("quantized_layers") or {}
            groups = [([layer], self._scheme(each, file)) for layer, each in layers.items()]
        else:
            groups = [(["Linear"], self._scheme(settings, file))]
        excluded = settings.get("exclude_modules") or settings.get("ignore") or ()
        return Declaration(groups, [f"re:{fnmatch.translate(str(glob))}" for glob in excluded], names_layers=True)

    def _scheme(self, settings: Mapping[str, Any], file: str) -> LayerScheme:
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
        """Return the scales of a layer, without those of a KV cache that are 1: ModelOpt never writes smaller ones."""
        found = {part: tensor for part, tensor in self.parts(layer).items() if self.scales.search(part)}
        return {part: tensor for part, tensor in found.items() if part not in KV or not (tensor.values() == 1).all()}

    def weight_shape(self, layer: str) -> tuple[int, int] | None:
        """Return [out, in]: a byte of NVFP4 holds two weights."""
        shape, codes = super().weight_shape(layer), self.codes_of(layer)
        return (shape[0], shape[1] * 2) if shape and codes is not None and codes.dtype == "U8" else shape

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix:
        """Multiply codes by the scales of their groups and of the tensor, and columns by `pre_quant_scale`."""
        parts, scheme, shape = self.parts(layer), self.scheme_of(layer), self.weight_shape(layer)
        if scheme is None or shape is None or codes.dtype not in scheme.dtypes:
            raise ValueError(f"{codes.dtype} isn't how {scheme.form if scheme else 'an excluded layer'} is stored")
        lost = next((choice[0] for choice in scheme.required if choice != _INPUT and choice[0] not in parts), None)
        if lost:
            raise ValueError(f"{lost} is missing")
        raw = np.asarray(codes.raw()[rows])
        values = decoded(raw, "F4" if codes.dtype == "U8" else codes.dtype).astype(np.float64)
        weight = values * spread_scales(parts["weight_scale"], shape, rows, scheme.group)
        for part in ("weight_scale_2", "pre_quant_scale"):
            if part in parts:
                weight = weight * parts[part].values().ravel()
        return weight

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield also a layer that the two configurations declare differently, and columns' scales of another number."""
        yield from super().findings(layer)
        second, own = self._second, self.scheme_of(layer)
        weight = self.weight_of(layer)
        if weight is None or not self.is_linear(layer):
            return
        other = second.scheme_of(layer) if second is not None else own
        if own != other:
            names = [scheme.form if scheme else "floats" for scheme in (own, other)]
            what = f"{SETTINGS} declares {names[0]}, config.json {names[1]}"
            yield Finding.at(weight, what, "which one a loader reads differs: correct the one that is wrong")
        smoothing, shape = self.parts(layer).get("pre_quant_scale"), self.weight_shape(layer)
        if smoothing is not None and shape is not None and element_count(smoothing) != shape[1]:
            what = f"{element_count(smoothing)} elements, but the weight has {shape[1]} inputs"
            yield Finding.at(smoothing, what, "export the checkpoint again")


def _settings(folder: Folder) -> Mapping[str, Any]:
    """Return the part `quantization` of `hf_quant_config.json`; empty where there is none."""
    content = folder.json(SETTINGS)
    settings = content.get("quantization") if isinstance(content, dict) else None
    return settings if isinstance(settings, dict) and settings.get("quant_algo") else {}

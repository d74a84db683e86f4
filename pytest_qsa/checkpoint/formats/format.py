"""The numpy half of a quantization format: how it is declared, and what the codes of a layer mean.

Each format is one module of this folder with a subclass of `Format`, and its torch half in `engine/formats/`. Formats
of other packages register by the entry point group `pytest_qsa.formats`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any, ClassVar

import numpy as np

from ...captures import Array
from ...common import AnomalyError, InfraError, Registry, did_you_mean
from ..adapter import CONV1D, Adapter
from ..experts import ExpertLayer, as_loaded
from ..folder import Finding, Folder
from ..tensors import (
    EIGHT_BITS,
    FLOATS,
    RAW,
    Matrix,
    Tensor,
    decoded,
    decoded_rows,
    element_count,
)
from .layer_tensors import LayerTensors
from .scheme import LayerScheme, ScaleGroups

UNSIGNED = {**dict.fromkeys(("I8", "U8", "F4", *EIGHT_BITS), "u1"), "I16": "u2", "I32": "u4", "U32": "u4", "I64": "u8"}
"""The dtypes of codes → the unsigned integers of the same width."""
BUDGET = 4 << 20
"""The bytes that a check reads of one tensor: all of a small one, evenly spaced rows of a large one."""
AGAIN = "quantize and save the layer again"


class Format(LayerTensors):
    """A quantization format, bound to one checkpoint folder.

    A subclass that sets `name` is registered by it. The defaults fit a format that stores one code an element and
    one scale a row, group, block or tensor; a subclass overrides what differs.

    Attributes:
        name: the `quant_method` by which a configuration declares the format.
        libraries: the packages that unpack it, and those without which transformers loads it otherwise; their versions
            are part of the fingerprint of a capture.
        loads: transformers can load it; else tensors that it drops are no fault of the files.
        gpu_only: transformers runs its codes on a GPU alone, and dequantizes them when it loads without one.
        streams: transformers can leave its weights on disk (`memory.offload_device: disk`).
        uniform: layers of one kind are stored alike, so that one which isn't is a fault.
        signed_scales: a writer may give a scale the sign of its group's largest weight.
        unit_scales: a writer may leave scales of inputs and of a KV cache at 1.0, or out, by design.
        word_dtypes: the dtypes of codes that `words` reads → the numpy dtype of the file's words.
    """

    name: ClassVar[str] = ""
    libraries: ClassVar[tuple[str, ...]] = ()
    loads: ClassVar[bool] = True
    gpu_only: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    uniform: ClassVar[bool] = True
    signed_scales: ClassVar[bool] = False
    unit_scales: ClassVar[bool] = False
    word_dtypes: ClassVar[Mapping[str, str]] = UNSIGNED

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            FORMATS.add(cls.name, cls)

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        self._tried: dict[Hashable, str] = {}
        self._misfits: dict[str, str] = {}

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Say whether a checkpoint declares this format."""
        return folder.quantization.get("quant_method") == cls.name

    @property
    def label(self) -> str:
        """The name of the format as the configuration declares it."""
        return self.name

    def weight_dtype(self, layer: str) -> str:
        """Return the dtype that holds a layer's weight exactly: the file's of plain floats, else float32.

        What is dequantized, or changed by an adapter, is rounded to float32.
        """
        weight = self.weight_of(layer)
        changed = self.adapter is not None and self.adapter.touches(self._adapted.get(layer, layer))
        if weight is None or changed or self.codes_of(layer) is not None:
            return "float32"
        return {"BF16": "bfloat16", "F16": "float16"}.get(weight.dtype, "float32")

    def scale_groups(self, layer: str, shape: tuple[int, int]) -> ScaleGroups:
        """Return which weights of a matrix [out, in] share a scale, by its scheme, else by how many scales there are.

        The rows of a matrix where neither says so.
        """
        rows, columns = shape
        scheme = self.scheme_of(layer) if self.codes_of(layer) is not None else None
        if scheme is not None and isinstance(scheme.group, tuple):
            return ScaleGroups(*scheme.group)
        if scheme is not None and isinstance(scheme.group, int) and scheme.group > 0:
            return ScaleGroups(1, scheme.group)
        scale = self.weight_scale_of(layer)
        count = element_count(scale) if scale is not None else rows
        if count == 1:
            return ScaleGroups(rows, columns)
        return ScaleGroups(
            1, -(-columns // (count // rows)) if count % rows == 0 < count <= rows * columns else columns
        )

    def weight_bits(self, layer: str) -> int:
        """Return the bits in which a layer's weight is stored, scales aside: as declared, else by the file's bytes.

        16 for what is kept in floats.
        """
        name = "{0}.{2.tensor}".format(*self.experts[layer]) if layer in self.experts else layer
        scheme, codes = self.scheme_of(name), self.codes_of(name)
        if codes is None:
            return 16
        shape = self.weight_shape(name)
        elements = prod(shape) if shape is not None else element_count(codes)
        return scheme.bits if scheme is not None else 8 * codes.raw().nbytes // max(1, elements)

    def kept_names(self, reference: Folder) -> dict[str, str]:
        """Return the reference's tensor → this checkpoint's: those that a converter keeps, if they are floats."""
        return {name: name for name in reference.tensors}

    def added_to(self, tensor: Tensor) -> float:
        """Return what a converter adds to all elements of a tensor in floats."""
        return 0.0

    def words(self, layer: str, codes: Tensor) -> tuple[Array, int]:
        """Return a sample of a layer's codes as unsigned words [rows, words of a row], and the step between its rows.

        A row holds the codes of one output, whatever the order in the file. Words of one byte, where the file's are
        longer, are one code each.
        """
        raw = self.by_output(layer, codes.raw().view(UNSIGNED[codes.dtype]))
        step = max(1, raw.nbytes // BUDGET)
        return np.ascontiguousarray(raw[::step]), step

    def by_output(self, layer: str, raw: Array) -> Array:
        """Return a view of a layer's raw codes [outputs, words]: what is written into it changes `raw`."""
        return raw.reshape(-1, raw.shape[-1]) if raw.ndim > 1 else raw

    def typical_row(self, layer: str) -> float | None:
        """Return the median rms of a layer's rows, which is compared with its siblings'; None for plain scales."""
        return None

    def zero_codes(self, layer: str, codes: Tensor) -> tuple[int, ...]:
        """Return the codes that stand for zero: a row of them is a pruned output and no fault."""
        if codes.dtype in ("F8_E4M3", "F8_E5M2"):
            return 0x00, 0x80
        return (0, 8) if codes.dtype in ("U8", "F4") else (0,)

    def expert_rows(self, tensor: str, index: int, place: ExpertLayer, rows: slice) -> Matrix | None:
        """Return rows of an expert's layer from one of the `packed_tensors`, [rows, in] in float64."""
        packed = self.folder.tensors[tensor]
        view = place.of(packed.raw()[index])[rows]  # of the mapped file, so that no other expert is read
        return decoded(np.ascontiguousarray(view), packed.dtype).astype(np.float64)

    @cached_property
    def adapter(self) -> Adapter | None:
        """The adapter that changes the checkpoint's weights; None for none."""
        folder = self.folder.adapter_folder
        conv1d = folder is not None and self.folder.text_config.get("model_type") in CONV1D
        return Adapter(folder, conv1d) if folder is not None else None

    @cached_property
    def _adapted(self) -> Mapping[str, str]:
        """The layers of the files that the adapter has tensors of → their names there."""
        names = self.adapter.layers if self.adapter else ()
        return {layer: name for name, layer in self.layers_of(names).items()}

    def rows(self, layer: str, rows: slice = slice(None)) -> Matrix | None:
        """Return rows of the weight that a layer multiplies by [rows, in], in float64: dequantized, with its adapter.

        None where `refusal` says why it can't.

        Raises:
            AnomalyError: a tensor is missing or doesn't fit the others.
        """
        return self.adapted(layer, rows, self.stored_rows(layer, rows))

    def adapted(self, layer: str, rows: slice, stored: Matrix | None) -> Matrix | None:
        """Return rows of a layer's weight with its adapter. `stored`: the rows in the files of the base.

        None where it isn't known what the adapter does to them.

        Raises:
            AnomalyError: the adapter doesn't fit the layer.
        """
        if self.adapter is None:
            return stored
        name = self._adapted.get(layer, layer)
        if not self.adapter.touches(name):
            return stored
        if problem := self.adapter_problem(layer):
            raise AnomalyError(f"{self.adapter.folder}: {problem}")
        return self.adapter.applied(name, rows, stored)

    def adapter_problem(self, layer: str) -> str:
        """Return what of an adapter's tensors of a layer doesn't fit the base; empty where all of it does."""
        assert self.adapter is not None
        return self.adapter.problem(self._adapted.get(layer, layer), self.weight_shape(layer))

    def adapter_findings(self) -> Iterator[Finding]:
        """Yield the layers of the adapter that the base doesn't have, and those whose tensors don't fit."""
        if self.adapter is None:
            return
        ends = {_end(layer) for layer in self.folder.layers}
        for layer, name in self._adapted.items():
            if self.adapter.refused(name):  # its names and shapes are those of another kind
                continue
            tensor = next(iter(self.adapter.layers[name].values()))
            what = self.adapter_problem(layer)
            # a tied head has no tensors of its own in the files, and neither has what holds packed experts
            inside = any(each.startswith(f"{name}.") for each in self.folder.layers)
            if not what and _end(layer) not in ends and not inside and not name.endswith("lm_head"):
                what = f"the adapter is for a layer {name}, which the base doesn't have"
            if what:
                yield Finding(layer, tensor.name, tensor.file, what, "is it an adapter of this base?")

    def stored_rows(self, layer: str, rows: slice = slice(None)) -> Matrix | None:
        """Return rows of a layer's weight as its own files hold it, without an adapter, as `rows` does.

        It can where the tensors of the layer and what is declared of it agree; `refusal` says why it can't. A layer of
        the `experts` has rows too.

        Raises:
            AnomalyError: a tensor is missing or doesn't fit the others.
        """
        if layer in self.experts:
            holder, index, place = self.experts[layer]
            return self.expert_rows(f"{holder}.{place.tensor}", index, place, rows)
        codes = self.codes_of(layer)
        if self._contradiction(layer):
            return None
        if codes is None:
            plain = self.parts(layer).get("weight")
            return decoded_rows(plain, rows) if plain is not None and plain.dtype in FLOATS else None
        if not self._reads(codes):
            return None
        try:
            return self.dequantized(layer, codes, rows)
        except (ValueError, IndexError, ZeroDivisionError) as error:  # numpy's, of shapes that can't be broadcast
            raise AnomalyError(f"{codes.path}: the tensors of {layer} don't fit one another: {error}") from error
        except KeyError as error:
            raise AnomalyError(f"{codes.path}: {layer} has no {error.args[0]}") from error

    @cached_property
    def fitting(self) -> Sequence[str]:
        """The layers whose tensors fit one another, of which alone the checks compare numbers."""
        return [layer for layer in self.folder.layers if not self.misfit(layer)]

    @cached_property
    def scaled(self) -> Sequence[str]:
        """Those of the `fitting` layers that hold codes, scales or zero points: none of a checkpoint in floats."""
        return [
            layer
            for layer in self.fitting
            if self.codes_of(layer) or self.scales_of(layer) or self.zero_point_of(layer)
        ]

    def misfit(self, layer: str) -> str:
        """Say why the tensors of a layer don't fit one another; empty where they do."""
        if layer not in self._misfits:
            tensors = tuple((part, tensor.dtype, tensor.shape) for part, tensor in self.parts(layer).items())
            # the layers of other blocks, of which one is tried
            alike = self.folder.kinds.get(layer, layer), tensors, self.scheme_of(layer)
            if alike not in self._tried:
                self._tried[alike] = self._misfit(layer)
            self._misfits[layer] = self._tried[alike]
        return self._misfits[layer]

    def _misfit(self, layer: str) -> str:
        codes = self.codes_of(layer)
        try:
            with np.errstate(all="ignore"):  # numbers have checks of their own
                for part in self.scales_of(layer):
                    self.scale_values(layer, part)
                self.zero_point_values(layer)
                whole = codes is not None and self._reads(codes) and self.weight_shape(layer) is not None
                if codes is not None and whole and not self._contradiction(layer):
                    self.dequantized(layer, codes, slice(0, 1))
        except (AnomalyError, ValueError, IndexError, ZeroDivisionError) as error:
            return str(error)
        except KeyError as error:
            return f"{error.args[0]} is missing"
        return ""

    def _reads(self, codes: Tensor) -> bool:
        """Say whether the dtype of codes is one that is read."""
        return codes.dtype in RAW or codes.dtype in self.word_dtypes

    def dequantized(self, layer: str, codes: Tensor, rows: slice) -> Matrix | None:
        """Return rows of a layer that is stored in codes, [rows, in] in float64; None where this format can't.

        A format that doesn't override it is never read as numbers.
        """
        return None

    def _contradiction(self, layer: str) -> str:
        """Say why the tensors of a layer are no weight as it is declared; empty where nothing speaks against it."""
        codes, scheme = self.codes_of(layer), self.scheme_of(layer)
        if codes is None:
            signs = self.signs_of(layer)
            return f"{signs[0]} shows that it is quantized, and no codes are known" if signs else ""
        if scheme is None and self.declaration.names_layers:
            return f"{self.label} is declared, but not of this layer"
        if scheme is not None and scheme.dtypes and codes.dtype not in scheme.dtypes:
            return f"{scheme.form} is declared, which is stored as {' or '.join(scheme.dtypes)}"
        return ""

    def unread(self, layer: str) -> str:
        """Say why codes that are as declared aren't read as numbers."""
        codes = self.codes_of(layer)
        if codes is not None and not self._reads(codes):
            return f"{codes.dtype} isn't read here"
        return f"its format, {self.label}, is not known here"

    def refusal(self, layer: str) -> str:
        """Say why `rows` gives no numbers of a layer: what its tensors are, and what is wrong with them."""
        name = self._adapted.get(layer, layer)
        if self.adapter and self.adapter.touches(name) and (reason := self.adapter.refused(name)):
            return reason
        if layer in self.experts:
            holder, _, place = self.experts[layer]
            return self.refusal(f"{holder}.{place.tensor}")
        parts = self.parts(layer).items()
        held = ", ".join(f"{part} ({each.dtype} {'×'.join(map(str, each.shape)) or 'scalar'})" for part, each in parts)
        wrong = self._contradiction(layer)
        advice = "correct quantization_config, or save the layer again" if wrong else "leave it out of site: weight"
        return f"the files hold {held or 'nothing'} of {layer}: {wrong or self.unread(layer)}; {advice}"

    def layers_of(self, modules: Collection[str]) -> dict[str, str]:
        """Return module → layer of the files, by the names of the modules of the loaded model.

        Multimodal models name what stands before the block in several ways, so that an end which only one layer and
        one module have joins the two; so do experts of Mixtral's kind of files.
        """
        own = {*self.folder.layers, *self.experts}
        layers, ends = Counter(map(_end, own)), Counter(map(_end, modules))
        by_end = {_end(layer): layer for layer in own}
        unique = {name for name in modules if layers[_end(name)] == ends[_end(name)] == 1}
        return {name: by_end[_end(name)] if name in unique and name not in own else name for name in modules}

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield the parts of a layer that its scheme needs and that it doesn't know, and scales of a wrong shape."""
        codes = self.codes_of(layer)
        if codes is None:
            if self.declaration.names_layers:
                yield from self._orphaned_scales(layer)
        elif (scheme := self.scheme_of(layer) if self.is_linear(layer) else None) is not None:
            yield from self._against_scheme(layer, codes, scheme)
        elif not self.scales_of(layer) and codes.dtype in RAW and codes.dtype not in ("I64", "BOOL"):
            yield Finding.at(codes, f"its {codes.dtype} codes have no scale", AGAIN)

    def _orphaned_scales(self, layer: str) -> Iterator[Finding]:
        """Yield the weight's scales of a layer that has no codes: nothing would apply them."""
        dense = any(scheme.form == "dense" for _, scheme in self.declaration.groups)
        for part, tensor in self.scales_of(layer).items():
            if part.startswith(("weight", "_weight")) and not dense:
                advice = "the weight was replaced, or the layer belongs into ignore"
                yield Finding.at(tensor, "a scale beside a weight that isn't quantized", advice)

    def _against_scheme(self, layer: str, codes: Tensor, scheme: LayerScheme) -> Iterator[Finding]:
        parts, scales = self.parts(layer), self.scales_of(layer)
        for choice in scheme.required:
            if not any(part in parts for part in choice):
                what = f"missing, though the scheme {scheme.form} needs it"
                advice = "a loader fills it with random numbers or ones: save the checkpoint again"
                yield Finding(layer, f"{layer}.{choice[0]}", codes.file, what, advice)
        known = {part for choice in scheme.required for part in choice} | scheme.allowed
        for part, tensor in parts.items():
            if (part in scales or self.zero_points.search(part)) and part not in known:
                what = f"unexpected: the scheme {scheme.form} has no {part}"
                advice = "a loader drops it silently: correct quantization_config, or save the checkpoint again"
                yield Finding.at(tensor, what, advice)
        scale, shape = self.weight_scale_of(layer), self.weight_shape(layer)
        expected = scheme.scale_count(*shape) if shape else None
        if scale is not None and expected is not None and element_count(scale) != expected:
            size = "×".join(map(str, scale.shape)) or "scalar"
            what = f"shape {size}, but {scheme.strategy}-wise scales of a weight {shape} are {expected}"
            advice = "correct strategy and group_size in quantization_config, or quantize the layer again"
            yield Finding.at(scale, what, advice)


FORMATS: Registry[type[Format]] = Registry("pytest_qsa.formats", __package__)


@lru_cache(maxsize=8)  # of a folder object: its declaration is read once for all layers
def format_of(folder: Folder) -> Format:
    """Return the format that a checkpoint declares; an `UnknownFormat` where nothing that is installed claims it.

    Raises:
        InfraError: an entry point of the group `pytest_qsa.formats` can't be loaded.
    """
    # floats are asked last, for some formats are declared outside of config.json
    built_in = sorted(FORMATS.built_in(), key=lambda kind: kind.name == "none")
    found = next((kind for kind in built_in if kind.declared_in(folder)), None)
    found = found or next((kind for kind in FORMATS.all() if kind.declared_in(folder)), UnknownFormat)
    return found(folder)


class UnknownFormat(Format):
    """A declared format that nothing claims: its layers are compared with their siblings, its codes never read."""

    @property
    def label(self) -> str:
        """The `quant_method` that the configuration declares."""
        return str(self.folder.quantization.get("quant_method") or "unknown")

    def stored_rows(self, layer: str, rows: slice = slice(None)) -> Matrix | None:
        """Return rows of a norm or an embedding; a float may hold packed codes where nobody knows what is declared."""
        return None if self.is_linear(layer) else super().stored_rows(layer, rows)


KNOWN_ELSEWHERE = frozenset({
    "aqlm", "awq_marlin", "bitblas", "bitnet", "bitsandbytes_8bit", "cpu_awq", "deepgemm_fp8", "deepspeedfp", "eetq",
    "experts_int8", "fbgemm_fp8", "fouroversix", "fp_quant", "gemma", "gptq_bitblas", "gptq_marlin", "gptq_marlin_24",
    "higgs", "inc", "intel/auto-round", "ipex", "marlin", "metal", "moe_wna16", "mxfp8", "neuron_quant", "nvfp4",
    "petit_nvfp4", "ptpc_fp8", "qqq", "rtn", "sinq", "spqr", "squeezellm", "tpu_int8", "vptq",
})  # fmt: skip
"""What else a `quant_method` may be: transformers 5.23 (`quantizers/auto.py`), vLLM (`QuantizationMethods`)."""


def check_declared(form: Format) -> None:
    """Check that somebody knows the format that a checkpoint declares: else its layers are only held against siblings.

    Raises:
        AnomalyError: its configuration names none.
        InfraError: it names one that nothing here knows.
    """
    known = {*KNOWN_ELSEWHERE, *(kind.name for kind in FORMATS.built_in())} - {"none"}
    if not isinstance(form, UnknownFormat) or form.label in known:
        return
    file = form.folder.path / "config.json"
    if "quant_method" not in form.folder.quantization:
        raise AnomalyError(f"{file}: quantization_config names no quant_method: take it from the original")
    raise InfraError(
        f"{file}: quantization_config declares quant_method '{form.label}', which is not known here"
        f"{did_you_mean(form.label, sorted(known))}: correct it, or add a format of that name (docs/extending.md)"
    )


def streams_from_disk(method: str) -> bool:
    """Say whether transformers can leave the weights of a format on disk, by its `quant_method`; empty for floats."""
    return (FORMATS.find(method or "none") or UnknownFormat).streams


def libraries_of_formats(folder: Folder) -> list[str]:
    """Return the packages that unpack the built-in formats and that of a checkpoint, and apply its adapter, sorted.

    Raises:
        AnomalyError: the configuration is no JSON.
        InfraError: there is none.
    """
    own = format_of(folder)
    libraries = {library for kind in (*FORMATS.built_in(), type(own)) for library in kind.libraries}
    return sorted(libraries | ({"peft"} if own.adapter else set()))


def _end(name: str) -> str:
    """Return a layer's name from its block's number on, with experts as transformers names them."""
    found = re.search(r"(?<![^.])(layers|h|blocks)\.\d+\.", name)
    return as_loaded(name[found.start() :] if found else name)

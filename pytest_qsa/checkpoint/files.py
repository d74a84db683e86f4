"""The files of a checkpoint, and of its reference: what the static checks and the comparison of weights look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..captures import FilesProvenance, ModelProvenance
from ..metrics import Parameters
from .checks.changed_settings import Resolve, unresolved
from .checks.sizes import Original
from .folder import Finding, Folder
from .formats.format import Format, format_of
from .relation import Relation, compare_norms

EXECUTION = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_config", "run_compressed", "dequantize")
"""The keys of `quantization_config` by which the same tensors are run in another way."""
START = 4096
"""The bytes of a tensor that are compared first."""


@dataclass(frozen=True)
class Files:
    """What a check looks at: the checkpoint, and its reference where the suite names a folder for one.

    `resolve`: fills in what a config.json doesn't state; see `changed_settings`.
    """

    folder: Folder
    reference: Folder | None = None
    resolve: Resolve = field(default=unresolved, compare=False)
    _found: dict[Any, tuple[Finding, ...]] = field(default_factory=dict, compare=False)

    def once(self, function: Callable[..., Iterable[Finding]], parameters: Parameters) -> tuple[Finding, ...]:
        """Return what a check finds; several assertions that ask for the same read the files once."""
        key = (function.__name__, *sorted(parameters.items()))
        if key not in self._found:
            self._found[key] = tuple(function(self, **parameters))
        return self._found[key]

    @property
    def settings_text(self) -> str:
        """What the text of an error calls the settings, those of files and headers."""
        return f"{self.folder.path}: a setting in config.json or a header"

    @cached_property
    def format(self) -> Format:
        """The format that the checkpoint declares."""
        return format_of(self.folder)

    @property
    def provenance(self) -> FilesProvenance:
        """What there is to read: how many files and tensors, and the format that is declared."""
        quantization, tensors = self.folder.quantization, self.folder.tensors.values()
        form = quantization.get("format") or quantization.get("bits") or ""
        return FilesProvenance(
            len({tensor.file for tensor in tensors}), len(tensors), f"{self.format.label} {form}".strip()
        )

    @property
    def model(self) -> ModelProvenance:
        """Which model they are: where they lie, the adapter among them, and what there is to read."""
        folder, adapter = self.folder, self.format.adapter
        return ModelProvenance(
            str(folder.apart or folder.path),
            base=str(folder.path) if folder.apart else "",
            adapter=str(adapter) if adapter else None,
            files=self.provenance,
        )

    @property
    def stored_quantized(self) -> list[str]:
        """The layers whose weight is stored in codes."""
        return [name for name in self.folder.layers if self.format.codes_of(name)]

    @cached_property
    def same_tensors(self) -> bool:
        """Whether the reference holds the same tensors to the last bit, however they are cut into files.

        False where one of the two has an adapter, whose tensors aren't among them.
        """
        if self.reference is None or self.folder.adapter_folder or self.reference.adapter_folder:
            return False
        mine, theirs = self.folder.tensors, self.reference.tensors
        if mine.keys() != theirs.keys() or any(
            (tensor.dtype, tensor.shape) != (theirs[name].dtype, theirs[name].shape) for name, tensor in mine.items()
        ):
            return False
        # First how each begins: of two models of one kind all but a few differ at once.
        starts = (np.array_equal(t.bytes()[:START], theirs[name].bytes()[:START]) for name, t in mine.items())
        return all(starts) and all(tensor.repeats(theirs[name]) for name, tensor in mine.items())

    @property
    def runs_as_reference(self) -> bool:
        """Whether both declare the same KV cache and the same way to run quantized layers."""
        if self.reference is None:
            return True
        mine, theirs = self.folder.quantization, self.reference.quantization
        return all(mine.get(key) == theirs.get(key) for key in EXECUTION)

    @cached_property
    def relation(self) -> Relation:
        """How the checkpoint differs from its reference by design; `same` without a reference."""
        return compare_norms(self.folder, self.reference) if self.reference else Relation("same")

    @cached_property
    def original(self) -> Original | None:
        """The reference's weights, with the factors of a smoothing, by which sizes are judged; None for none."""
        if self.reference is None or self.folder.gguf_file or not self.reference.files:
            return None
        return Original(self.format, self.reference, self.relation)

    @cached_property
    def quantized(self) -> list[str]:
        """The layers that hold codes, scales or other parts that only quantized weights have."""
        form = self.format
        return [
            name for name in self.folder.layers if form.codes_of(name) or form.scales_of(name) or form.signs_of(name)
        ]

"""Checkpoints in floating point: nothing is declared, and every weight is read as it is."""

from __future__ import annotations

from collections.abc import Iterator

from ..folder import Finding, Folder
from .format import Format


class Unquantized(Format):
    """A safetensors checkpoint without a `quantization_config`."""

    name = "none"
    streams = True

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Say whether the configuration declares no quantization."""
        return not folder.gguf_file and not folder.quantization

    def findings(self, layer: str) -> Iterator[Finding]:
        """Yield also a weight that isn't what it looks like: transformers would read its codes as numbers."""
        yield from super().findings(layer)
        weight = self.weight_of(layer)
        signs = [part for part in self.signs_of(layer) if weight is not None and part != weight.part]
        if weight is not None and signs:
            what = f"{signs[0]} beside it shows that it is quantized, and config.json has no quantization_config"
            yield Finding.at(weight, what, "restore the configuration of the quantizer, or save the layer again")

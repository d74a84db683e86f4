"""Checkpoints in floating point: nothing is declared, and every weight is read as it is."""

from __future__ import annotations

from ..folder import Folder
from .format import Format


class Unquantized(Format):
    """A safetensors checkpoint without a `quantization_config`."""

    name = "none"
    streams = True

    @classmethod
    def declared_in(cls, folder: Folder) -> bool:
        """Say whether the configuration declares no quantization."""
        return not folder.gguf_file and not folder.quantization

"""bitsandbytes: modules of its own whose scheme the configuration states; their weight isn't read here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .format import EngineFormat, scheme_name


class BitsAndBytesModules(EngineFormat):
    """LLM.int8, which rounds inputs too, and 4 bits, which rounds none."""

    name = "bitsandbytes"

    def declared_scheme(self, settings: Mapping[str, Any]) -> str | None:
        """Return 8 bits for weights and inputs, or 4-bit floats for weights alone."""
        if settings["quant_method"] != self.name:
            return None
        return scheme_name(8, 8, floats=False) if settings.get("load_in_8bit") else scheme_name(4, 16, floats=True)

"""GPTQ and AWQ: modules of their own kernels, which round no inputs and don't say their scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .format import EngineFormat, scheme_name


class GptqModules(EngineFormat):
    """Modules whose packed weight isn't read here; the configuration states the bits."""

    name = "gptq"

    def declared_scheme(self, settings: Mapping[str, Any]) -> str | None:
        """Return the bits of the configuration, and inputs in 16 bits."""
        if settings["quant_method"] != self.name:
            return None
        # 4 is transformers' default for AWQ, whose configurations may leave the bits out.
        return scheme_name(int(settings.get("bits") or 4), 16, floats=False)


class AwqModules(GptqModules):
    """The same for the modules of AWQ."""

    name = "awq"

"""A finding: what a static check holds against one tensor or setting of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `layer`: the module it is at; `tensor`: the tensor or the setting; `file`: its file."""

    layer: str
    tensor: str
    file: str
    what: str
    advice: str

    def __str__(self) -> str:
        """Write it in one line: `tensor (file): what; advice`."""
        where = f" ({self.file})" if self.file else ""
        return f"{self.tensor}{where}: {self.what}; {self.advice}"

"""How the quantized modules of a subject ran, checked against what the suite requires."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..captures import FLOAT, ExecutedModules, Execution, module_count
from ..common import AnomalyError, InfraError

if TYPE_CHECKING:
    from .sections import Model

WEIGHTS_ONLY, EMULATED, KERNELS, UNPROVED = "weights only", "emulated", "by kernels", "unproved"
UNPACKED = f"{WEIGHTS_ONLY}, dequantized when loaded"


def check_execution(execution: Execution | None, model: Model) -> None:
    """Check that every quantized module ran, in the way that `model.require` asks for.

    Raises:
        AnomalyError: a quantized module never ran, and `model.allow_idle` does not name it.
        InfraError: the model ran in another way.
    """
    allowed = model.allow_idle
    idle = execution.idle if execution else ()
    idle = tuple(name for name in idle if not (allowed and re.search(allowed, name)))
    if idle:
        others = f" (and {len(idle) - 1} more)" if idle[1:] else ""
        raise AnomalyError(
            f"the quantized module {idle[0]}{others} never ran, so no number is about it: give data "
            "that reach it, or name it in model.allow_idle (a regex)"
        )
    if model.require is not None:
        _check_required(execution, model.require.executed_as)


def _check_required(execution: Execution | None, required: Sequence[str]) -> None:
    wanted = " or ".join(required)
    if not execution or not execution.forward:
        raise InfraError(f"model.require: executed_as: {wanted} can't be checked: no forward of the checkpoint ran")
    for words, kind in (execution.kinds or {FLOAT: ExecutedModules(0, "")}).items():
        if not any(_fits(way, words) for way in required):
            what = f"{module_count(kind.modules)}, the first {kind.first}, ran as {words}" if kind.first else ""
            raise InfraError(
                f"model.require: executed_as: {wanted} is not what ran: "
                f"{what or 'the model ran in floating point'}{_advice(words)}"
            )


def _fits(way: str, words: str) -> bool:
    """Say whether a requirement's words are all among those of the execution."""
    return set(way.lower().split()) <= set(words.lower().replace(",", "").split())


def _advice(words: str) -> str:
    if UNPACKED in words:
        return ": the loader unpacked the weights and rounds no inputs (dequantize or run_compressed in config.json?)"
    return ": no input is rounded in its calls" if WEIGHTS_ONLY in words else ""

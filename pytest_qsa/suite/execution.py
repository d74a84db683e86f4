"""How the quantized modules of a subject were run, as the pass saw it: in words, and against what a suite requires."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..common import AnomalyError, InfraError

if TYPE_CHECKING:
    from .sections import Model

WEIGHTS_ONLY, EMULATED, KERNELS, UNPROVED = "weights only", "emulated", "by kernels", "unproved"
UNPACKED = f"{WEIGHTS_ONLY}, dequantized when loaded"
FLOAT = "float"
NOTHING = "nothing, no forward ran"


def executed_as(run: Mapping[str, Any]) -> str:
    """Say in words how a run's modules were executed: `W8A8 emulated (28 modules)`; nothing where nothing is known."""
    seen = run.get("execution")
    if not seen:
        return ""
    if not seen["forward"]:
        return NOTHING
    kinds: Mapping[str, Any] = seen["kinds"]
    text = ", ".join(f"{words} ({_many(kind['modules'])})" for words, kind in kinds.items()) or FLOAT
    return text + (f"; {_many(seen['idle_experts'])} of experts saw no token" if seen["idle_experts"] else "")


def _many(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"


def check_execution(run: Mapping[str, Any], model: Model) -> None:
    """Check that every quantized module ran, and ran as the suite requires, where it does.

    Raises:
        AnomalyError: a quantized module never ran, so that nothing is known of it.
        InfraError: the model ran otherwise than required.
    """
    seen = run.get("execution")
    allowed = model.allow_idle
    idle = [name for name in (seen or {}).get("idle", ()) if not (allowed and re.search(allowed, name))]
    if idle:
        others = f" (and {len(idle) - 1} more)" if idle[1:] else ""
        raise AnomalyError(
            f"the quantized module {idle[0]}{others} never ran, so nothing that was measured is about it: give data "
            "that reach it, or name it in model.allow_idle (a regex)"
        )
    if model.require is not None:
        _check_required(seen, model.require.executed_as)


def _check_required(seen: Mapping[str, Any] | None, required: Sequence[str]) -> None:
    wanted = " or ".join(required)
    if not seen or not seen["forward"]:
        raise InfraError(f"model.require: executed_as: {wanted} can't be told here: no forward of the checkpoint ran")
    kinds: Mapping[str, Any] = seen["kinds"] or {FLOAT: {"modules": 0, "first": ""}}
    for words, kind in kinds.items():
        if not any(_fits(way, words) for way in required):
            what = f"{_many(kind['modules'])}, the first {kind['first']}, ran as {words}" if kind["first"] else ""
            raise InfraError(
                f"model.require: executed_as: {wanted} is not what ran: "
                f"{what or 'the model ran in floating point'}{_advice(words)}"
            )


def _fits(way: str, words: str) -> bool:
    """Say whether all words of a requirement are among those of what ran."""
    return set(way.lower().split()) <= set(words.lower().replace(",", "").split())


def _advice(words: str) -> str:
    if UNPACKED in words:
        return ": the loader unpacked the weights and rounds no inputs (dequantize or run_compressed in config.json?)"
    return ": no input is rounded in its calls" if WEIGHTS_ONLY in words else ""

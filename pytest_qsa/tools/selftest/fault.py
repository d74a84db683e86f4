"""What a fault is, and what the modules of faults share.

A fault is a function `(mutant, layer, strength)`. Its decorator says which layers it can be put into and which
strengths it has, so that bisection can find the smallest strength that a suite catches. The first line of its docstring
is the text in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...checkpoint import Folder, Tensor, format_of
from .mutant import Mutant

Inject = Callable[[Mutant, str, float], None]
Targets = Callable[[Folder], Sequence[str]]


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    `unit`: what the strength counts; empty for a fault of one strength. `neutral`: the strength that changes nothing.
    `default`: the strength that is tried first. `strongest`: the last one that is tried. `whole`: strengths are whole
    numbers. `targets`: returns the layers of a checkpoint that can have the fault. `names`: what a test has to name.
    """

    name: str
    text: str
    unit: str
    neutral: float
    default: float
    strongest: float
    whole: bool
    names: str
    targets: Targets
    inject: Inject

    @property
    def graded(self) -> bool:
        """Whether the fault has more than one strength."""
        return self.unit != ""


class Faults(dict[str, Fault]):
    """Faults by name."""

    def add(
        self,
        targets: Targets,
        unit: str = "",
        *,
        neutral: float = 0.0,
        default: float = 1.0,
        strongest: float = 1.0,
        whole: bool = False,
        names: str = "the layer",
    ) -> Callable[[Inject], Inject]:
        """Return the decorator that adds a function's fault; the arguments are those of `Fault`."""

        def register(function: Inject) -> Inject:
            name, text = function.__name__, (function.__doc__ or "").splitlines()[0]
            self[name] = Fault(name, text, unit, neutral, default, strongest, whole, names, targets, function)
            return function

        return register


def stop_tokens(folder: Folder, name: str = "generation_config.json") -> list[int]:
    """Return the tokens that end an answer, as a file of settings has them; none where it doesn't say."""
    stated = (folder.json(name) or {}).get("eos_token_id")
    return stated if isinstance(stated, list) else [] if stated is None else [stated]


def quantized(folder: Folder) -> list[str]:
    """Return the layers that have codes and scales."""
    form = format_of(folder)
    return [name for name in folder.layers if form.codes_of(name) and form.weight_scale_of(name)]


def scale_of(folder: Folder, layer: str) -> Tensor:
    """Return the scales of a quantized layer's weight."""
    scale = format_of(folder).weight_scale_of(layer)
    assert scale is not None
    return scale


def codes_of(folder: Folder, layer: str) -> Tensor:
    """Return the codes of a quantized layer."""
    codes = format_of(folder).codes_of(layer)
    assert codes is not None
    return codes


def spread_rows(size: int, share: float) -> NDArray[np.int64]:
    """Return the indices of a share of the rows, evenly spaced and at least one."""
    return np.unique(np.linspace(0, size - 1, max(1, round(size * share))).astype(np.int64))

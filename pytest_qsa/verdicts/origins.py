"""Where a difference from the reference comes from: the layer that adds most of it, and what looks wrong there.

Computed from the energies of signal and error that a capture holds for its sites. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..captures import Capture, Site
from ..checkpoint import Finding, counted_kinds
from ..common import AnomalyError, number
from ..metrics import NOISE, OWN, SIGNAL, View, compared, decibels, local_powers

UNRELATED = 0.1
"""Below this correlation two tensors have nothing to do with one another."""
SCALED = 0.05
"""Below this share of the energy that no common factor explains, a tensor is the reference's times a factor."""
LEAST_GAIN = 0.02
"""A factor this close to 1 is no fault of a scale."""
MOST_OF_THE_ERROR = 0.5
"""The share of the error that makes a few channels suspect."""
FEW = 0.05
"""The share of the channels that counts as few."""

NEAR = 4.0
"""Layers whose share of error is within this factor of the worst one's (6 dB) are as bad."""
STANDS_OUT = 100.0
"""From this multiple (20 dB) of the other layers' median share of error, layers stand out."""
WRONG = 0.25
"""From this share of error, the energy of error over that of the signal, a layer is wrong and not just coarse."""
GROWS = 1.5
"""By at least this factor the error grows at a block that is named; less is what each block adds."""
FIRST = 4.0
"""The first block, before which there is no error, is named where it adds this multiple of what the others do."""

FindingsAt = Callable[[str], Sequence[Finding]]
"""What the static checks say of a layer and of all below it."""


@dataclass(frozen=True)
class Likeness:
    """How x̂ resembles x: x̂ ≈ gain · x, `correlation` ⟨x, x̂⟩ / (‖x‖·‖x̂‖); `empty` where x̂ is all zeros."""

    gain: float
    correlation: float
    empty: bool

    @classmethod
    def of(cls, powers: NDArray[np.float64]) -> Likeness:
        """Compute it from Σx², Σ(x − x̂)², Σx̂²."""
        signal, error, own = (float(powers[column]) for column in (SIGNAL, NOISE, OWN))
        product = (signal + own - error) / 2  # ⟨x, x̂⟩, for ‖x − x̂‖² = ‖x‖² − 2⟨x, x̂⟩ + ‖x̂‖²
        if not signal > 0 or not own > 0:
            return cls(0.0, 0.0, empty=signal > 0 and own == 0)
        return cls(product / signal, product / float(np.sqrt(signal * own)), empty=False)

    def __str__(self) -> str:
        """Say what fault it suggests; empty where it suggests none."""
        if self.empty:
            return "all zeros: it was never filled"
        if abs(self.correlation) < UNRELATED:
            return (
                f"unrelated to the reference's (correlation {self.correlation:.2f}): another order (rows, packed "
                "nibbles, groups), or the weights of another layer"
            )
        # 1 − r² is the share of ‖x̂‖² that the best factor leaves unexplained.
        if 1 - self.correlation**2 < SCALED and abs(self.gain - 1) > LEAST_GAIN:
            return (
                f"{self.gain:.3g} × the reference's and otherwise the same (correlation {self.correlation:.3f}): "
                "a scale"
            )
        return ""


def origin_of(capture: Capture, findings_at: FindingsAt = lambda layer: ()) -> dict[str, str]:
    """Return what is known of where the difference comes from: `adds most`, and a `suspect` where there is one.

    `adds most` is the block at whose output the error grows most, and in it the layer with the worst error of its own:
    on the reference's input where that was measured, else of its weight.
    """
    weights = {layer: sums for layer in capture.modules if (sums := _summed(capture, layer, "weight")) is not None}
    local = {layer: sums for layer in capture.modules if (sums := _local(capture, layer)) is not None}
    block, growth = _steepest(capture)
    for energies, text, of_many in (
        (local, "on the reference's input its sqnr is {} dB", "on the reference's input their sqnr is {} dB or more"),
        (weights, "the sqnr of its weight is {} dB", "the sqnr of their weights is {} dB or more"),
    ):
        ratios = {layer: own[NOISE] / own[SIGNAL] for layer, own in energies.items() if own[SIGNAL] > 0}
        worst = max(ratios, key=lambda layer: ratios[layer], default="")
        if worst and (equals := _equals(ratios, ratios[worst])):
            least = number(decibels(energies[worst][SIGNAL], energies[worst][NOISE]))
            return {"adds most": f"{counted_kinds(equals, list(ratios))} alike: {of_many.format(least)}"}
        # a layer outside the block where the error grows most would contradict what the outputs show
        if worst and ratios[worst] > 0 and (not block or worst.startswith(f"{block}.")):
            value = number(decibels(energies[worst][SIGNAL], energies[worst][NOISE]))
            origin = {"adds most": f"{worst}: {text.format(value)}, the least of {len(energies)} layers"}
            break
    else:
        # No layer has an error of its own that was measured: the block alone is named.
        worst, origin = block, {"adds most": f"{block}: {growth}"} if block else {}
    if not origin:
        return {}
    odd = [_odd_numbers(capture, worst), *(f"{finding.tensor}: {finding.what}" for finding in findings_at(worst)[:1])]
    suspect = "; ".join(filter(None, odd))
    return origin | ({"suspect": suspect} if suspect else {})


def _equals(ratios: Mapping[str, float], most: float) -> list[str]:
    """Return the layers that are about as bad as the worst, where they are several and far worse than the median.

    All of them, where half of the layers and more have nothing in common with the reference.
    """
    near = [layer for layer, ratio in ratios.items() if ratio >= most / NEAR]
    rest = [ratio for ratio in ratios.values() if ratio < most / NEAR]
    apart = most >= WRONG or (bool(rest) and most >= STANDS_OUT * float(np.median(rest)))
    return near if len(near) > 1 and most > 0 and apart else []


def _steepest(capture: Capture) -> tuple[str, str]:
    """Return the block at whose output Σe²/Σx² grows most, and how it grows; nothing where blocks weren't compared."""
    sums = {block: found for block in capture.blocks if (found := _summed(capture, block, "output")) is not None}
    ratios = {block: found[NOISE] / found[SIGNAL] for block, found in sums.items() if found[SIGNAL] > 0}
    if len(ratios) < 2:
        return "", ""
    values = np.array(list(ratios.values()))
    # The first block's error counts as its own: before it nothing was compared.
    steps = np.diff(values, prepend=0.0)
    at = int(np.argmax(steps))
    if not steps[at] > 0:
        return "", ""
    before = values[at - 1] if at else 0.0
    least = (GROWS - 1) * before if at else FIRST * float(np.median(np.abs(steps[1:])))
    if steps[at] < least:
        return "", ""  # as it grows from block to block in any quantized model
    text = f"the error at its output grows from {number(before)} to {number(values[at])} of the signal, more than at "
    return list(ratios)[at], text + f"any other of {len(values)} blocks"


def _odd_numbers(capture: Capture, name: str) -> str:
    """Say what the first odd tensor in a layer or a block is like: weights first, for the others follow from them."""
    inside = [layer for layer in capture.modules if layer == name or layer.startswith(f"{name}.")]
    for summed, tensor in (
        (partial(_summed, site="weight"), "the weight of {}"),
        (_local, "what {} makes of the reference's input"),
        (partial(_summed, site="output"), "the output of {}"),
    ):
        for layer in inside:
            if layer in capture.blocks or (sums := summed(capture, layer)) is None:
                continue
            text = str(Likeness.of(sums)) or (_few_channels(capture, layer) if tensor == "the weight of {}" else "")
            if text:
                return f"{tensor.format(layer)} is {text}"
    return ""


def _few_channels(capture: Capture, layer: str) -> str:
    """Say which few output channels of a weight hold most of its error."""
    rows = _rows(capture, layer, "weight")
    # Of fewer channels than 1 / FEW not even a single one counts as few.
    if rows is None or len(rows) < 1 / FEW or not rows[:, NOISE].sum() > 0:
        return ""
    order = np.argsort(-rows[:, NOISE])
    shares = np.cumsum(rows[order, NOISE]) / rows[:, NOISE].sum()
    count = int(np.searchsorted(shares, MOST_OF_THE_ERROR)) + 1
    if count > FEW * len(rows):
        return ""
    names = ", ".join(map(str, sorted(order[:count].tolist())[:4])) + (", …" if count > 4 else "")
    like = str(Likeness.of(rows[order[0]]))
    detail = f"; channel {order[0]} is {like}" if like else ""
    return f"wrong in few output channels: {shares[count - 1]:.0%} of its error is in {names} of {len(rows)}{detail}"


def _view(capture: Capture, layer: str, site: Site) -> View | None:
    """Return a site of a comparison as the metrics see it, the reference's sinks left out; None where there is none."""
    numbers = capture.sites.get((layer, site))
    if numbers is None or capture.reference is None:
        return None
    positions = "no_sink" if site != "weight" and capture.reference.sinks.searched else "all"
    return View(numbers, site, positions, capture.reference.sinks, layer)


def _rows(capture: Capture, layer: str, site: Site) -> NDArray[np.float64] | None:
    view = _view(capture, layer, site)
    if view is None or "error" not in view.numbers:
        return None
    try:
        return compared(view)
    except AnomalyError:
        return None


def _summed(capture: Capture, layer: str, site: Site) -> NDArray[np.float64] | None:
    """Return Σx², Σ(x − x̂)², Σx̂² of all tokens or rows of a site; None where it wasn't compared, or isn't finite."""
    rows = _rows(capture, layer, site)
    return None if rows is None else _finite(rows[:, : OWN + 1].sum(axis=0))


def _local(capture: Capture, layer: str) -> NDArray[np.float64] | None:
    """Return Σx², Σ(x − x̂)², Σx̂² of what a layer makes of the reference's input; None as in `_summed`."""
    view = _view(capture, layer, "output")
    return None if view is None or "local" not in view.numbers else _finite(local_powers(view).sum(axis=0))


def _finite(sums: NDArray[np.float64]) -> NDArray[np.float64] | None:
    return sums if np.isfinite(sums).all() else None

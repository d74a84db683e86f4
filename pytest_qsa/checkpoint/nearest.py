"""Quantize a weight again in the scheme of a layer, in numpy: rounded to nearest, or clipped and rounded otherwise.

The error of round to nearest is what a healthy quantization is measured by: others clip, round or calibrate
differently, and stay near it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .formats.format import Format
from .formats.scheme import ScaleGroups

Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rounding = Callable[[Doubles], Doubles]
"""Makes whole numbers of an array."""


@dataclass(frozen=True)
class Requantization:
    """One way to quantize a weight. `clip`: the share of a group's range that the codes reach.

    `chance`: a number is rounded up or down by chance, so that the mean is the number (stochastic rounding).
    """

    clip: float = 1.0
    chance: bool = False

    def rounding(self) -> Rounding:
        """Return what makes whole numbers of an array; the same chances for every weight."""
        if not self.chance:
            return np.rint
        generator = np.random.default_rng(SEED)

        def by_chance(scaled: Doubles) -> Doubles:
            rounded: Doubles = np.floor(scaled + generator.random(scaled.shape))
            return rounded

        return by_chance


SEED = 20261129
NEAREST = Requantization()
HEALTHY = (NEAREST, Requantization(clip=0.95), Requantization(chance=True), Requantization(clip=0.9, chance=True))
"""Ways in which a healthy quantizer may quantize a weight: what an `mse` observer clips, and noise 3 dB above the
least, which GPTQ's error is about."""


@dataclass(frozen=True)
class IntegerGrid:
    """Whole numbers of some bits; with zero points where it isn't symmetric."""

    bits: int
    symmetric: bool

    def restored(self, low: Doubles, high: Doubles, values: Doubles, rounded: Rounding = np.rint) -> Doubles:
        """Return the values on the grid that reaches from the least to the largest of their group.

        `low`, `high`: of each value's group; arrays that numpy spreads over those of `values`.
        """
        if self.symmetric:
            most = 1 << (self.bits - 1)
            scales = _positive(np.maximum(-low, high) / (most - 0.5))  # of all codes, as compressed-tensors takes it
            symmetric = rounded(values / scales)
            np.clip(symmetric, -most, most - 1, out=symmetric)
            symmetric *= scales
            return symmetric
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scales = _positive((high - low) / ((1 << self.bits) - 1))
        zero = np.rint(-low / scales)
        whole: Doubles = (np.clip(rounded(values / scales) + zero, 0, (1 << self.bits) - 1) - zero) * scales
        return whole


@dataclass(frozen=True)
class FloatGrid:
    """Floats of a few bits (OCP's 8-bit floats and microscaling formats). `powers`: scales are powers of two."""

    mantissa: int
    least_exponent: int
    largest: float
    powers: bool = False

    def restored(self, low: Doubles, high: Doubles, values: Doubles, rounded: Rounding = np.rint) -> Doubles:
        """Return the values on the grid whose largest number is the largest |x| of their group."""
        most = np.maximum(-low, high)
        scales = _positive(most / self.largest)
        if self.powers:  # OCP MX v1.0, 6.3: 2^(floor(log2(max)) − emax), what lies above is clipped
            scales = _positive(np.exp2(np.floor(np.log2(_positive(most))) - np.floor(np.log2(self.largest))))
        scaled = np.clip(values / scales, -self.largest, self.largest)
        # frexp's mantissa is below 1, so that its exponent is one more than the float's.
        steps = np.ldexp(1.0, np.maximum(np.frexp(scaled)[1] - 1, self.least_exponent) - self.mantissa)
        whole: Doubles = np.clip(rounded(scaled / steps) * steps, -self.largest, self.largest) * scales
        return whole


CodeGrid = IntegerGrid | FloatGrid
E4M3, E5M2, E2M1 = (3, -6, 448.0), (2, -14, 57344.0), (1, 0, 6.0)


def grid_of(form: Format, layer: str) -> CodeGrid | None:
    """Return the numbers that the codes of a layer can be, before their scales; None where that isn't known here."""
    scheme, codes = form.scheme_of(layer), form.codes_of(layer)
    if scheme is None or codes is None:
        return None
    name = scheme.form.lower()
    powers = "mx" in name
    if codes.dtype == "F8_E4M3":
        return FloatGrid(*E4M3, powers)
    if codes.dtype == "F8_E5M2":
        return FloatGrid(*E5M2, powers)
    if "fp4" in name and form.name.partition("_")[0] != "bitsandbytes":
        return FloatGrid(*E2M1, powers)
    if "fp" in name or "nf4" in name or codes.dtype not in form.word_dtypes:
        return None
    return IntegerGrid(scheme.bits, scheme.zero_point is not None or form.zero_point_of(layer) is None)


def requantized(
    weight: Singles, grid: CodeGrid, groups: ScaleGroups, how: Requantization = NEAREST, rounded: Rounding = np.rint
) -> Singles:
    """Quantize a weight [R, in] to numbers of a grid, a scale for each group; R is whole blocks of groups.

    `rounded`: the `rounding` of `how`, which goes on from one part of a weight to the next. The scales are exact: what
    another dtype of them adds is small beside the rounding.
    """
    values = weight if groups.order is None else weight[:, groups.order]
    height, width = values.shape
    low, high = (how.clip * _of_groups(fold, values, groups) for fold in (np.minimum, np.maximum))
    wide = values.astype(np.float64)
    if groups.rows == 1 and width % groups.columns == 0:
        shape = (height, -1, groups.columns)
        restored = grid.restored(low[:, :, None], high[:, :, None], wide.reshape(shape), rounded).reshape(values.shape)
    else:
        low, high = (
            np.repeat(np.repeat(each, groups.rows, axis=0)[:height], groups.columns, axis=1)[:, :width]
            for each in (low, high)
        )
        restored = grid.restored(low, high, wide, rounded)
    if groups.order is None:
        return restored.astype(np.float32)
    found = np.empty_like(weight)
    found[:, groups.order] = restored
    return found


def _of_groups(fold: np.ufunc, values: Singles, groups: ScaleGroups) -> Doubles:
    """Return the least or the largest value of each group, [blocks of rows, blocks of columns]."""
    height, width = values.shape
    if width % groups.columns == 0:
        found = fold.reduce(values.reshape(height, -1, groups.columns), axis=2)
    else:
        found = fold.reduceat(values, np.arange(0, width, groups.columns), axis=1)
    if groups.rows > 1:
        found = fold.reduceat(found, np.arange(0, height, groups.rows), axis=0)
    wide: Doubles = found.astype(np.float64)
    return wide


def _positive(scales: Doubles) -> Doubles:
    return np.where(scales > 0, scales, 1.0)  # of a group of zeros

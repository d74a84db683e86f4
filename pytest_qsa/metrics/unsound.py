"""Why a number is not finite: what a person has to look at. numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..captures import PADDING
from .registry import View


def _spot(view: View, population: int) -> str:
    """Name a population that holds NaN or Inf, and the first such token where tokens were kept."""
    sample = f"sample {view.numbers.sample[population]}"
    if view.numbers.token_max is None:
        return sample
    return f"{sample} at position {np.flatnonzero(~np.isfinite(view.numbers.tokens_of(population)))[0]}"


def why_not_finite(view: View) -> str:
    """Say what stands in the way of a finite number at a site."""
    numbers = view.numbers
    if numbers.stored is not None:
        return "the loader made NaN or Inf of what is finite in the file, or the file's weight holds them"
    if numbers.moments is not None and (bad := int(numbers.moment("nonfinite").sum())):
        where = next((f", first in {_spot(view, int(p))}" for p in np.flatnonzero(numbers.moment("nonfinite"))), "")
        return f"{bad} elements are NaN or Inf{where}"
    if numbers.token_max is None:
        return "its formula divides by zero, or there are too few elements"
    for population in range(numbers.populations):
        tokens = numbers.tokens_of(population)
        at = np.flatnonzero(~np.isfinite(tokens))
        where = f"sample {numbers.sample[population]}"
        if at.size:
            return f"NaN or Inf in {at.size} of {tokens.size} tokens of {where}, first at position {at[0]}"
        kept: NDArray[np.float32] = tokens[view.kept(population) & (tokens != PADDING)]
        if not kept.size:
            return f"no token of {where} counts under positions: {view.positions}"
        if not kept.max() > 0:
            return f"all values of {where} are zero"
    return "too few tokens, or the median is zero"

"""How far does `weight_gain` go on healthy weights? SmolLM2's, rounded in several ways to some bits.

The farthest group of every matrix of nine blocks, with a scale for 32, 64 and 128 inputs and for a row: the bounds that
`qsa init` writes stand above it.
"""

from __future__ import annotations

import numpy as np
from common import SMOLLM2

from pytest_qsa.captures import GAIN
from pytest_qsa.checkpoint.files import Files
from pytest_qsa.checkpoint.folder import open_folder
from pytest_qsa.checkpoint.formats.scheme import ScaleGroups
from pytest_qsa.checkpoint.nearest import NEAREST, IntegerGrid, Requantization, Singles, requantized
from pytest_qsa.checkpoint.weight_statistics import WeightRows, reduced
from pytest_qsa.checkpoint.weights import stored_weights

BLOCKS = (0, 2, 5, 10, 15, 20, 24, 28, 29)
WAYS = {
    "to nearest": NEAREST,
    **{f"clip {clip:g}": Requantization(clip) for clip in (0.97, 0.95, 0.9)},
    "by chance": Requantization(chance=True),
    "by chance, clip 0.9": Requantization(0.9, chance=True),
}


def share(weight: Singles, original: Singles, nearest: Singles, groups: ScaleGroups) -> float:
    """Return `weight_gain` of a weight."""
    rows = WeightRows(weight, 0, "float32", original, groups, nearest)
    return float(reduced([GAIN], lambda: iter([rows]), weight.shape, matrix=True).arrays["gain"][0])


def main() -> None:
    """Print a row for each number of bits, with and without zero points."""
    weights = stored_weights(Files(open_folder(SMOLLM2)))
    layers = [name for name in weights if name.endswith("_proj") and int(name.split(".")[2]) in BLOCKS]
    originals = [np.concatenate([*weights[name].parts()]) for name in layers]
    print("bits symmetric ", *WAYS, sep=" | ")
    for bits, symmetric in ((bits, symmetric) for bits in (8, 4, 3, 2) for symmetric in (True, False)):
        most, grid = dict.fromkeys(WAYS, 0.0), IntegerGrid(bits, symmetric)
        for columns, original in ((columns, original) for columns in (32, 64, 128, 0) for original in originals):
            groups = ScaleGroups(1, columns or original.shape[1])
            nearest = requantized(original, grid, groups)
            for name, way in WAYS.items():
                rounded = requantized(original, grid, groups, way, way.rounding())
                most[name] = max(most[name], share(rounded, original, nearest, groups))
        print(f"{bits:>4} {symmetric!s:<9} ", *(f"{value:.2f}" for value in most.values()), sep=" | ", flush=True)


if __name__ == "__main__":
    main()

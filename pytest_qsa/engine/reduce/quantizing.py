"""The powers of signal and error under a simulated quantization with a scale for each token, channel or group.

These scales aren't known after the pass, so that it takes the sums itself, for the sites that ask. quantization.py
defines the grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...captures import QuantizationPowers
from ...metrics import LARGEST_CODE, LEAST_EXPONENT, MANTISSA_BITS, Granularity, Scheme


@dataclass(frozen=True)
class Quantizer:
    """A grid and what shares a scale: a row (`token`), a column (`channel`), `size` neighbours of a row (`group`)."""

    scheme: Scheme
    by: Granularity
    size: int

    @classmethod
    def of(cls, statistic: QuantizationPowers) -> Quantizer:
        """Return the quantizer of a statistic."""
        return cls(statistic.scheme, statistic.by, statistic.group_size)  # type: ignore[arg-type]

    def scales(self, x: Tensor) -> Tensor:
        """Return the scales of x [T, C] float32: [T, 1], [1, C] or [T, C / size rounded up]; 1 where all is zero."""
        magnitudes = x.abs()
        if self.by == "group":
            missing = -x.shape[1] % self.size
            magnitudes = torch.nn.functional.pad(magnitudes, (0, missing))
            largest = magnitudes.reshape(len(x), -1, self.size).amax(dim=2)
        else:
            largest = magnitudes.amax(dim=1 if self.by == "token" else 0, keepdim=True)
        scales: Tensor = largest / LARGEST_CODE[self.scheme]
        return scales.masked_fill(scales == 0, 1.0)

    def powers(self, x: Tensor) -> Tensor:
        """Return Σx² and Σ(x − x̂)² of x [T, C] float32 as float64 [2]."""
        scales = self.scales(x)
        if self.by == "group":
            scales = scales.repeat_interleave(self.size, dim=1)[:, : x.shape[1]]
        scaled = x / scales
        if self.scheme == "fp8_e4m3":
            exponents = (torch.frexp(scaled).exponent - 1).clamp_min(LEAST_EXPONENT)
            steps = torch.exp2((exponents - MANTISSA_BITS).to(x.dtype))
            rounded = (scaled / steps).round() * steps
        else:
            rounded = scaled.round()
        wide = x.double()
        return torch.stack([_total(wide.square()), _total((wide - (rounded * scales).double()).square())])


def _total(x: Tensor) -> Tensor:
    """Sum in an order that doesn't depend on the number of threads, which torch's does on the CPU."""
    return torch.from_numpy(np.asarray(x.numpy().sum())) if x.device.type == "cpu" else x.sum()

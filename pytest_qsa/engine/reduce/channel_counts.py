"""What is kept of single channels where a site asks: counts (channels.py says the bins), extremes, features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...captures import CODES, FIRST_CODE, SHIFT


def count_channels(x: Tensor, pooled: dict[str, Any]) -> None:
    """Add the counts of x [T, C] float32 to `pooled`, int32 [2 · CODES, C]."""
    channels = x.shape[1]
    if "channel_counts" not in pooled:
        pooled["channel_counts"] = torch.zeros((2 * CODES, channels), dtype=torch.int32, device=x.device)
    patterns = x.contiguous().view(torch.int32)
    codes = (((patterns & 0x7FFFFFFF) >> SHIFT) - FIRST_CODE).clamp_(0, CODES - 1) + CODES * (patterns < 0)
    places = codes.long() * channels + torch.arange(channels, device=x.device)
    ones = torch.ones((), dtype=torch.int32, device=x.device).expand(places.numel())
    pooled["channel_counts"].view(-1).scatter_add_(0, places.flatten(), ones)


def widen_channels(x: Tensor, pooled: dict[str, Any]) -> None:
    """Widen the extremes [4, C] of |x| and x in `pooled` by those of x [T, C] float32."""
    low, high = x.aminmax(dim=0)
    magnitudes = x.abs()
    ends = torch.stack([magnitudes.amax(dim=0), magnitudes.amin(dim=0), low, high]) + 0.0  # −0 is 0
    before = pooled.get("channel_extremes")
    if before is not None:
        largest, least = torch.maximum(before, ends), torch.minimum(before, ends)
        ends = torch.stack([largest[0], least[1], least[2], largest[3]])
    pooled["channel_extremes"] = ends


def count_features(x: Tensor, features: Mapping[str, float], pooled: dict[str, Any]) -> None:
    """Add to arrays [C + 2] how often |x| reaches a threshold in each channel of x [T, C]; T; and the NaN and Inf."""
    for name, threshold in features.items():
        nonfinite = (~x.isfinite()).sum()
        found = torch.cat([(x.abs() >= threshold).sum(dim=0), nonfinite.new_full((1,), len(x)), nonfinite[None]])
        pooled[name] = pooled[name] + found if name in pooled else found

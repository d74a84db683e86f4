"""The picture that a model sees, in small, and the grid of its patches: for the evidence of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...captures import Picture
from .media_records import Record

SHOWN_SIDE = 128
"""The most pixels of a shown picture's sides."""
NO_GRID = (0, 0)


def picture_of(record: Record, tensors: Mapping[str, Tensor], processor: Any, model: Any) -> Picture:
    """Return what a report shows of a picture: as the processor cut it, where it is one tile, else the whole of it."""
    config = getattr(model, "config", None)
    pixels = _one_tile(tensors.get("pixel_values"))
    marks = (getattr(config, key, None) for key in ("image_token_id", "image_token_index"))
    mark = next((each for each in marks if each is not None), None)
    ids = tensors.get("input_ids")
    places = torch.nonzero(ids[0] == mark).flatten() if ids is not None and mark is not None else torch.zeros(0)
    shown, tower = record.image, NO_GRID
    assert shown is not None
    if pixels is not None:
        shown = _as_seen(pixels, getattr(processor, "image_processor", processor))
        tower = _patches(pixels.shape[1:], getattr(config, "vision_config", config))
    size = pixels.shape[1:] if pixels is not None else None
    grid = grid_of(len(places), tensors.get("image_grid_thw"), config, size, tower)
    return Picture(_small(shown), grid, places.int().numpy(), tower)


def _one_tile(pixels: Tensor | None) -> Tensor | None:
    """Return the pixels of a picture that is not cut into tiles, [3, H, W]."""
    whole = pixels is not None and pixels.dim() == 4 and pixels.shape[:2] == (1, 3)
    return pixels[0] if pixels is not None and whole else None


def _as_seen(pixels: Tensor, processor: Any) -> NDArray[np.uint8]:
    """Undo the processor's scaling of pixels [3, H, W]."""
    mean, deviation = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    values = pixels.float()
    if getattr(processor, "do_normalize", False) and mean is not None and deviation is not None:
        values = values * torch.tensor(deviation)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _patches(size: torch.Size, config: Any) -> tuple[int, int]:
    """Return how many patches a tower makes of a picture, rows and columns."""
    side = getattr(config, "patch_size", None)
    return (size[0] // side, size[1] // side) if isinstance(side, int) and side > 0 else NO_GRID


def grid_of(
    count: int, thw: Tensor | None, config: Any, size: torch.Size | None, tower: tuple[int, int]
) -> tuple[int, int]:
    """Return the rows and columns of the tokens of a picture in the prompt."""
    if thw is not None and len(thw) == 1:
        merged = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
        found = (int(thw[0, 1]) // merged, int(thw[0, 2]) // merged)
        return found if math.prod(found) == count else NO_GRID
    if size is None or not count:
        return NO_GRID
    if math.prod(tower) == count:
        return tower
    side = math.isqrt(count)  # patches that were pooled to a square of fewer
    return (side, side) if side * side == count and size[0] == size[1] else NO_GRID


def _small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return np.asarray(image)

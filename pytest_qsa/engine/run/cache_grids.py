"""The grids on which engines keep keys and values in a quantized cache: what they would read back of a state.

vLLM 0.32: fp8_e4m3 has one scale a layer or head; fp8_ds_mla keeps a latent in tiles (`concat_and_cache_ds_mla`);
the others have one for each token and head (`triton_reshape_and_cache_flash.py`), and int4_per_token_head rotates a
head first and has a zero point (`int4_per_token_head.py`). llama.cpp: q8_0 and q4_0 are blocks of 32 channels (ggml's
`quantize_row_*_ref`), of heads that are rotated first (ggml-org/llama.cpp#21038). Scores don't change where query and
key are rotated alike, so that a rotation is undone here, and the query stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...captures import LATENT_AND_ROPE_KEY, Site
from ...common import AnomalyError
from ...suite import KvCache

LARGEST = {"fp8_e4m3": 448.0, "fp8_per_token_head": 448.0, "int8_per_token_head": 127.0}
LEAST_SCALE = 1e-6
"""vLLM's: a head of zeros has this one."""
TILE = 128
"""The channels of a latent that share a scale in DeepSeek's layout, fp8_ds_mla."""
BLOCK = 32
"""The channels of a block of ggml's."""
SIGNS = 0x9E3779B9
"""The seed of the signs that vLLM gives the channels before it rotates them."""


def rounded(grid: KvCache, state: Tensor, site: Site, scale: float | Sequence[float]) -> Tensor:
    """Return what an engine reads back of a state [B, H, T, D], in its dtype.

    `scale`: that of the layer and site in the checkpoint, or one for each head, for fp8_e4m3.

    Raises:
        AnomalyError: no engine keeps heads of this size on the grid, or there are other scales than heads.
    """
    if grid == "fp8_ds_mla" and site == "rope_key":  # kept in 16 bits
        return state
    x = state.float()
    _check(grid, x.shape[-1], site)
    if grid == "fp8_e4m3":
        own = _of_heads(scale, x, site)
        found = _nearest_float(x / own) * own
    elif grid == "fp8_ds_mla":
        tiles = x.reshape(*x.shape[:-1], -1, TILE)
        scales = (tiles.abs().amax(dim=-1, keepdim=True) / LARGEST["fp8_e4m3"]).clamp_min(torch.finfo(x.dtype).tiny)
        found = (_nearest_float(tiles / scales) * scales).flatten(-2)
    elif grid == "int4_per_token_head":
        found = _int4(x, state.dtype)
    elif grid in ("q8_0", "q4_0"):
        size = _rotation(x.shape[-1], site)
        turned = _rotated(x, size)
        blocks = turned.reshape(*turned.shape[:-1], -1, BLOCK)
        found = _rotated((_q8_0 if grid == "q8_0" else _q4_0)(blocks).flatten(-2), size)
    else:
        found = _per_token_head(grid, x)
    return found.to(state.dtype)


def _check(grid: KvCache, size: int, site: Site) -> None:
    if site in LATENT_AND_ROPE_KEY and grid.endswith("per_token_head"):
        raise AnomalyError(
            f"model.kv_cache: {grid} has a scale for each head, and multi-head latent attention caches none: use "
            "fp8_e4m3, fp8_ds_mla, q8_0 or q4_0"
        )
    if site not in LATENT_AND_ROPE_KEY and grid == "fp8_ds_mla":
        raise AnomalyError(
            "model.kv_cache: fp8_ds_mla keeps the latent of multi-head latent attention, and this attention caches "
            "keys and values: use fp8_e4m3 or fp8_per_token_head"
        )
    least = {"int4_per_token_head": 2, "fp8_ds_mla": TILE, "q8_0": BLOCK, "q4_0": BLOCK}.get(grid, 1)
    if size % least:
        raise AnomalyError(
            f"model.kv_cache: {grid} packs {least} channels of a head together, and a head has {size} here"
        )


def _of_heads(scale: float | Sequence[float], x: Tensor, site: Site) -> float | Tensor:
    if isinstance(scale, float):
        return scale
    if len(scale) != x.shape[1]:
        raise AnomalyError(
            f"model.kv_cache: the checkpoint has {len(scale)} scales of a layer's {site}s, and the layer {x.shape[1]} "
            "heads: calibrate the KV cache again"
        )
    return torch.tensor(scale, dtype=x.dtype, device=x.device)[:, None, None]


def _nearest_float(x: Tensor) -> Tensor:
    """Round to e4m3, what is beyond its largest number to that."""
    return x.clamp(-LARGEST["fp8_e4m3"], LARGEST["fp8_e4m3"]).to(torch.float8_e4m3fn).float()


def _away_from_zero(x: Tensor) -> Tensor:
    return torch.trunc(x + torch.where(x >= 0, 0.5, -0.5))


def _per_token_head(grid: KvCache, x: Tensor) -> Tensor:
    scale = (x.abs().amax(dim=-1, keepdim=True) / LARGEST[grid]).clamp_min(LEAST_SCALE)
    scaled = x * (1.0 / scale)
    codes = _nearest_float(scaled) if grid == "fp8_per_token_head" else _away_from_zero(scaled).clamp(-128, 127)
    return codes * scale


def _int4(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round heads to 16 numbers between their smallest and largest, after a rotation with signs."""
    size = x.shape[-1] & -x.shape[-1]  # the largest power of two that divides it
    signs = _signs(size, x.device).repeat(x.shape[-1] // size)
    norm = size**0.5
    # The engine hands on what it has rotated in the model's dtype.
    turned = (_rotated(x * signs, size) * norm).to(dtype).float()
    low, high = turned.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15.0).clamp_min(LEAST_SCALE)
    zero = _away_from_zero(-low / scale).clamp(0, 15)
    codes = _away_from_zero(turned * (1.0 / scale) + zero).clamp(0, 15)
    found: Tensor = _rotated((codes - zero) * _with_zero_point(scale, zero), size) * signs / norm
    return found


def _with_zero_point(scale: Tensor, zero: Tensor) -> Tensor:
    """Return the scale as the engine keeps it: the zero point lies in its last four bits."""
    return ((scale.contiguous().view(torch.int32) & -16) | zero.int()).view(torch.float32)


def _q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    codes = _away_from_zero(blocks * _inverse(scale))
    return codes * scale.half().float()


def _q4_0(blocks: Tensor) -> Tensor:
    largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    scale = largest / -8  # so that the largest has the code 0
    codes = torch.trunc(blocks * _inverse(scale) + 8.5).clamp(0, 15)
    return (codes - 8) * scale.half().float()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _rotation(size: int, site: Site) -> int:
    """Return how many channels llama.cpp rotates together; 1 for none: its heads are multiples of 64."""
    if size % 64:
        return 1
    # Keys are rotated as far as a power of two goes; values, and the latent with its 576 channels, by 64.
    return size & -size if site == "key" else 64


def _rotated(x: Tensor, size: int) -> Tensor:
    """Rotate neighbouring channels by an orthonormal Hadamard matrix, which is its own inverse."""
    if size == 1:
        return x
    turned: Tensor = x.reshape(*x.shape[:-1], -1, size) @ _hadamard(size, x.device)
    return turned.flatten(-2)


@lru_cache(maxsize=8)
def _hadamard(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    normalized: Tensor = (matrix / size**0.5).to(device)
    return normalized


@lru_cache(maxsize=8)
def _signs(size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(SIGNS)
    return (2.0 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1.0).to(device)

"""The grids of quantized KV caches, against numpy in float64 and against ggml's own quantization."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.engine.run.cache_grids import rounded

SHAPE = (2, 3, 7, 64)
"""Samples, heads, tokens, channels."""


def states(dtype=torch.float32, shape=SHAPE):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 6, shape[-1])
    x[0, 0, 0] = 0  # a token of zeros
    x[0, 1, 2, 5] = 3000.0
    return x.to(dtype)


def numbers(tensor):
    return tensor.double().numpy()


def e4m3():
    """Return the numbers of e4m3 at and above 0: 2⁻⁹ apart below 2⁻⁶, then eighths of each octave, up to 448."""
    small = np.arange(8) / 8 * 2.0**-6
    octaves = [(1 + np.arange(8) / 8) * 2.0**exponent for exponent in range(-6, 9)]
    return np.concatenate([small, *octaves])[:-1]


def nearest(values, grid):
    """Return the numbers of a grid of magnitudes nearest to some values."""
    magnitudes = np.abs(values).clip(max=grid[-1])
    above = np.searchsorted(grid, magnitudes).clip(1)
    below = above - 1
    nearer = np.where(grid[above] - magnitudes < magnitudes - grid[below], above, below)
    return np.sign(values) * grid[nearer]


@pytest.mark.parametrize("scale", [1.0, 0.03, 0.5])
def test_fp8_has_the_checkpoints_scale_and_clips_beyond_it(scale):
    x = numbers(states())
    expected = nearest(x / scale, e4m3()) * scale
    found = numbers(rounded("fp8_e4m3", states(), "key", scale))
    halfway = np.abs(np.abs(x / scale - nearest(x / scale, e4m3())) * 2 - 1)  # ties go to the even one
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert halfway.size
    assert found.max() == pytest.approx(448 * scale)  # the value of 3,000


def test_fp8_may_have_a_scale_for_each_head():
    scales = (1.0, 0.03, 0.5)
    found = rounded("fp8_e4m3", states(), "key", scales)
    for head, scale in enumerate(scales):
        assert torch.equal(found[:, head], rounded("fp8_e4m3", states()[:, head : head + 1], "key", scale)[:, 0])
    with pytest.raises(AnomalyError, match=r"has 2 scales of a layer's values, and the layer 3 heads"):
        rounded("fp8_e4m3", states(), "value", (1.0, 2.0))


def test_deepseeks_layout_has_a_scale_for_128_channels_of_the_latent_and_keeps_the_rope_key():
    x = states(shape=(2, 2, 7, 512))
    tiles = numbers(x).reshape(2, 2, 7, 4, 128)
    scale = np.maximum(np.abs(tiles).max(axis=-1, keepdims=True) / 448, np.finfo(np.float32).tiny)
    expected = (nearest(tiles / scale, e4m3()) * scale).reshape(x.shape)
    found = numbers(rounded("fp8_ds_mla", x, "latent", 1.0))
    # Ties, and what float32 puts on the other side of one, apart.
    assert np.isclose(found, expected, rtol=1e-6, atol=1e-12).mean() > 0.999
    np.testing.assert_allclose(found, numbers(x), atol=0.04 * np.abs(tiles).max())
    assert torch.equal(rounded("fp8_ds_mla", x, "rope_key", 1.0), x)
    with pytest.raises(AnomalyError, match="this attention caches keys and values: use fp8_e4m3"):
        rounded("fp8_ds_mla", x, "key", 1.0)
    with pytest.raises(AnomalyError, match="fp8_ds_mla packs 128 channels of a head together, and a head has 64 here"):
        rounded("fp8_ds_mla", states(), "latent", 1.0)


@pytest.mark.parametrize(("grid", "largest"), [("fp8_per_token_head", 448), ("int8_per_token_head", 127)])
def test_each_token_and_head_has_a_scale_of_its_own(grid, largest):
    x = numbers(states())
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / largest, 1e-6)
    codes = nearest(x / scale, e4m3()) if "fp8" in grid else np.rint(x / scale)
    found = numbers(rounded(grid, states(), "value", 7.0))
    # In float32 a quotient next to the middle between two codes may go to the other one.
    differing = np.abs(found - codes * scale) > 1e-5 * np.abs(x).max(axis=-1, keepdims=True)
    assert differing.mean() < 1e-3
    assert np.abs(found - codes * scale).max() <= (scale * (32 if "fp8" in grid else 1)).max() * 1.001


def hadamard(size):
    """Return Sylvester's matrix by its bits: −1 to the number of bits that row and column share."""
    shared = np.array([[bin(i & j).count("1") for j in range(size)] for i in range(size)])
    return (-1.0) ** shared / np.sqrt(size)


@pytest.mark.parametrize(("grid", "kind"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0")])
@pytest.mark.parametrize(("channels", "site", "turned"), [
    (32, "key", 1), (96, "value", 1), (64, "key", 64), (128, "key", 128), (128, "value", 64), (192, "key", 64),
])  # fmt: skip
def test_ggmls_blocks_are_those_of_its_own_package_after_llama_cpps_rotation(grid, kind, channels, site, turned):
    x = states(shape=(1, 2, 5, channels))
    rows = numbers(x).reshape(-1, turned) @ hadamard(turned)
    kept = gguf.GGMLQuantizationType[kind]
    blocks = dequantize(quantize(rows.reshape(-1, 32).astype(np.float32), kept), kept).astype(np.float64)
    expected = (blocks.reshape(-1, turned) @ hadamard(turned)).reshape(x.shape)
    found = numbers(rounded(grid, x, site, 1.0))
    close = np.isclose(found, expected, rtol=1e-4, atol=1e-4).reshape(-1, turned).all(axis=1)
    # One token is a single large value: rotated, all its channels are as large, and either sign is the largest.
    assert close.sum() >= len(close) - (turned > 1)


def test_int4_turns_a_head_with_signs_and_has_a_zero_point():
    x = numbers(states())
    generator = torch.Generator().manual_seed(0x9E3779B9)
    signs = numbers(2 * torch.bernoulli(torch.full((64,), 0.5), generator=generator) - 1)
    turned = (x * signs) @ hadamard(64) * 8  # vLLM's matrix is not normalized
    low, high = turned.min(axis=-1, keepdims=True), turned.max(axis=-1, keepdims=True)
    scale = np.maximum((high - low) / 15, 1e-6)
    zero = np.rint(-low / scale).clip(0, 15)
    codes = np.rint(turned / scale + zero).clip(0, 15)
    expected = ((codes - zero) * scale / 8) @ hadamard(64) * signs
    found = numbers(rounded("int4_per_token_head", states(), "key", 1.0))
    close = np.isclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(x).max(axis=-1, keepdims=True)).all(axis=-1)
    assert close.mean() > 0.95
    assert np.unique(codes[1, 1, 1]).size > 4


GRIDS = ["fp8_e4m3", "fp8_per_token_head", "int8_per_token_head", "int4_per_token_head", "q8_0", "q4_0"]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_state_keeps_its_dtype_and_shape_and_zeros_stay_zero(grid, dtype):
    x = states(dtype)
    found = rounded(grid, x, "key", 1.0)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert not found[0, 0, 0].any()
    assert not torch.equal(found, x)


@pytest.mark.parametrize(
    ("grid", "size", "what"), [("q4_0", 80, "32 channels"), ("int4_per_token_head", 7, "2 channels")]
)
def test_a_head_that_no_engine_can_pack_is_refused(grid, size, what):
    with pytest.raises(AnomalyError, match=rf"{grid} packs {what} of a head together, and a head has {size} here"):
        rounded(grid, torch.zeros(1, 1, 2, size), "key", 1.0)


def test_latent_attention_has_no_scale_for_each_head():
    with pytest.raises(AnomalyError, match="multi-head latent attention caches none"):
        rounded("int8_per_token_head", torch.zeros(1, 1, 2, 64), "latent", 1.0)

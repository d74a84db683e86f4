"""Checkpoints in formats whose programs don't run here, packed as their documentation says.

Each returns what its formula reads from the codes, computed here in torch and apart from `pytest_qsa`. The sources of
the layouts: GPTQModel and AutoAWQ (GPTQ, AWQ), DeepSeek-V3 (FP8 in blocks), vLLM (FP8 by tensor), gpt-oss (MXFP4).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

Tensors = dict[str, Tensor]
Packed = tuple[Tensors, Tensor]
"""The stored parts of a layer, and the weight that they stand for."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FP8 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The values of 4-bit floats (OCP Microscaling Formats 1.0, table 5)."""


def by_hand(pack: Callable[[Tensor], Packed], declared: Mapping[str, Any], source: Path, target: Path) -> Tensors:
    """Pack every projection of a folder, declare it, and return the weights that the codes stand for."""
    stored, read = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer, _, part = name.rpartition(".")
        if layer.rpartition(".")[2] not in PROJECTIONS or part != "weight":
            stored[name] = tensor
            continue
        parts, read[layer] = pack(tensor.float())
        stored |= {f"{layer}.{part}": value for part, value in parts.items()}
    save_checkpoint(source, target, stored, declared)
    return read


def save_checkpoint(source: Path, target: Path, tensors: Tensors, declared: Mapping[str, Any]) -> None:
    """Write a checkpoint of other tensors, with the source's configuration and tokenizer."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, "quantization_config": declared}))


# --- integers in groups of 128: GPTQ and AWQ

GROUP = 128


def _integers(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round to the nearest; return codes [out, groups, GROUP], zero points and float16 scales [out, groups]."""
    groups, top = weight.reshape(len(weight), -1, GROUP), (1 << bits) - 1
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if symmetric:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    scale = ((high - low) / top).half()
    zero = torch.full_like(low, 1 << (bits - 1)) if symmetric else (-low / scale).round().clamp(1, top)
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, top)
    return codes, zero, scale


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [rows, n] into words of 32 bits [rows, n · bits / 32], the first one in the lowest bits."""
    lanes = codes.to(torch.int64).reshape(len(codes), -1, 32 // bits)
    words = (lanes << torch.arange(0, 32, bits)).sum(2)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def gptq(weight: Tensor, *, bits: int = 4, symmetric: bool = True, v2: bool = False, order: bool = False) -> Packed:
    """Pack as GPTQModel does. `v2`: zero points as they are; v1 stores them − 1. `order`: inputs in another order."""
    inputs = torch.arange(weight.shape[1])
    if order:
        inputs = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    codes, zero, scale = _integers(weight[:, inputs], bits, symmetric)
    back = torch.argsort(inputs)
    values = ((codes - zero[..., None]) * scale[..., None].float()).reshape(weight.shape)[:, back]
    parts = {
        "qweight": words_of(codes.reshape(weight.shape)[:, back], bits).T,
        "qzeros": words_of(zero.T - (0 if v2 else 1), bits),
        "scales": scale.T,
        "g_idx": (back // GROUP).to(torch.int32),
    }
    return parts, values


def awq(weight: Tensor, *, gemv: bool = False) -> Packed:
    """Pack as AutoAWQ does, `gemm` or `gemv`, whose rows of zero points and scales are padded to whole words."""
    codes, zero, scale = _integers(weight, 4, symmetric=False)
    values = ((codes - zero[..., None]) * scale[..., None].float()).reshape(weight.shape)
    if gemv:
        groups = -(-zero.shape[1] // 8) * 8
        zeros, scales = (pad(t, (0, groups - t.shape[1])) for t in (zero, scale))
        words = words_of(codes.reshape(weight.shape), 4)
        return {"qweight": words, "qzeros": words_of(zeros, 4), "scales": scales}, values
    in_words = [words_of(_awq_order(codes.reshape(weight.shape).T), 4), words_of(_awq_order(zero.T), 4)]
    return {"qweight": in_words[0], "qzeros": in_words[1], "scales": scale.T}, values


def _awq_order(codes: Tensor) -> Tensor:
    """Put 8 outputs into a word in AWQ's order, the even ones first."""
    return codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


# --- FP8


def fp8_blocks(weight: Tensor, *, part: str = "weight_scale_inv", powers: bool = False) -> Packed:
    """Store blocks of 128 × 128 (the last may be smaller) as DeepSeek does; the scale multiplies."""
    rows, columns = weight.shape
    padded = pad(weight, (0, -columns % 128, 0, -rows % 128))
    blocks = padded.reshape(-(-rows // 128), 128, -(-columns // 128), 128)
    scale = blocks.abs().amax((1, 3)) / 448
    if powers:
        scale = torch.exp2(torch.log2(scale).ceil())
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    codes = (weight / spread).to(FP8)
    stored = scale.to(torch.float8_e8m0fnu) if powers else scale
    return {"weight": codes, part: stored}, codes.float() * spread


def fp8_tensor(weight: Tensor) -> Packed:
    """Store one scale for the tensor, and one for its inputs, as vLLM's `fp8` names them."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(FP8)
    inputs = weight.abs().max() * 2  # differs from layer to layer, as a calibrated one does
    return {"weight": codes, "weight_scale": scale, "input_scale": inputs}, codes.float() * scale


FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8_TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}


# --- NVFP4 of compressed-tensors


def nvfp4(weight: Tensor, largest: Tensor) -> Packed:
    """Store blocks of 16 with a scale in FP8 each, and one for all. `largest`: the largest |x| that shares the last."""
    whole = 448 * 6 / largest
    blocks = weight.reshape(len(weight), -1, 16)
    scale = (blocks.abs().amax(2) / 6 * whole).to(FP8)
    step = (scale.float() / whole)[..., None]
    codes = (blocks[..., None] / step[..., None] - E2M1).abs().argmin(-1)
    words = codes.reshape(weight.shape)
    packed = (words[:, ::2] | words[:, 1::2] << 4).to(torch.uint8)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole.reshape(1)}
    return parts, (E2M1[codes] * step).reshape(weight.shape)


_FLOAT4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
NVFP4 = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FLOAT4, "dynamic": False},
            "input_activations": {**_FLOAT4, "dynamic": "local"},
        }
    },
}


# --- gpt-oss


def mxfp4(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round [..., 32] to MXFP4; return bytes [..., 16], exponents [...] with the bias 127, and the values."""
    exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    codes = (scaled[..., None] - E2M1).abs().argmin(-1)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed, (exponent + 127).to(torch.uint8), E2M1[codes] * torch.exp2(exponent)[..., None]


def gpt_oss(source: Path, target: Path) -> Tensors:
    """Pack the experts of a small gpt-oss as it is released: `X_blocks` [experts, out, in / 32, 16], `X_scales`."""
    stored, read = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        groups = tensor.float().transpose(1, 2).reshape(*tensor.mT.shape[:2], -1, 32)
        stored[f"{name}_blocks"], stored[f"{name}_scales"], values = mxfp4(groups)
        read[name] = values.flatten(2)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    save_checkpoint(source, target, stored, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    return read

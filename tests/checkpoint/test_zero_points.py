"""Zero points of compressed-tensors and torchao: rows as the library itself reads them, and faults that files show."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of

OUT, IN, SIZE = 40, 96, 32
LAYERS = [f"model.layers.{index}.mlp.down_proj" for index in range(6)]
DOWN = LAYERS[2]


def compressed(index, bits, symmetric):
    """Return the tensors of a layer as the library compresses a random weight, and as it decompresses them."""
    torch.manual_seed(index)
    groups = (torch.randn(OUT, IN) * 0.02).reshape(OUT, -1, SIZE)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    half = 1 << (bits - 1)
    scale = (torch.maximum(-low, high) * 2 if symmetric else high - low) / (2 * half - 1)
    zero_point = torch.zeros_like(scale) if symmetric else (-half - low / scale).round().clamp(-half, half - 1)
    weights = QuantizationArgs(num_bits=bits, strategy="group", group_size=SIZE, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    parts = {"weight": groups.reshape(OUT, IN), "weight_scale": scale, "weight_zero_point": zero_point.to(torch.int8)}
    stored = {name: torch.as_tensor(part) for name, part in compressor.compress(parts, scheme).items()}
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes six layers; `change` edits the tensors of the layer 2."""

    def write(bits, symmetric, change=lambda parts: None, method="compressed-tensors"):
        tensors, values = {}, {}
        for index, layer in enumerate(LAYERS):
            parts, values[layer] = compressed(index, bits, symmetric)
            if index == 2:
                change(parts)
            tensors |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": SIZE, "symmetric": symmetric}
        group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
        config = {"quant_method": method, "config_groups": {"group_0": group}}
        stated = {"model_type": "llama", "num_hidden_layers": len(LAYERS), "quantization_config": config}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        return open_folder(tmp_path), values

    return write


def found(folder, metric="checkpoint_scales"):
    return [(finding.tensor, finding.what) for finding in problems_of(Files(folder), metric)[1]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_rows_are_what_the_library_decompresses(write, bits, symmetric):
    folder, values = write(bits, symmetric)
    rows = format_of(folder).rows(DOWN, slice(3, 30, 2))
    np.testing.assert_allclose(rows, values[DOWN].double().numpy()[3:30:2], rtol=2**-23)
    assert found(folder, "checkpoint_health") == []


def test_inputs_in_an_order_of_their_own_take_the_scales_of_their_group(write):
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0)) // SIZE
    kept = {}

    def change(parts):
        parts["weight_g_idx"] = order.int()
        kept.update(parts)

    rows = format_of(write(4, False, change)[0]).rows(DOWN)
    codes, zero_points = (format_of_packed(kept[part]) for part in ("weight_packed", "weight_zero_point"))
    scales = kept["weight_scale"].double().numpy()[:, order]
    np.testing.assert_array_equal(rows, (codes - zero_points.reshape(-1, OUT).T[:, order]) * scales)


def format_of_packed(words):
    """Return the 4-bit codes of words; those of zero points [out / 8, groups] are read down their columns."""
    words = words.numpy().view(np.uint32)
    words = words if len(words) == OUT else words.T
    return np.stack([(words >> np.uint32(4 * at)) & 15 for at in range(8)], axis=2).reshape(len(words), -1) - 8.0


def test_zero_points_that_are_all_one_too_large_are_far_from_their_siblings(write):
    def change(parts):
        words = parts["weight_zero_point"].numpy().view(np.uint32)
        codes = [
            ((((words >> np.uint32(at)) + np.uint32(1)) & np.uint32(15)) << np.uint32(at)) for at in range(0, 32, 4)
        ]
        parts["weight_zero_point"] = torch.from_numpy(np.bitwise_or.reduce(codes).view(np.int32))

    ((name, what),) = found(write(4, False, change)[0])
    assert name == f"{DOWN}.weight_zero_point"
    assert "siblings" in what


def test_zero_points_of_torchao_are_compared_with_their_siblings(tmp_path):
    tensors, metadata = {}, {}
    for index, layer in enumerate(LAYERS):
        codes = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(index)).mul(3).round().clamp(-8, 7)
        zero_point = torch.full((OUT, IN // SIZE), int(layer == DOWN), dtype=torch.int8)
        parts = {"qdata": codes.to(torch.int8), "scale": torch.full((OUT, IN // SIZE), 0.01 + index / 1e4)}
        tensors |= {f"{layer}._weight_{part}": value for part, value in (*parts.items(), ("zero_point", zero_point))}
        data = {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "block_size": [1, SIZE]}
        names = ["qdata", "scale", "zero_point"]
        stored = {"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": names}
        metadata[f"{layer}.weight"] = json.dumps(stored)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    stated = {
        "model_type": "llama",
        "num_hidden_layers": len(LAYERS),
        "quantization_config": {"quant_method": "torchao"},
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    ((name, what),) = found(open_folder(tmp_path))
    assert name == f"{DOWN}._weight_zero_point"
    assert "with them the mean weight is -0.3" in what


def test_zero_points_of_a_symmetric_scheme_are_zero(write):
    def change(parts):
        parts["weight_zero_point"] = torch.tensor([[1]], dtype=torch.int8)

    assert found(write(8, True, change)[0]) == [
        (f"{DOWN}.weight_zero_point", "1 of 1 aren't 0, as a symmetric scheme has them, the first is 1")
    ]


def test_a_zero_point_outside_of_the_codes_is_found(write):
    def change(parts):
        parts["weight_zero_point"] = torch.tensor([[8]], dtype=torch.int8)

    assert (f"{DOWN}.weight_zero_point", "1 of 1 aren't within -8 … 7, the first is 8") in found(
        write(4, False, change)[0]
    )


def test_zero_points_that_are_lost_are_missed(write):
    (problem,) = [what for _, what in found(write(4, False, lambda parts: parts.pop("weight_zero_point"))[0])]
    assert problem.startswith("missing")

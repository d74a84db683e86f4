"""torchao's tensor subclasses in files: made, and dequantized for comparison, by torchao itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qsa.checkpoint import Files, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError
from pytest_qsa.tools.selftest.faults import FAULTS
from pytest_qsa.tools.selftest.mutant import Mutant
from support.checkpoints import edited

DOWN = "model.layers.2.mlp.down_proj"
KEY = "model.layers.2.self_attn.k_proj"


def classes():
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor, MappingType, PerRow, PerTensor

    intx = IntxUnpackedToInt8Tensor.from_hp
    asymmetric = MappingType.ASYMMETRIC
    return {
        "int8": lambda w: Int8Tensor.from_hp(w, PerRow()),
        "int8 with zero points": lambda w: Int8Tensor.from_hp(w, PerRow(), asymmetric),
        "int8, scaled inputs": lambda w: Int8Tensor.from_hp(
            w, PerRow(), act_pre_scale=torch.linspace(0.5, 2, w.shape[1])
        ),
        "int4 by group": lambda w: intx(w, (1, 16), torch.int4),
        "int4 by group with zero points": lambda w: intx(w, (1, 16), torch.int4, mapping_type=asymmetric),
        "int3 by row": lambda w: intx(w, (1, w.shape[1]), torch.int3),
        "fp8 by row": lambda w: Float8Tensor.from_hp(w),
        "fp8 by tensor": lambda w: Float8Tensor.from_hp(w, granularity=PerTensor()),
        "mxfp8": lambda w: MXTensor.to_mx(w, torch.float8_e4m3fn, 32),
        "mxfp8, swizzled": lambda w: MXTensor.to_mx(w, torch.float8_e5m2, 32, is_swizzled_scales=True),
        "mxfp4": lambda w: MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32),
        "nvfp4": lambda w: NVFP4Tensor.to_nvfp4(
            w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().max()), is_swizzled_scales=True
        ),
        "nvfp4 of one level": lambda w: NVFP4Tensor.to_nvfp4(w),
    }


def save(folder, source, make, dtype=torch.float32):
    """Store every projection in a subclass of torchao; return its own dequantized weights by layer."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    weights, made, expected = load_file(source / "model.safetensors"), {}, {}
    for name, tensor in weights.items():
        is_projection = name.endswith("_proj.weight")
        made[name] = make(tensor.to(dtype)) if is_projection else tensor
        if is_projection:
            expected[name.removesuffix(".weight")] = made[name].dequantize()
    edited(source, folder, config=lambda config: config.update(quantization_config={"quant_method": "torchao"}))
    tensors, metadata = flatten_tensor_state_dict(made)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})
    return expected


@pytest.fixture(scope="module", params=list(classes()))
def made(request, llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchao") / "made"
    return folder, save(folder, llama, classes()[request.param])


def findings(folder):
    return [(f.tensor, f.what) for f in problems_of(Files(open_folder(folder)), "checkpoint_health")[1]]


def test_a_fault_of_the_self_test_leaves_the_classes_that_the_metadata_names(made, tmp_path):
    folder, expected = made
    mutant = Mutant(open_folder(folder))
    FAULTS["weights_constant"].inject(mutant, DOWN, 1.0)
    form = format_of(open_folder(mutant.save(tmp_path / "faulty")))
    np.testing.assert_array_equal(form.rows(KEY), format_of(open_folder(folder)).rows(KEY))
    assert {layer for layer in expected if (form.rows(layer) != format_of(open_folder(folder)).rows(layer)).any()} == {
        DOWN
    }


def smoothing(form, layer):
    scale = form.parts(layer).get("_weight_act_pre_scale")
    return 1.0 if scale is None else scale.values()


def test_a_healthy_checkpoint_has_no_problem(made):
    assert findings(made[0]) == []


def test_rows_are_the_bits_that_torchao_dequantizes_to(made):
    folder, expected = made
    form = format_of(open_folder(folder))
    for layer in (DOWN, KEY):  # k has rows that are no whole tile of swizzled scales
        rows = form.rows(layer) / smoothing(form, layer)
        np.testing.assert_array_equal(rows.astype(np.float32), expected[layer].numpy())
        np.testing.assert_array_equal(form.rows(layer, slice(3, 9)), form.rows(layer)[3:9])


@pytest.mark.parametrize("name", ["int8", "int4 by group with zero points", "fp8 by row", "nvfp4"])
def test_rows_rounded_to_bfloat16_are_what_torchao_gives_for_bfloat16(llama, tmp_path, name):
    expected = save(tmp_path / "made", llama, classes()[name], torch.bfloat16)[DOWN]
    rows = torch.from_numpy(format_of(open_folder(tmp_path / "made")).rows(DOWN))
    assert torch.equal(rows.float().to(torch.bfloat16), expected)


def damaged(folder, target, change):
    """Copy a checkpoint with its metadata; `change` edits its tensors and its metadata."""
    edited(folder, target)
    tensors, metadata = load_file(folder / "model.safetensors"), dict(open_folder(folder).metadata)
    change(tensors, metadata)
    save_file(tensors, target / "model.safetensors", metadata=metadata)
    return target


@pytest.mark.parametrize("fault", ["lost", "scale", "NaN", "constant"])
def test_a_fault_is_found_and_its_layer_named(made, tmp_path, fault):
    def change(tensors, metadata):
        scale = tensors[f"{DOWN}._weight_scale"]
        if fault == "lost":
            del tensors[f"{DOWN}._weight_scale"]
        elif fault == "NaN":
            scale.view(torch.uint8).view(-1)[: scale.element_size()] = 0xFF
        elif fault == "constant":
            tensors[f"{DOWN}._weight_qdata"].view(torch.uint8).fill_(0x33)
        else:
            # a few octaves, for exponents of so few blocks differ by one or two in a healthy checkpoint
            tensors[f"{DOWN}._weight_scale"] = (scale.float() / 64).to(scale.dtype)

    found = findings(damaged(made[0], tmp_path / "faulty", change))
    assert any(tensor.startswith(DOWN) for tensor, _ in found), found


@pytest.mark.parametrize("name", ["Int4Tensor", "Int4TilePackedTo4dTensor", "SomethingNewTensor"])
def test_a_class_that_nothing_dequantizes_is_never_read_as_numbers(llama, tmp_path, name):
    save(tmp_path / "made", llama, classes()["int8"])

    def rename(tensors, metadata):
        metadata[f"{DOWN}.weight"] = metadata[f"{DOWN}.weight"].replace("Int8Tensor", name)

    form = format_of(open_folder(damaged(tmp_path / "made", tmp_path / "other", rename)))
    assert form.rows(DOWN) is None


def test_codes_without_metadata_are_never_read_as_numbers_and_a_problem(llama, tmp_path):
    save(tmp_path / "made", llama, classes()["int8"])
    folder = damaged(tmp_path / "made", tmp_path / "bare", lambda tensors, metadata: metadata.pop(f"{DOWN}.weight"))
    assert format_of(open_folder(folder)).rows(DOWN) is None
    what = "the metadata of its file doesn't name its tensor subclass, by which torchao reads it"
    assert findings(folder) == [(f"{DOWN}._weight_qdata", what)]


def test_swizzled_scales_of_another_size_are_a_problem_and_give_no_number(llama, tmp_path):
    save(tmp_path / "made", llama, classes()["nvfp4"])

    def cut(tensors, metadata):
        name = f"{DOWN}._weight_scale"
        tensors[name] = tensors[name].view(-1)[:256].clone()

    folder = damaged(tmp_path / "made", tmp_path / "cut", cut)
    assert (f"{DOWN}._weight_scale", "256 elements, but the swizzled scales of a weight (32, 64) are 512") in findings(
        folder
    )
    with pytest.raises(AnomalyError, match="don't fit one another"):
        format_of(open_folder(folder)).rows(DOWN)


def test_metadata_that_is_not_torchaos_is_told_in_one_line(llama, tmp_path):
    save(tmp_path / "made", llama, classes()["int8"])
    folder = damaged(tmp_path / "made", tmp_path / "bad", lambda _, metadata: metadata.update({f"{DOWN}.weight": "{"}))
    with pytest.raises(AnomalyError, match=rf"the metadata of {DOWN}\.weight isn't torchao's"):
        findings(folder)


def test_every_class_that_torchao_saves_is_read_or_known_to_be_refused():
    from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES

    from pytest_qsa.checkpoint.formats.torchao import CLASSES

    refused = {"Int4Tensor", "Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor"}
    assert set(ALLOWED_TENSORS_SUBCLASSES) == set(CLASSES) | refused

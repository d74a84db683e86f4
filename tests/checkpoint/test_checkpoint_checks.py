"""Static checks: what the files of a checkpoint say before any forward. The faults are those that the field reports."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pytest_qsa.checkpoint.checks import health as checks
from pytest_qsa.checkpoint.checks.changed_settings import changed_settings
from pytest_qsa.checkpoint.checks.health import CHECKS, Files, problems_of
from pytest_qsa.checkpoint.folder import Folder, natural, open_folder
from pytest_qsa.checkpoint.tensors import decoded
from pytest_qsa.common.errors import AnomalyError, InfraError, SuiteError
from pytest_qsa.engine.load.tokenizer import load_tokenizer
from support.checkpoints import FORMATS, edited, save_llama
from support.projects import peaks, suite

DOWN = "model.layers.2.mlp.down_proj"
QUERY = "model.layers.1.self_attn.q_proj"


def found(folder, metric="checkpoint_health", reference=None, **parameters):
    files = Files(open_folder(folder), open_folder(reference) if reference else None)
    return problems_of(files, metric, **parameters)[1]


def layers(findings):
    return {finding.layer for finding in findings}


@pytest.mark.parametrize("form", [*FORMATS, "float"])
def test_a_healthy_checkpoint_has_no_problem(quantized, llama, form):
    assert found(quantized[form], reference=llama) == []


def fill(part, value, at=...):
    """Return a change of a state dict: some elements of a tensor of layer 2's down projection become a value."""

    def change(weights):
        weights[f"{DOWN}.{part}"][at] = value

    return change


def scaled(part, factor, at=...):
    def change(weights):
        weights[f"{DOWN}.{part}"][at] *= factor

    return change


def dropped(part):
    return lambda weights: weights.pop(f"{DOWN}.{part}")


def one_code_a_group(weights):
    weights[f"{DOWN}.weight_packed"][5, 2:4] = 0x33333333


def unquantized(weights):
    codes, scale = weights.pop(f"{DOWN}.weight"), weights.pop(f"{DOWN}.weight_scale")
    weights[f"{DOWN}.weight"] = codes.float() * scale


def in_float8(weights):
    weights[f"{DOWN}.weight"] = weights[f"{DOWN}.weight"].to(torch.float8_e4m3fn)


def initial(weights):
    for name in weights:
        if name.endswith("down_proj.input_scale"):
            weights[name].fill_(1.0)


FAULTS = {
    # fault: (format, change, part of the tensor that is named, words of the text)
    "NaN": ("int8", fill("weight_scale", float("nan"), 3), "weight_scale", "1 of 32 are NaN, the first at 3"),
    "infinite": ("int8", fill("weight_scale", float("inf"), 0), "weight_scale", "are infinite"),
    "zero": ("int4", fill("weight_scale", 0.0, (4, 1)), "weight_scale", "1 of 128 are zero, the first at 17"),
    "negative": ("int8", scaled("weight_scale", -1.0, 9), "weight_scale", "1 of 32 are negative"),
    "denormal": ("int8", fill("weight_scale", 1e-40, 9), "weight_scale", "1 of 32 are denormal"),
    "scale of a layer": ("int8", scaled("weight_scale", 4.0), "weight_scale", "the median scale is "),
    "scale of a channel": ("int8", scaled("weight_scale", 64.0, 7), "weight_scale", "its largest scale over"),
    "scale of a group": ("int4", scaled("weight_scale", 1 / 512, (7, 0)), "weight_scale", "its smallest scale"),
    "scale dropped": ("int8", dropped("weight_scale"), "weight_scale", "missing, though the scheme int-quantized"),
    "zero points dropped": ("int4 with zero points", dropped("weight_zero_point"), "weight_zero_point", "missing"),
    "static input scale dropped": ("fp8 with static inputs", dropped("input_scale"), "input_scale", "missing"),
    "scale unexpected": (
        "fp8 by channel", lambda w: w.update({f"{DOWN}.input_scale": torch.ones(1)}), "input_scale", "unexpected",
    ),
    "scale of another shape": (
        "int8", lambda w: w.update({f"{DOWN}.weight_scale": torch.full((16, 1), 0.01)}), "weight_scale",
        "shape 16×1, but channel-wise scales of a weight (32, 64) are 32",
    ),
    "packed weights constant": ("int4", fill("weight_packed", 0x11111111), "weight_packed", "all of it is one value"),
    "int8 weights constant": ("int8", fill("weight", 0), "weight", "all of it is one value, 0x0"),
    "row constant": ("int8", fill("weight", -7, 12), "weight", "row 12 is one code throughout"),
    "signs lost in a group": ("int4", one_code_a_group, "weight_packed", "group 21 is one code throughout"),
    "layer left unquantized": ("int8", unquantized, "weight", "left in F32, though the configuration quantizes it"),
    "layer in another format": ("int8", in_float8, "weight", "stored as F8_E4M3, but int-quantized with 8 bits"),
    "weight dropped": ("int8", dropped("weight"), "weight", "missing: 3 sibling blocks have it"),
    "NaN in a float weight": ("float", fill("weight", float("nan"), (1, 1)), "weight", "1 elements are NaN"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_layer_named(quantized, tmp_path, fault):
    form, change, part, text = FAULTS[fault]
    findings = found(edited(quantized[form], tmp_path / "faulty", change))
    assert layers(findings) == {DOWN}
    told = [finding for finding in findings if finding.tensor == f"{DOWN}.{part}" and text in finding.what]
    assert told, findings
    assert told[0].file in ("model.safetensors", "")
    assert told[0].advice


def test_scales_at_their_initial_value_tell_that_calibration_saw_no_data(quantized, tmp_path):
    findings = found(edited(quantized["fp8 with static inputs"], tmp_path / "faulty", initial))
    assert layers(findings) == {f"model.layers.{i}.mlp.down_proj" for i in range(4)}
    assert all("initial value" in finding.what for finding in findings)


def test_an_empty_slot_of_a_fused_scale_is_found_where_the_others_are_equal(quantized, tmp_path):
    def change(weights):
        weights["model.layers.1.self_attn.k_proj.input_scale"][0] *= 1.5

    findings = found(edited(quantized["fp8 with static inputs"], tmp_path / "faulty", change))
    assert [finding.tensor for finding in findings] == ["model.layers.1.self_attn.k_proj.input_scale"]
    assert "unequal input_scale in a fused group: q_proj 0.01562, k_proj 0.02344" in findings[0].what


def test_fused_scales_that_are_unequal_everywhere_are_a_fault_only_where_they_must_be_equal(quantized):
    folder = quantized["fp8 with static inputs"]
    assert found(folder, "checkpoint_scales") == []
    assert len(found(folder, "checkpoint_scales", fused_equal=True)) == 8  # q/k/v and gate/up of four blocks


def odd_in_a_block(weights):
    """Multiply what a block's up projection writes, and divide what its down projection reads."""
    for part in ("weight_scale", "weight"):
        name = f"{DOWN}.{part}"
        if name in weights and weights[name].is_floating_point():
            weights[name] /= 4096
            weights[name.replace("down", "up")] *= 4096
            return


def test_a_layer_that_is_as_odd_in_the_original_is_no_problem(quantized, llama, tmp_path):
    original = edited(llama, tmp_path / "original", odd_in_a_block)
    odd = edited(quantized["int8"], tmp_path / "odd", odd_in_a_block)
    assert found(odd, "checkpoint_scales", reference=original) == []
    assert DOWN in layers(found(odd, "checkpoint_scales", reference=llama))
    assert DOWN in layers(found(odd, "checkpoint_scales"))


def doubled(weights):
    for name in weights:
        if name.endswith("weight_scale"):
            weights[name] *= 2


@pytest.mark.parametrize("form", ["int8", "int4", "fp8 with static inputs"])
def test_weights_of_another_size_than_the_original_s_are_found_though_all_siblings_agree(
    quantized, llama, tmp_path, form
):
    folder = edited(quantized[form], tmp_path / "doubled", doubled)
    assert found(folder, "checkpoint_scales") == []
    told = found(folder, "checkpoint_scales", reference=llama)
    assert len(told) == 28
    factors = [float(each.what.split("the dequantized weight is ")[1].split(" ×")[0]) for each in told]
    assert factors == pytest.approx([2] * 28, rel=0.03)


def test_weights_of_another_size_than_the_original_s_are_found_beside_a_damaged_norm(quantized, llama, tmp_path):
    def damaged(weights):
        doubled(weights)
        norm_scaled(weights)

    folder = edited(quantized["int8"], tmp_path / "damaged", damaged)
    assert len(found(folder, "checkpoint_scales", reference=llama)) == 28


def test_a_group_s_scale_that_the_original_does_not_confirm_stays_a_problem(quantized, llama, tmp_path):
    folder = edited(quantized["int4"], tmp_path / "faulty", scaled("weight_scale", 1 / 512, (7, 0)))
    assert [each.tensor for each in found(folder, reference=llama)] == [f"{DOWN}.weight_scale"]


@pytest.mark.parametrize(
    ("form", "ranks", "told"),
    [
        ("int8", 2, {}),
        ("int8", 4, {}),  # two ranks share a KV head
        ("int4", 4, {"o_proj": "its 32 inputs that share a scale or a word in 16s are 8 each"}),
        ("int4", 8, {
            "q_proj": "its 4 heads can't be shared out among 8 ranks", "down_proj": "its 64 inputs", "o_proj": "",
        }),
        ("int8", 3, {
            "q_proj": "its 4 heads can't", "k_proj": "3 ranks can't share its 2 heads evenly", "v_proj": "",
            "gate_proj": "its 64 outputs are 21.3333 each in 3 shards", "up_proj": "", "down_proj": "", "o_proj": "",
        }),
    ],
)  # fmt: skip
def test_layers_that_so_many_ranks_can_not_share_are_found(quantized, form, ranks, told):
    findings = found(quantized[form], "checkpoint_formats", tensor_parallel=ranks)
    kinds = {each.layer.rpartition(".")[2]: each.what for each in findings}
    assert all(each.layer.startswith("model.layers.") for each in findings)
    assert set(kinds) == set(told)
    assert all(text in kinds[kind] for kind, text in told.items())


QWEN_NEXT = {
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
}  # fmt: skip
FUSED = {
    "self_attn.qkv_proj": (8 * 16 + 2 * 2 * 16, 64),
    "mlp.gate_up_proj": (2 * 96, 64),
    "linear_attn.in_proj_qkv": (2 * 4 * 8 + 8 * 16, 64),
    "linear_attn.in_proj_z": (8 * 16, 64),
    "linear_attn.in_proj_qkvz": (2 * 4 * 8 + 2 * 8 * 16, 64),
    "linear_attn.in_proj_ba": (2 * 8, 64),
    "linear_attn.out_proj": (64, 8 * 16),
}


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        (2, {}),
        (4, {}),  # two ranks share a KV head
        (3, {
            "qkv_proj": "its 8 heads can't be shared out among 3 ranks", "in_proj_qkv": "its 4 heads", "in_proj_z": "",
            "in_proj_qkvz": "its 4 heads", "in_proj_ba": "its 4 heads", "out_proj": "its 128 inputs",
        }),
        (8, {"in_proj_qkv": "its 4 heads", "in_proj_qkvz": "its 4 heads", "in_proj_ba": "its 4 heads"}),
        (64, {
            **dict.fromkeys(("qkv_proj", "in_proj_qkv", "in_proj_z", "in_proj_qkvz", "in_proj_ba"), ""),
            "gate_up_proj": "its 96 outputs are 1.5 each in 64 shards",
        }),
    ],
)  # fmt: skip
def test_fused_layers_and_linear_attention_are_cut_piece_by_piece(tmp_path, ranks, told):
    weights = {}
    for name, shape in FUSED.items():
        weights[f"model.layers.0.{name}.weight"] = torch.randint(-90, 90, shape, dtype=torch.int8)
        weights[f"model.layers.0.{name}.weight_scale"] = torch.rand(shape[0], 1) + 1
    save_file(weights, tmp_path / "model.safetensors")
    scheme = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    stated = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN_NEXT, "quantization_config": stated}))
    findings = found(tmp_path, "checkpoint_formats", tensor_parallel=ranks)
    kinds = {each.layer.rpartition(".")[2]: each.what for each in findings}
    assert set(kinds) == set(told)
    assert all(text in kinds[kind] for kind, text in told.items())


@pytest.mark.parametrize(("ranks", "told"), [(3, None), (2, "evenly"), (5, "too few for 5 ranks")])
def test_packed_experts_are_cut_by_whole_groups(tmp_path, ranks, told):
    """vLLM gives each rank whole groups of 32 and the last one fewer (gpt_oss.py: per_rank_intermediate_size_block)."""
    experts, width, inner = 2, 64, 3 * 32
    weights = {}
    for name, rows, columns in (("gate_up_proj", 2 * inner, width), ("down_proj", width, inner)):
        layer = f"model.layers.0.mlp.experts.{name}"
        weights[f"{layer}_blocks"] = torch.randint(0, 255, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        weights[f"{layer}_scales"] = torch.randint(120, 124, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    findings = found(tmp_path, "checkpoint_formats", tensor_parallel=ranks)
    assert len(findings) == (2 if told else 0)
    assert all(told in each.what and each.note == (told == "evenly") for each in findings)


def test_a_layer_that_is_quantized_against_ignore_is_found(quantized, tmp_path):
    def config(settings):
        settings["quantization_config"]["ignore"].append("re:.*layers[.]1.*q_proj$")

    findings = found(edited(quantized["int8"], tmp_path / "faulty", config=config), "checkpoint_formats")
    assert [(finding.layer, finding.what) for finding in findings] == [
        (QUERY, "quantized, though the configuration leaves it out")
    ]


def test_codes_that_the_declared_bits_can_not_hold_are_found(quantized, tmp_path):
    def config(settings):
        settings["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4

    series, findings = problems_of(
        Files(open_folder(edited(quantized["int8"], tmp_path / "faulty", config=config))), "checkpoint_formats"
    )
    assert {each.what.partition(", but ")[2] for each in findings} == {"4 bits hold -8 to 7"}
    assert layers(findings) == set(series.layers)


def test_a_base_of_the_rope_that_loaders_read_differently_is_found(llama, tmp_path):
    """transformers 5 takes what rope_parameters has; llama.cpp's converter and older servers the key beside it."""
    base = json.loads((llama / "config.json").read_text())["rope_parameters"]["rope_theta"]
    for theta, wrong in ((base, []), (base / 2, ["rope_theta"])):
        folder = edited(
            llama, tmp_path / f"{theta}", config=lambda settings, theta=theta: settings.update(rope_theta=theta)
        )
        assert [each.tensor for each in found(folder, "checkpoint_settings", reference=llama)] == wrong
        assert found(folder, "checkpoint_settings", reference=folder) == []


def test_a_head_that_is_missing_without_ties_is_found(llama, tmp_path):
    findings = found(edited(llama, tmp_path / "faulty", lambda weights: weights.pop("lm_head.weight")))
    assert [finding.tensor for finding in findings] == ["lm_head.weight"]


DENSE = ("mlp.up_proj.weight", "mlp.down_proj.weight", "norm.weight")
EXPERTS = tuple(f"mlp.experts.{i}.{name}.weight" for i in range(4) for name in ("up_proj", "down_proj"))


@pytest.mark.parametrize(
    "blocks",
    [
        [DENSE, *[(*EXPERTS, "mlp.gate.weight", "norm.weight")] * 4],
        [DENSE, ("mamba.in_proj.weight", "norm.weight")] * 3,
        [(*DENSE, "k_proj.weight")] * 3 + [DENSE] * 2,
    ],
    ids=["a dense block before experts", "two kinds of blocks in turn", "keys shared by the last blocks"],
)
def test_blocks_of_several_kinds_are_no_fault(tmp_path, blocks):
    torch.manual_seed(0)
    weights = {
        f"model.layers.{index}.{name}": torch.randn(*((4, 4) if "proj" in name or "gate" in name else (4,)))
        for index, names in enumerate(blocks)
        for name in names
    }
    (tmp_path / "kinds").mkdir()
    save_file(weights, tmp_path / "kinds" / "model.safetensors")
    (tmp_path / "kinds" / "config.json").write_text(json.dumps({"num_hidden_layers": len(blocks)}))
    assert found(tmp_path / "kinds") == []


SETTINGS = {
    "rope_parameters.rope_theta": lambda c: c["rope_parameters"].update(rope_theta=500000.0),
    "rms_norm_eps": lambda c: c.update(rms_norm_eps=1e-5),
    "hidden_act": lambda c: c.update(hidden_act="gelu"),
    "num_key_value_heads": lambda c: c.update(num_key_value_heads=4),
    "tie_word_embeddings": lambda c: c.update(tie_word_embeddings=True),
    "vocab_size": lambda c: c.update(vocab_size=319),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_differs_from_the_reference_is_named(quantized, llama, tmp_path, setting):
    folder = edited(quantized["int8"], tmp_path / "faulty", config=SETTINGS[setting])
    findings = found(folder, "checkpoint_settings", reference=llama)
    assert [finding.tensor for finding in findings] == [setting]


def test_settings_that_two_versions_of_transformers_write_apart_are_the_same(llama, tmp_path):
    def older(settings):
        rope = settings.pop("rope_parameters")
        settings |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": "float32"}
        del settings["head_dim"]

    assert found(edited(llama, tmp_path / "older", config=older), "checkpoint_settings", reference=llama) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t["model"]["vocab"].update({"<unk>": 1, "!": 0}), "vocabulary"),
        (lambda t: t["model"]["merges"].reverse(), "merges"),
        (lambda t: t.update(post_processor={**t["pre_tokenizer"], "add_prefix_space": True}), "post_processor"),
        (lambda t: t["added_tokens"].clear(), "added_tokens"),
    ],
)
def test_a_tokenizer_that_differs_from_the_reference_is_named(llama, tmp_path, change, named):
    folder = edited(llama, tmp_path / "faulty")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    findings = found(folder, "checkpoint_settings", reference=llama)
    assert [(finding.layer, finding.tensor) for finding in findings] == [("tokenizer", named)]


def test_a_chat_template_that_was_lost_is_named(llama, tmp_path):
    reference = edited(llama, tmp_path / "reference")
    (reference / "chat_template.jinja").write_text("{{ messages }}")
    findings = found(llama, "checkpoint_settings", reference=reference)
    assert [finding.what for finding in findings] == ["there is none, the reference has one"]


def norm_scaled(weights):
    weights["model.layers.1.input_layernorm.weight"] *= 1.5


def row_zeroed(weights):
    weights["model.embed_tokens.weight"][100] = 0


def norm_lost(weights):
    weights.pop("model.layers.1.input_layernorm.weight")
    weights["model.layers.1.input_layernorm.bias"] = torch.zeros(32)


def head_cut(weights):
    weights["lm_head.weight"] = weights["lm_head.weight"][:300].clone()


CHANGED = {
    norm_scaled: (
        "model.layers.1.input_layernorm.weight",
        "32 of 32 elements differ from the reference's, the first 0; all are × 1.5",
    ),
    row_zeroed: (
        "model.embed_tokens.weight", "1 of 320 rows differ from the reference's, the first 100; they are zero",
    ),
    norm_lost: ("model.layers.1.input_layernorm.weight", "missing, the reference has it"),
    head_cut: ("lm_head.weight", "shape 300×32, in the reference 320×32"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGED)
def test_what_is_unquantized_and_differs_from_the_reference_is_named(quantized, llama, tmp_path, change):
    findings = found(edited(quantized["int8"], tmp_path / "faulty", change), "checkpoint_unquantized", llama)
    assert [(finding.tensor, finding.what) for finding in findings] == [CHANGED[change]]


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_unquantized_is_the_reference_s_in_every_format_and_in_16_bits(quantized, llama, tmp_path, form):
    def halved(weights):
        for name, tensor in weights.items():
            if tensor.dtype == torch.float32:
                weights[name] = tensor.bfloat16()

    assert found(quantized[form], "checkpoint_unquantized", llama) == []
    assert found(edited(quantized[form], tmp_path / "halved", halved), "checkpoint_unquantized", llama) == []


def packed_folder(folder, method, change=lambda weights: None):
    """Write 4 layers of one projection [16 outputs, 64 inputs] in GPTQ's or AWQ's layout: 4 bits, groups of 32."""
    random = np.random.default_rng(0)
    weights = {}
    for index in range(4):
        name = f"model.layers.{index}.mlp.down_proj"
        shape = (8, 16) if method == "gptq" else (64, 2)
        codes = random.integers(-(2**31), 2**31, shape, dtype=np.int32)
        weights[f"{name}.qweight"] = torch.from_numpy(codes)
        weights[f"{name}.qzeros"] = torch.full((2, 2), 0x77777777, dtype=torch.int32)
        weights[f"{name}.scales"] = torch.from_numpy(random.uniform(0.01, 0.02, (2, 16))).half()
    change(weights)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    quantization = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True, "sym": True}
    config = {"model_type": "llama", "num_hidden_layers": 4, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_layouts_of_gptq_and_awq_are_understood(tmp_path, method):
    assert found(packed_folder(tmp_path / "healthy", method)) == []

    def change(weights):
        weights[f"{DOWN}.scales"][1, 3] = float("nan")
        weights.pop("model.layers.1.mlp.down_proj.qzeros")
        column = weights["model.layers.0.mlp.down_proj.qweight"]
        if method == "gptq":
            column[:, 6] = 0x33333333
        else:
            column[:, 0] = (column[:, 0] & ~0xF) | 0x3

    findings = found(packed_folder(tmp_path / "faulty", method, change))
    assert [(finding.layer, finding.what) for finding in findings if "sibling" not in finding.what] == [
        ("model.layers.0.mlp.down_proj", f"row {6 if method == 'gptq' else 0} is one code throughout"),
        ("model.layers.1.mlp.down_proj", f"missing, though the scheme {method} needs it"),
        (DOWN, "1 of 32 are NaN, the first at 19"),
    ]


def test_block_wise_fp8_is_understood(tmp_path):
    torch.manual_seed(0)
    weights = {}
    for index in range(4):
        name = f"model.layers.{index}.mlp.down_proj"
        weights[f"{name}.weight"] = torch.randn(64, 96).to(torch.float8_e4m3fn)
        weights[f"{name}.weight_scale_inv"] = torch.rand(2, 3) + 1
    weights["model.layers.1.mlp.down_proj.weight_scale_inv"] = torch.rand(2, 2) + 1
    (tmp_path / "fp8").mkdir()
    save_file(weights, tmp_path / "fp8" / "model.safetensors")
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    config = {"model_type": "llama", "num_hidden_layers": 4, "quantization_config": quantization}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    assert [(finding.layer, finding.what) for finding in found(tmp_path / "fp8")] == [
        ("model.layers.1.mlp.down_proj", "shape 2×2, but block-wise scales of a weight (64, 96) are 6")
    ]


def gguf_file(folder, *, faulty=False):
    """Write 4 blocks of one Q8_0 projection and a float norm as llama.cpp's own writer does."""
    import gguf

    random = np.random.default_rng(0)
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(4)
    writer.add_layer_norm_rms_eps(1e-5 if faulty else 1e-6)
    writer.add_vocab_size(3)
    writer.add_token_list(["b", "a", "<s>"] if faulty else ["a", "b", "<s>"])
    for index in range(4):
        codes = gguf.quants.quantize(random.normal(size=(8, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        if faulty and index == 2:
            codes[3, :2] = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
        writer.add_tensor(f"blk.{index}.ffn_down.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        if not (faulty and index == 1):
            writer.add_tensor(f"blk.{index}.ffn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_a_gguf_file_is_checked_by_its_headers_blocks_and_settings(tmp_path):
    reference = tmp_path / "reference"
    reference.mkdir()
    settings = {"model_type": "llama", "num_hidden_layers": 4, "rms_norm_eps": 1e-6, "vocab_size": 3}
    (reference / "config.json").write_text(json.dumps(settings))
    save_file({"lm_head.weight": torch.ones(3, 8)}, reference / "model.safetensors")
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<s>", "id": 2}]}
    (reference / "tokenizer.json").write_text(json.dumps(tokenizer))

    def health(folder):
        files = Files(open_folder(folder, gguf_file="model.gguf"), open_folder(reference))
        found = problems_of(files, "checkpoint_health")[1]
        return [(finding.tensor, finding.what) for finding in found]

    assert health(gguf_file(tmp_path / "healthy")) == []
    assert health(gguf_file(tmp_path / "faulty", faulty=True)) == [
        ("blk.1.ffn_norm.weight", "missing: 3 sibling blocks have it"),
        ("blk.2.ffn_down.weight", "1 of 16 blocks have a scale that is NaN or infinite"),
        ("rms_norm_eps", "9.999999747378752e-06, in the reference 1e-06"),
        ("vocabulary", "2 of 3 tokens have another id, as 'a': 1, in the reference 0"),
    ]
    with pytest.raises(AnomalyError, match="declares no layers"):
        problems_of(Files(open_folder(tmp_path / "healthy", gguf_file="model.gguf")), "checkpoint_formats")


LLAMA_31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONVERTED = {
    # case: (the keys of the file, those of the original, what differs)
    "a scaled rope, which llama.cpp keeps as a tensor": ({"rope.freq_base": 5e5}, {"rope_parameters": LLAMA_31}, []),
    "another base": (
        {"rope.freq_base": 1e4}, {"rope_parameters": LLAMA_31},
        [("rope_parameters.rope_theta", "10000.0, in the reference 500000.0")],
    ),
    "a base that isn't stated and was llama.cpp's": ({}, {"rope_theta": 1e4}, []),
    "a base that is lost": (
        {}, {"rope_theta": 1e6}, [("rope_parameters.rope_theta", "10000.0, in the reference 1000000.0")],
    ),
    "heads of a width of their own": (
        {"embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32},
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}, [],
    ),
    "heads of another width": (
        {"embedding_length": 64, "attention.head_count": 4, "attention.key_length": 32},
        {"hidden_size": 64, "num_attention_heads": 4}, [("head_dim", "32, in the reference 16")],
    ),
    "a latent attention": (
        {"embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 40},
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32}, [],
    ),
    "a head of several tokens": (
        {"block_count": 5, "nextn_predict_layers": 1}, {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}, [],
    ),
    "the language model of several parts": (
        {"embedding_length": 64}, {"text_config": {"hidden_size": 32}}, [("hidden_size", "64, in the reference 32")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERTED)
def test_a_gguf_file_s_settings_are_compared_as_llama_cpp_means_them(tmp_path, case):
    """A healthy conversion of Llama 3.1, Qwen3, DeepSeek or GLM is no alarm."""
    import gguf

    stated, original, wrong = CONVERTED[case]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in stated.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **original}))
    found = changed_settings(Folder(tmp_path, "model.gguf"), Folder(tmp_path))
    assert [(each.tensor, each.what) for each in found] == wrong


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BF16", torch.bfloat16),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz),
    ],
)
def test_small_floats_are_decoded_as_torch_does(name, dtype):
    kind = np.uint16 if name == "BF16" else np.uint8
    codes = np.arange(np.iinfo(kind).max + 1).astype(kind)
    expected = torch.from_numpy(codes.copy()).view(dtype).float().numpy()
    np.testing.assert_array_equal(decoded(codes, name), expected)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGED = {
    "cut short": ("model.safetensors", cut, AnomalyError, "is cut short: model.*ends at byte"),
    "no safetensors": (
        "model.safetensors",
        lambda path: path.write_bytes(b"\xff" * 64),
        AnomalyError,
        r"not a safetensors file, for it begins with b'\\xff",
    ),
    "a web page": (
        "model.safetensors",
        lambda path: path.write_text("<!DOCTYPE html>"),
        AnomalyError,
        "is a web page or a server's answer: sign in",
    ),
    "weights of no bytes": ("model.safetensors", lambda path: path.write_bytes(b""), AnomalyError, "is empty: copy"),
    "a header that is no JSON": (
        "model.safetensors",
        lambda path: path.write_bytes((8).to_bytes(8, "little") + b"{not json"),
        AnomalyError,
        "can't be read as safetensors",
    ),
    "a git-lfs pointer": (
        "model.safetensors",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        InfraError,
        "git-lfs pointer",
    ),
    "no weights": ("model.safetensors", lambda path: path.unlink(), AnomalyError, r"no \.safetensors file"),
    "weights of another kind": (
        "model.safetensors",
        lambda path: path.rename(path.with_name("pytorch_model.bin")),
        InfraError,
        r"pytorch_model\.bin is not read here",
    ),
    "config.json no JSON": ("config.json", lambda path: path.write_text("{"), AnomalyError, r"config\.json is no JSON"),
    "config.json a list": ("config.json", lambda path: path.write_text("[]"), AnomalyError, "is no JSON object"),
    "no config.json": ("config.json", lambda path: path.unlink(), AnomalyError, r"holds no config\.json"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_absent_file_is_the_checkpoint_s_fault_and_one_that_is_not_read_here_is_not(
    int8_llama, tmp_path, damage
):
    name, change, kind, text = DAMAGED[damage]
    folder = edited(int8_llama, tmp_path / "damaged")
    change(folder / name)
    with pytest.raises(kind, match=text):
        found(folder)


def test_a_folder_around_the_checkpoint_is_told_from_one_without(int8_llama, tmp_path):
    shutil.copytree(int8_llama, tmp_path / "snapshots" / "1a2b")
    with pytest.raises(AnomalyError, match=r"holds no .*: give \S*snapshots/1a2b, which is one"):
        found(tmp_path)


def test_codes_that_no_configuration_declares_are_a_problem(int8_llama, tmp_path):
    """A loader takes them for weights, and no scale is applied."""
    folder = edited(int8_llama, tmp_path / "undeclared", config=lambda settings: settings.pop("quantization_config"))
    series, findings = problems_of(Files(open_folder(folder)), "checkpoint_health")
    assert {each.layer for each in findings} == {layer for layer in series.layers if layer.endswith("_proj")}
    assert {each.what for each in findings} == {
        "weight_scale beside it shows that it is quantized, and config.json has no quantization_config"
    }


def test_a_path_that_is_neither_a_folder_nor_in_the_cache_is_an_infra_error():
    with pytest.raises(InfraError, match="no hub id in the local cache"):
        found("nobody/nothing")


def test_a_cache_that_can_not_be_read_is_told_apart_from_an_id_that_is_not_in_it(monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied", "/cache/hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", denied)
    with pytest.raises(InfraError, match=r"the local cache of the hub can't be read for 'nobody/nothing'.*denied"):
        open_folder("nobody/nothing")


def test_a_file_is_read_once_for_all_assertions_whether_they_say_the_defaults_or_not(int8_llama, monkeypatch):
    read = []
    looking = checks.unsound_scales
    monkeypatch.setattr(checks, "unsound_scales", lambda folder: read.append(folder) or looking(folder))
    files = Files(open_folder(int8_llama))
    for metric, parameters in (
        ("checkpoint_scales", {}),
        ("checkpoint_scales", {"spread": 8.0}),
        ("checkpoint_health", {}),
    ):
        problems_of(files, metric, **parameters)
    assert len(read) == 1


def test_nothing_passes_where_there_is_nothing_to_check(llama, int8_llama):
    with pytest.raises(AnomalyError, match="is not quantized"):
        found(llama, "checkpoint_scales")
    with pytest.raises(AnomalyError, match=r"model\.reference"):
        found(int8_llama, "checkpoint_settings")
    with pytest.raises(AnomalyError, match=r"what is unquantized is compared with model\.reference"):
        found(int8_llama, "checkpoint_unquantized")
    with pytest.raises(AnomalyError, match="no layer matches 'nosuch'"):
        found(int8_llama, layers="nosuch")


@pytest.fixture(scope="module")
def gated(tmp_path_factory, project, llama, int8_llama):
    """Gate a checkpoint whose one scale is NaN, with static assertions alone, in a process of its own."""
    folder = edited(int8_llama, tmp_path_factory.mktemp("gated") / "nan", fill("weight_scale", float("nan"), 3))
    static = (
        "id: health, metric: checkpoint_health", "id: keys, metric: checkpoint_keys",
        "id: soft, metric: checkpoint_scales, max: 0, level: warn, reason: known",
        "id: elsewhere, metric: checkpoint_scales, layers: q_proj", "id: total, metric: checkpoint_weights, over: sum",
    )  # fmt: skip
    project.write("a.qsa.yaml", suite(folder, *static))
    code = (
        "import sys, pytest\n"
        "code = pytest.main(['a.qsa.yaml', '-p', 'no:randomly'])\n"
        "print('found', [name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    return project, project.program(sys.executable, "-c", code)


@pytest.mark.process
def test_static_assertions_alone_import_no_torch(gated):
    assert "found []" in gated[1].stdout, gated[1].stdout


@pytest.mark.process
def test_the_failure_names_tensor_file_layer_and_what_to_do(gated):
    out = gated[1].stdout
    first = f"E   REGRESSION health: {DOWN}.weight_scale: "
    line = next(line for line in out.splitlines() if line.startswith(first))
    assert line.endswith("; 1 problem in 1 of 39 layers (max 0)")
    assert f"{DOWN}.weight_scale (model.safetensors)" in out
    assert "NaN" in out
    assert "→ quantize and save the layer again" in out
    assert " tensors in 1 file, compressed-tensors int-quantized; no forward" in out
    assert "again    pytest a.qsa.yaml::health" in out


@pytest.mark.process
def test_static_verdicts_are_judged_softened_and_reported_like_all_others(gated):
    project, done = gated
    kinds = {result["id"]: result["kind"] for result in project.json("qsa-results/report.json")["results"]}
    assert kinds == {
        "health": "REGRESSION", "keys": "PASSED", "soft": "WARNED", "elsewhere": "PASSED", "total": "PASSED",
    }  # fmt: skip
    assert "qsa: 4 of 5 assertions " in done.stdout
    page = project.read("qsa-results/report.html")
    assert "Problems in the files" in page
    assert f"{DOWN}.weight_scale" in page


@pytest.mark.process
def test_a_static_assertion_adds_nothing_to_the_pass(own_project, int8_llama):
    own_project.write("a.qsa.yaml", suite(int8_llama, "id: health, metric: checkpoint_health", peaks("max: 100")))
    run = own_project.pytest("a.qsa.yaml")
    assert set(run.outcomes.values()) == {"passed"}, run.out
    own_project.write("a.qsa.yaml", suite(int8_llama, peaks("max: 100")))
    cache = "--qsa-cache=cache"
    assert own_project.pytest("a.qsa.yaml", cache).code == 0
    alone = {file.name: file.read_bytes() for file in (own_project.folder / "cache").glob("*.qsa")}
    own_project.write("a.qsa.yaml", suite(int8_llama, "id: health, metric: checkpoint_health", peaks("max: 100")))
    assert own_project.pytest("a.qsa.yaml", cache).code == 0
    both = {file.name: file.read_bytes() for file in (own_project.folder / "cache").glob("*.qsa")}
    assert len(alone) == 1
    assert alone.keys() == both.keys()
    unchanged = alone == both
    assert unchanged


@pytest.mark.process
def test_a_model_that_was_read_and_run_is_one_subject_of_the_report(own_project, int8_llama):
    own_project.write("a.qsa.yaml", suite(int8_llama, "id: health, metric: checkpoint_health", peaks("max: 0")))
    own_project.pytest("a.qsa.yaml")
    page = own_project.read("qsa-results/report.html")
    assert page.count('<div class="subject">') == 1
    assert "1 of 2 failed" in page


@pytest.mark.process
def test_python_tests_check_the_files_without_a_pass(own_project, llama, int8_llama):
    own_project.write(
        "conftest.py",
        """
        from pytest_qsa.engine import subject as running

        def no_pass(*arguments, **options):
            raise AssertionError("a pass was made")

        running.capture_subject = no_pass
        """,
    )
    own_project.write("a.qsa.yaml", suite(int8_llama, peaks("max: 100"), sections=""))
    own_project.write(
        "test_files.py",
        """
        def test_health(qsa):
            assert qsa.checkpoint.health() == 0
            assert qsa.checkpoint.scales(r"down_proj$", spread=8) <= 0

        def test_settings(qsa):
            assert qsa.checkpoint.settings() == 0

        def test_spread(qsa):
            assert qsa.checkpoint.scales(spread=0.01) == 0
        """,
    )
    run = own_project.pytest("test_files.py", "--qsa-config=a.qsa.yaml")
    assert [run.report(f"::test_{name}")["outcome"] for name in ("health", "settings", "spread")] == [
        "passed", "failed", "failed",
    ]  # fmt: skip
    assert run.first_line("::test_settings").startswith("ANOMALOUS test_settings: settings are compared with those of")
    assert "problems in" in run.first_line("::test_spread")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: a, metric: checkpoint_health, site: weight", "unknown key 'site'"),
        ("id: a, metric: checkpoint_scales, spread: 0", "spread: "),
        ("id: a, metric: checkpoint_scale", "did you mean 'checkpoint_scales'"),
    ],
)
def test_a_wrong_static_assertion_is_told_with_its_line(tmp_path, text, message):
    from pytest_qsa.suite import load_suite

    (tmp_path / "a.qsa.yaml").write_text(suite("x", text))
    with pytest.raises(SuiteError, match=rf"a\.qsa\.yaml:4: .*{message}"):
        load_suite(tmp_path / "a.qsa.yaml")


def test_defaults_of_a_suite_give_a_static_assertion_what_it_can_have(tmp_path):
    from pytest_qsa.suite import load_suite

    sections = "defaults: {site: output, reduce: mean, reason: agreed in June}\n"
    (tmp_path / "a.qsa.yaml").write_text(suite("x", "id: a, metric: checkpoint_health", sections=sections))
    (assertion,) = load_suite(tmp_path / "a.qsa.yaml").assertions
    assert assertion.reason == "agreed in June"


def test_every_check_is_a_method_of_python_tests():
    from pytest_qsa.gate.assertions import QsaCheckpoint

    for name, check in CHECKS.items():
        method = getattr(QsaCheckpoint, name.removeprefix("checkpoint_"))
        assert {n: p.default for n, p in check.parameters.items()}.items() <= method.__kwdefaults__.items()


def test_a_random_llama_passes_in_a_second_layout(tmp_path, llama):
    reference = save_llama(tmp_path / "again", tokenizer=False)
    assert found(reference) == []


DEEP = "[" * 100_000 + "]" * 100_000
HEADER = {"x.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
SENSELESS = {
    "a header that is nested too deeply": {"header": f'{{"__metadata__": {DEEP}}}'},
    "a negative shape": {"header": json.dumps(HEADER).replace("[4, 4]", "[-4, -4]")},
    "an infinite shape": {"header": json.dumps(HEADER).replace("[4, 4]", "[Infinity, 4]")},
    "a shape beyond the file": {"header": json.dumps(HEADER).replace("[4, 4]", "[400, 400]")},
    "bytes that end before they begin": {"header": json.dumps(HEADER).replace("[0, 64]", "[64, 0]")},
    "a configuration that is nested too deeply": {"config.json": DEEP},
    "an index that is a list": {"model.safetensors.index.json": "[1]"},
    "an index of names that no system takes": {
        "model.safetensors.index.json": json.dumps({"weight_map": {"x.weight": "a" * 5000}})
    },
    "groups that are a list": {
        "config.json": json.dumps({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}})
    },
}


@pytest.mark.parametrize("damage", SENSELESS)
def test_a_file_that_makes_no_sense_is_one_line(tmp_path, damage):
    texts = {"config.json": "{}", "header": json.dumps(HEADER)} | SENSELESS[damage]
    header = texts.pop("header").encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(AnomalyError) as caught:
        found(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_more_tensors_than_any_model_has_are_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("pytest_qsa.checkpoint.folder.MOST_TENSORS", 30)
    with pytest.raises(AnomalyError, match=r"holds \d+ tensors, more than the 30 "):
        found(llama)
    copy = edited(llama, tmp_path / "indexed")
    index = {"metadata": {}, "weight_map": {f"x{number}": "model.safetensors" for number in range(31)}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AnomalyError, match=r"model.safetensors.index.json holds 31 tensors, more than the 30 "):
        _ = open_folder(copy).indexed


def test_a_sparse_file_that_pretends_to_be_large_is_refused_at_once(tmp_path):
    header = json.dumps({"x.weight": {"dtype": "F32", "shape": [25, 10**9], "data_offsets": [0, 10**11]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 10**11)
    with pytest.raises(AnomalyError, match="is a sparse file"):
        found(tmp_path)


READ_WHOLE = ("config.json", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tool.jinja")


@pytest.mark.parametrize("name", READ_WHOLE)
def test_what_loaders_read_whole_is_refused_by_its_size(llama, tmp_path, name):
    folder = tmp_path / "folder"
    shutil.copytree(llama, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("ab") as file:
        file.truncate(300 << 20)
    with pytest.raises(InfraError, match=rf"{re.escape(name)}: has 315 MB, more than the \d+ MB that are read"):
        Folder(folder).check_files()
    with pytest.raises(InfraError, match=re.escape(name)):
        load_tokenizer(str(folder), {})


def test_other_texts_beside_the_weights_may_be_as_large_as_they_are(llama, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(llama, folder)
    for name in ("notes.txt", "trainer_state.json"):
        with (folder / name).open("wb") as file:
            file.truncate(300 << 20)
    Folder(folder).check_files()


def test_a_template_that_is_no_text_is_told(llama, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(llama, folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(AnomalyError, match=r"chat_template\.jinja is no text"):
        Folder(folder).template()


def test_more_blocks_than_any_model_has_are_refused(tmp_path):
    header = json.dumps(
        {"model.layers.99999.x.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    ).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AnomalyError, match=r"holds layers\.99999, and no known model has more than 10,000 blocks"):
        found(tmp_path)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**12}, {"text_config": {"n_routed_experts": 20_000}}])
def test_a_count_of_modules_that_no_model_has_is_refused_before_a_model_is_made(change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(AnomalyError, match=r"config\.json: .* is [0-9]+, and no known model has more than 10,000"):
        open_folder(tmp_path).check_files()


def test_names_with_odd_digits_are_sorted_as_words():
    assert sorted(["a.10", "a.²", "a.2", f"a.{'9' * 5000}"], key=natural)[-2:] == ["a.2", "a.10"]

"""Small checkpoints on disk, in each format that the tests need, made by the libraries that make such files."""

from __future__ import annotations

import json
import shutil
from importlib import resources

import numpy as np


def save_tokenizer(folder):
    """Save a byte-level tokenizer of 320 entries, trained on the shipped sample."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    text = resources.files("pytest_qsa.suite.data").joinpath("sample.txt").read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def save_llama(folder, change=lambda weights: None, *, tokenizer=True, layers=4, width=32):
    """Save a Llama with random weights that are always the same; `change` edits its state dict."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=width, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_quantized_llama(folder, source, preset="W8A8", head=False, **weights):
    """Quantize a small Llama with compressed-tensors, every Linear but the head, and save it; as checkpoints.py does.

    `head`: the head as well, which vLLM finds by its name alone. `weights`: changes to the preset's weight scheme.
    Static inputs get a scale for activations up to 6 + block.
    """
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, is_module_quantized
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source)
    scheme = preset_name_to_scheme(preset, targets=["Linear", *["re:.*lm_head$"] * head])
    scheme.weights = scheme.weights.model_copy(update=weights)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=[] if head else ["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for name, module in model.named_modules():
        if not is_module_quantized(module):
            continue
        low, high = _extremes(module.weight.detach(), scheme.weights)
        whole = None
        if hasattr(module, "weight_global_scale"):  # of NVFP4; what isn't written is whatever the memory holds
            whole = generate_gparam(module.weight.detach().amin(), module.weight.detach().amax())
            module.weight_global_scale.data.copy_(whole.reshape(module.weight_global_scale.shape))
        if hasattr(module, "input_global_scale"):
            module.input_global_scale.data.fill_(300.0)
        scale, zero_point = calculate_qparams(low, high, scheme.weights, whole)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero_point.reshape(module.weight_zero_point.shape))
        if hasattr(module, "input_scale"):
            module.input_scale.data.copy_(torch.full_like(module.input_scale, (6 + int(name.split(".")[2])) / 448))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    if (source / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def save_glm_with_mtp(folder):
    """Save a small GLM-4 MoE with random weights, whose third layer is a head that drafts a token (MTP)."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=320, hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, initializer_range=0.1, tie_word_embeddings=False,
        max_position_embeddings=512, n_group=1, topk_group=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Glm4MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    weights, last = load_file(folder / "model.safetensors"), "model.layers.2."
    norms = {f"{last}{name}.weight": torch.ones(128).bfloat16() for name in ("enorm", "hnorm", "shared_head.norm")}
    copies = {"shared_head.head": "lm_head", "embed_tokens": "model.embed_tokens"}
    tables = {f"{last}{name}.weight": weights[f"{source}.weight"].clone() for name, source in copies.items()}
    mixed = {f"{last}eh_proj.weight": (torch.randn(128, 256) / 10).bfloat16()}
    save_file({**weights, **norms, **tables, **mixed}, folder / "model.safetensors", metadata={"format": "pt"})
    declared = json.loads((folder / "config.json").read_text())
    lists = {name: value[:2] for name, value in declared.items() if isinstance(value, list) and len(value) == 3}
    changed = {**declared, **lists, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(changed))
    save_tokenizer(folder)
    return folder


def save_words(source, folder, declared):
    """Save a Llama whose q and k are random words of GPTQ or AWQ's `gemm`, zero points of several outputs in one."""
    import torch

    columns, many, chance = declared["quant_method"] == "gptq", 32 // declared["bits"], np.random.default_rng(0)

    def pack(weights):
        for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight"))]:
            outputs, inputs = weights.pop(name).shape
            groups = inputs // declared["group_size"]
            shapes = {"qweight": (inputs // many, outputs) if columns else (inputs, outputs // many)}
            for part, shape in (shapes | {"qzeros": (groups, outputs // many)}).items():
                words = chance.integers(-(2**31), 2**31, shape).astype(np.int32)
                weights[name.replace("weight", part)] = torch.from_numpy(words)
            scales = chance.uniform(0.5, 1, (groups, outputs)).astype(np.float16)
            weights[name.replace("weight", "scales")] = torch.from_numpy(scales)

    return edited(source, folder, pack, config=lambda config: config.update(quantization_config=declared))


def save_moe(folder, width=32):
    """Save a small Qwen3-MoE with random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=width, intermediate_size=64, moe_intermediate_size=max(32, width // 2),
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, num_experts=4,
        num_experts_per_tok=2, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_quantized_moe(folder, preset, **weights):
    """Save a small Qwen3-MoE whose experts and attention are quantized in its files, as llm-compressor leaves them.

    The original lies beside it, `folder` with `-float`. `weights`: changes to the preset's weight scheme.
    """
    import torch
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from safetensors.torch import load_file, save_file

    original = save_moe(folder.with_name(f"{folder.name}-float"))
    shutil.copytree(original, folder)
    scheme = preset_name_to_scheme(preset, targets=["Linear"])
    scheme.weights = scheme.weights.model_copy(update=weights)
    tensors, form = {}, None
    weights = load_file(original / "model.safetensors")
    for name, tensor in weights.items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        form, packed = packed_parts(tensor, scheme, torch.cat([weights[each].ravel() for each in fused_with(name)]))
        if "input_global_scale" in packed:
            packed["input_global_scale"] = torch.tensor([300.0 + 10 * int(name.split(".")[2])])
        tensors |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stated = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*mlp.gate$"], format=form,
        quantization_status="compressed",
    )  # fmt: skip
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {**json.loads(stated.model_dump_json()), "quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def fused_with(name):
    """Return the tensors that loaders fuse with one, itself included, as llm-compressor lets them share a scale."""
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if (own := name.split(".")[-2]) in group:
            return [name.replace(own, each) for each in group]
    return [name]


def packed_parts(weight, scheme, group=None):
    """Return a format's name, and the tensors that its compressor makes of one weight.

    `group`: the weights that share its scale of the whole tensor, where there are others.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import initialize_module_for_quantization
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    initialize_module_for_quantization(linear, scheme)
    whole = {}
    if hasattr(linear, "weight_global_scale"):
        whole["global_scale"] = generate_gparam(*torch.aminmax(weight if group is None else group))
        linear.weight_global_scale.data.copy_(whole["global_scale"])
    scale, _ = calculate_qparams(*_extremes(weight, scheme.weights), scheme.weights, **whole)
    linear.weight_scale.data = scale.reshape(linear.weight_scale.shape).to(linear.weight_scale.dtype)
    form = infer_module_format(torch.nn.Linear, scheme)
    held = {name: tensor.detach() for name, tensor in linear.state_dict().items()}
    form = getattr(form, "value", form)
    return form, BaseCompressor.get_value_from_registry(form).compress(held, scheme)


FORMATS = {
    "int8": ("W8A8", {}),
    "int8 weights": ("W8A16", {"group_size": None, "strategy": "channel"}),
    "int4": ("W4A16", {"group_size": 16}),
    "int4 with zero points": ("W4A16", {"group_size": 16, "symmetric": False}),
    "fp8 with static inputs": ("FP8", {}),
    "fp8 by channel": ("FP8_DYNAMIC", {}),
}
"""The formats of compressed-tensors that the tests make → the preset, and changes to its weight scheme."""
TORCHAO = {
    "torchao int8": (8, None),
    "torchao int8 by group": (8, 32),
    "torchao int4": (4, 16),
    "torchao int4 by 32": (4, 32),
}
"""Those of torchao → the bits of a weight, and the inputs that share a scale; None for a scale a row."""


def save_torchao_llama(folder, source, bits, group):
    """Quantize a small Llama's weights with torchao as transformers does, and save it."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    granularity = PerGroup(group) if group else PerAxis(0)
    scheme = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=TorchAoConfig(scheme))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The values of the codes of MXFP4 (OCP Microscaling Formats 1.0, E2M1)."""


def pack_mxfp4(weight):
    """Round [experts, in, out] to MXFP4 by the standard: blocks [experts, out, in / 32, 16], and their scales."""
    import torch

    groups = weight.transpose(1, 2).contiguous().double().numpy()
    groups = groups.reshape(*groups.shape[:2], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(axis=-1))) - 2
    scaled = groups / 2.0 ** exponents[..., None]
    codes = np.abs(scaled[..., None] - E2M1).argmin(axis=-1)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return torch.from_numpy(blocks.astype(np.uint8)), torch.from_numpy((exponents + 127).astype(np.uint8))


def save_gpt_oss(folder):
    """Save a small gpt-oss in its released layout; hidden and intermediate sizes are the same, as in gpt-oss-20b."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weights[f"{name}_blocks"], weights[f"{name}_scales"] = pack_mxfp4(weights.pop(name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(settings))
    save_tokenizer(folder)
    return folder


def save_gguf(folder, source, name="Q8_0", pre="gpt-2"):
    """Write a small Llama as llama.cpp's converter does: matrices quantized, rows of q and k in its order.

    Matrices whose rows are no whole blocks stay in float.
    """
    import gguf
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, json.loads((source / "tokenizer.json").read_text()), pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    kind = gguf.GGMLQuantizationType[name]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for key, tensor in load_file(source / "model.safetensors").items():
        layer = key.removesuffix(".weight")
        values = tensor.to(torch.float32)
        if (count := heads.get(layer.rpartition(".")[2])) is not None:
            values = values.reshape(count, 2, len(values) // count // 2, -1).swapaxes(1, 2).reshape(values.shape)
        values, to = values.numpy(), f"{names.get_name(layer)}.weight"
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(to, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(to, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def _add_tokenizer(writer, tokenizer, pre):
    """Write a byte-level BPE vocabulary as llama.cpp's converter does."""
    model = tokenizer["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3 if word == "<unk>" else 1 for word in words])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_unk_token_id(model["vocab"]["<unk>"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _extremes(weight, scheme):
    """Return the least and the largest weight that share a scale."""
    import torch

    if scheme.block_structure:
        blocks = weight.unflatten(1, (-1, scheme.block_structure[1])).unflatten(0, (-1, scheme.block_structure[0]))
        return blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))
    if scheme.group_size:
        return torch.aminmax(weight.reshape(weight.shape[0], -1, scheme.group_size), dim=-1)
    return torch.aminmax(weight, dim=1, keepdim=True) if scheme.strategy == "channel" else torch.aminmax(weight)


def edited(source, folder, change=lambda weights: None, *, config=lambda config: None):
    """Copy a checkpoint folder of one file with `change` applied to its tensors and `config` to its config.json."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    config(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def save_adapter(folder, base, *, config=lambda config: None, tensors=lambda tensors: None, kind="Lora", **options):
    """Save an adapter of random numbers for a checkpoint by peft; `config` and `tensors` edit what it wrote.

    `options`: of peft's configuration class. Return the weights that peft's own merge of the unedited one makes, by
    name; none for an adapter that it can't merge.
    """
    import warnings

    import peft
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    if kind == "Lora":
        options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about what it saves
        torch.manual_seed(1)
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), getattr(peft, f"{kind}Config")(**options)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:  # those of the adapter, most of which begin as zero or as the base's
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        mergeable = kind == "Lora" and not options.get("alora_invocation_tokens")
        merged = model.merge_and_unload().state_dict() if mergeable else {}
    (folder / "README.md").unlink()
    edit_json(folder / "adapter_config.json", config)
    held = load_file(folder / "adapter_model.safetensors")
    tensors(held)
    save_file(held, folder / "adapter_model.safetensors")
    return {name: tensor.clone() for name, tensor in merged.items()}


def edit_json(file, change):
    """Write a JSON file anew with `change` applied to its content."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))

"""The checkpoints of `formats.py`: a function for each program that makes them, run in an environment that has it.

`python format_makers.py RECIPE SOURCE TARGET` quantizes the folder SOURCE, and puts beside the checkpoint what the
library itself reads from it: `dequantized/model.safetensors`, the weights of `LAYERS`, in float32 where it can.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from formats_by_hand import (
    AWQ,
    FP8_BLOCKS,
    FP8_TENSOR,
    GPTQ,
    Packed,
    awq,
    by_hand,
    fp8_blocks,
    fp8_tensor,
    gpt_oss,
    gptq,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Make = Callable[[Path, Path], Tensors]
"""Quantizes a folder into another, and returns the weights as the library reads them; empty where it has no reader."""
BLOCK = "model.layers.3"
LAYERS = tuple(f"{BLOCK}.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"))
"""The layers whose weights are compared with the library's; the last one is damaged."""
Origin = Literal["library", "converter", "by hand"]


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is made. `needs`: what pip installs into its environment; empty for the tests' own."""

    name: str
    origin: Origin
    make: Make
    needs: tuple[str, ...] = ()
    source: str = "llama"


# --- what is quantized


def llama(folder: Path, small: bool) -> None:
    """Save a random Llama of six blocks, in which layers and rows are of different sizes as in a trained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # a fixture keeps of the small one `v_proj` alone: 32 rows
    config = LlamaConfig(
        vocab_size=320, max_position_embeddings=512, tie_word_embeddings=False, hidden_size=256,
        intermediate_size=256 if small else 768, num_hidden_layers=4 if small else 6,
        num_attention_heads=8 if small else 4, num_key_value_heads=1 if small else 2,
    )  # fmt: skip
    torch.manual_seed(0)
    _save_source(LlamaForCausalLM(config), folder)


def gpt_oss_model(folder: Path, small: bool) -> None:
    """Save a random gpt-oss of four blocks with four experts each."""
    from transformers import GptOssConfig, GptOssForCausalLM

    width = 32 if small else 64
    config = GptOssConfig(
        vocab_size=320, hidden_size=width, intermediate_size=width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    _save_source(GptOssForCausalLM(config), folder)


def mixture(folder: Path, small: bool) -> None:
    """Save a random Qwen3-MoE of four blocks with four experts each."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    width = 128 if small else 256
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=width, intermediate_size=width, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    _save_source(Qwen3MoeForCausalLM(config), folder)


def settled(folder: Path, small: bool) -> None:
    """Save a Llama as `llama` does, with what faults are put into: biases, an epsilon, a stop token and a first one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, max_position_embeddings=512, tie_word_embeddings=False, hidden_size=256, intermediate_size=768,
        num_hidden_layers=4 if small else 6, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        attention_bias=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, values in model.named_parameters():
        if name.endswith(".bias"):
            values.data.normal_(0, 0.02)
    _save_source(model, folder, ("<s>", "</s>"))


SOURCES: dict[str, Callable[[Path, bool], None]] = {
    "llama": llama,
    "gpt-oss": gpt_oss_model,
    "moe": mixture,
    "settled": settled,
}
"""The models that are quantized: each saves itself into a folder, small for a fixture of the tests."""


def _save_source(model: Any, folder: Path, ends: tuple[str, ...] = ()) -> None:
    """Save a model with a tokenizer of bytes. `ends`: its first and its stop token."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    chance = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() == 2:
            layer, rows = 1 + 0.3 * torch.rand(1, generator=chance), torch.randn(len(weight), 1, generator=chance)
            weight.data.mul_(layer).mul_(torch.exp(0.2 * rows))
    model.to(torch.bfloat16).save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.models.BPE(
        vocab={word: index for index, word in enumerate(["<unk>", *ends, *letters])}, merges=[]
    )
    read, tokenizer = tokenizers.Tokenizer(words), PreTrainedTokenizerFast
    special = dict(zip(("bos_token", "eos_token"), ends, strict=False))
    if ends:
        first = [(ends[0], 1)]
        read.post_processor = tokenizers.processors.TemplateProcessing(single=f"{ends[0]} $A", special_tokens=first)
    tokenizer(tokenizer_object=read, unk_token="<unk>", **special).save_pretrained(folder)  # type: ignore[no-untyped-call]


def _model(source: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return model


def _tokens(source: Path) -> list[Tensor]:
    """Return the batches of calibration: 8 samples of 64 random tokens."""
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    return list(torch.randint(0, size, (8, 1, 64), generator=torch.Generator().manual_seed(0)))


def _stored(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _parts(tensors: Tensors, layer: str) -> Tensors:
    return {name[len(layer) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}


# --- llm-compressor: presets of compressed-tensors


def compressor(preset: str, source: Path, target: Path, **modifier: Any) -> Tensors:
    """Quantize by a preset; the library's reader is compressed-tensors' decompressor, on scales in float32."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoTokenizer

    model = _model(source)
    rows = [{"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1]} for ids in _tokens(source)]
    ignored = ["lm_head", r"re:.*mlp\.gate$"]
    recipe = QuantizationModifier(targets="Linear", scheme=preset, ignore=ignored, **modifier)
    tokenizer = AutoTokenizer.from_pretrained(source)
    oneshot(model=model, recipe=recipe, dataset=Dataset.from_list(rows), processor=tokenizer, max_seq_length=64)
    model.save_pretrained(target, save_compressed=True)  # type: ignore[operator]
    tokenizer.save_pretrained(target)
    return decompressed(target)


def decompressed(folder: Path) -> Tensors:
    """Return what compressed-tensors reads, computed in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    scheme = QuantizationScheme.model_validate(group)
    reader = BaseCompressor.get_value_from_registry(group.get("format") or settings["format"])
    stored, found = _stored(folder), {}
    for layer in LAYERS:
        if not (parts := _parts(stored, layer)):
            continue
        floats = {n: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for n, t in parts.items()}
        found[layer] = reader.decompress(floats, scheme)["weight"]
    return found


# --- NVIDIA ModelOpt


def modelopt(config: str, source: Path, target: Path) -> Tensors:
    """Quantize by a configuration of ModelOpt, and export; its reader is the fake quantizer that it calibrated."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoTokenizer

    model, batches = _model(source), _tokens(source)

    def forward(model: nn.Module) -> None:
        for batch in batches:
            model(batch)

    with torch.no_grad():
        mtq.quantize(model, getattr(mtq, config), forward)
        export_hf_checkpoint(model, export_dir=target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    stored = _stored(target)
    return {layer: read for layer in LAYERS if (read := _modelopt_read(_parts(stored, layer))) is not None}


def _modelopt_read(parts: Tensors) -> Tensor | None:
    """Return what ModelOpt's own tensor class reads; None for a layout that it only writes."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    weight, scale, smoothing = parts["weight"], parts["weight_scale"], parts.get("pre_quant_scale")
    read: Tensor
    if weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.dim() < 2:
        scale = scale.reshape(-1, 1) if scale.dim() else scale
        read = FP8QTensor(weight.shape, torch.float32, weight).dequantize(scale=scale)
    elif "weight_scale_2" in parts and scale.dtype == torch.float8_e4m3fn:
        shape = torch.Size((len(weight), 2 * weight.shape[1]))
        whole = NVFP4QTensor(shape, torch.float32, weight)
        size = shape[1] // scale.shape[1]
        read = whole.dequantize(scale=scale, double_scale=parts["weight_scale_2"], block_sizes={-1: size})
    else:
        return None
    return read if smoothing is None else read * smoothing.float()


# --- AutoRound, which exports the layouts of AutoGPTQ, AutoAWQ, llama.cpp and its own


def autoround(form: str, scheme: str, source: Path, target: Path, **options: Any) -> Tensors:
    """Quantize by rounding to the nearest, and export; the library leaves the rounded weights in the model."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    quantizer = AutoRound(
        _model(source), tokenizer, scheme=scheme, iters=0, nsamples=8, seqlen=64, disable_opt_rtn=True,
        dataset=_tokens(source), **options
    )  # fmt: skip
    quantizer.quantize_and_save(output_dir=str(target / "own"), format=form)
    (folder,) = {file.parent for pattern in ("*.safetensors", "*.gguf") for file in target.rglob(pattern)}
    for file in folder.iterdir():
        file.rename(target / file.name)
    shutil.rmtree(target / "own")
    return {}


# --- bitsandbytes and torchao, by transformers


def bitsandbytes(source: Path, target: Path, **options: Any) -> Tensors:
    """Quantize with bitsandbytes as transformers does, and save it."""
    from transformers import AutoTokenizer, BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    model = _model(source, quantization_config=config(**options), device_map={"": "cpu"})
    model.save_pretrained(target)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    import bitsandbytes.functional as bnb

    found = {}
    for layer in LAYERS:
        weight: Any = model.get_submodule(layer).weight
        if "load_in_8bit" in options:
            parts = _parts(_stored(target), layer)
            found[layer] = bnb.int8_vectorwise_dequant(parts["weight"], parts["SCB"]).float()
        else:
            found[layer] = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    return found


def torchao(source: Path, target: Path, config: Callable[[], Any]) -> Tensors:
    """Quantize with torchao as transformers does, and save it."""
    from transformers import AutoTokenizer, TorchAoConfig

    # torchao's readers return the dtype of the model, and a float32 shows every bit of theirs
    model = _model(source, torch.float32, quantization_config=TorchAoConfig(config()))
    model.save_pretrained(target)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    found = {}
    for layer in LAYERS:
        weight: Any = model.get_submodule(layer).weight
        found[layer] = weight.dequantize().float()
    return found


def _ao(name: str, **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        import torchao.quantization as ao

        given = dict(options)
        if "group" in given:
            given["granularity"] = ao.PerGroup(given.pop("group")) if given["group"] else ao.PerAxis(0)
        if "mapping" in given:
            given["mapping_type"] = getattr(ao.MappingType, given.pop("mapping"))
        return getattr(ao, name)(**given)

    return config


# --- optimum-quanto and HQQ, by their own savers


def quanto(weights: str, source: Path, target: Path) -> Tensors:
    """Quantize with optimum-quanto, and save as its own class does."""
    from optimum.quanto import QuantizedModelForCausalLM
    from transformers import AutoTokenizer

    model = _model(source, torch.float32)
    QuantizedModelForCausalLM.quantize(model, weights=weights, exclude="lm_head").save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    found = {}
    for layer in LAYERS:
        weight: Any = model.get_submodule(layer).weight
        found[layer] = weight.dequantize().float()
    return found


def hqq(bits: int, source: Path, target: Path) -> Tensors:
    """Quantize with HQQ, and save as its own class does for safetensors."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoTokenizer

    model = _model(source, torch.float32)
    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    AutoHQQHFModel.save_to_safetensors(model, f"{target}/")
    shutil.copy(source / "generation_config.json", target)  # which HQQ leaves to the user, as the tokenizer
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    found = {}
    for layer in LAYERS:
        module: Any = model.get_submodule(layer)
        found[layer] = module.dequantize().float()
    return found


# --- GGUF, by the package gguf


def llama_cpp_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Any, bool]]:
    """Yield a Llama's tensors: its layer, llama.cpp's name, its values in float32 as numpy's, and if it is permuted."""
    import numpy as np
    from gguf.constants import MODEL_ARCH
    from gguf.tensor_mapping import get_tensor_name_map

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        (layer, _, part), values = name.rpartition("."), tensor.float()
        count = heads.get(layer.rpartition(".")[2])
        if count:  # llama.cpp's rotary kernel takes the two halves of a head interleaved
            values = values.reshape(count, 2, len(values) // count // 2, -1).transpose(1, 2).reshape(values.shape)
        yield layer, f"{names.get_name(layer)}.{part}", np.ascontiguousarray(values.numpy()), bool(count)


def gguf(kind: str, source: Path, target: Path) -> Tensors:
    """Write every matrix in one type, as llama.cpp's converter names and orders them; gguf reads them."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import dequantize, quantize

    config, quantization = json.loads((source / "config.json").read_text()), GGMLQuantizationType[kind]
    target.mkdir()
    writer = GGUFWriter(target / "model.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    read = {}
    for layer, to, array, permuted in llama_cpp_tensors(config, load_file(source / "model.safetensors")):
        if array.ndim == 1 or not layer.endswith("_proj"):
            writer.add_tensor(to, array)
            continue
        packed = _k_quants(torch.from_numpy(array), kind) if kind.endswith("_K") else quantize(array, quantization)
        writer.add_tensor(to, packed, raw_dtype=quantization)
        if not permuted:
            read[layer] = torch.from_numpy(dequantize(packed, quantization).astype(np.float32).reshape(array.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {layer: read[layer] for layer in LAYERS if layer in read}


def _k_quants(values: Tensor, kind: str) -> Any:
    """Quantize to llama.cpp's K-quants as AutoRound exports them; the package gguf only reads these."""
    from auto_round.export.export_to_gguf.packing import ggml_quant

    # AutoRound 0.16 takes llama.cpp's own search for a block's scale, `original`, for a wrong shape in Q6_K
    weights = torch.ones(values.shape[1]) if kind == "Q6_K" else None
    return ggml_quant(values, kind.lower(), device="cpu", original=weights is None, imatrix=weights)


def _int4(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: _ao(name, weight_dtype=getattr(torch, "int4"), **options)()  # noqa: B009 mypy's torch has no int4


CT, MODELOPT, ROUND = ("llmcompressor",), ("nvidia-modelopt",), ("auto-round",)
PRESETS = (
    "W8A8", "W8A16", "W4A16", "W4A16_ASYM", "W3A16", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4",
    "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16",
)  # fmt: skip
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
CONFIGS = (
    "FP8_DEFAULT", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_2D_BLOCKWISE_WEIGHT_ONLY", "NVFP4_DEFAULT", "W4A16_NVFP4",
    "NVFP4_AWQ_LITE", "NVFP4_SVDQUANT_DEFAULT", "W4A8_NVFP4_FP8", "MXFP8_DEFAULT", "INT4_AWQ", "W4A8_AWQ_BETA",
    "INT8_SMOOTHQUANT", "INT8_WEIGHT_ONLY",
)  # fmt: skip
AUTO_ROUND: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gptq by auto-round": ("auto_gptq", "W4A16", {}),
    "gptq asym by auto-round": ("auto_gptq", "W4A16", {"sym": False}),
    "gptq 8 bits by auto-round": ("auto_gptq", "W8A16", {}),
    "gptq 3 bits by auto-round": ("auto_gptq", "W3A16", {}),
    "awq by auto-round": ("auto_awq", "W4A16", {"sym": False}),
    "auto-round": ("auto_round", "W4A16", {}),
    "auto-round asym": ("auto_round", "W4A16", {"sym": False}),
    "auto-round 2 bits": ("auto_round", "W2A16", {}),
    "auto-round FP8 block": ("auto_round:fp8", "FP8_BLOCK", {}),
    "auto-round NVFP4": ("auto_round", "NVFP4", {}),
    "auto-round MXFP4": ("auto_round", "MXFP4", {}),
}
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "bnb int8": {"load_in_8bit": True},
    "bnb nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bnb nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bnb fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
TORCHAO = {
    "torchao int8wo": _ao("Int8WeightOnlyConfig", version=2),
    "torchao int8dyn": _ao("Int8DynamicActivationInt8WeightConfig", version=2),
    "torchao intx4": _int4("IntxWeightOnlyConfig", group=64),
    "torchao intx4 asym": _int4("IntxWeightOnlyConfig", group=64, mapping="ASYMMETRIC"),
    "torchao 8da4w": _int4("Int8DynamicActivationIntxWeightConfig"),
    "torchao fp8wo": _ao("Float8WeightOnlyConfig"),
    "torchao fp8dyn": _ao("Float8DynamicActivationFloat8WeightConfig"),
    "torchao int4wo": _ao("Int4WeightOnlyConfig"),
}
BY_HAND: dict[str, tuple[Callable[[Tensor], Packed], dict[str, Any]]] = {
    "gptq v2": (partial(gptq, v2=True), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "gptq asym": (partial(gptq, symmetric=False), {**GPTQ, "sym": False}),
    "gptq desc_act": (partial(gptq, order=True), {**GPTQ, "desc_act": True}),
    "awq gemm": (awq, AWQ),
    "awq gemv": (partial(awq, gemv=True), {**AWQ, "version": "gemv"}),
    "fp8 blocks": (fp8_blocks, FP8_BLOCKS),
    "fp8 blocks ue8m0": (partial(fp8_blocks, part="scale", powers=True), {**FP8_BLOCKS, "scale_fmt": "ue8m0"}),
    "fp8 tensor": (fp8_tensor, FP8_TENSOR),
}
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
QUANTO = ("qint8", "qint4", "qint2", "qfloat8")


def _recipes() -> Iterator[Recipe]:
    yield from (Recipe(f"ct {preset}", "library", partial(compressor, preset), CT) for preset in PRESETS)
    yield Recipe("ct FP8 + kv", "library", partial(compressor, "FP8", kv_cache_scheme=KV_CACHE), CT)
    for preset in ("W4A16", "FP8_BLOCK"):
        yield Recipe(f"ct {preset} of experts", "library", partial(compressor, preset), CT, "moe")
    yield from (Recipe(f"modelopt {name}", "library", partial(modelopt, f"{name}_CFG"), MODELOPT) for name in CONFIGS)
    for name, (form, scheme, options) in AUTO_ROUND.items():
        yield Recipe(name, "library", partial(autoround, form, scheme, **options), ROUND)
    yield from (Recipe(f"gguf {kind}", "converter", partial(gguf, kind), ROUND) for kind in K_QUANTS)
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"):
        yield Recipe(f"gguf {kind}", "converter", partial(gguf, kind))
    yield from (Recipe(f"quanto {kind}", "library", partial(quanto, kind), ("optimum-quanto",)) for kind in QUANTO)
    yield from (Recipe(f"hqq {bits} bits", "library", partial(hqq, bits), ("hqq",)) for bits in (8, 4, 3, 2))
    yield from (Recipe(name, "library", partial(bitsandbytes, **given)) for name, given in BITSANDBYTES.items())
    yield from (Recipe(name, "library", partial(torchao, config=config)) for name, config in TORCHAO.items())
    for name, (pack, declared) in BY_HAND.items():
        yield Recipe(name, "by hand", partial(by_hand, pack, declared))
    yield Recipe("mxfp4 gpt-oss", "by hand", gpt_oss, source="gpt-oss")


RECIPES = {recipe.name: recipe for recipe in _recipes()}


def main(name: str, source: Path, target: Path) -> None:
    """Make one checkpoint and what its library reads from it."""
    torch.manual_seed(0)
    read = {layer: value for layer, value in RECIPES[name].make(source, target).items() if layer.startswith(BLOCK)}
    if read:
        (target / "dequantized").mkdir()
        tensors = {f"{layer}.weight": value.contiguous() for layer, value in read.items()}
        save_file(tensors, target / "dequantized" / "model.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

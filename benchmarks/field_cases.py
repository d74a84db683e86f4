"""The checkpoints of `field.py`: broken as public reports tell, or healthy as other programs write them.

Each is a copy of SmolLM2-135M in int8, or a small random model. Nothing is downloaded: `make demo` leaves SmolLM2.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from formats_by_hand import GPTQ, NVFP4, by_hand, gptq, nvfp4, save_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]
DEMO = Path(__file__).parent.parent / ".demo"
SMOLLM2, INT8 = DEMO / "smollm2", DEMO / "smollm2-int8"
ONE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BLOCKS, HEAD = 30, 64
"""The blocks of SmolLM2-135M, and the numbers of an attention head."""


@dataclass(frozen=True)
class Pair:
    """A checkpoint and its original. `suite`: the name of the suite that is drafted for the sound `healthy`.

    `files`: the suite of files and weights, for a format that no library here loads. `ranks`: those of its server.
    """

    model: Path
    reference: Path = SMOLLM2
    healthy: Path = INT8
    suite: str = "smollm2"
    ranks: int = 1


@dataclass(frozen=True)
class Case:
    """A checkpoint of one report, or a healthy one.

    `row`: the name of its report in `REPORTS`, of a healthy one what it is. `place` and `cause`: regexes of the layer,
    kind or file, and of what was done to it, as the first line of a failure says them; a healthy one has neither.
    """

    make: Callable[[Path], Pair]
    row: str
    place: str = ""
    cause: str = ""


CASES: dict[str, Case] = {}
"""The cases by their names."""
HEALTHY: dict[str, Case] = {}
"""Checkpoints that are sound, by their names."""
REPORTS = {
    "rope": (
        "the base of the rope is stated where the reader doesn't look",
        "vllm#42624, #44158; marin#7156; MarinFold#184",
    ),
    "absent": (
        "the norms' epsilon isn't written, the reader's own counts",
        "meta-llama/llama#771; foundation-model-stack#99; FastDeploy#2790; llama.cpp#28989",
    ),
    "truncation": (
        "truncation or padding of calibration saved in tokenizer.json",
        "llm-compressor#2917, #1418; dynamo#11792",
    ),
    "stop": ("the stop token is stale or lost", "mlx-vlm#2112; colibri#1478; mlx-lm#1414"),
    "duplicate": ("a tensor in two shards, one of them stale", "vllm#54230; qwen38-27b-rtx3090#123; colibri#1479"),
    "leftover": ("an old model.safetensors beside the shards", "mlx-vlm#1464, #1329; unsloth-zoo#808; mflux#603"),
    "rope-rows": (
        "rows of q and k in the rope's other layout",
        "AiDotNet#2074; nurl#584; vllm-metal#480; transformers#31788",
    ),
    "heads": ("KV heads in another order in one layer", "ChatLearn#277; Pai-Megatron-Patch#204; NeMo-RL#2802"),
    "offset": ("the offset of a pipeline's stage lost: layers repeat others", "transformers#24381"),
    "adapter": (
        "an adapter merged with alpha in the place of alpha / r",
        "mlx-vlm#841; TensorRT-LLM#1668; FastVideo#870; aprender#2189",
    ),
    "float16": (
        "the configuration says float16, in which bfloat16's numbers overflow",
        "transformers#39972, #39686; vllm#48231",
    ),
    "kv": ("KV scales all 1.0 or lost", "Model-Optimizer#20; ROCm/vllm#317; sglang#20705"),
    "mtp": ("the head of several tokens dropped", "vllm#35548; Model-Optimizer#2427; auto-round#1526"),
    "gone": ("shards never written: layers, norms or the head gone", "AReaL#1403"),
    "added": ("the rows of added tokens lost in a merged export", "unsloth#3416; mergekit#425"),
    "head": ("a tied head written in codes", "aprender#234; auto-round#1040; llm-compressor#2835; AutoAWQ#665"),
    "tie": ("the tie's key missing or wrong", "mlx-examples#566"),
    "regex": ("another regex before the tokenizer's merges", "unsloth#4996; transformers#42131"),
    "bpe": ("another flag of the tokenizer's merges", "family of transformers#42131"),
    "bos": ("the beginning of a sequence twice", "open-r1#462; sglang#888; unsloth#10312"),
    "shard": ("a shard missing or cut short", "sglang#32279"),
    "embedding": ("the embedding multiplied by the root of its size", "family of mlx-lm#28"),
    "experts": ("experts sorted as text", "torchtitan#1918"),
    "router": ("a setting of the router left out or changed", "sglang#8333, #8511"),
    "biases": ("the biases of q, k and v lost or 0", "ANEForge#253; OminiX-MLX#7; SwissArmyTransformer#135"),
    "windows": ("windows, soft caps and multipliers left out", "sglang#4823; cascadia#151; vllm#5908"),
    "fnuz": ("FP8 of one kind read as the other: all weights × 2", "vllm#7210; uccl#804; DeepEP#17"),
    "exchanged": ("gate and up exchanged in every layer", "tt-metal#52818"),
    "global": (
        "second-level scales of NVFP4 that differ between gate and up, or q, k and v",
        "vllm#54150, #54974; TensorRT-LLM#14199; Model-Optimizer#1411",
    ),
    "unwritten": (
        "second-level scales of NVFP4, of weights or of inputs, that were never written",
        "vllm#54444, #45212; transformers#48371",
    ),
    "zero": ("zero points of GPTQ's first version, read as the second's", "vllm#38966, #26343, #26092"),
    "ranks": ("a quantization group that tensor parallelism cuts", "vllm#34476, #41511, #45200; auto-round#643"),
    "scheme": ("the declared scheme isn't that of the tensors", "family of llm-compressor#2641"),
}
"""What happened in the field, and where it was told."""


def case(row: str, place: str, cause: str) -> Callable[[Callable[[Path], Pair]], None]:
    """Register what makes a broken checkpoint in a folder of its own."""

    def add(make: Callable[[Path], Pair]) -> None:
        CASES[make.__name__] = Case(make, row, place, cause)

    return add


def healthy(row: str) -> Callable[[Callable[[Path], Pair]], None]:
    """Register what makes a sound checkpoint in a folder of its own."""

    def add(make: Callable[[Path], Pair]) -> None:
        HEALTHY[make.__name__] = Case(make, row)

    return add


# --- folders


def copied(source: Path, folder: Path) -> Path:
    """Make a folder of links to a checkpoint's files."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        os.symlink(file.resolve(), folder / file.name)
    return folder


def wrote(file: Path, content: object) -> None:
    """Write text, or what JSON says of an object, in the place of a link."""
    file.unlink(missing_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read(file: Path) -> Any:
    """Read a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def edited_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; `...` leaves one out, and a function makes the new value of the old one."""
    content = read(file)
    for key, value in changes.items():
        content[key] = value(content.get(key)) if callable(value) else value
    wrote(file, {key: value for key, value in content.items() if value is not ...})


def saved(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to a file in the place of a link."""
    file.unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edited(source: Path, folder: Path, change: Change | None = None, **config: Any) -> Path:
    """Make a copy whose tensors a function changes, and whose configuration has other keys."""
    copied(source, folder)
    if change:
        tensors = load_file(folder / ONE)
        change(tensors)
        saved(tensors, folder / ONE)
    edited_json(folder / CONFIG, **config)
    return folder


def of_int8(folder: Path, change: Change | None = None, **config: Any) -> Pair:
    """Return a changed copy of the int8 checkpoint beside the original."""
    return Pair(edited(INT8, folder / "model", change, **config))


def with_json(folder: Path, file: str, **changes: Any) -> Pair:
    """Return a copy of the int8 checkpoint that has other keys in a JSON file."""
    pair = of_int8(folder)
    edited_json(pair.model / file, **changes)
    return pair


def sharded(source: Path, folder: Path, second: Mapping[int, Tensors] | None = None, count: int = 2) -> Path:
    """Make a copy in shards with an index. `second`: number of a shard → tensors that it holds besides its own."""
    copied(source, folder)
    tensors = load_file(folder / ONE)
    (folder / ONE).unlink()
    names = sorted(tensors)
    homes: dict[str, str] = {}
    size = -(-len(names) // count)
    for number in range(1, count + 1):
        part = names[(number - 1) * size : number * size]
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        homes |= dict.fromkeys(part, file)
        saved({name: tensors[name] for name in part} | dict((second or {}).get(number, {})), folder / file)
    wrote(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": homes})
    return folder


def rounded(weight: Tensor, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Round to int8 with a bfloat16 scale for each row, as the demo's checkpoint was made."""
    scale = (weight.float().abs().amax(1, keepdim=True) * clip / 127.5).clamp(min=1e-8).bfloat16()
    return (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8), scale


def codes(tensors: Tensors) -> list[str]:
    """Return the names of the weights in codes."""
    return [name for name in tensors if f"{name}_scale" in tensors]


def scaled(kinds: str, factor: float, *blocks: int) -> Tensors:
    """Return scales of the int8 checkpoint, of one kind of layer in some blocks, × a factor."""
    tensors = load_file(INT8 / ONE)
    names = [f"model.layers.{block}.{kinds}.weight_scale" for block in blocks]
    return {name: tensors[name] * factor for name in names}


# --- settings


@case("rope", r"config\.json|rope", "rope_theta.*10000|rope_parameters")
def rope_base_written(folder: Path) -> Pair:
    return of_int8(folder, rope_parameters=..., rope_theta=10000.0, rope_scaling=None)


@case("rope", r"config\.json|rope", "rope_theta.*10000|rope_parameters")
def rope_base_absent(folder: Path) -> Pair:
    return of_int8(folder, rope_parameters=...)


@case("absent", r"config\.json", "rms_norm_eps")
def epsilon_absent(folder: Path) -> Pair:
    return of_int8(folder, rms_norm_eps=...)


@case("tie", r"config\.json|lm_head", "tie_word_embeddings")
def tie_absent(folder: Path) -> Pair:
    return of_int8(folder, tie_word_embeddings=...)


@case("tie", "lm_head", "tie_word_embeddings|in the reference")
def untied_with_a_random_head(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        table = tensors["model.embed_tokens.weight"]
        chance = torch.Generator().manual_seed(3)
        tensors["lm_head.weight"] = (torch.randn(table.shape, generator=chance) * 0.02).bfloat16()

    return of_int8(folder, change, tie_word_embeddings=False)


def _windows(folder: Path, **settings: Any) -> Pair:
    """Return a pair of which the original alone states some settings."""
    return Pair(copied(INT8, folder / "model"), edited(SMOLLM2, folder / "reference", **settings))


@case("windows", r"config\.json", "multiplier|logits_scaling")
def multipliers_absent(folder: Path) -> Pair:
    return _windows(
        folder, attention_multiplier=0.0156, residual_multiplier=0.22, logits_scaling=8.0, embedding_multiplier=12.0
    )


@case("windows", r"config\.json", "partial_rotary_factor")
def partial_rotation_absent(folder: Path) -> Pair:
    return _windows(folder, partial_rotary_factor=0.5)


@case("windows", r"config\.json", "layer_types|use_sliding_window")
def layer_types_absent(folder: Path) -> Pair:
    return _windows(folder, layer_types=["sliding_attention"] * 29 + ["full_attention"], use_sliding_window=True)


@case("windows", r"config\.json", "softcapping|routed_scaling|n_group|norm_topk")
def caps_absent(folder: Path) -> Pair:
    return _windows(folder, attn_logit_softcapping=50.0, routed_scaling_factor=2.5, norm_topk_prob=True, n_group=8)


@case("windows", r"config\.json", "head_dim")
def head_size_changed(folder: Path) -> Pair:
    return of_int8(folder, head_dim=32)


def _scheme(folder: Path, part: str, **changes: Any) -> Pair:
    pair = of_int8(folder)
    config = read(pair.model / CONFIG)
    group = config["quantization_config"]["config_groups"]["group_0"]
    group[part] = {**group[part], **changes} if changes else None
    wrote(pair.model / CONFIG, config)
    return pair


@case("scheme", "_proj|config", "tensor|shape|scale")
def strategy_of_another_scheme(folder: Path) -> Pair:
    return _scheme(folder, "weights", strategy="tensor")


# --- tokenizer and generation


@case("truncation", "tokenizer", "truncation")
def truncation_saved(folder: Path) -> Pair:
    cut = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    return with_json(folder, "tokenizer.json", truncation=cut)


@case("truncation", "tokenizer", "padding")
def padding_saved(folder: Path) -> Pair:
    fill = {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2}
    return with_json(folder, "tokenizer.json", padding=fill | {"pad_type_id": 0, "pad_token": "<|im_end|>"})


@case("stop", r"generation_config\.json", "eos_token_id")
def stop_token_stale(folder: Path) -> Pair:
    return with_json(folder, "generation_config.json", eos_token_id=0)


@case("stop", r"config\.json", "eos_token_id")
def stop_token_absent(folder: Path) -> Pair:
    pair = of_int8(folder, eos_token_id=...)
    edited_json(pair.model / "generation_config.json", eos_token_id=...)
    return pair


@case("stop", r"generation_config\.json", "eos_token_id|not there|gone|missing|is there")
def generation_config_gone(folder: Path) -> Pair:
    pair = of_int8(folder)
    (pair.model / "generation_config.json").unlink()
    return pair


@case("regex", "tokenizer", "pre_tokenizer.*[Rr]egex|[Rr]egex|pattern")
def pre_tokenizer_changed(folder: Path) -> Pair:
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, level]}
    return with_json(folder, "tokenizer.json", pre_tokenizer=steps)


@case("bpe", "tokenizer", "ignore_merges")
def merges_ignored(folder: Path) -> Pair:
    return with_json(folder, "tokenizer.json", model=lambda model: {**model, "ignore_merges": True})


@case("bpe", "tokenizer", "byte_fallback")
def bytes_fall_back(folder: Path) -> Pair:
    return with_json(folder, "tokenizer.json", model=lambda model: {**model, "byte_fallback": True})


@case("bos", "tokenizer", "post_processor")
def beginning_twice(folder: Path) -> Pair:
    token = "<|im_start|>"
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    steps: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
    }
    steps["special_tokens"] = {token: {"id": token, "ids": [1], "tokens": [token]}}
    return with_json(folder, "tokenizer.json", post_processor=steps)


@case("added", "embed|vocab|added", "vocab_size|49156|4 .*rows|no row")
def added_tokens_lost(folder: Path) -> Pair:
    names = [f"<|tool_{number}|>" for number in range(4)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

    def grown(tensors: Tensors) -> None:
        table = tensors["model.embed_tokens.weight"]
        chance = torch.Generator().manual_seed(1)
        rows = torch.randn(4, table.shape[1], generator=chance) * table.float().std()
        tensors["model.embed_tokens.weight"] = torch.cat([table, rows.bfloat16()])

    pair = Pair(copied(INT8, folder / "model"), edited(SMOLLM2, folder / "reference", grown, vocab_size=49156))
    for each in (pair.model, pair.reference):
        more = [{"id": 49152 + number, "content": name, **flags} for number, name in enumerate(names)]
        edited_json(each / "tokenizer.json", added_tokens=lambda old, more=more: [*old, *more])
    return pair


# --- which bytes count


@case("duplicate", r"layers\.15\.mlp\.down_proj", "two|both|also|second")
def stale_copy_in_the_later_shard(folder: Path) -> Pair:
    return Pair(sharded(INT8, folder / "model", {2: scaled("mlp.down_proj", 4, 15)}))


@case("duplicate", r"layers\.7\.mlp\.down_proj", "two|both|also|second")
def stale_copy_in_the_earlier_shard(folder: Path) -> Pair:
    return Pair(sharded(INT8, folder / "model", {1: scaled("mlp.down_proj", 4, 7)}))


@case("leftover", r"model\.safetensors", "index|shards|reads?")
def leftover_is_stale(folder: Path) -> Pair:
    model = sharded(INT8, folder / "model")
    saved(load_file(INT8 / ONE) | scaled("self_attn.o_proj", 3, 5, 12, 20), model / ONE)
    return Pair(model)


@case("leftover", r"model\.safetensors", "index|shards|reads?")
def leftover_hides_stale_shards(folder: Path) -> Pair:
    stale = edited(INT8, folder / "stale", lambda tensors: tensors.update(scaled("mlp.down_proj", 8, 5, 12, 20)))
    model = sharded(stale, folder / "model")
    os.symlink((INT8 / ONE).resolve(), model / ONE)
    return Pair(model)


@case("shard", "model-00002-of-00003", "isn't there|is not there|missing|absent")
def shard_missing(folder: Path) -> Pair:
    model = sharded(INT8, folder / "model", count=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    return Pair(model)


@case("shard", "model-00002-of-00003", "bytes|short|truncated|ends")
def shard_cut_short(folder: Path) -> Pair:
    model = sharded(INT8, folder / "model", count=3)
    file = model / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 300_000)
    return Pair(model)


# --- rows, heads and layers in another order, or of another size


def _reordered(tensors: Tensors, kinds: str, order: Callable[[Tensor], Tensor], blocks: range = range(BLOCKS)) -> None:
    for block, kind in itertools.product(blocks, kinds.split()):
        for part in ("weight", "weight_scale"):
            name = f"model.layers.{block}.{kind}.{part}"
            tensors[name] = order(tensors[name])


def _interleaved(rows: Tensor) -> Tensor:
    return rows.view(-1, 2, HEAD // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


@case("rope-rows", "30 of 30 [qk]_proj.*30 of 30 [qk]_proj", "interleaved")
def interleaved_rows(folder: Path) -> Pair:
    return of_int8(folder, lambda tensors: _reordered(tensors, "self_attn.q_proj self_attn.k_proj", _interleaved))


@case("rope-rows", "30 of 30 [qk]_proj.*30 of 30 [qk]_proj", "interleaved")
def interleaved_rows_but_not_their_scales(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        for name in codes(tensors):
            if ".q_proj." in name or ".k_proj." in name:
                tensors[name] = _interleaved(tensors[name])

    return of_int8(folder, change)


@case("rope-rows", "30 of 30 k_proj", "heads of 192 rows")
def rows_of_another_count_of_heads(folder: Path) -> Pair:
    def order(rows: Tensor) -> Tensor:
        return _interleaved(rows).view(1, 96, 2, -1).transpose(1, 2).reshape(rows.shape)

    return of_int8(folder, lambda tensors: _reordered(tensors, "self_attn.k_proj", order))


@case("heads", r"layers\.11\.self_attn\.[kv]_proj|layer 11", "heads")
def kv_heads_rolled(folder: Path) -> Pair:
    def order(rows: Tensor) -> Tensor:
        return rows.view(3, HEAD, -1).roll(-1, 0).reshape(rows.shape)

    kinds = "self_attn.k_proj self_attn.v_proj"
    return of_int8(folder, lambda tensors: _reordered(tensors, kinds, order, range(11, 12)))


@case("offset", "layers 15 to 29", "repeat")
def stage_repeated(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            for block in range(15):
                if name.startswith(f"model.layers.{block}."):
                    tensors[name.replace(f".{block}.", f".{block + 15}.", 1)] = tensors[name].clone()

    return of_int8(folder, change)


@case("exchanged", "30 of 30 (gate|up)_proj.*30 of 30 (gate|up)_proj|60 of", "exchanged|other one")
def gate_and_up_exchanged(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        for block, part in itertools.product(range(BLOCKS), ("weight", "weight_scale")):
            gate, up = (f"model.layers.{block}.mlp.{kind}_proj.{part}" for kind in ("gate", "up"))
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    return of_int8(folder, change)


@case("fnuz", "all 210", "× ?2|2 ?×|factor")
def every_weight_doubled(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        for name in codes(tensors):
            tensors[f"{name}_scale"] *= 2

    return of_int8(folder, change)


@case("embedding", "embed_tokens", "24")
def embedding_scaled(folder: Path) -> Pair:
    return of_int8(folder, lambda tensors: tensors["model.embed_tokens.weight"].mul_(24))


def _merged(folder: Path, name: str, factor: float) -> Path:
    """Make the original with an adapter of rank 8 merged into q and v, × a factor."""

    def change(tensors: Tensors) -> None:
        chance = torch.Generator().manual_seed(8)
        for block, kind in itertools.product(range(BLOCKS), "qv"):
            weight = tensors[f"model.layers.{block}.self_attn.{kind}_proj.weight"]
            up, down = (torch.randn(shape, generator=chance) for shape in ((len(weight), 8), (8, weight.shape[1])))
            delta = (up @ down) * (0.01 * weight.float().std() / 8**0.5)
            weight += (factor * delta).to(weight.dtype)

    return edited(SMOLLM2, folder / name, change)


def _requantized(source: Path, folder: Path, clip: float = 1.0) -> Path:
    """Make the int8 checkpoint of another original."""
    original = load_file(source / ONE)

    def change(tensors: Tensors) -> None:
        for name in codes(tensors):
            tensors[name], tensors[f"{name}_scale"] = rounded(original[name], clip)

    return edited(INT8, folder, change)


@case("adapter", "30 of 30 q_proj.*30 of 30 v_proj", "rank|adapter")
def adapter_merged_with_alpha(folder: Path) -> Pair:
    wrong = _requantized(_merged(folder, "wrong", 16), folder / "model")
    return Pair(wrong, _merged(folder, "reference", 2))


def _outsized(tensors: Tensors) -> None:
    """Make one block's up projection large and its down projection small, so that the function stays."""
    scale = "_scale" if "model.layers.20.mlp.up_proj.weight_scale" in tensors else ""
    tensors[f"model.layers.20.mlp.up_proj.weight{scale}"] *= 4096
    tensors[f"model.layers.20.mlp.down_proj.weight{scale}"] /= 4096


@case("float16", r"layers\.20\b", "float16|NaN|Inf|overflow")
def float16_declared(folder: Path) -> Pair:
    return Pair(
        edited(INT8, folder / "model", _outsized, dtype="float16"), edited(SMOLLM2, folder / "reference", _outsized)
    )


# --- scales of a cache, and parts that are gone

KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def _with_kv_scales(folder: Path, scale: Callable[[int, str], float | None]) -> Pair:
    def change(tensors: Tensors) -> None:
        for block, kind in itertools.product(range(BLOCKS), "kv"):
            value = scale(block, kind)
            if value is not None:
                tensors[f"model.layers.{block}.self_attn.{kind}_scale"] = torch.tensor([value]).bfloat16()

    return of_int8(folder, change, quantization_config=lambda old: {**old, "kv_cache_scheme": KV_SCHEME})


def _usual(block: int, kind: str) -> float:
    return 0.05 + 0.002 * (block * 7 % 11)


@case("kv", "60 |all|self_attn", "1.0|initial|no data")
def kv_scales_one(folder: Path) -> Pair:
    return _with_kv_scales(folder, lambda block, kind: 1.0)


@case("kv", "k_scale|KV|self_attn", "declares|1.0")
def kv_scales_lost(folder: Path) -> Pair:
    return _with_kv_scales(folder, lambda block, kind: None)


@case("kv", r"layers\.9\.self_attn", "v_scale")
def kv_scale_of_one_layer_lost(folder: Path) -> Pair:
    return _with_kv_scales(folder, lambda block, kind: None if (block, kind) == (9, "v") else _usual(block, kind))


def _more_tokens(tensors: Tensors) -> None:
    chance = torch.Generator().manual_seed(0)
    shapes = {"fc": (576, 1152), "layers.0.self_attn.q_proj": (576, 576), "layers.0.mlp.down_proj": (576, 1536)}
    for name, shape in shapes.items():
        tensors[f"mtp.{name}.weight"] = (torch.randn(shape, generator=chance) * 0.02).bfloat16()
    tensors["mtp.norm.weight"] = torch.ones(576).bfloat16()


def _of_more_tokens(folder: Path, change: Change | None = None, **config: Any) -> Pair:
    reference = edited(SMOLLM2, folder / "reference", _more_tokens, num_nextn_predict_layers=1)
    return Pair(edited(INT8, folder / "model", change, **config), reference)


@case("mtp", "mtp", "gone|lost|not there|lacks")
def mtp_lost(folder: Path) -> Pair:
    return _of_more_tokens(folder)


@case("mtp", "mtp", "gone|lost|not there|lacks")
def mtp_lost_but_promised(folder: Path) -> Pair:
    return _of_more_tokens(folder, num_nextn_predict_layers=1)


@case("mtp", r"mtp\.layers\.0", "quantized|ignore")
def mtp_quantized_by_mistake(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        _more_tokens(tensors)
        for name in [name for name in tensors if name.startswith("mtp.layers")]:
            tensors[name], tensors[f"{name}_scale"] = rounded(tensors[name])

    def ignoring(old: dict[str, Any]) -> dict[str, Any]:
        return {**old, "ignore": [*old["ignore"], "re:^mtp.*"]}

    return _of_more_tokens(folder, change, num_nextn_predict_layers=1, quantization_config=ignoring)


def _without(prefixes: tuple[str, ...]) -> Change:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(prefixes)]:
            del tensors[name]

    return change


@case("gone", r"model\.norm", "gone|lost|not there|lacks")
def final_norm_gone(folder: Path) -> Pair:
    return of_int8(folder, _without(("model.norm.",)))


@case("gone", r"layers\.2[89]|28|29", "gone|lost|blocks|missing|lacks")
def last_layers_gone(folder: Path) -> Pair:
    return of_int8(folder, _without(("model.layers.28.", "model.layers.29.")))


@case("gone", r"num_hidden_layers|layers\.2[89]", "28|gone|lost")
def last_layers_gone_and_not_counted(folder: Path) -> Pair:
    return of_int8(folder, _without(("model.layers.28.", "model.layers.29.")), num_hidden_layers=28)


@case("head", "lm_head", "tied|ignore|quantized")
def tied_head_in_codes(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        head = rounded(tensors["model.embed_tokens.weight"])
        tensors["lm_head.weight"], tensors["lm_head.weight_scale"] = head

    return of_int8(folder, change)


# --- small random models

SMALL = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def _random(folder: Path, model_type: str, **settings: Any) -> Path:
    """Save a random model in bfloat16, with SmolLM2's tokenizer and with biases and norms as trained ones differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**SMALL, "tie_word_embeddings": True, "dtype": "bfloat16", **settings}
    config = AutoConfig.for_model(model_type, **settings)
    model: Any = AutoModelForCausalLM
    model = model.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 2.0)
            elif "norm" in name:
                weight.uniform_(0.8, 1.2)
            else:
                weight.mul_(4)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        os.symlink((SMOLLM2 / name).resolve(), folder / name)
    return folder


def _in_int8(source: Path, folder: Path, change: Change | None = None) -> Path:
    """Make a small model's int8 checkpoint."""

    def quantized(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale"] = rounded(tensors[name])
        if change:
            change(tensors)

    return edited(source, folder, quantized, quantization_config=read(INT8 / CONFIG)["quantization_config"])


def _with_biases(folder: Path, change: Change | None = None) -> Pair:
    source = _random(folder / "reference", "qwen2")
    sound = _in_int8(source, folder / "healthy")
    return Pair(_in_int8(source, folder / "model", change), source, sound, "qwen2")


@case("biases", r"[qkv]_proj", "gone|lost|lacks|not there|bias")
def biases_lost(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("bias")]:
            del tensors[name]

    return _with_biases(folder, change)


@case("biases", r"[qkv]_proj", "zero|0")
def biases_zero(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("bias")]:
            tensors[name].zero_()

    return _with_biases(folder, change)


MOE = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


def _of_experts(folder: Path, change: Change | None = None, **config: Any) -> Pair:
    """Return a mixture of experts in 16 bits: the installed transformers loads no codes of single experts."""
    source = _random(folder / "reference", "qwen3_moe", norm_topk_prob=True, **MOE)
    return Pair(edited(source, folder / "model", change, **config), source, source, "qwen3_moe")


def _as_text(tensors: Tensors) -> None:
    order = sorted(range(12), key=str)
    old = dict(tensors)
    for name in old:
        before, inside, after = name.partition(".experts.")
        if inside:
            number, _, rest = after.partition(".")
            tensors[name] = old[f"{before}.experts.{order[int(number)]}.{rest}"]


@case("experts", r"layers|experts", r"expert \d+ is the reference's expert|order of .*text")
def experts_as_text(folder: Path) -> Pair:
    return _of_experts(folder, _as_text)


@case("experts", r"layers|experts", r"expert \d+ is the reference's expert|order of .*text")
def experts_as_text_in_int8(folder: Path) -> Pair:
    sound = _of_experts(folder)
    return Pair(_in_int8(sound.reference, folder / "int8", _as_text), sound.reference, suite="files")


@case("router", r"config\.json", "norm_topk_prob")
def router_factor_absent(folder: Path) -> Pair:
    return _of_experts(folder, norm_topk_prob=...)


@case("router", r"config\.json", "num_experts_per_tok")
def router_choice_changed(folder: Path) -> Pair:
    return _of_experts(folder, num_experts_per_tok=1)


# --- other formats, from their files

WIDER = {"hidden_size": 256, "intermediate_size": 384, "vocab_size": 1024}
Parts = dict[str, Tensors]
"""Layer → its stored parts."""


def _in_nvfp4(
    folder: Path, change: Callable[[Parts], object] = lambda layers: None, larger: tuple[str, float] = ("", 1.0)
) -> Pair:
    """Return a small Llama in NVFP4. `larger`: a layer, and what multiplies the range of its second scale."""
    source = _random(folder / "reference", "llama", **WIDER)
    tensors = load_file(source / ONE)
    names = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    weights = {layer: tensors.pop(f"{layer}.weight").float() for layer in names}
    layers: Parts = {}
    for layer, weight in weights.items():
        block, _, kind = layer.rpartition(".")
        shared = max(weights[f"{block}.{each}"].abs().max() for each in FUSED.get(kind, (kind,)))
        layers[layer], _ = nvfp4(weight, shared * (larger[1] if layer == larger[0] else 1))
        layers[layer]["input_global_scale"] = 448 * 6 / (40 * shared.reshape(1))
    change(layers)
    stored = {f"{layer}.{part}": tensor for layer, parts in layers.items() for part, tensor in parts.items()}
    save_checkpoint(source, folder / "model", tensors | stored, NVFP4)
    return Pair(folder / "model", source, folder / "model", "files")


FUSED = {kind: group for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) for kind in group}


@case("global", r"layers\.2\.mlp\.(gate|up)_proj", "weight_global_scale.*(unequal|differ|apart)")
def nvfp4_gate_and_up_apart(folder: Path) -> Pair:
    return _in_nvfp4(folder, larger=("model.layers.2.mlp.up_proj", 1.078))


@case("global", r"layers\.4\.self_attn\.k_proj", "input_global_scale.*(unequal|differ|×)")
def nvfp4_keys_apart_in_their_inputs(folder: Path) -> Pair:
    def change(layers: Parts) -> None:
        layers["model.layers.4.self_attn.k_proj"]["input_global_scale"] *= 7

    return _in_nvfp4(folder, change)


@case(
    "unwritten",
    r"layers\.3\.self_attn\.o_proj",
    "weight_global_scale.*(missing|lost|absent)|(missing|lacks).*weight_global_scale",
)
def nvfp4_global_scale_lost(folder: Path) -> Pair:
    return _in_nvfp4(folder, lambda layers: layers["model.layers.3.self_attn.o_proj"].pop("weight_global_scale"))


@case(
    "unwritten",
    r"layers\.3\.mlp\.down_proj",
    "input_global_scale.*(missing|lost|absent)|(missing|lacks).*input_global_scale",
)
def nvfp4_input_scale_lost(folder: Path) -> Pair:
    return _in_nvfp4(folder, lambda layers: layers["model.layers.3.mlp.down_proj"].pop("input_global_scale"))


def _in_gptq(folder: Path, ranks: int = 1, **declared: Any) -> Pair:
    source = _random(folder / "reference", "llama", **WIDER)
    by_hand(gptq, {**GPTQ, **declared}, source, folder / "model")
    return Pair(folder / "model", source, folder / "model", "files", ranks)


@case("zero", "_proj", "qzeros|zero.?point")
def gptq_zero_points_of_another_version(folder: Path) -> Pair:
    return _in_gptq(folder, checkpoint_format="gptq_v2")


@case("ranks", "down_proj", "ranks|tensor.?parallel|shards")
def gptq_groups_cut_by_two_ranks(folder: Path) -> Pair:
    return _in_gptq(folder, ranks=2)


# --- sound checkpoints


@healthy("a mixture of experts in int8")
def healthy_experts_in_int8(folder: Path) -> Pair:
    sound = _of_experts(folder)
    return Pair(_in_int8(sound.reference, folder / "int8"), sound.reference, suite="files")


@healthy("NVFP4 with scales that are shared where a server shares them")
def healthy_nvfp4(folder: Path) -> Pair:
    return _in_nvfp4(folder)


@healthy("GPTQ in groups of 128")
def healthy_gptq(folder: Path) -> Pair:
    return _in_gptq(folder)


@healthy("in two shards")
def healthy_in_shards(folder: Path) -> Pair:
    return Pair(sharded(INT8, folder / "model"))


@healthy("config.json as transformers 4 writes it")
def healthy_config_of_transformers_4(folder: Path) -> Pair:
    stated = read(INT8 / CONFIG)
    base = stated["rope_parameters"]["rope_theta"]
    old: dict[str, Any] = {
        "rope_theta": base,
        "rope_scaling": None,
        "torch_dtype": stated["dtype"],
        "transformers_version": "4.45.2",
    }
    gone: dict[str, Any] = dict.fromkeys(("rope_parameters", "dtype", "head_dim", "mlp_bias"), ...)
    return of_int8(folder, **old, **gone, is_llama_config=True, rope_interleaved=False)


@healthy("merges as texts, as tokenizers before 0.20 write them")
def healthy_merges_as_texts(folder: Path) -> Pair:
    def texts(model: dict[str, Any]) -> dict[str, Any]:
        return {**model, "merges": [" ".join(pair) for pair in model["merges"]]}

    return with_json(folder, "tokenizer.json", model=texts)


@healthy("the tokenizer's files as transformers 4 writes them")
def healthy_tokenizer_of_transformers_4(folder: Path) -> Pair:
    pair = of_int8(folder)
    template = (INT8 / "chat_template.jinja").read_text(encoding="utf-8")
    (pair.model / "chat_template.jinja").unlink()
    words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    first = {"content": "<|im_start|>", "lstrip": False, "__type": "AddedToken"}
    more = {"add_prefix_space": False, "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}}}
    more |= {"pad_token": "<|im_end|>", "chat_template": template, "model_max_length": 8192}
    more |= {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False}
    wrote(pair.model / "tokenizer_config.json", {**words, "bos_token": first, **more})
    wrote(pair.model / "special_tokens_map.json", words)
    return pair


@healthy("the tokenizer saved again by the installed transformers")
def healthy_tokenizer_saved_again(folder: Path) -> Pair:
    from transformers import AutoTokenizer

    pair = of_int8(folder)
    tokenizer = AutoTokenizer.from_pretrained(INT8)
    for name in TOKENIZER:
        (pair.model / name).unlink()
    tokenizer.save_pretrained(pair.model)
    return pair


@healthy("scales and norms in float32")
def healthy_in_float32(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        tensors.update({name: one.float() for name, one in tensors.items() if "scale" in name or "norm" in name})

    return of_int8(folder, change)


@healthy("quantized again, the same way")
def healthy_quantized_again(folder: Path) -> Pair:
    return Pair(_requantized(SMOLLM2, folder / "model"))


@healthy("quantized again, clipped at 0.97 of the largest weight")
def healthy_clipped(folder: Path) -> Pair:
    return Pair(_requantized(SMOLLM2, folder / "model", 0.97))


@healthy("quantized again, rounded up or down by chance")
def healthy_rounded_by_chance(folder: Path) -> Pair:
    original = load_file(SMOLLM2 / ONE)

    def change(tensors: Tensors) -> None:
        chance = torch.Generator().manual_seed(5)
        for name in codes(tensors):
            exact = original[name].float() / tensors[f"{name}_scale"].float()
            up = torch.rand(exact.shape, generator=chance) < exact - exact.floor()
            tensors[name] = (exact.floor() + up).clamp(-128, 127).to(torch.int8)

    return of_int8(folder, change)


@healthy("the tied head written as well, in floats")
def healthy_tied_head_written(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    return of_int8(folder, change)


@healthy("with the rope's buffers of older versions")
def healthy_with_rope_buffers(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        inverse = 1 / 1e5 ** (torch.arange(0, HEAD, 2) / HEAD)
        names = [f"model.layers.{block}.self_attn.rotary_emb.inv_freq" for block in range(BLOCKS)]
        tensors.update({name: inverse.clone() for name in names})

    return of_int8(folder, change)


@healthy("another version of compressed-tensors")
def healthy_of_another_version(folder: Path) -> Pair:
    def change(old: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in old.items() if key != "transform_config"}
        return {**kept, "version": "0.9.4"}

    return of_int8(folder, quantization_config=change)


@healthy("settings that change no number")
def healthy_with_other_settings(folder: Path) -> Pair:
    return of_int8(folder, use_cache=False, max_position_embeddings=8192, torchscript=False, tokenizer_class=None)


@healthy("consolidated.safetensors beside the shards, as in Mistral's repositories")
def healthy_with_consolidated(folder: Path) -> Pair:
    model = sharded(INT8, folder / "model")
    own = {f"layers.{block}.attention.wq.weight": torch.randn(4, 4) for block in range(4)}
    saved(own, model / "consolidated.safetensors")
    return Pair(model)


@healthy("an adapter's file beside the model")
def healthy_with_an_adapter_beside(folder: Path) -> Pair:
    model = sharded(INT8, folder / "model")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    saved({name: torch.randn(8, 16)}, model / "adapter_model.safetensors")
    return Pair(model)


@healthy("a layer that is odd in the original too")
def healthy_with_an_odd_layer(folder: Path) -> Pair:
    model = edited(INT8, folder / "model", _outsized)
    return Pair(model, edited(SMOLLM2, folder / "reference", _outsized), model, "odd")


@healthy("scales of a KV cache")
def healthy_with_kv_scales(folder: Path) -> Pair:
    return _with_kv_scales(folder, _usual)


@healthy("a head of several tokens in floats, as config.json promises")
def healthy_with_mtp(folder: Path) -> Pair:
    def ignoring(old: dict[str, Any]) -> dict[str, Any]:
        return {**old, "ignore": [*old["ignore"], "re:^mtp.*"]}

    return _of_more_tokens(folder, _more_tokens, num_nextn_predict_layers=1, quantization_config=ignoring)


@healthy("the tie cut, and the head written as the embeddings are")
def healthy_untied(folder: Path) -> Pair:
    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    return of_int8(folder, change, tie_word_embeddings=False)


@healthy("the adapter merged rightly")
def healthy_with_a_merged_adapter(folder: Path) -> Pair:
    reference = _merged(folder, "reference", 2)
    model = _requantized(reference, folder / "model")
    return Pair(model, reference, model, "merged")


@healthy("Qwen2 with biases, in int8")
def healthy_with_biases(folder: Path) -> Pair:
    return _with_biases(folder)


@healthy("a mixture of experts in 16 bits")
def healthy_experts(folder: Path) -> Pair:
    return _of_experts(folder)

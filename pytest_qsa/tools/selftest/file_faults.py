"""Faults of whole parts, files and settings: what is lost, written twice, or says another thing than the tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...checkpoint import FLOATS, NUMBER, SETTING_LAYERS, SEVERAL_TOKENS, Folder, Tensor, encoded, format_of
from .fault import Faults, quantized, stop_tokens
from .mutant import ChangedTensor, Mutant
from .order_faults import OF_INPUTS

FILE_FAULTS = Faults()
CONFIG, GENERATION, TOKENIZER = SETTING_LAYERS[:3]
SETTING_DEFAULTS: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-12,
    "layer_norm_epsilon": 1e-5,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "attention_multiplier": 1.0,
    "attn_logit_softcapping": None,
}
"""Settings that were lost in the field → what the classes of most models take for one that isn't stated."""


def _several_tokens(folder: Folder) -> list[str]:
    """Return the modules that predict further tokens: those named so, and the blocks behind the last one."""
    if folder.gguf_file:
        return []
    blocks = folder.text_config.get("num_hidden_layers")
    found = []
    for layer in folder.layers:
        if match := SEVERAL_TOKENS.search(layer):
            found.append(layer[: match.end()] + layer[match.end() :].partition(".")[0])
        elif (match := NUMBER.search(layer)) and isinstance(blocks, int) and int(match[0]) >= blocks:
            found.append(layer[: match.end()])
    return list(dict.fromkeys(found))


@FILE_FAULTS.add(_several_tokens, names="the module")
def mtp_lost(mutant: Mutant, layer: str, strength: float) -> None:
    """The head that predicts further tokens (MTP, nextn) left out of the files, the configuration as it was."""
    for module in _several_tokens(mutant.source):
        for name in mutant.source.tensors:
            if name.startswith(f"{module}."):
                mutant.drop(name)


def _duplicable(folder: Folder) -> list[str]:
    """Return the layers whose copy in another shard can be stale: the quantized ones, else all matrices."""
    if folder.gguf_file or len(folder.tensors) < 2:
        return []
    return quantized(folder) or [name for name in folder.layers if (w := _matrix(folder, name)) and w.dtype in FLOATS]


def _matrix(folder: Folder, layer: str) -> Tensor | None:
    weight = folder.layers[layer].get("weight")
    return weight if weight is not None and len(weight.shape) == 2 else None


@FILE_FAULTS.add(_duplicable, "× scale", neutral=1.0, default=4.0, strongest=16.0)
def stale_duplicate(mutant: Mutant, layer: str, strength: float) -> None:
    """An older copy of one layer's scales (of its weight, without them) × s, in a shard that isn't the index's."""
    folder = mutant.source
    tensor = format_of(folder).weight_scale_of(layer) or folder.layers[layer]["weight"]
    if not folder.indexed:
        names = list(folder.tensors)
        half = len(names) // 2
        shards = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
        mutant.moved.update({name: shards[index >= half] for index, name in enumerate(names)})
    home = mutant.home(tensor.name)
    other = next(file for file in sorted({mutant.home(name) for name in folder.tensors} or {home}) if file != home)
    with mutant.edit_values(tensor.name) as values:
        values *= strength
    stale = mutant.changes.pop(tensor.name)
    assert stale is not None
    mutant.added.setdefault(other, {})[tensor.name] = stale


def _tied(folder: Folder) -> list[str]:
    """Return the head of a model whose embedding is its head, where quantized layers say how it would be written."""
    if folder.gguf_file or not folder.text_config.get("tie_word_embeddings") or "lm_head" in folder.layers:
        return []
    embedding = _embedding(folder)
    return ["lm_head"] if embedding and (_pattern(folder) or _repeated_rows(folder, *embedding.shape)) else []


def _embedding(folder: Folder) -> Tensor | None:
    own = (_matrix(folder, name) for name in folder.layers if name.rpartition(".")[2] in ("embed_tokens", "wte"))
    return next((weight for weight in own if weight is not None and weight.dtype in FLOATS), None)


def _pattern(folder: Folder) -> tuple[Tensor, Tensor] | None:
    """Return codes of 8 bits and scales, of a row or the tensor, after which a head can be written; None for none."""
    form = format_of(folder)
    for layer in quantized(folder):
        codes, scale = form.codes_of(layer), form.weight_scale_of(layer)
        if codes is None or scale is None or codes.part != "weight" or codes.dtype not in ("I8", "F8_E4M3"):
            continue
        if np.prod(scale.shape, dtype=int) in (1, codes.shape[0]) and scale.dtype in FLOATS:
            return codes, scale
    return None


def _repeated_rows(folder: Folder, rows: int, inputs: int) -> dict[str, ChangedTensor]:
    """Return the parts of a layer with so many rows: those of one with as many inputs, repeated; empty for none."""
    form = format_of(folder)
    for layer in quantized(folder):
        shape, weight = form.weight_shape(layer), form.codes_of(layer)
        if shape is None or weight is None or shape[1] != inputs:
            continue
        axis = 1 if weight.part == "qweight" and getattr(form, "packing", "") != "gemv" else 0
        found = {}
        for part, tensor in form.parts(layer).items():
            raw = np.array(tensor.raw())
            if part == "weight_shape":
                raw = np.array([rows, inputs], raw.dtype)
            elif not OF_INPUTS.search(part) and raw.size > 1:
                outputs, rest = divmod(shape[0], raw.shape[axis])  # rows that share an entry: a word, or a block
                if rest or rows % outputs:
                    break
                raw = np.take(raw, np.arange(rows // outputs) % raw.shape[axis], axis)
            if part != "bias":
                found[part] = ChangedTensor(tensor.dtype, raw.shape, raw)
        else:
            return found
    return {}


@FILE_FAULTS.add(_tied, names="`lm_head`")
def tied_head_quantized(mutant: Mutant, layer: str, strength: float) -> None:
    """The tied head written once more, quantized as other layers are; in few bits with the rows of one, repeated."""
    folder = mutant.source
    embedding, pattern = _embedding(folder), _pattern(folder)
    assert embedding is not None
    head = mutant.added.setdefault(embedding.file, {})
    if pattern is None:
        parts = _repeated_rows(folder, *embedding.shape).items()
        head.update({f"{layer}.{part}": content for part, content in parts})
        return
    codes, scale = pattern
    weight = embedding.values()
    largest = 127.0 if codes.dtype == "I8" else 448.0
    rows = np.prod(scale.shape, dtype=int) > 1
    size = np.abs(weight).max(axis=1 if rows else None, keepdims=True).clip(1e-8) / largest
    shape = (len(weight), *scale.shape[1:]) if rows else scale.shape
    head[f"{layer}.weight"] = ChangedTensor(codes.dtype, weight.shape, encoded(weight / size, codes.dtype))
    head[f"{layer}.{scale.part}"] = ChangedTensor(scale.dtype, shape, encoded(size.reshape(shape), scale.dtype))


def _text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _content(mutant: Mutant, file: str) -> dict[str, Any]:
    """Return the content of one of the original's files, which may be changed."""
    return mutant.source.json(file) or {}


def _lost_settings(folder: Folder) -> Iterator[tuple[str, ...]]:
    """Yield the paths in config.json of settings that differ from what a class takes where they are lost."""
    if folder.gguf_file:
        return
    for part in (("text_config",), ()):
        settings = folder.config
        for key in part:
            settings = settings.get(key) or {}
        for key, default in SETTING_DEFAULTS.items():
            if key in settings and settings[key] != default:
                yield (*part, key)


def _with_setting(folder: Folder) -> list[str]:
    return [CONFIG] if any(_lost_settings(folder)) else []


@FILE_FAULTS.add(_with_setting, names="`config.json`")
def setting_absent(mutant: Mutant, layer: str, strength: float) -> None:
    """A setting left out of config.json, so that the class's default counts: the norms' epsilon, else a factor."""
    config = _content(mutant, CONFIG)
    *part, key = next(_lost_settings(mutant.source))
    settings = config
    for name in part:
        settings = settings[name]
    del settings[key]
    mutant.texts[CONFIG] = _text(config)


def _with_stop_token(folder: Folder) -> list[str]:
    return [GENERATION] if not folder.gguf_file and stop_tokens(folder) else []


@FILE_FAULTS.add(_with_stop_token, names="`generation_config.json`")
def stop_token_changed(mutant: Mutant, layer: str, strength: float) -> None:
    """The stop token of generation_config.json another one than the model's: generation does not end."""
    own = set(stop_tokens(mutant.source))
    other = next(token for token in range(len(own) + 1) if token not in own)
    mutant.texts[GENERATION] = _text({**_content(mutant, GENERATION), "eos_token_id": other})


def _without_truncation(folder: Folder) -> list[str]:
    tokenizer = None if folder.gguf_file else folder.json("tokenizer.json")
    return [TOKENIZER] if tokenizer and not tokenizer.get("truncation") else []


@FILE_FAULTS.add(_without_truncation, names="`tokenizer`")
def truncation_saved(mutant: Mutant, layer: str, strength: float) -> None:
    """The truncation of calibration saved in tokenizer.json: a server cuts longer prompts silently."""
    cut = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    tokenizer = _content(mutant, "tokenizer.json")
    mutant.texts["tokenizer.json"] = json.dumps({**tokenizer, "truncation": cut}, ensure_ascii=False)


def _versioned(folder: Folder) -> list[str]:
    """Return the layers of a GPTQ checkpoint, whose zero points have two versions."""
    declared = folder.quantization
    if declared.get("quant_method") != "gptq" or _version(declared) not in ("gptq", "gptq_v2"):
        return []
    return [name for name in quantized(folder) if format_of(folder).zero_point_of(name)]


def _version(declared: Mapping[str, Any]) -> str:
    return str(declared.get("checkpoint_format") or "gptq")


@FILE_FAULTS.add(_versioned)
def zero_point_version(mutant: Mutant, layer: str, strength: float) -> None:
    """The other version of zero points declared (GPTQ: `gptq` for `gptq_v2`), so that all are off by one."""
    config = _content(mutant, CONFIG)
    holder = config if "quantization_config" in config else config["text_config"]
    declared = holder["quantization_config"]
    declared["checkpoint_format"] = "gptq" if _version(declared) == "gptq_v2" else "gptq_v2"
    mutant.texts[CONFIG] = _text(config)


def _with_bos(folder: Folder) -> list[str]:
    return [TOKENIZER] if (folder.json("tokenizer_config.json") or {}).get("bos_token") else []


@FILE_FAULTS.add(_with_bos, names="`tokenizer`")
def bos_dropped(mutant: Mutant, layer: str, strength: float) -> None:
    """The tokenizer's beginning-of-sequence token dropped: the token, and the step that puts it in front."""
    settings = _content(mutant, "tokenizer_config.json")
    settings.pop("bos_token")
    settings["add_bos_token"] = False
    mutant.texts["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False)
    tokenizer = mutant.source.json("tokenizer.json")
    if tokenizer and (tokenizer.get("post_processor") or {}).get("type") == "TemplateProcessing":
        mutant.texts["tokenizer.json"] = json.dumps({**tokenizer, "post_processor": None}, ensure_ascii=False)

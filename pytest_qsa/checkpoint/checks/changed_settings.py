"""Settings that change the function, against the reference's: configuration, stop tokens, processor, chat template."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ...common import AnomalyError
from ..folder import RESTORE, TEMPLATE_FILE, Finding, Folder, Settings, refusing_odd_settings, shown
from ..formats.format import Format, format_of
from ..formats.unquantized import Unquantized
from ..gguf_file import SETTING_NAMES
from ..side_files import CONFIG, GENERATION, PROCESSORS, TOKENIZER_SETTINGS
from ..tensors import element_count
from .changed_tokenizer import TOKENIZER, changed_tokenizer, stop_token_names

HARMLESS = frozenset(
    {
        *("_name_or_path", "_model_name_or_path", "name_or_path", "transformers_version", "auto_map", "problem_type"),
        *("id2label", "label2id", "torch_dtype", "dtype", "quantization_config", "compression_config"),
        *("initializer_range", "pretraining_tp", "use_cache", "return_dict", "output_attentions", "max_length"),
        *("output_hidden_states", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        *("chunk_size_feed_forward", "torchscript", "tokenizer_class", "finetuning_task", "task_specific_params"),
        *("_from_model_config", "processor_class", "feature_extractor_type", "image_processor_type"),
        *("video_processor_type", "_valid_processor_keys"),
    }
)
"""The keys of a configuration that say how it was made or how it is run, and change no number."""
ACTING = frozenset(
    {
        *("rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "layer_types"),
        *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "partial_rotary_factor"),
        *("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale"),
        *("routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group", "scoring_func"),
    }
)
"""Keys that change the function wherever a class has them.

One that is lost is a problem even where the installed class doesn't know it, for the class of another engine may.
"""
OF_TRAINING = re.compile(
    r"(.+\.)?(pad_token_id|\w*(dropout|pdrop|layerdrop)\w*|router_(aux_loss_coef|z_loss_coef|jitter_noise)|"
    r"output_router_logits|gradient_checkpointing)"
)
"""Keys that act in training, or on padding, which a server has none of: a difference is a note."""
PROCESSOR, TEMPLATE = "processor", "chat_template"
WRITTEN = {
    CONFIG: r"model_type|architectures",
    GENERATION: r"transformers_version|_from_model_config|\w+_token_id|max_(new_tokens|length)|temperature|top_[kp]"
    r"|do_sample|repetition_penalty|num_beams|use_cache|cache_implementation",
    **dict.fromkeys(
        PROCESSORS, r"do_\w+|\w*(processor|extractor)(_class|_type)?|sampling_rate|feature_size|(crop_)?size"
    ),
}
"""Of each file the keys of which it has one at least. Any other JSON may be linked to here, or lie in a folder that a
suite names, and what differs is quoted: it must not be a file of this machine that holds a password."""
SIZE_TOLERANCE = 0.1
ROPE_BASE, LLAMA_CPP_ROPE_BASE = "rope_parameters.rope_theta", 10_000.0
"""The rope's base, and what llama.cpp takes for one that a GGUF file doesn't state."""
SETTING_LAYERS = (CONFIG, GENERATION, TOKENIZER, TEMPLATE, PROCESSOR)
"""The names that stand for a layer where a setting is wrong."""


@dataclass(frozen=True)
class Resolved:
    """A config.json as the class that reads it understands it, what isn't stated filled in. `name`: the class."""

    name: str
    settings: Settings


Resolve = Callable[[Sequence[Folder]], Sequence[Resolved | None]]
"""Returns None where no class that is installed reads a folder's configuration."""


def unresolved(folders: Sequence[Folder]) -> Sequence[Resolved | None]:
    """Resolve nothing: what only one side states is then a note."""
    return [None] * len(folders)


def changed_settings(folder: Folder, reference: Folder, resolve: Resolve = unresolved) -> Iterator[Finding]:
    """Yield the settings that differ from the reference's.

    A setting that one side doesn't state is compared by what its class takes for it.

    Raises:
        AnomalyError: a file is no JSON.
        InfraError: a file can't be read.
    """
    if folder.gguf_file:
        yield from _gguf_config(folder, reference)
        # llama.cpp names the steps of a tokenizer otherwise; a pass compares the ids that they make
        yield from changed_tokenizer(folder, reference)
        return
    yield from _config(folder, reference, resolve)
    yield from _ropes_of_two_bases(folder, reference)
    yield from _narrower(folder, reference)
    with refusing_odd_settings(f"{folder.path / GENERATION}: a setting"):
        yield from _generation(folder, reference)
    with refusing_odd_settings(f"{folder.path}: a setting of the tokenizer, in tokenizer.json or beside it,"):
        yield from changed_tokenizer(folder, reference)
    yield from _processor(folder, reference)
    yield from _templates(folder, reference)


def _config(folder: Folder, reference: Folder, resolve: Resolve) -> Iterator[Finding]:
    mine, theirs = (dict(_flat(_checked(side, CONFIG, side.config))) for side in (folder, reference))
    stated = [key for key in sorted(mine.keys() & theirs.keys()) if None not in (mine[key], theirs[key])]
    for key in stated:
        if not same(mine[key], theirs[key]):
            note = OF_TRAINING.fullmatch(key) is not None
            yield Finding.changed(CONFIG, key, CONFIG, mine[key], theirs[key], note=note)
    alone = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)} - set(stated)
    if not alone and mine.keys() == theirs.keys():
        return
    own, other = resolve((folder, reference))
    if own is None or other is None or own.name != other.name:
        for key in sorted(alone):
            yield _one_sided(key, mine, theirs)
        return
    ours, others = dict(_flat(own.settings)), dict(_flat(other.settings))
    for key in sorted({*ours, *others, *alone} - set(stated)):
        if key not in ours or key not in others:  # the class has no default for it
            if key in alone:
                yield _one_sided(key, mine, theirs)
        elif not same(ours[key], others[key]):
            texts = [
                shown(values[key]) if key in side else f"not set, so that {own.name} takes {shown(values[key])}"
                for side, values in ((mine, ours), (theirs, others))
            ]
            what, note = f"{texts[0]}; in the reference {texts[1]}", OF_TRAINING.fullmatch(key) is not None
            yield Finding(CONFIG, key, CONFIG, what, RESTORE, note=note)


def _ropes_of_two_bases(folder: Folder, reference: Folder) -> Iterator[Finding]:
    """Yield a base of the rope that two keys state otherwise: which counts depends on the loader."""
    theirs = {name: section.get("rope_theta") for name, section in _sections(reference.config)}
    for name, section in _sections(folder.config):
        rope, outer = section.get("rope_parameters"), section.get("rope_theta")
        inner = rope.get("rope_theta") if isinstance(rope, Mapping) else None
        if None in (outer, inner) or same(outer, inner) or same(outer, theirs.get(name)):
            continue
        what = f"{outer}, and rope_parameters has {inner}: transformers 5 reads the latter, older loaders the former"
        yield Finding(CONFIG, f"{name}rope_theta", CONFIG, what, "leave one of the two out")


def _sections(config: Settings) -> Iterator[tuple[str, Settings]]:
    """Yield a configuration and its sections, each with what stands before its keys."""
    yield "", config
    yield from ((f"{key}.", value) for key, value in config.items() if isinstance(value, Mapping))


def _gguf_config(folder: Folder, reference: Folder) -> Iterator[Finding]:
    """Yield the settings that a GGUF file and the reference both state otherwise.

    llama.cpp has names and defaults of its own for all others, and scales the rope by a tensor.
    """
    mine, theirs = dict(_flat(folder.config)), dict(_flat(_checked(reference, CONFIG, reference.text_config)))
    if ROPE_BASE in theirs:
        mine.setdefault(ROPE_BASE, LLAMA_CPP_ROPE_BASE)
    # Of a latent attention the converter states the sizes of the latent, as of one head.
    skipped = {"head_dim", "num_key_value_heads"} if theirs.get("kv_lora_rank") else set()
    compared = {ROPE_BASE, *SETTING_NAMES.values()} - skipped
    for key in sorted(mine.keys() & theirs.keys() & compared):
        one, other = mine[key], theirs[key]
        if None not in (one, other) and not isinstance(one, list) and not same(one, other):  # a list has one a block
            yield Finding.changed(CONFIG, key, str(folder.gguf_file), one, other)


def _narrower(folder: Folder, reference: Folder) -> Iterator[Finding]:
    """Yield a note where it runs in float16 and the reference in a dtype of a larger range."""
    mine, theirs = (
        side.text_config.get("dtype") or side.text_config.get("torch_dtype") for side in (folder, reference)
    )
    if mine == "float16" and theirs in ("bfloat16", "float32"):
        what = f"float16, in the reference {theirs}: what is above 65504 becomes Inf"
        yield Finding(CONFIG, "dtype", CONFIG, what, "bound headroom, or say bfloat16", note=True)


def _checked(folder: Folder, name: str, content: Any) -> Any:
    """Return the content of a file, which is one of transformers' if its keys say so.

    Raises:
        AnomalyError: they don't.
    """
    if not content or folder.gguf_file or any(re.fullmatch(WRITTEN[name], str(key)) for key in content):
        return content
    what = "it has neither model_type nor architectures" if name == CONFIG else "it has no key of such a file"
    raise AnomalyError(f"{folder.path / name} is no {name} of transformers, for {what}: copy or download it again")


def _one_sided(key: str, mine: Settings, theirs: Settings) -> Finding:
    """Return what is to be said of a setting whose default nobody here knows: a note, unless it is known to act."""
    acts = any(part in ACTING for part in key.split(".")) and any(side.get(key) for side in (mine, theirs))
    return Finding.changed(CONFIG, key, CONFIG, mine.get(key), theirs.get(key), note=not acts)


def _flat(config: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a configuration that can change a number, those of its parts under dotted names."""
    # Within the rope's settings rope_theta is in its place already.
    settings = config if prefix.endswith("rope_parameters.") else _plain(config)
    for key, value in settings.items():
        if key in HARMLESS:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key == "eos_token_id" and isinstance(value, list) and all(isinstance(each, int) for each in value):
            yield f"{prefix}{key}", value[0] if len(set(value)) == 1 else sorted(set(value))  # in any order
        else:
            yield f"{prefix}{key}", value


def _plain(config: Settings) -> dict[str, Any]:
    """Bring a configuration to one form: the rope's settings where transformers 5 has them, and the derived sizes."""
    plain = dict(config)
    rope = {**(plain.pop("rope_scaling", None) or {}), **(plain.pop("rope_parameters", None) or {})}
    if "type" in rope:  # the older name of the key
        rope.setdefault("rope_type", rope.pop("type"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in plain:
            rope.setdefault(key, plain.pop(key))
    if rope:
        rope.setdefault("rope_type", "default")
        plain["rope_parameters"] = rope
    heads, width = plain.get("num_attention_heads"), plain.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int) and heads:
        plain["head_dim"] = plain.get("head_dim") or width // heads
        plain["num_key_value_heads"] = plain.get("num_key_value_heads") or heads
    return plain


def _generation(folder: Folder, reference: Folder) -> Iterator[Finding]:
    """Yield stop tokens that are lost or others, and as notes how else generation is set otherwise."""
    mine, theirs = (_checked(side, GENERATION, side.json(GENERATION)) for side in (folder, reference))
    if theirs is not None and mine is None:
        yield Finding(GENERATION, GENERATION, GENERATION, "there is none, the reference has one", RESTORE)
    own, other = _stop_tokens(folder, mine), _stop_tokens(reference, theirs)
    if mine is not None and own != other:
        texts = [stop_token_names(side, ids) for side, ids in ((folder, own), (reference, other))]
        what = f"stops at {texts[0]}, the reference at {texts[1]}"
        yield Finding(GENERATION, "eos_token_id", GENERATION, what, RESTORE)
    if mine is None or theirs is None:
        return
    for key in sorted({*mine, *theirs} - HARMLESS - {"eos_token_id"}):
        if not same(mine.get(key), theirs.get(key)):
            yield Finding.changed(GENERATION, key, GENERATION, mine.get(key), theirs.get(key), note=True)


def _stop_tokens(folder: Folder, generation: Settings | None) -> frozenset[int]:
    """Return the ids at which generation stops: config.json's count only where there is no generation_config.json."""
    stated = (folder.text_config if generation is None else generation).get("eos_token_id")
    return frozenset(stated if isinstance(stated, list) else [] if stated is None else [stated])


def _processor(folder: Folder, reference: Folder) -> Iterator[Finding]:
    """Yield how pictures and sounds are prepared otherwise, whichever of the processors' files states it."""
    mine, theirs = _processor_settings(folder), _processor_settings(reference)
    if theirs and not mine:
        file = next(name for name in PROCESSORS if reference.json(name) is not None)
        yield Finding(PROCESSOR, file, file, "there is none, the reference has one", RESTORE)
        return
    for key in sorted({*mine, *theirs}):
        one, other = mine.get(key), theirs.get(key)
        if not same(one, other):
            yield Finding.changed(PROCESSOR, key, PROCESSORS[0], one, other, note=one is None or other is None)


def _processor_settings(folder: Folder) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in PROCESSORS:
        # transformers 5 keeps the parts in one file, older versions each in its own
        parts = ("image_processor", "feature_extractor", "video_processor")
        content = _checked(folder, name, folder.json(name)) or {}
        for part in (content, *(content[part] for part in parts if isinstance(content.get(part), dict))):
            plain = {key: value for key, value in part.items() if key not in (*parts, "tokenizer")}
            settings |= {key: value for key, value in _flat(plain) if value is not None}
    return settings


def unexpected_size(form: Format, reference: Folder) -> Iterator[Finding]:
    """Yield a note where the tensors take another size than the declared schemes give the reference's shapes.

    Nothing is said of a checkpoint that declares no scheme, and of a reference that is quantized itself or has no
    tensors here.
    """
    if form.folder.gguf_file or not any(reference.path.glob("*.safetensors")):
        return
    schemes = {name: form.scheme_of(name) if form.codes_of(name) else None for name in reference.layers}
    if not any(schemes.values()) or not isinstance(format_of(reference), Unquantized):
        return
    expected = 0.0
    for name, parts in reference.layers.items():
        for part, tensor in parts.items():
            scheme, own, codes = schemes[name], form.parts(name).get(part, tensor), form.codes_of(name)
            if part == "weight" and scheme is not None and codes is not None and len(tensor.shape) == 2:
                count = prod(tensor.shape)
                # some writers give a code of fewer bits a byte of its own
                expected += count * (8 if element_count(codes) == count else scheme.bits) / 8
                # what lies beside codes differs from writer to writer: padding, zero points, scales of scales
                beside = (each for each in form.parts(name).values() if each is not codes and each.part not in parts)
                expected += sum(each.stop - each.start for each in beside)
            else:
                expected += own.stop - own.start
    stored = sum(tensor.stop - tensor.start for tensor in form.folder.tensors.values())
    if abs(stored / expected - 1) > SIZE_TOLERANCE:
        sizes = f"{stored / 1e9:.3g} GB, the declared scheme of the reference's shapes {expected / 1e9:.3g} GB"
        advice = "check which layers were quantized, and in what"
        yield Finding(CONFIG, "quantization_config", CONFIG, f"the tensors take {sizes}", advice, note=True)


def same(one: Any, other: Any) -> bool:
    """Say whether two values of a setting are equal: numbers within the rounding of float32."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-6) if numbers else bool(one == other)


def _templates(folder: Folder, reference: Folder) -> Iterator[Finding]:
    """Yield a chat template that differs from the reference's, and one that another file of the folder contradicts."""
    mine, theirs = _template(folder), _template(reference)
    if mine != theirs:
        what = "there is none, the reference has one" if mine is None else _first_difference(mine, theirs)
        yield Finding(TEMPLATE, TEMPLATE, TEMPLATE_FILE, what, RESTORE)
    stated = _stated_template(folder)
    if folder.template() is not None and stated is not None and stated != mine:
        what = f"{TOKENIZER_SETTINGS} has another one, which transformers leaves out and other loaders may take"
        yield Finding(TEMPLATE, TEMPLATE, TEMPLATE_FILE, what, "remove the one that is not meant", note=True)


def _first_difference(mine: str, theirs: str | None) -> str:
    """Say where two templates part; neither is quoted, for it may be a link to any file of this machine."""
    if theirs is None:
        return "there is one, the reference has none"
    pairs = enumerate(zip(mine, theirs, strict=False))
    at = next((place for place, (one, other) in pairs if one != other), min(len(mine), len(theirs)))
    line, column = mine.count("\n", 0, at) + 1, at - mine.rfind("\n", 0, at)
    return f"differs from the reference's, from line {line}, character {column} on"


def _template(folder: Folder) -> str | None:
    """Return the chat template that transformers takes; None for none."""
    text = folder.template()
    return text.strip() if text is not None else _stated_template(folder)


def _stated_template(folder: Folder) -> str | None:
    """Return the chat template in tokenizer_config.json; of several, as older versions wrote them, the default."""
    stated = (folder.json(TOKENIZER_SETTINGS) or {}).get("chat_template")
    if isinstance(stated, list):
        stated = {each.get("name"): each.get("template") for each in stated}.get("default", stated)
    return str(stated).strip() if stated is not None else None

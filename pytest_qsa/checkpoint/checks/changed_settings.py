"""Settings that change the function: the configuration and the tokenizer against the reference's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..folder import Finding, Folder

HARMLESS = frozenset(
    {
        *("_name_or_path", "name_or_path", "transformers_version", "auto_map", "problem_type", "id2label", "label2id"),
        *("torch_dtype", "dtype", "quantization_config", "compression_config", "initializer_range", "pretraining_tp"),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "max_length", "attn_implementation"),
        *("_attn_implementation_autoset", "chunk_size_feed_forward"),
    }
)
"""The keys of a configuration that say how it was made or how it is run, and change no number."""
WITHOUT_DEFAULT = frozenset(
    {"rope_scaling", "rope_parameters", "sliding_window", "final_logit_softcapping", "query_pre_attn_scalar"}
)
"""The keys that matter where only one side states them; of all others writers leave out the defaults."""
TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
TOKENIZER_KEYS = ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "add_prefix_space")
_RESTORE = "take it from the reference, or change the reference if it is meant so"

CONFIG, TOKENIZER, TEMPLATE = "config.json", "tokenizer", "chat_template"


def changed_settings(folder: Folder, reference: Folder) -> Iterator[Finding]:
    """Yield the settings that differ from the reference's: configuration, vocabulary, tokenizer, chat template."""
    yield from _config(folder.config, reference.config, "")
    if folder.gguf_file:
        yield from _ids(folder.vocabulary, _all_entries(reference), str(folder.gguf_file))
        return  # llama.cpp names the steps of a tokenizer otherwise; a pass compares the ids that they make
    yield from _vocabulary(folder, reference)
    yield from _tokenizer(folder, reference)
    mine, theirs = _template(folder), _template(reference)
    if mine != theirs:
        what = "there is none, the reference has one" if mine is None else "differs from the reference's"
        yield Finding(TEMPLATE, TEMPLATE, "chat_template.jinja", what, _RESTORE)


def _config(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> Iterator[Finding]:
    # Within the rope's settings rope_theta is in its place already.
    if not prefix.endswith("rope_parameters."):
        mine, theirs = _plain(mine), _plain(theirs)
    for key in sorted({*mine, *theirs} - HARMLESS):
        one, other = mine.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _config(one, other, f"{prefix}{key}.")
        elif key not in mine or key not in theirs:
            if (key in WITHOUT_DEFAULT or prefix) and (one or other):
                yield _changed(CONFIG, f"{prefix}{key}", CONFIG, one, other)
        elif not _same(one, other):
            yield _changed(CONFIG, f"{prefix}{key}", CONFIG, one, other)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a configuration to one form: the rope's settings where transformers 5 has them, and the derived sizes."""
    plain = dict(config)
    rope = {**(plain.pop("rope_scaling", None) or {}), **(plain.pop("rope_parameters", None) or {})}
    if "type" in rope:  # the older name of the key
        rope.setdefault("rope_type", rope.pop("type"))
    if "rope_theta" in plain:
        rope.setdefault("rope_theta", plain.pop("rope_theta"))
    if rope:
        rope.setdefault("rope_type", "default")
        plain["rope_parameters"] = rope
    heads, width = plain.get("num_attention_heads"), plain.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int) and heads:
        plain["head_dim"] = plain.get("head_dim") or width // heads
        plain["num_key_value_heads"] = plain.get("num_key_value_heads") or heads
    return plain


def _same(one: Any, other: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-6) if numbers else bool(one == other)


def _changed(where: str, key: str, file: str, one: Any, other: Any) -> Finding:
    return Finding(where, key, file, f"{_shown(one)}, in the reference {_shown(other)}", _RESTORE)


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _vocabulary(folder: Folder, reference: Folder) -> Iterator[Finding]:
    mine, theirs = folder.json("tokenizer.json"), reference.json("tokenizer.json")
    if mine is None or theirs is None:
        if theirs is not None:
            yield Finding(TOKENIZER, "tokenizer.json", "tokenizer.json", "missing, the reference has one", _RESTORE)
        elif _digest(folder) != _digest(reference):
            yield Finding(TOKENIZER, "tokenizer.model", "tokenizer.model", "differs from the reference's", _RESTORE)
        return
    yield from _ids(_entries(mine), _entries(theirs), "tokenizer.json")
    if (mine.get("model") or {}).get("merges") != (theirs.get("model") or {}).get("merges"):
        yield Finding(TOKENIZER, "merges", "tokenizer.json", "differ from the reference's", _RESTORE)
    for part in TOKENIZER_PARTS:
        if mine.get(part) != theirs.get(part):
            yield _changed(TOKENIZER, part, "tokenizer.json", mine.get(part), theirs.get(part))


def _ids(one: Mapping[str, Any], other: Mapping[str, Any], file: str) -> Iterator[Finding]:
    changed = sorted(str(token) for token in {*one, *other} if one.get(token) != other.get(token))
    if changed:
        what = f"{len(changed)} of {len(other)} tokens have another id, the first {changed[0]!r}"
        yield Finding(TOKENIZER, "vocabulary", file, what, _RESTORE)


def _all_entries(folder: Folder) -> dict[str, Any]:
    """Return all tokens of a folder or a GGUF file, added tokens included."""
    if folder.gguf_file:
        return dict(folder.vocabulary)
    tokenizer = folder.json("tokenizer.json") or {}
    added = {str(token["content"]): token["id"] for token in tokenizer.get("added_tokens") or ()}
    return {**_entries(tokenizer), **added}


def _entries(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # unigram: pairs of a piece and its score
        return {str(entry[0]): (index, entry[1]) for index, entry in enumerate(vocabulary)}
    return dict(vocabulary)


def _digest(folder: Folder) -> str | None:
    file = folder.path / "tokenizer.model"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _tokenizer(folder: Folder, reference: Folder) -> Iterator[Finding]:
    mine, theirs = (side.json("tokenizer_config.json") or {} for side in (folder, reference))
    for key in TOKENIZER_KEYS:
        one, other = _token(mine.get(key)), _token(theirs.get(key))
        if one != other:
            yield _changed(TOKENIZER, key, "tokenizer_config.json", one, other)


def _token(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _template(folder: Folder) -> str | None:
    file = folder.path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    template = (folder.json("tokenizer_config.json") or {}).get("chat_template")
    return str(template).strip() if template is not None else None

"""A tokenizer against the reference's: what it is made of, with the first difference and a text that shows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...common import one_line, refuse_special
from ..folder import MOST_JSON, RESTORE, Finding, Folder, Settings
from ..side_files import TOKENIZER_JSON as FILE, TOKENIZER_SETTINGS as SETTINGS, readable_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer"
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
ALGORITHM = ("type", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
"""The settings of a tokenizer's model that change what it makes of a text, beside `ignore_merges`."""
SPECIAL = ("bos_token", "eos_token", "unk_token")
SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space")
NOTED = (
    *("pad_token", "padding_side", "truncation_side", "model_max_length", "split_special_tokens"),
    *("do_lower_case", "clean_up_tokenization_spaces"),
)
"""What a caller may set otherwise for each call, or only some classes look at: a difference is noted."""
PROBES = (
    *(" a", "ab", "Ab", "don't", "I'll", "123", "1234567", "a  b", "a\n\nb", " \t ", "foo_bar", "fooBar", "x = y+1;"),
    *(
        "naïve café",
        "ﬁ",
        "e\u0301",
        "ÀÉ",
        "日本語",
        "안녕하세요",
        "مرحبا",
        "🙂",
        "http://a.b/c?d=1",
    ),
)
"""Texts that are split at different places by different steps, the shortest first where several show a difference."""


def changed_tokenizer(folder: Folder, reference: Folder) -> Iterator[Finding]:
    """Yield what of a tokenizer differs from the reference's; of a GGUF file, whose steps have no names, the ids.

    The same tokenizer as another version of the libraries writes it is no difference.
    """
    if folder.gguf_file:
        yield from _ids(folder.vocabulary, _all_tokens(reference), str(folder.gguf_file))
        return
    mine, theirs = folder.json(FILE), reference.json(FILE)
    if mine is not None and theirs is not None:
        yield from _lengths(mine, theirs)
        if mine != theirs:
            yield from _content(folder, reference, mine, theirs)
    elif theirs is not None:
        yield Finding(TOKENIZER, FILE, FILE, "missing, the reference has one", RESTORE)
    elif _digest(folder) != _digest(reference):
        yield Finding(TOKENIZER, "tokenizer.model", "tokenizer.model", "differs from the reference's", RESTORE)
    yield from _settings(folder, reference)


def stop_token_names(folder: Folder, ids: Iterable[int]) -> str:
    """Return token ids with their texts: `2 '<|im_end|>'`; `no token` for none."""
    tokens = {number: text for text, number in _all_tokens(folder).items()}
    named = [f"{number} {tokens[number]!r}" if number in tokens else str(number) for number in sorted(ids)]
    return ", ".join(named) or "no token"


def _lengths(mine: Settings, theirs: Settings) -> Iterator[Finding]:
    """Yield a truncation or padding that was saved with the tokenizer, as calibration leaves it behind."""
    for key, said in (("truncation", "cuts every prompt"), ("padding", "fills up every prompt")):
        one, other = mine.get(key), theirs.get(key)
        if one and one != other:
            length = one.get("max_length") or (one.get("strategy") or {}) if isinstance(one, dict) else one
            length = length.get("Fixed") if isinstance(length, dict) else length
            what = f"{said}{f' to {length} tokens' if length else ''}, in the reference {other or 'not set'}"
            yield Finding(TOKENIZER, key, FILE, what, f"set {key} to null, which calibration left in the file")
        elif other and not one:
            yield Finding.changed(TOKENIZER, key, FILE, None, other, note=True)


def _content(folder: Folder, reference: Folder, mine: Settings, theirs: Settings) -> Iterator[Finding]:
    # The library would write an added token under the id that a damaged vocabulary gives it.
    same_added = mine.get("added_tokens") == theirs.get("added_tokens")
    own, other = readable_tokenizer(folder), readable_tokenizer(reference)
    if own is not None and other is not None:  # as one version of the library writes both
        mine, theirs = json.loads(own.to_str()), json.loads(other.to_str())
    found = [*_ids(_tokens(mine), _tokens(theirs), FILE), *_model(mine.get("model") or {}, theirs.get("model") or {})]
    if not same_added:
        found += _added(mine.get("added_tokens") or (), theirs.get("added_tokens") or ())
    for part in PARTS:
        if difference := _difference(mine.get(part), theirs.get(part)):
            found.append(Finding(TOKENIZER, part, FILE, difference, RESTORE))
    example = _example(own, other) if found and own and other else ""
    for finding in found:
        yield finding if finding.note else finding.saying(example)


def _model(mine: Settings, theirs: Settings) -> Iterator[Finding]:
    """Yield what differs of the algorithm: its merges, and its settings, of which null and false are the default."""
    ours, others = (_merges(side) for side in (mine, theirs))
    if ours != others:
        at = next((i for i, pair in enumerate(zip(ours, others, strict=False)) if pair[0] != pair[1]), None)
        what = f"{len(ours):,} of them, in the reference {len(others):,}"
        if at is not None:
            what = f"differ from the reference's, the first at {at}: {ours[at]!r}, in the reference {others[at]!r}"
        yield Finding(TOKENIZER, "merges", FILE, what, RESTORE)
    for key in ("ignore_merges", *ALGORITHM):
        if (mine.get(key) or None) != (theirs.get(key) or None):
            yield Finding.changed(TOKENIZER, key, FILE, mine.get(key), theirs.get(key))
    if (mine.get("dropout") or None) != (theirs.get("dropout") or None):
        yield Finding.changed(TOKENIZER, "dropout", FILE, mine.get("dropout"), theirs.get("dropout"), note=True)


def _merges(model: Settings) -> list[str]:
    # older versions write a merge as a text, newer ones as a pair
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]


def _ids(one: Settings, other: Settings, file: str) -> Iterator[Finding]:
    changed = sorted((str(token) for token in {*one, *other} if one.get(token) != other.get(token)), key=_by_length)
    if changed:
        first = changed[0]
        ids = ["none" if side.get(first) is None else str(side[first]) for side in (one, other)]
        what = (
            f"{len(changed)} of {len(other)} tokens have another id, as {first!r}: {ids[0]}, in the reference {ids[1]}"
        )
        yield Finding(TOKENIZER, "vocabulary", file, what, RESTORE)


def _by_length(text: str) -> tuple[int, str]:
    return len(text), text


def _added(mine: Sequence[Settings], theirs: Sequence[Settings]) -> Iterator[Finding]:
    ours, others = ({str(token.get("content")): dict(token) for token in side} for side in (mine, theirs))
    changed = [text for text in {**others, **ours} if ours.get(text) != others.get(text)]
    if changed:
        first = changed[0]
        difference = _difference(ours.get(first), others.get(first))
        what = f"{len(changed)} of {len(others)} differ from the reference's, as {first!r}: {difference}"
        yield Finding(TOKENIZER, "added_tokens", FILE, what, RESTORE)


def _difference(one: Any, other: Any, path: str = "") -> str:
    """Return the first place at which two JSON values differ, and what stands there; empty where none."""
    if isinstance(one, dict) and isinstance(other, dict):
        places = ((f"{path}.{key}", one.get(key), other.get(key)) for key in dict.fromkeys((*other, *one)))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        places = ((f"{path}[{index}]", *pair) for index, pair in enumerate(zip(one, other, strict=True)))
    elif one == other:
        return ""
    else:
        at = f"{path.lstrip('.')}: " if path else ""
        return f"{at}{_short(one)}, in the reference {_short(other)}"
    return next(filter(None, (_difference(mine, theirs, place) for place, mine, theirs in places)), "")


def _short(value: Any) -> str:
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _example(mine: Tokenizer, theirs: Tokenizer) -> str:
    """Return a short text that the two split differently, and how; empty where none of the probes shows it."""
    for tokenizer in (mine, theirs):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    special = [token.content for token in theirs.get_added_tokens_decoder().values()][:20]
    for text in (*PROBES, *special, *(f"a {token} b" for token in special)):
        try:
            one, other = mine.encode(text), theirs.encode(text)
        except Exception as error:  # the library raises plain Exceptions: of a vocabulary without its unknown token
            return f"; {text!r} can't be encoded: {one_line(error)}"
        if one.ids != other.ids:
            return f"; {text!r} becomes {_short(one.tokens)}, in the reference {_short(other.tokens)}"
    return ""


def _all_tokens(folder: Folder) -> dict[str, Any]:
    """Return all tokens of a folder or a GGUF file, added tokens included."""
    if folder.gguf_file:
        return dict(folder.vocabulary)
    tokenizer = folder.json(FILE) or {}
    added = {str(token["content"]): token["id"] for token in tokenizer.get("added_tokens") or ()}
    vocabulary = _tokens(tokenizer)
    plain = {text: entry[0] if isinstance(entry, tuple) else entry for text, entry in vocabulary.items()}
    return {**plain, **added}


def _tokens(tokenizer: Settings) -> dict[str, Any]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # unigram: pairs of a piece and its score
        return {str(entry[0]): (index, entry[1]) for index, entry in enumerate(vocabulary)}
    return dict(vocabulary)


def _digest(folder: Folder) -> str | None:
    file = folder.path / "tokenizer.model"
    refuse_special(file, MOST_JSON)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _settings(folder: Folder, reference: Folder) -> Iterator[Finding]:
    # transformers 4 may keep the special tokens in a file of their own
    mine, theirs = (
        {**(side.json("special_tokens_map.json") or {}), **(side.json(SETTINGS) or {})} for side in (folder, reference)
    )
    for key in (*SPECIAL, *SWITCHES, *NOTED):
        one, other = _text(mine.get(key)), _text(theirs.get(key))
        if one != other:
            # A switch that is off and one that isn't stated are mostly the same, and the steps are compared anyway.
            off = key in SWITCHES and None in (one, other) and not (one or other)
            yield Finding.changed(TOKENIZER, key, SETTINGS, one, other, note=off or key in NOTED)


def _text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value

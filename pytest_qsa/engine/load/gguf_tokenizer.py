"""Whether the tokenizer of a run gives the ids of the GGUF file's own, as llama.cpp reads it from the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ...common import InfraError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LETTERS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2 = _LETTERS.replace("DIGITS", r"\p{N}{1,3}"), _LETTERS.replace("DIGITS", r"\p{N}")
DIGIT_BY_DIGIT: Sequence[str] = (r"\p{N}", GPT2)
PIECES: Mapping[str, Sequence[str]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), DIGIT_BY_DIGIT),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2"), (QWEN2,)),
}
"""`tokenizer.ggml.pre` → the expressions that cut a text, one after the other, as llama.cpp has them by that name."""
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe")
"""Where a piece that is in the vocabulary is one token, whatever the merges say."""
PROBES = ("It's 1234567 times 3.14, isn't it? I'LL SEE…", "Über  größere\n\n\tTabs  und 你好 😀 = x_1 + $9.99;\r\n")
SAMPLE = 20_000
"""So many characters of the shipped text are compared beside the probes."""
TOLERATED = 0.01
"""The share of ids that may differ: transformers' reading of a GGUF cuts ½ and the like otherwise than llama.cpp."""


def compare_gguf_tokens(file: Path, tokenizer: Any) -> str:
    """Compare a tokenizer with that of a GGUF file on sample texts; return what a report says of it.

    Raises:
        InfraError: more than 1 % of the ids differ; the text names the first.
    """
    fields = _fields(file)
    pre = str(fields.get("tokenizer.ggml.pre") or "default")
    if fields.get("tokenizer.ggml.model") != "gpt2" or pre not in PIECES:
        kind = f"{fields.get('tokenizer.ggml.model')} {pre}"
        return f"not compared with the GGUF's own, whose kind ({kind}) is not known here"
    own = _own(fields, pre)
    if own is None:
        return "not compared with the GGUF's own, whose vocabulary and merges don't fit together"
    total = wrong = 0
    first = ""
    for text in _texts():
        theirs, ours = own.encode(text, add_special_tokens=False).ids, _ids(tokenizer, text)
        total += len(theirs)
        wrong += _differing(theirs, ours)
        if theirs != ours and not first:
            first = _difference(own, theirs, ours)
    if wrong > TOLERATED * total:
        raise InfraError(
            f"{wrong} of {total} ids of this run's tokenizer are not those of {file.name}, whose pre-tokenizer is "
            f"{_named(fields)}: {first}; the numbers would be another model's than the one that is served"
        )
    said = f"the GGUF's own ids ({pre}) on sample texts"
    return f"{said} but for {wrong} of {total}: {first}" if wrong else said


def _differing(theirs: Sequence[int], ours: Sequence[int]) -> int:
    """Count the ids between what two sequences have in common at their beginning and at their end."""
    least = min(len(theirs), len(ours))
    front = next((i for i in range(least) if theirs[i] != ours[i]), least)
    back = next((i for i in range(least - front) if theirs[-1 - i] != ours[-1 - i]), least - front)
    return max(len(theirs), len(ours)) - front - back


def _fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    names = ("model", "pre", "tokens", "merges")
    found = GGUFReader(file).fields
    wanted = [f"tokenizer.ggml.{name}" for name in names]
    return {name: found[name].contents() for name in wanted if name in found}


def _named(fields: Mapping[str, Any]) -> str:
    return str(fields.get("tokenizer.ggml.pre") or "not named, so that llama.cpp takes 'default'")


def _own(fields: Mapping[str, Any], pre: str) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(fields.get("tokenizer.ggml.tokens") or ())}
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges") or ()]
    try:
        own = Tokenizer(models.BPE(vocab=words, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    except Exception:  # of Rust: a merge that makes a word that isn't there
        return None
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PIECES[pre]]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_only])
    return own


def _texts() -> Iterator[str]:
    yield from PROBES
    text = resources.files("pytest_qsa.suite.data").joinpath("sample.txt").read_text(encoding="utf-8")
    yield from text[:SAMPLE].splitlines(keepends=True)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _difference(own: Any, theirs: Sequence[int], ours: Sequence[int]) -> str:
    """Name the first ids that differ, with the text that they stand for and what is before it."""
    pairs = enumerate(zip(theirs, ours, strict=False))
    at = next((i for i, (one, other) in pairs if one != other), min(len(theirs), len(ours)))
    before, here = (_text(own, part) for part in (theirs[max(0, at - 6) : at], theirs[at : at + 4]))
    return f"after {before!r}, {here!r} is {list(theirs[at : at + 4])} there and {list(ours[at : at + 4])} here"


def _text(own: Any, ids: Sequence[int]) -> str:
    from tokenizers import decoders

    words = [own.id_to_token(token) for token in ids]
    return str(decoders.ByteLevel().decode(words)) if words else ""

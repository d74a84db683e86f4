"""The files of settings beside the weights: whether what they state is of the kind that their readers take.

transformers loads most odd values without a word, and a server fails on them, or generates otherwise, hours later.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..common import AnomalyError, logger, one_line
from .folder import TEMPLATE_FILE, Folder, Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG, GENERATION, TOKENIZER_JSON = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")
"""The keys of tokenizer.json for the members of a step that is a sequence."""


@dataclass(frozen=True)
class _Rule:
    """What the keys of a pattern have to be where they are stated. `kind`: the words for it."""

    keys: str
    kind: str
    holds: Callable[[Any], bool]

    def applies(self, key: str) -> bool:
        """Say whether it is for a key, by its own name or by that with the names of the sections around it."""
        return any(re.fullmatch(self.keys, name) for name in (key, key.rpartition(".")[2]))


def _number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _positive(value: Any) -> bool:
    return _number(value, least=0) and value > 0


def _whole(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, int) and _number(value, least)


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _dtype(value: Any) -> bool:
    return (
        _text(value)
        and re.fullmatch(r"(torch\.)?(b?float16|float(32|64)?|half|double|float8_\w+|auto)", value) is not None
    )


def _section(value: Any) -> bool:
    return isinstance(value, dict)


def _token(value: Any) -> bool:
    return _text(value) or (_section(value) and _text(value.get("content")))


def _added(value: Any) -> bool:
    return _section(value) and _text(value.get("content")) and _whole(value.get("id"), 0)


def _tokens_by_id(value: Any) -> bool:
    return _section(value) and all(key.isdecimal() and _token(each) for key, each in value.items())


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _or_list(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: holds(value) or _list_of(holds)(value)


def _templates(value: Any) -> bool:
    """Say whether it is a template, or several by name: a list of pairs, as they are saved, or a section."""
    if _section(value):
        return all(map(_text, value.values()))
    pairs = _list_of(lambda each: _section(each) and _text(each.get("name")) and _text(each.get("template")))
    return _text(value) or pairs(value)


_SPECIAL = _Rule("(bos|eos|unk|sep|pad|cls|mask)_token", "a text, or a section with its content", _token)
_SWITCH = "true or false"
_SECTION = "a section of settings"
_OF_PROCESSORS = (
    _Rule(r"do_\w+", _SWITCH, _switch),
    _Rule("image_(mean|std)", "a number, or a list of numbers", _or_list(_number)),
    _Rule("(image_processor|feature_extractor|video_processor)_type|processor_class", "a name", _text),
    _Rule("rescale_factor|sampling_rate", "a number above 0", _positive),
)
RULES: Mapping[str, Sequence[_Rule]] = {
    CONFIG: (
        _Rule("architectures", "a list of names of classes", _list_of(_text)),
        _Rule(r"(\w+_)?eps(ilon)?", "a number that isn't negative", lambda value: _number(value, 0)),
        _Rule("rope_theta", "a number above 0", _or_list(_positive)),
        _Rule("num_bits", "a whole number above 0", lambda value: _whole(value, 1)),
        _Rule(r".*(quant|compress)\w*\.(.+\.)?(torch_)?dtype", "a name", _text),
        _Rule("(torch_)?dtype", "the name of one of torch's", _dtype),
        _Rule("num_hidden_layers", "a whole number", lambda value: _section(value) or _whole(value, 0)),
        _Rule("(text|vision|quantization)_config|rope_(parameters|scaling)", _SECTION, _section),
        _Rule(r"quantization_config\.quant_method", "a name", _text),
        _Rule(r"quantization_config\.(.*\.)?(ignore|targets)", "a list of names", _list_of(_text)),
        _Rule(r"quantization_config\.config_groups\.\w+(\.weights|\.\w+put_activations)?", _SECTION, _section),
        _Rule(r"quantization_config\.kv_cache_scheme", _SECTION, _section),
    ),
    GENERATION: (
        _Rule("temperature", "a number that isn't negative", lambda value: _number(value, 0)),
        _Rule("repetition_penalty", "a number above 0", _positive),
        _Rule("(top|min|typical)_p|(epsilon|eta)_cutoff", "a number from 0 to 1", lambda value: _number(value, 0, 1)),
        _Rule("length_penalty|diversity_penalty|guidance_scale", "a number", _number),
        _Rule("top_k", "a whole number", lambda value: _whole(value, -1)),
        _Rule(r"(max|min)_(new_tokens|length)|no_repeat_ngram_size", "a whole number", _whole),
        _Rule("num_beams|num_return_sequences", "a whole number above 0", lambda value: _whole(value, 1)),
        _Rule("do_sample|use_cache", _SWITCH, _switch),
        _Rule("eos_token_id", "the id of a token, or a list of ids", _or_list(lambda value: _whole(value, 0))),
        _Rule("(bos|pad|decoder_start|forced_[be]os)_token_id", "the id of a token", _or_list(_whole)),
        _Rule("(begin_)?suppress_tokens", "a list of ids of tokens", _list_of(_whole)),
        _Rule("stop_strings", "a text, or a list of texts", _or_list(_text)),
    ),
    TOKENIZER_JSON: (
        _Rule("model|truncation|padding|normalizer|pre_tokenizer|post_processor|decoder", _SECTION, _section),
        _Rule("added_tokens", "a list of tokens, each with its id and content", _list_of(_added)),
    ),
    TOKENIZER_SETTINGS: (
        _SPECIAL,
        _Rule("chat_template", "a template, or a list of templates by name", _templates),
        _Rule("model_max_length", "a number", _number),
        _Rule("(padding|truncation)_side", "left or right", lambda value: value in ("left", "right")),
        _Rule("add_(bos|eos)_token|add_prefix_space", _SWITCH, _switch),
        _Rule("tokenizer_class", "a name", _text),
        _Rule("added_tokens_decoder", "a section of tokens by id", _tokens_by_id),
        _Rule("additional_special_tokens", "a list of tokens", _list_of(_token)),
        _Rule("extra_special_tokens", "a list or a section of tokens", lambda value: isinstance(value, list | dict)),
        _Rule("model_input_names", "a list of names", _list_of(_text)),
    ),
    "special_tokens_map.json": (_SPECIAL,),
    "added_tokens.json": (_Rule(".*", "the id of a token", lambda value: _whole(value, 0)),),
    "chat_template.json": (_Rule("chat_template", "a template", _templates),),
    **dict.fromkeys(PROCESSORS, _OF_PROCESSORS),
}
MOST_GROWTH = 1_000
"""How many times as long as a text a tokenizer's steps may make it; a space that becomes `▁` has three bytes."""
MOST_ADDED = 1_000
"""The most tokens that a tokenizer adds to a text."""
OF_A_LOAD = (CONFIG, GENERATION)
"""What every load reads."""
OF_A_TOKENIZER = (TOKENIZER_SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.json")
"""What is read beside tokenizer.json, whose own reader says best what is wrong with it."""


def check_side_files(folder: Folder, names: Iterable[str] = RULES) -> None:
    """Check that files of settings hold what their keys stand for, and templates that can be parsed.

    A value of null is one that isn't stated.

    Raises:
        AnomalyError: a file isn't, or a value in it isn't what its key stands for; the text names both.
        InfraError: a file can't be read, or is a pointer of git-lfs.
    """
    if folder.gguf_file:
        return
    for name in names:
        content = folder.json(name) or {}
        # Only in config.json may the settings of a part stand: in the others a section is a token, or a vocabulary.
        settings = nested_settings(content) if name == CONFIG else content.items()
        for key, value in settings:
            rule = next((rule for rule in RULES[name] if rule.applies(key)), None)
            if rule and value is not None and not rule.holds(value):
                raise AnomalyError(
                    f"{folder.path / name}: {key} is {value!r:.60}, and not {rule.kind}: correct it, or copy the file "
                    "from the original"
                )
    if GENERATION in names:
        _check_stop_tokens(folder)
    if TOKENIZER_SETTINGS in names:
        _check_templates(folder)


def _check_stop_tokens(folder: Folder) -> None:
    """Check that a language model can make one of its stop tokens, without which generation never ends.

    Raises:
        AnomalyError: it can't.
    """
    config, stated = folder.text_config, (folder.json(GENERATION) or {}).get("eos_token_id")
    size = config.get("vocab_size")
    ids: list[int] = stated if isinstance(stated, list) else [stated or 0]
    causal = any("ForCausalLM" in name for name in config.get("architectures") or ())
    if stated and causal and isinstance(size, int) and all(token >= size for token in ids):
        raise AnomalyError(
            f"{folder.path / GENERATION}: eos_token_id is {stated}, and the vocabulary has {size} tokens: generation "
            "never ends; take it from the original"
        )


def nested_settings(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all settings and those of their sections, with dotted names."""
    for key, value in settings.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from nested_settings(value, f"{prefix}{key}.")


def _check_templates(folder: Folder) -> None:
    more = sorted(folder.path.glob("additional_chat_templates/*.jinja"))
    for name in (TEMPLATE_FILE, *(str(file.relative_to(folder.path)) for file in more)):
        _check_template(f"{folder.path / name}", folder.template(name))
    for name in (TOKENIZER_SETTINGS, "chat_template.json"):
        stated = (folder.json(name) or {}).get("chat_template")
        if isinstance(stated, list):
            stated = {each["name"]: each["template"] for each in stated}
        for text in stated.values() if isinstance(stated, dict) else (stated,):
            _check_template(f"{folder.path / name}: chat_template", text)


def _check_template(where: str, text: str | None) -> None:
    """Check that a template can be parsed, with the tags that transformers adds to jinja's; it is never rendered.

    Raises:
        AnomalyError: it can't.
    """
    if not text:
        return
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """What the assistant says, marked for a training on it alone."""

        tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    try:
        Environment(extensions=[Generation, "jinja2.ext.loopcontrols"], autoescape=True).parse(text)
    except TemplateSyntaxError as error:
        if "unknown tag" not in str(error):  # it may be another program's
            what = f"line {error.lineno}: {one_line(error)}"
            raise AnomalyError(f"{where} can't be parsed, {what}: copy it from the original") from None
    except RecursionError:
        raise AnomalyError(f"{where} is nested too deeply to be parsed") from None


def readable_tokenizer(folder: Folder) -> Tokenizer | None:
    """Return the tokenizer of tokenizer.json; None where there is none, or one with a step of a newer library.

    Raises:
        AnomalyError: no tokenizer can be made of it.
        InfraError: it can't be read.
    """
    stated = folder.json(TOKENIZER_JSON)
    if stated is None:
        return None
    from tokenizers import Tokenizer

    file = folder.path / TOKENIZER_JSON
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exceptions
        if unknown := unknown_step(stated):
            logger.debug("the installed tokenizers doesn't know %s of %s", unknown, file)
            return None
        raise AnomalyError(f"no tokenizer can be made of {file}: {one_line(error)}") from None
    check_growth(tokenizer, str(file))
    return tokenizer


def check_growth(tokenizer: Tokenizer, where: str) -> None:
    """Check that no steps of a tokenizer make a text very long: nothing could stop them, for they aren't Python's.

    Raises:
        AnomalyError: they could.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        try:
            stated = json.loads(getattr(tokenizer, part).__getstate__())
        except Exception:  # there is none, or it is a program of the user's own
            continue
        if part == "post_processor":
            if (added := sum(map(_added_tokens, _steps(stated)))) > MOST_ADDED:
                raise AnomalyError(
                    f"{where}: its post_processor adds {added:,} tokens to each text; take it from the original"
                )
        elif (growth := prod(map(growth_of, _steps(stated)))) > MOST_GROWTH:
            raise AnomalyError(
                f"{where}: its {part} makes a text up to {growth:,.0f} times as long; take it from the original"
            )


def _added_tokens(step: Settings) -> int:
    """Return how many tokens a step adds to a text."""
    tokens = step.get("special_tokens")
    ids = {name: len(each["ids"]) for name, each in tokens.items()} if isinstance(tokens, dict) else {}
    return sum(ids.get(each.get("SpecialToken", {}).get("id"), 0) for each in step.get("single") or ())


def growth_of(step: Settings) -> float:
    """Return how many times as long in bytes a step may make a text, those aside that Unicode itself bounds."""
    kind, content = step.get("type"), str(step.get("content", ""))
    if kind == "Replace":
        pattern = step.get("pattern")
        replaced = len(str(pattern.get("String") or " ").encode()) if isinstance(pattern, dict) else 1
        return max(1.0, len(content.encode()) / replaced)
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend", "")).encode())
    if kind == "Precompiled":  # the trie's size, the trie, and behind it the texts that it replaces others by
        table = base64.b64decode(step.get("precompiled_charsmap") or "")
        texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
        return max(1.0, *map(len, texts))
    return {"ByteLevel": 2.0, "Metaspace": 3.0}.get(str(kind), 1.0)


def unknown_step(tokenizer: Settings) -> str:
    """Return the name of a step that the installed tokenizers doesn't know, a newer one's say; empty for none."""
    import tokenizers

    for part, known in (
        ("model", tokenizers.models),
        ("normalizer", tokenizers.normalizers),
        ("pre_tokenizer", tokenizers.pre_tokenizers),
        ("post_processor", tokenizers.processors),
        ("decoder", tokenizers.decoders),
    ):
        named = (name for name in _types(tokenizer.get(part)) if not hasattr(known, name))
        if unknown := next(named, ""):
            return unknown
    return ""


def _types(section: Any) -> Iterator[str]:
    """Yield the `type` of a step and of those that it is a sequence of."""
    return (kind for step in _steps(section) if isinstance(kind := step.get("type"), str))


def _steps(section: Any) -> Iterator[Settings]:
    """Yield a step and those that it is a sequence of."""
    if isinstance(section, dict):
        yield section
        parts = (each for key in SEQUENCES if isinstance(section.get(key), list) for each in section[key])
        yield from (step for each in parts for step in _steps(each))

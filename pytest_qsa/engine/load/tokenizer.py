"""The tokenizer of a checkpoint: loaded, named in reports, and compared with the one inside a GGUF file."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil

from ...checkpoint import OF_A_TOKENIZER, Folder, check_growth, check_side_files, readable_tokenizer
from ...common import AnomalyError, InfraError, one_line
from ...suite import SHIPPED, Conversation, conversation_of

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)
"""The files that show that a folder has a tokenizer."""
FILE = TOKENIZER_FILES[0]
TEMPLATE_BYTES = 1_000_000_000
TEMPLATE_SECONDS, SECONDS_PER_TEXT = 5.0, 0.02
"""The limits of a chat template: memory, and processor time for all texts; a real one takes under 1 ms a text."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What is needed of a tokenizer: token ids → text."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of some tokens."""


class TextTokenizer(Tokenizer, Protocol):
    """What batches of a text are made with: one of transformers' tokenizers, or a fixture's own."""

    def __call__(self, text: str, **options: bool) -> Mapping[str, list[int]]:
        """Return the `input_ids` of a text."""

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, **options: Any) -> object:
        """Return the text of a conversation."""


def templated(texts: Sequence[Any], tokenizer: TextTokenizer) -> list[str]:
    """Put texts, or the messages of conversations, into the tokenizer's own chat template, a program of its author.

    Raises:
        AnomalyError: it takes more memory or time than a template needs.
        InfraError: the tokenizer has none, or it can't format a conversation.
    """
    conversations = [conversation_of(text) for text in texts]
    seconds = TEMPLATE_SECONDS + len(texts) * SECONDS_PER_TEXT
    try:
        with _limited(TEMPLATE_BYTES, seconds):
            asked = [offered(each, tokenizer, "data.chat_template") for each in conversations]
            return [str(tokenizer.apply_chat_template(each, tokenize=False, **tools)) for each, tools in asked]
    except InfraError:
        raise
    except MemoryError:
        what = f"takes more than {TEMPLATE_BYTES / 1e9:.0f} GB"
    except TimeoutError:
        what = f"takes more than {seconds:.0f} s"
    except Exception as error:  # jinja2's errors, and transformers' for a tokenizer without a template
        raise InfraError(f"data.chat_template: the tokenizer can't format a conversation: {error}") from None
    raise AnomalyError(f"data.chat_template: the checkpoint's chat template {what}: look at what it does")


def offered(
    conversation: Conversation, tokenizer: TextTokenizer, asked_by: str
) -> tuple[list[Any], Mapping[str, list[Any]]]:
    """Return the messages of a conversation for a tokenizer's template, and the argument with its tools, if any.

    A template without a place for tools gets the conversation's words for them. `asked_by`: the section of the suite
    that asks, for messages. What the template raises passes.

    Raises:
        InfraError: it has no place for them, and the conversation no words.
    """
    messages, tools = list(conversation.messages), list(conversation.tools)
    if not tools:
        return messages, {}
    bare = tokenizer.apply_chat_template(messages, tokenize=False)
    if tokenizer.apply_chat_template(messages, tokenize=False, tools=tools) != bare:
        return messages, {"tools": tools}
    if not conversation.in_words:
        raise InfraError(
            f"{asked_by}: the chat template has no place for the tools that a conversation offers, so the model would "
            "never see them: describe them in the messages, and leave tools out"
        )
    return list(conversation.in_words), {}


@contextmanager
def _limited(size: int, seconds: float) -> Iterator[None]:
    """Let the process take so many more bytes, and so much processor time; where the system can't, it isn't limited.

    Raises:
        MemoryError: it needed more.
        TimeoutError: it took longer. Only the main thread can be stopped.
    """
    with ExitStack() as after:
        if sys.platform == "linux":
            import resource

            old = resource.getrlimit(resource.RLIMIT_AS)
            most = psutil.Process().memory_info().vms + size
            if old[0] in (resource.RLIM_INFINITY, -1) or most < old[0]:
                resource.setrlimit(resource.RLIMIT_AS, (most, old[1]))
                after.callback(resource.setrlimit, resource.RLIMIT_AS, old)
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            after.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, _too_long))
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            after.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
        yield


def _too_long(*_: object) -> None:
    raise TimeoutError


def decoder_of(tokenizer: Tokenizer | None) -> Callable[[Sequence[int]], Mapping[int, str]] | None:
    """Return a function that decodes tokens one by one; a part of a character is shown as the vocabulary spells it."""
    if tokenizer is None:
        return None

    def decode(ids: Sequence[int]) -> Mapping[int, str]:
        return {token: _piece(tokenizer, token) for token in ids}

    return decode


def _piece(tokenizer: Tokenizer, token: int) -> str:
    text = str(tokenizer.decode([token]))
    if REPLACEMENT in text and hasattr(tokenizer, "convert_ids_to_tokens"):
        return str(tokenizer.convert_ids_to_tokens(token))
    return text


def tokenizer_identity(tokenizer: Tokenizer | None) -> str | None:
    """Return the class, size and hash of a tokenizer, so that a report can say which one it was; None for none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # The hash leaves out truncation and padding, which stand before `added_tokens`: each call changes them.
        text = backend.to_str().partition('"added_tokens"')[2]
    elif hasattr(tokenizer, "get_vocab"):
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        return type(tokenizer).__name__
    size = f", {len(tokenizer):,} entries" if isinstance(tokenizer, Sized) else ""
    return f"{type(tokenizer).__name__}{size}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def load_tokenizer(path: str, arguments: dict[str, Any]) -> TextTokenizer | None:
    """Load the tokenizer of a checkpoint; None for a folder that has none. `arguments`: of `from_pretrained`.

    Raises:
        AnomalyError: its files are to blame.
        InfraError: the installation is, or what it lacks; or one of them is too large to be read.
    """
    import transformers

    folder = Folder(Path(path), arguments.get("gguf_file"))
    folder.check_sizes()
    if folder.path.is_dir():
        check_side_files(folder, OF_A_TOKENIZER)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **arguments)
    except Exception as error:  # transformers, tokenizers and jinja2 raise errors of their own, and ImportError
        if "trust_remote_code" in str(error) and not arguments.get("trust_remote_code"):
            raise InfraError(
                f"the tokenizer of {path} has code of its own: set model.trust_remote_code and allow it with "
                "--qsa-allow-code"
            ) from error
        # transformers raises for a folder without a tokenizer too, which is no error here.
        if folder.path.is_dir() and not _has_tokenizer(folder):
            return None
        reason = f"{type(error).__name__}: {one_line(error)}"
        if fault := _fault_of_files(folder, error):
            raise AnomalyError(f"{fault}: {reason}") from error
        raise InfraError(f"the tokenizer of {path} can't be loaded: {reason}") from error
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        check_growth(backend, f"the tokenizer of {path}")
    return tokenizer  # type: ignore[no-any-return]


def _fault_of_files(folder: Folder, error: Exception) -> str | None:
    """Say which file of a tokenizer has stopped its loading; None where this machine lacks something instead.

    Raises:
        AnomalyError: one of them is no JSON object.
    """
    held = [file for file in TOKENIZER_FILES if (folder.path / file).is_file()]
    for name in (file for file in held if file.endswith(".json") and file != "tekken.json"):
        folder.json(name)
    if folder.gguf_file or not folder.path.is_dir() or isinstance(error, ImportError | MemoryError):
        return None
    if FILE not in held:
        return f"{folder.path} holds no {FILE}, and no tokenizer can be made of {', '.join(held)} alone"
    check_side_files(folder, (FILE,))
    if readable_tokenizer(folder) is None:  # it has a step of a newer library
        return None
    return f"no tokenizer can be made of {folder.path / FILE}"


def _has_tokenizer(folder: Folder) -> bool:
    files = any((folder.path / name).is_file() for name in TOKENIZER_FILES) or any(folder.path.glob("*.tiktoken"))
    return files or bool(folder.vocabulary)


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
"""`tokenizer.ggml.pre` → the expressions by which llama.cpp cuts a text, one after the other."""
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe")
"""The pre-tokenizers with which a piece of the vocabulary is one token, whatever the merges say."""
_PROBES = ("It's 1234567 times 3.14, isn't it? I'LL SEE…", "Über  größere\n\n\tTabs  und 你好 😀 = x_1 + $9.99;\r\n")
SAMPLE = 20_000
"""The number of characters of the shipped text that are compared, besides the probes."""
TOLERATED = 0.01
"""The share of ids that may differ: transformers cuts some texts, such as ` ½`, otherwise than llama.cpp."""


def compare_gguf_tokens(file: Path, tokenizer: TextTokenizer) -> str:
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
    """Count the ids between the common beginning and the common end of two sequences."""
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
    except Exception:  # raised by Rust: a merge makes a word that isn't in the vocabulary
        return None
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PIECES[pre]]
    # Without its own expression, which would cut the pieces once more.
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_only])
    return own


def _texts() -> Iterator[str]:
    yield from _PROBES
    text = SHIPPED["sample"]()
    # Line by line: in one text all ids between two differences would count as differing.
    yield from text[:SAMPLE].splitlines(keepends=True)


def _ids(tokenizer: TextTokenizer, text: str) -> list[int]:
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

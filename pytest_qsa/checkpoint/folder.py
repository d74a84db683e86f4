"""A checkpoint's folder without a model: its tensors by name, its configuration, its layers in order."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ..common import (
    AnomalyError,
    InfraError,
    QsaError,
    did_you_mean,
    logger,
    mistaken_for,
    one_line,
    parsed_json,
    refuse_special,
)
from .gguf_file import GgufFile, read_gguf
from .tensors import LFS_POINTER, Tensor, metadata_of, tensors_of

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
Settings = Mapping[str, Any]
"""A part of a JSON file: of config.json, say."""
TEMPLATE_FILE = "chat_template.jinja"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
"""The file that makes a folder an adapter's, as peft saves it."""
ADAPTER_FILES = "adapter_model*.safetensors"
NO_MODEL = re.compile(r"(consolidated|optimizer|scheduler|train(er|ing)|rng_state|random_states|ema)([._-].*|\d*)")
"""The names, without suffix, of files beside a model's: the original layout of Mistral, the state of a training."""
OTHER_WEIGHTS = ("bin", "pt", "pth", "h5", "msgpack", "onnx")
"""The suffixes of weights that only other programs read."""
MOST_TENSORS = 400_000
"""Checking them takes about 1 GB. Kimi K2 in NVFP4 has 280,000: four for each of 69,000 linear layers."""
MOST_JSON, MOST_TEMPLATE = 250_000_000, 10_000_000
"""The largest JSON file and chat template of a checkpoint, in bytes; the largest known are a tenth of them."""
READ_WHOLE = {
    re.compile(r".*\.jinja"): MOST_TEMPLATE,
    re.compile(r"(|.*_)config\.json|.*\.index\.json|special_tokens_map\.json|.*\.model"): MOST_JSON,
    re.compile(r"tokenizer.*|(vocab|merges|tekken|added_tokens|chat_template)\..*"): MOST_JSON,
}
"""The names of what loaders read whole beside the weights → the most bytes of such a file."""
RECIPE, GPTQ_MODIFIER = "recipe.yaml", "GPTQModifier"
"""The file in which llm-compressor writes how a checkpoint was made, and its name of GPTQ."""
MOST_BLOCKS = 10_000
"""The most blocks of a model, and experts of a block; the deepest known models have 1,000 blocks."""
_BLOCK = re.compile(r"(?<![^.\n])(?:layers?|h|blocks?|blk)\.\d{5,}(?=\.)")
_LONG_NUMBER = re.compile(r"\.\d{5,}\.")  # found twenty times as fast: it begins with one character
_COUNT = re.compile(r"(layers?|blocks?|experts?|depth)$")
"""The settings by which a class of transformers makes so many modules."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
RESTORE = "take it from the reference, or change the reference if it is meant so"
"""The advice on what differs from the reference."""


@dataclass(frozen=True)
class Finding:
    """One problem of a checkpoint. `layer`: the module; `tensor`: the tensor or the setting; `file`: where it is.

    `note`: worth knowing and no problem: it is shown, and never counted.
    """

    layer: str
    tensor: str
    file: str
    what: str
    advice: str
    note: bool = False

    @classmethod
    def at(cls, tensor: Tensor, what: str, advice: str, *, note: bool = False) -> Finding:
        """Return a problem of a tensor of the files."""
        return cls(tensor.layer, tensor.name, tensor.file, what, advice, note)

    @classmethod
    def changed(cls, layer: str, key: str, file: str, one: Any, other: Any, *, note: bool = False) -> Finding:
        """Return the finding of a setting that is `one` here and `other` in the reference."""
        return cls(layer, key, file, f"{shown(one)}, in the reference {shown(other)}", RESTORE, note)

    def saying(self, more: str) -> Finding:
        """Return the same finding that says more of what it is."""
        return replace(self, what=f"{self.what}{more}")

    def __str__(self) -> str:
        """Write it in one line: `tensor (file): what; advice`; a note says that it is one."""
        where = f" ({self.file})" if self.file else ""
        return f"{'note: ' if self.note else ''}{self.tensor}{where}: {self.what}; {self.advice}"


def shown(value: Any) -> str:
    """Write the value of a setting, cut to 60 characters."""
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@dataclass(frozen=True, eq=False)
class Folder:
    """A checkpoint on disk, read lazily: of the tensors first the headers alone.

    `gguf_file`: the one file that is read instead of safetensors. `apart`: the folder of an adapter of this checkpoint,
    where that isn't the same.
    """

    path: Path
    gguf_file: str | None = None
    apart: Path | None = None

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of the adapter that changes its weights; None for a checkpoint without one."""
        folder = self.apart or self.path
        return folder if (folder / ADAPTER).is_file() else None

    @cached_property
    def _gguf(self) -> GgufFile | None:
        return read_gguf(self.path / self.gguf_file) if self.gguf_file else None

    @property
    def architecture(self) -> str:
        """The architecture that a GGUF file names; empty for a folder, whose config.json names a class."""
        return self._gguf.architecture if self._gguf else ""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The tokens of a GGUF file → their ids; empty for a folder, whose tokenizer.json has more to say."""
        return self._gguf.vocabulary if self._gguf else {}

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name, in the natural order of their names; those of an adapter are no part of them.

        Raises:
            AnomalyError: a file is damaged, or there is none.
            InfraError: one can't be read, or they are of a kind that isn't read here.
        """
        return {name: self._all_copies[name][-1] for name in sorted(self._all_copies, key=natural)}

    @cached_property
    def files(self) -> Sequence[Path]:
        """The safetensors files of the model, by name; none of an adapter, of a training, of another layout."""
        found = set(self.path.glob("*.safetensors")) - set(self.path.glob(ADAPTER_FILES))
        model = {file for file in found if not NO_MODEL.fullmatch(file.stem) or file.name in self.indexed.values()}
        return sorted(model or found)

    @property
    def copies(self) -> Mapping[str, Sequence[Tensor]]:
        """The tensors that lie in several files: name → all of them, the one that counts here last."""
        return {name: copies for name, copies in self._all_copies.items() if len(copies) > 1}

    @cached_property
    def _all_copies(self) -> Mapping[str, Sequence[Tensor]]:
        """All tensors by name. Of several that of the index counts, as for servers, else that of the last file."""
        if self._gguf:
            return {tensor.name: [tensor] for tensor in self._gguf.tensors}
        if not self.files:
            raise self._no_weights()
        copies: dict[str, list[Tensor]] = {}
        for file in self.files:
            for tensor in tensors_of(file):
                copies.setdefault(tensor.name, []).append(tensor)
            if len(copies) > MOST_TENSORS:
                raise self._too_many(len(copies), "")
        names = "\n".join(copies)
        if _LONG_NUMBER.search(names) and (deep := _BLOCK.search(names)):
            raise AnomalyError(f"{self.path} holds {deep[0]}, and no known model has more than {MOST_BLOCKS:,} blocks")
        for name, tensors in copies.items() if len(self.files) > 1 else ():
            tensors.sort(key=lambda tensor: self.indexed.get(name) == tensor.file)
        return copies

    def _no_weights(self) -> QsaError:
        """Make the error of a folder without safetensors: weights of another kind may be sound."""
        gguf = any(self.path.glob("*.gguf"))
        if not gguf and (others := sorted(file.name for end in OTHER_WEIGHTS for file in self.path.glob(f"*.{end}"))):
            return InfraError(f"{self.path} holds no .safetensors file, and {others[0]} is not read here")
        return self._lacking("weights, no .safetensors file")

    def _lacking(self, what: str) -> QsaError:
        if gguf := sorted(self.path.glob("*.gguf")):
            return InfraError(f"{self.path} holds no {what}: name the file, model.gguf_file: {gguf[0].name}")
        lacks = f"holds no {what}" if any(self.path.iterdir()) else "is empty"
        # an archive that was unpacked a folder too deep, and the hub's cache, whose copies lie in `snapshots`
        inside = sorted(file for place in ("*", "snapshots/*") for file in self.path.glob(f"{place}/config.json"))
        advice = f"give {inside[0].parent}, which is one" if inside else "copy or download the checkpoint again"
        return AnomalyError(f"{self.path} {lacks}: {advice}")

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """What the headers of all safetensors files say beside the tensors; empty for a GGUF file.

        Raises:
            AnomalyError: a file is damaged.
            InfraError: one can't be read.
        """
        files = [] if self._gguf else sorted(self.path.glob("*.safetensors"))
        return {key: text for file in files for key, text in metadata_of(file).items()}

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Each module that owns tensors, in natural order: its name → its tensors by part, as `weight_scale`."""
        layers: dict[str, dict[str, Tensor]] = {}
        for tensor in self.tensors.values():
            layers.setdefault(tensor.layer, {})[tensor.part] = tensor
        return layers

    @cached_property
    def kinds(self) -> Mapping[str, str]:
        """Each of the `layers` → its kind, the same text for all layers of a kind."""
        shared: dict[str, str] = {}
        return {layer: shared.setdefault(kind, kind) for layer in self.layers for kind in [kind_of(layer)]}

    @cached_property
    def config(self) -> Settings:
        """The content of config.json, or the settings of a GGUF file under the same names.

        Raises:
            AnomalyError: there is none, or it is no JSON object.
            InfraError: it can't be read.
        """
        if self._gguf:
            return self._gguf.settings
        if (content := self.json("config.json")) is not None:
            return content
        raise self._lacking("config.json")

    def check_counts(self) -> None:
        """Check that the configuration doesn't count more blocks or experts than any model has: each takes time.

        Raises:
            AnomalyError: it does.
        """
        for part, settings in (("", self.config), *self.config.items()):
            for key, value in settings.items() if isinstance(settings, dict) else ():
                if isinstance(value, int) and value > MOST_BLOCKS and _COUNT.search(key):
                    where = f"{part}.{key}" if part else key
                    what = f"{where} is {shown(value)}, and no known model has more than {MOST_BLOCKS:,}"
                    raise AnomalyError(f"{self.path / 'config.json'}: {what}: compare it to the original's")

    @property
    def text_config(self) -> Settings:
        """The configuration of the language model: config.json, or its part of that name in a multimodal one."""
        part = self.config.get("text_config")
        return {**self.config, **part} if isinstance(part, dict) else self.config

    @property
    def quantization(self) -> Settings:
        """The `quantization_config`; empty for a checkpoint that declares none, and for a GGUF file."""
        if self.gguf_file:
            return {}
        declared = self.text_config.get("quantization_config")
        return declared if isinstance(declared, dict) else {}

    @cached_property
    def by_gptq(self) -> str:
        """Where the checkpoint says that GPTQ made it; empty where nothing says so.

        GPTQ corrects later columns of a weight for the rounding of earlier ones, so it lies farther from the original
        than rounding does (Frantar et al., arXiv 2210.17323).

        Raises:
            AnomalyError: the recipe is no text.
            InfraError: it can't be read.
        """
        if self.quantization.get("quant_method") == "gptq":
            return "quant_method in config.json"
        return RECIPE if GPTQ_MODIFIER in (self.template(RECIPE) or "") else ""

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the content of one of a checkpoint's JSON files, all of which are objects; None where there is none.

        Raises:
            AnomalyError: it is no JSON object.
            InfraError: it can't be read, or is a pointer of git-lfs.
        """
        file = self.path / name
        if not file.is_file():
            return None
        refuse_special(file, MOST_JSON)
        try:
            text = file.read_bytes()
            if text.startswith(LFS_POINTER):
                raise InfraError(f"{file} is a git-lfs pointer, not the file: run `git lfs pull`")
            if other := mistaken_for(text):
                raise AnomalyError(f"{file} {other}")
            content = parsed_json(text.decode("utf-8"), constant=_constant)
        except OSError as error:
            raise InfraError(f"{file} can't be read: {error.strerror or error}") from None
        except ValueError as error:
            raise AnomalyError(f"{file} is no JSON: {error}; copy or download it again") from None
        if not isinstance(content, dict):
            raise AnomalyError(f"{file} is no JSON object but a {type(content).__name__}: copy or download it again")
        return content

    def template(self, name: str = TEMPLATE_FILE) -> str | None:
        """Return the text of a chat template that lies in a file of its own; None where there is none.

        Raises:
            AnomalyError: it is no text.
            InfraError: it can't be read, is too large, or is a pointer of git-lfs.
        """
        file = self.path / name
        if not file.is_file():
            return None
        refuse_special(file, MOST_TEMPLATE)
        try:
            text = file.read_text(encoding="utf-8")
            if text.encode().startswith(LFS_POINTER):
                raise InfraError(f"{file} is a git-lfs pointer, not the file: run `git lfs pull`")
            return text
        except OSError as error:
            raise InfraError(f"{file} can't be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise AnomalyError(f"{file} is no text: {error}") from None

    def check_sizes(self) -> None:
        """Refuse what a loader would read whole and never come to an end with.

        Raises:
            InfraError: such a file is too large, or is no regular file.
        """
        for folder in (self.path, self.path / "additional_chat_templates"):
            for file in folder.iterdir() if folder.is_dir() else ():
                for names, most in READ_WHOLE.items():
                    if names.fullmatch(file.name):
                        refuse_special(file, most)

    @cached_property
    def indexed(self) -> Mapping[str, str]:
        """The index of a sharded checkpoint, tensor → file; empty for a checkpoint of a single file.

        Raises:
            AnomalyError: it is no JSON, or no index.
        """
        weights = (self.json(INDEX) or {}).get("weight_map") or {}
        named = weights.values() if isinstance(weights, dict) else (None,)
        if not all(isinstance(file, str) for file in named) or not all(map(_lies_inside, set(named))):
            raise AnomalyError(f"{self.path / INDEX} doesn't name the file of each tensor: copy or download it again")
        if len(weights) > MOST_TENSORS:
            raise self._too_many(len(weights), INDEX)
        return dict(weights)

    def _too_many(self, count: int, where: str) -> AnomalyError:
        most = f"more than the {MOST_TENSORS:,} that are read of one checkpoint"
        return AnomalyError(f"{self.path / where} holds {count:,} tensors, {most}, which no known model has")

    def check_files(self) -> None:
        """Check what every loader needs: JSON that can be read, weights, whole tensor files, all files of the index.

        Loaders report such a fault in the same words as a missing package or a full disk, and its kind would be wrong.

        Raises:
            AnomalyError: a file of the checkpoint is damaged, or one that it needs or its index names is not there.
            InfraError: a file can't be read, is too large, or is a pointer of git-lfs.
        """
        self.check_sizes()
        self.check_counts()
        self.json("generation_config.json")
        for file in sorted(set(self.indexed.values())):
            if not (self.path / file).is_file():
                raise AnomalyError(f"{self.path}: {INDEX} names {file}, which is not there: copy or download it again")
        if self.files or not any(self.path.glob("*.bin")):
            _ = self.tensors  # which reads the header of every file


def _lies_inside(file: str) -> bool:
    """Say whether the name of a file stays in its folder; a downloaded index may name any file of this machine."""
    # 250: the system raises an error of its own where a longer name is looked up.
    return len(file) < 250 and not Path(file).is_absolute() and ".." not in Path(file).parts


def _constant(text: str) -> float:
    """Return what Python writes for an infinite number, as some limits are, and no JSON has.

    Raises:
        ValueError: it is NaN, which no setting can be.
    """
    if text == "NaN":
        raise ValueError("it holds NaN")
    return float(text)


@contextlib.contextmanager
def refusing_odd_settings(where: str) -> Iterator[None]:
    """Say in one line where a setting isn't what it should be: those of a downloaded file may be of any type.

    Raises:
        AnomalyError: whatever was raised because of it.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        if isinstance(error, QsaError):
            raise
        logger.debug("a setting of %s can't be read", where, exc_info=True)
        raise AnomalyError(
            f"{where} can't be read ({type(error).__name__}: {one_line(error)}); compare it to the original's"
        ) from error


def open_folder(path: str | Path, revision: str | None = None, gguf_file: str | None = None, base: str = "") -> Folder:
    """Open a folder, or the local copy of a hub id; nothing is fetched. Of an adapter its base is opened.

    `base`: the folder or hub id of an adapter's base, with `@revision`; empty for the one that the adapter names.

    Raises:
        AnomalyError: an adapter's configuration can't be read.
        InfraError: there is no such folder and no such id in the local cache, or the cache can't be read; or the base
            isn't known.
    """
    folder = _local_folder(path, revision)
    if not (named := base_of(folder, base)):
        return Folder(folder, gguf_file)
    return Folder(_local_folder(*named), gguf_file, apart=folder)


def no_folder(path: str | Path, nor: str) -> str:
    """Say that no folder is at a path: what is there instead, or the nearest name. `nor`: what else it isn't."""
    named, path = str(path), Path(path)  # as it was typed: a Path drops the `./`
    if path.is_file():
        key = f" and model.gguf_file: {path.name}" if path.suffix == ".gguf" else ""
        return f"{path} is a file: give its folder, {path.parent}{key}"
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    near = did_you_mean(path.name, (each.name for each in beside if each.is_dir()))
    return f"there is no folder {named}{near}, and {nor}"


def _local_folder(path: str | Path, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=revision, local_files_only=True))
    except HFValidationError:  # a folder was meant
        raise InfraError(no_folder(path, "it can't be a hub id")) from None
    except LocalEntryNotFoundError:
        cache = "it is no hub id in the local cache; static checks fetch nothing"
        raise InfraError(no_folder(path, f"{cache}: run `hf download {path}` first, or give a folder")) from None
    except OSError as error:
        raise InfraError(f"the local cache of the hub can't be read for '{path}': {error}") from error


def base_of(folder: Path, base: str = "") -> tuple[str, str | None] | None:
    """Return the path or hub id of the base of an adapter in a folder, and its revision; None for no adapter apart.

    `base`: what a suite names, with `@revision`. Else it is the folder's own model, else what the adapter's
    configuration names, where that is a hub id or lies inside the folder: a downloaded file shall not choose among the
    folders of this machine.

    Raises:
        AnomalyError: the adapter's configuration is no JSON.
        InfraError: the base isn't known, or is named for a folder without an adapter.
    """
    holds_adapter = (folder / ADAPTER).is_file()
    if base:
        if not holds_adapter:
            raise InfraError(f"model.base is the base of an adapter, and {folder} holds no {ADAPTER}: leave it out")
        path, _, revision = (base, "", "") if Path(base).is_dir() else base.partition("@")
        return path, revision or None
    if not holds_adapter or _holds_model(folder):
        return None
    config = Folder(folder).json(ADAPTER) or {}
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InfraError(f"{folder} holds an adapter whose {ADAPTER} names no base: name it in model.base")
    inside = (folder / named).resolve()
    if inside.is_dir() and inside.is_relative_to(folder.resolve()):
        return str(inside), None
    if HUB_ID.fullmatch(named) and not Path(named).exists():
        return named, config.get("revision")
    raise InfraError(f"{folder} holds an adapter of '{named}', a folder outside of it: name the base in model.base")


def _holds_model(folder: Path) -> bool:
    """Say whether a folder holds a whole model, weights included, beside what belongs to an adapter."""
    weights = set(folder.glob("*.safetensors")) - set(folder.glob(ADAPTER_FILES))
    return bool(weights or any(folder.glob("*.gguf"))) or (folder / "pytorch_model.bin").is_file()


def natural(name: str) -> str:
    """Return a sorting key by which layers.2 comes before layers.10, and a word before a number."""
    return "\0".join(map(_natural_part, name.split(".")))


@lru_cache(maxsize=1 << 16)  # of a hundred thousand names, most parts are the same
def _natural_part(part: str) -> str:
    # `²` is a digit to Python, and no number; one of more digits than 18 is that of no layer.
    return f"\2{part:0>18}" if part.isdecimal() and len(part) <= 18 else f"\1{part}"


def kind_of(name: str, numbers: int = 0) -> str:
    """Return a name with stars for its first `numbers` numbers, all for 0: `model.layers.*.mlp.down_proj`."""
    return NUMBER.sub("*", name, count=numbers)

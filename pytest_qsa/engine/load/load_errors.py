"""Whose fault it is that a checkpoint can't be loaded: its own files', the machine's, or the installed libraries'."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint import (
    INDEX,
    OF_A_LOAD,
    Files,
    Folder,
    check_side_files,
    format_of,
    kind_of,
    misfits,
    nested_settings,
    no_folder,
    open_folder,
    refusing_odd_settings,
    stored_weights,
    unread_index,
)
from ...common import AnomalyError, InfraError, QsaError, UnloadableFormatError, one_line
from ...suite import Model
from .classes import OWN_CODE, class_of, empty_model, wants_code
from .completeness import conversion_failure

CONFIG, GENERATION = "config.json", "generation_config.json"
EXTRA = "extra_forbidden"
NEWER = frozenset({"enum", "literal_error", EXTRA})
"""pydantic's names of errors at words and keys that it doesn't know: a newer library may have written them."""


@contextlib.contextmanager
def loading_errors(spec: Model, path: str) -> Iterator[None]:
    """Say in one line what stopped the loading of a checkpoint, and whose fault it is.

    Raises:
        AnomalyError: its own files'.
        InfraError: the machine's, the network's or the installation's.
    """
    try:
        yield
    except QsaError:
        raise
    except torch.OutOfMemoryError as error:
        advice = "set memory.auto_offload or a smaller data.seq_len"
        raise InfraError(f"{path} does not fit: {one_line(error)}; {advice}") from error
    except OSError as error:
        if Path(path).is_dir():
            raise InfraError(f"{path} can't be loaded: {one_line(error)}") from error
        raise InfraError(no_folder(path, f"as a hub id it can't be fetched: {one_line(error)}")) from error
    except Exception as error:  # transformers raises whatever its parts raise; a user needs its text, not its stack
        if wants_code(error):
            raise InfraError(f"{path} {OWN_CODE}") from error
        if fault := fault_of_files(spec, path, error):
            raise AnomalyError(fault) from error
        text = f"{path} can't be loaded: {type(error).__name__}: {one_line(error)}"
        if isinstance(error, ImportError) and error.__cause__ is not None:  # of transformers' own, which hide why
            text += f" ({type(error.__cause__).__name__}: {one_line(error.__cause__)})"
        text = conversion_failure(path, error) or text
        kind = UnloadableFormatError if _needs_a_quantizer(spec, path) else InfraError
        raise kind(text) from error


def _needs_a_quantizer(spec: Model, path: str) -> bool:
    """Say whether the files are quantized in a format that is known here, so that they may be read without a loader."""
    try:
        files = Files(open_folder(path, spec.revision, spec.gguf_file))
        with refusing_odd_settings(files.settings_text):
            return bool(files.format.name and files.stored_quantized)
    except QsaError:
        return False


def fault_of_files(spec: Model, path: str, error: Exception) -> str | None:
    """Say which file of a checkpoint has stopped its loading; None where they aren't to blame for `error`.

    Only now are its settings tried one by one, for a checkpoint that loads has no need of it.

    Raises:
        AnomalyError: a file is damaged.
    """
    # What is missing here, and what only the author's code can tell, is no fault of the files.
    if spec.trust_remote_code or isinstance(error, ImportError | MemoryError):
        return None
    try:
        folder = open_folder(path, spec.revision, spec.gguf_file)
        folder.check_files()
        if spec.gguf_file:
            return None
        check_side_files(folder, OF_A_LOAD)
        if fault := unread_index(folder):
            return f"{folder.path / INDEX}: {fault}; write the index anew"
        return _fault_of_pickle(folder, error) or _fault_of_settings(folder)
    except InfraError:  # nothing is here to be blamed, or can be read
        return None


def _fault_of_pickle(folder: Folder, error: Exception) -> str | None:
    """Name the file that isn't what torch.save writes; torch's own text advises to run whatever it holds."""
    found = sorted(folder.path.glob("*.bin")) if type(error).__name__ == "UnpicklingError" else []
    return f"{found[0]} is no file of weights alone: save them as safetensors" if found else None


def _fault_of_settings(folder: Folder) -> str | None:
    """Try what stands in config.json and generation_config.json, and whether its model is that of the tensors."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file, kind = folder.path / CONFIG, folder.config.get("model_type")
    if not isinstance(kind, str):
        return f"{file} names no model_type: copy or download it again"
    if kind not in CONFIG_MAPPING:  # it may be newer than the installed library
        return None
    where = str(folder.path)
    read, reason = _tried(lambda: transformers.AutoConfig.from_pretrained(where, trust_remote_code=False))
    if reason:
        return f"{file} is no configuration of {kind}: {reason}{_named_by(reason, folder)}"
    if reason := _fault_of_quantization(folder):
        return f"{file}: quantization_config can't be read: {reason}"
    if (folder.path / GENERATION).is_file():
        _, reason = _tried(lambda: transformers.GenerationConfig.from_pretrained(where))
        if reason:
            return f"{folder.path / GENERATION} can't be read: {reason}"
    if read is None:
        return None
    model, reason = _tried(lambda: empty_model(read))
    if reason:
        why = _foreign_class(read) or _named_by(reason, folder)
        return f"{file}: no model can be made of its settings: {reason}{why}"
    return (_other_model(model, folder) if model is not None else None) or _fault_of_tensors(folder)


def _fault_of_tensors(folder: Folder) -> str | None:
    """Name the first tensor that isn't as the declared scheme wants it; None where all are."""
    try:
        finding = next(misfits(format_of(folder)), None)
    except AnomalyError as error:  # a pattern of layers is no regular expression
        return f"{folder.path / CONFIG}: {error}"
    return f"{folder.path}: {finding}" if finding else None


def _tried(attempt: Callable[[], Any]) -> tuple[Any, str]:
    """Return what an attempt returns, and why it failed; neither where something else than the files stopped it."""
    try:
        return attempt(), ""
    except (ImportError, OSError, MemoryError, QsaError):
        return None, ""
    except Exception as error:  # transformers raises whatever its parts raise
        if wants_code(error) or _of_newer_library(error):
            return None, ""
        return None, f"{type(error).__name__}: {one_line(error)}"


def _of_newer_library(error: Exception) -> bool:
    found = getattr(error, "errors", None)
    listed = [each for each in found() if isinstance(each, dict)] if callable(found) else []
    # a number in the place of a word is no newer word
    words = {each.get("type") for each in listed if isinstance(each.get("input"), str) or each.get("type") == EXTRA}
    return bool(words & NEWER) or "is not a valid " in str(error)  # the latter by an Enum


def _fault_of_quantization(folder: Folder) -> str:
    """Say why a declared quantization can't be read; empty where it can, or where another library may read it."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN, AutoQuantizationConfig

    stated = folder.text_config.get("quantization_config")
    if stated is None:
        return ""
    if not isinstance(stated, dict):
        return f"it is {stated!r:.40}, and no section of settings"
    if not any(key in stated for key in ("quant_method", "load_in_8bit", "load_in_4bit")):
        return "it names no quant_method"
    # torchao's section names classes, which another version of it may know.
    if stated.get("quant_method") not in KNOWN or stated["quant_method"] == "torchao":
        return ""
    return _tried(lambda: AutoQuantizationConfig.from_dict(dict(stated)))[1]


def _named_by(reason: str, folder: Folder) -> str:
    """Name the setting whose value a text quotes, as `KeyError: 'nope'` does: ` (hidden_act)`; empty for none."""
    settings = nested_settings({**folder.text_config, "quantization_config": {}})
    found = next((key for key, value in settings if isinstance(value, str) and f"'{value}'" in reason), "")
    return f" ({found})" if found and found not in reason else ""


def _foreign_class(read: Any) -> str:
    """Say that the class which is named is made of another model's settings; empty where it isn't, or none is."""
    with contextlib.suppress(Exception):  # it says why another error came
        kind = class_of(read, remote=False, gguf=False)
        wanted = getattr(kind, "config_class", None)
        if wanted is not None and not isinstance(read, wanted):
            return f" (architectures names {kind.__name__}, which is no class of {read.model_type})"
    return ""


def _other_model(model: nn.Module, folder: Folder) -> str | None:
    """Name the first weight whose shape isn't what the configuration gives it, or that is lost; None for none."""
    wanted, file = dict(model.named_parameters()), folder.path / CONFIG
    files = Files(folder)
    with refusing_odd_settings(files.settings_text):
        stored = stored_weights(files)
        held = {layer: weight.shape for layer, weight in stored.items() if weight.matrix}
    for layer, shape in held.items():
        parameter = wanted.get(f"{layer}.weight")
        # A class that has its weights transposed, as GPT-2's, may load them from either layout.
        if parameter is not None and sorted(shape) != sorted(parameter.shape):
            return (
                f"{file} makes {layer} {list(parameter.shape)}, and the files hold {list(shape)}: it is another "
                "model's, or the tensor is damaged"
            )
    # Only of kinds that the files hold, for a class may have other names for what it loads.
    kinds = {kind_of(layer) for layer in stored}
    layers = (name.removesuffix(".weight") for name in wanted if name.endswith(".weight"))
    lost = next((layer for layer in layers if layer not in stored and kind_of(layer) in kinds), None)
    return (
        f"{file} wants {lost}, which the files don't hold: it is another model's, or they are damaged" if lost else None
    )

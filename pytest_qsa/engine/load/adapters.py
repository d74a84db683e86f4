"""Adapters: the base that a path stands for, and the adapter that peft puts onto the base when it is loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from importlib import util
from pathlib import Path
from typing import Any

from torch import nn

from ...checkpoint import ADAPTER, Adapter, base_of, format_of, open_folder, refusing_odd_settings
from ...common import AnomalyError, InfraError, QsaError, one_line

ON_HUB = ("adapter_config.json", "adapter_model*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""The files of an adapter on the hub that are fetched: itself, its tokenizer, and no pickle."""
WITHOUT = {"adapter_kwargs": {"subfolder": "loaded-after-the-base"}}
"""Arguments of `from_pretrained` that hide an adapter in the folder, with which the keys of the base aren't reported.

transformers looks for the adapter in this part of the folder, which isn't there.
"""


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from: a folder or hub id with its revision, and the folder of the adapter on it."""

    path: str
    revision: str | None
    adapter: Path | None = None


def source_of(path: str, revision: str | None, base: str = "") -> ModelSource:
    """Return where a model is loaded from. `path`: its folder or hub id, or an adapter's; `base`: as a suite names it.

    The files of an adapter on the hub are fetched.

    Raises:
        AnomalyError: an adapter's configuration can't be read.
        InfraError: an adapter's base isn't known; or it can't be put onto a model here.
    """
    if not path:  # a factory's model
        return ModelSource(path, revision)
    folder = _adapter_at(path, revision)
    named = base_of(folder or Path(path), base)
    if folder is None:
        return ModelSource(path, revision)
    if util.find_spec("peft") is None:
        raise InfraError(
            f"{folder} holds an adapter, and without peft transformers would run its base alone: pip install peft"
        )
    _peft_config(folder)
    return ModelSource(*named, folder) if named else ModelSource(path, revision, folder)


def _adapter_at(path: str, revision: str | None) -> Path | None:
    """Return the folder of the adapter that a path or hub id holds, fetched from the hub; None where it holds none."""
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    if Path(path).is_dir():
        return Path(path) if (Path(path) / ADAPTER).is_file() else None
    if find_adapter_config_file(path, revision=revision) is None:
        return None
    return Path(snapshot_download(path, revision=revision, allow_patterns=list(ON_HUB)))


def _peft_config(folder: Path) -> Any:
    """Return peft's own configuration of an adapter.

    Raises:
        AnomalyError: it can't be read.
        InfraError: peft doesn't know its kind or one of its options; or no layer of a model takes it.
    """
    import peft

    adapter, version = Adapter(folder), peft.__version__
    kinds: dict[str, Any] = {str(name.value): kind for name, kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = kinds.get(adapter.kind)
    if kind is None:
        raise InfraError(f"{folder / ADAPTER}: peft {version} knows no adapter of the kind {adapter.kind}")
    if issubclass(kind, peft.PromptLearningConfig):
        raise InfraError(
            f"{folder / ADAPTER}: {adapter.kind} puts tokens before a text, and transformers loads no such adapter"
        )
    known = {each.name for each in fields(kind)}
    if unknown := [key for key, value in adapter.config.items() if value and key not in known]:
        raise InfraError(f"{folder / ADAPTER}: peft {version} doesn't know {unknown[0]}, and would leave it out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown options, of which only empty ones are left
        with refusing_odd_settings(f"{folder / ADAPTER}: a setting"):
            return peft.PeftConfig.from_pretrained(str(folder))


def check_adapter(source: ModelSource, gguf_file: str | None) -> None:
    """Check that an adapter's tensors fit the files of its base, which a loader would say in many lines or not at all.

    Raises:
        AnomalyError: they don't, or the adapter's files are damaged.
        InfraError: they can't be read; or the base is another adapter's as well.
    """
    assert source.adapter is not None
    base = open_folder(source.path, source.revision, gguf_file)
    if base.path != source.adapter and base.adapter_folder is not None:
        raise InfraError(f"{base.path}, the base of {source.adapter}, holds an adapter of its own: merge that first")
    form = format_of(type(base)(base.path, gguf_file, apart=source.adapter))
    if problem := next(form.adapter_findings(), None):
        raise AnomalyError(f"{source.adapter}: {problem}")


def add_adapter(model: Any, folder: Path) -> None:
    """Put an adapter onto a loaded model.

    Raises:
        AnomalyError: it hasn't all tensors that its configuration declares, or has others.
        InfraError: peft can't put it onto this model.
    """
    import peft

    try:
        found = model.load_adapter(str(folder), peft_config=_peft_config(folder))
    except QsaError:
        raise
    except Exception as error:  # peft raises whatever its parts raise
        raise InfraError(
            f"the adapter {folder} can't be put onto {type(model).__name__}: {type(error).__name__}: {one_line(error)}"
        ) from error
    adapter = Adapter(folder)
    held = {f"{layer}.{part}" for layer, parts in adapter.layers.items() for part in parts}
    # What peft saves of the model, under the names of the files: not all that belongs to an adapter is saved.
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = {name.replace(".default", "") for name in found.missing_keys}
    lost = {name for name in saved if name in lost or f"{name}.weight" in lost}
    others = sorted(found.unexpected_keys) if adapter.kind != "LORA" else []
    if dropped := sorted(lost & held) or others:
        raise InfraError(
            f"the adapter {folder} holds {_first(dropped)}, which the installed transformers and peft don't load: "
            "merge it into its base"
        )
    if lost:
        raise AnomalyError(f"the adapter {folder} lacks {_first(sorted(lost))}, filled with random numbers")
    if unknown := sorted(found.unexpected_keys):
        raise AnomalyError(
            f"the adapter {folder} holds {_first(unknown)}, which no layer of {type(model).__name__} takes: is it one "
            "of this base?"
        )


def _first(names: list[str]) -> str:
    return f"{names[0]}{f' (and {len(names) - 1} more)' if names[1:] else ''}"


def add_empty_adapter(model: nn.Module, folder: Path) -> None:
    """Put an adapter's modules onto a model of the meta device, without its tensors.

    Raises:
        InfraError: peft can't.
    """
    import peft

    try:
        peft.inject_adapter_in_model(_peft_config(folder), model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise InfraError(f"the adapter {folder} can't be put onto {type(model).__name__}: {one_line(error)}") from error


def adapter_text(model: nn.Module) -> str | None:
    """Say which adapters a loaded model has, as peft and transformers keep them: `LoRA of rank 8`; None for none."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    return ", ".join(dict.fromkeys(_described(config) for config in configs.values()))


def _described(config: Any) -> str:
    kind, rank = getattr(config.peft_type, "value", config.peft_type), getattr(config, "r", None)
    return f"LoRA of rank {rank}" if kind == "LORA" else str(kind)

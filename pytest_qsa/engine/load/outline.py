"""The layers of a model without its weights: built on the meta device from the configuration alone."""

from __future__ import annotations

from pathlib import Path

import torch

from ...checkpoint import Folder
from ...common import InfraError, QsaError, one_line
from ...suite import Anatomy, Memory, Model
from ..modules import blocks_of, layers_of
from .models import class_of, load_model, submodule_of


def outline(spec: Model, path: str) -> list[tuple[str, str, str, int]]:
    """Return (name, class, shape of the weight, number of parameters) of each layer, in model order.

    Raises:
        AnomalyError: the configuration is no JSON.
        InfraError: it can't be read, or the model needs code of its own.
    """
    rows = []
    for name, module in layers_of(_empty(spec, path)).items():
        weight = getattr(module, "weight", None)
        shape = "×".join(map(str, weight.shape)) if isinstance(weight, torch.Tensor) else ""
        rows.append((name, type(module).__name__, shape, sum(p.numel() for p in module.parameters())))
    return rows


def anatomy(spec: Model, path: str) -> Anatomy:
    """Return the blocks of a model, and the linear layers in them that every token passes.

    Raises:
        InfraError: as `outline`.
    """
    model = _empty(spec, path)
    blocks = blocks_of(model)
    linears = [
        name
        for name, module in layers_of(model).items()
        if type(module).__name__.endswith(("Linear", "Conv1D"))
        and any(name.startswith(f"{block}.") for block in blocks)
        and "experts" not in name.split(".")
    ]
    return Anatomy(blocks, linears)


def _empty(spec: Model, path: str) -> torch.nn.Module:
    import transformers

    try:
        Folder(Path(path)).json("config.json")  # transformers reports a broken file as a missing one
        config = transformers.AutoConfig.from_pretrained(
            path, revision=spec.revision, **({"gguf_file": spec.gguf_file} if spec.gguf_file else {})
        )
        with torch.device("meta"):
            model = class_of(config, remote=False, gguf=bool(spec.gguf_file))._from_config(config)
    except QsaError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        raise InfraError(f"{path}: no model can be made of it: {one_line(error)}") from error
    return submodule_of(model, spec.submodule) if spec.submodule else model


def layer_names(spec: Model, path: str, memory: Memory, *, allow_code: bool) -> list[str]:
    """Return the names of a model's layers, in model order. A model with code of its own is loaded for it.

    Raises:
        InfraError: as `outline` and `load_model`.
    """
    if spec.factory is None and not spec.trust_remote_code:
        return [row[0] for row in outline(spec, path)]
    loaded = load_model(spec, path, memory, allow_code=allow_code)
    try:
        return list(layers_of(loaded.model))
    finally:
        loaded.close()

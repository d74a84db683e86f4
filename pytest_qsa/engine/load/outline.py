"""What is known before the first forward: a model's layers, whether a reference is its original, and the machine.

The machine, for the plan of a run: its memory, its GPUs, and how fast it multiplies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any, get_args, get_type_hints

import psutil
import torch
from torch import nn

from ...captures import LayerNames, Outline
from ...checkpoint import ADAPTER, Folder, check_side_files, no_folder
from ...common import AnomalyError, InfraError, QsaError, logger, one_line, own_cores, uncollected
from ...suite import Anatomy, Data, Gpu, Machine, Memory, Model
from ..formats.adapters import adapter_class
from ..modules import (
    SENSES,
    Expert,
    base_of_layer,
    blocks_of,
    check_context,
    is_adapted,
    layers_of,
    names_of,
    packed_experts,
    towers_of,
    with_experts,
)
from ..threads import threads_restored, use_free_cores
from .adapters import add_empty_adapter, source_of
from .answers import prompts_of
from .batches import token_ids
from .classes import OWN_CODE, empty_model, wants_code
from .data import batches_of
from .load_errors import CONFIG, fault_of_files
from .media import media_of
from .models import check_allowed, check_folder, check_loader, check_path, load_model, quiet, submodule_of
from .tokenizer import TextTokenizer


def outline(spec: Model, path: str, base: str = "") -> list[tuple[str, str, str, int]]:
    """Return (name, class, shape of the weight, number of parameters) of each layer, in model order.

    Raises:
        AnomalyError: the configuration is no JSON.
        InfraError: it can't be read, or the model needs code of its own.
    """
    rows = []
    for name, layer in with_experts(layers_of(empty_of(spec, path, base))).items():
        if isinstance(layer, Expert):
            rows.append((name, f"{type(layer.module).__name__}[{layer.index}]", _text(layer.shape), prod(layer.shape)))
            continue
        weight = getattr(layer, "weight", None)
        shape = _text(weight.shape) if isinstance(weight, torch.Tensor) else ""
        kind = adapter_class(layer) if is_adapted(layer) else type(layer).__name__
        rows.append((name, kind, shape, sum(p.numel() for p in layer.parameters())))
    return rows


def _text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def anatomy(spec: Model, path: str, base: str = "", data: Data | None = None, folder: Path = Path()) -> Anatomy:
    """Return the blocks of a model, and the linear layers in them that every token passes.

    `data`, `folder`: what it runs on, which may be pictures or sounds; without them a text, which passes no tower.

    Raises:
        InfraError: as `outline`.
    """
    model = empty_of(spec, path, base)
    seen = {SENSES[medium] for medium in media_of(data, folder, model)} if data is not None else set()
    every, layers = blocks_of(model), with_experts(layers_of(model))
    towers = [name for name, sense in towers_of(model).items() if sense not in seen]
    # a model that is a tower alone keeps its blocks
    blocks = [block for block in every if not block.startswith(tuple(f"{tower}." for tower in towers))] or every
    towers = [tower for tower in towers if not any(block.startswith(f"{tower}.") for block in blocks)]
    # By name: transformers' Conv1D (GPT-2) and quantizers' classes are linear layers too, but no nn.Linear.
    kinds = {
        name: type(layer if isinstance(layer, Expert) else base_of_layer(layer)).__name__
        for name, layer in layers.items()
    }
    inside = [name for name in layers if any(name.startswith(f"{block}.") for block in every)]
    linears = [
        name for name in inside if kinds[name].endswith(("Linear", "Conv1D")) and "experts" not in name.split(".")
    ]
    experts = [name for name in inside if isinstance(layers[name], Expert)]
    routers = [name for name in inside if kinds[name].endswith("Router")]
    return Anatomy(blocks, linears, experts, routers, towers, _has_head(model))


def _has_head(model: torch.nn.Module) -> bool:
    """Say whether a model returns logits, by what its forward says that it returns; true where it says nothing."""
    try:
        returned = get_type_hints(model.forward).get("return")
    except (NameError, TypeError):  # of a model whose code is elsewhere
        return True
    kinds = [kind for kind in (*get_args(returned), returned) if is_dataclass(kind)]
    return not kinds or any(field.name == "logits" for kind in kinds for field in fields(kind))


def empty_of(spec: Model, path: str, base: str = "", *, as_loaded: bool = False) -> torch.nn.Module:
    """Return a checkpoint's model without weights. `as_loaded`: with the modules of a quantized one's loader.

    Raises:
        AnomalyError: the configuration is no JSON.
        InfraError: no model can be made of it, or it needs code of its own.
    """
    with quiet(), uncollected():
        return _emptied(spec, path, base, as_loaded=as_loaded)


def _emptied(spec: Model, path: str, base: str, *, as_loaded: bool) -> torch.nn.Module:
    import transformers

    check_path(path, spec.revision)
    try:
        source = source_of(path, spec.revision, base)
        if Path(source.path).is_dir() and not spec.gguf_file:
            folder = Folder(Path(source.path))
            _ = folder.config  # transformers reports a broken file as a missing one
            check_side_files(folder, (CONFIG,))
        config = transformers.AutoConfig.from_pretrained(
            source.path,
            revision=source.revision,
            trust_remote_code=False,  # without it transformers asks on the terminal, and a `y` runs the author's code
            **({"gguf_file": spec.gguf_file} if spec.gguf_file else {}),
        )
        model = empty_model(config, gguf=bool(spec.gguf_file), as_loaded=as_loaded)
        if source.adapter is not None:
            with torch.device("meta"):
                add_empty_adapter(model, source.adapter)
    except QsaError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        if wants_code(error):
            raise InfraError(f"{path} {OWN_CODE}; its layers can't be listed without running it") from error
        if fault := fault_of_files(spec, path, error):
            raise AnomalyError(fault) from error
        if isinstance(error, OSError) and not Path(path).is_dir():
            raise InfraError(no_folder(path, f"as a hub id it can't be fetched: {one_line(error)}")) from error
        raise InfraError(f"{path}: no model can be made of it: {one_line(error)}") from error
    return submodule_of(model, spec.submodule) if spec.submodule else model


def expected_outline(
    spec: Model, path: str, memory: Memory, tokens: int, *, allow_code: bool, base: str = "", as_loaded: bool = False
) -> Outline | None:
    """Return what a model's configuration says of it, without reading or hashing a weight.

    None where only loading tells: of a factory, of code of its own, of a configuration that no model can be made of.
    `tokens`: of a window. `as_loaded`: with the modules that the loader of a quantized checkpoint replaces or adds.

    Raises:
        QsaError: what would stop loading, as far as the files' headers and the permissions say it.
    """
    check_allowed(spec, path, memory, allow_code=allow_code)
    if made_by_code(spec):
        return None
    if not (Path(path) / ADAPTER).is_file():  # of an adapter the base is loaded
        check_folder(spec, path)
        check_loader(spec, path)
    try:
        model = empty_of(spec, path, base, as_loaded=as_loaded)
    except QsaError as error:  # loading says it, and may know more of it
        logger.debug("%s: its layers are checked once it is loaded: %s", path, error)
        return None
    check_context(model, tokens)
    return outline_of(model)


def made_by_code(spec: Model) -> bool:
    """Say whether only code of others knows a model's layers: a factory's, or the checkpoint's author's."""
    return spec.factory is not None or spec.trust_remote_code


def outline_of(model: nn.Module) -> Outline:
    """Return the outline of a model, which may be on the meta device."""
    layers = with_experts(layers_of(model))
    modules = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}
    owned = {
        name: (*module.parameters(recurse=False), *module.buffers(recurse=False)) for name, module in modules.items()
    }
    # A loader keeps in other modules of such a layer what it makes of its weight.
    bare = frozenset(name for name, tensors in owned.items() if not tensors and not is_adapted(modules[name]))
    mixtures = frozenset(name for name, module in modules.items() if packed_experts(module))
    of_ids = frozenset(name for name, module in modules.items() if isinstance(base_of_layer(module), nn.Embedding))
    headless = type(model).__name__ if _is_headless(model) else ""
    return Outline(names_of(layers), bare, tuple(blocks_of(model)), mixtures, of_ids, headless)


def _is_headless(model: Any) -> bool:
    """Say whether a model is transformers' own without a head, which returns hidden states and no logits."""
    base: Any = getattr(model, "base_model", None)
    return base is not None and base is model and base.get_output_embeddings() is None


def layer_names(spec: Model, path: str, memory: Memory, *, allow_code: bool, base: str = "") -> LayerNames:
    """Return the names of a model's layers. A model with code of its own is loaded for it.

    Raises:
        InfraError: as `outline` and `load_model`.
    """
    if not made_by_code(spec):
        return names_of(with_experts(layers_of(empty_of(spec, path, base))))
    loaded = load_model(spec, path, memory, allow_code=allow_code, base=base)
    try:
        return names_of(with_experts(layers_of(loaded.model)))
    finally:
        loaded.close()


def check_layers(model: nn.Module, reference: nn.Module) -> None:
    """Check that two models have the same blocks, and in them layers of the same names and widths.

    Raises:
        InfraError: they have not; the text names the first that differs.
    """
    own, theirs = blocks_of(model), blocks_of(reference)
    if own != theirs:
        raise InfraError(f"the reference has {_blocks(theirs)} and the model {_blocks(own)}{_ADVICE}")
    mine, originals = layers_of(model), layers_of(reference)
    for name, layer in originals.items():
        # The reference's classes are asked, for a quantized layer of the model may be of any class.
        if not isinstance(layer, nn.Linear | nn.Embedding):
            continue
        if name not in mine:
            raise InfraError(f"the model has no layer {name}, which the reference has{_ADVICE}")
        one, other = _widths(mine[name]), _widths(layer)
        # Not every packed layer says its sizes; an unknown width is no contradiction.
        if one and one != other:
            raise InfraError(f"{name} is {one} here and {other} in the reference{_ADVICE}")


_ADVICE = ": is it the original of this model?"


def _blocks(names: list[str]) -> str:
    return f"{len(names)} blocks ({names[0]}, …)" if names else "no blocks"


def _widths(layer: nn.Module) -> str:
    """Return the sizes of a layer as `in→out`; empty where it does not say them."""
    sides = [("in_features", "out_features"), ("num_embeddings", "embedding_dim")]
    return next((f"{getattr(layer, i)}→{getattr(layer, o)}" for i, o in sides if hasattr(layer, o)), "")


def check_tokens(data: Data, own: TextTokenizer, other: TextTokenizer | None, folder: Path) -> None:
    """Check that two tokenizers make the same windows of the data; a reference without one has nothing to say.

    Raises:
        InfraError: they do not; the text says where the windows first differ.
    """
    if other is None:
        return
    try:
        theirs = _samples(data, other, folder)
    except InfraError as error:
        raise InfraError(
            f"the reference's tokenizer makes other tokens of the data than the model's ({error})"
        ) from None
    for index, (one, two) in enumerate(zip(_samples(data, own, folder), theirs, strict=True)):
        if (at := _differing(one, two)) is not None:
            raise InfraError(
                "the reference's tokenizer makes other tokens of the data than the model's: "
                f"sample {index} differs from token {at} on{_ADVICE}"
            )


def _samples(data: Data, tokenizer: TextTokenizer, folder: Path) -> list[list[int]]:
    """Return the token ids of each window; of prompts that wait for an answer, those of each prompt."""
    if data.answers is not None:
        return prompts_of(data, tokenizer, folder)
    return [row.tolist() for batch in batches_of(data, tokenizer, folder) for row in token_ids(batch)]


def _differing(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first position at which two samples differ."""
    differ = (at for at, (a, b) in enumerate(zip_longest(one, other)) if a != b)
    return next(differ, None)


PART = 32 << 20
"""How many bytes of a file are read to time reading."""
SECONDS = 0.05
"""For how long a product is repeated."""


def this_machine(dtype: str, weights: Path | None = None) -> Machine:
    """Measure this machine. `dtype`: of the model; `weights`: its largest file, a part of which is read."""
    kind = getattr(torch, dtype)
    memory = psutil.virtual_memory()
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    with threads_restored():
        use_free_cores()
        cores = torch.get_num_threads()
        rates = {"cpu": product_rate(kind, torch.device("cpu"), 512, 2048, 2048)}
    if gpus:
        rates["cuda"] = product_rate(kind, torch.device("cuda"), 2048, 4096, 4096)
    reading, unused = reading_rate(weights), own_cores.free()
    return Machine(cores, memory.total, memory.available, tuple(gpus), rates, reading, unused)


def product_rate(dtype: torch.dtype, device: torch.device, rows: int, inner: int, columns: int) -> float:
    """Return the FLOP/s of [rows, inner] × [inner, columns], 2 for each product that is added.

    On the CPU by the processor's time, as if nothing else ran.
    """
    x, w = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
    x @ w
    _wait(device)
    # The product above isn't timed: the first one also pays for loading its kernel.
    on_cpu, times = device.type == "cpu", 0
    clock, threads = (time.process_time, torch.get_num_threads()) if on_cpu else (time.perf_counter, 1)
    began = clock()
    while clock() - began < SECONDS * threads:
        x @ w
        _wait(device)
        times += 1
    return 2 * rows * inner * columns * times / (clock() - began) * threads


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        # A product on CUDA returns before it has been computed.
        torch.cuda.synchronize(device)


def reading_rate(weights: Path | None) -> float:
    """Return the bytes/s at which the middle of a file is read: from the disk, or from memory that holds it."""
    if weights is None:
        return 1e9
    # Unbuffered, so that no copy of Python's is timed.
    with weights.open("rb", buffering=0) as file:
        file.seek(max(0, os.path.getsize(weights) // 2 - PART // 2))
        began = time.perf_counter()
        count = len(file.read(PART))
        return max(count, 1) / max(time.perf_counter() - began, 1e-6)

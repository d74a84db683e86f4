"""What the files of a checkpoint hold, by the quantizer's own library, against what the loader made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...checkpoint import Files, Folder, codes_of, matches, weight_rows
from ...common import InfraError
from ..modules import packed_experts
from .dequantized import dequantized

AT_ONCE = 1 << 24
"""So many elements are compared at a time."""
EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
"""The tensors of packed experts → the projections of one expert in the files, one below the other."""


class StoredWeights:
    """The quantized layers of the files, unpacked one at a time, beside the modules that they were loaded into.

    `unmatched`: layers that the files hold quantized and the model has no weight of its own for.
    """

    def __init__(self, files: Files, modules: Mapping[str, nn.Module]) -> None:
        self.folder: Folder = files.folder
        self._unpack = _unpacker(self.folder)
        stored = set(files.stored_quantized)
        self._of: dict[str, str] = {}
        self._experts: dict[str, list[str]] = {}
        named = _names(self.folder, modules)
        for name, module in modules.items():
            inside = [layer for layer in stored if layer.startswith(f"{name}.")] if packed_experts(module) else []
            if named(name) in stored:
                self._of[name] = named(name)
            elif inside:
                self._experts[name] = inside
        found = {*self._of.values(), *(layer for inside in self._experts.values() for layer in inside)}
        self.unmatched = sorted(stored - found)

    def powers(self, name: str, module: nn.Module) -> NDArray[np.float64] | None:
        """Return Σw₀², Σ(w − w₀)², Σw·w₀ and Σw² of a module; None where the files don't hold it quantized.

        Raises:
            InfraError: the module keeps its weight in a format that is not known, or in another shape.
        """
        if name in self._of:
            weight = dequantized(module)
            return None if weight is None else _powers(name, weight, self._stored(self._of[name]))
        if name not in self._experts:
            return None
        worst = np.zeros(4)
        for parameter, parts in EXPERT_PARTS.items():
            packed = getattr(module, parameter, None)
            for index, weight in enumerate(packed if isinstance(packed, Tensor) else ()):
                stored = torch.cat([self._stored(self._expert(name, index, names)) for names in parts])
                found = _powers(f"{name}.{parameter}[{index}]", weight.detach(), stored)
                worst = max(worst, found, key=lambda powers: powers[1] / powers[0] if powers[0] else powers[1])
        return worst

    def _expert(self, name: str, index: int, names: Sequence[str]) -> str:
        for part in names:
            if f"{name}.{index}.{part}" in self.folder.layers:
                return f"{name}.{index}.{part}"
        raise InfraError(f"the files hold no {names[0]} of {name}.{index}, so that the loader can't be checked there")

    def _stored(self, layer: str) -> Tensor:
        try:
            with torch.no_grad():
                return self._unpack(layer)
        except (RuntimeError, ValueError, KeyError, AttributeError, ImportError) as error:
            raise InfraError(
                f"{layer} can't be unpacked from {self.folder.path}: {type(error).__name__}: {error}"
            ) from error


def _powers(name: str, weight: Tensor, stored: Tensor) -> NDArray[np.float64]:
    if weight.shape != stored.shape and weight.shape == stored.T.shape:
        stored = stored.T
    if weight.shape != stored.shape:
        ours, theirs = ("×".join(map(str, tensor.shape)) for tensor in (weight, stored))
        raise InfraError(f"the weight of {name} is {ours} in the loaded model and {theirs} in the file")
    stored = stored.to(device=weight.device, dtype=weight.dtype)  # as the loader casts it
    total = torch.zeros(4, dtype=torch.float64)
    step = max(1, AT_ONCE // max(1, weight[0].numel()))
    for start in range(0, len(weight), step):
        w, w0 = weight[start : start + step].double(), stored[start : start + step].double()
        sums = [w0.square().sum(), (w - w0).square().sum(), (w * w0).sum(), w.square().sum()]
        total += torch.stack(sums).cpu()
    return total.numpy()


def _names(folder: Folder, modules: Mapping[str, nn.Module]) -> Callable[[str], str]:
    """Return what names a module's layer in the files: the same, or as GGUF calls it; fronts may differ."""
    if folder.gguf_file:
        return _gguf_names(folder)
    ends: dict[str, list[str]] = {}
    for layer in folder.layers:
        ends.setdefault(_end(layer), []).append(layer)
    taken = {_end(name): 0 for name in modules}
    for name in modules:
        taken[_end(name)] += 1

    def named(name: str) -> str:
        other = ends.get(_end(name), [])
        return name if name in folder.layers or len(other) != 1 or taken[_end(name)] != 1 else other[0]

    return named


def _end(name: str) -> str:
    """Return a layer's name from its block's number on: multimodal models name what is before it in several ways."""
    return name[found.start() :] if (found := re.search(r"(?<![^.])(layers|h|blocks)\.\d+\.", name)) else name


def _gguf_names(folder: Folder) -> Callable[[str], str]:
    import gguf

    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}.get(_architecture(folder))
    blocks = int(folder.config.get("num_hidden_layers") or 0)
    if arch is None:
        return lambda name: name
    known = gguf.get_tensor_name_map(arch, blocks)
    return lambda name: str(known.get_name(name) or name)


def _architecture(folder: Folder) -> str:
    from gguf import GGUFReader

    field = GGUFReader(folder.path / str(folder.gguf_file)).fields["general.architecture"]
    return str(field.contents())


def _unpacker(folder: Folder) -> Callable[[str], Tensor]:
    """Return what unpacks one layer of the files, by the library that wrote them."""
    if folder.gguf_file:
        return _Gguf(folder)
    method = folder.quantization.get("quant_method")
    if method == "compressed-tensors":
        return _CompressedTensors(folder)
    if method == "torchao":
        return _TorchAo(folder)
    return _Plain(folder)


class _Safetensors:
    """Tensors of safetensors files, by layer."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Return the tensors of a layer by their whole names."""
        return {part.name: self._file(part.path).get_tensor(part.name) for part in self.folder.layers[layer].values()}

    def metadata(self, path: Path) -> dict[str, str]:
        """Return what a file says beside its tensors."""
        return dict(self._file(path).metadata() or {})

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        return {}

    def _file(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self._opened:
            self._opened[path] = safe_open(path, "pt")
        return self._opened[path]


class _CompressedTensors(_Safetensors):
    """compressed-tensors' own compressors."""

    def __call__(self, layer: str) -> Tensor:
        """Decompress a layer."""
        from compressed_tensors.compressors import BaseCompressor

        scheme = next((s for s in self._schemes if any(t == "Linear" or matches(layer, t) for t in s.targets)), None)
        if scheme is None:
            raise KeyError(f"no config group of quantization_config targets {layer}")
        form = scheme.format or self._form
        compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
        held = {name.rpartition(".")[2]: tensor for name, tensor in self.tensors(layer).items()}
        weight: Tensor = compressor.decompress(held, scheme)["weight"]
        return weight

    @cached_property
    def _schemes(self) -> list[Any]:
        from compressed_tensors.quantization import QuantizationConfig

        stated = self.folder.quantization
        config = QuantizationConfig.model_validate(
            {key: value for key, value in stated.items() if key in QuantizationConfig.model_fields}
        )
        self._form = config.format
        return list(config.config_groups.values())


class _TorchAo(_Safetensors):
    """The tensors of torchao, put together again by the metadata of their file."""

    def __call__(self, layer: str) -> Tensor:
        """Dequantize a layer."""
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        codes = codes_of(self.folder.layers[layer])
        assert codes is not None
        said = self.metadata(codes.path)
        mine = {name: said[name] for name in said if name == f"{layer}.weight"}
        made: Any = unflatten_tensor_state_dict(self.tensors(layer), {**mine, "tensor_names": json.dumps(list(mine))})
        made = made[0] if isinstance(made, tuple) else made
        weight: Tensor = made[f"{layer}.weight"].dequantize()
        return weight


class _Plain(_Safetensors):
    """Codes × scales, for what has no library of its own on every machine."""

    def __call__(self, layer: str) -> Tensor:
        """Multiply codes by scales."""
        rows = weight_rows(self.folder, layer, slice(None))
        if rows is None:
            raise ValueError("its format is not known")
        return torch.from_numpy(rows)


class _Gguf:
    """gguf's own dequantization; llama.cpp keeps the rows of llama's q and k in another order."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._turned = _architecture(folder) == "llama"

    def __call__(self, layer: str) -> Tensor:
        """Dequantize a tensor of the file."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.folder.layers[layer]["weight"]
        content = np.memmap(
            tensor.path, dtype=np.uint8, mode="r", offset=tensor.start, shape=tensor.stop - tensor.start
        )
        rows = content.reshape(*tensor.shape[:-1], -1)
        weight = dequantize(rows, GGMLQuantizationType[tensor.dtype]).reshape(tensor.shape)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(layer.rpartition(".")[2])
        if heads is not None and self._turned:
            count = int(self.folder.config.get(heads) or self.folder.config["num_attention_heads"])
            halves = weight.reshape(count, len(weight) // count // 2, 2, -1)
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        return torch.from_numpy(np.ascontiguousarray(weight))

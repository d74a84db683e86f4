"""A LoRA adapter: what its configuration declares, its tensors, and what it makes of a weight of its base.

W = W₀ + α / r · B · A (Hu et al., arXiv 2106.09685, section 4.1); with `use_rslora` α / √r (arXiv 2312.03732). The
file's format is that of the library peft.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import sqrt
from pathlib import Path

import numpy as np

from ..captures import found_by
from ..common import AnomalyError, InfraError, SuiteError
from .folder import ADAPTER, ADAPTER_FILES, Folder, Settings
from .tensors import Matrix, Tensor, decoded, tensors_of

CONV1D = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
"""The `model_type` of models whose linear layers are transformers' Conv1D, which keeps its weight [in, out]."""
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"} | {
    "fan_in_fan_out",
    "init_lora_weights",
    "modules_to_save",
}
_WITHOUT_EFFECT = (
    {"auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules"}
    | {"inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout"}
    | {"lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size"}
    | {"revision", "runtime_config", "target_modules", "task_type"}
)
"""The options of peft's `LoraConfig` that don't change a weight once its tensors are there (peft 0.21)."""
_KEEP_BASE = ("gaussian", "eva", "orthogonal")
"""The values of `init_lora_weights` that leave the base as it is; PiSSA and others subtract from it."""
_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""The parts that hold A and B, of a linear layer and of an embedding."""
_KNOWN = ("weight", "bias", "base_layer.weight", "base_layer.bias", "lora_B.bias")
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<layer>.+?)\.(?P<part>(lora_|base_layer\.).+)")


@dataclass(frozen=True, eq=False)
class Adapter:
    """The folder of an adapter, read lazily. Its layers have the names of the base's modules.

    `conv1d`: the linear layers of the base keep their weights [in, out].
    """

    folder: Path
    conv1d: bool = False

    @cached_property
    def config(self) -> Settings:
        """The content of adapter_config.json.

        Raises:
            AnomalyError: it declares no adapter.
            InfraError: it can't be read.
        """
        content = Folder(self.folder).json(ADAPTER) or {}
        if not isinstance(content.get("peft_type"), str):
            raise AnomalyError(f"{self.folder / ADAPTER} declares no adapter: it has no peft_type such as LORA")
        return content

    @property
    def kind(self) -> str:
        """The `peft_type` in capitals, such as LORA."""
        return str(self.config["peft_type"]).upper()

    def __str__(self) -> str:
        """Write what it is: `LoRA of rank 8`."""
        rank = self.config.get("r")
        return f"LoRA of rank {rank}" if self.kind == "LORA" and rank else self.kind

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The layers that it has tensors of: name → part (`lora_A.weight`, `weight`) → tensor.

        Raises:
            AnomalyError: a file is damaged.
            InfraError: there is none.
        """
        files = sorted(self.folder.glob(ADAPTER_FILES))
        if not files:
            raise InfraError(f"{self.folder} holds an adapter's configuration and no adapter_model.safetensors")
        layers: dict[str, dict[str, Tensor]] = {}
        for tensor in (tensor for file in files for tensor in tensors_of(file)):
            name = tensor.name.removeprefix(_PREFIX)
            found = _PART.fullmatch(name)
            layer, part = (found["layer"], found["part"]) if found else name.rpartition(".")[::2]
            layers.setdefault(layer, {})[part] = tensor
        return layers

    def refused(self, layer: str) -> str:
        """Return why the weight of a layer that it changes can't be computed here; empty where it can."""
        if self.kind != "LORA":
            return f"the adapter is {self.kind}, and only a plain LoRA's weights are known here"
        if unread := [key for key, value in self.config.items() if value and key not in _READ | _WITHOUT_EFFECT]:
            return f"the adapter is no plain LoRA ({', '.join(unread)}), and only a plain one's weights are known here"
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start not in _KEEP_BASE:
            return f"the adapter's init_lora_weights, {start}, changes the base when it is loaded"
        parts = self.layers.get(layer, {})
        if not parts:
            return "the adapter changes what it is a part of, or a part of it"
        if unknown := sorted(set(parts) - {*_KNOWN, *chain(*_FACTORS)}):
            return f"the adapter has a tensor of it that isn't known here, {unknown[0]}"
        if any(len(tensor.shape) > 2 for tensor in parts.values()):
            return "the adapter's delta of it is no matrix"
        factors = self.factors(layer)
        square = factors is not None and factors[0].shape[1] == factors[1].shape[0]
        if square and self.config.get("fan_in_fan_out") and not self.conv1d:
            return "the adapter says fan_in_fan_out, and of this model_type no linear layer is known that is [in, out]"
        return ""

    def touches(self, layer: str) -> bool:
        """Say whether it may change a layer: it has tensors of it, of what contains it, or of what it contains."""
        if self.config.get("layer_replication"):  # the blocks have other numbers then
            return True
        return any(f"{layer}.".startswith(f"{name}.") or name.startswith(f"{layer}.") for name in self.layers)

    def rank(self, layer: str) -> int:
        """Return the rank that the configuration states of a layer.

        Raises:
            AnomalyError: it is no number above 0.
        """
        return int(self._stated(layer, "r", "rank_pattern"))

    def scaling(self, layer: str) -> float:
        """Return what the product of a layer's factors is multiplied by.

        Raises:
            AnomalyError: rank or alpha is no number.
        """
        rank = self.rank(layer)
        alpha = self._stated(layer, "lora_alpha", "alpha_pattern")
        return alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def _stated(self, layer: str, key: str, patterns: str) -> float:
        """Return a setting of a layer: that of the first pattern that its name ends with, else that of all."""
        try:
            stated = self.config.get(patterns) or {}
            # as peft looks a pattern up (`get_pattern_key`)
            found = (
                value for name, value in stated.items() if found_by(rf"(.*\.)?({name})$", [layer], from_start=True)
            )
            value = next(found, self.config.get(key))
        except (AttributeError, SuiteError) as error:
            raise AnomalyError(f"{self.folder / ADAPTER}: {patterns} can't be read: {error}") from None
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise AnomalyError(f"{self.folder / ADAPTER}: {key} of {layer} is {value!r}, not a number above 0")
        return value

    def factors(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """Return A [rank, in] and B [out, rank] of a layer; None where it has no delta."""
        parts = self.layers.get(layer, {})
        found = ((parts.get(a), parts.get(b)) for a, b in _FACTORS)
        return next(((a, b) for a, b in found if a is not None and b is not None), None)

    def problem(self, layer: str, shape: tuple[int, int] | None) -> str:
        """Return what of its tensors of a layer doesn't fit; empty where all does, and for what is no plain LoRA.

        `shape`: of the base's weight as its files keep it; None where it isn't known.
        """
        if self.refused(layer):
            return ""
        parts = self.layers.get(layer, {})
        for names in _FACTORS:
            there = [name for name in names if name in parts]
            if len(there) == 1:
                lost = next(name for name in names if name != there[0])
                return f"the adapter has {there[0]} of {layer} and no {lost}"
        own, factors = self._own(layer), self.factors(layer)
        if own is not None and shape not in (None, own.shape):
            return f"the adapter's own weight of {layer} is {_size(own.shape)}, and that of the base {_size(shape)}"
        if factors is None:
            return ""
        a, b = factors
        if a.shape[0] != self.rank(layer) or b.shape[1] != a.shape[0]:
            sizes = f"{_size(b.shape)} and {_size(a.shape)}"
            return f"the adapter's factors of {layer} are {sizes}, and {ADAPTER} says rank {self.rank(layer)}"
        delta = (b.shape[0], a.shape[1])
        if shape not in (None, delta, delta[::-1]):
            return f"the adapter's delta of {layer} is {_size(delta)}, and the weight of the base {_size(shape)}"
        return ""

    def _own(self, layer: str) -> Tensor | None:
        """Return the weight that it has in the place of the base's: of `modules_to_save`, or of an embedding."""
        parts = self.layers.get(layer, {})
        return parts.get("weight") or parts.get("base_layer.weight")

    def applied(self, layer: str, rows: slice, stored: Matrix | None) -> Matrix | None:
        """Return rows of a weight [rows, …] with the adapter, whose tensors fit; None where it is `refused`.

        `stored`: the rows in the base; None where it has none that can be read.
        """
        if self.refused(layer):
            return None
        if (own := self._own(layer)) is not None:
            stored = decoded(np.asarray(own.raw()[rows]), own.dtype).astype(np.float64)
        factors = self.factors(layer)
        if factors is None or stored is None:
            return stored
        a, b = (factor.values() for factor in factors)
        left, right = (a.T, b.T) if self._transposed(layer, stored.shape[-1]) else (b, a)
        return stored + self.scaling(layer) * (left[rows] @ right)

    def _transposed(self, layer: str, width: int) -> bool:
        """Say whether the base keeps a layer's weight [in, out]. `width`: of its rows; of a square its class tells."""
        if "lora_embedding_A" in self.layers[layer]:
            return True
        inputs, outputs = (self.layers[layer][part].shape[axis] for part, axis in zip(_FACTORS[0], (1, 0), strict=True))
        return self.conv1d if outputs == inputs else width == outputs


def _size(shape: tuple[int, ...] | None) -> str:
    return "×".join(map(str, shape or ()))

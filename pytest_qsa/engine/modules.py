"""What the engine knows of a model: its layers, its blocks, the tensor of a call, and how to run a batch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..captures import LayerNames
from ..checkpoint import PACKED, SIGNS, ExpertLayer, expert_layers
from ..common import InfraError, QsaError, logger, one_line

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# torch's private bases, for its convolutions and its batch norms have no public one in common.
_CHANNELS_FIRST = (_ConvNd, _BatchNorm)
_PREFERRED = ("last_hidden_state", "logits", "hidden_states", "inputs_embeds")


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers by name, in model order: every module but the root and the containers.

    A layer with an adapter is one layer, with the name that it has without: what peft puts into it is none of its own.
    """
    layers: dict[str, nn.Module] = {}
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if name and not isinstance(module, _CONTAINERS):
            layers[name] = module
        if is_adapted(module):
            inside = f"{name}."
    return layers


def is_adapted(module: nn.Module) -> bool:
    """Say whether peft has put an adapter onto a layer: the module is then the layer and its adapter together."""
    # Where peft isn't imported no model has an adapter, and to import it takes seconds.
    tuners, others = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    return (tuners is not None and isinstance(module, tuners.BaseTunerLayer)) or (
        others is not None and isinstance(module, others.AuxiliaryTrainingWrapper)
    )


def base_of_layer(module: nn.Module) -> nn.Module:
    """Return a layer as it was before adapters were put onto it."""
    while is_adapted(module) and isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def blocks_of(model: nn.Module) -> list[str]:
    """Return the names of the repeated layers of the trunk: the entries of outermost lists of one class."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or any(name.startswith(f"{b}.") for b in blocks):
            continue
        if len({type(child) for child in module}) == 1 and any(True for _ in module.parameters()):
            blocks += [f"{name}.{index}" for index in range(len(module))]
    return blocks


def tensor_of(value: object) -> Tensor | None:
    """Return the floating-point tensor that stands for an output: the first one, in tuples, dicts and model outputs."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        ordered: Iterable[object] = [value[key] for key in _PREFERRED if key in value] + list(value.values())
    elif isinstance(value, (tuple, list)):
        ordered = value
    else:
        return None
    return next((tensor for item in ordered if (tensor := tensor_of(item)) is not None), None)


def input_of(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return the floating-point tensor that stands for an input: the first positional one, else the first keyword."""
    # The usual case comes first, for hooks ask this at every call.
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return args[0]
    positional = next((item for item in args if isinstance(item, Tensor) and item.is_floating_point()), None)
    if positional is not None:
        return positional
    tensors = {name: item for name, item in kwargs.items() if isinstance(item, Tensor)}
    return tensor_of(tensors)


@dataclass(frozen=True)
class Routing:
    """Where a router sends tokens: `indices` [tokens, k] below `experts`; larger ones mean an expert elsewhere."""

    indices: Tensor
    experts: int

    def of_rows(self, count: int) -> list[Tensor]:
        """Return the indices of each row of a batch of `count`, [T, k]."""
        return list(self.indices.reshape(count, -1, self.indices.shape[-1]))

    def counts(self, indices: Tensor) -> Tensor:
        """Return how many of some indices name each expert, [E] int64."""
        flat = indices.flatten().long().clamp(max=self.experts)
        # Not bincount, which waits for the device. The last bin takes the experts elsewhere, and is left out.
        counts = torch.zeros(self.experts + 1, dtype=torch.int64, device=flat.device)
        return counts.scatter_add_(0, flat, torch.ones_like(flat))[: self.experts]


def packed_experts(module: nn.Module) -> int:
    """Return how many experts a module keeps in tensors [E, …] of its own; 0 where it is no such module."""
    return next((len(parameter) for parameter in module.parameters(recurse=False) if parameter.dim() == 3), 0)


@dataclass(frozen=True, slots=True)
class Expert:
    """One layer of one expert: a part of a tensor that a module keeps for all its experts. No module is called for it.

    `module`, `holder`: the module and its name. `index`: the expert's number.
    """

    module: nn.Module
    holder: str
    index: int
    place: ExpertLayer

    @property
    def packed(self) -> Tensor:
        """The tensor of all experts."""
        tensor: Tensor = getattr(base_of_layer(self.module), self.place.tensor)
        return tensor

    @property
    def signs(self) -> dict[str, Tensor]:
        """What lies beside the tensor of all experts and shows that it is quantized, by the names of a linear layer.

        `gate_up_proj_scale_inv` is its `weight_scale_inv`.
        """
        own = {**self.module._parameters, **self.module._buffers}
        named = {name.removeprefix(self.place.tensor): part for name, part in own.items() if name != self.place.tensor}
        beside = {f"weight{name}": part for name, part in named.items() if name.startswith("_") and part is not None}
        return {name: part for name, part in beside.items() if SIGNS.search(name)}

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of its weight, which need not be in memory."""
        expert = self.packed.shape[1:]
        outputs, inputs = reversed(expert) if self.place.transposed else expert
        return len(range(outputs)[self.place.rows]), inputs


Layer = nn.Module | Expert
"""What may own a weight."""


def owner_of_weight(layer: Layer) -> nn.Module:
    """Return the module whose tensors a layer's weight is part of."""
    return layer.module if isinstance(layer, Expert) else layer


def with_experts(modules: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Return modules and, after each that packs experts, the layers of these, by the names of files with one each."""
    layers: dict[str, Layer] = {}
    for name, module in modules.items():
        layers[name], base = module, base_of_layer(module)
        packed = {part: tensor for part in PACKED if isinstance(tensor := getattr(base, part, None), Tensor)}
        shapes = {part: tuple(tensor.shape) for part, tensor in packed.items()}
        # Models say it of their experts; those that don't put gate before up (Llama 4).
        interleaved = not getattr(base, "is_concatenated", True)
        places = expert_layers(shapes, interleaved=interleaved)
        for index in range(min(shape[0] for shape in shapes.values()) if places else 0):
            layers |= {f"{name}.{index}.{part}": Expert(module, name, index, place) for part, place in places.items()}
    return layers


def names_of(layers: Mapping[str, Layer]) -> LayerNames:
    """Return the names of layers, in their order."""
    experts = frozenset(name for name, layer in layers.items() if isinstance(layer, Expert))
    return LayerNames(list(layers), experts, caching_layers(layers))


def cache_index(module: object) -> int | None:
    """Return under which number a layer puts its keys and values into the KV cache; None where it carries none."""
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    return index if isinstance(index, int) else None


def caching_layers(layers: Mapping[str, Layer]) -> frozenset[str]:
    """Return the layers that may fill a KV cache: those that carry a number for it. Some keep a state, or nothing."""
    return frozenset(name for name, layer in layers.items() if cache_index(layer) is not None)


def routing_of(experts: int, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Routing | None:
    """Return the indices that packed experts get beside their tokens; None where every expert sees all of them."""
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() >= 2]
    indices = next((value for value in values if value.dtype in (torch.int64, torch.int32)), None)
    return Routing(indices, experts) if indices is not None else None


def channels_first(module: nn.Module) -> bool:
    """Say whether dimension 1 of the module's tensors is its channels, as in convolutions."""
    return isinstance(module, _CHANNELS_FIRST)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that takes the batches: the first one that holds weights."""
    # The weights of an offloaded model are on the meta device, where no batch can go.
    tensors = (tensor for source in (model.parameters(), model.buffers()) for tensor in source)
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))


def run_batch(model: nn.Module, batch: Tensor | Mapping[str, object], device: torch.device) -> object:
    """Run one batch on a device; return what the model returns. The copy to the device isn't waited for."""
    if isinstance(batch, Tensor):
        return model(batch.to(device, non_blocking=True))
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return model(**{**batch, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()}})


@contextmanager
def evaluating(model: nn.Module, *, use_cache: bool = False) -> Iterator[None]:
    """Put a model in evaluation mode and its KV cache off, or on; afterwards both are as they were."""
    # Module by module: a part of a model may have been in another mode than the whole.
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    configs = _configs_of(model, parts=use_cache)
    before = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = use_cache
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        for config, was in zip(configs, before, strict=True):
            config.use_cache = was


def _configs_of(model: nn.Module, *, parts: bool) -> list[Any]:
    """Return the configuration that says whether a model uses its cache; with `parts` also that of its text model."""
    config: Any = getattr(model, "config", None)
    found = [config]
    if parts and hasattr(config, "get_text_config") and (text := config.get_text_config(decoder=True)) is not config:
        found.append(text)
    return [each for each in found if isinstance(getattr(each, "use_cache", None), bool)]


@contextmanager
def forward_errors(whose: str) -> Iterator[None]:
    """Say in one line whose forward pass failed, whatever a model's code raises: it may end the program.

    Raises:
        InfraError: the forward raised. This package's own errors pass as they are.
    """
    try:
        yield
    except QsaError:
        raise
    except torch.OutOfMemoryError as error:
        raise InfraError(
            f"the forward pass of {whose} ran out of memory ({one_line(error)}): lower data.seq_len or data.batch_size"
        ) from error
    # No BaseException: one of them ends a forward that has shown all that is asked for.
    except (Exception, SystemExit) as error:
        logger.debug("the forward pass of %s failed", whose, exc_info=True)
        raise InfraError(f"the forward pass of {whose} failed: {type(error).__name__}: {one_line(error)}") from error


def check_context(model: nn.Module, tokens: int) -> None:
    """Refuse a window that is longer than what a model was made for: its numbers would be of no served model.

    Raises:
        InfraError: it is.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return
    # A scaled rope reaches that much farther; some configurations state the scaled length already, others don't.
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None)
    by_type = list(scaling.values()) if isinstance(scaling, Mapping) else []
    factors = [each.get("factor") for each in (scaling, *by_type) if isinstance(each, Mapping)]
    reach = int(most * max([1.0, *(float(each) for each in factors if isinstance(each, int | float))]))
    if tokens > reach:
        raise InfraError(
            f"data.seq_len {tokens:,} is more than the {reach:,} positions that {type(model).__name__} takes "
            "(max_position_embeddings): lower it"
        )

"""What the engine knows of a model: its layers, its blocks, the tensor of a call, and how to run a batch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..captures import LayerName, LayerNames, kinds_of_name
from ..checkpoint import PACKED, SIGNS, ExpertLayer, expert_layers
from ..common import InfraError, QsaError, logger, one_line

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# torch's private bases, for its convolutions and its batch norms have no public one in common.
_CHANNELS_FIRST = (_ConvNd, _BatchNorm)
_PREFERRED = ("last_hidden_state", "logits", "hidden_states", "inputs_embeds")


_KNOWN_KINDS: WeakKeyDictionary[nn.Module, tuple[dict[str, type], dict[str, set[str]]]] = WeakKeyDictionary()
"""The classes of a model's layers, and the kinds that `_kinds_of` found of these."""


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers by name, in model order: every module but the root and the containers.

    The names know their kinds (`LayerName`). A layer with an adapter is one layer, with the name that it has without:
    what peft puts into it is none of its own.
    """
    layers = _plain_layers(model)
    # A run asks a dozen times, and to find the kinds takes eight times as long as to find the layers.
    shape = {name: type(module) for name, module in layers.items()}
    known, kinds = _KNOWN_KINDS.get(model, ({}, {}))
    if known != shape:
        kinds = _kinds_of(model, layers)
        _KNOWN_KINDS[model] = shape, kinds
    return {LayerName(name, kinds.get(name, ())): module for name, module in layers.items()}


def _plain_layers(model: nn.Module) -> dict[str, nn.Module]:
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
    """Return the names of the repeated layers of the trunk: the entries of outermost lists of blocks.

    A list of several classes is one of blocks where their names end alike, as those of a hybrid do
    (`JambaMambaDecoderLayer`, `JambaAttentionDecoderLayer`). A list of single layers, as Gemma 3n's projections of its
    streams, is one where the model has no other.
    """
    whole, single = _lists_of(model, single=False), _lists_of(model, single=True)
    return whole or single


def _lists_of(model: nn.Module, *, single: bool) -> list[str]:
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or any(name.startswith(f"{b}.") for b in blocks):
            continue
        if not any(True for _ in module.parameters()) or all(map(_is_single, module)) is not single:
            continue
        if len({_last_word(type(child).__name__) for child in module}) == 1:
            blocks += [f"{name}.{index}" for index in range(len(module))]
    return blocks


def _is_single(module: nn.Module) -> bool:
    """Say whether a module is one layer: a linear one, say, and no block of several."""
    base = base_of_layer(module)
    return not any(True for _ in base.children()) and (
        hasattr(base, "in_features") or type(base).__module__.startswith("torch.nn.")
    )


def _last_word(name: str) -> str:
    """Return the last word of a class's name, `Layer` of `JambaMambaDecoderLayer`."""
    return re.split(r"(?<=[a-z0-9])(?=[A-Z])", name)[-1]


SEEN_OR_HEARD = re.compile(r"(vision|image|audio|speech)\w*_config$")
SENSES = {"vision": "vision", "image": "vision", "audio": "audio", "speech": "audio"}
"""What a configuration or a processor calls a sense → what a part of a model is called by it."""


def towers_of(model: nn.Module) -> dict[str, str]:
    """Return the parts of a model that read pictures or sounds, by their own configurations: name → vision or audio."""
    settings = vars(model.config) if hasattr(model, "config") else {}
    own = {id(each): found[1] for key, each in settings.items() if (found := SEEN_OR_HEARD.search(key)) and each}
    held = {
        name: SENSES[own[id(config)]]
        for name, part in model.named_modules()
        if name and id(config := getattr(part, "config", None)) in own
    }
    return {name: sense for name, sense in held.items() if not any(name.startswith(f"{each}.") for each in held)}


def _parts_of(model: nn.Module, blocks: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return the parts of a model that have blocks of their own, name → what it is called; and that of all the rest."""
    towers = towers_of(model)
    if towers:
        return towers, "text"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoders = {block[: found.end()] for block in blocks if (found := re.match(r"(.*\.)?encoder(?=\.)", block))}
        return dict.fromkeys(encoders, "encoder"), "decoder"
    return {}, ""


def _kinds_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """Return layer → what it is (`KINDS`), with the part of the model in front where it has several.

    What the head reads comes from the part that has no name of its own, whose layers are of the plain kinds as well.
    """
    blocks = blocks_of(model)
    parts, rest = _parts_of(model, blocks)
    starts = tuple((f"{name}.", part) for name, part in parts.items())
    inside, kinds, block = {*blocks}, dict[str, set[str]](), ""
    for name, module in layers.items():
        block = name if name in inside else block if name.startswith(f"{block}.") else ""
        own = _kinds_of_module(base_of_layer(module), in_block=bool(block), is_block=block == name)
        if "linears" in own and "experts" in name.split("."):
            own = own - {"linears"} | {"experts"}
        if not own:
            continue
        part = next((part for start, part in starts if name.startswith(start)), "")
        named = part or rest
        kinds[name] = {f"{named}.{kind}" for kind in own if named} | (own if not part else set())
    return _innermost(kinds)


def _kinds_of_module(module: nn.Module, *, in_block: bool, is_block: bool) -> set[str]:
    # By name: transformers' Conv1D (GPT-2) and quantizers' classes are linear layers too, but no nn.Linear.
    kind = type(module).__name__
    found = {
        "blocks": is_block,
        "linears": in_block and ("Linear" in kind or kind.endswith("Conv1D")),
        "experts": bool(packed_experts(module)) and "Expert" in kind,
        "norms": "Norm" in kind,
        "attention": in_block and not is_block and re.search("Att(entio)?n", kind) is not None,
    }
    return {name for name, holds in found.items() if holds}


def _innermost(kinds: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return it without attention that holds another one (BERT's holds the norm behind it as well)."""
    attention = [name for name, own in kinds.items() if any(kind.endswith("attention") for kind in own)]
    outer = {one for one, other in pairwise(attention) if other.startswith(f"{one}.")}
    return {
        name: {kind for kind in own if not kind.endswith("attention")} if name in outer else own
        for name, own in kinds.items()
    }


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
            own = {kind for kind in kinds_of_name(name) if kind.endswith("experts")}
            layers |= {
                LayerName(f"{name}.{index}.{part}", own): Expert(module, name, index, place)
                for part, place in places.items()
            }
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


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile wrapped; any other as it is.

    Raises:
        InfraError: a layer of it is wrapped, whose hooks would be traced, and whose name would be another one.
    """
    own = getattr(model, "_orig_mod", None)
    model = own if isinstance(own, nn.Module) else model
    for name, module in model.named_modules():
        if name.endswith("._orig_mod") or name == "_orig_mod":
            where = name.removesuffix("_orig_mod").rstrip(".")
            raise InfraError(
                f"{where} is wrapped by torch.compile ({type(module).__name__}), which traces hooks instead of calling "
                "them: compile it in place, module.compile(), or give the model as it was before"
            )
    return model


@contextmanager
def evaluating(model: nn.Module, *, use_cache: bool = False) -> Iterator[None]:
    """Put a model in evaluation mode, compiled calls off and its KV cache off, or on; afterwards all is as it was."""
    # Module by module: a part of a model may have been in another mode than the whole.
    training = {name: module.training for name, module in model.named_modules()}
    # What `module.compile()` leaves: calls that trace hooks.
    compiled = {module: call for module in model.modules() if (call := module.__dict__.get("_compiled_call_impl"))}
    # To set a mode costs as much as a small model's forward, so that it's done only where it changes something.
    changes = any(training.values())
    if changes:
        model.eval()
    for module in compiled:
        module._compiled_call_impl = None
    configs = _configs_of(model, parts=use_cache)
    before = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = use_cache
    try:
        yield
    finally:
        for name, module in model.named_modules() if changes else ():
            module.training = training[name]
        for module, call in compiled.items():
            module._compiled_call_impl = call
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
    reach = context_of(model)
    if reach is not None and tokens > reach:
        raise InfraError(
            f"data.seq_len {tokens:,} is more than the {reach:,} positions that {type(model).__name__} takes "
            "(max_position_embeddings): lower it"
        )


def context_of(model: nn.Module) -> int | None:
    """Return how many positions a model takes; None where its configuration doesn't say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    # A scaled rope reaches that much farther; some configurations state the scaled length already, others don't.
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None)
    by_type = list(scaling.values()) if isinstance(scaling, Mapping) else []
    factors = [each.get("factor") for each in (scaling, *by_type) if isinstance(each, Mapping)]
    return int(most * max([1.0, *(float(each) for each in factors if isinstance(each, int | float))]))

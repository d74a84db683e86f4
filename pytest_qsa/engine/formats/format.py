"""The torch half of a quantization format: what its loaded modules look like, and what weight they multiply by.

Each format is one module of this folder with a subclass of `EngineFormat`, and its numpy half in
`checkpoint/formats/`. Formats of other packages register by the entry point group `pytest_qsa.engine_formats`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checkpoint import SIGNS, Format, Tensor as StoredTensor
from ...common import InfraError, Registry, one_line
from ..modules import Expert, Layer, base_of_layer, is_adapted, layers_of
from .adapters import adapted_weight, adapter_class


class EngineFormat:
    """A quantization format as its loader leaves it in a model. A subclass that sets `name` is registered by it.

    Attributes:
        name: that of the numpy half, `pytest_qsa.Format`.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            ENGINE_FORMATS.add(cls.name, cls)

    def owns(self, module: nn.Module) -> bool:
        """Say whether a module keeps its weight in this format."""
        return False

    def weight(self, module: nn.Module) -> Tensor | None:
        """Return the weight of an owned module as its forward uses it, in floating point; None where it has none.

        The module stays as it was.
        """
        raise NotImplementedError

    def scheme(self, module: nn.Module) -> str | None:
        """Return how an owned module is quantized (see `scheme_name`); None where the module doesn't say."""
        return None

    def declared_scheme(self, settings: Mapping[str, Any]) -> str | None:
        """Return the one scheme of all layers that a `quantization_config` states; None for another format.

        For quantizers whose modules don't say their scheme, and whose classes replace every layer that is quantized.
        `settings`: its keys, `quant_method` in lower case.
        """
        return None

    def emulates(self, module: nn.Module) -> bool:
        """Say whether an owned module that rounds its inputs does so in floats, before an ordinary multiplication."""
        return False

    def rounds_to_floats(self, module: nn.Module) -> bool:
        """Say whether an owned module rounds its inputs to floats, whatever its weight's codes are: W4AFP8."""
        return False

    def rounded_inputs(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """Return inputs [..., in] rounded as an owned module does; None where it rounds none, or it isn't known how."""
        return None

    def prepare_streaming(self, model: nn.Module) -> None:
        """Take away what would load or unpack a whole model at once, before its weights stream from disk."""

    def unpack(self, module: nn.Module) -> None:
        """Unpack a module in place whose weights have come from disk, as the forward needs it."""

    def stored_weight(self, stored: Format, layer: str) -> Tensor | None:
        """Return a layer's weight [out, in] as the format's own library reads it in the files; None where it can't.

        The numpy half reads it where there is no such library.
        """
        rows = stored.stored_rows(layer)
        return None if rows is None else torch.from_numpy(rows)


OTHERWISE = "leave its layers out of site: weight, or read them from the files (model.weights: files)"
ENGINE_FORMATS: Registry[type[EngineFormat]] = Registry("pytest_qsa.engine_formats", __package__)


def engine_format_of(stored: Format) -> EngineFormat:
    """Return the torch half of a format; the defaults where it has none.

    Raises:
        InfraError: an entry point of the group `pytest_qsa.engine_formats` can't be loaded.
    """
    found = ENGINE_FORMATS.find(stored.name) if stored.name else None
    return (found or EngineFormat)()


def owner_of(module: nn.Module) -> EngineFormat | None:
    """Return the format in which a module keeps its weight; None for a plain module, and for a format that isn't known.

    Raises:
        InfraError: an entry point of the group `pytest_qsa.engine_formats` can't be loaded.
    """
    module = base_of_layer(module)
    found = _claiming(module, ENGINE_FORMATS.built_in())
    # Every module is asked, so that other packages are imported only for a weight that is no plain float.
    if found is None and _quantized_parts(module):
        return _claiming(module, ENGINE_FORMATS.all())
    return found


def _claiming(module: nn.Module, kinds: Sequence[type[EngineFormat]]) -> EngineFormat | None:
    return next((form for kind in kinds if (form := kind()).owns(module)), None)


def is_plain(weight: Tensor) -> bool:
    """Say whether a tensor holds the numbers that it stands for: floats, in memory of its own."""
    kind = type(weight)
    # A class that dispatches torch's operators by itself keeps its numbers in other tensors, whatever dtype it shows;
    # those of torch.distributed hold a part of a plain one.
    wraps = any("__torch_dispatch__" in vars(each) for each in kind.__mro__[: kind.__mro__.index(Tensor)])
    wraps &= not kind.__module__.startswith("torch.")
    return weight.is_floating_point() and weight.dtype.itemsize > 1 and not wraps


def _quantized_parts(module: nn.Module) -> dict[str, object]:
    """Return what shows that a module's weight is quantized, by name; empty for one that is what it looks like.

    A weight of a float dtype may hold packed bytes, as bitsandbytes' `bnb_4bit_quant_storage` has it: then the tensors
    beside it tell.
    """
    weight = getattr(module, "weight", None)
    tensors = {**module._parameters, **module._buffers}
    found: dict[str, object] = {name: part for name, part in tensors.items() if part is not None and SIGNS.search(name)}
    if isinstance(weight, Tensor):
        states = {f"weight.{name}": getattr(weight, name, None) for name in ("quant_state", "SCB")}
        found |= {name: state for name, state in states.items() if state is not None}
        if found or not is_plain(weight):
            found = {"weight": weight, **found}
    return found


def _described(part: object) -> str:
    """Return the class of a part of a layer, with dtype and shape where it is a tensor: `Tensor int32 8×64`."""
    if not isinstance(part, Tensor):
        return type(part).__name__
    shape = "×".join(map(str, part.shape)) or "scalar"
    return f"{type(part).__name__} {str(part.dtype).removeprefix('torch.')} {shape}"


def dequantized(module: Layer) -> Tensor | None:
    """Return a layer's own weight as its forward uses it, a plain float tensor; None where it has none.

    The layer stays as it was; an offloaded weight must have been brought in. A weight that the loader has unpacked,
    as transformers does of a GGUF file, is plain. That of an expert is a view of the experts' tensor, [out, in].

    Raises:
        InfraError: it is stored in a format that isn't known, or that its library can't undo here; or it has an
            adapter whose delta isn't known.
    """
    if isinstance(module, Expert):
        if is_adapted(module.module):
            raise InfraError(
                f"its experts have an adapter ({adapter_class(module.module)}), whose delta isn't known here"
            )
        packed = module.packed.detach()
        # The usual case comes first: a model may have 20,000 experts, of which each would be asked of all formats.
        if not module.signs and type(packed) is Tensor and is_plain(packed):
            return module.place.of(packed[module.index])
        whole = _dequantized(_alone(module), type(module.module).__name__)
        return None if whole is None else module.place.of(whole)
    if is_adapted(module):
        return adapted_weight(module, dequantized)
    return _dequantized(module, type(module).__name__)


def _dequantized(module: nn.Module, kind: str) -> Tensor | None:
    form = owner_of(module)
    parts = _quantized_parts(module)
    if form is None:
        if parts:
            raise InfraError(f"{_holding(kind, parts)} in a format that is not known: {OTHERWISE}")
        weight = getattr(module, "weight", None)
        return weight.detach() if isinstance(weight, Tensor) else None
    try:
        weight = form.weight(module)
    except torch.OutOfMemoryError:  # a RuntimeError too, which the pass reports as what it is
        raise
    except (ImportError, RuntimeError, ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise InfraError(f"{_holding(kind, parts)}, which {form.name} can't dequantize here ({why})") from error
    if not isinstance(weight, Tensor) or not is_plain(weight):
        raise InfraError(f"{_holding(kind, parts)}, which {form.name} doesn't dequantize: {OTHERWISE}")
    return weight.detach()


def _alone(expert: Expert) -> nn.Module:
    """Return what the module of all experts has of one, under the names that formats know of a linear layer."""
    alone: Any = nn.Module()
    alone.weight = expert.packed.detach()[expert.index]
    alone.block_size = getattr(expert.module, "block_size", None)
    for name, part in expert.signs.items():
        # A scale of the whole tensor has no part for each expert.
        alone.register_buffer(name, part.detach()[expert.index] if part.dim() else part.detach())
    made: nn.Module = alone
    return made


def _holding(kind: str, parts: Mapping[str, object]) -> str:
    """Say what a quantized module of a class holds in the place of its weight."""
    held = ", ".join(f"{name} ({_described(part)})" for name, part in parts.items()) or "nothing that tells its format"
    return f"{kind} holds {held}"


def is_quantized(module: nn.Module) -> bool:
    """Say whether a module keeps its weight in codes: a format owns it, or what it holds shows it."""
    return bool(_quantized_parts(base_of_layer(module))) or owner_of(module) is not None


def schemes_of(model: nn.Module) -> dict[str, str] | None:
    """Return quantized layer → scheme (see `scheme_name`), in model order.

    None where the checkpoint is quantized and the model doesn't say how.
    """
    layers = layers_of(model)
    own = {name: scheme for name, layer in layers.items() if (scheme := _scheme_of(layer)) is not None}
    stated = getattr(getattr(model, "config", None), "quantization_config", None)
    settings = stated if isinstance(stated, dict) else stated.to_dict() if stated is not None else {}
    # The modules say what was loaded, the configuration only what was declared.
    if own or not settings:
        return own
    method = settings.get("quant_method")
    # the libraries' own configurations hold an enum, whose str() is not its value
    settings = {**settings, "quant_method": str(getattr(method, "value", method) or "").lower()}
    scheme = _declared_scheme(settings, ENGINE_FORMATS.built_in()) or _declared_scheme(settings, ENGINE_FORMATS.all())
    return {name: scheme for name, layer in layers.items() if _replaces_linear(layer)} if scheme else None


def _scheme_of(module: nn.Module) -> str | None:
    form = owner_of(module)
    return form.scheme(base_of_layer(module)) if form else None


def _declared_scheme(settings: Mapping[str, Any], kinds: Sequence[type[EngineFormat]]) -> str | None:
    return next((scheme for kind in kinds if (scheme := kind().declared_scheme(settings))), None)


def _replaces_linear(layer: nn.Module) -> bool:
    # Quantizers' classes keep the word in their names where they replace nn.Linear.
    kind = type(base_of_layer(layer))
    return kind is not nn.Linear and "Linear" in kind.__name__


def scheme_name(weight_bits: int, input_bits: int, *, floats: bool) -> str:
    """Return a scheme in one word, `w8a16_int`: the bits of the weights and of the inputs, and the kind of number."""
    return f"w{weight_bits}a{input_bits}_{'fp' if floats else 'int'}"


def bits_of(scheme: str) -> tuple[int, int]:
    """Return the bits of the weights and of the inputs of a scheme."""
    weights, inputs = re.findall(r"\d+", scheme)[:2]
    return int(weights), int(inputs)


def read_layer(stored: Format, layer: str) -> dict[str, Tensor]:
    """Return the tensors of a layer by part, as safetensors gives them to torch."""
    from safetensors import safe_open

    tensors = {}
    # The parts of a layer may lie in several shards; each is opened once.
    for path in {tensor.path for tensor in stored.parts(layer).values()}:
        with safe_open(path, "pt") as file:
            for part, tensor in stored.parts(layer).items():
                if tensor.path == path:
                    tensors[part] = file.get_tensor(tensor.name)
    return tensors


def read_metadata(tensor: StoredTensor) -> dict[str, str]:
    """Return the metadata of the file that holds a tensor."""
    from safetensors import safe_open

    with safe_open(tensor.path, "pt") as file:
        return dict(file.metadata() or {})

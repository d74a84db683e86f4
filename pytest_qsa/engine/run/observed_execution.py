"""How the quantized modules of a model are run: what their own calls did, not what a configuration says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.functional import linear

from ...captures import ExecutedModules, Execution, SiteKey
from ...checkpoint import Files
from ...common import InfraError, logger
from ...suite import EMULATED, KERNELS, UNPACKED, UNPROVED, WEIGHTS_ONLY
from ..formats.format import bits_of, dequantized, is_quantized, owner_of, schemes_of
from ..modules import base_of_layer, input_of, layers_of, tensor_of
from .participant import Forward, Need, Participant

TRIES = 2
"""The most calls of a module that are examined: the first one may show nothing, as when its inputs are all zero."""
ROWS = 8
"""The most tokens of a call that are multiplied again."""
TOLERANCE: Mapping[torch.dtype, float] = {torch.bfloat16: 4e-3}
"""How far two multiplications by the same weight may differ in a dtype; rounding to 8 bits changes over 0.5 %."""
TOLERANCE_OF_OTHERS = 1e-3


class ObservedExecution(Participant):
    """Counts the calls of every quantized module, and multiplies a few tokens of its first one again.

    If a module returns the product of its inputs and its dequantized weight, it rounds no inputs; if it returns that of
    the rounded inputs, it does. `required`: a forward has to run, even where only weights are measured.
    """

    def __init__(self, model: nn.Module, *, required: bool = False) -> None:
        self.needs = Need.ONE_FORWARD if required else Need.NOTHING
        layers = layers_of(model)
        self._layers = list(layers)
        self._schemes = schemes_of(model) or {}
        # of a layer with an adapter only the base is quantized
        found = {name: base_of_layer(layer) for name, layer in layers.items()}
        self._modules = {n: layer for n, layer in found.items() if n in self._schemes or is_quantized(layer)}
        self._calls: dict[str, int] = {}
        self._rounds: dict[str, bool] = {}
        self._ran = False
        self._unseen: frozenset[str] = frozenset()

    def begin(self, exits: ExitStack) -> None:
        """Hook the quantized modules."""
        for name, module in self._modules.items():
            exits.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)

    def forward_ended(self, forward: Forward, output: object) -> None:
        """Note which modules the first forward can't have reached, because it was stopped before them."""
        self._ran = True
        if forward.first:
            self._unseen = self._after(forward.stopped_at) if forward.stopped_at is not None else frozenset()

    def _after(self, stop: SiteKey) -> frozenset[str]:
        layer, site = stop
        after = self._layers[self._layers.index(layer) :]
        # A layer calls the layers inside it before its own output is there.
        return frozenset(n for n in after if not (site == "output" and n.startswith(f"{layer}.")))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            # One answer is enough: each further one would dequantize the weight again.
            if name in self._rounds or self._calls[name] > TRIES:
                return
            inputs, outputs = input_of(args, kwargs), tensor_of(output)
            if inputs is not None and outputs is not None:
                rounds = rounds_inputs(module, inputs, outputs)
                if rounds is not None:
                    self._rounds[name] = rounds

        return hook

    def execution(self, files: Files | None = None, device_class: str | None = None) -> Execution:
        """Return what was observed. `files`: those that the model was loaded from. `device_class`: see `Provenance`."""
        kinds: dict[str, list[str]] = {}
        never = [name for name in self._modules if name not in self._calls and name not in self._unseen]
        for name in self._modules:
            if name in self._calls:
                kinds.setdefault(self._way_of(name), []).append(name)
        if files is not None and (unpacked := _absent(files.stored_quantized, self._modules)):
            kinds[": ".join(filter(None, (UNPACKED, _cause(files, device_class))))] = unpacked
        return Execution(
            self._ran,
            {words: ExecutedModules(len(names), names[0]) for words, names in kinds.items()},
            # A router may send no token to an expert, so that idle experts are counted apart and not named.
            idle=tuple(name for name in never if "expert" not in name) if self._ran else (),
            idle_experts=sum("expert" in name for name in never) if self._ran else 0,
        )

    def _way_of(self, name: str) -> str:
        """Return how one module ran, in the words that `model.require` knows."""
        scheme = self._schemes.get(name)
        weights, activations = bits_of(scheme) if scheme else (None, None)
        kind = f"W{weights}" if weights else "quantized"
        form = owner_of(self._modules[name])
        rounds_to_floats = form is not None and form.rounds_to_floats(self._modules[name])
        floats = " FP" if scheme and (scheme.endswith("_fp") or rounds_to_floats) else ""
        rounds = self._rounds.get(name)
        # A scheme of 16-bit inputs rounds none, so that there is nothing to prove.
        if rounds is None and activations in (None, 16):
            rounds = False
        if rounds is None:
            return f"{kind}A{activations}{floats} {UNPROVED}"
        if not rounds:
            return f"{kind}A16{floats} {WEIGHTS_ONLY}" if weights else WEIGHTS_ONLY
        how = EMULATED if form and form.emulates(self._modules[name]) else KERNELS
        return f"{kind}A{activations if activations and activations < 16 else '?'}{floats} {how}"


def _cause(files: Files, device_class: str | None) -> str:
    """Say why a loader dequantized what the files hold in codes; empty where that isn't known."""
    form = files.format
    if files.folder.gguf_file:
        return form.label
    if files.folder.quantization.get("dequantize"):
        return "dequantize in config.json"
    return f"{form.label} without a GPU" if form.gpu_only and device_class in ("cpu", "mps") else ""


def _absent(stored: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return what is quantized in the files and not in the model; names may differ in their fronts."""
    suffixes = {name[start:] for name in modules for start in _starts(name)}
    return [name for name in stored if not any(name[start:] in suffixes for start in _starts(name)[:3])]


def _starts(name: str) -> list[int]:
    return [0, *(index + 1 for index, character in enumerate(name) if character == ".")]


def rounds_inputs(module: nn.Module, inputs: Tensor, outputs: Tensor) -> bool | None:
    """Say whether a linear module rounded the inputs of a call; None where that can't be found out.

    `inputs`: [..., in]; `outputs`: [..., out].

    Raises:
        torch.OutOfMemoryError: there is no memory for the dequantized weight.
    """
    if "Linear" not in type(module).__name__:
        return None
    try:
        with torch.no_grad(), align_module_device(module):
            weight = dequantized(module)
            if weight is None or weight.shape != (outputs.shape[-1], inputs.shape[-1]):
                return None
            # A kernel may multiply in the dtype of its weight: bitsandbytes' on a CPU does so in bfloat16.
            within = max(TOLERANCE.get(dtype, TOLERANCE_OF_OTHERS) for dtype in (inputs.dtype, weight.dtype))
            return _compare(module, inputs, outputs.flatten(0, -2), weight.to(inputs.dtype), within)
    # It is a RuntimeError too, and would read here as a kernel that can't be multiplied again.
    except torch.OutOfMemoryError:
        raise
    except (InfraError, RuntimeError, AttributeError) as error:  # a format or kernel that can't be multiplied again
        logger.debug("whether a %s rounds its inputs can't be observed: %s", type(module).__name__, error)
        return None


def _compare(module: nn.Module, inputs: Tensor, outputs: Tensor, weight: Tensor, within: float) -> bool | None:
    """Compare a call's outputs [rows, out] with those of the inputs [..., in] as they are, and rounded if declared.

    `within`: how far two multiplications by the same weight may differ.
    """
    chosen = torch.linspace(0, len(outputs) - 1, min(ROWS, len(outputs)), device=inputs.device).long()
    bias = getattr(module, "bias", None)

    def distances(x: Tensor) -> Tensor:
        made = linear(x.flatten(0, -2)[chosen], weight, None if bias is None else bias.to(x.dtype)).float()
        far: Tensor = (outputs[chosen].float() - made).norm(dim=1) / made.norm(dim=1)
        return far

    plain = distances(inputs)
    # A token whose inputs are all zero gives 0/0, which shows nothing.
    plain = plain[plain.isfinite()]
    if not len(plain):
        return None
    form = owner_of(module)
    rounded_inputs = form.rounded_inputs(module, inputs) if form else None
    # Where the rounding is known, the nearer of two products decides: no tolerance is needed.
    if rounded_inputs is not None:
        rounded = distances(rounded_inputs)
        nearer = float(plain.sum() - rounded[rounded.isfinite()].sum())
        return nearer > 0 if nearer else None
    return bool(plain.median() > within)

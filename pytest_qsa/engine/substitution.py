"""The KL divergence of a reference in which some layers have the weights of a quantized checkpoint, in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common import AnomalyError, InfraError, counted, logger, phase
from ..metrics import KL
from ..suite import NamedSubject, files_of
from .formats.format import is_quantized
from .heads import head_of
from .load.batches import Batch, rows_of
from .load.models import Loaded, device_for, quiet
from .modules import Expert, Layer, blocks_of, device_of, evaluating, forward_errors, layers_of, run_batch, with_experts
from .reduce.pairs import scores_of
from .run.next_token import logits_of
from .subject import load_subject, subject_batches

Weights = Callable[[str], NDArray[np.float32]]
"""The name of a module → the checkpoint's weight of it, [out, in]."""
Units = Mapping[str, Sequence[str]]
"""The name of a unit → the names of its layers, whose weights are replaced together."""
Windows = list[NDArray[np.float64]]
"""The KL divergence of each position that counts, in nats, window by window."""
INPUT_ROWS = 128
"""The tokens of which a local error is computed."""
BYTES = 8
"""Those of a weight in memory: it and, while it is replaced, its own, in float32."""


class _Reached(BaseException):
    """Ends a forward behind a block. It is no `Exception`, so that a model's own `except Exception` can't catch it."""

    def __init__(self, output: object) -> None:
        self.output = output


class Substitution:
    """A reference in float32 with its data, and the weights of a checkpoint that can stand in the place of its own.

    `seconds`: of a whole forward of all data. `errors`: layer → ‖Ŵ − W‖² / ‖W‖², of those that were replaced.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], weights: Weights) -> None:
        self._model, self._batches, self._weights = model, list(batches), weights
        self._device = device_of(model)
        self._layers: Mapping[str, Layer] = with_experts(layers_of(model))
        self._blocks = blocks_of(model)
        self._logits: list[Tensor] = []
        self.seconds = 0.0
        self.errors: dict[str, float] = {}

    @property
    def linears(self) -> list[str]:
        """The names of the layers that a quantizer means by `Linear`."""
        return [name for name, layer in self._layers.items() if isinstance(layer, nn.Linear)]

    @property
    def windows(self) -> int:
        """How many windows of tokens there are."""
        return sum(len(rows_of(batch, 0).samples) for batch in self._batches)

    def untie_head(self, replaced: Collection[str]) -> None:
        """Give the head a weight of its own where it is to be replaced: the embeddings, if it is tied, keep theirs."""
        if (name := head_of(self._model)) in replaced:
            module: Any = self._model.get_submodule(str(name))
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)

    def run_reference(self) -> None:
        """Run the reference alone, with which all else is compared.

        Raises:
            AnomalyError: it predicts NaN or infinity, or returns no logits.
            InfraError: it can't be run, or its predictions don't fit into memory.
        """
        phase("the reference")
        began = time.perf_counter()
        for index, batch in enumerate(self._batches):
            logits = self._forward(batch)
            if not bool(torch.isfinite(logits).all()):
                raise AnomalyError("the reference predicts NaN or infinity: nothing can be compared with it")
            if not index:
                _check_memory(logits.nbytes * len(self._batches), self._device, "the reference's predictions", FEWER)
            self._logits.append(logits)
        self.seconds = time.perf_counter() - began

    def together(self, layers: Sequence[str]) -> Windows:
        """Return the KL divergence where all of these layers have the checkpoint's weights.

        Raises:
            AnomalyError: a weight isn't finite or has another shape, or the model then predicts NaN.
        """
        with self._swapped(layers):
            return [row for index in range(len(self._batches)) for row in self._divergence(index)]

    def alone(self, units: Units) -> Iterator[tuple[str, Windows]]:
        """Yield each unit, in the order of blocks, with the KL divergence where it alone has the checkpoint's weights.

        A forward begins behind the blocks before the unit's, whose output is that of the reference.

        Raises:
            AnomalyError: as `together`.
        """
        states: list[object] = []
        reached, resumes = -1, True
        for index, names in sorted(self._by_block(units).items()):
            while resumes and reached < index - 1:
                reached += 1
                outputs = self._outputs(reached, states)
                if outputs is not None:  # None of a block that isn't called, as of a vision tower
                    states, resumes = outputs, self._resumes(reached, outputs)
            for name in names:
                with self._swapped(units[name]):
                    found = [
                        row
                        for batch in range(len(self._batches))
                        for row in self._divergence(batch, reached, states if resumes else ())
                    ]
                yield name, found

    def share_of_forward(self, layers: Sequence[str]) -> float:
        """Return which share of a forward runs where the weights of these layers are replaced, by their sizes."""
        blocks, head = self._sizes
        first = min(map(self._block_of, layers))
        return (sum(blocks[max(first, 0) :]) + head) / max(1, sum(blocks) + head)

    @cached_property
    def _sizes(self) -> tuple[list[int], int]:
        """The number of parameters of each block, and of the head."""
        modules = [self._model.get_submodule(block) for block in self._blocks]
        head = head_of(self._model)
        ends = [self._model.get_submodule(head)] if head else []
        blocks, after = ([sum(p.numel() for p in module.parameters()) for module in each] for each in (modules, ends))
        return blocks, sum(after)

    def local_errors(self, units: Units) -> dict[str, float]:
        """Return the power of the error in each unit's outputs over that of the outputs, on the reference's inputs.

        Σ‖x·(Ŵ − W)ᵀ‖² / Σ‖x·Wᵀ‖² of 128 tokens; of experts, which no module is called for, that of the weights.
        """
        wanted = {layer for layers in units.values() for layer in layers}
        inputs = self._inputs(wanted)
        found = {}
        for name, layers in units.items():
            error = power = 0.0
            for layer in layers:
                view = self._view(layer)
                new = self._fitting(layer, view)
                own, difference = (_as_matrix(each, inputs.get(layer)) for each in (view, new - view))
                error, power = error + float(difference.square().sum()), power + float(own.square().sum())
            found[name] = error / power if power else float(bool(error))
        return found

    # --- what is replaced

    def _view(self, name: str) -> Tensor:
        """Return the weight of a layer, so that writing into it changes the model."""
        layer: Any = self._layers[name]
        view: Tensor = (
            layer.place.of(layer.packed.data[layer.index]) if isinstance(layer, Expert) else layer.weight.data
        )
        return view

    def _fitting(self, name: str, view: Tensor) -> Tensor:
        """Return the checkpoint's weight in the shape of the reference's.

        Raises:
            AnomalyError: it has another one, or isn't finite.
        """
        new = torch.from_numpy(self._weights(name)).to(view.device)
        if not bool(torch.isfinite(new).all()):
            raise AnomalyError(
                f"the checkpoint's weight of {name} holds NaN or infinity: look at it with checkpoint_health first"
            )
        # transformers' Conv1D (GPT-2) keeps [in, out]; of a square one the orientation that resembles the reference's.
        turned = new.dim() == 2 and new.T.shape == view.shape
        if turned and (new.shape != view.shape or type(self._layers[name]).__name__ == "Conv1D"):
            nearer = new.shape == view.shape and bool((new - view).norm() <= (new.T - view).norm())
            new = new if nearer else new.T
        if new.numel() != view.numel() or len(new) != len(view):
            ours, theirs = ("×".join(map(str, each.shape)) for each in (new, view))
            raise AnomalyError(f"{name} is {ours} in the checkpoint and {theirs} in the reference: is it the original?")
        return new.reshape(view.shape)

    @contextmanager
    def _swapped(self, layers: Sequence[str]) -> Iterator[None]:
        own: list[tuple[Tensor, Tensor]] = []
        try:
            for name in layers:
                view = self._view(name)
                new = self._fitting(name, view)
                power = float(view.square().sum())
                self.errors[name] = float((new - view).square().sum()) / power if power else float(bool(new.any()))
                own.append((view, view.clone()))
                view.copy_(new)
            yield
        finally:
            for view, before in reversed(own):
                view.copy_(before)

    # --- forwards

    def _block_of(self, layer: str) -> int:
        """Return the index of the block that a layer lies in; -1 where it lies in none, for which all has to run."""
        return next((i for i, block in enumerate(self._blocks) if layer.startswith(f"{block}.")), -1)

    def _by_block(self, units: Units) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name, layers in units.items():
            found.setdefault(min(map(self._block_of, layers)), []).append(name)
        return found

    def _forward(self, batch: Batch, after: int = -1, state: object = None) -> Tensor:
        """Return the logits of a batch. `after`: the block up to which nothing runs, for `state` is its output."""
        with quiet(), forward_errors("the reference"), self._skipping(after, state):
            return logits_of(run_batch(self._model, batch, self._device), self._model)

    @contextmanager
    def _skipping(self, after: int, state: object) -> Iterator[None]:
        """Let the blocks up to one return its output without running."""
        names = self._blocks[: after + 1] if state is not None else []
        skipped: list[Any] = [self._model.get_submodule(name) for name in names]
        before = [vars(block).get("forward") for block in skipped]
        given = _copied(state)  # a block may write into its input
        for block in skipped:
            block.forward = lambda *_, **__: given
        try:
            yield
        finally:
            for block, own in zip(skipped, before, strict=True):
                if own is None:
                    del block.forward
                else:
                    block.forward = own

    def _outputs(self, index: int, states: Sequence[object]) -> list[object] | None:
        """Return the output of a block for each batch; `states`: that of the last block before it, empty for none."""
        before = states or [None] * len(self._batches)
        found = [self._output(index, batch, state) for batch, state in zip(self._batches, before, strict=True)]
        return None if any(output is None for output in found) else found

    def _output(self, index: int, batch: Batch, state: object) -> object:
        def stop(module: nn.Module, args: object, output: object) -> None:
            raise _Reached(_copied(output))

        handle = self._model.get_submodule(self._blocks[index]).register_forward_hook(stop)
        try:
            self._forward(batch, index - 1, state)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        return None

    def _resumes(self, index: int, states: Sequence[object]) -> bool:
        """Say whether a forward that begins behind a block makes the reference's logits, to the last bit.

        Some models hand more from block to block than one output.
        """
        same = torch.equal(self._forward(self._batches[0], index, states[0]), self._logits[0])
        if not same:
            logger.debug("%s: no forward can begin behind it; whole ones are run", self._blocks[index])
        return same

    def _divergence(self, index: int, after: int = -1, states: Sequence[object] = ()) -> Windows:
        """Return the KL divergence of the positions of each window of a batch from the reference's predictions."""
        batch, reference = self._batches[index], self._logits[index]
        own = self._forward(batch, after, states[index] if states else None)
        rows = rows_of(batch, 0)
        kept = rows.unpadded("decoder" if rows.has_decoder else "", own.shape[1], own.device)
        following = torch.full(own.shape[1:2], -1, dtype=torch.int64, device=own.device)
        found = []
        for row, keep in enumerate(kept):
            values = scores_of(own[row], reference[row], following)[:, KL]
            found.append((values if keep is None else values[keep]).cpu().numpy())
        if not all(np.isfinite(values).all() for values in found):
            raise AnomalyError("with the checkpoint's weights the reference predicts NaN or infinity")
        return found

    def _inputs(self, wanted: set[str]) -> dict[str, Tensor]:
        """Return some rows of the input of each layer, [R, in], of the first batches, evenly spaced."""
        found: dict[str, list[Tensor]] = {}
        each = max(1, INPUT_ROWS // len(self._batches))

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
                rows = args[0].detach().flatten(0, -2) if args and isinstance(args[0], Tensor) else None
                if rows is not None and rows.is_floating_point():
                    found.setdefault(name, []).append(rows[:: max(1, len(rows) // each)][:each].clone())

            return keep

        modules = {name: layer for name in wanted if isinstance(layer := self._layers[name], nn.Module)}
        handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
        try:
            for batch in self._batches:
                self._forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        return {name: torch.cat(rows) for name, rows in found.items()}


def _as_matrix(weight: Tensor, inputs: Tensor | None) -> Tensor:
    """Return the outputs of a weight [out, in], or [in, out], on inputs [R, in]; itself without any that fit."""
    if inputs is None or weight.dim() != 2:
        return weight
    if weight.shape[1] == inputs.shape[1]:
        return inputs @ weight.T
    return inputs @ weight if len(weight) == inputs.shape[1] else weight


def _copied(value: Any) -> Any:
    """Copy the tensors of what a block returns."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_copied(each) for each in value)
    if isinstance(value, dict):
        return type(value)({key: _copied(each) for key, each in value.items()})
    return value


FEWER = "lower data.num_samples or data.seq_len"
MORE = "run it on a machine with more memory"


def _check_memory(needed: int, device: torch.device, what: str, advice: str) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise InfraError(f"{what} would take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free: {advice}")


@contextmanager
def substitution_of(subject: NamedSubject, weights: Weights, *, allow_code: bool = False) -> Iterator[Substitution]:
    """Load a subject's reference in float32 and run it once over the subject's data.

    Raises:
        AnomalyError: the reference predicts NaN, or no logits.
        InfraError: it can't be loaded or run, is quantized itself, or doesn't fit into memory in float32.
    """
    if not isinstance(subject.reference, NamedSubject):
        raise InfraError("name the original whose weights are kept: --reference ORIGINAL, a folder or a hub id")
    stored = files_of(subject).reference
    count = sum(int(np.prod(tensor.shape)) for tensor in stored.tensors.values()) if stored is not None else 0
    _check_memory(BYTES * count, device_for(subject.memory), f"{subject.reference.path} in float32, twice,", MORE)
    model = subject.reference.model.model_copy(update={"dtype": "float32"})
    original = replace(subject.reference, model=model)
    loaded = load_subject(original, allow_code=allow_code)
    try:
        _check_plain(loaded, original.path)
        with torch.no_grad(), evaluating(loaded.model):
            found = Substitution(loaded.model, subject_batches(original, loaded), weights)
            found.run_reference()
            logger.debug("%s: %s ran in %.1f s", original.path, counted(found.windows, "window"), found.seconds)
            yield found
    finally:
        loaded.close()


def _check_plain(loaded: Loaded, path: str) -> None:
    """Refuse a reference whose weights can't be replaced.

    Raises:
        InfraError: it is quantized, or not in memory as a whole.
    """
    if loaded.stream is not None or any(parameter.is_meta for parameter in loaded.model.parameters()):
        raise InfraError(f"{path} isn't in memory as a whole (memory.offload_device): its weights can't be replaced")
    if coded := next((name for name, module in layers_of(loaded.model).items() if is_quantized(module)), None):
        raise InfraError(f"{path} is quantized itself ({coded}): give the original, --reference ORIGINAL")

"""A forward without data: which calls a model makes, and which tensors it hands on, before a weight is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...captures import SiteKey, Statistic
from ..load.batches import Batch, Rows, rows_of
from ..reduce.observer import StreamObserver
from .hooks import hooked, run_batch
from .visits import Forward, Order, SharingChanged, Visits

NOTHING_LEARNED: tuple[frozenset[SiteKey], Order | None] = (frozenset(), None)


def rehearsal_of(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch, wanted: Mapping[SiteKey, frozenset[Statistic]]
) -> tuple[frozenset[SiteKey], Order | None]:
    """Run a batch on tensors without data; learn what is not shared, and the last call that is needed.

    All samples of a streamed pass are under way at once, so that the first can't tell the others. A model whose calls
    depend on values (the experts of a MoE) can't be run so; it then runs to its end.
    """
    tensors = {"": batch} if isinstance(batch, Tensor) else dict(batch)
    empty = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in tensors.items()}
    unshared: frozenset[SiteKey] = frozenset()
    while True:
        state = Rehearsal(wanted, modules, unshared)
        state.forward = Forward(rows_of(batch, 0), first=True)
        try:
            with torch.no_grad(), hooked(modules, state), without_data(model):
                run_batch(model, empty[""] if isinstance(batch, Tensor) else empty, torch.device("meta"))
            state.end(state.forward)
            return unshared, state.order
        except SharingChanged as change:
            unshared |= {change.site}
        except Exception:  # whatever a model does with a value that isn't there
            return unshared, None


class Rehearsal(Visits):
    """Takes note of calls and of shared tensors as a pass does, and reduces nothing."""

    def _reduce(self, rows: Rows, site: SiteKey, *_: object) -> None:
        self.observers.setdefault(site, StreamObserver(frozenset()))


@contextmanager
def without_data(model: nn.Module) -> Iterator[None]:
    """Let a model whose weights are on the meta device run: its buffers go there as well, and come back."""
    with ExitStack() as stack:
        stack.enter_context(_silent(logging.getLogger("torch._subclasses.fake_tensor")))
        for module in model.modules():
            stack.enter_context(_buffers_on_meta(module))
            if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "out_features"):
                stack.enter_context(_forward_as(module, _shape_of_linear(module)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Keep to ourselves what an operator without values logs before it raises."""
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _buffers_on_meta(module: nn.Module) -> Iterator[None]:
    before = dict(module._buffers)
    module._buffers.update({name: buffer.to("meta") for name, buffer in before.items() if buffer is not None})
    try:
        yield
    finally:
        module._buffers.clear()
        module._buffers.update(before)


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _shape_of_linear(module: Any) -> Callable[[Tensor], Tensor]:
    """Return a forward that needs no weight: a packed one can't be unpacked before it is there."""
    return lambda x: x.new_empty(*x.shape[:-1], module.out_features)

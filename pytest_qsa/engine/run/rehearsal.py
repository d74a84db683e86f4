"""A forward without data: which calls a model makes, and which tensors it hands on, before a weight is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...captures import SiteKey
from ...common import QsaError, logger
from ..load.batches import Batch, BatchRows, rows_of
from ..modules import run_batch
from ..reduce.observer import StreamObserver
from .participant import Forward, Restart
from .site_statistics import SiteStatistics, hooked


def rehearse(model: nn.Module, statistics: SiteStatistics, batch: Batch) -> None:
    """Run a batch on tensors without data; tell `statistics` what is not shared, and the last call that is needed.

    In a streamed pass all samples are under way at once, so that the first can't show the others. A model whose calls
    depend on values (the experts of a MoE) can't be run so; its forwards then run to their end.
    """
    tensors = {"": batch} if isinstance(batch, Tensor) else dict(batch)
    empty = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in tensors.items()}
    rehearsal = _Rehearsal(statistics.wanted, statistics.modules)
    while True:
        rehearsal.begin()
        rehearsal.forward = forward = Forward(batch, rows_of(batch, 0), first=True)
        try:
            with torch.no_grad(), hooked(rehearsal), _without_data(model):
                run_batch(model, empty[""] if isinstance(batch, Tensor) else empty, torch.device("meta"))
            rehearsal.forward_ended(forward)
            break
        # A rehearsal can find a sharing wrong, as a pass can: a layer's second call may get another tensor.
        except Restart:
            continue
        except QsaError:
            raise
        except Exception as error:  # a model may raise anything where a value isn't there
            logger.debug(
                "%s can't be run without data (%s: %s): its forwards run to their end", type(model).__name__,
                type(error).__name__, str(error).partition("\n")[0],
            )  # fmt: skip
            break
    statistics.unshared |= rehearsal.unshared
    statistics.rehearsed = rehearsal.order


class _Rehearsal(SiteStatistics):
    """Takes note of calls and of shared tensors as in a pass, and reduces nothing."""

    def _reduce(self, rows: BatchRows, site: SiteKey, *_: object) -> None:
        self.observers.setdefault(site, StreamObserver(frozenset()))


@contextmanager
def _without_data(model: nn.Module) -> Iterator[None]:
    """Let a model whose weights are on the meta device run: its buffers go there as well, and come back."""
    with ExitStack() as stack:
        # That an operator needs values is expected here; torch would log it as an error.
        stack.enter_context(_silent(logging.getLogger("torch._subclasses.fake_tensor")))
        for module in model.modules():
            stack.enter_context(_buffers_on_meta(module))
            if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "out_features"):
                stack.enter_context(_forward_as(module, _shape_of_linear(module)))
        # The model's own tensors are on the meta device, but weren't made under this mode.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Silence what an operator without values logs before it raises."""
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _buffers_on_meta(module: nn.Module) -> Iterator[None]:
    # Streaming leaves buffers in memory, and an operator can't mix them with tensors on the meta device.
    before = dict(module._buffers)
    module._buffers.update({name: buffer.to("meta") for name, buffer in before.items() if buffer is not None})
    try:
        yield
    finally:
        module._buffers.clear()
        module._buffers.update(before)


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    # compressed-tensors sets a forward on the instance; without one, the class's own must show again.
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

"""A forward without data: which calls a model makes, and which tensors it hands on, before a weight is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .batches import Rows
from .observers import StreamObserver
from .visits import SiteKey, Visits


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

"""A rehearsal: the model runs without data, and shows which calls it makes and which tensors are not shared.

A streamed pass begins with it, for there all samples are under way at once, so that the first can't show the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from ...captures import SiteKey, Statistic
from ...common import QsaError, logger
from ..load.batches import Batch, rows_of
from ..modules import blocks_of, run_batch
from ..reduce.observer import StreamObserver
from .participant import Forward, Restart
from .site_statistics import SiteStatistics, hooked


def rehearse(model: nn.Module, statistics: SiteStatistics, batch: Batch) -> None:
    """Run a batch on tensors without data; tell `statistics` what is not shared, and the last call that is needed.

    A model whose calls depend on values (the experts of a MoE) can't be run so; its forwards then run to their end.
    """
    tensors = {"": batch} if isinstance(batch, Tensor) else dict(batch)
    empty = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in tensors.items()}
    rehearsal, quick = _Rehearsal(statistics.wanted, statistics.modules), True
    while True:
        rehearsal.begin()
        rehearsal.forward = forward = Forward(batch, rows_of(batch, 0), first=True)
        try:
            with torch.no_grad(), hooked(rehearsal), _without_data(model, quick=quick):
                run_batch(model, empty[""] if isinstance(batch, Tensor) else empty, torch.device("meta"))
            rehearsal.forward_ended(forward)
            if not quick or max(forward.calls.values(), default=0) < 2:
                break
            # A second call may unshare a tensor, and what the two kinds share across a block's bounds is not seen.
            quick = False
        # A rehearsal can find a sharing wrong, as a pass can: a layer's second call may get another tensor.
        except Restart:
            continue
        except QsaError:
            raise
        except Exception as error:  # a model may raise anything where a value isn't there
            if quick:
                quick = False
                continue
            logger.debug(
                "%s can't be run without data (%s: %s): its forwards run to their end", type(model).__name__,
                type(error).__name__, str(error).partition("\n")[0],
            )  # fmt: skip
            break
    statistics.unshared |= rehearsal.unshared
    statistics.rehearsed = rehearsal.order


class _Rehearsal(SiteStatistics):
    """Takes note of calls and of shared tensors as in a pass, and reduces nothing."""

    def _observer(self, site: SiteKey, statistics: frozenset[Statistic]) -> StreamObserver:
        return super()._observer(site, frozenset())

    def _reduce(self, *_: object) -> None:
        pass


@contextmanager
def _without_data(model: nn.Module, *, quick: bool) -> Iterator[None]:
    """Let a model whose weights are on the meta device run: its buffers go there as well, and come back.

    `quick`: the blocks get plain tensors of the meta device, on which an operator costs a fraction. What is around the
    blocks gets fake ones in any case, by which transformers knows that a mask has no values.
    """
    # The model's own tensors are on the meta device, but weren't made under this mode.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        # That an operator needs values is expected here; torch would log it as an error.
        stack.enter_context(_silent(logging.getLogger("torch._subclasses.fake_tensor")))
        for module in model.modules():
            stack.enter_context(_buffers_on_meta(module))
            if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "out_features"):
                stack.enter_context(_forward_as(module, _shape_of_linear(module)))
        for block in map(model.get_submodule, blocks_of(model) if quick else ()):
            stack.enter_context(_forward_as(block, _on_plain_tensors(block.forward, fake)))
        stack.enter_context(fake)
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
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    # compressed-tensors sets a forward on the instance; without one, the class's own must show again.
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _on_plain_tensors(forward: Callable[..., Any], fake: FakeTensorMode) -> Callable[..., Any]:
    """Return a forward that takes and returns fake tensors, and computes on plain ones of the meta device."""

    def plain(tensor: FakeTensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            args, kwargs = tree_map_only(FakeTensor, plain, (args, kwargs))
            output = forward(*args, **kwargs)
        return tree_map_only(Tensor, fake.from_tensor, output)

    return run


def _shape_of_linear(module: Any) -> Callable[[Tensor], Tensor]:
    """Return a forward that needs no weight: a packed one can't be unpacked before it is there."""
    return lambda x: x.new_empty(*x.shape[:-1], module.out_features)

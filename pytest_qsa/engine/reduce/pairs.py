"""Reductions of a pair, the reference's tensor and the model's own: by kernels on the CPU and CUDA, else by operators.

Nothing here synchronizes with the device: the results stay there until the pass copies them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...captures import PADDING, Array

ROWS_AT_ONCE = 64
"""Rows of logits that torch's operators widen to float64 at a time: all of them would take gigabytes."""


def powers_of(reference: Tensor, own: Tensor, kept: Tensor | None, *, fused: bool = True) -> Tensor:
    """Return `ERROR_NAMES` of each row of two tensors [T, C], [T, 4] float32; `PADDING` where a row doesn't count.

    NaN and ∞ stay in the sums of their row.
    """
    if fused and compiled(own):
        found = torch.from_numpy(fused_powers(reference, own, np.empty((len(own), 4), dtype=np.float32)))
    elif fused and _on_cuda(own):
        found = cuda_powers(reference, own)
    else:
        found = _powers(reference, own)
    if kept is None:
        return found
    return torch.full_like(found, PADDING).index_copy_(0, kept, found.index_select(0, kept))


def compiled(tensor: Tensor) -> bool:
    """Say whether the kernels for the CPU take a tensor."""
    known = tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and tensor.is_cpu and _has_numba()


@cache
def _has_numba() -> bool:
    # Once: it is asked for every tensor of a pair.
    return importlib.util.find_spec("numba") is not None


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and importlib.util.find_spec("triton") is not None


def cuda_powers(reference: Tensor, own: Tensor) -> Tensor:
    """Return `ERROR_NAMES` of each row by the kernel for CUDA."""
    from . import cuda_kernels as triton_kernels

    found = torch.empty((len(own), 4), dtype=torch.float32, device=own.device)
    triton_kernels.powers[(len(own),)](reference.contiguous(), own.contiguous(), found, own.shape[1], block=2048)
    return found


def _powers(reference: Tensor, own: Tensor) -> Tensor:
    x, y = reference.double(), own.double()
    difference = x - y
    columns = (x.square().sum(1), difference.square().sum(1), y.square().sum(1), difference.abs().amax(1))
    return torch.stack(columns, dim=1).float()


def fused_powers(reference: Tensor, own: Tensor, found: Array) -> Array:
    """Fill found [T, 4] float32 with `ERROR_NAMES` of each row of two tensors that are `compiled`; return it."""
    pair_kernels, threads = _kernels()
    # bfloat16 is widened in registers, which costs less than copies in float32 (docs/benchmarks.md).
    if reference.dtype == own.dtype == torch.bfloat16:
        pair_kernels.powers16(_patterns(reference), _patterns(own), found, threads)
    else:
        pair_kernels.powers32(_floats(reference), _floats(own), found, threads)
    return found


def _kernels() -> tuple[Any, int]:
    """Return the compiled kernels, and on how many threads they run."""
    modules = _kernel_modules()
    return modules[0], modules[1].share_torchs_threads()


@cache
def _kernel_modules() -> tuple[Any, Any]:
    # An import in a function takes as long as the reduction of a small tensor.
    from . import cpu_kernels, pairs_kernels

    return pairs_kernels, cpu_kernels


def channel_powers(reference: Tensor, own: Tensor, kept: Tensor | None) -> Tensor:
    """Return Σx² and Σ(x − x̂)² of each channel of two tensors [T, C], [2, C] float64, over the rows that count."""
    if kept is not None:
        reference, own = reference.index_select(0, kept), own.index_select(0, kept)
    x = reference.float()
    difference = x - own.float()
    return torch.stack([x.square().sum(0, dtype=torch.float64), difference.square().sum(0, dtype=torch.float64)])


COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
"""The name of a statistic of two models' predictions → its function: the subject's and the reference's logits
[T, V] → [T] float64. `scores_of` is apart, for its kernels take all their numbers in one pass over the vocabulary."""


def compares_logits(name: str) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], Tensor]]:
    """Register the reduction of the statistic of that name."""

    def register(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        COMPARISONS[name] = function
        return function

    return register


def compared_logits(name: str, own: Tensor, reference: Tensor) -> Tensor:
    """Return a statistic of each row of two models' logits, [T] float64; a few rows at once are widened to float64."""
    parts = range(0, len(own), ROWS_AT_ONCE)
    return torch.cat([COMPARISONS[name](own[s : s + ROWS_AT_ONCE], reference[s : s + ROWS_AT_ONCE]) for s in parts])


@compares_logits("overlap")
def _overlap(own: Tensor, reference: Tensor) -> Tensor:
    if compiled(own) and compiled(reference):
        return torch.from_numpy(_fused_scores(own, reference, np.full(len(own), -1), overlap=True)[:, 4])
    return torch.minimum(own.double().softmax(1), reference.double().softmax(1)).sum(1)


def comparison_of(own: Tensor, reference: Tensor, following: Tensor, names: Sequence[str]) -> Tensor:
    """Return `SCORE_NAMES` of each row and a column for each statistic of `names`, [T, 4 + N] float64.

    The same numbers as `scores_of` and `compared_logits`, from one pass over the vocabulary where a kernel takes both.
    """
    if compiled(own) and compiled(reference) and "overlap" in names:
        scores = torch.from_numpy(_fused_scores(own, reference, following.numpy(), overlap=True))
        known = {"overlap": scores[:, 4]}
    else:
        scores, known = scores_of(own, reference, following), {}
    more = [known[name] if name in known else compared_logits(name, own, reference) for name in names]
    return torch.column_stack([scores[:, :4], *more])


def scores_of(own: Tensor, reference: Tensor | None, following: Tensor, *, fused: bool = True) -> Tensor:
    """Return `SCORE_NAMES` of each row of logits [T, V], [T, 4] float64; NaN where a number isn't known.

    `following` [T] int64: the token that came next, −1 for none.
    """
    if fused and compiled(own):
        return torch.from_numpy(_fused_scores(own, reference, following.numpy()))
    if fused and _on_cuda(own):
        return cuda_scores(own, reference, following)
    parts = []
    for start in range(0, len(own), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        parts.append(_scores(own[rows], None if reference is None else reference[rows], following[rows]))
    return torch.cat(parts)


def cuda_scores(own: Tensor, reference: Tensor | None, following: Tensor) -> Tensor:
    """Return `SCORE_NAMES` of each row by the kernel for CUDA, as `scores_of`."""
    from . import cuda_kernels as triton_kernels

    found = torch.full((len(own), 4), float("nan"), dtype=torch.float64, device=own.device)
    other = own if reference is None else reference
    triton_kernels.compare[(len(own),)](
        other.contiguous(), own.contiguous(), following, found, own.shape[1], compared=reference is not None, block=1024
    )
    found[:, 2].clamp_(min=0)  # a divergence is never negative, but its rounding may be
    return found


def _fused_scores(own: Tensor, reference: Tensor | None, following: Array, *, overlap: bool = False) -> Array:
    pair_kernels, threads = _kernels()
    found = np.full((len(own), 5 if overlap else 4), np.nan)
    if reference is None:
        pair_kernels.score_rows(rows_of_logits(own), following, found[:, 0], _raised(), threads)
    else:
        pair_kernels.compare_rows(rows_of_logits(reference), rows_of_logits(own), following, found, _raised(), threads)
        found[:, 2] = np.maximum(found[:, 2], 0.0)  # as in cuda_scores
    return found


@cache
def _raised() -> Array:
    """Return e^x of each bfloat16 by its pattern, [65536] float64; at least e^−700, as the kernels raise others."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
        return np.exp(np.maximum(values, -700.0))


def _scores(own: Tensor, reference: Tensor | None, following: Tensor) -> Tensor:
    q = own.double().log_softmax(1)
    unknown = torch.full_like(q[:, 0], float("nan"))
    columns = [_nll(q, following), unknown, unknown, unknown]
    if reference is not None:
        p = reference.double().log_softmax(1)
        columns[1] = _nll(p, following)
        columns[2] = (p.exp() * (p - q)).sum(1).clamp_min(0)
        # By value, not by index: a tie is no difference.
        columns[3] = (own.gather(1, reference.argmax(1)[:, None])[:, 0] == own.amax(1)).double()
    return torch.stack(columns, dim=1)


def _nll(log_probabilities: Tensor, following: Tensor) -> Tensor:
    # gather refuses −1, so that no token reads token 0 and is masked afterwards.
    picked = -log_probabilities.gather(1, following.clamp_min(0)[:, None])[:, 0]
    return picked.masked_fill(following < 0, float("nan"))


def _patterns(tensor: Tensor) -> Array:
    # numpy has no bfloat16.
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def rows_of_logits(tensor: Tensor) -> Array:
    """Return a tensor as the kernels read it: the patterns of bfloat16, or float32."""
    return _patterns(tensor) if tensor.dtype == torch.bfloat16 else _floats(tensor)


def _floats(tensor: Tensor) -> Array:
    return tensor.float().contiguous().numpy()

"""Where the time of a pass goes, tensor by tensor, and the kernels in a loop: `python benchmarks/tensors.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import arguments, medians, smollm2, token_batches
from overhead import EVERY, USUAL
from torch import Tensor, nn

from pytest_qsa import capture
from pytest_qsa.engine.reduce import survey_kernels as kernels
from pytest_qsa.engine.reduce.cpu import CpuReducer
from pytest_qsa.engine.reduce.storage import Window
from pytest_qsa.engine.run.site_statistics import SiteStatistics


def timed(name: str) -> list[float]:
    """Keep the seconds of each call of a method of the hooks."""
    taken: list[float] = []
    original = getattr(SiteStatistics, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            taken.append(time.perf_counter() - start)

    setattr(SiteStatistics, name, call)
    return taken


def profile(trunk: nn.Module, batches: list[Tensor], repeats: int) -> None:
    """Print what the hooks take, for a usual suite and for every site: medians over the passes."""
    visits, ends = timed("observe"), timed("numbers")
    for name, suite in (("usual suite", USUAL), ("every site", EVERY)):
        rows = []
        for _ in range(repeats + 1):
            visits.clear()
            ends.clear()
            capture(trunk, batches, **suite)
            sample = len(visits) // len(batches)
            later = visits[sample:]
            each = sum(later) / (len(batches) - 1)
            rows.append(
                (1e6 * statistics.median(later), 1e3 * each, 1e3 * (sum(visits[:sample]) - each), 1e3 * ends[0])
            )
        call, each, more, end = (statistics.median(column) for column in zip(*rows[1:], strict=True))
        print(
            f"{name:<12} a call {call:.0f} µs, a sample {each:.0f} ms, the first {more:.0f} ms more, end {end:.0f} ms"
        )


def loops(threads: int) -> None:
    """Print what the kernels take for a bfloat16 tensor [512, 576] that lies in the caches."""
    torch.set_num_threads(threads)
    reducer = CpuReducer(torch.bfloat16)
    x = torch.randn((512, 576), generator=torch.Generator().manual_seed(0)).bfloat16()
    record, site = np.empty(800, np.uint16), Window(counts=True, signs=False, dtype="bfloat16")
    site.cover(1, (1 << 15) - 1)
    own = {name: np.empty(kernels.FIELDS, np.int64) for name in ("maxima", "maxima and counts")}
    for counted, description in enumerate(own.values()):
        reducer.describe(description.ctypes.data, (512, 576, 800, 16, counted, 1), site, reducer.no_counts)

    def survey(name: str) -> Callable[[], object]:
        return lambda: reducer.survey(x.data_ptr(), record.ctypes.data, own[name].ctypes.data)

    cases: dict[str, Callable[[], object]] = {
        **{name: survey(name) for name in own},
        "x.abs().amax(1)": lambda: x.abs().amax(1),
    }
    for name, seconds in medians(cases, 2000).items():
        print(f"{threads} thread(s), {name}: {1e6 * seconds:.1f} µs, {1e9 * seconds / x.numel():.3f} ns an element")


def main() -> None:
    """Profile SmolLM2's trunk, then the kernels on one thread and on all."""
    options = arguments(__doc__ or "")
    model: Any = smollm2()
    model.config.use_cache = False
    profile(model.model, token_batches(options.samples, options.seq_len), options.repeats)
    for threads in sorted({1, torch.get_num_threads()}):
        loops(threads)


if __name__ == "__main__":
    main()

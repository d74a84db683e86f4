"""The machine for the plan of a run: its memory, its GPUs, and how fast it multiplies. No model is loaded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import torch

from ..suite import Gpu, Machine

PART = 32 << 20
"""How many bytes of a file are read to time reading."""
SECONDS = 0.05
"""For how long a product is repeated."""


def this_machine(dtype: str, weights: Path | None = None) -> Machine:
    """Measure this machine. `dtype`: of the model; `weights`: its largest file, a part of which is read."""
    kind = getattr(torch, dtype)
    memory = psutil.virtual_memory()
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    rates = {"cpu": product_rate(kind, torch.device("cpu"), 512, 2048, 2048)}
    if gpus:
        rates["cuda"] = product_rate(kind, torch.device("cuda"), 2048, 4096, 4096)
    cores = torch.get_num_threads()
    return Machine(cores, memory.total, memory.available, tuple(gpus), rates, reading_rate(weights))


def product_rate(dtype: torch.dtype, device: torch.device, rows: int, inner: int, columns: int) -> float:
    """Return the FLOP/s of [rows, inner] × [inner, columns], 2 for each product that is added."""
    x, w = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
    x @ w
    _wait(device)
    # The product above isn't timed: the first one also pays for loading its kernel.
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        x @ w
        _wait(device)
        times += 1
    return 2 * rows * inner * columns * times / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        # A product on CUDA returns before it has been computed.
        torch.cuda.synchronize(device)


def reading_rate(weights: Path | None) -> float:
    """Return the bytes/s at which the middle of a file is read: from the disk, or from memory that holds it."""
    if weights is None:
        return 1e9
    # Unbuffered, so that no copy of Python's is timed.
    with weights.open("rb", buffering=0) as file:
        file.seek(max(0, os.path.getsize(weights) // 2 - PART // 2))
        began = time.perf_counter()
        count = len(file.read(PART))
        return max(count, 1) / max(time.perf_counter() - began, 1e-6)

"""Which `memory:` settings would fit, how much each takes, and about how long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...suite import Gpu, Machine, Memory
from .sizes import Sizes
from .work import WAVE, Work

BASE = 500 << 20
"""Bytes of a process that has torch and transformers loaded; on a GPU, of a CUDA context."""
HEADROOM = 1.2
"""accelerate's placement takes this share less than is free (engine/models.py)."""
START = 6.0
"""Seconds until torch and transformers are imported."""
COUNTING = 1e9
"""Elements a second and core that are reduced beside the pass (docs/benchmarks.md)."""
TO_DEVICE = 1e10
"""Bytes a second between the memory and a GPU (PCIe 3 × 16)."""


@dataclass(frozen=True)
class Setting:
    """One way to run: peaks in bytes, `gpu` None where none is used. `note`: what is dear about it."""

    memory: Memory
    text: str
    host: int
    gpu: int | None
    seconds: float
    fits: bool
    note: str = ""


def settings_of(sizes: Sizes, work: Work, machine: Machine) -> list[Setting]:
    """Return the ways to run on this machine, the fastest kind first; those that don't fit as well."""
    devices: Sequence[Gpu | None] = [*machine.gpus[:1], None]
    return [setting for gpu in devices for setting in _on(gpu, sizes, work, machine)]


def own_setting(settings: Sequence[Setting], memory: Memory) -> Setting | None:
    """Return the one that a suite's `memory` section stands for; None where nothing is known of its device."""
    wanted = "cpu" if memory.device == "cpu" else "gpu" if memory.device.startswith("cuda") else None
    candidates = [s for s in settings if wanted is None or (s.gpu is None) == (wanted == "cpu")]
    if memory.device not in ("auto", "cpu") and wanted is None:
        return None
    if memory.offload_device == "disk":
        return next((s for s in candidates if s.memory.offload_device == "disk"), None)
    device = [s for s in candidates if s.gpu is not None] or candidates
    whole = next(s for s in device if s.memory.offload_device == "cpu" and not s.note)
    if whole.fits or not memory.auto_offload:
        return whole
    return next((s for s in device if s.note and s.memory.offload_device == "cpu"), whole)


def _on(gpu: Gpu | None, sizes: Sizes, work: Work, machine: Machine) -> Iterator[Setting]:
    """Yield the settings on one device: all in memory, offloaded by accelerate, streamed from disk."""
    device = "cpu" if gpu is None else "cuda"
    free = machine.free if gpu is None else gpu.free
    around = BASE + working(sizes, work) + work.sums
    compute = _compute(sizes, work, machine, device)
    reading = sizes.stored / machine.reading

    def setting(memory: Memory, text: str, peak: int, host: int, seconds: float, note: str = "") -> Setting:
        fits = peak <= free and host <= machine.free
        return Setting(memory, text, host, None if gpu is None else peak, START + seconds, fits, note)

    whole = sizes.weights + around
    host = whole if gpu is None else BASE
    yield setting(Memory(device=device, auto_offload=False), f"{{device: {device}}}", whole, host, reading + compute)
    if whole > free:
        yield _offloaded(gpu, sizes, work, machine, compute)
    if sizes.streams:
        held = waiting(sizes, work, machine)
        streamed = sizes.streamed + around + held
        disk = Memory(device=device, offload_device="disk")
        waves = -(-work.batches // WAVE)
        yield setting(
            disk, f"{{device: {device}, offload_device: disk}}", streamed, streamed if gpu is None else BASE,
            max(reading * waves, compute),
        )  # fmt: skip


def _offloaded(gpu: Gpu | None, sizes: Sizes, work: Work, machine: Machine, compute: float) -> Setting:
    """Place the weights as accelerate does: what the device doesn't hold is fetched for every batch."""
    device = "cpu" if gpu is None else "cuda"
    host_room = int(machine.free / HEADROOM)
    gpu_room = int(gpu.free / HEADROOM) if gpu else 0
    elsewhere = max(0, sizes.weights - gpu_room)
    on_disk = max(0, elsewhere - host_room)
    fetched = work.batches * ((elsewhere - on_disk) / TO_DEVICE * bool(gpu) + on_disk / machine.reading)
    seconds = START + sizes.stored / machine.reading + compute + fetched
    note = f"fetches {shown_bytes(on_disk if gpu is None else elsewhere)} again for each of {work.batches} batches"
    host = min(host_room, elsewhere) + BASE
    around = working(sizes, work) + work.sums
    fits = (gpu.free - gpu_room if gpu else machine.free - host_room) > around
    return Setting(
        Memory(device=device), f"{{device: {device}, auto_offload: true}}", host, gpu.free if gpu else None, seconds,
        fits, note,
    )  # fmt: skip


def working(sizes: Sizes, work: Work) -> int:
    """Return the bytes of a batch on its way: a block's tensors, attention's projections, and the logits."""
    tokens = work.batch * work.tokens
    block = tokens * (4 * sizes.hidden + 3 * sizes.intermediate + 2 * sizes.attention)
    return (max(block, tokens * sizes.vocabulary) + tokens * sizes.hidden) * sizes.width


def waiting(sizes: Sizes, work: Work, machine: Machine) -> int:
    """Return the bytes of hidden states that wait in memory when the weights stream; the rest waits on disk."""
    held = min(work.samples, WAVE * work.batch) * work.tokens * sizes.hidden * sizes.width
    return min(held, machine.free // 4)


def _compute(sizes: Sizes, work: Work, machine: Machine, device: str) -> float:
    """Return the seconds of the products, and on a CPU of the reductions beside them."""
    reducing = work.samples * work.tokens * work.elements / (COUNTING * machine.cores) if device == "cpu" else 0.0
    return work.flops(sizes) / machine.rates[device] + reducing


def shown_bytes(count: float) -> str:
    """Write bytes to two digits: 820 MB, 4.1 GB, 140 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.{0 if count >= 10 * size else 1}f} {unit}"
    return f"{max(count, 0) / 1e3:.0f} kB"

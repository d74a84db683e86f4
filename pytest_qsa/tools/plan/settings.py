"""What a pass needs, and which `memory:` settings would fit, how much each takes, and about how long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...captures import Request, match_layers
from ...suite import Data, Gpu, Machine, Memory
from .sizes import Sizes

BATCHES_IN_WAVE = 256
"""How many batches pass each block together when the weights stream, as in engine/stream/."""
BASE = 500 << 20
"""Bytes of a process with torch and transformers loaded; on a GPU, of a CUDA context."""
HEADROOM = 1.2
"""accelerate leaves this share of the free memory unused when it places the weights."""
START = 6.0
"""Seconds to import torch and transformers."""
COUNTING = 1e9
"""Elements that one core reduces in a second beside the pass (docs/benchmarks.md)."""
TO_DEVICE = 1e10
"""Bytes per second from main memory to a GPU (PCIe 3 × 16)."""


@dataclass(frozen=True)
class Work:
    """One pass over `samples` windows of `tokens` tokens, `batch` of them in a forward.

    `sites`: how many tensors are reduced. `sums`: bytes of what is kept of them. `elements`: their elements per token.
    """

    samples: int
    tokens: int
    batch: int
    sites: int
    sums: int
    elements: int

    @property
    def batches(self) -> int:
        """The number of forwards."""
        return -(-self.samples // self.batch)

    @classmethod
    def of(cls, data: Data, requests: Sequence[Request], sizes: Sizes) -> Work:
        """Return what the requests need, for the layers that the names of the checkpoint's tensors show."""
        sites = {
            (layer, request.site): request.statistics
            for request in requests
            for layer in match_layers(sizes.layers, request.pattern, request.exclude)
            if request.site != "weight"
        }
        tokens = data.num_samples * data.seq_len
        widths = {site: _channels(site[0], site[1], sizes) for site in sites}
        sums = sum(
            statistic.kept_bytes(data.num_samples, tokens, widths[site])
            for site, statistics in sites.items()
            for statistic in statistics
        )
        return cls(data.num_samples, data.seq_len, data.batch_size, len(sites), sums, sum(widths.values()))

    def flops(self, sizes: Sizes) -> float:
        """Return the FLOP of the pass: 2 per parameter and token, 4 per pair of tokens and channel of attention.

        From Kaplan et al., arXiv 2001.08361, but attention as torch's flop counter has it: all pairs of tokens, masked
        or not. The head counts once, for the first batch alone goes through the whole model.
        """
        trunk = 2 * sizes.trunk * self.tokens
        layers = sum(1 for unit in sizes.units if unit.rpartition(".")[2].isdigit())
        attention = 4 * self.tokens**2 * sizes.attention * layers
        # The first batch runs to the logits to find the last layer that is needed; the others stop there.
        head = 2 * sizes.vocabulary * sizes.hidden * self.tokens * self.batch
        return self.samples * (trunk + attention) + head


def _channels(layer: str, site: str, sizes: Sizes) -> int:
    """Return the channels of a site: the intermediate size inside an MLP, otherwise the hidden size."""
    inside = ("down_proj", "fc2", "act_fn") if site == "input" else ("up_proj", "gate_proj", "fc1", "act_fn")
    return sizes.intermediate if layer.endswith(inside) else sizes.hidden


@dataclass(frozen=True)
class Setting:
    """One way to run.

    `host`, `gpu`: peaks in bytes; `gpu` is None without one. `note`: what is expensive about it.
    """

    memory: Memory
    text: str
    host: int
    gpu: int | None
    seconds: float
    fits: bool
    note: str = ""


def settings_of(sizes: Sizes, work: Work, machine: Machine) -> list[Setting]:
    """Return all ways to run on a machine, the fastest kind first; some may not fit."""
    devices: Sequence[Gpu | None] = [*machine.gpus[:1], None]
    return [setting for gpu in devices for setting in _on(gpu, sizes, work, machine)]


def own_setting(settings: Sequence[Setting], memory: Memory) -> Setting | None:
    """Return the setting that a suite's `memory` section means; None for a device that nothing is known of."""
    wanted = "cpu" if memory.device == "cpu" else "gpu" if memory.device.startswith("cuda") else None
    candidates = [s for s in settings if wanted is None or (s.gpu is None) == (wanted == "cpu")]
    if memory.device not in ("auto", "cpu") and wanted is None:
        return None
    if memory.offload_device == "disk":
        return next((s for s in candidates if s.memory.offload_device == "disk"), None)
    device = [s for s in candidates if s.gpu is not None] or candidates
    # The same choice as the loader makes: all in memory if it fits, else offloaded by accelerate.
    whole = next(s for s in device if s.memory.offload_device == "cpu" and not s.note)
    if whole.fits or not memory.auto_offload:
        return whole
    return next((s for s in device if s.note and s.memory.offload_device == "cpu"), whole)


def _on(gpu: Gpu | None, sizes: Sizes, work: Work, machine: Machine) -> Iterator[Setting]:
    """Yield the settings of one device: all in memory, offloaded by accelerate, streamed from disk."""
    device = "cpu" if gpu is None else "cuda"
    free = machine.free if gpu is None else gpu.free
    around = BASE + batch_bytes(sizes, work) + work.sums
    compute = _compute(sizes, work, machine, device)
    reading = sizes.stored / machine.reading

    def setting(memory: Memory, text: str, peak: int, host: int, seconds: float, note: str = "") -> Setting:
        fits = peak <= free and host <= machine.free
        return Setting(memory, text, host, None if gpu is None else peak, START + seconds, fits, note)

    whole = sizes.weights + around
    host = whole if gpu is None else BASE
    yield setting(Memory(device=device, auto_offload=False), f"{{device: {device}}}", whole, host, reading + compute)
    # accelerate offloads only what doesn't fit.
    if whole > free:
        yield _offloaded(gpu, sizes, work, machine, compute)
    if sizes.streams:
        streamed = sizes.streamed + around + waiting_bytes(sizes, work, machine)
        disk = Memory(device=device, offload_device="disk")
        text = f"{{device: {device}, offload_device: disk}}"
        waves = -(-work.batches // BATCHES_IN_WAVE)  # each wave reads all weights again
        host = streamed if gpu is None else BASE
        # The next unit is read while the samples compute: the slower of the two counts.
        yield setting(disk, text, streamed, host, max(reading * waves, compute))


def _offloaded(gpu: Gpu | None, sizes: Sizes, work: Work, machine: Machine, compute: float) -> Setting:
    """Return the setting where accelerate places the weights; what the device lacks is fetched for every batch."""
    device = "cpu" if gpu is None else "cuda"
    host_room = int(machine.free / HEADROOM)
    gpu_room = int(gpu.free / HEADROOM) if gpu else 0
    elsewhere = max(0, sizes.weights - gpu_room)
    on_disk = max(0, elsewhere - host_room)
    fetched = work.batches * ((elsewhere - on_disk) / TO_DEVICE * bool(gpu) + on_disk / machine.reading)
    seconds = START + sizes.stored / machine.reading + compute + fetched
    note = f"fetches {shown_bytes(on_disk if gpu is None else elsewhere)} again for each of {work.batches} batches"
    host = min(host_room, elsewhere) + BASE
    around = batch_bytes(sizes, work) + work.sums
    fits = (gpu.free - gpu_room if gpu else machine.free - host_room) > around
    text = f"{{device: {device}, auto_offload: true}}"
    return Setting(Memory(device=device), text, host, gpu.free if gpu else None, seconds, fits, note)


def batch_bytes(sizes: Sizes, work: Work) -> int:
    """Return the bytes of the tensors of one batch: those of a block with its attention, or the logits."""
    tokens = work.batch * work.tokens
    block = tokens * (4 * sizes.hidden + 3 * sizes.intermediate + 2 * sizes.attention)
    return (max(block, tokens * sizes.vocabulary) + tokens * sizes.hidden) * sizes.width


def waiting_bytes(sizes: Sizes, work: Work, machine: Machine) -> int:
    """Return the bytes of the hidden states that wait in memory when the weights stream; the rest waits on disk."""
    held = min(work.samples, BATCHES_IN_WAVE * work.batch) * work.tokens * sizes.hidden * sizes.width
    # engine/stream/spill.py keeps a quarter of the free memory, and writes the rest to disk.
    return min(held, machine.free // 4)


def _compute(sizes: Sizes, work: Work, machine: Machine, device: str) -> float:
    """Return the seconds of the matrix products, and on a CPU of the reductions beside them."""
    reducing = work.samples * work.tokens * work.elements / (COUNTING * machine.cores) if device == "cpu" else 0.0
    return work.flops(sizes) / machine.rates[device] + reducing


def shown_bytes(count: float) -> str:
    """Return bytes with two digits: 820 MB, 4.1 GB, 140 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.{0 if count >= 10 * size else 1}f} {unit}"
    return f"{max(count, 0) / 1e3:.0f} kB"

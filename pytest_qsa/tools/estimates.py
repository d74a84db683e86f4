"""Which `memory:` settings fit a checkpoint and a machine: how much memory each takes, and about how long a pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..captures import (
    LocalError,
    Request,
    Statistic,
    asks_for_answers,
    match_layers,
    without_answers,
)
from ..suite import ANSWERED_AT_ONCE, Data, Generation, Gpu, Machine, Memory
from .checkpoint_sizes import Sizes

BATCHES_IN_WAVE = 256
"""How many batches pass each block together when the weights stream, as in engine/stream/."""
BASE = 500 << 20
"""Bytes of a process with torch and transformers loaded; on a GPU, of a CUDA context."""
HEADROOM = 1.2
"""accelerate leaves this share of the free memory unused when it places the weights."""
START = 6.0
"""Seconds to import torch and transformers."""
COSTS: Mapping[str, float] = {
    "products": 1.1,
    "activations": 1.2e-9,
    "blocks": 2.4e-4,
    "read": 2.3e-10,
    "compared": 1e-9,
    "words": 2.7e-9,
    "sites": 1e-4,
    "tests": 2.4e-3,
}
"""What a unit of a pass's amounts takes one core, in seconds, fitted by `benchmarks/growth.py` (docs/benchmarks.md).

`products`: a second's operations at the measured rate. `activations`: an element between the products of a block.
`blocks`: a call of a block. `read`: an element of a site. `compared`: one that is held against the reference's.
`words`: a logit that is reduced. `sites`: a site, at the end of the pass. `tests`: an assertion, with pytest's part.
"""
TO_DEVICE = 1e10
"""Bytes per second from main memory to a GPU (PCIe 3 × 16)."""
MEMORY_RATE, GPU_MEMORY_RATE = 1e10, 1e12
"""Bytes of weights a second that a step of an answer reads, in main memory and in a GPU's."""
LAYER_CALL = 5e-4
"""Seconds that the calls of one block take by themselves in each step of an answer."""
PROMPT_TOKENS = 64
"""Of the prompts that the package brings, in their template."""


@dataclass(frozen=True)
class Work:
    """One pass over `samples` windows of `tokens` tokens, `batch` of them in a forward.

    `sites`: how many tensors are reduced. `sums`: bytes of what is kept of them. `read`, `compared`: their elements
    per token, and those that are held against a reference. `alone`: the operations per sample of layers that are run by
    themselves on the reference's input. `logits`: whether the head runs for every sample. `words`: the logits per token
    that are reduced. `tests`: how many assertions are judged. `answers`: prompts that each model answers, and the most
    tokens of an answer.
    """

    samples: int
    tokens: int
    batch: int
    sites: int
    sums: int
    read: int
    compared: int = 0
    alone: int = 0
    logits: bool = False
    words: int = 0
    tests: int = 0
    answers: tuple[int, int] = (0, 0)

    @property
    def batches(self) -> int:
        """The number of forwards."""
        return -(-self.samples // self.batch)

    @classmethod
    def of(
        cls,
        data: Data,
        requests: Sequence[Request],
        sizes: Sizes,
        generation: Generation | None = None,
        tests: int = 0,
    ) -> Work:
        """Return what the requests need, for the layers that the names of the checkpoint's tensors show.

        `generation`: which prompts are answered, where some of the requests ask for that. `tests`: how many are judged.
        """
        asked = (generation or Generation()) if asks_for_answers(requests) else None
        requests = without_answers(requests)
        sites: dict[tuple[str, str], set[Statistic]] = {}
        for request in requests:
            if request.site not in ("weight", "logits"):
                for layer in match_layers(sizes.layers.called, request.pattern, request.exclude):
                    sites.setdefault((layer, request.site), set()).update(request.statistics)
        tokens = data.num_samples * data.seq_len
        widths = {site: _channels(site[0], site[1], sizes) for site in sites}
        sums = sum(
            statistic.kept_bytes(data.num_samples, tokens, widths[site])
            for site, statistics in sites.items()
            for statistic in statistics
        )
        logits = any(request.site == "logits" for request in requests)
        return cls(
            samples=data.num_samples,
            tokens=data.seq_len,
            batch=data.batch_size,
            sites=len(sites),
            sums=sums,
            read=sum(widths.values()),
            compared=sum(widths[site] for site, kept in sites.items() if any(s.reference == "pair" for s in kept)),
            alone=sum(_alone(layer, kept, sizes) for (layer, _), kept in sites.items()),
            logits=logits,
            words=logits * sizes.vocabulary,
            tests=tests,
            answers=(0, 0) if asked is None else (asked.num_prompts, asked.max_new_tokens),
        )

    def amounts(self, sizes: Sizes) -> dict[str, float]:
        """Return how much of each of `COSTS` one model's forwards are, `products` in operations."""
        blocks = sum(1 for unit in sizes.units if unit.rpartition(".")[2].isdigit())
        elements = 4 * sizes.hidden + 3 * sizes.intermediate + 2 * sizes.attention
        return {
            "products": self.flops(sizes),
            "activations": self.samples * self.tokens * blocks * elements,
            "blocks": self.batches * blocks,
        }

    @property
    def reductions(self) -> dict[str, float]:
        """How much of each of `COSTS` is done beside the forwards, `products` in operations."""
        tokens = self.samples * self.tokens
        return {
            "products": self.samples * self.alone,
            "read": tokens * self.read,
            "compared": tokens * self.compared,
            "words": tokens * self.words,
            "sites": self.sites,
            "tests": self.tests,
        }

    def answering(self, sizes: Sizes, rate: float, memory_rate: float) -> float:
        """Return the seconds in which a model answers the prompts, if none of them ends early.

        Each step reads all weights, for 16 prompts at once. `rate`: FLOP a second; `memory_rate`: bytes a second.
        """
        prompts, most = self.answers
        steps = -(-prompts // ANSWERED_AT_ONCE) * most
        layers = sum(1 for unit in sizes.units if unit.rpartition(".")[2].isdigit())
        flops = 2 * (sizes.trunk + sizes.vocabulary * sizes.hidden) * prompts * (most + PROMPT_TOKENS)
        return max(flops / rate, steps * sizes.weights / memory_rate) + steps * layers * LAYER_CALL

    def flops(self, sizes: Sizes) -> float:
        """Return the FLOP of the pass: 2 per parameter and token, 4 per pair of tokens and channel of attention.

        From Kaplan et al., arXiv 2001.08361, but attention as torch's flop counter has it: all pairs of tokens, masked
        or not. Where no logits are asked for, the first batch alone goes through the head.
        """
        trunk = 2 * sizes.trunk * self.tokens
        layers = sum(1 for unit in sizes.units if unit.rpartition(".")[2].isdigit())
        attention = 4 * self.tokens**2 * sizes.attention * layers
        # The first batch runs to the logits to find the last layer that is needed; the others stop there.
        heads = self.samples if self.logits else self.batch
        head = 2 * sizes.vocabulary * sizes.hidden * self.tokens * heads
        return self.samples * (trunk + attention) + head


def seconds_of(amounts: Mapping[str, float], rate: float, costs: Mapping[str, float] = COSTS) -> float:
    """Return the seconds of one core that the amounts take. `rate`: operations that it does in a second."""
    return sum(costs[name] * (amount / rate if name == "products" else amount) for name, amount in amounts.items())


def _alone(layer: str, statistics: Iterable[Statistic], sizes: Sizes) -> int:
    """Return the operations with which a layer is run by itself, on the rows of a sample that are drawn for it."""
    rows = max((each.rows for each in statistics if isinstance(each, LocalError)), default=0)
    return 2 * rows * _channels(layer, "input", sizes) * _channels(layer, "output", sizes)


def _channels(layer: str, site: str, sizes: Sizes) -> int:
    """Return the channels of a site: the intermediate size inside an MLP, otherwise the hidden size."""
    inside = ("down_proj", "fc2", "act_fn") if site == "input" else ("up_proj", "gate_proj", "fc1", "act_fn")
    return sizes.intermediate if layer.endswith(inside) else sizes.hidden


@dataclass(frozen=True)
class Setting:
    """One way to run.

    `host`, `gpu`: peaks in bytes; `gpu` is None without one. `seconds`: by the clock, beside what else runs now.
    `processor`: seconds of the processor. `note`: what is expensive about it.
    """

    memory: Memory
    text: str
    host: int
    gpu: int | None
    seconds: float
    processor: float
    fits: bool
    note: str = ""


def settings_of(sizes: Sizes, work: Work, machine: Machine, reference: Sizes | None = None) -> list[Setting]:
    """Return all ways to run on a machine, the fastest kind first; some may not fit.

    `reference`: of a second model that runs in lockstep.
    """
    devices: Sequence[Gpu | None] = [*machine.gpus[:1], None]
    return [setting for gpu in devices for setting in _on(gpu, sizes, work, machine, reference)]


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


def _on(gpu: Gpu | None, sizes: Sizes, work: Work, machine: Machine, reference: Sizes | None) -> Iterator[Setting]:
    """Yield the settings of one device: all in memory, offloaded by accelerate, streamed from disk."""
    device = "cpu" if gpu is None else "cuda"
    free = machine.free if gpu is None else gpu.free
    models = [sizes] if reference is None else [sizes, reference]
    around = BASE + work.sums + sum(batch_bytes(each, work) for each in models)
    rate = machine.rates[device]
    if gpu is None:
        parts = (work.reductions, *(work.amounts(each) for each in models))
        compute = sum(seconds_of(part, rate / machine.cores) for part in parts) / machine.cores
    else:
        compute = sum(work.flops(each) for each in models) / rate
    reading = sum(each.stored for each in models) / machine.reading
    memory_rate = MEMORY_RATE if gpu is None else GPU_MEMORY_RATE
    compute += sum(work.answering(each, rate, memory_rate) for each in models)

    def setting(memory: Memory, text: str, peak: int, host: int, read: float, note: str = "") -> Setting:
        fits = peak <= free and host <= machine.free
        seconds, processor = _seconds(read, compute, machine, on_gpu=gpu is not None)
        return Setting(memory, text, host, None if gpu is None else peak, seconds, processor, fits, note)

    whole = sum(each.weights for each in models) + around
    host = whole if gpu is None else BASE
    yield setting(Memory(device=device, auto_offload=False), f"{{device: {device}}}", whole, host, reading)
    # accelerate offloads only what doesn't fit.
    if whole > free:
        yield _offloaded(gpu, models, work, machine, compute)
    if all(each.streams for each in models) and not work.answers[0]:  # answers need the whole model
        streamed = around + sum(each.streamed + waiting_bytes(each, work, machine) for each in models)
        disk = Memory(device=device, offload_device="disk")
        text = f"{{device: {device}, offload_device: disk}}"
        waves = -(-work.batches // BATCHES_IN_WAVE)  # each wave reads all weights again
        host = streamed if gpu is None else BASE
        # The next unit is read while the samples compute: the slower of the two counts.
        yield setting(disk, text, streamed, host, max(0.0, reading * waves - compute))


def _seconds(reading: float, compute: float, machine: Machine, *, on_gpu: bool) -> tuple[float, float]:
    """Return the seconds by the clock beside what else runs, and those of the processor.

    `reading`: the time for which only files are read. `compute`: that of the pass on a machine of its own.
    """
    threads = 0 if on_gpu else machine.cores
    clock = START * machine.slowed(1) + reading + compute * machine.slowed(threads)
    return clock, START + reading + compute * threads


def _offloaded(gpu: Gpu | None, models: Sequence[Sizes], work: Work, machine: Machine, compute: float) -> Setting:
    """Return the setting where accelerate places the weights; what the device lacks is fetched for every batch."""
    device = "cpu" if gpu is None else "cuda"
    host_room = int(machine.free / HEADROOM)
    gpu_room = int(gpu.free / HEADROOM) if gpu else 0
    elsewhere = max(0, sum(each.weights for each in models) - gpu_room)
    on_disk = max(0, elsewhere - host_room)
    fetched = work.batches * ((elsewhere - on_disk) / TO_DEVICE * bool(gpu) + on_disk / machine.reading)
    reading = sum(each.stored for each in models) / machine.reading + fetched
    seconds, processor = _seconds(reading, compute, machine, on_gpu=gpu is not None)
    note = f"fetches {shown_bytes(on_disk if gpu is None else elsewhere)} again for each of {work.batches} batches"
    host = min(host_room, elsewhere) + BASE
    around = work.sums + sum(batch_bytes(each, work) for each in models)
    fits = (gpu.free - gpu_room if gpu else machine.free - host_room) > around
    text = f"{{device: {device}, auto_offload: true}}"
    return Setting(Memory(device=device), text, host, gpu.free if gpu else None, seconds, processor, fits, note)


def batch_bytes(sizes: Sizes, work: Work) -> int:
    """Return the bytes of the tensors of one batch: those of a block with its attention, or the logits."""
    tokens = work.batch * work.tokens
    block = tokens * (4 * sizes.hidden + 3 * sizes.intermediate + 2 * sizes.attention)
    return (max(block, tokens * sizes.vocabulary) + tokens * sizes.hidden) * sizes.width


def waiting_bytes(sizes: Sizes, work: Work, machine: Machine) -> int:
    """Return the bytes of the hidden states that wait in memory when the weights stream; the rest waits on disk."""
    held = min(work.samples, BATCHES_IN_WAVE * work.batch) * work.tokens * sizes.hidden * sizes.width
    # engine/stream/disk.py keeps a quarter of the free memory, and writes the rest to disk.
    return min(held, machine.free // 4)


def shown_bytes(count: float) -> str:
    """Return bytes with two digits: 820 MB, 4.1 GB, 140 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.{0 if count >= 10 * size else 1}f} {unit}"
    return f"{max(count, 0) / 1e3:.0f} kB"

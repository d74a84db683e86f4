"""Hooks inside vLLM's workers. This module runs in vLLM's own environment, with torch, numpy and vLLM only.

Which sample and position a row of a packed batch is, is read from the token ids and positions that the model itself is
called with, not from vLLM's model runner, of which there are several.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...captures import Capture, SiteKey, SiteNumbers, Statistic
from ...common import InfraError
from ..modules import input_of, tensor_of
from ..reduce.observer import Reducers, StreamObserver
from ..reduce.storage import Transfer

CAPTURE, HIDDEN, ROWS = "rank-{}.qsa", "hidden-{}.npy", "rows-{}.npz"
"""The files that a worker leaves: its sites, by rank; a sample's last hidden states or logits, as bits; drawn rows.

The rows of a call of a site, [samples × R, C], have its name: call, site and layer, with blanks between.
"""
LINEAR, HEAD = "LinearBase", "ParallelLMHead"
"""The classes of vLLM's linear layers and heads."""
HEAD_NORMS = ("q_norm", "k_norm")
"""The norms of each rank's own heads."""
Gather = Callable[[Tensor], Tensor]
"""Puts the parts that the ranks of a tensor-parallel group have of a tensor together."""


Packed = tuple[tuple[int, ...], Sequence[int]]
"""The lengths of samples that a batch holds whole, in their order, and their indices."""


@dataclass(frozen=True)
class Worker:
    """What a worker is among others. `rank` of `ranks` in its tensor-parallel group; `stages` of the pipeline.

    `gathered`: puts the last axis of the group's tensors together. `metadata`: that of attention in this forward; None
    for a dummy batch. `hidden_size`: the channels of the residual stream.
    """

    hidden_size: int
    metadata: Callable[[], Any]
    gathered: Gather = lambda x: x
    rank: int = 0
    ranks: int = 1
    stages: int = 1


@dataclass(frozen=True)
class Segment:
    """The rows `start` to `end` of a packed batch: the tokens of a sample from `position` on."""

    sample: int
    start: int
    end: int
    position: int


class Samples:
    """Which tokens of which samples a batch holds; each position comes exactly once."""

    def __init__(self, samples: Sequence[Sequence[int]]) -> None:
        self.ids = [np.array(ids, dtype=np.int64) for ids in samples]
        self.done = [0] * len(self.ids)

    def segments(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> list[Segment]:
        """Return the segments of a batch: ids and positions [N]. A request begins where the positions don't go on.

        Raises:
            InfraError: some tokens are none that a sample still lacks.
        """
        found: list[Segment] = []
        breaks = [*(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(ids)]
        start = 0
        for end in breaks:
            while start < end:  # two requests may follow one another as if they were one
                segment = self._segment(ids, int(positions[start]), start, end)
                self.done[segment.sample] += segment.end - segment.start
                found.append(segment)
                start = segment.end
        return found

    def _segment(self, ids: NDArray[np.int64], position: int, start: int, end: int) -> Segment:
        for sample, own in enumerate(self.ids):
            count = min(end - start, len(own) - position)
            lacks = self.done[sample] == position and count > 0
            if lacks and np.array_equal(own[position : position + count], ids[start : start + count]):
                return Segment(sample, start, start + count, position)
        raise InfraError(
            f"vLLM ran the token {ids[start]} at position {position}, which no sample lacks there: it changed the "
            "prompts, or ran a position twice, as it does when its KV cache is full"
        )

    @property
    def lacking(self) -> list[int]:
        """The samples of which not every position has come."""
        return [sample for sample, ids in enumerate(self.ids) if self.done[sample] != len(ids)]


@dataclass(eq=False)
class Probe:
    """What is reduced at one tensor of vLLM's model. `sites`: all that read it, by the checkpoint's names.

    `gather`: makes the whole tensor of the ranks' parts; None where each rank has all of it. `pending`: the rows of
    samples that came in part, by sample and call. `drawn`: its rows that a recorded reference has, by call and sample;
    None where none are kept.
    """

    sites: dict[SiteKey, frozenset[Statistic]]
    observer: StreamObserver
    gather: Gather | None = None
    pending: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    calls: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    drawn: dict[tuple[int, int], Tensor] | None = None

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What some of its sites have."""
        return frozenset[Statistic]().union(*self.sites.values())


class Hooks:
    """The hooks of one worker's part of the model."""

    def __init__(self, model: nn.Module, job: Mapping[str, Any], worker: Worker) -> None:
        self.samples = Samples(job["samples"])
        self.folder = Path(job["folder"])
        self.worker = worker
        self.names = Names(model, job["blocks"], worker)
        self.reducers = Reducers()
        self.probes: list[Probe] = []
        self.segments: list[Segment] = []
        self._packed: Packed | None = None
        self.ignored = 0
        self.handles: list[Any] = []
        self._reduces = worker.rank == 0
        self._predicts = bool(job["predictions"])
        self._logits: Any = model.compute_logits if job.get("logits") else None
        self._hidden: dict[tuple[int, int], list[Tensor]] = {}
        self._drawn = [torch.tensor(positions, dtype=torch.long) for positions in job.get("drawn", {}).get("rows", ())]
        self._drawn_sites = {(layer, site) for layer, site in job.get("drawn", {}).get("sites", ())}
        self._hook(model, job["wanted"])

    def _hook(self, model: nn.Module, wanted: Sequence[tuple[str, Any, Sequence[str]]]) -> None:
        self.handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        places: dict[tuple[str, str, int], tuple[Place, Probe]] = {}
        for layer, site, statistics in wanted:
            place = self.names.place(layer, site)
            if place is None:  # of another pipeline stage
                continue
            key = (place.module, site, place.part if site == "output" else 0)
            _, probe = places.setdefault(key, (place, Probe({}, StreamObserver(frozenset()), place.gather)))
            probe.sites[layer, site] = frozenset(map(Statistic.parse, statistics))
            if (layer, site) in self._drawn_sites:
                probe.drawn = {}
        for (name, site, _), (place, probe) in places.items():
            probe.observer = StreamObserver(probe.statistics, self.reducers)
            self.probes.append(probe)
            module = model.get_submodule(name)
            if site == "input":
                hook = partial(self._input, place, probe)
                self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self.handles.append(module.register_forward_hook(partial(self._output, place, probe)))
        self.handles.append(model.register_forward_hook(self._end))  # last, after the hooks of the model's parts

    def detach(self) -> None:
        """Take the hooks off the model."""
        while self.handles:
            self.handles.pop().remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find out whose rows the batch holds."""
        self.segments, self._packed = [], None
        for probe in self.probes:
            probe.calls = 0
        metadata = self.worker.metadata()
        if metadata is None:  # a dummy batch, by which vLLM warms up and keeps ranks in step
            self.ignored += 1
            return
        ids, positions = _argument("input_ids", 0, args, kwargs), _argument("positions", 1, args, kwargs)
        if ids is None or positions is None:
            raise InfraError("vLLM gives the model embeddings in the place of token ids: nothing tells its rows apart")
        rows = positions[0] if positions.dim() == 2 else positions  # of text all axes of a multimodal rope are alike
        count = _tokens_of(metadata) or len(ids)
        self.segments = self.samples.segments(ids[:count].long().cpu().numpy(), rows[:count].long().cpu().numpy())
        whole = all(each.end - each.start == len(self.samples.ids[each.sample]) for each in self.segments)
        if self.segments and whole:  # the segments of a batch follow one another without a gap
            lengths = tuple(each.end - each.start for each in self.segments)
            self._packed = lengths, [each.sample for each in self.segments]

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._predicts and isinstance(output, Tensor):
            for segment in self.segments:
                rows = output[segment.start : segment.end]
                whole = self._whole(self._hidden, (segment.sample, 0), segment, rows)
                if whole is not None and self._logits is not None:
                    whole = self._logits(whole)  # on all ranks: each has a part of the vocabulary
                if whole is not None and self._reduces:
                    np.save(self.folder / HIDDEN.format(segment.sample), bits_of(whole))
        self.segments = []

    def _input(self, place: Place, probe: Probe, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._reduce(place, probe, place.input(args, kwargs))

    def _output(self, place: Place, probe: Probe, module: nn.Module, args: Any, output: Any) -> None:
        self._reduce(place, probe, place.output(output))

    def _reduce(self, place: Place, probe: Probe, x: Tensor | None) -> None:
        if x is None or not self.segments:
            return
        if probe.gather is not None:
            x = probe.gather(x)
        elif self.worker.ranks > 1:
            probe.sums[0] += float(x.double().sum())
            probe.sums[1] = max(probe.sums[1], float(x.abs().max()))
        call = probe.calls
        probe.calls += 1
        if not self._reduces:
            return
        if self._packed is not None and probe.drawn is None:
            probe.observer.add_packed(x.flatten(1), *self._packed, call)
            return
        for segment in self.segments:
            rows = x[segment.start : segment.end]
            whole = self._whole(probe.pending, (segment.sample, call), segment, rows)
            if whole is None:
                continue
            if probe.drawn is not None:
                at = self._drawn[segment.sample].to(whole.device)
                probe.drawn[call, segment.sample] = whole.flatten(1).index_select(0, at)
            probe.observer.add(whole.flatten(1)[None], [None], [segment.sample], call, token_axis=True)

    def _whole(self, pending: dict[Any, list[Tensor]], key: Any, segment: Segment, rows: Tensor) -> Tensor | None:
        """Return all rows of a sample once they are there; the parts of a chunked prefill are kept until then."""
        length = len(self.samples.ids[segment.sample])
        if len(rows) == length:
            return rows
        parts = pending.setdefault(key, [])
        parts.append(rows.clone())  # the next layer may write in place
        if sum(map(len, parts)) < length:
            return None
        return torch.cat(pending.pop(key))

    def save(self, file: Path, rows: Path | None = None) -> None:
        """Write the numbers of all sites; and the drawn rows of those that have some.

        Raises:
            InfraError: a sample lacks a position, or a site a sample.
        """
        if lacking := self.samples.lacking:
            done, length = self.samples.done[lacking[0]], len(self.samples.ids[lacking[0]])
            raise InfraError(f"vLLM ran {done} of the {length} tokens of sample {lacking[0]}")
        if not self._reduces:
            return
        fetched = Transfer(tensor for probe in self.probes for tensor in probe.observer.tensors())
        sites: dict[SiteKey, SiteNumbers] = {}
        for probe in self.probes:
            layer, site = next(iter(probe.sites))
            numbers = probe.observer.numbers(probe.statistics, fetched)
            if set(numbers.sample.tolist()) != set(range(len(self.samples.ids))):
                raise InfraError(
                    f"vLLM called {layer} for {len(set(numbers.sample.tolist()))} of {len(self.samples.ids)} samples: "
                    f"it runs past its {site}; exclude it"
                )
            sites |= dict.fromkeys(probe.sites, numbers)
        Capture(sites).save(file)
        if rows is not None and self._drawn_sites:
            np.savez(rows, **self._drawn_rows())  # type: ignore[arg-type] # arrays by name

    def _drawn_rows(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        for probe in self.probes:
            for call in {call for call, _ in probe.drawn or ()}:
                parts = [probe.drawn[call, sample] for sample in range(len(self._drawn))] if probe.drawn else []
                for layer, site in probe.sites:
                    if (layer, site) in self._drawn_sites:
                        found[f"{call} {site} {layer}"] = bits_of(torch.cat(parts))
        return found

    @property
    def sums(self) -> dict[str, list[float]]:
        """The sum and the largest magnitude that this rank saw at each tensor that all ranks have whole."""
        return {" ".join(next(iter(p.sites))): p.sums for p in self.probes if p.gather is None}


@dataclass(frozen=True)
class Place:
    """Where vLLM's model has a layer of the checkpoint. `part`: which of the layers that `module` holds fused.

    `sizes`: how many channels of a fused output each of them has on this rank.
    """

    module: str
    kind: str
    part: int = 0
    sizes: tuple[int, ...] = ()
    gather: Gather | None = None

    def input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return what goes into the layer: of a block or a norm the residual stream, which may come in two parts."""
        if self.kind == "linear":
            return input_of(args, kwargs)
        return _stream([*args, *kwargs.values()]) if self.kind in ("block", "norm") else input_of(args, kwargs)

    def output(self, output: Any) -> Tensor | None:
        """Return what comes out of the layer."""
        if self.kind == "block":
            return _stream(output if isinstance(output, (tuple, list)) else [output])
        if self.kind != "linear" or not isinstance(output, tuple):
            found = tensor_of(output)
        else:  # the bias comes apart where whoever called adds it
            found = output[0] if output[1] is None else output[0] + output[1]
        if found is None or len(self.sizes) < 2:
            return found
        start = sum(self.sizes[: self.part])
        return found[..., start : start + self.sizes[self.part]]


def _stream(values: Sequence[Any]) -> Tensor | None:
    """Return the residual stream: vLLM hands it on as hidden states and a residual, of which it is the sum."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if len(tensors) > 1 and tensors[0].shape == tensors[1].shape:
        return tensors[0] + tensors[1]
    return tensors[0] if tensors else None


class Names:
    """Finds the layers of a checkpoint in vLLM's model, which fuses some of them."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], worker: Worker) -> None:
        self.modules = dict(model.named_modules())
        self.blocks = frozenset(blocks)
        self.worker = worker
        self.fused = {
            part: (whole, index)
            for whole, parts in getattr(model, "packed_modules_mapping", {}).items()
            for index, part in enumerate(parts)
        }

    def place(self, layer: str, site: str) -> Place | None:
        """Return where a layer is; None where another pipeline stage has it.

        Raises:
            InfraError: vLLM's model has no such layer, or runs it so that its tensor can't be seen.
        """
        parent, _, last = layer.rpartition(".")
        whole, part = self.fused.get(last, (last, 0))
        name = layer if layer in self.modules else f"{parent}.{whole}".lstrip(".")
        module = self.modules.get(name)
        if self.worker.stages > 1 and (module is None or self._elsewhere(name)):
            return None
        if module is None:
            raise InfraError(f"vLLM's {type(self.modules['']).__name__} has no layer {layer}: exclude it")
        if is_a(module, LINEAR):
            sizes = tuple(module.output_partition_sizes) if name != layer else ()
            return Place(name, "linear", part if sizes else 0, sizes, self._gather(module, last, site))
        kind = self._kind(name, module)
        if not kind or (self.worker.ranks > 1 and kind == "norm" and last in HEAD_NORMS):
            raise InfraError(
                f"vLLM runs {layer} as {type(module).__name__}, whose {site} isn't that of the checkpoint's layer: "
                "exclude it"
            )
        return Place(name, kind)

    def _elsewhere(self, name: str) -> bool:
        """Say whether another stage of the pipeline has a module, or what it is in."""
        parts = name.split(".")
        up = (self.modules.get(".".join(parts[:end])) for end in range(1, len(parts) + 1))
        return any(type(module).__name__ == "PPMissingLayer" for module in up)

    def _kind(self, name: str, module: nn.Module) -> str:
        if name in self.blocks:
            return "block"
        if "norm" in type(module).__name__.lower():
            return "norm"
        inside = any(is_a(child, LINEAR) for child in module.modules())
        return "other" if inside or "Embedding" in type(module).__name__ else ""

    def _gather(self, module: Any, last: str, site: str) -> Gather | None:
        """Return what makes the whole tensor of the ranks' parts; None where each rank has all of it."""
        if self.worker.ranks == 1:
            return None
        if site == "input":
            split = is_a(module, "RowParallelLinear") and module.input_is_parallel
            return self.worker.gathered if split else None
        if not is_a(module, "ColumnParallelLinear") or module.gather_output:
            return None
        copies = getattr(module, "num_kv_head_replicas", 1) if last in ("k_proj", "v_proj") else 1
        return partial(_without_copies, self.worker.gathered, copies=copies)


def _without_copies(gathered: Gather, x: Tensor, copies: int) -> Tensor:
    """Return the outputs of all ranks, [N, C]; of key and value heads that `copies` ranks share, one of the copies."""
    whole = gathered(x.contiguous())
    return whole if copies == 1 else whole.view(len(x), -1, copies, x.shape[-1])[:, :, 0].flatten(1)


def bits_of(x: Tensor) -> NDArray[Any]:
    """Return a tensor's numbers as integers of their bits, for numpy has no bfloat16."""
    return x.contiguous().view(torch.uint16 if x.element_size() == 2 else torch.uint32).cpu().numpy()


def is_a(module: nn.Module, name: str) -> bool:
    """Say whether a module is of a class of vLLM's, or of one that is made of it, by its name."""
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _argument(name: str, index: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    value = kwargs.get(name, args[index] if len(args) > index else None)
    return value if isinstance(value, Tensor) else None


def _tokens_of(metadata: Any) -> int | None:
    """Return how many rows of a batch are tokens; the others fill it up. None where attention doesn't say it."""
    every = metadata.values() if isinstance(metadata, dict) else [metadata]
    return next((int(n) for each in every if (n := getattr(each, "num_actual_tokens", None))), None)


def executions(model: nn.Module) -> dict[str, str]:
    """Return how each linear layer of vLLM's model and its head run: the method or scheme, and the kernel it chose."""
    layers = model.named_modules()
    return {name: _execution(module) for name, module in layers if is_a(module, LINEAR) or is_a(module, HEAD)}


def _execution(module: Any) -> str:
    method, scheme = module.quant_method, getattr(module, "scheme", None)
    kernel = getattr(scheme, "kernel", None) or getattr(method, "kernel", None)
    chosen = (
        getattr(getattr(kernel, "linear_method", None), "__name__", "")
        .removeprefix("_apply_weights_")
        .removeprefix("apply_weights_")
        .strip("_")
    )
    words = [type(each).__name__ for each in (scheme, kernel) if each is not None] or [type(method).__name__]
    return "/".join(words) + (f" ({chosen})" if chosen else "")


@contextmanager
def _torchs_threads() -> Iterator[None]:
    """Give torch its own `set_num_threads` back, which vLLM takes away on a CPU.

    When numba starts, it sets the number of OpenMP threads; whoever starts it restores that, and vLLM's attention
    counts on it.
    """
    taken = torch.set_num_threads
    torch.set_num_threads = torch._C.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = taken


class CaptureExtension:
    """The methods that vLLM's workers get, each called by its name on all ranks."""

    def qsa_attach(self, job: str) -> dict[str, Any]:
        """Hook the model of this worker. `job`: the file that says what is wanted."""
        from vllm import distributed
        from vllm.forward_context import get_forward_context, is_forward_context_available

        def metadata() -> Any:
            return get_forward_context().attn_metadata if is_forward_context_available() else None

        own: Any = self
        content = json.loads(Path(job).read_text(encoding="utf-8"))
        model, config, group = own.get_model(), own.model_config, distributed.get_tp_group()
        worker = Worker(
            config.get_hidden_size(),
            metadata,
            distributed.tensor_model_parallel_all_gather,
            group.rank_in_group,
            group.world_size,
            distributed.get_pp_group().world_size,
        )
        own.qsa_hooks = hooks = Hooks(model, content, worker)
        if config.dtype is not None and own.device.type == "cpu":
            with _torchs_threads():
                hooks.reducers.for_tensor(torch.empty(0, dtype=config.dtype))
        return {
            "executions": executions(model),
            "packed": dict(getattr(model, "packed_modules_mapping", {})),
            "attention": next((type(each.impl).__name__ for each in model.modules() if hasattr(each, "impl")), "none"),
            "class": type(model).__name__,
            "dtype": str(config.dtype),
        }

    def qsa_collect(self, folder: str) -> dict[str, Any]:
        """Write what the hooks saw."""
        own: Any = self
        hooks: Hooks = own.qsa_hooks
        hooks.detach()
        hooks.save(Path(folder) / CAPTURE.format(own.rank), Path(folder) / ROWS.format(own.rank))
        return {"sums": hooks.sums, "ignored": hooks.ignored}

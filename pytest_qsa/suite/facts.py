"""What the engine finds out about a model, a machine and an execution, as plain values that need no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..captures import FLOAT, ExecutedModules, Execution, found_by
from ..common import AnomalyError, InfraError, QsaError, counted

if TYPE_CHECKING:
    from ..captures import Capture
    from ..checkpoint import Files
    from .sections import Model

WEIGHTS_ONLY, EMULATED, KERNELS, UNPROVED = "weights only", "emulated", "by kernels", "unproved"
UNPACKED = f"{WEIGHTS_ONLY}, dequantized when loaded"


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a model and the linear layers in them that every token passes, in model order.

    `experts`: the layers of packed experts, which some of the tokens pass. `routers`: what sends them there. `towers`:
    the parts that read pictures or sounds, whose layers are among these and whose blocks aren't: no text passes them.
    `has_head`: whether the model returns logits; an encoder of embeddings doesn't.
    """

    blocks: Sequence[str]
    linears: Sequence[str]
    experts: Sequence[str] = ()
    routers: Sequence[str] = ()
    towers: Sequence[str] = ()
    has_head: bool = True

    @property
    def weights(self) -> list[str]:
        """All layers whose weights are looked at: linear ones, routers and experts."""
        return [*self.linears, *self.routers, *self.experts]

    @property
    def outside(self) -> str:
        r"""A regex that finds the layers of the towers, `^model\.visual\.`; empty for none."""
        return rf"^({'|'.join(map(re.escape, self.towers))})\." if self.towers else ""

    def renamed(self, names: Mapping[str, str]) -> Anatomy:
        """Return it with other names of these layers."""
        linears, experts, routers = (
            [names[layer] for layer in own] for own in (self.linears, self.experts, self.routers)
        )
        return replace(self, linears=linears, experts=experts, routers=routers)

    @property
    def block_pattern(self) -> str:
        r"""A regex that finds the blocks and nothing in them: `^model\.layers\.\d+$`."""
        # An encoder and a decoder have a list of blocks each.
        trunks = list(dict.fromkeys(re.escape(block.rpartition(".")[0]) for block in self.blocks))
        return rf"^{trunks[0]}\.\d+$" if len(trunks) == 1 else rf"^({'|'.join(trunks)})\.\d+$"

    def portable(self, kind: str) -> str:
        """Return the portable name of a kind of layer in all parts that run: `kind:blocks`, `kind:*.blocks`."""
        several = len({block.rpartition(".")[0] for block in self.blocks}) > 1
        return f"kind:*.{kind}" if several else f"kind:{kind}"

    @property
    def linear_pattern(self) -> str:
        r"""A regex that finds the linear layers by the last part of their names: `\.(q_proj|down_proj)$`."""
        return kinds_pattern(self.linears)

    @property
    def linear_groups(self) -> list[str]:
        r"""A regex for each kind of linear layer, such as `\.q_proj$`: a bound of its own suits each kind."""
        return kind_patterns(self.linears)


def kinds_pattern(layers: Iterable[str]) -> str:
    r"""Return a regex that finds layers by the last part of their names: `\.(q_proj|down_proj)$`."""
    return rf"\.({'|'.join(_kinds(layers))})$"


def kind_patterns(layers: Iterable[str]) -> list[str]:
    r"""Return a regex for each last part of layers' names, such as `\.q_proj$`."""
    return [rf"\.{kind}$" for kind in _kinds(layers)]


def _kinds(layers: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in layers))


@dataclass(frozen=True)
class Gpu:
    """An accelerator; bytes."""

    name: str
    memory: int
    free: int


@dataclass(frozen=True)
class Machine:
    """The machine of a run.

    `cores`: the threads that a pass would run on. `memory`, `free`: bytes. `rates`: device type → FLOP/s of a matrix
    product in the model's dtype; on the CPU by the processor's time, which other programs don't lengthen. `reading`:
    bytes/s from the checkpoint's files. `free_cores`: those that others leave free, None where nothing tells.
    """

    cores: int
    memory: int
    free: int
    gpus: tuple[Gpu, ...]
    rates: Mapping[str, float]
    reading: float
    free_cores: float | None = None

    def slowed(self, threads: int) -> float:
        """Return how many times as long work of so many threads takes here as on a machine with nothing else to do."""
        return max(1.0, threads / max(self.free_cores, 0.05)) if self.free_cores is not None else 1.0


def check_execution(execution: Execution | None, model: Model) -> None:
    """Check that every quantized module ran, in the way that `model.require` asks for.

    Raises:
        AnomalyError: a quantized module never ran, and `model.allow_idle` does not name it.
        InfraError: the model ran in another way.
    """
    allowed = model.allow_idle
    idle = execution.idle if execution else ()
    named = set(found_by(allowed, idle)) if allowed else ()
    idle = tuple(name for name in idle if name not in named)
    if idle:
        others = f" (and {len(idle) - 1} more)" if idle[1:] else ""
        raise AnomalyError(
            f"the quantized module {idle[0]}{others} never ran, so no number is about it: give data "
            "that reach it, or name it in model.allow_idle (a regex)"
        )
    if model.require is not None:
        _check_required(execution, model.require.executed_as)


def check_engine(release: Capture, model: Model | None) -> None:
    """Check that the same engine made the capture of the last release: two engines round differently.

    Raises:
        InfraError: another one did.
    """
    of_pass = any(site != "weight" for _, site in release.sites)
    made_by = "vllm" if (release.provenance.model.device_class or "").startswith("vllm-") else "transformers"
    if model is not None and of_pass and made_by != model.engine.name:
        raise InfraError(
            f"model.previous {model.previous} is a capture by {made_by}, and {model.engine.name} runs this model: "
            "capture the last release with the same model.engine"
        )


def check_reference(capture: Capture, model: Model, files: Callable[[], Files]) -> None:
    """Check that the model is compared with another one: against itself, every number is perfect.

    `files`: opens those of the model and its reference, which may be the same tensors in other files.

    Raises:
        AnomalyError: the reference is a copy, and `model.reference_is_copy` does not say so.
    """
    own, reference = capture.provenance.model, capture.reference
    theirs = reference.provenance.model if reference is not None else capture.provenance.reference
    if theirs is None or model.reference_is_copy or not own.runs_as(theirs):
        return
    same, runs_alike = own.same_weights(theirs), True
    with suppress(QsaError):  # a fixture's model, or a damaged folder, of which the load says so
        same, runs_alike = same or files().same_tensors, files().runs_as_reference
    if same and runs_alike:
        raise AnomalyError(
            f"the reference, {theirs}, is the model itself or a copy of it, run in the same way: nothing is compared; "
            "name the original, or say model.reference_is_copy: true to see the floor of the noise"
        )


def _check_required(execution: Execution | None, required: Sequence[str]) -> None:
    wanted = " or ".join(required)
    if not execution or not execution.forward:
        raise InfraError(f"model.require: executed_as: {wanted} can't be checked: no forward of the checkpoint ran")
    # Without quantized modules the model ran in floating point as a whole.
    for words, kind in (execution.kinds or {FLOAT: ExecutedModules(0, "")}).items():
        ran = set(re.sub("[,:]", "", words.lower()).split())
        # A suite may say less than what ran, and say it in any order.
        if not any(set(way.lower().split()) <= ran for way in required):
            what = f"{counted(kind.modules, 'module')}, the first {kind.first}, ran as {words}" if kind.first else ""
            raise InfraError(
                f"model.require: executed_as: {wanted} is not what ran: "
                f"{what or 'the model ran in floating point'}{_advice(words)}"
            )


def _advice(words: str) -> str:
    if UNPACKED in words:
        return ": the loader unpacked the weights and rounds no inputs (dequantize or run_compressed in config.json?)"
    return ": no input is rounded in its calls" if WEIGHTS_ONLY in words else ""

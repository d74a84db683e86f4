"""Which layers of a quantized checkpoint to keep in 16 bits: the KL divergence that each costs, for the bits it takes.

A unit is what a server fuses, for it takes one scheme only: q+k+v, gate+up, all experts of a block; else a layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import engine
from ..checkpoint import FUSED_LAYERS, NUMBER, Files, Format, Smoothing, StoredWeight, format_of, kind_of
from ..common import AnomalyError, InfraError, Progress, counted, number, phase, text_table
from ..metrics import LEAST_WINDOWS, Estimate, mean_by_window

KEPT_BITS = 16
"""The bits of a weight that isn't quantized."""
MOST_ERROR = 0.7
"""The largest median ‖Ŵ − W‖² / ‖W‖² of a checkpoint that was made of the reference."""
_EXPERTS = re.compile(r"(.*\.experts)\.\d+\.")
_OTHERS = ("input", "output", "k_", "v_", "q_", "bias")
"""How the parts of a layer begin that are none of its weight."""


@dataclass(frozen=True)
class Unit:
    """Layers that a server fuses.

    `layers`: their names in the model. `weights`: how many they have. `bits`: what the checkpoint stores for these.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    bits: int

    @property
    def expert_set(self) -> bool:
        """Whether they are all experts of a block."""
        return bool(_EXPERTS.match(self.layers[0]))

    @property
    def added(self) -> int:
        """The bits that keeping it adds."""
        return max(1, KEPT_BITS * self.weights - self.bits)


@dataclass(frozen=True)
class Ranked:
    """A unit and the KL divergence where it alone is quantized, in nats. `estimated`: it was not measured."""

    unit: Unit
    kl: Estimate
    estimated: bool = False

    @property
    def saved(self) -> float:
        """The KL divergence that keeping it saves for each bit that it adds."""
        return self.kl.value / self.unit.added

    def ties(self, other: Ranked) -> bool:
        """Say whether each lies within the interval of the other, in KL divergence a bit."""
        pairs = ((self, other), (other, self))
        return all(one.kl.low <= another.saved * one.unit.added <= one.kl.high for one, another in pairs)


class QuantizedUnits:
    """The units of a checkpoint and their weights, dequantized from its files; smoothed ones as the original has them.

    `left_out`: the layers of the files that are quantized and that the reference has no layer for.
    """

    def __init__(self, files: Files, modules: Iterable[str]) -> None:
        relation = files.relation
        if relation.kind in ("rotated", "rotated heads"):
            raise InfraError(
                f"{files.folder.path} is rotated: {relation.why}. Its layers alone mean nothing in the reference: rank "
                "a checkpoint that is rounded without it"
            )
        self._smoothed: Smoothing | None = None
        if relation.kind == "smoothed" and files.reference is not None:
            folders, theirs = (files.folder, files.reference), format_of(files.reference)
            shape = partial(_shape, theirs)
            self._smoothed = Smoothing(folders, relation.norms, self._stored, partial(_rows, theirs), shape)
        self._form = files.format
        self.method = self._form.name
        known = self._form.layers_of(list(modules))
        self._layers = {module: layer for module, layer in known.items() if self._form.codes_of(self._holder(layer))}
        if not files.stored_quantized:
            raise InfraError(f"{files.folder.path} stores no quantized layer: there is nothing to rank")
        held = {self._holder(layer) for layer in self._layers.values()}
        self.left_out = [layer for layer in files.stored_quantized if layer not in held]
        blocks = {_block_of(module) for module in modules}
        # A block that the model class doesn't have is a head of several tokens, which transformers leaves out too.
        if lacking := [layer for layer in self.left_out if not files.folder.gguf_file and _block_of(layer) in blocks]:
            raise AnomalyError(
                f"the reference has no layer {lacking[0]} ({len(lacking)} of {len(files.stored_quantized)} quantized "
                "layers): is it the original of this checkpoint?"
            )

    @cached_property
    def units(self) -> dict[str, Unit]:
        """All units by name, in the order of the model."""
        groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for module in self._layers:
            groups.setdefault(_group_of(module), []).append(module)
        return {unit.name: unit for (parent, _), modules in groups.items() for unit in [self._unit(parent, modules)]}

    @property
    def bits(self) -> float:
        """The bits a weight that the checkpoint stores for them."""
        return bits_of(self.units.values())

    @property
    def modules(self) -> list[str]:
        """The names of the quantized layers in the model."""
        return list(self._layers)

    @property
    def layers(self) -> Mapping[str, Sequence[str]]:
        """The names of the layers of each unit."""
        return {name: unit.layers for name, unit in self.units.items()}

    def weight(self, module: str) -> NDArray[np.float32]:
        """Return the dequantized weight of a module.

        Raises:
            AnomalyError: its tensors don't fit one another.
            InfraError: its format can't be read here.
        """
        if self._smoothed is not None:
            return self._smoothed.undone(module).astype("f4")
        found = self._stored(module)
        assert found is not None
        return found

    def _stored(self, module: str, rows: slice = slice(None)) -> NDArray[Any] | None:
        """Return rows of the weight of a module as its files have it; None where they don't have it in codes."""
        if module not in self._layers:
            return None
        stored = StoredWeight(self._form, self._layers[module])
        if stored.problem:
            raise InfraError(stored.problem)
        found = np.concatenate([*stored.parts()])
        return (found if stored.matrix else found.reshape(stored.shape))[rows]

    def _holder(self, layer: str) -> str:
        """Return the layer of the files that holds a layer: that of all experts, for one of them."""
        if layer not in self._form.experts:
            return layer
        holder, _, place = self._form.experts[layer]
        return f"{holder}.{place.tensor}"

    def _unit(self, parent: str, modules: Sequence[str]) -> Unit:
        ends = [module.removeprefix(f"{parent}.") for module in modules]
        name = parent if _EXPERTS.match(modules[0]) else f"{parent}.{_joined(ends)}".lstrip(".")
        layers = [self._layers[module] for module in modules]
        weights = sum(math.prod(StoredWeight(self._form, layer).shape) for layer in layers)
        parts = {holder: self._form.parts(holder) for holder in map(self._holder, layers)}
        stored = [tensor for own in parts.values() for part, tensor in own.items() if not part.startswith(_OTHERS)]
        return Unit(name, tuple(modules), weights, 8 * sum(tensor.stop - tensor.start for tensor in stored))


def _rows(form: Format, module: str, rows: slice) -> NDArray[np.float64] | None:
    return form.rows(form.layers_of([module])[module], rows)


def _shape(form: Format, module: str) -> tuple[int, int] | None:
    return form.weight_shape(form.layers_of([module])[module])


def _block_of(name: str) -> str:
    """Return the block that a layer lies in, `model.layers.3`; empty for none."""
    found = NUMBER.search(name)
    return name[: found.end()] if found else ""


def _group_of(module: str) -> tuple[str, tuple[str, ...]]:
    """Return what a module is fused with: the name before theirs, and their ends."""
    if experts := _EXPERTS.match(module):
        return experts[1], ()
    parent, _, end = module.rpartition(".")
    return parent, next((group for group in FUSED_LAYERS if end in group), (end,))


def _joined(ends: Sequence[str]) -> str:
    """Write the ends of names in one: `{q,k,v}_proj`."""
    if len(ends) == 1:
        return ends[0]
    tails = {end.partition("_")[2] for end in ends}
    tail = f"_{tails.pop()}" if len(tails) == 1 and "" not in tails else ""
    return f"{{{','.join(end.removesuffix(tail) for end in ends)}}}{tail}"


@dataclass(frozen=True)
class Ranking:
    """Units, the one first that saves most KL divergence for each bit that keeping it adds.

    `whole`: the KL divergence where all are quantized.
    """

    ranked: Sequence[Ranked]
    whole: Estimate
    windows: int

    @property
    def units(self) -> list[Unit]:
        """The units in their order."""
        return [each.unit for each in self.ranked]

    @cached_property
    def places(self) -> list[int]:
        """The place of each unit, from 1 on: that of the first unit with which it ties."""
        places: list[int] = []
        for index, each in enumerate(self.ranked):
            leader = self.ranked[places[-1] - 1] if places else None
            places.append(places[-1] if leader is not None and leader.ties(each) else index + 1)
        return places

    def bits(self, kept: Iterable[Unit] = ()) -> float:
        """Return the bits a weight of all units, where some are kept."""
        return bits_of(self.units, kept)

    def within_bits(self, most: float) -> list[Unit]:
        """Return the units to keep where all have at most so many bits a weight: those in order that still fit."""
        kept: list[Unit] = []
        for unit in self.units:
            if self.bits([*kept, unit]) <= most:
                kept.append(unit)
        return kept

    def within_kl(self, most: float, measure: Callable[[Sequence[Unit]], Estimate]) -> tuple[list[Unit], Estimate]:
        """Return the fewest first units that bring the KL divergence to at most so many nats, and what it is then.

        `measure`: the KL divergence of the whole where some units are kept.
        """
        below, above = -1, len(self.ranked)  # kept: too few, enough
        known = {0: self.whole, above: Estimate(0.0, 0.0, 0.0, self.whole.count)}
        while above - below > 1:
            middle = 0 if below < 0 else (below + above) // 2
            if middle not in known:
                known[middle] = measure(self.units[:middle])
            below, above = (below, middle) if known[middle].value <= most else (middle, above)
        return self.units[:above], known[above]


def bits_of(units: Collection[Unit], kept: Iterable[Unit] = ()) -> float:
    """Return the bits a weight of all units, where some are kept in 16."""
    total = sum(unit.bits for unit in units) + sum(unit.added for unit in kept)
    return total / sum(unit.weights for unit in units)


def mean_of(windows: Sequence[NDArray[np.float64]]) -> Estimate:
    """Return the mean KL divergence of all positions, with its interval by window."""
    lengths = [len(values) for values in windows]
    return mean_by_window(np.concatenate(windows), np.repeat(np.arange(len(windows)), lengths))


def ranking_of(
    measured: engine.Substitution,
    quantized: QuantizedUnits,
    *,
    seconds: float,
    progress: Progress,
) -> Ranking:
    """Measure each unit alone, and the whole; where that would take longer than `seconds`, estimate part of them.

    `progress`: called with how many units are measured.

    Raises:
        AnomalyError: the weights are no rounding of the reference's, or aren't finite.
    """
    units = quantized.layers
    measured.untie_head(quantized.modules)
    phase("all units together")
    whole = mean_of(measured.together(quantized.modules))
    _check_original(measured.errors)
    chosen = affordable(measured, units, seconds)
    phase("each unit alone", "units")
    found: dict[str, Estimate] = {}
    for name, windows in measured.alone({name: units[name] for name in chosen}):
        found[name] = mean_of(windows)
        progress(len(found), len(chosen))
    ranked = [Ranked(quantized.units[name], kl) for name, kl in found.items()]
    if len(found) < len(units):
        phase("the local errors of all units")
        errors = measured.local_errors(units)
        values = estimated(list(units), {name: kl.value for name, kl in found.items()}, errors)
        ranked += [
            Ranked(quantized.units[name], Estimate(value, math.nan, math.nan, 0), estimated=True)
            for name, value in values.items()
        ]
    return Ranking(sorted(ranked, key=lambda each: -each.saved), whole, measured.windows)


def _check_original(errors: Mapping[str, float]) -> None:
    """Refuse weights that are no rounding of the reference's.

    Raises:
        AnomalyError: most differ by more than that to one bit would make them, which leaves 0.36 (1 − 2 / π).
    """
    middle = float(np.median(list(errors.values())))
    if middle > MOST_ERROR:
        raise AnomalyError(
            "the checkpoint's weights are no rounding of the reference's: in the median of "
            f"{counted(len(errors), 'layer')} the power of their difference is {number(middle)} × that of the weight: "
            "is it the original?"
        )


def affordable(measured: engine.Substitution, units: Mapping[str, Sequence[str]], seconds: float) -> list[str]:
    """Return the units that can be measured in a time: all, or of each kind at least two, evenly spaced over depth."""
    costs = {name: measured.seconds * measured.share_of_forward(layers) for name, layers in units.items()}
    share = seconds / sum(costs.values()) if sum(costs.values()) else 1.0
    if share >= 1:
        return list(units)
    chosen = set[str]()
    for names in _by_kind(units):
        count = min(len(names), max(2, int(share * len(names))))
        chosen |= {names[int(i)] for i in np.unique(np.linspace(0, len(names) - 1, count).round())}
    return [name for name in units if name in chosen]


def estimated(names: Sequence[str], known: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, float]:
    """Return the KL divergence of the units that weren't measured: their local error × KL / error of their kind.

    That factor is interpolated over depth, in its logarithm, between the measured units of the kind.
    """
    found: dict[str, float] = {}
    for own in _by_kind(names):
        at = [index for index, name in enumerate(own) if name in known and known[name] > 0 and errors[name] > 0]
        factors = [math.log(known[own[index]] / errors[own[index]]) for index in at]
        for index, name in enumerate(own):
            if name not in known:
                factor = math.exp(float(np.interp(index, at, factors))) if at else 0.0
                found[name] = errors[name] * factor
    return found


def _by_kind(names: Iterable[str]) -> Iterable[list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    return kinds.values()


def ranking_lines(ranking: Ranking, top: int) -> Iterator[str]:
    """Yield the ranking as a table, and below it what the singles say of the whole."""
    rows = [("", "unit", "KL alone (nats)", "95 % interval", "Mbit added", "KL saved / Mbit")]
    places = ranking.places
    for place, each in list(zip(places, ranking.ranked, strict=True))[:top]:
        tied = "=" if places.count(place) > 1 else ""
        interval = "estimated" if each.estimated else interval_text(each.kl)
        row = (f"{place}{tied}", each.unit.name, number(each.kl.value), interval, number(each.unit.added / 1e6))
        rows.append((*row, number(each.saved * 1e6)))
    yield from text_table(rows, right={0, 2, 4, 5})
    more = len(ranking.ranked) - top
    if more > 0:
        yield f"… and {more} more: --top {len(ranking.ranked)} lists all"
    yield ""
    singles = sum(each.kl.value for each in ranking.ranked)
    whole = f"{number(ranking.whole.value)} ({interval_text(ranking.whole)})"
    yield (
        f"the KL divergences of the {counted(len(ranking.ranked), 'unit')} alone sum to {number(singles)}; "
        f"all quantized together: {whole}, at {ranking.bits():.3f} bits a weight"
    )
    if count := sum(each.estimated for each in ranking.ranked):
        yield (
            f"{count} of them are estimated from the local error, by the measured units of their kind: to measure all "
            "takes longer than --minutes"
        )
    elif ranking.windows < LEAST_WINDOWS:
        yield f"no intervals and no ties: they take {LEAST_WINDOWS} windows or more, data.num_samples"
    elif any(places.count(place) > 1 for place in places):
        yield "= ties: within the intervals of one another, so that their order is chance"


def interval_text(kl: Estimate) -> str:
    """Write the interval of a mean; a dash where there is none."""
    return "–" if math.isnan(kl.low) else f"{number(max(0.0, kl.low))} … {number(kl.high)}"


def kept_lines(ranking: Ranking, kept: Sequence[Unit], kl: Estimate) -> Iterator[str]:
    """Yield what to keep in 16 bits, and what is left of the KL divergence then. `kl`: that, measured."""
    if not kept:
        yield f"nothing to keep: the KL divergence is {number(kl.value)}, at {ranking.bits():.3f} bits a weight"
        return
    yield (
        f"keep {counted(len(kept), 'unit')} in 16 bits: {ranking.bits():.3f} → {ranking.bits(kept):.3f} bits a weight, "
        f"KL divergence {number(ranking.whole.value)} → {number(kl.value)} ({interval_text(kl)}), measured"
    )
    yield from (f"  {unit.name}" for unit in kept)

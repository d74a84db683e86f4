"""What two models make of one site: the powers of their difference, row by row, so that batching changes nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...captures import (
    ERROR,
    LAYOUTS,
    NOT_COMPARED,
    PADDING,
    ChannelError,
    LocalError,
    SiteKey,
    SiteNumbers,
    Statistic,
    pairwise,
)
from ...common import AnomalyError, InfraError
from ..load.batches import Rows
from ..modules import channels_first, tensor_of
from ..reduce.pairs import channel_powers, powers_of
from ..reduce.storage import Arena, Transfer

LEAST_AGREEMENT = 100.0
"""A layer that treats tokens one by one gives the same for a few of them: Σy² is this many times the error, or more."""


@dataclass(frozen=True)
class ReferenceTensor:
    """What the reference has at a site: its tensor, and what went into the layer.

    `rows`: where some tokens only were kept, which of each sample's that are no padding, ascending; the tensors are
    then [B, ≥ R, C].
    """

    tensor: Tensor
    inputs: Tensor | None = None
    rows: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class PairWants:
    """The statistics of one site that two models are needed for. `channels`: array → which tokens count."""

    error: bool
    local: tuple[int, ...]
    channels: Mapping[str, str]

    @classmethod
    def of(cls, statistics: frozenset[Statistic]) -> PairWants:
        """Read the flags."""
        return cls(
            error=ERROR in statistics,
            local=tuple(s.rows for s in sorted(statistics) if isinstance(s, LocalError)),
            channels={s.key: s.positions for s in sorted(statistics) if isinstance(s, ChannelError)},
        )


Named = Callable[[str, NDArray[np.bool_], int, str], NDArray[np.bool_]]
"""Which tokens of a sample count: positions, those that are no padding, sample, layer → [T] booleans."""


@dataclass
class _Found:
    """What was computed of two tensors, while both live unchanged."""

    tensors: tuple[weakref.ref[Tensor], weakref.ref[Tensor]]
    versions: tuple[int, int]
    wants: PairWants
    rows: list[dict[str, Any]]

    def fits(self, pair: tuple[Tensor, Tensor], versions: tuple[int, int], wants: PairWants) -> bool:
        """Say whether the same would be computed again. What a layer makes itself of its input is its own affair."""
        same = all(kept() is tensor for kept, tensor in zip(self.tensors, pair, strict=True))
        return same and self.versions == versions and self.wants == wants and not (wants.local or wants.channels)


@dataclass
class PairObserver:
    """The rows of one site: whose they are, and their numbers."""

    token_axis: bool = False
    dtype: str = ""
    shape: tuple[int, ...] = ()
    owners: list[tuple[int, int, int]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Pairs:
    """The state of one pass of two models. `wanted`: the statistics of each site; `named`: which tokens count."""

    wanted: Mapping[SiteKey, frozenset[Statistic]]
    modules: Mapping[str, nn.Module]
    named: Named
    observers: dict[SiteKey, PairObserver] = field(default_factory=dict)
    _arena: Arena = field(default_factory=Arena)
    _found: dict[tuple[int, int], _Found] = field(default_factory=dict)

    @cached_property
    def meeting(self) -> frozenset[SiteKey]:
        """Where both tensors have to be there."""
        return frozenset(site for site, statistics in self.wanted.items() if pairwise(statistics))

    @cached_property
    def _wants(self) -> dict[SiteKey, PairWants]:
        return {site: PairWants.of(statistics) for site, statistics in self.wanted.items()}

    def compare(self, rows: Rows, site: SiteKey, call: int, met: ReferenceTensor | None, own: Tensor) -> None:
        """Compare what both models have at a site.

        Raises:
            InfraError: the reference has no such tensor, or one of another shape.
        """
        if met is None:
            raise InfraError(f"the reference doesn't call {site[0]} (call {call + 1}), so its {site[1]} has no partner")
        first = channels_first(self.modules[site[0]])
        shaped, token_axis = rows.shaped(own, first)
        observer = self.observers.setdefault(site, PairObserver(token_axis, _dtype(own), tuple(shaped.shape[1:])))
        wants = self._wants[site]
        for (sample, length), found in zip(
            _owners(rows, shaped, token_axis), self._of(rows, site, met, own, shaped, wants), strict=True
        ):
            if found:
                observer.owners.append((sample, call, length))
                observer.rows.append(found)

    def forget(self) -> None:
        """Forget the tensors of a forward that has ended."""
        self._found.clear()

    def _of(
        self, rows: Rows, site: SiteKey, met: ReferenceTensor, own: Tensor, shaped: Tensor, wants: PairWants
    ) -> list[dict[str, Any]]:
        key = (id(met.tensor), id(own))
        known = self._found.get(key)
        versions = (_version(met.tensor), _version(own))
        if known and known.fits((met.tensor, own), versions, wants):
            return known.rows
        found = self._compared(rows, site, met, shaped, wants)
        self._found[key] = _Found((weakref.ref(met.tensor), weakref.ref(own)), versions, wants, found)
        return found

    def _compared(
        self, rows: Rows, site: SiteKey, met: ReferenceTensor, shaped: Tensor, wants: PairWants
    ) -> list[dict[str, Any]]:
        reference = (
            met.tensor if met.rows is not None else rows.shaped(met.tensor, channels_first(self.modules[site[0]]))[0]
        )
        self._check_shapes(site, met, reference, shaped)
        token_axis = shaped.dim() == 3
        keep = rows.kept(site[0], shaped.shape[1]) if token_axis else [None] * len(rows.samples)
        reference = reference.to(shaped.device, non_blocking=True)
        found: list[dict[str, Any]] = []
        for index, kept in enumerate(keep):
            if kept is not None and not len(kept):
                found.append({})
                continue
            x = reference[index] if token_axis else reference[index][None]
            y = shaped[index] if token_axis else shaped[index][None]
            row = self._row(rows.samples[index], site, (x, y), kept, met, index, wants)
            found.append({name: self._apart(value) for name, value in row.items()})
        return found

    def _apart(self, value: Tensor) -> Tensor | NDArray[Any]:
        """Put what stays away from the memory that the models work in; on an accelerator it stays as it is."""
        if value.device.type != "cpu":
            return value
        kept = self._arena.zeros(tuple(value.shape), value.numpy().dtype)
        kept[...] = value.numpy()
        return kept

    @staticmethod
    def _check_shapes(site: SiteKey, met: ReferenceTensor, reference: Tensor, own: Tensor) -> None:
        """Check that the tensors fit; of a reference that was kept, only the channels can be compared."""
        first = 1 if met.rows is None else -1
        if reference.dim() != own.dim() or reference.shape[first:] != own.shape[first:]:
            theirs, ours = ("×".join(map(str, tensor.shape[first:])) for tensor in (reference, own))
            raise InfraError(f"the {site[1]} of {site[0]} is {ours} here and {theirs} in the reference")

    def _row(
        self,
        sample: int,
        site: SiteKey,
        pair: tuple[Tensor, Tensor],
        kept: Tensor | None,
        met: ReferenceTensor,
        index: int,
        wants: PairWants,
    ) -> dict[str, Any]:
        """Return the numbers of one sample. `kept`: its tokens that are no padding, on the CPU."""
        (x, y), found = pair, {}
        places = _positions(met.rows[index], kept, len(y), site) if met.rows is not None else None
        if places is not None:
            x = x[: len(places)]
        if wants.error:
            there = None if kept is None else placed(kept, y.device)
            found["error"] = powers_of(x, y, there) if places is None else _some_powers(x, y, there, places)
        for count in wants.local:
            drawn = drawn_rows(sample, len(y), kept, count) if places is None else places
            found["local_rows"], found["local"] = self._local(site[0], met, (x, y), index, drawn, count)
        for name, positions in wants.channels.items():
            counting = np.ones(len(y), dtype=bool)
            if kept is not None:
                counting[:] = False
                counting[kept.numpy()] = True
            chosen = np.flatnonzero(self.named(positions, counting, sample, site[0]))
            if places is not None:
                raise InfraError("a reference that was kept has no channels of all tokens: by: channel needs the model")
            found[name] = channel_powers(x, y, placed(torch.from_numpy(chosen), y.device))
        return found

    def _local(
        self, layer: str, met: ReferenceTensor, pair: tuple[Tensor, Tensor], index: int, drawn: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Run the layer on some of the reference's tokens; return their positions [R] and powers [R, 3]."""
        if met.inputs is None:
            raise InfraError(
                f"the reference that was kept has no input of {layer}, which local_sqnr feeds to the layer"
            )
        x, there = pair[0], placed(drawn, pair[0].device)
        inputs = met.inputs[index].to(x.device, non_blocking=True)
        if met.rows is None:
            inputs, x = inputs.index_select(0, there), x.index_select(0, there)
        else:
            inputs, count = inputs[: len(drawn)], max(count, met.tensor.shape[1])
        own = run_rows(self.modules[layer], layer, inputs.to(pair[1].dtype))
        powers = powers_of(x, own, None)[:, :3]
        positions = torch.full((count,), -1, dtype=torch.int32)
        table = torch.zeros((count, 3), dtype=torch.float32, device=powers.device)
        positions[: len(drawn)] = drawn.int()
        table[: len(drawn)] = powers
        return positions, table

    def numbers(self, numbers: Mapping[SiteKey, SiteNumbers]) -> dict[SiteKey, SiteNumbers]:
        """Add what was compared to what was reduced of one model; sites with the same numbers go on sharing them."""
        return joined(numbers, self.observers, self.wanted)


def run_rows(module: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """Run a layer on some tokens [R, C], past its hooks; return [R, C'].

    Raises:
        AnomalyError: the layer can't be run on single tokens.
        torch.OutOfMemoryError, torch.AcceleratorError: the device failed.
    """
    try:
        output = tensor_of(module.forward(inputs[None]))
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # RuntimeErrors too, which say nothing of the layer
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise _mixes(layer) from error
    if output is None or output.dim() != 3:
        raise _mixes(layer)
    return output[0]


def check_rows(layer: str, powers: Tensor) -> None:
    """Check that a layer gave the same for some tokens alone as among the others. `powers`: Σy² and Σ(y − ŷ)².

    Raises:
        AnomalyError: it didn't.
    """
    signal, error = powers.tolist()
    if error * LEAST_AGREEMENT > signal:
        raise _mixes(layer)


def _mixes(layer: str) -> AnomalyError:
    return AnomalyError(
        f"local_sqnr feeds a layer with single tokens of the reference, and {layer} needs more than that (attention, a "
        "block): name its linear layers, or gate sqnr there"
    )


def drawn_rows(sample: int, length: int, kept: Tensor | None, count: int) -> Tensor:
    """Return the positions that stand for a sample's tokens, ascending, [≤ count] on the CPU; the same in every run."""
    if kept is None:
        return torch.from_numpy(_drawn(sample, length, length, count).copy())
    places = kept.numpy()
    return torch.from_numpy(places[_drawn(sample, length, len(places), count)].astype(np.int64))


@lru_cache(1024)
def _drawn(sample: int, length: int, counting: int, count: int) -> NDArray[np.int64]:
    """Draw from so many tokens that count; every layer of a sample asks for the same."""
    if counting <= count:
        return np.arange(counting)
    return np.sort(np.random.default_rng([sample, length]).choice(counting, count, replace=False))


def placed(positions: Tensor, device: torch.device) -> Tensor:
    """Return positions on a device, without waiting for what it is at."""
    return positions.to(device, non_blocking=True)


def _positions(places: Tensor, kept: Tensor | None, length: int, site: SiteKey) -> Tensor:
    """Return where in the sample the tokens stand that were kept: `places` counts those that are no padding."""
    count = length if kept is None else len(kept)
    if len(places) and int(places[-1]) >= count:
        raise InfraError(f"the {site[1]} of {site[0]} has {count} tokens of a sample here, and more in the reference")
    return places if kept is None else kept.index_select(0, places)


def _some_powers(x: Tensor, y: Tensor, kept: Tensor | None, places: Tensor) -> Tensor:
    """Return the powers of some tokens, [T, 4]; `places`: where they stand, on the CPU."""
    places = placed(places, y.device)
    found = torch.full((len(y), 4), PADDING if kept is not None else NOT_COMPARED, device=y.device)
    if kept is not None:
        found.index_fill_(0, kept, NOT_COMPARED)
    return found.index_copy_(0, places, powers_of(x, y.index_select(0, places), None))


def _owners(rows: Rows, shaped: Tensor, token_axis: bool) -> list[tuple[int, int]]:
    return [(sample, shaped.shape[1] if token_axis else 0) for sample in rows.samples]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def joined(
    numbers: Mapping[SiteKey, SiteNumbers],
    observers: Mapping[SiteKey, PairObserver],
    wanted: Mapping[SiteKey, frozenset[Statistic]],
) -> dict[SiteKey, SiteNumbers]:
    """Return the numbers of every site, with those of two models where they were wanted."""
    known: dict[tuple[Any, ...], SiteNumbers] = {}
    found = dict(numbers)
    kept = (value for observer in observers.values() for row in observer.rows for value in row.values())
    fetch = Transfer(value for value in kept if isinstance(value, Tensor))
    for site, statistics in wanted.items():
        observer = observers.get(site)
        if observer is None:
            found[site] = numbers[site].having(statistics, {})
            continue
        key = (id(numbers[site]), statistics, *(id(row) for row in observer.rows))
        if key not in known:
            known[key] = _joined(numbers[site], observer, statistics, site, fetch)
        found[site] = known[key]
    return found


def _joined(
    own: SiteNumbers, observer: PairObserver, statistics: frozenset[Statistic], site: SiteKey, fetch: Transfer
) -> SiteNumbers:
    owners = np.array(observer.owners, dtype=np.int64).reshape(-1, 3)
    order = np.lexsort((owners[:, 1], owners[:, 0]))
    owners, rows = owners[order], [observer.rows[index] for index in order]
    placed: dict[str, Any] = {
        "sample": owners[:, 0].astype(np.int32), "call": owners[:, 1].astype(np.int32), "lengths": owners[:, 2],
    }  # fmt: skip
    if own.populations:
        if any(not np.array_equal(getattr(own, name), array) for name, array in placed.items()):
            raise InfraError(f"the {site[1]} of {site[0]} was compared in other calls than it was measured in")
    else:
        own = replace(own, dtype=observer.dtype, shape=observer.shape, token_axis=observer.token_axis, **placed)
    values = {name: [fetch(row[name]) for row in rows] for name in rows[0]}
    arrays = {name: LAYOUTS[name.partition("/")[0]].join(found) for name, found in values.items()}
    return own.having(statistics, arrays)

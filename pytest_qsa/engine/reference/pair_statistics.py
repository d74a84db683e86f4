"""The difference of two models at their sites, as powers of signal and error. Each row is reduced by itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...captures import (
    ERROR,
    LAYOUTS,
    NOT_COMPARED,
    PADDING,
    Array,
    ChannelError,
    LocalError,
    Pooled,
    SiteKey,
    SiteNumbers,
    Statistic,
    pairwise,
)
from ...common import AnomalyError, InfraError
from ..load.batches import BatchRows
from ..modules import channels_first, tensor_of
from ..reduce.pairs import channel_powers, compiled, fused_powers, powers_of
from ..reduce.storage import Arena, Transfer
from ..run.participant import WantedSites

LEAST_AGREEMENT = 100.0
"""A layer that treats each token by itself has the same output for a few tokens alone: Σy² over the squared error is
at least this."""
RowNumbers = Mapping[str, Tensor | Array]
"""The numbers of one sample, by name of the array."""
SelectTokens = Callable[[str, NDArray[np.bool_], int, str], NDArray[np.bool_]]
"""Returns which tokens of a sample are meant, [T] booleans, by: positions, those that are no padding, sample, layer."""


@dataclass(frozen=True)
class ReferenceTensor:
    """What the reference has at a site: its tensor, and what went into the layer.

    `rows`: for a recorded reference, the indices of the recorded tokens of each sample, ascending, padding not counted;
    the tensors are then [B, ≥ R, C].
    """

    tensor: Tensor
    inputs: Tensor | None = None
    rows: Sequence[Tensor] | None = None


@dataclass
class _SiteRows:
    """The rows of one site: sample, call and number of tokens of each, and its numbers by name of the array."""

    channels_first: bool
    token_axis: bool
    dtype: str
    shape: tuple[int, ...]
    owners: list[tuple[int, int, int]] = field(default_factory=list)
    rows: list[RowNumbers] = field(default_factory=list)


@dataclass
class _Compared:
    """The rows of two tensors. Other sites that see the same two tensors, unchanged, use them again."""

    tensors: tuple[weakref.ref[Tensor], weakref.ref[Tensor]]
    versions: tuple[int, int]
    rows: list[RowNumbers]


class PairStatistics:
    """Compares what two models have at their sites. `wanted`: the statistics of each site."""

    def __init__(self, wanted: WantedSites, modules: Mapping[str, nn.Module], select: SelectTokens) -> None:
        self.sites = frozenset(site for site, statistics in wanted.items() if pairwise(statistics))
        self.compared: dict[SiteKey, _SiteRows] = {}
        self._wanted = wanted
        self._modules = modules
        self._select = select
        self._arena = Arena()
        self._error = frozenset(site for site, statistics in wanted.items() if ERROR in statistics)
        self._local = {site: named_local_errors(statistics) for site, statistics in wanted.items()}
        self._channels = {
            site: [statistic for statistic in sorted(statistics) if isinstance(statistic, ChannelError)]
            for site, statistics in wanted.items()
        }
        self._pooled = {
            site: [statistic for statistic in sorted(statistics) if isinstance(statistic, Pooled)]
            for site, statistics in wanted.items()
        }
        self._known: dict[tuple[int, int], _Compared] = {}

    def compare(
        self, rows: BatchRows, site: SiteKey, call: int, reference: ReferenceTensor | None, own: Tensor
    ) -> None:
        """Compare what both models have at a site.

        Raises:
            InfraError: the reference has no such tensor, or one of another shape.
        """
        if reference is None:
            raise InfraError(f"the reference doesn't call {site[0]} (call {call + 1}), so its {site[1]} has no partner")
        made = self.compared.get(site)
        first = made.channels_first if made is not None else channels_first(self._modules[site[0]])
        shaped, token_axis = rows.shaped(own, first)
        if made is None:
            dtype = str(own.dtype).removeprefix("torch.")
            made = self.compared[site] = _SiteRows(first, token_axis, dtype, tuple(shaped.shape[1:]))
        length = shaped.shape[1] if token_axis else 0
        for sample, row in zip(rows.samples, self._rows(rows, site, reference, own, shaped), strict=True):
            if row:
                made.owners.append((sample, call, length))
                made.rows.append(row)

    def forget_tensors(self) -> None:
        """Forget the tensors of a forward that has ended."""
        self._known.clear()

    def _rows(
        self, rows: BatchRows, site: SiteKey, reference: ReferenceTensor, own: Tensor, shaped: Tensor
    ) -> list[RowNumbers]:
        """Return the numbers of each sample; those of the same two tensors at another site are not computed again."""
        # Local errors and channels also depend on the layer, not on the two tensors alone.
        if self._local[site] or self._channels[site] or self._pooled[site] or site not in self._error:
            return self._compute(rows, site, reference, shaped)
        key, versions = (id(reference.tensor), id(own)), (_version(reference.tensor), _version(own))
        known = self._known.get(key)
        if known and known.versions == versions:
            theirs, ours = known.tensors
            # An id may have been given to another tensor since.
            if theirs() is reference.tensor and ours() is own:
                return known.rows
        found = self._compute(rows, site, reference, shaped)
        self._known[key] = _Compared((weakref.ref(reference.tensor), weakref.ref(own)), versions, found)
        return found

    def _compute(self, rows: BatchRows, site: SiteKey, reference: ReferenceTensor, shaped: Tensor) -> list[RowNumbers]:
        theirs = reference.tensor
        if reference.rows is None:
            theirs = rows.shaped(theirs, self.compared[site].channels_first)[0]
            if self._local[site] and reference.inputs is not None:  # a block's experts get tokens without samples
                reference = replace(reference, inputs=rows.shaped(reference.inputs, False)[0])
        _check_shapes(site, theirs, shaped, first=1 if reference.rows is None else -1)
        token_axis = shaped.dim() == 3
        kept = rows.unpadded(site[0], shaped.shape[1]) if token_axis else rows.all_count
        # The reference may have run on another device.
        theirs = theirs.to(shaped.device, non_blocking=True)
        found: list[RowNumbers] = []
        for index, counting in enumerate(kept):
            if counting is not None and not len(counting):
                found.append({})
                continue
            x, y = (side[index] if token_axis else side[index][None] for side in (theirs, shaped))
            row = self._row(rows.samples[index], site, (x, y), counting, reference, index)
            found.append({name: self._apart(value) for name, value in row.items()})
        return found

    def _apart(self, value: Tensor | Array) -> Tensor | Array:
        """Copy what is kept into memory of its own, apart from the models'; on an accelerator it stays where it is."""
        if not isinstance(value, Tensor) or not value.is_cpu:
            return value
        stored = self._arena.zeros(tuple(value.shape), value.numpy().dtype)
        stored[...] = value.numpy()
        return stored

    def _row(
        self,
        sample: int,
        site: SiteKey,
        pair: tuple[Tensor, Tensor],
        counting: Tensor | None,
        reference: ReferenceTensor,
        index: int,
    ) -> dict[str, Tensor | Array]:
        """Return the numbers of one sample. `counting`: its tokens that are no padding, on the CPU; None for all."""
        x, y = pair
        found: dict[str, Tensor | Array] = {}
        recorded = None
        if reference.rows is not None:
            recorded = _positions(reference.rows[index], counting, len(y), site)
            x = x[: len(recorded)]
        if site in self._error:
            found["error"] = self._powers(x, y, counting, recorded)
        # A layer that sees one row of a sample, as a pooler does, has no single tokens to be fed with.
        for count, (at, powers) in self._local[site] if self.compared[site].token_axis else ():
            # A recorded reference has drawn its rows already; only these have an input.
            drawn = drawn_rows(sample, len(y), counting, count) if recorded is None else recorded
            found[at], found[powers] = self._local_powers(site[0], reference, (x, y), index, drawn, count)
        for statistic in self._channels[site]:
            if recorded is not None:
                raise InfraError("a reference that was kept has no channels of all tokens: by: channel needs the model")
            mask = np.full(len(y), counting is None)
            if counting is not None:
                mask[counting.numpy()] = True
            chosen = torch.from_numpy(np.flatnonzero(self._select(statistic.positions, mask, sample, site[0])))
            found[statistic.key] = channel_powers(x, y, chosen.to(y.device, non_blocking=True))
        for pooled in self._pooled[site]:
            if recorded is not None:
                raise InfraError("a reference that was kept has no embeddings of samples: embedding needs the model")
            there = None if counting is None else counting.to(y.device, non_blocking=True)
            found[pooled.key] = torch.stack([_embedding(side, there, pooled.pool) for side in (x, y)])
        return found

    def _powers(self, x: Tensor, y: Tensor, counting: Tensor | None, recorded: Tensor | None) -> Tensor | Array:
        # The usual case comes first: the kernel writes to where the numbers stay.
        if counting is None and recorded is None and compiled(y):
            return fused_powers(x, y, self._arena.zeros((len(y), 4), np.float32))
        there = None if counting is None else counting.to(y.device, non_blocking=True)
        return powers_of(x, y, there) if recorded is None else _some_powers(x, y, there, recorded)

    def _local_powers(
        self,
        layer: str,
        reference: ReferenceTensor,
        pair: tuple[Tensor, Tensor],
        index: int,
        drawn: Tensor,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer on some of the reference's tokens; return their positions [R] and powers [R, 3]."""
        if reference.inputs is None:
            raise InfraError(
                f"the reference that was kept has no input of {layer}, which local_sqnr feeds to the layer"
            )
        x, y = pair
        inputs = reference.inputs[index].to(x.device, non_blocking=True)
        if reference.rows is None:
            there = drawn.to(x.device, non_blocking=True)
            inputs, x = inputs.index_select(0, there), x.index_select(0, there)
        else:
            # As many rows for every sample, so that the arrays of samples join to one table.
            inputs, count = inputs[: len(drawn)], max(count, reference.tensor.shape[1])
        # The subject's layer on the reference's input: what is left of the difference is the layer's own.
        own = run_rows(self._modules[layer], layer, inputs.to(y.dtype))
        powers = powers_of(x, own, None)[:, :3]
        positions = torch.full((count,), -1, dtype=torch.int32)
        table = torch.zeros((count, 3), dtype=torch.float32, device=powers.device)
        positions[: len(drawn)] = drawn.int()
        table[: len(drawn)] = powers
        return positions, table

    def contribute(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add what was compared to the subject's own numbers; sites with the same numbers go on sharing them.

        Raises:
            InfraError: a site was compared in other calls than it was measured in.
        """
        values = (value for made in self.compared.values() for row in made.rows for value in row.values())
        fetch = Transfer(value for value in values if isinstance(value, Tensor))
        known: dict[tuple[object, ...], SiteNumbers] = {}
        for site, statistics in self._wanted.items():
            own, made = numbers[site], self.compared.get(site)
            if made is None or not made.rows:
                numbers[site] = own.having(statistics, {})
                continue
            # Sites of one tensor have the same rows and numbers, and go on sharing them in the capture's file.
            key = (id(own), statistics, *(id(row) for row in made.rows))
            if key not in known:
                owners, arrays = _arrays(made, fetch)
                known[key] = _placed(own, made, site, owners).having(statistics, arrays)
            numbers[site] = known[key]


def named_local_errors(statistics: Iterable[Statistic]) -> list[tuple[int, tuple[str, str]]]:
    """Return the number of rows of each local error, and the names of its arrays."""
    ordered = sorted((each for each in statistics if isinstance(each, LocalError)), key=lambda each: -each.rows)
    return [(each.rows, each.keys if index else ("local_rows", "local")) for index, each in enumerate(ordered)]


def _arrays(made: _SiteRows, fetch: Transfer) -> tuple[NDArray[np.int64], dict[str, Array]]:
    """Return whose the rows are (sample, call, tokens) and their arrays, by sample: a streamed pass goes by call."""
    owners = np.array(made.owners, dtype=np.int64).reshape(-1, 3)
    order = np.lexsort((owners[:, 1], owners[:, 0]))
    owners, rows = owners[order], [made.rows[index] for index in order]
    values = {name: [fetch(row[name]) for row in rows] for name in rows[0]}
    return owners, {name: LAYOUTS[name.partition("/")[0]].join(found) for name, found in values.items()}


def _placed(own: SiteNumbers, made: _SiteRows, site: SiteKey, owners: NDArray[np.int64]) -> SiteNumbers:
    """Return numbers whose rows are those that were compared: the subject's own, or new ones where it has none."""
    sample, call, lengths = owners[:, 0].astype(np.int32), owners[:, 1].astype(np.int32), owners[:, 2]
    if not own.populations:
        own = replace(own, dtype=made.dtype, shape=made.shape, token_axis=made.token_axis)
        return replace(own, sample=sample, call=call, lengths=lengths)
    if not np.array_equal(np.stack([own.sample, own.call, own.lengths], axis=1), owners):
        raise InfraError(f"the {site[1]} of {site[0]} was compared in other calls than it was measured in")
    return own


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
        raise _mixes_tokens(layer) from error
    if output is not None and output.dim() == 2 and len(output) == len(inputs):
        return output  # a router takes the samples of a batch together
    if output is None or output.dim() != 3:
        raise _mixes_tokens(layer)
    return output[0]


def check_rows(layer: str, powers: Tensor) -> None:
    """Check that a layer gave the same for some tokens alone as among the others. `powers`: Σy² and Σ(y − ŷ)².

    Raises:
        AnomalyError: it didn't.
    """
    signal, error = powers.tolist()
    if error * LEAST_AGREEMENT > signal:
        raise _mixes_tokens(layer)


def _mixes_tokens(layer: str) -> AnomalyError:
    return AnomalyError(
        f"local_sqnr feeds a layer with single tokens of the reference, and {layer} needs more than that (attention, a "
        "block): name its linear layers, or gate sqnr there"
    )


def drawn_rows(sample: int, length: int, counting: Tensor | None, count: int) -> Tensor:
    """Return the positions that stand for a sample's tokens, ascending, [≤ count] on the CPU; the same in every run.

    `counting`: the tokens that are no padding, None for all.
    """
    if counting is None:
        return torch.from_numpy(_drawn(sample, length, length, count).copy())
    positions = counting.numpy()
    return torch.from_numpy(positions[_drawn(sample, length, len(positions), count)].astype(np.int64))


@lru_cache(1024)  # every layer of a sample asks for the same
def _drawn(sample: int, length: int, counting: int, count: int) -> NDArray[np.int64]:
    if counting <= count:
        return np.arange(counting)
    return np.sort(np.random.default_rng([sample, length]).choice(counting, count, replace=False))


def _check_shapes(site: SiteKey, reference: Tensor, own: Tensor, first: int) -> None:
    """Check that tensors fit, from the dimension `first` on: of a recorded reference only the channels can fit."""
    if reference.shape != own.shape and (reference.dim() != own.dim() or reference.shape[first:] != own.shape[first:]):
        theirs, ours = ("×".join(map(str, tensor.shape[first:])) for tensor in (reference, own))
        raise InfraError(f"the {site[1]} of {site[0]} is {ours} here and {theirs} in the reference")


def _positions(recorded: Tensor, counting: Tensor | None, length: int, site: SiteKey) -> Tensor:
    """Return the positions in the sample of the recorded tokens, whose numbers don't count padding."""
    count = length if counting is None else len(counting)
    if len(recorded) and int(recorded[-1]) >= count:
        raise InfraError(f"the {site[1]} of {site[0]} has {count} tokens of a sample here, and more in the reference")
    return recorded if counting is None else counting.index_select(0, recorded)


def _some_powers(x: Tensor, y: Tensor, counting: Tensor | None, positions: Tensor) -> Tensor:
    """Return the powers of the tokens at some positions (on the CPU), [T, 4]; the others are marked as not compared."""
    positions = positions.to(y.device, non_blocking=True)
    found = torch.full((len(y), 4), PADDING if counting is not None else NOT_COMPARED, device=y.device)
    if counting is not None:
        found.index_fill_(0, counting, NOT_COMPARED)
    return found.index_copy_(0, positions, powers_of(x, y.index_select(0, positions), None))


def _embedding(rows: Tensor, counting: Tensor | None, pool: str) -> Tensor:
    """Return one float64 row of the tokens that count, [C] of [T, C]."""
    kept = rows if counting is None else rows.index_select(0, counting)
    return kept.double().mean(dim=0) if pool == "mean" else kept[0 if pool == "first" else -1].double()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

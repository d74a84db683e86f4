"""Captures of disjoint samples → the capture of all of them, equal to the last bit to that of one pass. numpy only.

The rows of populations are concatenated in sample order, counts are added, extremes compared. Nothing is averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import numpy as np

from ..common import InfraError
from .arrays import Array
from .capture import Capture
from .provenance import Provenance, SampleRange
from .requests import merge_requests
from .sites import SITES, SiteKey, SiteNumbers
from .statistics import LAYOUTS, InRange


def merge(captures: Sequence[Capture]) -> Capture:
    """Merge captures of one subject over disjoint samples.

    Captures that say which samples they hold (`provenance.samples`) are put in that order, others stay in the given
    one.

    Raises:
        InfraError: they are not of one subject and one plan, or their samples overlap.
    """
    if not captures:
        raise InfraError("there are no captures to merge")
    # Float sums are kept for each sample and folded in sample order, so the order decides on the last bit.
    ordered = _in_order(captures)
    _check(ordered)
    first = ordered[0]
    offsets = _offsets(ordered)
    made: dict[tuple[int, ...], SiteNumbers] = {}
    shared: dict[int, list[SiteNumbers]] = {}
    sites: dict[Any, SiteNumbers] = {}
    # Sites that share their tensor share one `SiteNumbers`; merging them one by one would store it once for each.
    for site in _sites(ordered):
        parts = [capture.sites.get(site) for capture in ordered]
        key = tuple(id(part) for part in parts)
        if key not in made:
            made[key] = _known(_merged(parts, offsets, weight=site[1] == "weight"), shared.setdefault(key[0], []))
        sites[site] = made[key]
    pieces = {token: piece for capture in ordered for token, piece in capture.pieces.items()}
    return replace(
        first,
        sites=sites,
        tokens=tuple(ids for capture in ordered for ids in capture.tokens),
        pieces=dict(sorted(pieces.items())),
        pictures={
            sample + offset: each
            for capture, offset in zip(ordered, offsets, strict=True)
            for sample, each in capture.pictures.items()
        },
        provenance=_provenance(ordered),
        reference=_merged_references(ordered),
        # The part of an interrupted pass has not looked at any weight yet.
        refused={layer: why for capture in ordered for layer, why in capture.refused.items()},
        uncompared={layer: why for capture in ordered for layer, why in capture.uncompared.items()},
        uncached={layer: why for capture in ordered for layer, why in capture.uncached.items()},
        unfit={site: why for capture in ordered for site, why in capture.unfit.items()},
    )


def with_weights(capture: Capture, weights: Capture) -> Capture:
    """Return a capture with the weights of another one of the same model: of an earlier part, or of its files."""
    own = {site: numbers for site, numbers in weights.sites.items() if site[1] == "weight"}
    measured = capture.sites.keys() & own.keys()
    for site in measured:  # loaded weights, to which the files add what they alone know
        own[site] = capture.sites[site].having(own[site].statistics, own[site].arrays)
    asked = [request for request in weights.plan if request.site == "weight"]
    both = {**capture.sites, **own}
    model = capture.provenance.model
    if not measured:
        model = replace(model, files=weights.provenance.model.files)
    reference = capture.reference or weights.reference
    if reference is not None and weights.reference is not None:
        reference = replace(reference, refused={**reference.refused, **weights.reference.refused})
    return replace(
        capture,
        sites={site: both[site] for site in _in_model_order(both, capture.modules)},
        plan=merge_requests([*capture.plan, *asked]),
        refused={**capture.refused, **weights.refused},
        uncompared={**capture.uncompared, **weights.uncompared},
        reference=reference,
        provenance=replace(capture.provenance, model=model),
    )


def _merged_references(captures: Sequence[Capture]) -> Capture | None:
    """Merge what was kept of the reference; its captures are placed as the subject's are."""
    kept = [capture.reference for capture in captures]
    if any(reference is None for reference in kept):
        return None
    placed = [
        replace(reference, provenance=replace(reference.provenance, samples=capture.provenance.samples))
        for reference, capture in zip(kept, captures, strict=True)
        if reference is not None
    ]
    merged = merge(placed)
    # The range is the subject's; it was lent to the reference for the order only.
    return replace(merged, provenance=replace(merged.provenance, samples=None))


def _known(merged: SiteNumbers, others: list[SiteNumbers]) -> SiteNumbers:
    """Return equal numbers that were merged already: of a site that shares its tensor in the first capture alone."""
    for other in others:
        if _equal(merged, other):
            return other
    others.append(merged)
    return merged


def _equal(one: SiteNumbers, other: SiteNumbers) -> bool:
    (arrays, header), (others, other_header) = one.to_arrays(), other.to_arrays()
    return (
        header == other_header
        and arrays.keys() == others.keys()
        and all(
            np.array_equal(array, others[name], equal_nan=array.dtype.kind == "f") for name, array in arrays.items()
        )
    )


def _in_order(captures: Sequence[Capture]) -> list[Capture]:
    ranges = _ranges(captures)
    if ranges is None:
        return list(captures)
    ordered = [captures[index] for index in sorted(range(len(captures)), key=ranges.__getitem__)]
    for (first, end, _), (start, stop, _) in pairwise(sorted(ranges)):
        if start < end:
            raise InfraError(f"the captures overlap: one holds the samples {first}:{end}, another {start}:{stop}")
        # A missing range would go unnoticed, because each capture by itself is whole.
        if start > end:
            raise InfraError(f"the samples {end}:{start} are in none of the captures")
    return ordered


def _ranges(captures: Sequence[Capture]) -> list[SampleRange] | None:
    """Return the range of samples of each capture; None where one of them doesn't state it."""
    ranges = [capture.provenance.samples for capture in captures]
    known = [each for each in ranges if each is not None]
    return known if len(known) == len(ranges) else None


def _check(captures: Sequence[Capture]) -> None:
    first = captures[0]
    for capture in captures[1:]:
        for name in ("modules", "blocks", "plan"):
            if getattr(capture, name) != getattr(first, name):
                raise InfraError(f"the captures are not of one subject and one plan: their {name} differ")
        if differing := _differing(first.provenance, capture.provenance):
            raise InfraError(f"the captures are not of one subject and its data: their {differing} differ")


def _differing(one: Provenance, other: Provenance) -> str:
    """Name what differs between two subjects; where a checkpoint lay does not matter."""
    if one.data != other.data:
        return "data"
    ours, theirs = one.model.plain(), other.model.plain()
    # Jobs of a scheduler may see the same checkpoint under different paths, and find other numbers of cores free.
    names = sorted({*ours, *theirs} - {"path", "base", "threads"})
    return ", ".join(name for name in names if ours.get(name) != theirs.get(name))


def _offsets(captures: Sequence[Capture]) -> list[int]:
    """Return what is to be added to the sample numbers of each capture."""
    if ranges := _ranges(captures):
        return [each.first - ranges[0].first for each in ranges]
    counts = [max((int(n.sample.max()) + 1 for n in c.sites.values() if n.populations), default=0) for c in captures]
    # A site may lack the last samples (an expert that got no token); the tokens have all of them.
    counts = [max(count, len(capture.tokens)) for count, capture in zip(counts, captures, strict=True)]
    return [sum(counts[:index]) for index in range(len(counts))]


def _provenance(captures: Sequence[Capture]) -> Provenance:
    provenance, ranges = captures[0].provenance, _ranges(captures)
    if ranges is None:
        return replace(provenance, samples=None)
    joined = SampleRange(ranges[0].first, ranges[-1].end, ranges[0].total)
    return replace(provenance, samples=None if (joined.first, joined.end) == (0, joined.total) else joined)


def _sites(captures: Sequence[Capture]) -> list[SiteKey]:
    """Return the sites of all captures, the logits last. A capture may lack a site: an expert that saw no token."""
    return _in_model_order({site for capture in captures for site in capture.sites}, captures[0].modules)


def _in_model_order(sites: Iterable[SiteKey], modules: Sequence[str]) -> list[SiteKey]:
    order = {name: index for index, name in enumerate(modules)}
    return sorted(sites, key=lambda site: (order.get(site[0], len(order)), SITES.index(site[1]), site[0]))


def _merged(parts: Sequence[SiteNumbers | None], offsets: Sequence[int], *, weight: bool) -> SiteNumbers:
    present = [(part, offset) for part, offset in zip(parts, offsets, strict=True) if part is not None]
    if weight:  # each part has seen the whole of it
        return present[0][0]
    seen = [(part, offset) for part, offset in present if part.populations]
    if not seen:
        return present[0][0]
    numbers = [part for part, _ in seen]
    if len({part.dtype for part in numbers}) > 1:
        raise InfraError(f"the captures hold one layer in {numbers[0].dtype} and in {numbers[-1].dtype}")
    # One pass over all samples would end with the shape that the last part has.
    return replace(
        numbers[-1],
        statistics=numbers[0].statistics,
        sample=np.concatenate([part.sample + np.int32(offset) for part, offset in seen]),
        call=np.concatenate([part.call for part in numbers]),
        lengths=np.concatenate([part.lengths for part in numbers]),
        arrays={**numbers[-1].arrays, **_merged_arrays([part.arrays for part in numbers])},
    )


def _merged_arrays(tables: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Merge each array as its layout says."""
    merged: dict[str, Array] = {}
    for name in dict.fromkeys(chain.from_iterable(tables)):
        layout = LAYOUTS.get(name.partition("/")[0])
        # Only the parts of an interrupted pass whose samples are long enough have what is pooled over a range.
        partial = layout is not None and (layout.partial or f"/{InRange.name}:" in name)
        if layout is None or not (partial or name in tables[0]):
            continue
        holding = [table for table in tables if name in table or not partial]
        if layout.bins:
            bins = layout.bins + name[len(name.partition("/")[0]) :]
            merged[bins], merged[name] = added([(table[bins], table[name]) for table in holding])
        elif layout.merge is not None:
            merged[name] = layout.merge([table[name] for table in holding])
    return merged


def added(tables: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return the bins of all tables, ascending, and the sums of their counts."""
    bins, where = np.unique(np.concatenate([bins for bins, _ in tables]), return_inverse=True)
    counts = np.zeros((len(bins), *tables[0][1].shape[1:]), dtype=tables[0][1].dtype)
    # add.at, for `counts[where] += …` would add only one of several equal bins.
    np.add.at(counts, where, np.concatenate([counts for _, counts in tables]))
    return bins, counts

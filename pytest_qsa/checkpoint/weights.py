"""The weights of a checkpoint's files → a Capture: dequantized in numpy, without a model and without torch.

A site is a layer of the files, under the name that its tensors have. Rows are read a few at a time, so that memory
stays bounded whatever the size of a weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from math import prod
from typing import NamedTuple

import numpy as np

from ..captures import (
    ERROR,
    GAIN,
    STORED,
    Capture,
    LayerNames,
    Provenance,
    Request,
    SiteKey,
    SiteNumbers,
    Statistic,
    compares,
    match_layers,
    merge_requests,
)
from ..common import AnomalyError, InfraError, Progress, phase
from .files import Files
from .folder import Folder, natural, refusing_odd_settings
from .formats.format import Format, format_of
from .formats.scheme import ScaleGroups
from .nearest import Requantization, grid_of, requantized
from .weight_statistics import Singles, WeightRows, reduced

AT_ONCE = 1 << 18
"""The elements of a weight that one thread has in memory at a time: with all that is made of them, some 15 MB."""
KEPT = (32 << 20) - 8192
"""The bytes of the largest array whose size glibc takes for one to keep."""
MOST_THREADS = 8
COMPARED = frozenset({ERROR, GAIN})
"""The statistics for which a weight is read beside the reference's."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight of the files, read as float32 a few rows at a time."""

    form: Format
    layer: str

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """[out, in], or [n] where it is no matrix; empty where its packing isn't known."""
        if self.layer in self.form.experts:
            holder, _, place = self.form.experts[self.layer]
            packed = self.form.packed_shapes[f"{holder}.{place.tensor}"]
            return tuple(place.of(np.broadcast_to(np.int8(0), packed[1:])).shape)
        if (shape := self.form.weight_shape(self.layer)) is not None:
            return shape
        tensor = self.form.weight_of(self.layer)
        if tensor is None or self.form.codes_of(self.layer) is not None:
            return ()
        lengths = tensor.shape or (1,)
        return lengths if len(lengths) == 1 else (lengths[0], prod(lengths[1:]))

    @property
    def matrix(self) -> bool:
        """Whether it has rows, which are its output channels."""
        return len(self.shape) == 2

    @property
    def table(self) -> tuple[int, int]:
        """Its rows and columns; one row where it is no matrix."""
        return (self.shape[0], self.shape[1]) if self.matrix else (1, prod(self.shape))

    @cached_property
    def problem(self) -> str:
        """Why it can't be read as numbers; empty where it can.

        Raises:
            AnomalyError: its tensors don't fit one another.
        """
        try:
            readable = self.shape and self.form.rows(self.layer, slice(0, 1)) is not None
            return "" if readable else self.form.refusal(self.layer)
        except InfraError as error:
            return str(error)

    def parts(self) -> Iterator[Singles]:
        """Yield its rows in order, a few at a time, [R, in].

        Raises:
            AnomalyError: its tensors don't fit one another.
        """
        count, columns = self.table
        step = max(1, AT_ONCE // max(1, columns))
        for start in range(0, count, step):
            rows = self.form.rows(self.layer, slice(start, min(start + step, count)) if self.matrix else slice(None))
            assert rows is not None  # `problem` has read the first one
            yield rows.reshape(-1, columns).astype("f4")


def stored_weights(files: Files) -> dict[str, StoredWeight]:
    """Return the weights of a checkpoint's files by layer, in natural order; experts that lie packed one by one."""
    form = files.format
    packed = form.packed_shapes if form.experts else {}
    whole = (layer for layer in files.folder.layers if layer not in packed and form.weight_of(layer) is not None)
    return {layer: StoredWeight(form, layer) for layer in sorted([*whole, *form.experts], key=natural)}


def weight_names(files: Files) -> LayerNames:
    """Return the names that a pattern can find at the weights of files: their layers, and those of packed experts."""
    return LayerNames(sorted({*files.folder.layers, *files.format.experts}, key=natural))


def threads() -> int:
    """Return in how many threads weights are read: that of the cores, as far as OMP_NUM_THREADS lets them be used."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return min(MOST_THREADS, os.cpu_count() or 1, int(allowed) if allowed.isdigit() and int(allowed) else MOST_THREADS)


def capture_weights(
    files: Files,
    requests: Iterable[Request],
    *,
    modules: Sequence[str] = (),
    progress: Progress | None = None,
    again: Requantization | None = None,
) -> Capture:
    """Reduce the weights of a checkpoint's files to what is requested of them; no model is loaded.

    `modules`: the names of the model's layers, where they are known; a weight is then asked for by its module's.
    `progress`: called after each weight. `again`: where its scheme can be applied here, what the reference's weight is
    when it is quantized so stands in the place of a weight; its own, quantized once more, where the reference has none
    that means the same.

    Raises:
        AnomalyError: a tensor is missing, damaged, or doesn't fit the others; or the reference has no such layer.
        InfraError: there is no reference to compare with.
    """
    with refusing_odd_settings(files.settings_text):
        return _captured(files, requests, modules, progress, again=again)


def _captured(
    files: Files,
    requests: Iterable[Request],
    modules: Sequence[str],
    progress: Progress | None,
    *,
    again: Requantization | None,
) -> Capture:
    plan = merge_requests(request for request in requests if request.site == "weight")
    weights, modules = _named(stored_weights(files), files.format, modules), modules or weight_names(files).all
    wanted = {layer: statistics for layer, statistics in _wanted(modules, plan).items() if layer in weights}
    compared = [layer for layer, statistics in wanted.items() if statistics & COMPARED]
    pairs = _pairs(files, {layer: weights[layer] for layer in compared}) if compared else {}
    sources = {**_sources(files, {layer: weights[layer] for layer in wanted}), **pairs} if again else {}
    # glibc gives freed memory back to the system, but for sizes below the largest that was freed so far (mallopt(3),
    # M_MMAP_THRESHOLD). Without this one, page faults of arrays that come and go take half of the time.
    np.empty(KEPT, dtype=np.uint8)
    phase("quantizing the weights again" if again else "reading weights", "weights")
    sites: dict[SiteKey, SiteNumbers] = {}
    refused: dict[str, str] = {}
    uncompared: dict[str, str] = {}
    with ThreadPoolExecutor(threads()) as pool:
        found = pool.map(
            lambda layer: _measured(weights[layer], pairs.get(layer), wanted[layer], sources.get(layer), again), wanted
        )
        for done, (layer, result) in enumerate(zip(wanted, found, strict=True), 1):
            if result.numbers is not None:
                sites[layer, "weight"] = result.numbers
            if result.problem:
                refused[layer] = result.problem
            if result.of_reference:
                uncompared[layer] = result.of_reference
            if progress is not None:
                progress(done, len(wanted))
    reference = _reference(files, uncompared) if compares(plan) else None
    return Capture(
        sites, tuple(modules), provenance=_provenance(files), plan=plan, reference=reference, refused=refused
    )


def _wanted(modules: Sequence[str], plan: Iterable[Request]) -> dict[str, frozenset[Statistic]]:
    """Return the statistics of each layer, in the order of the files."""
    wanted: dict[str, frozenset[Statistic]] = {}
    for request in plan:
        for layer in match_layers(modules, request.pattern, request.exclude):
            # What a loader makes of a weight is not in the files.
            wanted[layer] = wanted.get(layer, frozenset()) | (request.statistics - {STORED})
    return {layer: wanted[layer] for layer in modules if layer in wanted}


class _Measured(NamedTuple):
    """What came of one weight. `problem`, `of_reference`: why it, or its pair, can't be read; empty where it can."""

    numbers: SiteNumbers | None
    problem: str = ""
    of_reference: str = ""


def _measured(
    weight: StoredWeight,
    pair: StoredWeight | None,
    statistics: frozenset[Statistic],
    source: StoredWeight | None,
    again: Requantization | None,
) -> _Measured:
    if weight.problem:
        return _Measured(None, weight.problem)
    problem = _incomparable(weight, pair) if pair is not None else ""
    if problem:
        pair, statistics = None, statistics - COMPARED
    dtype = weight.form.weight_dtype(weight.layer)
    nearest = GAIN in statistics
    rows = partial(_rows, weight, pair, dtype, nearest=nearest)
    if again is not None:
        rows = partial(_rows_again, weight, pair, dtype, source or weight, again, nearest=nearest)
    return _Measured(reduced(statistics, rows, weight.table, matrix=weight.matrix), of_reference=problem)


def _incomparable(weight: StoredWeight, pair: StoredWeight) -> str:
    if pair.problem:
        return f"in the reference {pair.problem}"
    if pair.shape != weight.shape:
        theirs, ours = ("×".join(map(str, each.shape)) for each in (pair, weight))
        return f"it is {ours} here and {theirs} in the reference"
    return ""


def _rows(
    weight: StoredWeight, pair: StoredWeight | None, dtype: str, *, nearest: bool = False
) -> Iterator[WeightRows]:
    theirs = pair.parts() if pair is not None else None
    groups = weight.form.scale_groups(weight.layer, weight.table) if pair is not None else None
    start = 0
    for values in weight.parts():
        other = next(theirs) if theirs is not None else None
        yield WeightRows(values, start, dtype, other, groups, _nearest(weight, other, groups) if nearest else None)
        start += len(values)


def _nearest(weight: StoredWeight, theirs: Singles | None, groups: ScaleGroups | None) -> Singles | None:
    """Return the reference's rows rounded to nearest in the scheme of a weight; None where that isn't known here.

    A scale of several rows has so many weights that rounding leaves its factor at 1.
    """
    grid = grid_of(weight.form, weight.layer)
    if theirs is None or groups is None or grid is None or groups.rows > 1 or not weight.matrix:
        return None
    return requantized(theirs, grid, groups)


def _rows_again(
    weight: StoredWeight,
    pair: StoredWeight | None,
    dtype: str,
    source: StoredWeight,
    again: Requantization,
    *,
    nearest: bool = False,
) -> Iterator[WeightRows]:
    """Yield the rows of a source quantized in the scheme of a weight; its own rows where the scheme isn't known."""
    grid, groups = grid_of(weight.form, weight.layer), weight.form.scale_groups(weight.layer, weight.table)
    if grid is None or not weight.matrix:
        yield from _rows(weight, pair, dtype, nearest=nearest)
        return
    rounded, start = again.rounding(), 0
    theirs = iter(_whole_groups(pair, groups)) if pair is not None else None
    for values in _whole_groups(source, groups):
        own, other = requantized(values, grid, groups, again, rounded), next(theirs) if theirs is not None else None
        plainest = _nearest(weight, other, groups) if nearest else None
        yield WeightRows(own, start, dtype, other, groups if theirs else None, plainest)
        start += len(values)


def _whole_groups(weight: StoredWeight, groups: ScaleGroups) -> Iterable[Singles]:
    """Return the parts of a weight; all of it where several rows have a scale together."""
    return weight.parts() if groups.rows == 1 else (np.concatenate([*weight.parts()]),)


def _named(weights: Mapping[str, StoredWeight], form: Format, modules: Sequence[str]) -> Mapping[str, StoredWeight]:
    """Return the weights under the names of the model's modules; under their own where no model is known."""
    if not modules:
        return weights
    return {module: weights[layer] for module, layer in form.layers_of(modules).items() if layer in weights}


def paired_weights(files: Files, weights: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Return the reference's weight of each site by its name there, whether or not the reference has it.

    Raises:
        InfraError: there is no reference.
    """
    form = format_of(_original(files))
    # Each format knows the layers of its own files by the names that other files give them.
    named = form.layers_of([weight.layer for weight in weights.values()])
    theirs = weight_names(Files(form.folder)).all
    named |= {own: other for other, own in files.format.layers_of(theirs).items() if own != other}
    return {site: StoredWeight(form, _tied(form, named[weight.layer])) for site, weight in weights.items()}


def _original(files: Files) -> Folder:
    if files.reference is None:
        raise InfraError("there is nothing to compare with: name the original's checkpoint, model.reference")
    return files.reference


def _sources(files: Files, weights: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Return the reference's weight of each site that a quantizer would have made it of: of the same size and order."""
    if files.original is None:
        return {}
    pairs = paired_weights(files, weights)
    known = {site: pair for site, pair in pairs.items() if pair.shape and not pair.problem}
    return {site: pair for site, pair in known.items() if pair.shape == weights[site].shape}


def _pairs(files: Files, weights: Mapping[str, StoredWeight]) -> Mapping[str, StoredWeight]:
    """Return the reference's weight of each site.

    Raises:
        AnomalyError: the reference lacks one.
        InfraError: there is no reference.
    """
    pairs = paired_weights(files, weights)
    form = format_of(_original(files))
    absent = [
        site for site, pair in pairs.items() if pair.layer not in form.experts and form.weight_of(pair.layer) is None
    ]
    if absent:
        raise AnomalyError(
            f"the reference has no layer {absent[0]}{f' (and {len(absent) - 1} more)' if absent[1:] else ''}: "
            "is model.reference the original of this model?"
        )
    return pairs


def _tied(form: Format, layer: str) -> str:
    """Return the layer whose weight a layer uses: the embedding, for a tied head without a weight of its own."""
    if layer.rpartition(".")[2] != "lm_head" or layer in form.folder.layers:
        return layer
    tied = form.folder.text_config.get("tie_word_embeddings")
    found = next((name for name in form.folder.layers if tied and name.endswith("embed_tokens")), layer)
    # an adapter of one of the two leaves the other as it was
    apart = form.adapter is not None and (form.adapter.touches(found) or form.adapter.touches(layer))
    return layer if apart else found


def _provenance(files: Files) -> Provenance:
    versions = {name: version(name) for name in ("pytest-qsa", "numpy")}
    read = replace(files.provenance, weights_read=True)
    return Provenance(replace(files.model, files=read, dtype="float32", versions=versions))


def _reference(files: Files, uncompared: Mapping[str, str]) -> Capture | None:
    if files.reference is None:
        return None
    reference = Files(files.reference)
    provenance = Provenance(replace(reference.model, files=None))
    return Capture({}, tuple(weight_names(reference).all), provenance=provenance, refused=uncompared)

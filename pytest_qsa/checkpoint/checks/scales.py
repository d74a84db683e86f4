"""Scales and zero points: unsound by themselves, far from their siblings, or unequal where loaders fuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...common import AnomalyError
from ..folder import Finding, Folder, kind_of
from ..formats.format import AGAIN, Format
from ..tensors import Tensor, element_count

SMALLEST = {"F64": 2.0**-1022, "F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-20}
"""A smaller scale is denormal; in float16, which keeps denormals, one with fewer than 4 bits left."""
FEWEST = 4
"""The fewest siblings from which a median and a spread are computed."""
TENSOR_FLOOR, CHANNEL_FLOOR = 0.1, 0.3
"""The least deviation in octaves that is used. Where healthy layers happen to agree, 1 % more is no fault."""
OFFSET_FLOOR = 0.02
"""The least deviation of mean over rms that is used. SmolLM2 stays within 0.01; zero points + 1 give 0.24 at 4 bits."""
SMALLEST_NUMBER = 2.0**-1074
"""The smallest number of float64 above 0."""
EXPONENTS = ("U8", "F8_E8M0")
"""The dtypes of microscaling's scales, which are whole octaves."""
SMALLEST_EXPONENT = 2.0**-127
"""What a byte of 0 means as an exponent of microscaling (E8M0)."""
ROWS_READ = 64
"""About how many rows of a layer are dequantized at a time, and to compare its mean."""
WHOLE_SCALES = ("weight_global_scale", "weight_scale_2", "_weight_per_tensor_scale")
"""The scale of the whole tensor, beside NVFP4's scales of blocks: of compressed-tensors, ModelOpt and torchao."""
DIVISORS = ("weight_global_scale", "input_global_scale")
"""The scales of a whole tensor, or of its inputs, that compressed-tensors stores inverted; ModelOpt's multiply."""
SHARED_SCALES = (*DIVISORS, "weight_scale_2", "input_scale")
"""What NVFP4 has one of for a whole tensor, and loaders keep one of for all that they fuse."""
SHARED_TOLERANCE = 2.0**-10
"""By how much of themselves such scales may differ within a fused group: by less than a bit of bfloat16."""
LARGEST_BLOCK_SCALE = 448.0
"""The largest number of E4M3: a tensor's scale is chosen so that the block of its largest weight has this one."""
FUSED_LAYERS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""The layers that loaders read as one matrix: attention, feed-forward layers and experts, MLA, and Gated DeltaNet."""
FOLDED_LAYERS = (("up_proj", "down_proj"), ("v_proj", "o_proj"), ("w3", "w2"), ("fc1", "fc2"))
"""The layers of which the second takes factors that a smoothing has divided the rows of the first by."""
MOST_FOLDED = 4.0
"""The most octaves that a smoothing moves from one layer to the next; AWQ moves two on SmolLM2."""


class Octaves(NamedTuple):
    """The sizes in a tensor as logarithms to the base of 2. `mean`: of microscaling's exponents; else the median."""

    low: float
    median: float
    high: float
    mean: float


class Sizes(NamedTuple):
    """What is kept of a tensor of scales, which may have millions. `sound`: none is odd, whatever the format.

    `octaves`: of those that are finite and not zero; None where none is.
    """

    sound: bool
    octaves: Octaves | None


@lru_cache(maxsize=4)  # of a checkpoint's format: two checks ask for them, and reading takes most of their time
def sizes_of(form: Format) -> Mapping[tuple[str, str], Sizes]:
    """Return what is kept of all scales: the layer and the part → its sizes."""
    found = {}
    for layer in form.scaled:
        for part, tensor in form.scales_of(layer).items():
            values = form.scale_values(layer, part).ravel()
            least = SMALLEST.get(tensor.dtype, SMALLEST_NUMBER)
            sound = bool(values.size) and bool(
                values.min() >= least and values.max() < np.inf
            )  # neither is true of NaN
            sizes = values if sound else np.abs(values[np.isfinite(values) & (values != 0)])
            found[layer, part] = Sizes(sound, octaves_of(sizes, tensor.dtype) if sizes.size else None)
    return found


def octaves_of(sizes: NDArray[np.float64], dtype: str) -> Octaves:
    """Return the octaves of some sizes, all above 0 and finite. `dtype`: that of their tensor."""
    ordered, last = np.sort(sizes), sizes.size - 1
    low, below, above, high = np.log2(ordered[[0, last // 2, (last + 1) // 2, last]]).tolist()
    median = (below + above) / 2
    return Octaves(low, median, high, float(np.log2(sizes).mean()) if dtype in EXPONENTS else median)


def misfits(form: Format) -> Iterator[Finding]:
    """Yield what a format finds in each layer, else why the tensors of the layer don't fit one another."""
    for layer in form.folder.layers:
        found = list(form.findings(layer))
        yield from found
        weight = form.weight_of(layer)
        if not found and weight is not None and (what := form.misfit(layer)):
            yield Finding.at(weight, f"the tensors of its layer don't fit one another: {what}", AGAIN)


def unsound_scales(form: Format) -> Iterator[Finding]:
    """Yield scales that are NaN, infinite, zero, negative or denormal, with how many and the first."""
    may_be_negative = form.signed_scales and _most_are_signed(form)
    for layer in form.scaled:
        for part, tensor in form.scales_of(layer).items():
            if sizes_of(form)[layer, part].sound:
                continue
            values = form.scale_values(layer, part).ravel()
            faults = {
                "NaN": np.isnan(values),
                "infinite": np.isinf(values),
                "zero": values == 0,
                "negative": (values < 0) & (not may_be_negative),
                "denormal": (values != 0) & (np.abs(values) < SMALLEST.get(tensor.dtype, 0.0)),
            }
            for word, wrong in faults.items():
                if wrong.any():
                    count, first = int(wrong.sum()), int(np.flatnonzero(wrong)[0])
                    several = f"{count} of {values.size} are {word}, the first at {first}"
                    what = several if values.size > 1 else f"is {word}"
                    yield Finding.at(tensor, what, AGAIN)


def unwritten_exponents(form: Format) -> Iterator[Finding]:
    """Yield exponents of microscaling that are 0, which is 2⁻¹²⁷, over weights that aren't zeros.

    A group of zeros may have any exponent; other weights would be lost in every dtype of a model.
    """
    for layer in form.scaled:
        scale = form.weight_scale_of(layer)
        if scale is None or scale.dtype not in EXPONENTS or (shape := form.weight_shape(layer)) is None:
            continue
        exponents = form.scale_values(layer, scale.part)
        if not exponents.size or exponents.size % shape[0]:
            continue
        empty = exponents.reshape(shape[0], -1) == SMALLEST_EXPONENT
        lost = 0
        for start in np.unique(np.flatnonzero(empty.any(axis=1)) // ROWS_READ * ROWS_READ).tolist():
            rows = _rows_of(form, layer, slice(start, start + ROWS_READ))
            if rows is not None and rows.shape[1] % empty.shape[1] == 0:
                groups = rows.reshape(len(rows), empty.shape[1], -1)
                lost += int((empty[start : start + ROWS_READ] & groups.any(axis=2)).sum())
        if lost:
            yield Finding.at(scale, f"{lost} of {empty.size} are 0, and their weights aren't", AGAIN)


def _most_are_signed(form: Format) -> bool:
    """Say whether most scales of a checkpoint are partly negative, as its writer then meant them."""
    scales = [(layer, part) for layer in form.scaled for part in form.scales_of(layer)]
    return 2 * sum(bool((form.scale_values(layer, part) < 0).any()) for layer, part in scales) > len(scales)


def outlying_scales(form: Format, *, spread: float) -> Iterator[Finding]:
    """Yield scales that are more than `spread` × the robust deviation away from their siblings, in octaves.

    Of each tensor the median and the largest and smallest scale over that median are compared with those of the same
    projection in the other blocks: |log₂ x − median| > spread × max(1.4826 · MAD, floor); Iglewicz and Hoaglin, 1993.
    What a smoothing took from one layer and gave to the next is no finding.
    """
    kinds: dict[str, dict[str, Octaves]] = {}
    rows: dict[str, dict[str, Octaves]] = {}
    for layer in form.scaled:
        for part, tensor in form.scales_of(layer).items():
            _add(kinds, tensor, sizes_of(form)[layer, part].octaves)
        codes, size = form.codes_of(layer), form.typical_row(layer)
        if codes is not None and size is not None and 0 < size < np.inf:
            _add(rows, codes, octaves_of(np.array([size]), codes.dtype))
    moved = _folded(form.folder, [*kinds.values(), *rows.values()])
    for kind, members in kinds.items():
        if len(members) >= FEWEST:
            yield from _untouched(form, kind, members)
            found = _outlying(form.folder, kind, members, spread)
            yield from (each for each in found if each.layer not in moved)
    for kind, members in rows.items():
        if len(members) >= FEWEST:
            found = _outlying(form.folder, kind, members, spread, "rms of a row")
            yield from (each for each in found if each.layer not in moved)


def _folded(folder: Folder, kinds: Sequence[Mapping[str, Octaves]]) -> set[str]:
    """Return the layers that are larger than their siblings by what the layer before or after them is smaller by."""
    sizes: dict[str, float] = {}
    for members in kinds:
        medians = {name: octaves.median for name, octaves in members.items()}
        middle = float(np.median(list(medians.values())))
        for name, median in medians.items():
            if not folder.tensors[name].part.startswith(("input", "output", "k_", "v_", "q_")):
                sizes[folder.tensors[name].layer] = median - middle
    found: set[str] = set()
    for layer, own in sizes.items():
        stem, dot, last = layer.rpartition(".")
        for other in (f"{stem}{dot}{second}" for first, second in FOLDED_LAYERS if first == last):
            opposite = own * sizes.get(other, 0.0) < 0 and abs(own) <= MOST_FOLDED
            if opposite and abs(own + sizes[other]) <= max(abs(own), abs(sizes[other])) / 2:
                found |= {layer, other}
    return found


def _add(kinds: dict[str, dict[str, Octaves]], tensor: Tensor, octaves: Octaves | None) -> None:
    """Add the octaves of a tensor's sizes to those of its kind; those that are no sound size are reported as such."""
    if octaves is not None:
        kinds.setdefault(kind_of(tensor.name), {})[tensor.name] = octaves


def _outlying(
    folder: Folder, kind: str, members: Mapping[str, Octaves], spread: float, noun: str = "scale"
) -> Iterator[Finding]:
    names = list(members)
    medians = np.array([each.median for each in members.values()])
    typical = f"the median {noun} is"
    if all(folder.tensors[name].dtype in EXPONENTS for name in names):
        # of healthy siblings some medians would be a whole octave apart
        typical = "the geometric mean of its scales is"
        medians = np.array([each.mean for each in members.values()])
    high = np.array([each.high for each in members.values()]) - medians
    low = np.array([each.low for each in members.values()]) - medians
    reported: set[str] = set()
    for what, values, floor in (
        (typical, medians, TENSOR_FLOOR),
        (f"its largest {noun} over its median is", high, CHANNEL_FLOOR),
        (f"its smallest {noun} over its median is", low, CHANNEL_FLOOR),
    ):
        middle = float(np.median(values))
        deviation = max(1.4826 * float(np.median(np.abs(values - middle))), floor)
        for name, value in zip(names, values.tolist(), strict=True):
            away = (value - middle) / deviation
            if abs(away) > spread and name not in reported:
                reported.add(name)
                tensor = folder.tensors[name]
                factor = f"{what} {2 ** (value - middle):.3g} × that of its {len(names)} siblings {kind}"
                far = f"{factor} ({abs(away):.1f} deviations; allowed {spread:g})"
                advice = "compare the layer with the original; raise spread if it is meant so"
                yield Finding.at(tensor, far, advice)


def _untouched(form: Format, kind: str, members: Mapping[str, Octaves]) -> Iterator[Finding]:
    """Yield scales that are the same number in every block: the initial value, because calibration saw no data.

    Scales of weights never agree. One of inputs or of a KV cache may be set by hand, which is a note, and is initial
    only where it is 1 and its writer doesn't mean that.
    """
    first = next(iter(members.values())).low
    if not all(each.low == first == each.high for each in members.values()):
        return
    tensors = [form.folder.tensors[name] for name in members]
    of_weights = all(t.part.startswith("weight") or t == form.weight_scale_of(t.layer) for t in tensors)
    what = f"{2**first:g}, as every scale of the {len(members)} siblings {kind}"
    if of_weights or (first == 0 and not form.unit_scales):
        for tensor in tensors:
            advice = "the calibration saw no data: run it again and look at its hooks"
            yield Finding.at(tensor, f"{what}: the initial value", advice)
    else:
        advice = "leave it so if it was set by hand, for calibrated scales differ"
        yield Finding.at(tensors[0], what, advice, note=True)


def unsound_zero_points(form: Format) -> Iterator[Finding]:
    """Yield zero points that lie outside of the codes' range, or that a symmetric scheme can't have."""
    for layer in form.scaled:
        tensor, values = form.zero_point_of(layer), form.zero_point_values(layer)
        scheme, limits = form.scheme_of(layer), form.zero_point_range(layer)
        if tensor is None or values is None or not values.size:
            continue
        flat = values.ravel()
        low, high = limits or (-np.inf, np.inf)
        if outside := np.flatnonzero(~((flat >= low) & (flat <= high))).tolist():
            what = f"{len(outside)} of {flat.size} aren't within {low:g} … {high:g}, the first is {flat[outside[0]]:g}"
            yield Finding.at(tensor, what, AGAIN)
        elif scheme is not None and scheme.zero_point is not None and (flat != scheme.zero_point).any():
            odd = flat[flat != scheme.zero_point]
            what = f"{odd.size} of {flat.size} aren't {scheme.zero_point}, as a symmetric scheme has them"
            advice = f"{AGAIN}; where all are off by one, the version of the format that is declared is wrong"
            yield Finding.at(tensor, f"{what}, the first is {odd[0]:g}", advice)


def outlying_zero_points(form: Format, *, spread: float) -> Iterator[Finding]:
    """Yield zero points with which the mean of a layer's weights over their rms is far from that of its siblings.

    A zero point that is off by one moves every weight of its group by a step, at 4 bits a third of their rms. Zero
    points by themselves differ too much from group to group to show it.
    """
    kinds: dict[str, dict[str, float]] = {}
    for layer in form.scaled:
        tensor, scheme = form.zero_point_of(layer), form.scheme_of(layer)
        symmetric = scheme is not None and scheme.zero_point is not None
        if tensor is not None and not symmetric and (offset := _mean_over_rms(form, layer)) is not None:
            kinds.setdefault(kind_of(tensor.name), {})[tensor.name] = offset
    for kind, members in kinds.items():
        offsets = np.array(list(members.values()))
        middle = float(np.median(offsets))
        deviation = max(1.4826 * float(np.median(np.abs(offsets - middle))), OFFSET_FLOOR)
        for name, offset in members.items():
            away = abs(offset - middle) / deviation
            if len(members) >= FEWEST and away > spread:
                what = f"with them the mean weight is {offset:.2g} of the rms, in the {len(members)} siblings {kind}"
                far = f"{what} {middle:.2g} ({away:.1f} deviations; allowed {spread:g})"
                yield Finding.at(form.folder.tensors[name], far, "compare zero points and codes with the original's")


def _mean_over_rms(form: Format, layer: str) -> float | None:
    """Return the mean of some rows of a layer over their rms; None where they can't be read or aren't finite."""
    shape = form.weight_shape(layer)
    rows = _rows_of(form, layer, slice(None, None, max(1, (shape[0] if shape else 1) // ROWS_READ)))
    if rows is None or not np.isfinite(rows).all() or not rows.any():
        return None
    return float(rows.mean() / np.sqrt(np.square(rows).mean()))


def _rows_of(form: Format, layer: str, rows: slice) -> NDArray[np.float64] | None:
    try:
        return form.stored_rows(layer, rows)
    except AnomalyError:  # tensors that are lost or don't fit have findings of their own
        return None


def unequal_fused(form: Format, *, always: bool) -> Iterator[Finding]:
    """Yield tensor-wise scales that differ within q/k/v or gate/up, which loaders fuse into one matrix with one scale.

    NVFP4's scales of a whole tensor and of its inputs always, for loaders keep one of them and don't rescale the
    others. Of other scales, where no block has them equal, the writer gave each matrix its own, and a loader rescales;
    then only `always` reports it.
    """
    kinds: dict[str, list[list[Tensor]]] = {}
    for layer in form.scaled:
        stem, dot, last = layer.rpartition(".")
        for names in (names for names in FUSED_LAYERS if names[0] == last):
            fused = [f"{stem}{dot}{name}" for name in names]
            shared = [each for each in fused if _has_whole_scale(form, each, SHARED_SCALES)]
            yield from _unshared(form, shared)
            scales = [form.scales_of(each) for each in fused if each not in shared]
            for part, tensor in (scales[0] if scales else {}).items():
                group = [members[part] for members in scales if part in members]
                if len(group) == len(names) and all(element_count(member) == 1 for member in group):
                    kinds.setdefault(kind_of(tensor.name), []).append(group)
    for groups in kinds.values():
        scaled = [[(member, float(member.values().ravel()[0])) for member in group] for group in groups]
        unequal = [group for group in scaled if len({value for _, value in group}) > 1]
        if always or len(unequal) < len(groups):
            for odd in unequal:
                yield _unequal(odd, len(groups) - len(unequal))


def _has_whole_scale(form: Format, layer: str, names: Sequence[str] = WHOLE_SCALES) -> bool:
    """Say whether a layer has NVFP4's two scales: E4M3 of blocks, and one of the whole tensor by one of the names."""
    scale = form.weight_scale_of(layer)
    return scale is not None and scale.dtype == "F8_E4M3" and any(part in form.parts(layer) for part in names)


def _unshared(form: Format, layers: Sequence[str]) -> Iterator[Finding]:
    """Yield the scales of whole tensors that differ among NVFP4 layers that are fused, at the one that suffers most.

    vLLM keeps the largest number that is stored for fused linear layers, and the first layer's for gate and up of an
    expert; it warns, and rescales none of the others.
    """
    for part in SHARED_SCALES:
        tensors = [form.parts(layer)[part] for layer in layers if part in form.parts(layer)]
        stored = np.array([float(tensor.values().ravel()[0]) for tensor in tensors if element_count(tensor) == 1])
        sound = len(stored) == len(tensors) > 1 and bool(np.isfinite(stored).all() and (stored > 0).all())
        if not sound or stored.max() <= stored.min() * (1 + SHARED_TOLERANCE):
            continue
        expert = ".experts." in tensors[0].layer and not part.startswith("input")
        kept = stored[0] if expert else stored.max()
        factors = stored / kept if part in DIVISORS else kept / stored
        worst = int(np.abs(np.log2(factors)).argmax())
        ends = [tensor.layer.rpartition(".")[2] for tensor in tensors]
        values = ", ".join(f"{end} {value:.4g}" for end, value in zip(ends, stored.tolist(), strict=True))
        rule = f"{ends[0]}'s" if expert else "the largest"
        suffers = "weights become" if not part.startswith("input") else "inputs are rounded with a scale"
        what = f"unequal {part} in a fused group: {values}; vLLM takes {rule} for all"
        effect = f"{ends[worst]}'s {suffers} × {factors[worst]:.4g}"
        yield Finding.at(
            tensors[worst], f"{what}: {effect}", "give the group the scale of its largest, and round again"
        )


def foreign_whole_scales(form: Format) -> Iterator[Finding]:
    """Yield NVFP4's scales of a whole tensor that are another tensor's.

    The scale of a tensor, or of those that are fused, puts the largest scale of a block at 448 by definition. A search
    for the least error leaves it lower, but not below 448/8, or more than an octave away from its siblings.
    """
    peaks: dict[str, float] = {}
    for layer in form.scaled:
        scale = form.weight_scale_of(layer)
        if scale is not None and _has_whole_scale(form, layer):
            values = form.scale_values(layer, scale.part)
            peaks[layer] = float(values[np.isfinite(values)].max(initial=0.0))
    fused = {layer: max(peaks[name] for name in _fused_with(layer) if name in peaks) for layer in peaks}
    kinds: dict[str, list[float]] = {}
    for layer, peak in fused.items():
        kinds.setdefault(kind_of(layer), []).append(peak)
    for layer, peak in fused.items():
        middle, scheme = float(np.median(kinds[kind_of(layer)])), form.scheme_of(layer)
        # this one maps the largest weight to 448 itself, instead of to 448 · 6
        least = LARGEST_BLOCK_SCALE / (48 if scheme is not None and scheme.form == "W4A8_NVFP4_FP8" else 8)
        low, odd = peak < least, len(kinds[kind_of(layer)]) >= FEWEST and not middle / 2 <= peak <= middle * 2
        if low or odd:
            tensor = next(form.parts(layer)[part] for part in WHOLE_SCALES if part in form.parts(layer))
            usual = f"{least:g} at least" if low else f"{middle:g} in its siblings"
            what = f"it isn't that of its own weights: the largest scale of their blocks is {peak:g}, {usual}"
            yield Finding.at(tensor, what, AGAIN)


def _fused_with(layer: str) -> list[str]:
    """Return the layers that loaders fuse with one, itself included."""
    stem, dot, last = layer.rpartition(".")
    return [f"{stem}{dot}{name}" for names in FUSED_LAYERS if last in names for name in names] or [layer]


def _unequal(group: Sequence[tuple[Tensor, float]], equal: int) -> Finding:
    common = Counter(value for _, value in group).most_common(1)[0][0]
    odd = next(member for member, value in group if value != common)
    text = ", ".join(f"{member.layer.rpartition('.')[2]} {value:.4g}" for member, value in group)
    what = f"unequal {odd.part} in a fused group: {text}; equal in {equal} other blocks"
    return Finding.at(odd, what, "a fused matrix has one scale: fill all slots with the same")

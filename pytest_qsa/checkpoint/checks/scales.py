"""Scales: missing, unexpected, unsound by themselves, or far from their siblings in the other blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..findings import Finding
from ..folder import Folder, kind_of
from ..formats.declared import (
    ZERO_POINT,
    Declaration,
    Scheme,
    codes_of,
    declared,
    element_count,
    is_linear,
    scale_parts,
    weight_shape,
)
from ..formats.gguf import block_scales
from ..tensors import RAW, Tensor, decoded

SMALLEST = {"F64": 2.0**-1022, "F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-20}
"""Below it a scale is denormal; a float16 one only where fewer than 4 of its bits are left, for it is kept exactly."""
FEWEST = 4
"""So many siblings make a median and a spread."""
TENSOR_FLOOR, CHANNEL_FLOOR = 0.1, 0.3
"""The least spread in octaves that is taken for one: healthy layers that happen to agree aren't faulty for 1 %."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))

Group = dict[str, dict[str, NDArray[np.float64]]]


def missing_scales(folder: Folder) -> Iterator[Finding]:
    """Yield what a layer's declared scheme wants and the files lack, what they have too much, and wrong shapes."""
    declaration = declared(folder)
    for layer, parts in folder.layers.items():
        scheme = declaration.of(layer) if is_linear(layer, parts) else None
        if codes_of(parts) is None:
            if declaration.names_layers:
                yield from _orphans(layer, parts, declaration)
        elif scheme is not None:
            yield from _against_scheme(layer, parts, scheme)
        elif not scale_parts(parts):
            codes = codes_of(parts)
            assert codes is not None
            if codes.dtype in RAW and codes.dtype not in ("I64", "BOOL"):
                yield Finding(layer, codes.name, codes.file, f"its {codes.dtype} codes have no scale", _AGAIN)


_AGAIN = "quantize and save the layer again"


def _orphans(layer: str, parts: Mapping[str, Tensor], declaration: Declaration) -> Iterator[Finding]:
    """Yield the weight's scales of a layer that has no codes: nothing would apply them."""
    for part, tensor in scale_parts(parts).items():
        if part.startswith(("weight", "_weight")) and not any(s.form == "dense" for _, s in declaration.groups):
            yield Finding(
                layer, tensor.name, tensor.file, "a scale beside a weight that isn't quantized",
                "the weight was replaced, or the layer belongs into ignore",
            )  # fmt: skip


def _against_scheme(layer: str, parts: Mapping[str, Tensor], scheme: Scheme) -> Iterator[Finding]:
    codes = codes_of(parts)
    assert codes is not None
    for choice in scheme.required:
        if not any(part in parts for part in choice):
            yield Finding(
                layer, f"{layer}.{choice[0]}", codes.file, f"missing, though the scheme {scheme.form} needs it",
                "a loader fills it with random numbers or ones: save the checkpoint again",
            )  # fmt: skip
    known = {part for choice in scheme.required for part in choice} | scheme.allowed
    for part, tensor in parts.items():
        if (part in scale_parts(parts) or ZERO_POINT.search(part)) and part not in known:
            yield Finding(
                layer, tensor.name, tensor.file, f"unexpected: the scheme {scheme.form} has no {part}",
                "a loader drops it silently: correct quantization_config, or save the checkpoint again",
            )  # fmt: skip
    shape = weight_shape(parts, scheme.bits)
    expected = scheme.scale_count(*shape) if shape else None
    for part in ("weight_scale", "weight_scale_inv", "scales"):
        if expected is not None and part in parts and element_count(parts[part]) != expected:
            size = "×".join(map(str, parts[part].shape)) or "scalar"
            yield Finding(
                layer, parts[part].name, parts[part].file,
                f"shape {size}, but {scheme.strategy}-wise scales of a weight {shape} are {expected}",
                "correct strategy and group_size in quantization_config, or quantize the layer again",
            )  # fmt: skip


def unsound_scales(folder: Folder) -> Iterator[Finding]:
    """Yield scales that are NaN, infinite, zero, negative or denormal, with how many and the first."""
    for layer, parts in folder.layers.items():
        for tensor in parts.values():
            inner = block_scales(tensor)
            bad = 0 if inner is None else int(np.count_nonzero(~np.isfinite(inner).all(axis=1)))
            if inner is not None and bad:
                what = f"{bad} of {len(inner)} blocks have a scale that is NaN or infinite"
                yield Finding(layer, tensor.name, tensor.file, what, _AGAIN)
        for tensor in scale_parts(parts).values():
            values = scale_values(tensor).ravel()
            least = SMALLEST.get(tensor.dtype, 0.0)
            for word, wrong in (
                ("NaN", np.isnan(values)),
                ("infinite", np.isinf(values)),
                ("zero", values == 0),
                ("negative", values < 0),
                ("denormal", (values > 0) & (values < least)),
            ):
                if wrong.any():
                    at, many = int(np.flatnonzero(wrong)[0]), int(wrong.sum())
                    where = (
                        f"{many} of {values.size} are {word}, the first at {at}" if values.size > 1 else f"is {word}"
                    )
                    yield Finding(layer, tensor.name, tensor.file, where, _AGAIN)


def scale_values(tensor: Tensor) -> NDArray[np.float64]:
    """Return scales as float64; microscaling's bytes are exponents (OCP MX: E8M0)."""
    return decoded(np.asarray(tensor.raw()), "F8_E8M0") if tensor.dtype == "U8" else tensor.values()


def outlying_scales(folder: Folder, *, spread: float) -> Iterator[Finding]:
    """Yield scales that are more than `spread` × the robust deviation away from their siblings, in octaves.

    Of each tensor the median and the largest and smallest scale over that median are compared with those of the same
    projection in the other blocks: |log₂ x − median| > spread × max(1.4826 · MAD, floor); Iglewicz and Hoaglin, 1993.
    """
    kinds: Group = {}
    for layer, parts in folder.layers.items():
        for part, tensor in scale_parts(parts).items():
            values = scale_values(tensor).ravel()
            values = values[np.isfinite(values) & (values > 0)]
            if values.size:
                kinds.setdefault(kind_of(f"{layer}.{part}"), {})[f"{layer}.{part}"] = np.log2(values)
    for kind, members in kinds.items():
        if len(members) >= FEWEST:
            yield from _untouched(folder, kind, members)
            yield from _outlying(folder, kind, members, spread)


def _outlying(
    folder: Folder, kind: str, members: Mapping[str, NDArray[np.float64]], spread: float
) -> Iterator[Finding]:
    names = list(members)
    medians = np.array([np.median(members[name]) for name in names])
    high = np.array([members[name].max() for name in names]) - medians
    low = np.array([members[name].min() for name in names]) - medians
    told: set[str] = set()
    for what, values, floor in (
        ("the median scale is", medians, TENSOR_FLOOR),
        ("its largest scale over its median is", high, CHANNEL_FLOOR),
        ("its smallest scale over its median is", low, CHANNEL_FLOOR),
    ):
        middle = float(np.median(values))
        deviation = max(1.4826 * float(np.median(np.abs(values - middle))), floor)
        for name, value in zip(names, values.tolist(), strict=True):
            away = (value - middle) / deviation
            if abs(away) > spread and name not in told:
                told.add(name)
                tensor = folder.tensors[name]
                yield Finding(
                    tensor.layer, name, tensor.file,
                    f"{what} {2 ** (value - middle):.3g} × that of its {len(names)} siblings {kind} "
                    f"({abs(away):.1f} deviations; allowed {spread:g})",
                    "compare the layer with the original; raise spread if it is meant so",
                )  # fmt: skip


def _untouched(folder: Folder, kind: str, members: Mapping[str, NDArray[np.float64]]) -> Iterator[Finding]:
    """Yield scales that are all one number in every block: their initial value, for calibration saw no data."""
    first = next(iter(members.values()))[0]
    if all((values == first).all() for values in members.values()):
        for name in members:
            tensor = folder.tensors[name]
            yield Finding(
                tensor.layer, name, tensor.file,
                f"{2**first:g}, as every scale of the {len(members)} siblings {kind}: the initial value",
                "the calibration saw no data: run it again and look at its hooks",
            )  # fmt: skip


def unequal_fused(folder: Folder, *, always: bool) -> Iterator[Finding]:
    """Yield tensor-wise scales that differ within q/k/v or gate/up, which loaders fuse into one matrix with one scale.

    Where no block has them equal the writer never meant them so, and a loader rescales; then only `always` reports it.
    """
    kinds: dict[str, list[list[Tensor]]] = {}
    for layer, parts in folder.layers.items():
        stem, _, last = layer.rpartition(".")
        for names in FUSED:
            if last != names[0]:
                continue
            others = [folder.layers.get(f"{stem}.{name}", {}) for name in names]
            for part, tensor in scale_parts(parts).items():
                group = [other[part] for other in others if part in other]
                if len(group) == len(names) and all(element_count(member) == 1 for member in group):
                    kinds.setdefault(kind_of(tensor.name), []).append(group)
    for groups in kinds.values():
        scaled = [[(member, float(member.values().ravel()[0])) for member in group] for group in groups]
        unequal = [group for group in scaled if len({value for _, value in group}) > 1]
        if always or len(unequal) < len(groups):
            for scales in unequal:
                yield _unequal(scales, len(groups) - len(unequal))


def _unequal(group: Sequence[tuple[Tensor, float]], equal: int) -> Finding:
    common = Counter(value for _, value in group).most_common(1)[0][0]
    odd = next(member for member, value in group if value != common)
    text = ", ".join(f"{member.layer.rpartition('.')[2]} {value:.4g}" for member, value in group)
    return Finding(
        odd.layer, odd.name, odd.file, f"unequal {odd.part} in a fused group: {text}; equal in {equal} other blocks",
        "a fused matrix has one scale: fill all slots of the group with the same",
    )  # fmt: skip

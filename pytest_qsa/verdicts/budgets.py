"""Bounds as a suite states them: resolved for each layer, and tightened by a patch where they are too loose."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..captures import match_layers
from ..common import AnomalyError
from ..metrics import Bounds
from ..suite import DEFAULT, SCHEME, Assertion, Location, Place, Relative, Stated
from .verdict import Limit, Row


@dataclass(frozen=True)
class Budget:
    """The bounds of a series. `bounds`: one for each layer, in their order. `text`: as the suite states them.

    `keys`: (layer, `max`) → the keys in the suite, below the assertion, that lead to the number.
    """

    bounds: Sequence[Bounds]
    text: str
    keys: Mapping[tuple[str, str], tuple[str, ...]]

    @classmethod
    def of(cls, bounds: Bounds, layers: Sequence[str]) -> Budget:
        """Give all layers the same bounds, for a comparison in Python."""
        return cls([bounds] * len(layers), str(bounds), {})


def budget_of(
    stated: Mapping[str, Stated],
    layers: Sequence[str],
    schemes: Mapping[str, str] | None,
    previous: Mapping[str, float] | None = None,
) -> Budget:
    """Resolve bounds for layers. `stated`: by `min`, `max`, `equals`. `schemes`: quantized layer → its scheme.

    `previous`: the layers' values in the last release, for bounds that follow it.

    Raises:
        AnomalyError: a layer is in no group, a group has no layer, no layer has a bound, or nothing says how the layers
            are quantized.
    """
    keys = {(layer, name): key_of(name, stated[name], layer, schemes) for name in stated for layer in layers}
    for name, bound in stated.items():
        _check_groups(name, bound, layers)
        if isinstance(bound, dict) and layers and all(bound[keys[layer, name][1]] is None for layer in layers):
            raise AnomalyError(f"{name} checks nothing: all layers are in its group `default`, which is null")
    text = ", ".join(f"{name} {stated_text(stated[name])}" for name in ("min", "max", "equals") if name in stated)
    bounds = []
    for layer in layers:
        numbers = {name: _number(stated[name], keys[layer, name], layer, previous or {}) for name in stated}
        bounds.append(Bounds(numbers.get("min"), numbers.get("max"), numbers.get("equals")))
    return Budget(bounds, text, keys)


def key_of(name: str, stated: Stated, layer: str, schemes: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return the keys that lead from an assertion to a layer's bound: the name of the bound, and its group.

    Raises:
        AnomalyError: the layer is in no group, or a group goes by a scheme and none is known.
    """
    if not isinstance(stated, dict):
        return (name,)
    group = next((group for group in stated if group != DEFAULT and _fits(group, layer, schemes)), None)
    if group is None and DEFAULT not in stated:
        raise AnomalyError(f"{layer} is in no group of {name} ({', '.join(stated)}): add the group `default`")
    return (name, DEFAULT if group is None else group)  # an empty pattern is a group as well


def _fits(group: str, layer: str, schemes: Mapping[str, str] | None) -> bool:
    if not group.startswith(SCHEME):
        return bool(match_layers([layer], group))
    wanted, scheme = group.removeprefix(SCHEME), scheme_of(layer, schemes)
    # `scheme:w4a16` stands for `w4a16_int` and `w4a16_fp`.
    return scheme == wanted or scheme.partition("_")[0] == wanted


def scheme_of(layer: str, schemes: Mapping[str, str] | None) -> str:
    """Return how a layer is quantized: its own scheme, else that of all the layers in it, else `mixed` or `none`.

    Raises:
        AnomalyError: it isn't known of any layer.
    """
    if schemes is None:
        raise AnomalyError(
            "nothing says how the layers of this checkpoint are quantized, so a bound can't go by scheme; "
            "write groups of layers"
        )
    if layer in schemes:
        return schemes[layer]
    inside = {scheme for name, scheme in schemes.items() if name.startswith(f"{layer}.")}
    return "mixed" if len(inside) > 1 else next(iter(inside), "none")


def _check_groups(name: str, stated: Stated, layers: Sequence[str]) -> None:
    for group in stated if isinstance(stated, dict) else ():
        # A base for many checkpoints may name schemes that one of them lacks; a group of layers would check nothing.
        if group != DEFAULT and not group.startswith(SCHEME) and not match_layers(layers, group):
            raise AnomalyError(f"the group '{group}' of {name} matches none of the {len(layers)} layers")


def foresee_groups(stated: Mapping[str, Stated], layers: Sequence[str], *, measured: bool) -> None:
    """Check the groups of bounds before there is a number: as `budget_of`, without those that go by scheme.

    `measured`: whether all of the layers will have a number, so that each has to be in a group.

    Raises:
        AnomalyError: a layer is in no group, or a group has no layer.
    """
    for name, bound in stated.items():
        _check_groups(name, bound, layers)
        if measured and isinstance(bound, dict) and not any(group.startswith(SCHEME) for group in bound):
            for layer in layers:
                key_of(name, bound, layer, None)


def _number(stated: Stated, key: tuple[str, ...], layer: str, previous: Mapping[str, float]) -> float | None:
    bound = stated[key[1]] if isinstance(stated, dict) else stated
    return bound.number(previous[layer]) if isinstance(bound, Relative) else bound


def stated_text(stated: Stated | None) -> str:
    """Write a bound as a suite states it, in one line."""
    if stated is None:
        return "no bound"
    if isinstance(stated, dict):
        return f"{{{', '.join(f'{group}: {stated_text(bound)}' for group, bound in stated.items())}}}"
    return str(stated) if isinstance(stated, Relative) else f"{stated:g}"


BOUND_DIGITS = 2
"""The significant digits of a proposed bound. It is rounded away from the values: other machines differ a little."""
# On fresh windows SmolLM2 in int8 had a second outlier token in 1 of 16 runs, where all 8 parts had one.
SPARE = 1
"""The tokens that a bound on a number of tokens leaves free where calibration saw the same number in all parts."""


def limits_of(
    assertion: Assertion,
    rows: Sequence[Row],
    schemes: Mapping[str, str] | None,
    place: Callable[[Location], Place | None],
) -> list[Limit]:
    """Return each number that an assertion states as its `max` or `min`, with the value that comes nearest to it.

    Without rows nothing sound was seen, so the bound itself counts as the nearest value and stays as it is. `schemes`:
    quantized layer → its scheme. `place`: the keys of a bound → its line in the suite.
    """
    stated = assertion.stated
    # what qsa calibrate measured of a healthy model: no bound may be tighter, so it counts as a value
    nearest = dict(assertion.noise.floors) if assertion.noise and rows else {}
    for row in rows:
        for name, worse in (("max", max), ("min", min)):
            if name in stated:
                key = key_of(name, stated[name], row.layer, schemes)
                nearest[key] = worse(nearest.get(key, row.value), row.value)
    limits = []
    for key, bound in _numbers(stated):
        value = nearest[key] + SPARE * _is_steady(assertion, key) if key in nearest else bound
        if (at := place(key)) is not None:
            limits.append(Limit(str(at.path), at.line, key[0], key[-1], bound, value))
    return limits


def _is_steady(assertion: Assertion, key: tuple[str, ...]) -> bool:
    """Say whether a bound is on a number of tokens that calibration saw the same in all parts of the data."""
    if assertion.noise is None or assertion.query.unit != "tokens" or key[0] != "max":
        return False
    return key in assertion.noise.steady


def _numbers(stated: Mapping[str, Stated]) -> Iterator[tuple[tuple[str, ...], float]]:
    for name in ("max", "min"):
        bound = stated.get(name)
        if isinstance(bound, float):
            yield (name,), bound
        elif isinstance(bound, dict):
            yield from (((name, group), number) for group, number in bound.items() if isinstance(number, float))


def tighter(side: str, bound: float, nearest: float) -> float | None:
    """Return a tighter bound that the nearest value still meets; None where there is none."""
    if not math.isfinite(nearest):  # +∞ dB, of what equals its reference: there is no number to hold it by
        return None
    proposed = outward(side, nearest)
    return proposed if (proposed < bound if side == "max" else proposed > bound) else None


def outward(side: str, number: float) -> float:
    """Round a number to two digits so that a bound of that side still meets it; a whole number stays as it is."""
    if number == int(number):
        return number
    unit = 10.0 ** (math.floor(math.log10(abs(number))) - BOUND_DIGITS + 1)
    return float(f"{(math.ceil if side == 'max' else math.floor)(number / unit) * unit:.{BOUND_DIGITS}g}")


def patch_of(limits: Iterable[Mapping[str, Any]], root: Path) -> str:
    """Return the patch, as `git apply` takes it; empty where nothing can be tightened. `limits`: of all assertions.

    A number that several assertions share, in a base or in the defaults, is tightened to what all of them meet.
    """
    nearest: dict[tuple[Any, ...], float] = {}
    for limit in limits:
        at = tuple(limit[name] for name in ("path", "line", "side", "key", "bound"))
        worse = max if limit["side"] == "max" else min
        nearest[at] = worse(nearest.get(at, limit["nearest"]), limit["nearest"])
    changes: dict[str, dict[tuple[Any, ...], float]] = {}
    for (path, line, side, key, bound), value in nearest.items():
        if (proposed := tighter(side, bound, value)) is not None:
            changes.setdefault(path, {})[line, key, bound] = proposed
    return "".join(_file_patch(Path(path), numbers, root) for path, numbers in sorted(changes.items()))


def _file_patch(path: Path, numbers: Mapping[tuple[Any, ...], float], root: Path) -> str:
    # Not read_text, which makes \r\n to \n: the patch would not apply.
    text = path.read_bytes().decode("utf-8")
    spans = [(span, number) for at, number in numbers.items() if (span := _span(text, *at)) is not None]
    changed = text
    # From the end, so that the places before stay where they are.
    for (start, end), number in sorted(spans, reverse=True):
        changed = f"{changed[:start]}{number:g}{changed[end:]}"
    if changed == text:
        return ""
    name = os.path.relpath(path.resolve(), root.resolve())
    lines = difflib.unified_diff(
        text.splitlines(keepends=True), changed.splitlines(keepends=True), f"a/{name}", f"b/{name}"
    )
    # difflib leaves out the mark that git needs where the last line has no end.
    body = (line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
    return f"diff --git a/{name} b/{name}\n" + "".join(body)


def _span(text: str, line: int, key: str, bound: float) -> tuple[int, int] | None:
    """Return where the text of a bound stands; None where the line has another number: an override or alias set it."""
    found = []
    for name, value in _pairs(yaml.compose(text, yaml.SafeLoader)):
        if name.start_mark.line + 1 == line and name.value == key and isinstance(value, yaml.ScalarNode):
            span = (value.start_mark.index, value.end_mark.index)
            if _is(text[slice(*span)], bound):
                found.append(span)
    return found[0] if len(found) == 1 else None


def _is(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


def _pairs(node: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield name, value
            yield from _pairs(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _pairs(item)


def project_root(folder: Path) -> Path:
    """Return the folder that a patch is relative to: the repository's, or the given one where there is none."""
    return next((up for up in (folder, *folder.parents) if (up / ".git").exists()), folder)

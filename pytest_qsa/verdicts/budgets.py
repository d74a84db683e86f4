"""A budget as a suite states it → the bounds of each layer of a series, and the keys of the suite that set them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..captures import match_layers
from ..common import AnomalyError
from ..metrics import Bounds
from ..suite import DEFAULT, SCHEME, Relative, Stated


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
        AnomalyError: a layer is in no group, a group has no layer, or nothing says how the layers are quantized.
    """
    keys = {(layer, name): key_of(name, stated[name], layer, schemes) for name in stated for layer in layers}
    for name, bound in stated.items():
        _check_groups(name, bound, layers)
    text = ", ".join(f"{name} {_text(stated[name])}" for name in ("min", "max", "equals") if name in stated)
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
    return (name, group or DEFAULT)


def _fits(group: str, layer: str, schemes: Mapping[str, str] | None) -> bool:
    if not group.startswith(SCHEME):
        return bool(match_layers([layer], group))
    wanted, scheme = group.removeprefix(SCHEME), scheme_of(layer, schemes)
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
        if group != DEFAULT and not group.startswith(SCHEME) and not match_layers(layers, group):
            raise AnomalyError(f"the group '{group}' of {name} matches none of the {len(layers)} layers")


def _number(stated: Stated, key: tuple[str, ...], layer: str, previous: Mapping[str, float]) -> float:
    bound = stated[key[1]] if isinstance(stated, dict) else stated
    return bound.number(previous[layer]) if isinstance(bound, Relative) else bound


def _text(stated: Stated) -> str:
    if isinstance(stated, dict):
        return f"{{{', '.join(f'{group}: {_text(bound)}' for group, bound in stated.items())}}}"
    return str(stated) if isinstance(stated, Relative) else f"{stated:g}"

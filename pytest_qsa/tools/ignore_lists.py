"""The layers to keep in 16 bits, written as each quantizer reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ..checkpoint import FUSED_LAYERS
from .rank import Unit

FUSED_NAMES = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj", "w1": "w13"}
"""The first layer of a fused unit → the name under which servers look it up."""


def _llm_compressor(units: Sequence[Unit], left: Sequence[str]) -> str:
    """Return YAML with the `ignore` of a modifier, which matches whole names, and what follows `re:` from the start."""
    names = [*left, *(name for unit in units for name in _names(unit))]
    lines = [
        "# The layers to keep in 16 bits: `ignore` of llm-compressor's QuantizationModifier, GPTQModifier, AWQModifier."
    ]
    return "\n".join([*lines, "ignore:", *(f"  - {json.dumps(name)}" for name in names), ""])


def _names(unit: Unit) -> Iterator[str]:
    if unit.expert_set:
        yield rf"re:{re.escape(unit.name)}\..*"
    else:
        yield from unit.layers


def _modelopt(units: Sequence[Unit], left: Sequence[str]) -> str:
    """Return JSON with entries for the end of `quant_cfg`, by wildcards on the names of quantizers."""
    names = [*left, *(name for unit in units for name in ([unit.name] if unit.expert_set else unit.layers))]
    return f"{json.dumps([{'quantizer_name': f'{name}.*', 'enable': False} for name in names], indent=2)}\n"


def _gptq(units: Sequence[Unit], left: Sequence[str]) -> str:
    """Return JSON with the `dynamic` of GPTQModel's QuantizeConfig: `-:` leaves out what a regex matches.

    vLLM looks a fused layer up by its own name, which the regex matches as well.
    """
    patterns = [_regex(*name.rpartition(".")[::2]) for name in left]
    for unit in units:
        if unit.expert_set:
            patterns.append(rf"^{re.escape(unit.name)}(\..*)?$")
            continue
        parent = unit.layers[0].rpartition(".")[0]
        ends = [layer.rpartition(".")[2] for layer in unit.layers]
        fused = next((group for group in FUSED_LAYERS if set(ends) == set(group)), ())
        more = [FUSED_NAMES[fused[0]]] if fused and fused[0] in FUSED_NAMES else []
        patterns.append(_regex(parent, *ends, *more))
    return f"{json.dumps({f'-:{pattern}': {} for pattern in patterns}, indent=2)}\n"


def _regex(parent: str, *ends: str) -> str:
    own = ends[0] if len(ends) == 1 else f"({'|'.join(ends)})"
    return rf"^{re.escape(parent)}\.{own}$" if parent else f"^{own}$"


WRITERS: Mapping[str, Callable[[Sequence[Unit], Sequence[str]], str]] = {
    "llm-compressor": _llm_compressor,
    "modelopt": _modelopt,
    "gptq": _gptq,
}
"""The quantizers that a list can be written for."""


def ignore_list(quantizer: str, units: Sequence[Unit], left: Iterable[str]) -> str:
    """Return the content of a file that names what a quantizer leaves out.

    `left`: the linear layers that the checkpoint leaves out already, as its head.
    """
    return WRITERS[quantizer](units, list(left))


def quantizer_of(method: str) -> str:
    """Return the quantizer that most likely made a checkpoint, by its `quant_method`."""
    return {"gptq": "gptq", "modelopt": "modelopt"}.get(method, "llm-compressor")

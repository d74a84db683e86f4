"""The local errors of packed experts: what each makes of some tokens that their module gets in the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor

from ...captures import LAYOUTS, SiteKey, SiteNumbers, Statistic
from ..formats.format import is_plain
from ..load.batches import BatchRows
from ..modules import Expert, Layer
from ..reduce.pairs import powers_of
from ..reduce.storage import Transfer
from ..run.participant import WantedSites
from .pair_statistics import drawn_rows, named_local_errors

_Rows = dict[str, list[Tensor]]
"""Name of an array → for each sample the positions of its tokens [R], or the powers of all layers [layers, R, 3]."""


@dataclass
class _Module:
    """The experts of one module in both models, and what they have made of some tokens.

    `layers`: name → what is wanted of it, the layer and that of the reference. `owners`: sample, call and number of
    tokens of each entry of `rows`.
    """

    layers: dict[str, tuple[frozenset[Statistic], Expert, Expert]] = field(default_factory=dict)
    owners: list[tuple[int, int, int]] = field(default_factory=list)
    rows: _Rows = field(default_factory=dict)

    @property
    def errors(self) -> list[tuple[int, tuple[str, str]]]:
        """The number of rows of each local error, and the names of its arrays."""
        return named_local_errors({each for statistics, _, _ in self.layers.values() for each in statistics})


class ExpertErrors:
    """Runs all experts of both models on tokens of the reference, whether its router sends them there or not.

    So each expert has a number in every run; as they are many, they share the rows that a sample has for one layer.
    Experts that are no plain floats are left out, and those whose module doesn't say how gate and up act (Llama 4).

    `wanted`: the local errors of layers of experts. `own`, `reference`: the layers of both models.
    """

    def __init__(self, wanted: WantedSites, own: Mapping[str, Layer], reference: Mapping[str, Layer]) -> None:
        self._modules: dict[str, _Module] = {}
        for (name, _), statistics in wanted.items():
            layer, other = own[name], reference[name]
            if isinstance(layer, Expert) and isinstance(other, Expert) and _runs(layer) and _runs(other):
                self._modules.setdefault(layer.holder, _Module()).layers[name] = statistics, layer, other
        self.sites: frozenset[SiteKey] = frozenset((holder, "input") for holder in self._modules)

    def compare(self, rows: BatchRows, holder: str, call: int, given: Tensor) -> None:
        """Run the experts of both models on tokens of each sample. `given`: what the reference's got, [B · T, C]."""
        module, count = self._modules[holder], len(rows.samples)
        tokens = given.reshape(count, -1, given.shape[-1]) if len(given.flatten(0, -2)) % count == 0 else None
        if tokens is None or tokens.shape[1] not in rows.lengths:  # the tokens of a sample can't be told apart
            return
        length = tokens.shape[1]
        _, own, other = next(iter(module.layers.values()))
        with torch.no_grad(), align_module_device(own.module), align_module_device(other.module):
            for sample, sequence, counting in zip(rows.samples, tokens, rows.unpadded(holder, length), strict=True):
                if counting is not None and not len(counting):
                    continue
                module.owners.append((sample, call, length))
                for asked, (at, powers) in module.errors:
                    drawn = drawn_rows(sample, length, counting, max(1, asked // len(own.packed)))
                    x = sequence.index_select(0, drawn.to(sequence.device, non_blocking=True))
                    module.rows.setdefault(at, []).append(drawn.int())
                    module.rows.setdefault(powers, []).append(_powers(module, x))

    def contribute(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add the numbers of each layer."""
        fetch = Transfer(row for module in self._modules.values() for rows in module.rows.values() for row in rows)
        for module in self._modules.values():
            if not module.owners:
                continue
            owners = np.array(module.owners, dtype=np.int64)
            order = np.lexsort((owners[:, 1], owners[:, 0]))
            whole = SiteNumbers(
                dtype="",
                shape=(),
                token_axis=True,
                statistics=frozenset(),
                sample=owners[order, 0].astype(np.int32),
                call=owners[order, 1].astype(np.int32),
                lengths=owners[order, 2],
            )
            found = {name: [fetch(rows[index]) for index in order] for name, rows in module.rows.items()}
            for index, (name, (statistics, own, _)) in enumerate(module.layers.items()):
                arrays = {
                    key: LAYOUTS[key.partition("/")[0]].join([r if r.ndim == 1 else r[index] for r in rows])
                    for key, rows in found.items()
                }
                dtype = str(own.packed.dtype).removeprefix("torch.")
                shaped = replace(whole, dtype=dtype, shape=(int(owners[-1, 2]), own.shape[0]))
                numbers[name, "output"] = shaped.having(statistics, arrays)


def _runs(expert: Expert) -> bool:
    """Say whether an expert is plain floats whose product and gate are known."""
    module: Any = expert.module
    gated = hasattr(module, "gate_up_proj") and hasattr(module, "_apply_gate")
    alone = not hasattr(module, "gate_up_proj") and not hasattr(module, "gate_proj") and hasattr(module, "act_fn")
    return not expert.signs and is_plain(expert.packed) and (gated or alone)


def _powers(module: _Module, x: Tensor) -> Tensor:
    """Return Σy², Σ(y − ŷ)², Σŷ² of each layer and token [layers, R, 3]; both models' layers get the same inputs."""
    _, own, other = next(iter(module.layers.values()))
    up = "gate_up_proj" if hasattr(other.module, "gate_up_proj") else "up_proj"
    made = _product(other, up, x)
    holder: Any = other.module
    hidden = holder._apply_gate(made) if up == "gate_up_proj" else holder.act_fn(made)
    theirs = {up: made, "down_proj": _product(other, "down_proj", hidden)}
    ours = {up: _product(own, up, x), "down_proj": _product(own, "down_proj", hidden)}
    pairs = (
        (theirs[b.place.tensor][b.index][:, b.place.rows], ours[a.place.tensor][a.index][:, a.place.rows])
        for _, a, b in module.layers.values()
    )
    return torch.stack([powers_of(y.contiguous(), y_own.contiguous(), None)[:, :3] for y, y_own in pairs])


def _product(expert: Expert, tensor: str, x: Tensor) -> Tensor:
    """Return what all experts of a module make of tokens [R, in], or each of its own [experts, R, in]."""
    packed: Tensor = getattr(expert.module, tensor)
    weights = packed if expert.place.transposed else packed.transpose(1, 2)
    made = torch.matmul((x if x.dim() == 2 else x[: len(packed)]).to(packed.device, packed.dtype), weights)
    bias = getattr(expert.module, f"{tensor}_bias", None)
    return made if bias is None else made + bias[:, None]

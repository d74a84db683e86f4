"""Relation: whether single layers of a checkpoint may differ from the original's by design, smoothed or rotated.

SmoothQuant and AWQ move factors between norms and layers (smoothing_factors.py); QuaRot and SpinQuant rotate the whole
residual stream, and the values of each head. The model's output stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..common import counted
from .checks.scales import FOLDED_LAYERS
from .checks.values import ROUNDING
from .folder import NUMBER, Folder, natural
from .formats.format import BUDGET, Format, format_of
from .row_orders import heads_of
from .smoothing_factors import (
    AGREES,
    CROSSED_LAYERS,
    FIRST_ROWS,
    MOST_NORMS,
    Smoothing,
    Vector,
    makes_up,
    ratio_of,
    readable_rows,
)
from .tensors import FLOATS, Matrix, Tensor, decoded_rows

EMBEDDING_ROWS = 64
"""The number of rows of the embeddings that are compared."""
MOST_FIRST = 64
"""The layers of a kind in which a smoothing of rows is looked for where no norm differs, evenly spaced."""
UNLIKE, ALIKE = 0.8, 0.95
"""Below the one correlation matrices are others, above the other they are the same but for rounding to 4 bits."""
TABLES = ("embed_tokens", "wte", "tok_embeddings")
OUTPUT_HEADS = ("lm_head", "embed_out")
TURNED_LAYERS = (".v_proj", ".o_proj")
"""The layers between which a rotation of heads stays: nothing but a product stands between them."""
Compare = Literal["layers", "blocks", "logits"]


@dataclass(frozen=True)
class Relation:
    """How a checkpoint differs from its original by design. `norms`: those whose weights differ; `why`: in words.

    `same`: no difference by design was found. `changed`: norms differ, and no layer compensates for it.
    """

    kind: Literal["same", "smoothed", "rotated", "rotated heads", "changed"]
    norms: Sequence[str] = ()
    why: str = ""

    @property
    def compare(self) -> Compare:
        """What can be compared with the original: every layer, whole blocks, or only what the model predicts."""
        by_design: dict[str, Compare] = {"smoothed": "blocks", "rotated heads": "blocks", "rotated": "logits"}
        return by_design.get(self.kind, "layers")

    def turned(self, layer: str) -> bool:
        """Say whether a layer alone has other sizes than the original's because its heads were rotated."""
        return self.kind == "rotated heads" and layer.endswith(TURNED_LAYERS)


def compare_norms(folder: Folder, reference: Folder) -> Relation:
    """Say whether a checkpoint was smoothed or rotated, from the norms, embeddings and matrices in the files of both.

    It reads the norms, 64 rows of the embeddings and, where norms differ, at most 4 MiB of each matrix of 8 blocks;
    where none does, 64 rows of each matrix from whose rows a smoothing may take factors, of 64 blocks at most. A suite
    that is drafted against a reference asks `compare_norms(…).compare`: with `layers` all of sqnr, local_sqnr and
    weight_sqnr make sense, with `blocks` sqnr at the outputs of whole blocks and the logits, with `logits` only these.

    Raises:
        AnomalyError: a file is damaged.
        InfraError: a file is missing or can't be read.
    """
    differing = [name for name in _norms(folder, reference) if _differs(folder.tensors[name], reference.tensors[name])]
    if transforms := (folder.quantization.get("transform_config") or {}).get("config_groups"):
        return Relation("rotated", differing, f"its transform_config declares rotations ({', '.join(transforms)})")
    if turned := _turned(folder, reference):
        return Relation("rotated", differing, turned)
    mine, theirs = format_of(folder), format_of(reference)
    if not differing:
        return _folded(mine, theirs) or _turned_heads(mine, theirs) or Relation("same")
    chosen = _spaced(differing, MOST_NORMS)
    smoothing = Smoothing.between(mine, theirs, ())
    followed = [_made_up_for(mine, theirs, name, smoothing) for name in chosen]
    many = f"the weights of {counted(len(differing), 'norm')} differ ({differing[0]}"
    many += ", …)" if differing[1:] else ")"
    if all(answer is None for answer in followed):
        return Relation("changed", differing, f"{many}, and the layers that read them can't be multiplied out here")
    if 2 * sum(answer is True for answer in followed) > sum(answer is not None for answer in followed):
        return Relation("smoothed", differing, f"{many}, and the columns of the layers that read them make up for it")
    return Relation("changed", differing, f"{many}, and no layer that reads them makes up for it")


def _spaced(names: Sequence[str], most: int) -> list[str]:
    """Return some of many, evenly spaced."""
    places = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
    return [names[place] for place in places.tolist()]


def _folded(mine: Format, theirs: Format) -> Relation | None:
    """Return that factors were moved from the rows of layers into other layers, where no norm differs; else None."""
    smoothing = Smoothing.between(mine, theirs, ())
    for first, second in (*FOLDED_LAYERS, CROSSED_LAYERS):
        layers = [layer for layer in mine.folder.layers if layer.endswith(f".{first}")]
        chosen = _spaced(layers, MOST_FIRST)
        found = [layer for layer in chosen if smoothing.is_larger(layer) and smoothing.divisors(layer) is not None]
        if found:
            many = f"the rows of {len(found)} of {len(chosen)} {first} have other factors ({found[0]}"
            many += ", …)" if found[1:] else ")"
            where = "rows" if (first, second) == CROSSED_LAYERS else "columns"
            return Relation("smoothed", (), f"{many}, and the {where} of {second} make up for it")
    return None


def _turned_heads(mine: Format, theirs: Format) -> Relation | None:
    """Return that the heads of values were rotated, or mixed in another way that o_proj undoes; else None."""
    layers = [layer for layer in mine.folder.layers if layer.endswith(".v_proj")]
    chosen = _spaced(layers, MOST_NORMS)
    found = [layer for layer in chosen if _is_turned(mine, theirs, layer)]
    if 2 * len(found) <= len(chosen):
        return None
    why = f"in {len(found)} of {len(chosen)} blocks the heads of v_proj point elsewhere, and o_proj turns them back"
    return Relation("rotated heads", (), why)


def _is_turned(mine: Format, theirs: Format, values: str) -> bool:
    """Say whether the heads of v_proj are other matrices, whose product with o_proj is the original's."""
    one, other = (readable_rows(form, values, slice(0, FIRST_ROWS)) for form in (mine, theirs))
    if one is None or other is None or _likeness(one, other) > UNLIKE:
        return False
    output = f"{values.removesuffix('v_proj')}o_proj"
    one, other = (_of_heads(form, values, output) for form in (mine, theirs))
    return one is not None and other is not None and _likeness(one, other) > ALIKE


def _of_heads(form: Format, values: str, output: str) -> Matrix | None:
    """Return what each head carries from some inputs to some outputs; None where that can't be read.

    Its shape is [heads of values, the heads that read one of these, outputs, inputs].
    """
    shape = form.weight_shape(output)
    one = readable_rows(form, values, slice(None))
    other = readable_rows(form, output, slice(None, None, max(1, shape[0] // FIRST_ROWS) if shape else 1))
    if one is None or other is None or not (head := heads_of(form.folder.text_config, len(one))):
        return None
    if other.shape[1] % len(one):
        return None
    inputs = one[:, :: max(1, one.shape[1] // FIRST_ROWS)]
    inward = inputs.reshape(-1, 1, head, inputs.shape[1])
    outward = other.reshape(len(other), len(inward), -1, head).transpose(1, 2, 0, 3)
    found: Matrix = outward @ inward
    return found


def _likeness(one: Matrix, other: Matrix) -> float:
    """Return the correlation of two arrays about 0; 0 where they have other shapes, or no finite one."""
    if one.shape != other.shape:
        return 0.0
    with np.errstate(all="ignore"):
        found = float(np.vdot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))
    return found if np.isfinite(found) else 0.0


def _norms(folder: Folder, reference: Folder) -> list[str]:
    """Return the names of the vectors of norms that both have, in natural order."""
    both = folder.tensors.keys() & reference.tensors.keys()
    names = (name for name in both if _is_norm(folder.tensors[name]) and _is_norm(reference.tensors[name]))
    return sorted(names, key=natural)


def _is_norm(tensor: Tensor) -> bool:
    last = tensor.layer.rpartition(".")[2].lower()
    named = "norm" in last or last.startswith("ln_")
    return named and tensor.part == "weight" and len(tensor.shape) == 1 and tensor.dtype in FLOATS


def _differs(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape:
        return False  # another model: the settings say so
    allowed = max(ROUNDING[mine.dtype], ROUNDING[theirs.dtype]) if mine.dtype != theirs.dtype else 0.0
    x, y = mine.values(), theirs.values()
    return not bool((np.abs(x - y) <= allowed * np.abs(y)).all())


def _turned(folder: Folder, reference: Folder) -> str:
    """Return which embeddings were rotated: their rows have the original's norms and another direction."""
    for name, theirs in reference.tensors.items():
        mine = folder.tensors.get(name)
        if theirs.part != "weight" or theirs.layer.rpartition(".")[2] not in TABLES or mine is None:
            continue
        if mine.shape != theirs.shape or mine.dtype not in FLOATS or theirs.dtype not in FLOATS:
            continue
        rows = np.unique(np.linspace(0, len(theirs.raw()) - 1, EMBEDDING_ROWS).astype(np.intp))
        x, y = (decoded_rows(tensor, rows) for tensor in (mine, theirs))
        lengths = np.linalg.norm(y, axis=1)
        some = lengths > 0
        moved = np.linalg.norm(x - y, axis=1)[some] / lengths[some]
        longer = np.abs(np.linalg.norm(x, axis=1)[some] / lengths[some] - 1)
        if some.any() and np.median(moved) > 0.3 and np.median(longer) < 0.02:
            return f"the rows of {theirs.layer} are as long as the original's and point elsewhere"
    return ""


def is_rotated_head(folder: Folder, reference: Folder, head: str) -> bool:
    """Say whether the rows of a head that was untied are as long as the reference's embeddings times its last norm."""
    table = next((name for name in reference.layers if name.rpartition(".")[2] in TABLES), "")
    last = [name for name in _norms(folder, reference) if not NUMBER.search(name)]
    mine, theirs = format_of(folder), format_of(reference)
    shape = theirs.weight_shape(table) or (1, 1)
    rows = slice(None, None, max(1, shape[0] // EMBEDDING_ROWS))
    own, original = readable_rows(mine, head, rows), readable_rows(theirs, table, rows)
    if own is None or original is None or own.shape != original.shape:
        return False
    change = ratio_of(*(each.tensors[last[0]].values() for each in (reference, folder))) if len(last) == 1 else 1.0
    with np.errstate(all="ignore"):
        longer = np.abs(np.log(np.linalg.norm(own, axis=1) / np.linalg.norm(original * change, axis=1)))
    return bool(np.median(longer) < AGREES)


def _made_up_for(mine: Format, theirs: Format, norm: str, smoothing: Smoothing) -> bool | None:
    """Say whether the columns of a layer in the norm's block compensate its change; None if no layer can be read."""
    own, original = mine.folder.tensors[norm].values(), theirs.folder.tensors[norm].values()
    readable = False
    for layer in _readers(mine, theirs, mine.folder.tensors[norm]):
        columns = _column_ratio(mine, theirs, layer)
        if columns is None:
            continue
        readable = True
        for offset in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
            with np.errstate(all="ignore"):
                ratio = (own + offset) / (original + offset)
            if makes_up(columns, ratio) or smoothing.is_fed(layer, ratio):
                return True
    return False if readable else None


def _readers(mine: Format, theirs: Format, norm: Tensor) -> Iterator[str]:
    """Yield the matrices of the norm's block that have an input for each of its channels; for a last norm the head."""
    block, width = norm.layer.rpartition(".")[0], norm.shape[0]
    within = any(part.isdigit() for part in block.split("."))
    for layer in mine.folder.layers:
        near = layer.startswith(f"{block}.") if within else layer.rpartition(".")[2] in OUTPUT_HEADS
        if near and all((form.weight_shape(layer) or (0, 0))[1] == width for form in (mine, theirs)):
            yield layer


def _column_ratio(mine: Format, theirs: Format, layer: str) -> Vector | None:
    """Return the norms of a layer's columns over the original's, of the same rows."""
    original = theirs.weight_of(layer)
    assert original is not None  # it has a shape
    rows = slice(None, None, max(1, (original.stop - original.start) // BUDGET))
    one, other = (form.stored_rows(layer, rows) for form in (mine, theirs))
    if one is None or other is None or one.shape != other.shape:
        return None
    with np.errstate(all="ignore"):
        ratio: Vector = np.linalg.norm(one, axis=0) / np.linalg.norm(other, axis=0)
    return ratio

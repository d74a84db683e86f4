"""Smoothing and rotation: whether single layers of a checkpoint may differ from the original's by design.

SmoothQuant and AWQ divide a norm's output by a scale for each channel, and multiply the columns of the layers that
read it by the same scale; QuaRot and SpinQuant rotate the whole residual stream, and the values of each head. The
model's output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..common import AnomalyError, counted
from .checks.scales import FOLDED_LAYERS
from .checks.values import ROUNDING
from .folder import NUMBER, Folder, natural
from .formats.format import BUDGET, Format, format_of
from .row_orders import heads_of
from .tensors import FLOATS, Matrix, Tensor, decoded_rows

MOST_NORMS = 8
"""The number of norms that are followed into the matrices which read them, evenly spaced among those that differ."""
AGREES = 0.05
"""The median |ln| by which norm × column may differ from 1: rounding to 4 bits moves a column's norm by about 2 %."""
EMBEDDING_ROWS = 64
"""The number of rows of the embeddings that are compared."""
MOST_FIRST = 64
"""The layers of a kind in which a smoothing of rows is looked for where no norm differs, evenly spaced."""
FIRST_ROWS = 64
"""The rows of these that are looked at first."""
ROWS_OF_FACTORS = 256
"""About how many rows tell the factors that a smoothing has left in the columns of a layer."""
UNLIKE, ALIKE = 0.8, 0.95
"""Below the one correlation matrices are others, above the other they are the same but for rounding to 4 bits."""
MOST_MOVED = np.log(256)
"""The most that a smoothing moves between two layers, in the median; AWQ moves a factor of 10 in a layer of SmolLM2."""
HALVED = 0.5
"""What is left of a change that was made up for, at most; the rest may be rounding."""
MOST_APART = 3.0
"""No channel counts for more than this |ln|, whatever its noise."""
LEAST_MOVED = 0.005
"""The share of channels that a smoothing moves at least."""
TURNS = 4
"""How often the factors of rows and of columns are fitted in turns."""
TABLES = ("embed_tokens", "wte", "tok_embeddings")
OUTPUT_HEADS = ("lm_head", "embed_out")
CROSSED_LAYERS = ("k_proj", "q_proj")
"""The layers of which a smoothing of the KV cache divides the rows of one and multiplies those of the other."""
TURNED_LAYERS = (".v_proj", ".o_proj")
"""The layers between which a rotation of heads stays: nothing but a product stands between them."""
Compare = Literal["layers", "blocks", "logits"]
Vector = NDArray[np.float64]
Rows = Callable[[str, slice], Matrix | None]
"""A module, and which rows of its weight → these rows [rows, in]; None where they can't be read."""


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


def readable_rows(form: Format, layer: str, rows: slice) -> Matrix | None:
    """Return rows of a layer's matrix in the files; None where they can't be read, or their tensors don't fit."""
    try:
        return form.stored_rows(layer, rows) if len(form.weight_shape(layer) or ()) == 2 else None
    except AnomalyError:  # tensors that are lost or don't fit have findings of their own
        return None


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
    change = _ratio(*(each.tensors[last[0]].values() for each in (reference, folder))) if len(last) == 1 else 1.0
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
            if _makes_up(columns, ratio) or smoothing.is_fed(layer, ratio):
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


class _Norm(NamedTuple):
    """A norm of a block. `rest`: its name without the block's; `offset`: what its weight is added to."""

    rest: str
    offset: float


class Smoothing:
    """The factors that a smoothing has moved between the layers of a checkpoint, found beside its original.

    A norm that was divided by s has left the factors s in the columns of its readers: the norms of both tell s exactly.
    AWQ also takes factors out of the rows of a layer into the columns of the next one (`FOLDED_LAYERS`), and others out
    of the rows of k_proj into those of q_proj. Those are the factors of least squared error, ⟨w′, w⟩ / ⟨w, w⟩. Where
    nothing undoes a factor, it is no smoothing and stays.

    `norms`: the tensors of the norms that differ. `own`, `original`: rows of the weight [out, in] of a module in the
    checkpoint and in its original; None for none. `shape`: that of a module in the original. `most`: about how many of
    its rows are read to find the factors of its columns; all for None. `rotated`: a norm's factors went into matrices
    that were turned afterwards, of which only the whole size is left (`octaves`).
    """

    def __init__(
        self,
        folders: tuple[Folder, Folder],
        norms: Sequence[str],
        own: Rows,
        original: Rows,
        shape: Callable[[str], Sequence[int] | None],
        most: int | None = None,
        *,
        rotated: bool = False,
    ) -> None:
        self._rotated = rotated
        self._own, self._original, self._shape, self._most = own, original, shape, most
        self._settings = folders[1].text_config
        self._norms: dict[str, dict[_Norm, Vector]] = {}
        for name in norms:
            block, rest = _in_block(name.removesuffix(".weight"))
            for offset in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
                change = _ratio(*(each.tensors[name].values() + offset for each in folders))
                self._norms.setdefault(block, {})[_Norm(rest, offset)] = change
        self._source = lru_cache(maxsize=None)(self._norm_before)
        self._fed = lru_cache(maxsize=None)(self._fed_by)
        self._folded = lru_cache(maxsize=None)(self._folded_into)
        self._crossed = lru_cache(maxsize=None)(self._made_up_across)

    @classmethod
    def between(cls, mine: Format, theirs: Format, norms: Sequence[str]) -> Smoothing:
        """Return that of a checkpoint whose layers have the names of the original's, from a few rows of each."""
        own, original = partial(readable_rows, mine), partial(readable_rows, theirs)
        return cls((mine.folder, theirs.folder), norms, own, original, theirs.weight_shape, ROWS_OF_FACTORS)

    def is_larger(self, module: str) -> bool:
        """Say whether the first rows of a module are of other sizes than the original's."""
        factors = self._row_factors(module, slice(0, FIRST_ROWS))
        return factors is not None and bool(_moved(factors).any())

    def is_fed(self, module: str, change: Vector) -> bool:
        """Say whether the columns of a module make up for the change of a norm, whatever its rows were divided by."""
        found = self._column_factors(module)
        if found is None or len(found) != len(change):
            return False
        return _spread(found * change) < min(AGREES, HALVED * _spread(found))

    def undone(self, module: str) -> Matrix:
        """Return the weight of a module without the factors in its columns and rows."""
        weight = self._own(module, slice(None))
        assert weight is not None
        columns, divisors = self.columns(module), self.divisors(module)
        weight = weight if columns is None else weight / columns
        return weight if divisors is None or len(divisors) != len(weight) else weight * divisors[:, None]

    def applied(self, module: str, rows: slice) -> Matrix | None:
        """Return rows of the original's weight with the factors that the checkpoint's has; None for none."""
        weight = self._original(module, rows)
        if weight is None:
            return None
        columns, divisors = self.columns(module), self.divisors(module)
        weight = weight if columns is None or len(columns) != weight.shape[1] else weight * columns
        return weight if divisors is None else weight / divisors[rows, None]

    def columns(self, module: str) -> Vector | None:
        """Return the factors in a module's columns, of a norm or of the layer before it; None where there are none."""
        fed = self._fed(module)
        return self._folded(module) if fed is None else fed

    def divisors(self, module: str) -> Vector | None:
        """Return what a module's rows were divided by, which the next layer makes up for; None for nothing."""
        parent, _, end = module.rpartition(".")
        for reader in (f"{parent}.{second}" for first, second in FOLDED_LAYERS if first == end):
            if (taken := self._folded(reader)) is None or (shared := self._by_row(taken, module)) is None:
                continue
            found: Vector = np.median(shared, axis=0)
            return found
        return self._crossed(module)

    def partner(self, module: str) -> str:
        """Return the layer of whose rows a module's factors are, which may as well be the one at fault; or none."""
        parent, _, end = module.rpartition(".")
        if self._fed(module) is None and self._folded(module) is not None:
            pairs: Sequence[tuple[str, str]] = FOLDED_LAYERS
        else:
            pairs = (CROSSED_LAYERS,) if self._crossed(module) is not None else ()
        return next((f"{parent}.{first}" for first, second in pairs if second == end), "")

    def _fed_by(self, module: str) -> Vector | None:
        """Return the factors that a norm of the module's block has left in its columns; None where none has."""
        block, rest = _in_block(module)
        norms = self._norms.get(block, {})
        source = self._source(rest) if norms else None
        return None if source is None or source not in norms else 1 / norms[source]

    def _norm_before(self, rest: str) -> _Norm | None:
        """Return which norm of its block the layers of a kind read, by the columns of a few; None for none of them.

        Of one layer alone it can't be said: a norm may be divided by nearly the same number in all channels.
        """
        blocks = [each for each in self._norms if self._shape(each + rest) is not None]
        apart: dict[_Norm | None, float] = {None: 0.0}
        for block in (blocks[i] for i in np.unique(np.linspace(0, len(blocks) - 1, MOST_NORMS).astype(int)) if blocks):
            if (distance := self._distance(block + rest)) is None:
                continue
            columns = (self._shape(block + rest) or (0, 0))[1]
            changes = {norm: change for norm, change in self._norms[block].items() if len(change) == columns}
            inside = [norm for norm in changes if rest.startswith(norm.rest.rpartition(".")[0] + ".")]
            known = apart.keys() | {*inside}
            apart = {
                norm: apart.get(norm, apart[None]) + distance(changes[norm] if norm in inside else np.ones(columns))
                for norm in known
            }
        best = min(apart, key=lambda norm: apart[norm])
        return best if apart[best] < HALVED * apart[None] else None

    def _distance(self, module: str) -> Callable[[Vector], float] | None:
        """Return what says how far a module is from the original's where it read a norm with a change."""
        if not self._rotated:
            found = self._column_factors(module)
            return None if found is None else lambda change: _spread(found * change)
        own, original = self._some(module)
        if own is None or original is None:
            return None
        return lambda change: abs(float(np.log2(_rms(own) / _rms(original / change))))

    def octaves(self, module: str) -> float | None:
        """Return log₂ of the rms of a rotated weight over the original's with its norm's factors; None for none."""
        own, original = self._some(module)
        if own is None or original is None:
            return None
        columns = self._fed(module)
        with np.errstate(all="ignore"):
            return float(np.log2(_rms(own) / _rms(original if columns is None else original * columns)))

    def _some(self, module: str) -> tuple[Matrix | None, Matrix | None]:
        """Return the same rows of a module in the checkpoint and in its original, with one shape; else None."""
        sample = self._sample(module)
        own, original = self._own(module, sample), self._original(module, sample)
        fit = own is not None and original is not None and own.shape == original.shape
        return (own, original) if fit else (None, None)

    def _folded_into(self, module: str) -> Vector | None:
        """Return the factors in a module's columns that the rows of the layer before it make up for; None for none."""
        parent, _, end = module.rpartition(".")
        for before in (f"{parent}.{first}" for first, second in FOLDED_LAYERS if second == end):
            sample = self._sample(before)
            given = self._row_factors(before, sample)
            found = self._column_factors(module) if given is not None and _moved(given).any() else None
            shared = None if found is None else self._by_row(found, before)
            if given is None or found is None or shared is None:
                continue
            left = _left(np.tile(given, len(shared)), shared[:, sample].ravel())
            if left is not None:
                return found / left
        return None

    def _made_up_across(self, module: str) -> Vector | None:
        """Return what the rows of a k_proj were divided by where those of its q_proj make up for it, or the reverse."""
        parent, _, end = module.rpartition(".")
        if end not in CROSSED_LAYERS:
            return None
        keys, queries = (f"{parent}.{each}" for each in CROSSED_LAYERS)
        some = self._row_factors(keys, self._sample(keys))
        if some is None or not _moved(some).any():
            return None
        of_keys, of_queries = (self._row_factors(each, slice(None)) for each in (keys, queries))
        shared = None if of_queries is None else self._by_row(of_queries, keys)
        if of_keys is None or of_queries is None or shared is None:
            return None
        left = _left(np.tile(of_keys, len(shared)), shared.ravel())
        if left is None:
            return None
        return 1 / of_keys if module == keys else left / of_queries

    def _by_row(self, factors: Vector, module: str) -> Matrix | None:
        """Return factors of channels by the module's rows, [g, rows], of which a head is read by g heads.

        None where they don't fit.
        """
        rows = (self._shape(module) or (0,))[0]
        several, head = len(factors) // max(rows, 1), heads_of(self._settings, rows)
        if len(factors) == rows:
            return factors[None]
        if len(factors) != several * rows or not head:
            return None
        return factors.reshape(-1, several, head).swapaxes(0, 1).reshape(several, rows)

    def _sample(self, module: str) -> slice:
        """Return which rows of a module are read to find the factors of its columns."""
        shape = self._shape(module)
        return slice(None, None, max(1, shape[0] // self._most) if shape and self._most else 1)

    def _row_factors(self, module: str, rows: slice) -> Vector | None:
        """Return by which each row is larger than the original's, apart from what a norm left in the columns."""
        own, original = self._own(module, rows), self._original(module, rows)
        if own is None or original is None or own.shape != original.shape:
            return None
        columns = self._fed(module)
        return _least_squares(own.T, (original if columns is None else original * columns).T)

    def _column_factors(self, module: str) -> Vector | None:
        own, original = self._some(module)
        return None if own is None or original is None else _column_factors(own, original)


def _in_block(name: str) -> tuple[str, str]:
    """Return the block that a layer lies in and the rest of its name: `model.layers.3` and `.mlp.up_proj`."""
    found = NUMBER.search(name)
    return (name[: found.end()], name[found.end() :]) if found else ("", name)


def _ratio(x: Vector, y: Vector) -> Vector:
    """Return x / y; 1 where one of both is 0."""
    found: Vector = np.divide(x, y, out=np.ones(len(x)), where=(x != 0) & (y != 0))
    return found


def _rms(weight: Matrix) -> float:
    return float(np.sqrt(np.mean(np.square(weight))))


def _spread(factors: Vector) -> float:
    """Return the mean distance of ln |factors| from their median: 0 where they are one number, ∞ where most are 0."""
    with np.errstate(all="ignore"):
        logarithms = np.log(np.abs(factors))
    sound = logarithms[np.isfinite(logarithms)]
    if 2 * sound.size <= len(factors):
        return np.inf
    return float(np.abs(sound - np.median(sound)).clip(max=MOST_APART).mean())


def _column_factors(own: Matrix, original: Matrix) -> Vector:
    """Return the factor of each column that makes the original most like a weight, whatever factors its rows have.

    Those of rows and of columns are fitted in turns; the median of the rows' is 1.
    """
    rows, columns = np.ones((len(own), 1)), np.ones(own.shape[1])
    for _ in range(TURNS):
        rows = _least_squares((own / columns).T, original.T)[:, None]
        rows /= np.median(rows)
        columns = _least_squares(own / rows, original)
    return columns


def _least_squares(own: Matrix, original: Matrix) -> Vector:
    """Return ⟨w′, w⟩ / ⟨w, w⟩ of each column; 1 where it holds zeros, or nothing of the original."""
    power, product = (original * original).sum(0), (own * original).sum(0)
    factors: Vector = np.divide(product, power, out=np.ones(len(power)), where=(power > 0) & (product > 0))
    return factors


def _makes_up(factors: Vector, change: Vector) -> bool:
    """Say whether factors undo a change, but for rounding, in the channels that it moves."""
    with np.errstate(all="ignore"):
        moved, left = np.abs(np.log(np.abs(change))), np.abs(np.log(np.abs(factors * change)))
    sound = np.isfinite(moved) & np.isfinite(left)
    sound &= _moved(change) | (not (sound & _moved(change)).any())
    return bool(sound.any()) and bool(np.median(left[sound]) < min(AGREES, HALVED * np.median(moved[sound])))


def _left(factors: Vector, change: Vector) -> float | None:
    """Return the factor that is left where others undo a change: 1 but for a fault; None where they don't undo it."""
    with np.errstate(divide="ignore"):
        if np.median(np.abs(np.log(np.abs(change)))) > MOST_MOVED:
            return None
    if _makes_up(factors, change):
        return 1.0
    if _spread(factors * change) < min(AGREES, HALVED * _spread(change)):
        return float(np.median(factors * change))
    return None


def _moved(factors: Vector) -> NDArray[np.bool_]:
    """Say which factors are more than rounding leaves: none where these are a few of very many."""
    with np.errstate(all="ignore"):
        found: NDArray[np.bool_] = np.abs(np.log(np.abs(factors))) > AGREES
    return found if found.mean() >= LEAST_MOVED else np.zeros_like(found)

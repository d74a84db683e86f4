"""Sizes of dequantized weights against the reference's: what siblings can't judge, or judge wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ..folder import NUMBER, Finding, Folder
from ..formats.format import AGAIN, Format, format_of
from ..relation import Relation
from ..smoothing_factors import ROWS_OF_FACTORS, Smoothing, readable_rows
from ..tensors import Matrix

ROWS_SAMPLED = 64
"""About how many rows of a layer are compared, evenly spaced."""
ROWS_READ_AT_ONCE = 1024
ROWS_ROTATED = 1024
"""The same of a rotated layer, whose rows are mixed."""
GROUP_ROOM = 0.5
"""By how many octaves the rms of the weights of one scale may differ; rounding to 4 bits moves it by 0.1."""
LAYER_ROOM = {2: 0.5, 3: 0.5}
"""The same of the median row of a layer, by bits; 0.2 for all others."""


class Original:
    """The reference's weights beside a checkpoint's, for layers that both have under one name and in one shape.

    Of a smoothed checkpoint they have the factors that the smoothing has moved; of a rotated one only the size of a
    whole matrix can be compared.
    """

    def __init__(self, form: Format, reference: Folder, relation: Relation) -> None:
        self.form, self.theirs, self._relation = form, format_of(reference), relation
        names = () if form.folder.gguf_file else list(reference.layers)
        self._names = {own: name for name, own in form.layers_of(names).items()}
        self._smoothing: Smoothing | None = None
        self._rotated = relation.kind == "rotated"
        if self._rotated or relation.kind == "smoothed":
            folders, most = (form.folder, reference), ROWS_ROTATED if self._rotated else ROWS_OF_FACTORS
            self._smoothing = Smoothing(
                folders, relation.norms, self._own, self._plain, form.weight_shape, most, rotated=self._rotated
            )

    def judge(self, found: Iterable[Finding]) -> Iterator[Finding]:
        """Yield what siblings found without what the original has as well, then layers whose sizes are others.

        Scales of inputs and of a KV cache have nothing in the reference, and stay as they were found.
        """
        named: set[str] = set()
        for finding in found:
            tensors = (self.form.weight_scale_of(finding.layer), self.form.codes_of(finding.layer))
            of_weight = any(tensor is not None and tensor.name == finding.tensor for tensor in tensors)
            if not (of_weight and self.has_sizes_of(finding.layer)):
                named.add(finding.layer)
                # beside siblings that a smoothing or a rotation has changed, the size of one says little
                resized = self._resized(finding.layer) if of_weight and self._smoothing is not None else ()
                yield from list(resized) or [finding]
        for layer in self.form.fitting:
            # a router in floats reads a norm that was smoothed as the experts do
            smoothed = self._relation.kind == "smoothed" and NUMBER.search(layer) is not None
            coded = smoothed or self.form.codes_of(layer) is not None
            if layer not in named and coded and not self._relation.turned(layer):
                yield from self._resized(layer)

    def has_sizes_of(self, layer: str) -> bool:
        """Say whether the weights of each scale of a layer have the original's rms, within half an octave.

        Of a rotated checkpoint all of them together.
        """
        if self._rotated and self._smoothing is not None:
            whole = self._smoothing.octaves(layer)
            return whole is not None and abs(whole) <= GROUP_ROOM
        shape, scale = self.form.weight_shape(layer), self.form.weight_scale_of(layer)
        if shape is None or scale is None:
            return False
        scales = self.form.scale_values(layer, scale.part)
        grouped = scales.ndim == 2 and len(scales) == shape[0] and shape[1] % scales.shape[1] == 0
        groups = scales.shape[1] if grouped else 1
        for start in range(0, shape[0], ROWS_READ_AT_ONCE):
            octaves = self._octaves(layer, slice(start, start + ROWS_READ_AT_ONCE), groups)
            if octaves is None or not (np.abs(octaves) <= GROUP_ROOM).all():
                return False
        return True

    def _resized(self, layer: str) -> Iterator[Finding]:
        tensor = self.form.weight_scale_of(layer) or self.form.weight_of(layer)
        sizes, scheme = self._size(layer), self.form.scheme_of(layer)
        if sizes is None or tensor is None:
            return
        middle, of = sizes
        room = LAYER_ROOM.get(scheme.bits if scheme else 0, 0.2)
        if np.isfinite(middle) and abs(middle) > room and self._is_resized(layer, room):  # NaN is found as such
            noun = "dequantized weight" if self.form.codes_of(layer) is not None else "weight"
            what = f"the {noun} is {2**middle:.3g} × the size of the reference's ({of})"
            if self._smoothing is not None and (other := self._smoothing.partner(layer)):
                what += f": it or {other}, from whose rows a smoothing has taken factors into it"
            yield Finding.at(tensor, what, AGAIN)

    def _size(self, layer: str) -> tuple[float, str] | None:
        """Return by how many octaves a layer is larger than the original's, and of what that is the number."""
        if self._rotated and self._smoothing is not None:
            whole = self._smoothing.octaves(layer)
            return None if whole is None else (whole, "rms of the rotated matrix")
        shape = self.form.weight_shape(layer)
        octaves = self._octaves(layer, slice(None, None, max(1, shape[0] // ROWS_SAMPLED) if shape else 1), 1)
        return None if octaves is None else (float(np.median(octaves)), f"median of {len(octaves)} rows")

    def _is_resized(self, layer: str, room: float) -> bool:
        """Say whether all rows, in the order of their size, are others: rows that only moved have the same sizes."""
        if self._rotated:
            return True
        mine, theirs = self._own(layer, slice(None)), self._theirs(layer, slice(None))
        if mine is None or theirs is None or mine.shape != theirs.shape:
            return True
        one, other = (np.sort(np.square(each).mean(axis=1)) for each in (mine, theirs))
        with np.errstate(all="ignore"):
            return not abs(float(np.nanmedian(0.5 * np.log2(one / other)))) <= room

    def _octaves(self, layer: str, rows: slice, groups: int) -> NDArray[np.float64] | None:
        """Return log₂ of the rms of groups in some rows over the original's, flat; None where one can't be read.

        Where both are zero it is 0.
        """
        mine, theirs = self._own(layer, rows), self._theirs(layer, rows)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            return None
        one, other = (np.square(each.reshape(len(each) * groups, -1)).mean(axis=1) for each in (mine, theirs))
        with np.errstate(divide="ignore", invalid="ignore"):
            octaves: NDArray[np.float64] = np.where(one == other, 0.0, 0.5 * np.log2(one / other))
        return octaves

    def _own(self, layer: str, rows: slice) -> Matrix | None:
        return readable_rows(self.form, layer, rows)

    def _plain(self, layer: str, rows: slice) -> Matrix | None:
        return readable_rows(self.theirs, self._names.get(layer, ""), rows)

    def _theirs(self, layer: str, rows: slice) -> Matrix | None:
        return self._plain(layer, rows) if self._smoothing is None else self._smoothing.applied(layer, rows)

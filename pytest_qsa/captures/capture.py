"""Capture: the numbers of every site that a pass has seen, and the file that keeps them. numpy only.

The file is safetensors: one tensor for each array, and under the metadata key `qsa` one JSON text that says which site
reads which arrays. docs/capture-format.md specifies it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..common import (
    BLANK,
    NO_CHECKSUM,
    InfraError,
    check_checksum,
    counted,
    html_table,
    parsed_json,
    parts_with_checksum,
    refuse_special,
    remark,
    shown_path,
    write_atomically,
)
from .arrays import Array, safetensors_arrays, safetensors_header, safetensors_parts
from .kinds import known_kinds, with_kinds
from .patterns import match_layers
from .pictures import Picture, picture_arrays, picture_headers, read_pictures
from .provenance import UNKNOWN_RUN, Provenance
from .requests import LayerNames, Request
from .sinks import Sinks, find_sinks
from .sites import CACHE_SITES, GENERATION, LOGITS, Site, SiteNumbers
from .statistics import Statistic

if TYPE_CHECKING:
    from ..metrics import Selection

FORMAT = "qsa-capture/1"
MOST_BYTES = 8 << 30
"""The largest file of a capture that is read: it counts every bit pattern at 30,000 layers."""
REFERENCE = "reference/"
"""The prefix of the names of the reference's arrays."""


# eq=False: the generated `==` would compare arrays, which have no single truth value. repr=False: it would print them.
@dataclass(frozen=True, eq=False, repr=False)
class Capture:
    """The result of one pass over one subject; every metric is computed from it alone.

    `sites`: (layer, site) → numbers, in model order; sites that read the same tensor share one `SiteNumbers`.
    `modules`: the names of all layers of the model. `blocks`: the repeated layers of its trunk.
    `experts`: the layers that hold all their experts in a tensor each; after them `modules` has those of each expert.
    `tokens`: the token ids of each sample, empty where the data has none. `pieces`: token id → its text.
    `provenance`: where the numbers come from: model, hashes of weights and tokens, dtype, device, versions.
    `plan`: what was asked for when it was made.
    `schemes`: quantized layer → its scheme (`w8a8_int`), in model order; None where nothing says how it is quantized.
    `reference`: the numbers that the same pass left of the reference, which saw the same tokens.
    `refused`: layer → why its weight isn't read as numbers; it has none at `weight`.
    `unfit`: a site, `output of NAME` → why it can have no number, as where its calls have several widths.
    `uncompared`: quantized layer → why its loaded weight can't be held against the files.
    `pictures`: sample → what the model saw of its picture, and which tokens stand for its patches.
    `uncached`: layer → why it has no numbers at a site of the KV cache where it was asked for them.
    """

    sites: Mapping[tuple[str, Site], SiteNumbers]
    modules: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    tokens: tuple[NDArray[np.int32], ...] = ()
    pieces: Mapping[int, str] = field(default_factory=dict)
    provenance: Provenance = UNKNOWN_RUN
    plan: tuple[Request, ...] = ()
    schemes: Mapping[str, str] | None = None
    reference: Capture | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    uncompared: Mapping[str, str] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    uncached: Mapping[str, str] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[int, Picture] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Capture{f' {self._model}' if self._model else ''}: {self._measured}; {self._data}>"

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows: the sites, how many layers each has, and what was measured there."""
        rows = [["site", "layers", "statistics"]]
        for site, (layers, statistics) in self._by_site().items():
            rows.append([site, str(layers), ", ".join(sorted(map(str, statistics)))])
        return html_table(rows, f"Capture {self._model}: {self._data}".replace(" :", ":"))

    @property
    def _model(self) -> str:
        return Path(self.provenance.model.place).name or self.provenance.model.class_name or ""

    @property
    def _data(self) -> str:
        lengths = sorted({len(ids) for ids in self.tokens})
        if not lengths:
            return "no tokens kept"
        length = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} … {lengths[-1]}"
        return f"{counted(len(self.tokens), 'sample')} × {length} tokens"

    @property
    def _measured(self) -> str:
        sites = self._by_site()
        texts = [site if site == LOGITS else f"{site} of {counted(sites[site][0], 'layer')}" for site in sites]
        return ", ".join(texts) or "nothing measured"

    def _by_site(self) -> dict[Site, tuple[int, frozenset[Statistic]]]:
        """Return site → how many layers were measured there, and all statistics that some of them have."""
        found: dict[Site, tuple[int, frozenset[Statistic]]] = {}
        for (_, site), numbers in self.sites.items():
            count, statistics = found.get(site, (0, frozenset()))
            found[site] = count + 1, statistics | numbers.statistics
        return found

    @property
    def meta(self) -> Mapping[str, Any]:
        """The provenance as the capture's file holds it."""
        return self.provenance.plain()

    @cached_property
    def sinks(self) -> Sinks:
        """The attention sinks of every sample, found at the outputs of the blocks (metrics.md, positions and sinks)."""
        return find_sinks(
            {layer: self.sites[layer, "output"] for layer in self.blocks if (layer, "output") in self.sites}
        )

    @cached_property
    def weights_looked_at(self) -> frozenset[str]:
        """The layers at which weights were asked for; those without a weight have no numbers."""
        asked = (match_layers(self.names.at("weight"), r.pattern, r.exclude) for r in self.plan if r.site == "weight")
        return frozenset(layer for layers in asked for layer in layers)

    @cached_property
    def names(self) -> LayerNames:
        """The names of all layers, which say what a pattern can find at a site."""
        holders = frozenset(self.experts)
        # Other children of such a module, an activation function say, are layers that are called.
        parts = ((name, name.rsplit(".", 2)) for name in (self.modules if holders else ()))
        experts = frozenset(n for n, part in parts if part[0] in holders and part[1].isdigit())
        caching = frozenset({*self.uncached, *(layer for layer, site in self.sites if site in CACHE_SITES)})
        return LayerNames(self.modules, experts, caching)

    def redacted(self) -> Capture:
        """Return the same numbers without the data: neither texts, nor the ids that stand for them, nor pictures."""
        sites = dict(self.sites)
        if (answers := sites.get((GENERATION, LOGITS))) is not None:
            sites[GENERATION, LOGITS] = replace(answers, arrays={"generation": answers.arrays["generation"]})
        return replace(self, sites=sites, tokens=(), pieces={}, pictures={})

    def input(self, layers: str, *, exclude: str | None = None) -> Selection:
        """Select the inputs of the layers that the regex finds."""
        return self.select(layers, "input", exclude)

    def output(self, layers: str, *, exclude: str | None = None) -> Selection:
        """Select the outputs of the layers that the regex finds."""
        return self.select(layers, "output", exclude)

    def weight(self, layers: str, *, exclude: str | None = None) -> Selection:
        """Select the weights of the layers that the regex finds."""
        return self.select(layers, "weight", exclude)

    def logits(self) -> Selection:
        """Select what the whole model predicts, for the metrics of its logits."""
        return self.select("", LOGITS)

    def select(self, layers: str, site: Site, exclude: str | None = None) -> Selection:
        """Select a site of the layers that the regex finds; the result offers every metric."""
        from ..metrics import Selection  # metrics/ imports captures/: only a call may import it here

        return Selection(self, layers, site, exclude)

    def covers(self, requests: Iterable[Request]) -> bool:
        """Say whether it answers every request: as planned, or because other requests measured each of its layers."""
        return all(self._covers(request) for request in requests)

    def _covers(self, request: Request) -> bool:
        planned = [done for done in self.plan if replace(done, statistics=request.statistics) == request]
        if any(request.statistics <= done.statistics for done in planned):
            return True
        layers = match_layers(self.names.at(request.site), request.pattern, request.exclude)
        numbers = [self.sites.get((layer, request.site)) for layer in layers]
        # `all` of no layers would be true, and nothing was measured for them.
        return bool(layers) and all(n is not None and request.statistics <= n.statistics for n in numbers)

    def to_bytes(self) -> bytes:
        """Return the content of the capture's file; equal captures make equal bytes."""
        return b"".join(self.to_parts())

    def to_parts(self) -> list[bytes | memoryview]:
        """Return the content of the capture's file in parts: the header, then the arrays themselves, not copied."""
        arrays, header = self._split()
        # Sorted keys: equal captures make equal bytes.
        text = json.dumps({"checksum": BLANK, "format": FORMAT, **header}, sort_keys=True)
        return parts_with_checksum(safetensors_parts(arrays, {"qsa": text}))

    def _split(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Split into named arrays and a header; `_joined` is the way back."""
        # Sites that read one tensor share their numbers, which are written once.
        distinct = {id(numbers): numbers for numbers in self.sites.values()}
        streams = {identity: index for index, identity in enumerate(distinct)}
        arrays: dict[str, Array] = {}
        headers: list[dict[str, Any]] = []
        for index, numbers in enumerate(distinct.values()):
            own, header = numbers.to_arrays()
            headers.append(header)
            arrays |= {f"{index}/{name}": np.ascontiguousarray(array) for name, array in own.items()}
        if self.tokens:
            arrays["tokens"] = np.concatenate(self.tokens)
            arrays["token_lengths"] = np.array([len(ids) for ids in self.tokens], dtype=np.int64)
        arrays |= picture_arrays(self.pictures)
        reference = None
        if self.reference is not None:
            theirs, reference = self.reference._split()
            arrays |= {f"{REFERENCE}{name}": array for name, array in theirs.items()}
        # Left out where they are empty, so that a capture that lacks nothing has the bytes that it always had.
        unread = {
            "refused": dict(self.refused),
            "uncompared": dict(self.uncompared),
            "uncached": dict(self.uncached),
            "unfit": dict(self.unfit),
        }
        return arrays, {
            **{key: layers for key, layers in unread.items() if layers},
            **picture_headers(self.pictures),
            "meta": self.provenance.plain(),
            "modules": list(self.modules),
            **({"experts": list(self.experts)} if self.experts else {}),
            **({"kinds": kinds} if (kinds := known_kinds(self.modules)) else {}),
            "blocks": list(self.blocks),
            "pieces": {str(token): piece for token, piece in self.pieces.items()},
            "plan": [[r.pattern, r.site, r.exclude, sorted(map(str, r.statistics))] for r in self.plan],
            "schemes": dict(self.schemes) if self.schemes is not None else None,
            "sites": [[layer, site, streams[id(numbers)]] for (layer, site), numbers in self.sites.items()],
            "streams": headers,
            "reference": reference,
        }

    @classmethod
    def from_bytes(cls, content: bytes, shown: str | None = None) -> Capture:
        """Read what `to_bytes` made.

        `shown`: the name of a file that may be of an earlier version. Without a checksum it is read, with a warning.

        Raises:
            InfraError: it is damaged or was changed, has no checksum, or is not a capture of this format.
        """
        try:
            entries = safetensors_header(content)
            header = parsed_json(entries.get("__metadata__", {}).get("qsa", "{}"))
            form = header.get("format") if isinstance(header, dict) else None
            if form != FORMAT:
                raise InfraError(f"not a capture of the format {FORMAT} (it says {form!r})")
            if "checksum" in header:
                check_checksum(content, header["checksum"])
            elif shown is None:
                raise InfraError(f"it {NO_CHECKSUM}")
            else:
                remark(f"{shown} {NO_CHECKSUM}: make it anew")
            return cls._joined(safetensors_arrays(content, entries), header)
        # A damaged header can fail at any step of the reading.
        except (ValueError, AttributeError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise InfraError(f"not a whole capture: {error}") from None

    @classmethod
    def _joined(cls, arrays: Mapping[str, Array], header: Mapping[str, Any]) -> Capture:
        theirs = {name.removeprefix(REFERENCE): array for name, array in arrays.items() if name.startswith(REFERENCE)}
        arrays = {name: array for name, array in arrays.items() if not name.startswith(REFERENCE)}
        streams = _streams(arrays, header["streams"])
        lengths = arrays.get("token_lengths", np.zeros(0, dtype=np.int64))
        tokens = np.split(arrays["tokens"], np.cumsum(lengths)[:-1]) if len(lengths) else []
        return cls(
            sites={(layer, site): streams[index] for layer, site, index in header["sites"]},
            modules=with_kinds(header["modules"], _kinds(header)),
            blocks=tuple(header["blocks"]),
            experts=tuple(header.get("experts", ())),
            tokens=tuple(tokens),
            pieces={int(token): piece for token, piece in header["pieces"].items()},
            provenance=Provenance.of(header["meta"]),
            schemes=header.get("schemes"),
            plan=tuple(
                Request(pattern, site, exclude, frozenset(map(Statistic.parse, statistics)))
                for pattern, site, exclude, statistics in header["plan"]
            ),
            reference=cls._joined(theirs, header["reference"]) if header.get("reference") else None,
            refused=header.get("refused", {}),
            uncompared=header.get("uncompared", {}),
            uncached=header.get("uncached", {}),
            unfit=header.get("unfit", {}),
            pictures=read_pictures(arrays, header),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the capture to a file, all of it or nothing."""
        write_atomically(Path(path), self.to_parts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Capture:
        """Read a capture; the numbers are those that were saved, to the last bit.

        Raises:
            InfraError: the file is missing, damaged, too large, or not a capture of this format.
        """
        file, shown = Path(path), shown_path(Path(path))
        try:
            refuse_special(file, MOST_BYTES)
            with file.open("rb") as start:  # before all of it: a header of another length is none of a capture
                if not 0 < int.from_bytes(start.read(8), "little") < file.stat().st_size:
                    raise InfraError("not a whole capture: it has no header")
            return cls.from_bytes(file.read_bytes(), shown)
        except (OSError, InfraError) as error:
            what = str(error).removeprefix(f"{shown}: ")
            if isinstance(error, OSError):
                what = str(error.strerror or error)
            raise InfraError(f"{os.fspath(path)}: can't be read as a capture: {what}") from None
        except MemoryError:
            raise InfraError(f"{os.fspath(path)}: can't be read as a capture: it doesn't fit into memory") from None


def _kinds(header: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return kind → the positions of its layers; a file of an earlier version knows the blocks alone."""
    places = {name: index for index, name in enumerate(header["modules"])}
    blocks = [places[block] for block in header["blocks"] if block in places]
    return dict(header.get("kinds") or ({"blocks": blocks} if blocks else {}))


def _streams(arrays: Mapping[str, Array], headers: list[dict[str, Any]]) -> list[SiteNumbers]:
    own: list[dict[str, Array]] = [{} for _ in headers]
    for name, array in arrays.items():
        index, slash, rest = name.partition("/")
        if slash:
            own[int(index)][rest] = array
    return [SiteNumbers.from_arrays(arrays, header) for arrays, header in zip(own, headers, strict=True)]

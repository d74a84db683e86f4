"""Which layers are quantized, and whether the configuration says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..findings import Finding
from ..folder import Folder, kind_of
from ..formats.declared import Scheme, codes_of, declared, is_linear
from ..tensors import Tensor

_DECLARE = "quantize it, or name it in ignore"


def misplaced_formats(folder: Folder) -> Iterator[Finding]:
    """Yield layers left unquantized or quantized against the configuration, and those stored in another format.

    Where the configuration names no layers (torchao, bitsandbytes), a layer is held against its siblings.
    """
    declaration = declared(folder)
    tied = folder.text_config.get("tie_word_embeddings", False)
    for layer, parts in folder.layers.items():
        if not is_linear(layer, parts) or (tied and layer.rpartition(".")[2] == "lm_head"):
            continue
        if declaration.names_layers:
            yield from _against_config(layer, parts, declaration.of(layer), declaration.method)
    if not declaration.names_layers:
        yield from _against_siblings(folder)


def _against_config(layer: str, parts: Mapping[str, Tensor], scheme: Scheme | None, method: str) -> Iterator[Finding]:
    codes = codes_of(parts)
    if codes is None:
        weight = parts["weight"]
        if scheme is not None and scheme.form != "dense":
            yield Finding(
                layer, weight.name, weight.file,
                f"left in {weight.dtype}, though the configuration quantizes it ({method}, {scheme.form})", _DECLARE,
            )  # fmt: skip
    elif scheme is None:
        yield Finding(
            layer, codes.name, codes.file, "quantized, though the configuration leaves it out",
            "restore it from the original, or take it out of ignore",
        )  # fmt: skip
    elif scheme.codes and codes.dtype not in scheme.codes:
        yield Finding(
            layer, codes.name, codes.file,
            f"stored as {codes.dtype}, but {scheme.form} with {scheme.bits} bits is stored as {scheme.codes[0]}",
            "correct the format of its config group, or quantize the layer again",
        )  # fmt: skip


def _against_siblings(folder: Folder) -> Iterator[Finding]:
    kinds: dict[str, dict[str, str]] = {}
    for layer, parts in folder.layers.items():
        stored = codes_of(parts) or parts.get("weight")
        if stored is not None and len(stored.shape) >= 2:
            kinds.setdefault(kind_of(layer), {})[layer] = stored.dtype
    for kind, members in kinds.items():
        (common, many), *_ = Counter(members.values()).most_common(1)
        for layer, dtype in members.items():
            if dtype != common and many > len(members) / 2:
                tensor = codes_of(folder.layers[layer]) or folder.layers[layer]["weight"]
                yield Finding(
                    layer, tensor.name, tensor.file, f"stored as {dtype}, {many} of its siblings {kind} as {common}",
                    "quantize all of them alike, or name it in the configuration",
                )  # fmt: skip

"""Placement: whether the layers that are quantized are those that the configuration declares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..folder import Finding, kind_of
from ..formats.format import Format


def misplaced_formats(form: Format) -> Iterator[Finding]:
    """Yield layers left unquantized or quantized against the configuration, and those stored in another format.

    Where the configuration names no layers (torchao, bitsandbytes), a layer is held against its siblings.
    """
    if not form.declaration.names_layers:
        yield from _against_siblings(form)
        return
    # a head that is tied to the embeddings is stored in floats, and the configuration may still target it
    tied = form.folder.text_config.get("tie_word_embeddings", False)
    for layer in form.folder.layers:
        if form.is_linear(layer) and not (tied and layer.rpartition(".")[2] == "lm_head"):
            yield from _against_config(form, layer)


def _against_config(form: Format, layer: str) -> Iterator[Finding]:
    codes, scheme = form.codes_of(layer), form.scheme_of(layer)
    if codes is None:
        weight = form.parts(layer)["weight"]
        if scheme is not None and scheme.form != "dense":
            declared = f"though the configuration quantizes it ({form.label}, {scheme.form})"
            advice = "quantize it, or name it in ignore"
            yield Finding.at(weight, f"left in {weight.dtype}, {declared}", advice)
    elif scheme is None:
        advice = "restore it from the original, or take it out of ignore"
        yield Finding.at(codes, "quantized, though the configuration leaves it out", advice)
    elif scheme.dtypes and codes.dtype not in scheme.dtypes:
        what = f"stored as {codes.dtype}, but {scheme.form} with {scheme.bits} bits is stored as {scheme.dtypes[0]}"
        advice = "correct the format of its config group, or quantize the layer again"
        yield Finding.at(codes, what, advice)


def _against_siblings(form: Format) -> Iterator[Finding]:
    kinds: dict[str, dict[str, str]] = {}
    for layer in form.folder.layers:
        weight = form.weight_of(layer)
        if weight is not None and len(weight.shape) >= 2:
            kinds.setdefault(kind_of(layer), {})[layer] = weight.dtype
    for kind, members in kinds.items():
        (common, many), *_ = Counter(members.values()).most_common(1)
        for layer, dtype in members.items():
            weight = form.weight_of(layer)
            if weight is not None and dtype != common and many > len(members) / 2:
                what = f"stored as {dtype}, {many} of its siblings {kind} as {common}"
                advice = "quantize all of them alike, or name it in the configuration"
                yield Finding.at(weight, what, advice)

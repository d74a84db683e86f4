"""Whether the loader took all that a checkpoint holds for what it is: its tensors, and the codes among them."""

from __future__ import annotations

from typing import Any

from ...captures import found_by
from ...checkpoint import SIGNS, Format, format_of, layer_of, open_folder
from ...common import AnomalyError, InfraError, QsaError, UnloadableFormatError, counted
from ...suite import Model


def declares_quantization(path: str, config: Any) -> bool:
    """Say whether a configuration declares a quantization.

    Raises:
        InfraError: one that transformers doesn't know: it would only warn, and take the codes for weights.
    """
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    parts = (config, config.get_text_config(decoder=True))
    stated = next((each for part in parts if (each := getattr(part, "quantization_config", None))), None)
    # a configuration object is one of the library's own; without a quant_method it refuses what it reads by itself
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    bits = isinstance(stated, dict) and (stated.get("load_in_8bit") or stated.get("load_in_4bit"))
    if method is not None and method not in KNOWN and not bits:
        raise InfraError(
            f"{path}: quantization_config declares quant_method '{method}', which transformers "
            f"{transformers.__version__} doesn't know: it would take the codes for weights; check the files instead"
        )
    return bool(stated)


def check_declaration(spec: Model, path: str, *, declares: bool) -> None:
    """Refuse codes that were loaded as if they were weights, because what is declared is something else.

    Raises:
        AnomalyError: nothing declares them, or they have another dtype than is declared.
        InfraError: they are declared where transformers doesn't look.
    """
    if spec.gguf_file:
        return
    try:
        form = format_of(open_folder(path, spec.revision))
        layers = form.folder.layers
    except InfraError:  # no safetensors, or no files that are found here
        return
    if form.name == "none":
        finding = next((each for layer in layers for each in form.findings(layer)), None)
        if finding is not None:
            raise AnomalyError(f"{path}: {finding}")
    for layer in layers:
        codes, scheme = form.codes_of(layer), form.scheme_of(layer)
        if codes is not None and not declares:
            raise InfraError(
                f"{path} is {form.label}, and config.json doesn't say so: transformers takes {codes.name} for floats"
            )
        if codes is not None and scheme is not None and scheme.dtypes and codes.dtype not in scheme.dtypes:
            raise AnomalyError(f"{path}: {form.refusal(layer)}")


def check_complete(spec: Model, path: str, name: str, info: dict[str, Any]) -> None:
    """Refuse a model with random numbers in the place of a weight, or one that left weights of its file out.

    `name`: the model's class. `info`: what `from_pretrained` says of the keys.
    """
    mismatched, missing = sorted(info.get("mismatched_keys") or ()), sorted(info.get("missing_keys") or ())
    allowed = spec.allow_unexpected
    unexpected = sorted(info.get("unexpected_keys") or ())
    named = set(found_by(allowed, unexpected)) if allowed else ()
    unexpected = [key for key in unexpected if key not in named]
    if not (mismatched or missing or unexpected):
        return
    form = format_of(open_folder(path, spec.revision, spec.gguf_file))
    known = bool(form.name or not form.folder.quantization)
    # A declared format that nothing here knows is left unread by transformers as well: the files may be sound.
    kind: type[QsaError] = InfraError if not known else AnomalyError if form.loads else UnloadableFormatError
    for key, stored, wanted in mismatched:
        text = f"{path}: {key} is {list(stored)}, and {name} as it is loaded here wants {list(wanted)}: "
        if _sound(form, layer_of(key)):
            advice = "the installed libraries can't load the format; compare them to the saver's"
            raise UnloadableFormatError(f"{text}{advice}")
        raise kind(f"{text}its configuration is another model's, or the tensor is damaged")
    if missing and all(_sound(form, layer_of(key)) for key in missing):
        raise UnloadableFormatError(
            f"{path} holds {layer_of(missing[0])} as its configuration declares it, and {name} wants {missing[0]}: "
            "the installed libraries can't load the format; compare them to the saver's"
        )
    if missing:
        raise kind(
            f"{path} lacks {len(missing)} weights of {name}, filled with random numbers: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
        )
    many = counted(len(unexpected), "tensor")
    listed = f"{', '.join(unexpected[:3])}{', …' if len(unexpected) > 3 else ''}"
    if any(_belongs_to_quantization(form, key) for key in unexpected):
        kind = UnloadableFormatError if all(_sound(form, layer_of(key)) for key in unexpected) else kind
        advice = "the codes of a weight mean nothing without them: compare the installed libraries to the saver's"
    else:
        advice = "name them in model.allow_unexpected (a regex) if the model does without them"
    raise kind(f"{path} holds {many} that {name} has no place for, and that loading drops: {listed}; {advice}")


def _sound(form: Format, layer: str) -> bool:
    """Say whether the files hold a layer as its declared scheme wants it, so that a wrong shape is the loader's."""
    return form.codes_of(layer) is not None and next(form.findings(layer), None) is None


def _belongs_to_quantization(form: Format, key: str) -> bool:
    tensor = form.folder.tensors.get(key)
    part = tensor.part if tensor else key.rpartition(".")[2]
    return bool(
        SIGNS.search(part)
        or form.scales.search(part)
        or form.zero_points.search(part)
        or part in set(form.codes) - {"weight"}
    )

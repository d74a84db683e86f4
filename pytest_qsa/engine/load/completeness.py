"""Whether the loader took all that a checkpoint holds for what it is: its tensors, and the codes among them."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

from ...captures import found_by
from ...checkpoint import INDEX, SIGNS, Format, format_of, is_uncounted, layer_of, of_several_tokens, open_folder
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
    # a server runs these beside the model; the static checks look at them
    unexpected = [key for key in unexpected if not of_several_tokens(form.folder, key)]
    known = bool(form.name or not form.folder.quantization)
    # A declared format that nothing here knows is left unread by transformers as well: the files may be sound.
    kind: type[QsaError] = InfraError if not known else AnomalyError if form.loads else UnloadableFormatError
    for key, stored, wanted in mismatched:
        held = f"{_file_of(form, path, key)}: {key} is {list(stored)}"
        text = f"{held}, and {name} as it is loaded here wants {list(wanted)}: "
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
            f"{_file_of(form, path, missing[0])} lacks {counted(len(missing), 'weight')} of {name}, which would be "
            f"random numbers: {_listed(missing)}{_why_missing(form, missing)}"
        )
    if not unexpected:
        return
    many = counted(len(unexpected), "tensor")
    if all(_is_tied(form, layer_of(key)) for key in unexpected):
        advice = "config.json ties this head to the embeddings: leave it out, or set tie_word_embeddings to false"
    elif all(is_uncounted(form.folder, key) for key in unexpected):
        stated = form.folder.text_config["num_hidden_layers"]
        advice = f"config.json counts {counted(stated, 'block')} by num_hidden_layers: correct it"
    elif form.name == "none" and any(_belongs_to_quantization(form, key) for key in unexpected):
        advice = "config.json has no quantization_config, so that codes are taken for weights: restore it"
    elif all(_undeclared(form, layer_of(key)) for key in unexpected):
        advice = "the quantization_config of config.json leaves these layers out, and they hold codes"
    elif any(_belongs_to_quantization(form, key) for key in unexpected):
        kind = UnloadableFormatError if all(_sound(form, layer_of(key)) for key in unexpected) else kind
        advice = "the codes of a weight mean nothing without them: compare the installed libraries to the saver's"
    elif not form.folder.gguf_file and not form.folder.config.get("architectures"):
        advice = f"config.json names no class in architectures, so that it is {name}: name the one with a head"
    else:
        advice = "name them in model.allow_unexpected (a regex) if the model does without them"
    where = _file_of(form, path, unexpected[0])
    raise kind(
        f"{where} holds {many} that {name} has no place for, and that loading drops: {_listed(unexpected)}; {advice}"
    )


def conversion_failure(path: str, error: BaseException) -> str | None:
    """Say which weights transformers could not make of a checkpoint's tensors; None for an error of anything else.

    Its own error names none: it speaks of a report that went to a logger, a table with tracebacks.
    """
    import transformers

    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    infos = (frame.f_locals.get("loading_info") for frame in frames)
    failed = sorted(next((found for info in infos if (found := getattr(info, "conversion_errors", None))), ()))
    if not failed:
        return None
    return (
        f"{path} can't be loaded: transformers {transformers.__version__} can't make {counted(len(failed), 'weight')} "
        f"of its tensors: {_listed(failed)}; check the files instead, or compare the libraries to the saver's"
    )


def _listed(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"


def _file_of(form: Format, path: str, key: str) -> str:
    """Return the file that holds a tensor, or should: the only one, or what the index names, or the index."""
    folder = form.folder
    held = folder.tensors.get(key)
    if held is not None or folder.gguf_file:
        return f"{path}/{held.file if held else folder.gguf_file}"
    return f"{path}/{folder.files[0].name if len(folder.files) == 1 else folder.indexed.get(key, INDEX)}"


def _why_missing(form: Format, missing: Sequence[str]) -> str:
    if [layer_of(key) for key in missing] == ["lm_head"] and "tie_word_embeddings" not in form.folder.text_config:
        return "; config.json doesn't state tie_word_embeddings, and without it the head is a tensor of its own"
    return ""


def _is_tied(form: Format, layer: str) -> bool:
    return bool(form.folder.text_config.get("tie_word_embeddings")) and layer.rpartition(".")[2] == "lm_head"


def _sound(form: Format, layer: str) -> bool:
    """Say whether the files hold a layer as its declared scheme wants it, so that a wrong shape is the loader's."""
    held = form.codes_of(layer) is not None and not _is_tied(form, layer) and not _undeclared(form, layer)
    return held and next(form.findings(layer), None) is None


def _undeclared(form: Format, layer: str) -> bool:
    names_all = form.uniform and form.declaration.names_layers
    return names_all and form.codes_of(layer) is not None and form.scheme_of(layer) is None


def _belongs_to_quantization(form: Format, key: str) -> bool:
    tensor = form.folder.tensors.get(key)
    part = tensor.part if tensor else key.rpartition(".")[2]
    return bool(
        SIGNS.search(part)
        or form.scales.search(part)
        or form.zero_points.search(part)
        or part in set(form.codes) - {"weight"}
    )

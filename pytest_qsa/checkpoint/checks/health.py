"""The static metrics: a checkpoint → the number of problems of each layer, with the findings behind them.

A check is a plain function whose keyword arguments are its parameters everywhere, as a metric's are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from itertools import chain
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt

from ...captures import match_layers, no_match
from ...common import AnomalyError, phase, shown_path
from ...metrics import CHECKPOINT, Definition, Parameters, Query, Series
from ..copies import recognizer_of
from ..files import Files
from ..folder import Finding, natural, refusing_odd_settings
from ..formats.format import check_declared
from ..relation import is_rotated_head
from ..side_files import CONFIG, check_side_files, readable_tokenizer
from .cache_scales import lost_cache_scales, lost_once, unit_cache_scales
from .changed_settings import SETTING_LAYERS, changed_settings, unexpected_size
from .keys import lost_keys, misplaced_formats
from .parts import added_parts, lost_parts, promised_parts, unusual_parts
from .repeats import repeated_weights
from .scales import (
    foreign_whole_scales,
    misfits,
    outlying_scales,
    outlying_zero_points,
    unequal_fused,
    unsound_scales,
    unsound_zero_points,
    unwritten_exponents,
)
from .sharding import uneven_shards
from .shards import absent_shards, ambiguous_files
from .values import changed_floats, constant_weights, kept_tensors, unsound_floats

FILES = (".safetensors", ".safetensors.index.json")
"""The ends of the names of files that stand for a layer where the file itself is at fault."""

_Spread = Annotated[float, Gt(0)]
_Tolerance = Annotated[float, Ge(0)]
_Ranks = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Check(Definition):
    """A static metric, whose function yields findings. `layers`: a function that returns the layers it looks at."""

    layers: Callable[[Files], Sequence[str]]


CHECKS: dict[str, Check] = {}


def _check(layers: Callable[[Files], Sequence[str]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Iterable[Finding]]) -> Callable[..., tuple[Finding, ...]]:
        @wraps(function)
        def once(files: Files, **parameters: Any) -> tuple[Finding, ...]:
            return files.once(function, (function.__kwdefaults__ or {}) | parameters)

        CHECKS[function.__name__] = Check(function.__name__, 1, once, layers)
        return once

    return register


def _all_layers(files: Files) -> list[str]:
    return list(files.folder.layers)


def _quantized_layers(files: Files) -> list[str]:
    if not files.quantized and not files.format.declaration.names_layers:
        raise AnomalyError(
            f"{shown_path(files.folder.path)} is not quantized: it has no scales, no packed weights and no "
            "quantization_config; use checkpoint_keys and checkpoint_settings, or leave this out"
        )
    return files.quantized or _all_layers(files)


def _declared_layers(files: Files) -> list[str]:
    if not files.format.uniform:
        raise AnomalyError(f"a {files.format.label} file declares no layers to quantize: leave checkpoint_formats out")
    return _quantized_layers(files)


def _settings(files: Files) -> list[str]:
    if files.reference is None:
        raise AnomalyError("settings are compared with those of model.reference, and the suite names none: add it")
    return list(SETTING_LAYERS)


def _kept_layers(files: Files) -> list[str]:
    if files.reference is None:
        raise AnomalyError("what is unquantized is compared with model.reference, and the suite names none: add it")
    kept = list(dict.fromkeys(layer for layer, _, _ in kept_tensors(files.format, files.reference)))
    if not kept:
        raise AnomalyError("the checkpoint and its reference have no float tensor of the same name: nothing to compare")
    return sorted(kept, key=natural)


def _everything(files: Files) -> list[str]:
    return [*_all_layers(files), *(_settings(files) if files.reference else ())]


@_check(_quantized_layers)
def checkpoint_scales(files: Files, *, spread: _Spread = 8.0, fused_equal: bool = False) -> Iterator[Finding]:
    """Count scales that are missing, unexpected, NaN, infinite, zero, negative, denormal or far from their siblings.

    Also counted: scales that all have one initial value, that have another shape than the declared scheme's, or that
    differ within a fused group; scales of inputs and of a KV cache that are declared and missing; zero points that are
    missing, out of range, not those of a declared symmetric scheme, or that move the mean weight far from that of the
    siblings. With a reference, dequantized weights of another size than the reference's are counted, and a scale that
    is as odd in the reference is not.
    """
    yield from misfits(files.format)
    yield from unsound_scales(files.format)
    yield from unwritten_exponents(files.format)
    yield from files.once(_odd_sizes, {"spread": spread})
    yield from unsound_zero_points(files.format)
    yield from outlying_zero_points(files.format, spread=spread)
    yield from foreign_whole_scales(files.format)
    yield from unequal_fused(files.format, always=fused_equal)
    yield from chain(lost_cache_scales(files.format), unit_cache_scales(files.format))


def _odd_sizes(files: Files, *, spread: float) -> Iterator[Finding]:
    """Yield scales that are far from their siblings', and dequantized sizes other than the reference's."""
    found = outlying_scales(files.format, spread=spread)
    yield from (files.original.judge(found) if files.original else found)


@_check(_all_layers)
def checkpoint_weights(files: Files) -> Iterator[Finding]:
    """Count quantized weights that are constant, whole or in rows or groups, and float tensors with NaN or Inf.

    A row or group of zeros is no problem. With a reference, weights that equal another layer's bit by bit are counted
    too, unless they are equal in the reference.
    """
    yield from constant_weights(files.format)
    yield from unsound_floats(files.format)
    yield from files.once(repeated_weights, {})


@_check(_declared_layers)
def checkpoint_formats(files: Files, *, tensor_parallel: _Ranks = 1) -> Iterator[Finding]:
    """Count layers that are left unquantized or quantized against the configuration, or stored in another format.

    Also counted: layers that can't be split over `tensor_parallel` ranks without splitting a group, a block or a head.
    """
    if files.format.uniform:
        yield from misplaced_formats(files.format)
        yield from uneven_shards(files.format, tensor_parallel)
    if files.reference is not None:
        yield from unusual_parts(files.format, files.reference)


@_check(_all_layers)
def checkpoint_keys(files: Files) -> Iterator[Finding]:
    """Count tensors that are missing or unexpected by the index, the number of blocks, or the sibling blocks.

    Also counted: parts that are missing as a whole although the configuration promises them or the reference has them,
    missing shards, files that no index names, and tensors in two files, of which loaders read different ones.
    """
    if absent := list(absent_shards(files.folder)):
        yield from absent  # what else is missing then, lies in them
        return
    yield from ambiguous_files(files.folder)
    found = list(lost_keys(files.format, files.reference))
    parts = promised_parts(files.format) if files.reference is None else lost_parts(files.format, files.reference)
    known = {each.tensor for each in found}
    yield from chain(found, (each for each in parts if each.tensor not in known))
    yield from added_parts(files.format, files.reference) if files.reference is not None else ()


@_check(_settings)
def checkpoint_settings(files: Files) -> Iterator[Finding]:
    """Count settings that change the function and differ from the reference's: configuration, tokenizer, template.

    Configuration: rope, norm epsilon, activation, heads, tied embeddings and the like; a setting that isn't stated has
    the default of the model's class. Tokenizer: vocabulary, merges, steps, special tokens, and a saved truncation.
    generation_config.json: the stop tokens. Processors: how pictures and sounds are prepared. A value of the wrong
    kind for its key, and a template that can't be parsed, are ANOMALOUS.
    """
    check_side_files(files.folder)
    if files.reference is not None:
        found = changed_settings(files.folder, files.reference, files.resolve)
        yield from (_with_head(files, finding) for finding in found)
        yield from unexpected_size(files.format, files.reference)


def _with_head(files: Files, finding: Finding) -> Finding:
    """Add to a tie to the embeddings that was cut what the head is: with the reference's embeddings it is no fault."""
    theirs = files.reference.layers if files.reference else {}
    heads = (layer for layer in files.folder.layers if layer.rpartition(".")[2] == "lm_head" and layer not in theirs)
    head = next(heads, "") if finding.tensor.rpartition(".")[2] == "tie_word_embeddings" else ""
    recognizer = recognizer_of(files)
    if not head or head not in recognizer.pairs:
        return finding
    known = recognizer.find(head)
    own, how = known is not None and known.own, ""
    if files.reference is not None and files.relation.kind == "rotated":
        own, how = is_rotated_head(files.folder, files.reference, head), ", with the last norm's factors and rotated"
    verb = f"holds the reference's embeddings{how}" if own else "is unlike the reference's embeddings"
    return replace(finding, what=f"{finding.what}; {head} {verb}", note=own)


@_check(_kept_layers)
def checkpoint_unquantized(files: Files, *, rel: _Tolerance = 0.0) -> Iterator[Finding]:
    """Count float tensors that differ from the reference's by more than rel × its values, or are lost.

    These are embeddings, norms, biases and all other tensors that both store in floating point. The check is not part
    of `checkpoint_health`, because a smoothing or a rotation changes norms by design.
    """
    if files.reference is not None:
        yield from changed_floats(files.format, files.reference, rel=rel)


@_check(_everything)
def checkpoint_health(
    files: Files, *, spread: _Spread = 8.0, fused_equal: bool = False, tensor_parallel: _Ranks = 1
) -> Iterator[Finding]:
    """Count all that scales, weights, formats, keys and, where there is a reference, settings find."""
    if files.reference is None:  # else it is compared with the reference's
        readable_tokenizer(files.folder)
    copies = {each.layer for each in files.once(repeated_weights, {}) if not each.note}
    # a copy of another layer has its size: the copy alone is the finding
    sizes = {each for each in files.once(_odd_sizes, {"spread": spread}) if each.layer in copies}
    scales = (each for each in checkpoint_scales(files, spread=spread, fused_equal=fused_equal) if each not in sizes)
    formats = checkpoint_formats(files, tensor_parallel=tensor_parallel)
    found = chain(scales, checkpoint_weights(files), formats, checkpoint_keys(files), checkpoint_settings(files))
    yield from lost_once(files.format, found)


@contextmanager
def _refusing(files: Files) -> Iterator[None]:
    """Say in one line which setting isn't what it should be, or at least that one isn't.

    Raises:
        AnomalyError: one isn't.
    """
    try:
        with refusing_odd_settings(files.settings_text):
            yield
    except AnomalyError:
        check_side_files(files.folder, (CONFIG,))
        raise


def examine(files: Files, metric: str, **parameters: Any) -> tuple[Finding, ...]:
    """Return all that a check finds in the files; it is kept there for `problems_of`.

    Raises:
        AnomalyError: a file is damaged.
        InfraError: one can't be read, or is in a format that nobody knows.
    """
    phase("checking the files")
    with _refusing(files):
        check_declared(files.format)
        return tuple(CHECKS[metric].compute(files, **parameters))


def problems_of(
    files: Files, metric: str, layers: str = ".", exclude: str | None = None, **parameters: Any
) -> tuple[Series, list[Finding]]:
    """Run a check; return the number of problems of each layer, the findings and the notes, in the layers' order.

    Raises:
        AnomalyError: no layer matches, there is nothing that the check could look at, or a file is damaged.
        InfraError: a file can't be read.
    """
    check = CHECKS[metric]
    with _refusing(files):
        looked_at = check.layers(files)
    everything = examine(files, metric, **parameters)
    lost = {finding.layer for finding in everything} - set(looked_at)  # a missing block is no layer of the files
    modules = [name for name in (*looked_at, *lost) if name not in SETTING_LAYERS]
    # What is wrong with a file decides what all else was read from.
    ordered = sorted(sorted(modules, key=natural), key=lambda name: not name.endswith(FILES))
    ordered += [name for name in looked_at if name in SETTING_LAYERS]
    matched = match_layers(ordered, layers, exclude)
    if not matched:
        raise no_match(ordered, layers, exclude)
    position = {layer: index for index, layer in enumerate(matched)}
    found = sorted((f for f in everything if f.layer in position), key=lambda finding: position[finding.layer])
    counts = Counter(finding.layer for finding in found if not finding.note)
    values = np.array([counts[layer] for layer in matched], dtype=np.float64)
    return Series(matched, values, query_of_check(metric, layers, exclude, parameters)), found


def query_of_check(metric: str, layers: str, exclude: str | None, parameters: Parameters) -> Query:
    """Return the query of a static metric, with the defaults of its parameters filled in."""
    check = CHECKS[metric]
    defaults = {name: p.default for name, p in check.parameters.items()}
    return Query(metric, check.definition, CHECKPOINT, layers, exclude, defaults | dict(parameters), unit="problems")

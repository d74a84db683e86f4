"""The pass as functions: `capture` without pytest and without a suite, `capture_parts` of disjoint parts of a text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..captures import (
    AGREEMENT,
    ALL_STATISTICS,
    ERROR,
    GENERATED,
    LOGITS,
    REFERENCE_SINKS,
    REFERENCE_TOKENS,
    SCORES,
    Capture,
    Massive,
    Request,
    Site,
    Statistic,
    against_reference,
    compares,
    merge_requests,
    with_weights,
    without_answers,
)
from ..checkpoint import capture_weights
from ..common import InfraError, Progress, SuiteError, did_you_mean, step
from ..metrics import METRICS, check_arguments, positions_of
from ..suite import Data, NamedSubject, files_of
from .load.answers import prompts_available, with_what_tokens_tell
from .load.batches import Batch, kind_of, listed
from .load.data import windows_available
from .load.media import has_media, media_available
from .load.models import Loaded
from .load.outline import check_layers, check_tokens
from .load.tokenizer import Tokenizer, decoder_of
from .modules import device_of, layers_of, names_of, uncompiled, with_experts
from .reference.live import LiveReference
from .reference.reference_file import ReferenceFile
from .reference.replay import ReplayedReference
from .run.participant import Participant
from .run.run_pass import run_pass
from .run.shared_pass import SampleShare
from .subject import capture_loaded, load_reference, load_subject, subject_batches, with_files

Statistics = str | Iterable[str | tuple[str, Mapping[str, Any]]]


def capture(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    sites: Sequence[tuple[str, Site]],
    statistics: Statistics = "all",
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    reference: nn.Module | str | os.PathLike[str] | None = None,
) -> Capture:
    """Run a model once over batches of data and keep the numbers of the named sites.

    Args:
        model: any module; it is run in evaluation mode without gradients and left as it was.
        batches: tensors [B, T], or dicts of forward arguments, with `attention_mask` [B, T] where there is padding.
            A sample is a row.
        sites: pairs of a layer regex (`re.search` over `named_modules`) and `input`, `output`, `weight`, or one of the
            KV cache (`key`, `value`; `latent`, `rope_key`); and `("", "logits")` for what the model predicts.
        statistics: `"all"`, or the names of the metrics that will be asked for; a metric that must know its thresholds
            in the pass comes as `("massive_activations", {"abs": 50.0, "ratio": 500.0})`.
        tokenizer: where given, the capture holds the texts of the tokens as well.
        progress: called after each batch with the samples done and the samples in all.
        reference: another model of the same layers, usually the unquantized original: both run side by side over the
            batches, and the metrics against a reference can be asked for, those of `logits()` as well where the models
            return logits. Or a reference file (`qsa capture --for-reference`); name the metrics then, in `statistics`.

    Raises:
        AnomalyError: there is no batch, or a pattern matches no layer.
        SuiteError: a pattern is not a regular expression, or a site or metric is unknown.
        TypeError: an argument is something else: a tensor in the place of a list of batches, a path of a model, …
    """
    _check_types(model, sites, statistics, tokenizer, reference)
    model, compared = uncompiled(model), reference is not None
    requests = merge_requests(
        Request(pattern, site, None, _statistics(statistics, site, compared=compared)) for pattern, site in sites
    )
    samples = listed(batches)
    names = names_of(with_experts(layers_of(model)))
    for request in requests:
        if request.site != LOGITS:
            names.find(request.pattern, request.site, None, request.statistics)
    participants: list[Participant] = []
    if isinstance(reference, nn.Module):
        participants = [LiveReference(uncompiled(reference))]
    elif reference is not None:
        participants = [ReplayedReference(ReferenceFile.open(Path(reference)), device_of(model))]
    found = run_pass(model, samples, requests, participants, decode=decoder_of(tokenizer), progress=progress)
    return with_what_tokens_tell(found, requests, model, tokenizer, samples)


def _check_types(model: object, sites: object, statistics: object, tokenizer: object, reference: object) -> None:
    """Check what would fail later, in a place that says nothing of the argument.

    Raises:
        TypeError: an argument is no such thing.
    """
    for name, value in (("model", model), ("reference", reference)):
        file = name == "reference" and (value is None or isinstance(value, (str, os.PathLike)))
        if not isinstance(value, nn.Module) and not file:
            loaded = ": load it, AutoModelForCausalLM.from_pretrained(…)" if isinstance(value, (str, Path)) else ""
            raise TypeError(f"{name} is a torch.nn.Module, not {kind_of(value)}{loaded}")
    if isinstance(tokenizer, (str, Path)):
        raise TypeError("tokenizer is one that is loaded, not its name: AutoTokenizer.from_pretrained(…)")
    if not isinstance(statistics, Iterable):
        raise TypeError(f'statistics is "all" or a list of metrics, not {kind_of(statistics)}')
    if isinstance(sites, (str, Mapping)) or not isinstance(sites, Iterable):
        raise TypeError(f'sites is a list of pairs, [(r"layers\\.\\d+$", "output")], not {kind_of(sites)}')
    for pair in sites:
        if not isinstance(pair, (tuple, list)) or [type(part) for part in pair] != [str, str]:
            raise TypeError(f'sites has {pair!r}, where a pair of a regex and a site is needed: (r"mlp$", "output")')


def _statistics(statistics: Statistics, site: Site, *, compared: bool) -> frozenset[Statistic]:
    if statistics == "all":
        return _all_statistics(site, compared=compared)
    wanted: frozenset[Statistic] = frozenset()
    for entry in [statistics] if isinstance(statistics, str) else statistics:
        name, parameters = (entry, None) if isinstance(entry, str) else entry
        if METRICS.find(name) is None:
            raise SuiteError(f"unknown metric '{name}'{did_you_mean(name, METRICS)}")
        wanted |= _of_metric(name, site, parameters)
    if any(each.of_files for each in wanted):
        raise SuiteError("weight_gain reads the files of a checkpoint, and here is a model: ask it of a suite")
    if GENERATED in wanted:
        raise SuiteError("generation has prompts answered, which a suite names in its section generation: ask it there")
    if against_reference(wanted) and not compared:
        raise SuiteError("some of the metrics compare with a reference: give reference=…, another model")
    return wanted


def _all_statistics(site: Site, *, compared: bool) -> frozenset[Statistic]:
    if site == LOGITS:
        return frozenset({SCORES, AGREEMENT} if compared else {SCORES})
    # The thresholds of massive activations are part of what is counted; these are the metric's defaults.
    both = {ERROR, REFERENCE_TOKENS, REFERENCE_SINKS} if compared else set()
    return ALL_STATISTICS | {Massive(100.0, 1000.0)} | both


def _of_metric(name: str, site: Site, parameters: Mapping[str, Any] | None) -> frozenset[Statistic]:
    """Return the statistics of a metric: for these parameters, or for all that change what has to be kept."""
    metric, parameters = METRICS[name], dict(parameters) if parameters is not None else None
    if parameters is not None and "positions" in parameters:
        where = positions_of(name, site, parameters.pop("positions"))
        check_arguments(metric, site, where, None, parameters)
        return metric.needs(site, where, parameters)
    choices: list[Mapping[str, Any]] = [parameters or {}]
    if parameters is None and name == "magnitude":
        choices = [{"reduce_dim": -1}, {"reduce_dim": -2}, {"reduce_dim": None}]
    elif parameters is None and name == "quantile":
        choices = [{"signed": False}, {"signed": True}]
    positions = ("all", "no_sink") if metric.positional and site != "weight" else ("all",)
    return frozenset().union(*(metric.needs(site, where, choice) for choice in choices for where in positions))


def capture_parts(
    subject: NamedSubject,
    requests: Sequence[Request],
    parts: int,
    passes: int,
    *,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> tuple[list[Capture], list[Capture]]:
    """Capture disjoint parts of the data, of num_samples windows each or of as many as the text has for each.

    `passes`: the number of passes over the first part. Where a request compares, the reference runs with the subject.
    Returns the captures of the parts, and those of the further passes over the first part.

    Raises:
        InfraError: as `capture_subject`; there is too little text for the parts; or the reference does not fit.
    """
    of_pass, of_files = subject.divided(requests)
    if of_files and not of_pass:
        return [capture_weights(files_of(subject), of_files)] * parts, []
    with ExitStack() as exits:
        loaded = load_subject(subject, allow_code=allow_code)
        exits.callback(loaded.close)
        compared = compares(of_pass) or subject.is_answered_by_reference
        reference = _reference(subject, loaded, allow_code=allow_code) if compared else None
        if reference is not None:
            exits.callback(reference.close)
        subject, size = _divided(subject, loaded, reference, parts)
        batches = subject_batches(subject, loaded, reference)  # once, for answers take as long as a pass
        total = size * (parts + passes - 1)
        captures: list[Capture] = []
        # A model's weights are the same in every part, so only the first pass reads them.
        activations = [request for request in requests if request.site != "weight"] or requests
        for index in [*range(parts), *[0] * (passes - 1)]:
            done, share = size * len(captures), SampleShare(samples=(size * index, size * (index + 1)))
            moved = None if progress is None else lambda count, _, done=done: progress(done + count, total)
            # Nor do the answers to prompts depend on the data: only the first part, of those that ask, has them.
            again = (without_answers(activations) or activations) if index == 0 else activations
            asked = again if captures else of_pass
            step(len(captures) + 1, parts + passes - 1)
            own = capture_loaded(subject, loaded, None, asked, moved, share, reference, batches)
            if captures:
                own = with_weights(own, captures[0])
            elif of_files:
                own = with_files(own, subject, of_files)
            captures.append(own)
    return captures[:parts], captures[parts:]


def _divided(subject: NamedSubject, loaded: Loaded, reference: Loaded | None, parts: int) -> tuple[NamedSubject, int]:
    """Return the subject with the data of all parts, and how many samples each part has."""
    size = part_size(subject.data, loaded, subject.folder, parts)
    # A batch must not reach into the next part.
    batch_size = subject.data.batch_size if size % subject.data.batch_size == 0 else 1
    data = subject.data.model_copy(update={"num_samples": size * parts, "batch_size": batch_size})
    if reference is not None and not has_media(data, subject.folder, loaded.model):
        # The subject's tokenizer makes the batches of both models: to the reference its ids must mean the same text.
        check_tokens(data, loaded.required_tokenizer("the model"), reference.tokenizer, subject.folder)
    return replace(subject, data=data), size


def _reference(subject: NamedSubject, loaded: Loaded, *, allow_code: bool) -> Loaded:
    if isinstance(subject.reference, Path):
        raise InfraError(
            f"model.reference: {subject.reference.name} was kept on its own tokens, and the noise is measured on other "
            "parts of the text: name the original itself, --model.reference"
        )
    reference = load_reference(subject, allow_code=allow_code)
    check_layers(loaded.model, reference.model)
    return reference


def part_size(data: Data, loaded: Loaded, folder: Path, parts: int) -> int:
    """Return how many windows, or prompts, each part gets: `num_samples`, or as many as the source has.

    Raises:
        InfraError: there is no tokenizer, or not one window for each part.
    """
    if has_media(data, folder, loaded.model):
        available = media_available(data, folder, data.num_samples * parts)
        if available is not None and available < parts:
            raise InfraError(f"'{data.source}' has {available} records, too few for {parts} parts: lower --parts")
        return data.num_samples if available is None else min(data.num_samples, available // parts)
    tokenizer = loaded.required_tokenizer("the model")
    available = prompts_available(data, folder) if data.answers else windows_available(data, tokenizer, folder)
    size = data.num_samples if available is None else min(data.num_samples, available // parts)
    if size < 1:
        has = "prompts; lower --parts" if data.answers else f"windows of {data.seq_len}; lower data.seq_len or --parts"
        raise InfraError(f"too little text in '{data.source}' for {parts} parts: it has {available} {has}")
    return size

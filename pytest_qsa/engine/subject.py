"""Load a subject, run its one pass, let the model go, and say what was run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..captures import (
    AGREEMENT,
    CACHE_SCALE,
    DRAFTS,
    LOGITS,
    MOMENTS,
    OTHER_ENGINE,
    OTHER_PREDICTIONS,
    SCORES,
    STORED,
    TOKENS,
    Array,
    Capture,
    DataProvenance,
    Outline,
    Provenance,
    Request,
    SiteKey,
    SiteNumbers,
    asks_for_answers,
    compares,
    data_fingerprint,
    match_layers,
    merge_requests,
    with_weights,
    without_answers,
)
from ..checkpoint import CacheScale, capture_weights, scales_of_cache
from ..common import AnomalyError, InfraError, Progress, QsaError, logger, phase, shown_path
from ..metrics import KL
from ..suite import (
    Engine,
    FileHashes,
    NamedSubject,
    Subject,
    files_of,
    identified,
    loaded_files,
)
from .formats.format import schemes_of
from .formats.stored import StoredWeights
from .load.adapters import source_of
from .load.answers import answer_batches, answered_batches, unbatched, with_what_tokens_tell
from .load.batches import Batch, listed, row_count, token_ids
from .load.data import batches_of, check_local
from .load.generation import Prompts, answers_of_both, check_cache
from .load.media import has_media, media_batches, media_in
from .load.models import Loaded, check_allowed, load_model, provenance_of, quiet
from .load.outline import expected_outline, made_by_code, outline_of
from .load.tokenizer import compare_gguf_tokens, decoder_of, load_tokenizer, tokenizer_identity
from .modules import (
    SENSES,
    blocks_of,
    caching_layers,
    check_context,
    device_of,
    forward_errors,
    layers_of,
    towers_of,
    with_experts,
)
from .reference.live import LiveReference, Reference
from .reference.predicted import located_head
from .reference.record import Recording, RecordOptions, record_model
from .reference.reference_file import ReferenceFile
from .reference.replay import ReplayedReference, check_answerable
from .run.observed_execution import ObservedExecution
from .run.participant import Participant
from .run.rounded_cache import CacheScales, RoundedCache, cache_rounded
from .run.shared_pass import ALL_SAMPLES, SampleShare, SharedPass
from .run.site_statistics import StoredComparison
from .vllm.capture import VllmPass, check_requests, empty_subject, predictions_of, run_in_vllm, served_head
from .vllm.recorded import RecordedComparison


def capture_subject(
    subject: Subject,
    requests: Sequence[Request],
    *,
    allow_code: bool = False,
    progress: Progress | None = None,
    share: SampleShare = ALL_SAMPLES,
    look_at_loaded: Callable[[Outline], None] | None = None,
) -> Capture:
    """Load the subject's checkpoint, run it once, and free it; weights may be read from its files instead.

    `look_at_loaded`: called with the layers of a model that `look_ahead` doesn't know; what it raises stops the run.

    Raises:
        InfraError: it can't be loaded or run, or its data can't be read.
    """
    subject = subject.named
    of_pass, of_files = subject.divided(requests)
    if of_files and not of_pass:
        return capture_weights(files_of(subject), of_files, progress=progress)
    look = look_at_loaded if made_by_code(subject.model) else None
    capture = _capture_pass(subject, of_pass, allow_code, progress, share, look)
    return with_files(capture, subject, of_files) if of_files else capture


def with_files(capture: Capture, subject: Subject, requests: Sequence[Request]) -> Capture:
    """Add to what a pass left the weights that its subject's files hold, under the names of the model's layers."""
    return with_weights(capture, capture_weights(files_of(subject), requests, modules=capture.modules))


def look_ahead(
    subject: NamedSubject, requests: Sequence[Request], *, allow_code: bool = False, as_loaded: bool = False
) -> Outline | None:
    """Return what is known of a subject's layers without hashing or reading a weight; None where only loading tells.

    `requests`: what a pass will be asked for. `as_loaded`: with the modules that a quantized checkpoint's loader adds.

    Raises:
        QsaError: what would stop loading the subject, or its reference, as far as it is known without weights.
    """
    check_local(subject.data, subject.folder)
    if asks_for_answers(requests):
        Prompts.of(subject)
    if compares(requests):
        _check_reference(subject, requests, allow_code=allow_code)
    return _expected_outline(subject, allow_code=allow_code, as_loaded=as_loaded)


def _expected_outline(subject: NamedSubject, *, allow_code: bool, as_loaded: bool = False) -> Outline | None:
    tokens = subject.data.seq_len
    return expected_outline(
        subject.model,
        subject.path,
        subject.memory,
        tokens,
        allow_code=allow_code,
        base=subject.base,
        as_loaded=as_loaded,
    )


def _check_reference(subject: NamedSubject, requests: Sequence[Request], *, allow_code: bool) -> None:
    if isinstance(subject.reference, Path):
        _open_reference_file(subject.reference, str(subject.model.reference), requests)
        return
    with _of_reference(subject) as reference:
        _expected_outline(reference, allow_code=allow_code)


def _capture_pass(
    subject: NamedSubject,
    requests: Sequence[Request],
    allow_code: bool,
    progress: Progress | None,
    share: SampleShare,
    look_at_loaded: Callable[[Outline], None] | None,
) -> Capture:
    if subject.model.engine.name == "vllm":
        return _capture_in_vllm(subject, requests, allow_code, progress, share)
    compared = compares(requests) or subject.is_answered_by_reference
    reference: Loaded | ReferenceFile | None = None
    if compared and isinstance(subject.reference, Path):  # before a model is loaded in vain
        reference = _open_reference_file(subject.reference, str(subject.model.reference), requests)
    loaded = load_subject(subject, allow_code=allow_code)
    try:
        if look_at_loaded is not None:
            look_at_loaded(outline_of(loaded.model))
        if compared and reference is None:
            reference = load_reference(subject, allow_code=allow_code)
        return capture_loaded(subject, loaded, None, requests, progress, share, reference)
    finally:
        for held in (loaded, reference):
            if isinstance(held, Loaded):
                held.close()
        # Names in this frame would keep the models alive while the memory is given back, and a traceback would keep the
        # frame.
        del loaded, reference, held
        _let_go()


def _capture_in_vllm(
    subject: NamedSubject,
    requests: Sequence[Request],
    allow_code: bool,
    progress: Progress | None,
    share: SampleShare,
) -> Capture:
    """Run a subject in vLLM; make its predictions here, of the hidden states that vLLM left, beside the reference."""
    check_requests(requests, recorded=isinstance(subject.reference, Path))
    if subject.data.answers is not None or share.samples is not None or share.ranks.size > 1:
        raise InfraError("model.engine: vllm runs all windows of a text in one pass: leave answers and shares out")
    if asks_for_answers(requests):
        raise InfraError("model.engine: vllm answers no prompts here: ask it as a server, model.served, for generation")
    path, spec = subject.path, subject.model
    check_allowed(spec, path, subject.memory, allow_code=allow_code)
    own = {"trust_remote_code": spec.trust_remote_code, "revision": spec.revision}
    loaded = Loaded(empty_subject(subject), load_tokenizer(path, own))
    every = subject_batches(subject, loaded)
    provenance = _provenance(subject, loaded, every, own_batches=False)
    with _recorded_comparison(subject, loaded.model, every, requests, provenance) as recorded:
        ran = run_in_vllm(subject, loaded.model, every, requests, recorded.drawn if recorded else None)
        _let_go()
        capture = _capture_of(subject, loaded, every, requests, ran)
        if predicted := predictions_of(requests):
            samples = [row.tolist() for row in capture.tokens]
            head = Loaded(served_head(subject, loaded.model, samples, ran), loaded.tokenizer)
            capture = _with_predictions(capture, subject, loaded, head, predicted, provenance, allow_code, progress)
            capture = _with_other_predictions(capture, subject, head, predicted, allow_code, progress)
        if ran.result["drafts"]:
            capture = _with_drafts(capture, np.array(ran.result["drafts"]))
        if recorded is not None:
            capture = recorded.added_to(capture, ran.rows)
    capture = _with_other_engine(capture, subject, requests, allow_code, progress)
    execution = ran.execution(capture.schemes)
    model = ran.provenance(provenance.model)
    return replace(capture, provenance=replace(provenance, model=model, execution=execution))


def _recorded_comparison(
    subject: NamedSubject,
    model: Any,
    batches: Sequence[Batch],
    requests: Sequence[Request],
    provenance: Provenance,
) -> AbstractContextManager[RecordedComparison | None]:
    """Return what compares a pass in vLLM with a recorded reference; None where no layer is compared."""
    if not compares([request for request in requests if request.site != LOGITS]):
        return nullcontext()
    assert isinstance(subject.reference, Path)
    file = _open_reference_file(subject.reference, str(subject.model.reference), requests)
    return RecordedComparison(file, model, batches, requests, file.origin(provenance))


def _capture_of(
    subject: NamedSubject, loaded: Loaded, batches: Sequence[Batch], requests: Sequence[Request], ran: VllmPass
) -> Capture:
    """Return the capture of the sites of a pass in vLLM. `loaded`: the model without weights."""
    layers, tokens = with_experts(layers_of(loaded.model)), [row for batch in batches for row in token_ids(batch)]
    decode = decoder_of(loaded.tokenizer)
    return Capture(
        ran.sites,
        tuple(layers),
        tuple(blocks_of(loaded.model)),
        tuple(row.numpy().astype("int32") for row in tokens),
        dict(decode(sorted({int(token) for row in tokens for token in row.tolist()}))) if decode else {},
        plan=merge_requests(requests),
        schemes=schemes_of(loaded.model),
    )


def _with_other_engine(
    capture: Capture, subject: NamedSubject, requests: Sequence[Request], allow_code: bool, progress: Progress | None
) -> Capture:
    """Add what transformers has at the sites where two engines are compared, by its own attention and by eager's."""
    asked = [
        replace(request, statistics=frozenset({MOMENTS, TOKENS}))
        for request in requests
        if OTHER_ENGINE in request.statistics
    ]
    if not asked:
        return capture
    more: dict[SiteKey, dict[str, Array]] = {}
    for name, attention in (("other", None), ("eager", "eager")):
        phase("transformers runs the same samples" + (" with eager attention" if attention else ""))
        found = _capture_pass(_by_transformers(subject, attention), asked, allow_code, progress, ALL_SAMPLES, None)
        for site, theirs in found.sites.items():
            own = capture.sites[site]
            if theirs.sample.tolist() != own.sample.tolist() or theirs.lengths.tolist() != own.lengths.tolist():
                raise InfraError(f"vLLM and transformers call {site[0]} otherwise: exclude it from engine_gap")
            more.setdefault(site, {}).update({f"{name}_moments": theirs.moments, f"{name}_max": theirs.token_max})
    sites = {site: numbers.having((), more.get(site, {})) for site, numbers in capture.sites.items()}
    return replace(capture, sites=sites)


def _with_drafts(capture: Capture, drafts: Array) -> Capture:
    """Add what the checkpoint's own head of several tokens drafts behind each sample, [P, 2]."""
    lengths = np.array([len(ids) for ids in capture.tokens])
    owners = np.arange(len(lengths), dtype=np.int32), np.zeros(len(lengths), dtype=np.int32), lengths
    known = capture.sites.get((LOGITS, LOGITS)) or SiteNumbers("float32", (), True, frozenset(), *owners, {})
    return replace(capture, sites={**capture.sites, (LOGITS, LOGITS): known.having({DRAFTS}, {"drafts": drafts})})


def _by_transformers(subject: NamedSubject, attention: str | None) -> NamedSubject:
    settings = {"engine": Engine(), "attn_implementation": attention, "reference": None}
    return replace(subject, model=subject.model.model_copy(update=settings))


def _with_other_predictions(
    capture: Capture,
    subject: NamedSubject,
    head: Loaded,
    requests: Sequence[Request],
    allow_code: bool,
    progress: Progress | None,
) -> Capture:
    """Add how far the predictions are from transformers', and those of transformers' eager attention from these."""
    if not any(OTHER_PREDICTIONS in request.statistics for request in requests):
        return capture
    rows = [torch.tensor([ids.tolist()]) for ids in capture.tokens]
    scores = [Request("", LOGITS, None, frozenset({SCORES, AGREEMENT}))]

    def divergence(own: Loaded, other: Loaded) -> Array:
        found = SharedPass(own, [LiveReference(other.model, other.stream)], rows, scores, progress, ALL_SAMPLES)
        part = found.own_part()
        assert part is not None
        return part.sites[LOGITS, LOGITS].scores[:, KL]

    arrays: dict[str, Array] = {}
    phase("transformers runs the same samples")
    other = load_subject(_by_transformers(subject, None), allow_code=allow_code)
    eager: Loaded | None = None
    try:
        arrays["other_kl"] = divergence(head, other)
        phase("transformers runs the same samples with eager attention")
        eager = load_subject(_by_transformers(subject, "eager"), allow_code=allow_code)
        arrays["eager_kl"] = divergence(eager, other)
    finally:
        for held in (other, eager):
            if held is not None:
                held.close()
    numbers = capture.sites[LOGITS, LOGITS].having({OTHER_PREDICTIONS}, arrays)
    return replace(capture, sites={**capture.sites, (LOGITS, LOGITS): numbers})


def _with_predictions(
    capture: Capture,
    subject: NamedSubject,
    loaded: Loaded,
    head: Loaded,
    requests: Sequence[Request],
    provenance: Provenance,
    allow_code: bool,
    progress: Progress | None,
) -> Capture:
    """Add what a pass in vLLM predicts, against the reference where that is asked for."""
    reference: Loaded | ReferenceFile | None = None
    try:
        if compares(requests) and isinstance(subject.reference, Path):
            reference = _open_reference_file(subject.reference, str(subject.model.reference), requests)
        elif compares(requests):
            reference = load_reference(subject, allow_code=allow_code)
        participants = [_participant_of(reference, head, provenance)] if reference is not None else []
        rows = [torch.tensor([ids.tolist()]) for ids in capture.tokens]
        found = SharedPass(head, participants, rows, requests, progress, ALL_SAMPLES).own_part()
        assert found is not None
        found = _with_model_of_reference(found, subject, reference)
        found = with_what_tokens_tell(found, requests, loaded.model, loaded.tokenizer, rows)
    finally:
        if isinstance(reference, Loaded):
            reference.close()
    return replace(
        capture,
        sites={**capture.sites, **found.sites},
        pieces={**capture.pieces, **found.pieces},
        reference=found.reference,
    )


def _let_go() -> None:
    # Modules and their hooks refer to one another in circles, which only the collector frees.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_subject(subject: NamedSubject, *, allow_code: bool) -> Loaded:
    """Load a subject's model.

    Raises:
        QsaError: it can't be loaded.
    """
    began = time.perf_counter()
    phase(f"loading {shown_path(Path(subject.path)) if subject.path else subject.name}")
    loaded = load_model(subject.model, subject.path, subject.memory, allow_code=allow_code, base=subject.base)
    logger.debug("%s: loading %s took %.2f s", subject.name, subject.path, time.perf_counter() - began)
    return loaded


def load_reference(subject: NamedSubject, *, allow_code: bool) -> Loaded:
    """Load what a subject is compared with.

    Raises:
        QsaError: the suite names no model, or it can't be loaded.
    """
    with _of_reference(subject) as reference:
        return load_subject(reference, allow_code=allow_code)


@contextmanager
def _of_reference(subject: NamedSubject) -> Iterator[NamedSubject]:
    """Yield what a subject is compared with; say of an error that it is the reference's.

    Raises:
        InfraError: the suite names no model.
    """
    if not isinstance(subject.reference, NamedSubject):
        raise InfraError("there is nothing to compare with: name the original, model.reference")
    try:
        yield subject.reference
    except QsaError as error:
        raise type(error)(f"model.reference: {error}") from error


def _open_reference_file(path: Path, named: str, requests: Sequence[Request]) -> ReferenceFile:
    """Open a recorded reference. `named`: as the suite names it.

    Raises:
        InfraError: it isn't there, or can't answer what is requested.
    """
    if not path.is_file():
        raise InfraError(
            f"model.reference: there is no file {named}: make it of the original with `qsa capture "
            f"--config … --model.path ORIGINAL --for-reference -o {path.name}`"
        )
    file = ReferenceFile.open(path)
    check_answerable(requests, file.shown)
    return file


def record_reference(
    subject: NamedSubject,
    requests: Sequence[Request],
    options: RecordOptions,
    output: Path,
    *,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> Recording:
    """Load a checkpoint, run it once over the subject's data and record it as a reference, which goes to `output`.

    Raises:
        InfraError: it can't be loaded or run, its data can't be read, or its predictions are asked for and can't be
            recorded.
    """
    loaded = load_subject(subject, allow_code=allow_code)
    try:
        every = subject_batches(subject, loaded)
        own, folder = source_of(subject.path, subject.model.revision, subject.base), output.absolute().parent
        with quiet(), forward_errors(type(loaded.model).__name__):
            recording = record_model(
                loaded.model,
                every,
                without_answers(requests),
                options,
                lambda head: located_head(head, own.path, own.revision, folder),
                stream=loaded.stream,
                progress=progress,
            )
        empty = Capture({}, provenance=_provenance(subject, loaded, every, own_batches=False))
        provenance = identified(empty, subject, FileHashes(None)).provenance
        content = replace(recording.content, provenance=provenance, answers=unbatched(every))
        if asks_for_answers(requests):
            prompts = Prompts.of(subject)
            found = [[list(each.tokens), each.ended] for each in prompts.answers_by(loaded, "the model")]
            content = replace(content, generated={"prompts": prompts.identity, "answers": found})
        return replace(recording, content=content)
    finally:
        loaded.close()
        del loaded
        _let_go()


def capture_loaded(
    subject: Subject,
    loaded: Loaded,
    batches: Iterable[Batch] | None,
    requests: Sequence[Request],
    progress: Progress | None = None,
    share: SampleShare = ALL_SAMPLES,
    reference: Loaded | ReferenceFile | None = None,
    made: Sequence[Batch] | None = None,
) -> Capture:
    """Run a loaded model over its own batches or over the subject's data, or over a share of them.

    `reference`: the model that it is compared with, where the requests ask for that. `made`: the subject's data, where
    `subject_batches` has made them already.
    """
    if compares(requests) and reference is None:
        raise InfraError("there is nothing to compare with: name model.reference, or give a fixture qsa_reference")
    note = _tokens_note(subject, loaded) if batches is None else ""
    try:
        own = batches if batches is not None else made
        every = listed(own if own is not None else subject_batches(subject, loaded, reference))
    except TypeError as error:  # in a test run the caller is pytest, and a traceback would say nothing of the fixture
        raise InfraError(f"the fixture qsa_batches: {error}") from None
    provenance = _provenance(subject, loaded, every, own_batches=batches is not None, note=note)
    runs = _requires_execution(subject) or asks_for_answers(requests)
    execution = ObservedExecution(loaded.model, required=runs)
    participants: list[Participant] = [execution]
    stored, nothing_stored = _stored(subject, loaded, requests)
    if stored is not None:
        participants.append(StoredComparison(stored))
    if any(CACHE_SCALE in request.statistics for request in requests) and loaded_files(subject) is not None:
        participants.append(CacheScales(_cache_scales(subject, loaded)))
    if subject.model is not None and subject.model.kv_cache is not None:
        other = reference.model if isinstance(reference, Loaded) else None
        participants.append(RoundedCache(subject.model.kv_cache, _cache_scales(subject, loaded), other))
    if reference is not None:
        participants.append(_participant_of(reference, loaded, provenance))
    answers, prompts = None, Prompts.of(subject) if asks_for_answers(requests) else None
    # Of several parts of the data the one with the first sample has them.
    if reference is not None and prompts is not None and not (share.samples and share.samples[0]):
        theirs = reference if isinstance(reference, Loaded) else reference.generated
        answers = answers_of_both(prompts, loaded, theirs, _own_cache(subject, loaded))
    run = SharedPass(loaded, participants, every, without_answers(requests), progress, share)
    capture = _with_model_of_reference(share.ranks.gathered(run.own_part), subject, reference)
    first = share.samples[0] if share.samples else 0
    capture = with_what_tokens_tell(capture, requests, loaded.model, loaded.tokenizer, every, first)
    if answers is not None:
        capture = answers.added_to(capture)
    provenance = replace(
        provenance,
        data=replace(provenance.data, prompts=prompts.fingerprint if prompts is not None else None),
        execution=execution.execution(loaded_files(subject), provenance.model.device_class),
        unmatched=tuple(stored.unmatched) if stored else (),
        samples=capture.provenance.samples,
    )
    uncompared = {**capture.uncompared, **nothing_stored}
    whole = replace(capture, provenance=provenance, schemes=schemes_of(loaded.model), uncompared=uncompared)
    return replace(whole, plan=merge_requests(requests))


def _own_cache(subject: Subject, loaded: Loaded) -> AbstractContextManager[None]:
    """Round what a subject's model puts into its KV cache, where the suite says so."""
    grid = subject.model.kv_cache if subject.model is not None else None
    return cache_rounded(loaded.model, grid, _cache_scales(subject, loaded)) if grid else nullcontext()


def _cache_scales(subject: Subject, loaded: Loaded) -> Mapping[str, tuple[CacheScale, CacheScale]]:
    """Return the scales of a static KV cache in FP8 that the subject's files hold, by the layers of its model."""
    files = loaded_files(subject)
    return {} if files is None else scales_of_cache(files.folder, caching_layers(layers_of(loaded.model)))


def _with_model_of_reference(capture: Capture, subject: Subject, reference: Loaded | ReferenceFile | None) -> Capture:
    """Say of the reference's own numbers which model made them; it runs the subject's data."""
    if capture.reference is None or not isinstance(reference, Loaded):
        return capture
    path = subject.reference.path if isinstance(subject.reference, NamedSubject) else ""
    theirs = Provenance(provenance_of(reference.model, path))
    return replace(capture, reference=replace(capture.reference, provenance=theirs))


def _requires_execution(subject: Subject) -> bool:
    return bool(subject.model and subject.model.require and subject.model.require.executed_as)


def _stored(
    subject: Subject, loaded: Loaded, requests: Sequence[Request]
) -> tuple[StoredWeights | None, Mapping[str, str]]:
    """Open the files that the subject was loaded from, if a request compares with them.

    Where there are none, as of a factory's or a fixture's model, return why, by layer.
    """
    asked = [request for request in requests if STORED in request.statistics]
    if not asked:
        return None, {}
    modules = with_experts(layers_of(loaded.model))
    try:
        return StoredWeights(files_of(subject), modules), {}
    except InfraError as error:
        layers = {layer for each in asked for layer in match_layers(list(modules), each.pattern, each.exclude)}
        return None, dict.fromkeys((name for name in modules if name in layers), str(error))


def _participant_of(reference: Loaded | ReferenceFile, loaded: Loaded, provenance: Provenance) -> Reference:
    """Return what takes part in the pass. `provenance`: the subject's, which may explain why samples differ."""
    if isinstance(reference, Loaded):
        return LiveReference(reference.model, reference.stream)
    device = loaded.stream.device if loaded.stream is not None else device_of(loaded.model)
    return ReplayedReference(reference, device, reference.origin(provenance))


def _tokens_note(subject: Subject, loaded: Loaded) -> str:
    """Compare the tokenizer of a GGUF's run with the file's own; return what is to be said of it.

    Raises:
        InfraError: they give other ids.
    """
    folder = subject.base_folder
    if subject.model is None or subject.model.gguf_file is None or loaded.tokenizer is None or folder is None:
        return ""
    return compare_gguf_tokens(folder / subject.model.gguf_file, loaded.tokenizer)


def subject_batches(subject: Subject, loaded: Loaded, reference: Loaded | ReferenceFile | None = None) -> list[Batch]:
    """Return the batches of a subject's data, made by the loaded model's tokenizer.

    `reference`: who answers, where the data are answers; without one the model itself.

    Raises:
        AnomalyError: there is no tokenizer, or it makes ids that the model has no rows for.
        InfraError: the data can't be read, or nobody can answer.
    """
    phase(f"reading {subject.data.source}")
    if subject.data.answers is not None and isinstance(reference, ReferenceFile):
        _check_phase(subject, loaded)
        return answered_batches(subject.data, reference.answers)
    if has_media(subject.data, subject.folder, loaded.model):
        revision = subject.model.revision if subject.model is not None else None
        batches = media_batches(subject.data, subject.folder, loaded, subject.path, revision)
        _check_ids(loaded.model, batches)
        return batches
    tokenizer = loaded.required_tokenizer(subject.path or subject.name)
    check_context(loaded.model, subject.data.seq_len)
    if subject.data.answers is not None:
        by, whose = (loaded, "the model") if reference is None else (reference, "the reference")
        assert isinstance(by, Loaded)
        _check_phase(subject, loaded)
        with _own_cache(subject, loaded) if by is loaded else nullcontext():
            batches = answer_batches(subject.data, tokenizer, subject.folder, by, whose)
        _check_ids(loaded.model, batches)
        return batches
    batches = batches_of(subject.data, tokenizer, subject.folder, getattr(loaded.model, "config", None))
    _check_ids(loaded.model, batches)
    return batches


def _check_phase(subject: Subject, loaded: Loaded) -> None:
    if subject.data.answers is None or subject.data.answers.phase != "decode":
        return
    check_cache(loaded.model, "data.answers: phase: decode: the model")
    if loaded.stream is not None:
        raise InfraError(
            "data.answers: phase: decode needs the whole model at each token, and it is read block by block: leave "
            "offload_device out"
        )


def _check_ids(model: Any, batches: Sequence[Batch]) -> None:
    """Refuse token ids that the embedding has no rows for: a CPU says `index out of range`, a GPU stops for good."""
    embedding = None
    with suppress(AttributeError, NotImplementedError):  # transformers' own word for a model of several towers
        embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    largest = max((int(row.max()) for batch in batches for row in token_ids(batch) if row.numel()), default=-1)
    if isinstance(rows, int) and largest >= rows:
        raise AnomalyError(
            f"the tokenizer makes the token id {largest} of the data, and the embedding of {type(model).__name__} has "
            f"{rows} rows: take the tokenizer and the weights from one checkpoint"
        )


def _provenance(
    subject: Subject, loaded: Loaded, batches: Sequence[Batch], *, own_batches: bool, note: str = ""
) -> Provenance:
    """Say where a run's numbers come from. `note`: what is to be said of the tokenizer."""
    # The batch size changes no sample: captures of different ones have the same data.
    data = {"source": "fixture"} if own_batches else subject.data.model_dump(exclude={"custom", "batch_size"})
    data = {k: v for k, v in data.items() if v is not None or k not in ("answers", "stride")}  # as earlier versions
    folder = subject.local_folder
    fetched = folder is not None and not Path(subject.path).is_dir()
    tokenizer = tokenizer_identity(loaded.tokenizer)
    model = replace(
        provenance_of(loaded.model, subject.path),
        kv_cache=subject.model.kv_cache if subject.model is not None else None,
        revision=folder.name if folder is not None and fetched else None,  # the hub's cache names the folder so
        tokenizer=f"{tokenizer}; {note}" if note else tokenizer,
    )
    made = DataProvenance.of({**data, "fingerprint": data_fingerprint(_tensors(batches))})
    read, towers = media_in(batches), set(towers_of(loaded.model).values())
    # A tower without a text model beside it can't be left out.
    unread = towers - {SENSES[medium] for medium in read} if _reads_text(batches) else set[str]()
    return Provenance(model, replace(made, media=bool(read), unread=" and ".join(sorted(unread))))


def _reads_text(batches: Sequence[Batch]) -> bool:
    return any(isinstance(batch, Tensor) or "input_ids" in batch for batch in batches)


def _tensors(batches: Iterable[Batch]) -> Iterator[tuple[str, str, Sequence[int], bytes]]:
    """Yield the tensors of each row for the hash of the data; how the rows are batched doesn't matter."""
    for batch in batches:
        named: Mapping[str, Any] = {"": batch} if isinstance(batch, Tensor) else batch
        tensors = {name: value for name, value in sorted(named.items()) if isinstance(value, Tensor)}
        count = row_count(batch)
        # The patches of a picture are rows of a tensor that belongs to its sample as a whole.
        parts = [value if value.dim() and len(value) == count else [value] for value in tensors.values()]
        for rows in zip(*parts, strict=False):
            for name, row in zip(tensors, rows, strict=True):
                # numpy has no bfloat16, so that a row is hashed as bytes; torch can't view a scalar as bytes.
                content = row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if row.dim() else b""
                yield name, str(row.dtype).removeprefix("torch."), row.shape, content

"""Load a subject's model in transformers, and run its one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...captures import (
    CACHE_SCALE,
    STORED,
    Capture,
    Outline,
    Provenance,
    Request,
    asks_for_answers,
    compares,
    match_layers,
    merge_requests,
    without_answers,
)
from ...common import InfraError, Progress
from ...suite import NamedSubject, Subject, files_of, loaded_files
from ..formats.format import schemes_of
from ..formats.stored import StoredWeights
from ..load.answers import with_what_tokens_tell
from ..load.batches import Batch, listed
from ..load.generation import AnsweredPrompts, Prompts, answers_of_both
from ..load.models import Loaded
from ..load.outline import outline_of
from ..modules import layers_of, with_experts
from ..reference.reference_file import ReferenceFile
from ..run.observed_execution import ObservedExecution
from ..run.participant import Participant
from ..run.rounded_cache import CacheScales, RoundedCache
from ..run.shared_pass import ALL_SAMPLES, SampleShare, SharedPass
from ..run.site_statistics import StoredComparison
from .data import cache_scales, own_cache, run_provenance, subject_batches, tokens_note
from .models import let_go, load_reference, load_subject, open_reference_file, participant_of, with_model_of_reference


def capture_in_transformers(
    subject: NamedSubject,
    requests: Sequence[Request],
    allow_code: bool,
    progress: Progress | None,
    share: SampleShare,
    look_at_loaded: Callable[[Outline], None] | None = None,
) -> Capture:
    """Load a subject and what it is compared with, run the pass, and free both.

    `look_at_loaded`: called with the layers of the model; what it raises stops the run.

    Raises:
        QsaError: a model can't be loaded or run, or the data can't be read.
    """
    compared = compares(requests) or subject.is_answered_by_reference
    reference: Loaded | ReferenceFile | None = None
    if compared and isinstance(subject.reference, Path):  # before a model is loaded in vain
        reference = open_reference_file(subject.reference, str(subject.model.reference), requests)
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
        let_go()


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
    note = tokens_note(subject, loaded) if batches is None else ""
    try:
        own = batches if batches is not None else made
        every = listed(own if own is not None else subject_batches(subject, loaded, reference))
    except TypeError as error:  # in a test run the caller is pytest, and a traceback would say nothing of the fixture
        raise InfraError(f"the fixture qsa_batches: {error}") from None
    provenance = run_provenance(subject, loaded, every, own_batches=batches is not None, note=note)
    runs = _requires_execution(subject) or asks_for_answers(requests)
    execution = ObservedExecution(loaded.model, required=runs)
    stored, nothing_stored = _stored(subject, loaded, requests)
    compared = [] if stored is None else [StoredComparison(stored)]
    others = _other_participants(subject, loaded, requests, reference, provenance)
    prompts = Prompts.of(subject) if asks_for_answers(requests) else None
    answers = _answers(prompts, subject, loaded, reference, share) if prompts is not None else None
    participants = [execution, *compared, *others]
    run = SharedPass(loaded, participants, every, without_answers(requests), progress, share)
    capture = with_model_of_reference(share.ranks.gathered(run.own_part), subject, reference)
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


def _other_participants(
    subject: Subject,
    loaded: Loaded,
    requests: Sequence[Request],
    reference: Loaded | ReferenceFile | None,
    provenance: Provenance,
) -> Iterator[Participant]:
    """Yield who reads or rounds the KV cache in the pass, and the reference. `provenance`: the subject's."""
    if any(CACHE_SCALE in request.statistics for request in requests) and loaded_files(subject) is not None:
        yield CacheScales(cache_scales(subject, loaded))
    if subject.model is not None and subject.model.kv_cache is not None:
        other = reference.model if isinstance(reference, Loaded) else None
        yield RoundedCache(subject.model.kv_cache, cache_scales(subject, loaded), other)
    if reference is not None:
        yield participant_of(reference, loaded, provenance)


def _answers(
    prompts: Prompts,
    subject: Subject,
    loaded: Loaded,
    reference: Loaded | ReferenceFile | None,
    share: SampleShare,
) -> AnsweredPrompts | None:
    """Let both models answer the prompts; of several parts of the data the one with the first sample does."""
    if reference is None or (share.samples and share.samples[0]):
        return None
    theirs = reference if isinstance(reference, Loaded) else reference.generated
    return answers_of_both(prompts, loaded, theirs, own_cache(subject, loaded))


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

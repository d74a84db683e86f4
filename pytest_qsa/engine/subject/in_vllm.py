"""Run a subject in vLLM, and what is compared with transformers beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...captures import (
    AGREEMENT,
    DRAFTS,
    LOGITS,
    MOMENTS,
    OTHER_ENGINE,
    OTHER_PREDICTIONS,
    SCORES,
    TOKENS,
    Array,
    Capture,
    Provenance,
    Request,
    SiteKey,
    SiteNumbers,
    asks_for_answers,
    compares,
    merge_requests,
)
from ...common import InfraError, Progress, phase
from ...metrics import KL
from ...suite import Engine, NamedSubject
from ..formats.format import schemes_of
from ..load.answers import with_what_tokens_tell
from ..load.batches import Batch, token_ids
from ..load.models import Loaded, check_allowed
from ..load.tokenizer import decoder_of, load_tokenizer
from ..modules import blocks_of, layers_of, with_experts
from ..reference.live import LiveReference
from ..reference.reference_file import ReferenceFile
from ..run.shared_pass import ALL_SAMPLES, SampleShare, SharedPass
from ..vllm.capture import VllmPass, check_requests, empty_subject, predictions_of, run_in_vllm, served_head
from ..vllm.recorded import RecordedComparison
from .data import run_provenance, subject_batches
from .in_transformers import capture_in_transformers
from .models import let_go, load_reference, load_subject, open_reference_file, participant_of, with_model_of_reference


def capture_in_vllm(
    subject: NamedSubject,
    requests: Sequence[Request],
    allow_code: bool,
    progress: Progress | None,
    share: SampleShare,
) -> Capture:
    """Run a subject in vLLM; make its predictions here, of the hidden states that vLLM left, beside the reference."""
    _check_offered(subject, requests, share)
    path, spec = subject.path, subject.model
    check_allowed(spec, path, subject.memory, allow_code=allow_code)
    own = {"trust_remote_code": spec.trust_remote_code, "revision": spec.revision}
    loaded = Loaded(empty_subject(subject), load_tokenizer(path, own))
    every = subject_batches(subject, loaded)
    provenance = run_provenance(subject, loaded, every, own_batches=False)
    with _recorded_comparison(subject, loaded.model, every, requests, provenance) as recorded:
        ran = run_in_vllm(subject, loaded.model, every, requests, recorded.drawn if recorded else None)
        let_go()
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


def _check_offered(subject: NamedSubject, requests: Sequence[Request], share: SampleShare) -> None:
    """Refuse what a pass in vLLM doesn't measure, before vLLM is started."""
    check_requests(requests, recorded=isinstance(subject.reference, Path))
    if subject.data.answers is not None or share.samples is not None or share.ranks.size > 1:
        raise InfraError("model.engine: vllm runs all windows of a text in one pass: leave answers and shares out")
    if asks_for_answers(requests):
        raise InfraError("model.engine: vllm answers no prompts here: ask it as a server, model.served, for generation")


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
    file = open_reference_file(subject.reference, str(subject.model.reference), requests)
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
        found = capture_in_transformers(
            _by_transformers(subject, attention), asked, allow_code, progress, ALL_SAMPLES, None
        )
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
            reference = open_reference_file(subject.reference, str(subject.model.reference), requests)
        elif compares(requests):
            reference = load_reference(subject, allow_code=allow_code)
        participants = [participant_of(reference, head, provenance)] if reference is not None else []
        rows = [torch.tensor([ids.tolist()]) for ids in capture.tokens]
        found = SharedPass(head, participants, rows, requests, progress, ALL_SAMPLES).own_part()
        assert found is not None
        found = with_model_of_reference(found, subject, reference)
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

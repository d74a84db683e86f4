"""Run a subject in vLLM, and what is compared with transformers beside it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from .in_transformers import capture_loaded
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
        capture, head = _capture_of(subject, loaded, every, requests, ran), None
        if predicted := predictions_of(requests):
            samples = [row.tolist() for row in capture.tokens]
            head = Loaded(served_head(subject, loaded.model, samples, ran), loaded.tokenizer)
            capture = _with_predictions(capture, subject, loaded, head, predicted, provenance, allow_code, progress)
        if ran.result["drafts"]:
            capture = _with_drafts(capture, np.array(ran.result["drafts"]))
        if recorded is not None:
            capture = recorded.added_to(capture, ran.rows)
    capture = _with_transformers(capture, subject, requests, head, allow_code, progress)
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


def _with_transformers(
    capture: Capture,
    subject: NamedSubject,
    requests: Sequence[Request],
    head: Loaded | None,
    allow_code: bool,
    progress: Progress | None,
) -> Capture:
    """Add what transformers has where two engines are compared, by its own attention and by eager's.

    `head`: what makes the engine's predictions, where some are asked for.
    """
    asked = [
        replace(request, statistics=frozenset({MOMENTS, TOKENS}))
        for request in requests
        if OTHER_ENGINE in request.statistics
    ]
    predicted = head if any(OTHER_PREDICTIONS in request.statistics for request in requests) else None
    if not asked and predicted is None:
        return capture
    rows = [torch.tensor([ids.tolist()]) for ids in capture.tokens]
    more: dict[SiteKey, dict[str, Array]] = {}
    with closing(_transformers_runs(subject, allow_code, both=predicted is not None)) as runs:
        for name, run, model, first in runs:
            if asked:
                for site, arrays in _beside(capture, capture_loaded(run, model, None, asked, progress), name).items():
                    more.setdefault(site, {}).update(arrays)
            if predicted is not None:  # eager attention's are held against those of transformers' own
                gap = _divergence(predicted if model is first else model, first, rows, progress)
                more.setdefault((LOGITS, LOGITS), {})[f"{name}_kl"] = gap
            del model, first  # or this frame keeps it beside the next one
    added = {site: {OTHER_PREDICTIONS} if site == (LOGITS, LOGITS) else () for site in more}
    sites = {site: capture.sites[site].having(added[site], arrays) for site, arrays in more.items()}
    return replace(capture, sites={**capture.sites, **sites})


def _transformers_runs(
    subject: NamedSubject, allow_code: bool, *, both: bool
) -> Generator[tuple[str, NamedSubject, Loaded, Loaded]]:
    """Yield transformers' model with its own attention, then with eager's: a name, what is run, it, and the first.

    `both`: the first one stays beside the second; else it is freed before.
    """
    held: list[Loaded] = []
    try:
        for name, attention in (("other", None), ("eager", "eager")):
            phase("transformers runs the same samples" + (" with eager attention" if attention else ""))
            own = _by_transformers(subject, attention)
            held.append(load_subject(own, allow_code=allow_code))
            yield name, own, held[-1], held[0]
            if not both:
                held.pop().close()
                let_go()
    finally:
        for each in held:
            each.close()
        held.clear()
        let_go()


def _beside(capture: Capture, found: Capture, name: str) -> dict[SiteKey, dict[str, Array]]:
    """Return the moments and maxima of another run's sites, by the names that they have beside a capture's own.

    Raises:
        InfraError: a layer is called otherwise.
    """
    arrays: dict[SiteKey, dict[str, Array]] = {}
    for site, theirs in found.sites.items():
        own = capture.sites[site]
        if theirs.sample.tolist() != own.sample.tolist() or theirs.lengths.tolist() != own.lengths.tolist():
            raise InfraError(f"vLLM and transformers call {site[0]} otherwise: exclude it from engine_gap")
        arrays[site] = {f"{name}_moments": theirs.moments, f"{name}_max": theirs.token_max}
    return arrays


def _divergence(own: Loaded, other: Loaded, rows: Sequence[Tensor], progress: Progress | None) -> Array:
    """Return the KL divergence of a model's predictions from another's at each position, in nats."""
    scores = [Request("", LOGITS, None, frozenset({SCORES, AGREEMENT}))]
    participants = [LiveReference(other.model, other.stream)]
    part = SharedPass(own, participants, rows, scores, progress, ALL_SAMPLES).own_part()
    assert part is not None
    return part.sites[LOGITS, LOGITS].scores[:, KL]


def _with_drafts(capture: Capture, drafts: Array) -> Capture:
    """Add what the checkpoint's own head of several tokens drafts behind each sample, [P, 2]."""
    lengths = np.array([len(ids) for ids in capture.tokens])
    owners = np.arange(len(lengths), dtype=np.int32), np.zeros(len(lengths), dtype=np.int32), lengths
    known = capture.sites.get((LOGITS, LOGITS)) or SiteNumbers("float32", (), True, frozenset(), *owners, {})
    return replace(capture, sites={**capture.sites, (LOGITS, LOGITS): known.having({DRAFTS}, {"drafts": drafts})})


def _by_transformers(subject: NamedSubject, attention: str | None) -> NamedSubject:
    settings = {"engine": Engine(), "attn_implementation": attention, "reference": None}
    return replace(subject, model=subject.model.model_copy(update=settings))


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

"""Load a subject, run its one pass, let the model go, and say what was run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...captures import Capture, Outline, Request, asks_for_answers, compares, with_weights, without_answers
from ...checkpoint import capture_weights
from ...common import Progress, earlier_objects_frozen
from ...suite import FileHashes, NamedSubject, Subject, files_of, identified
from ..load.adapters import source_of
from ..load.answers import unbatched
from ..load.generation import Prompts
from ..load.models import quiet
from ..load.outline import expected_outline, made_by_code
from ..load.sources import check_local
from ..modules import forward_errors
from ..reference.predicted import located_head
from ..reference.record import Recording, RecordOptions, record_model
from ..run.shared_pass import ALL_SAMPLES, SampleShare
from .data import run_provenance, subject_batches
from .in_transformers import capture_in_transformers
from .in_vllm import capture_in_vllm
from .models import let_go, load_subject, of_reference, open_reference_file


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
    with earlier_objects_frozen():  # or the collector looks through the libraries to give a model's memory back
        if subject.model.engine.name == "vllm":
            capture = capture_in_vllm(subject, of_pass, allow_code, progress, share)
        else:
            capture = capture_in_transformers(subject, of_pass, allow_code, progress, share, look)
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
        open_reference_file(subject.reference, str(subject.model.reference), requests)
        return
    with of_reference(subject) as reference:
        _expected_outline(reference, allow_code=allow_code)


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
        empty = Capture({}, provenance=run_provenance(subject, loaded, every, own_batches=False))
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
        let_go()

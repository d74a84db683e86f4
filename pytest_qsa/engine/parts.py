"""One load of a subject, and a pass over each of several disjoint parts of its data: how much its numbers vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..captures import Capture, Request, compares
from ..common import InfraError, Progress
from ..suite import Data, NamedSubject
from .load.data import windows_available
from .load.fit import check_layers, check_tokens
from .load.models import Loaded
from .subject import SampleShare, capture_loaded, load_reference, load_subject


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
    loaded = load_subject(subject, allow_code=allow_code)
    reference: Loaded | None = None
    try:
        if compares(requests):
            reference = _reference(subject, loaded, allow_code=allow_code)
        size = part_size(subject.data, loaded, subject.folder, parts)
        batch_size = subject.data.batch_size if size % subject.data.batch_size == 0 else 1
        data = subject.data.model_copy(update={"num_samples": size * parts, "batch_size": batch_size})
        subject = replace(subject, data=data)
        if reference is not None:
            check_tokens(data, loaded.tokenizer, reference.tokenizer, subject.folder)
        total = size * (parts + passes - 1)
        captures: list[Capture] = []
        activations = [request for request in requests if request.site != "weight"] or requests
        for index in [*range(parts), *[0] * (passes - 1)]:
            done, share = size * len(captures), SampleShare(samples=(size * index, size * (index + 1)))
            moved = None if progress is None else lambda count, _, done=done: progress(done + count, total)
            own = capture_loaded(subject, loaded, None, activations if captures else requests, moved, share, reference)
            captures.append(_with_weights(own, captures[0]) if captures else own)
    finally:
        for held in (loaded, reference):
            if held is not None:
                held.close()
    return captures[:parts], captures[parts:]


def _with_weights(capture: Capture, first: Capture) -> Capture:
    """Take the weights from the first part: they are the same in all of them."""
    weights = {site: numbers for site, numbers in first.sites.items() if site[1] == "weight"}
    return replace(capture, sites={**weights, **capture.sites}, plan=first.plan)


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
    """Return how many windows each part gets: `num_samples`, or as many as the text has.

    Raises:
        InfraError: there is no tokenizer, or not one window for each part.
    """
    available = windows_available(data, loaded.required_tokenizer("the model"), folder)
    size = data.num_samples if available is None else min(data.num_samples, available // parts)
    if size < 1:
        raise InfraError(
            f"too little text in '{data.source}' for {parts} parts: it has {available} windows of {data.seq_len}; "
            "lower data.seq_len or --parts"
        )
    return size

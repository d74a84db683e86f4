"""Load the models and the recorded reference of a subject, and give their memory back."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ...captures import Capture, Provenance, Request
from ...common import InfraError, QsaError, logger, phase, shown_path
from ...suite import NamedSubject, Subject
from ..load.models import Loaded, load_model, provenance_of
from ..modules import device_of
from ..reference.live import LiveReference, Reference
from ..reference.reference_file import ReferenceFile
from ..reference.replay import ReplayedReference, check_answerable


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
    with of_reference(subject) as reference:
        return load_subject(reference, allow_code=allow_code)


@contextmanager
def of_reference(subject: NamedSubject) -> Iterator[NamedSubject]:
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


def open_reference_file(path: Path, named: str, requests: Sequence[Request]) -> ReferenceFile:
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


def participant_of(reference: Loaded | ReferenceFile, loaded: Loaded, provenance: Provenance) -> Reference:
    """Return what takes part in the pass. `provenance`: the subject's, which may explain why samples differ."""
    if isinstance(reference, Loaded):
        return LiveReference(reference.model, reference.stream)
    device = loaded.stream.device if loaded.stream is not None else device_of(loaded.model)
    return ReplayedReference(reference, device, reference.origin(provenance))


def with_model_of_reference(capture: Capture, subject: Subject, reference: Loaded | ReferenceFile | None) -> Capture:
    """Say of the reference's own numbers which model made them; it runs the subject's data."""
    if capture.reference is None or not isinstance(reference, Loaded):
        return capture
    path = subject.reference.path if isinstance(subject.reference, NamedSubject) else ""
    theirs = Provenance(provenance_of(reference.model, path))
    return replace(capture, reference=replace(capture.reference, provenance=theirs))


def let_go() -> None:
    """Give back the memory of models that nothing names any more."""
    # Modules and their hooks refer to one another in circles, which only the collector frees.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

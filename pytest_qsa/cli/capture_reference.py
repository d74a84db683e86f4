"""`qsa capture --for-reference`: the original as a file that suites compare with, so that CI holds one model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..common import InfraError, SuiteError, shown_path
from .codes import OK
from .common import subject_of

if TYPE_CHECKING:
    from ..captures import Request
    from ..engine import Kept
    from ..suite import Subject, SuiteFile

MOST_ROWS = 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes for a reference."""
    group = parser.add_argument_group("a reference that suites name instead of the original")
    group.add_argument("--for-reference", action="store_true", help="keep the model for comparisons with it")
    group.add_argument("--rows", type=int, metavar="N", help="tokens that are kept of each sample and site; default: 4")
    group.add_argument("--rows-seed", type=int, metavar="N", help="the seed that they are drawn with; default: 0")
    group.add_argument("--with-head", action="store_true", help="keep the layer that makes logits in the file as well")


def check_options(options: argparse.Namespace) -> None:
    """Check that the options fit together.

    Raises:
        SuiteError: they don't.
    """
    given = [name for name in ("rows", "rows_seed", "with_head") if getattr(options, name) not in (None, False)]
    if given and not options.for_reference:
        raise SuiteError(f"--{given[0].replace('_', '-')} is for a reference: give --for-reference as well")
    if options.for_reference and options.samples:
        raise SuiteError("--samples: a reference is kept of all samples in one run; leave it out")
    if options.rows is not None and not 1 <= options.rows <= MOST_ROWS:
        raise SuiteError(f"--rows {options.rows}: write a number from 1 to {MOST_ROWS}")
    if options.rows_seed is not None and options.rows_seed < 0:
        raise SuiteError(f"--rows-seed {options.rows_seed}: write 0 or more")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Keep a reference.

    Raises:
        SuiteError: the suite is wrong, or doesn't say which model is the original.
        InfraError: the model or data can't be had, or the file can't be written.
    """
    from ..captures import merge_requests
    from ..common import progress_bar, write_atomically
    from ..engine import Keep, keep_subject
    from ..suite import make_suite, read_suite

    output = options.output
    source = read_suite(options.config)
    own = source.data.get("model") if isinstance(source.data, dict) else None
    named = isinstance(own, dict) and own.get("reference") is not None
    if not named and not any(each.startswith("model.reference=") for each in overrides):
        overrides = [*overrides, f"model.reference={output.absolute()}"]
    file = make_suite(source, overrides, "--")
    subject = _original(file, overrides, named=named)
    keep = Keep(options.rows or 4, options.rows_seed or 0, options.with_head)
    with progress_bar(subject.name) as progress:
        kept = keep_subject(
            subject, merge_requests(_requests(file)), keep, output, allow_code=options.qsa_allow_code, progress=progress
        )
    content = kept.content.to_bytes()
    try:
        write_atomically(output, content)
    except OSError as error:
        raise InfraError(f"{shown_path(output)} can't be written: {error.strerror or error}") from None
    print(f"{shown_path(output)}: {'; '.join(_told(kept, subject, len(content)))}")
    return OK


def _original(file: SuiteFile, overrides: Sequence[str], *, named: bool) -> Subject:
    """Return which model is kept: the one of --model.path, else the suite's reference, else its model."""
    from ..suite import is_kept, reference_of

    model, subject = subject_of(file)
    if any(each.startswith("model.path=") for each in overrides) or not named or model.reference is None:
        return replace(subject, model=model.model_copy(update={"reference": None}))
    if is_kept(subject):
        raise file.source.error(
            ("model", "reference"),
            f"{model.reference} is made of the original: say where that is, --model.path ORIGINAL",
        )
    original = reference_of(subject)
    assert original.model is not None
    return replace(original, model=original.model.model_copy(update={"reference": None}))


def _requests(file: SuiteFile) -> Iterator[Request]:
    from ..captures import against_reference
    from ..suite import MeasuredAssertion

    for assertion in file.assertions:
        if isinstance(assertion, MeasuredAssertion) and against_reference(assertion.request.statistics):
            yield assertion.request


def _told(kept: Kept, subject: Subject, size: int) -> Iterator[str]:
    content = kept.content
    sites = len({call[:2] for call, stream in content.streams.items() if stream.rows is not None})
    yield f"{len(content.samples)} samples of {subject.path}, {content.rows} tokens of each at {sites} sites"
    if content.head is None:
        yield f"nothing of what it predicts, for {kept.problem}"
    elif content.hidden is not None:
        head = "with the head" if content.weights else "the head is read from there"
        yield f"the last hidden states of {int(content.hidden.counts.sum()):,} tokens, {head}"
    yield f"{size / 1e6:.1f} MB"

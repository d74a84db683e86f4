"""Measure what a suite or configuration needs, all of it or some samples, and keep it as a file.

With --for-reference the model is kept as a reference file, which suites name in place of the original, so that CI loads
one model only.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from .. import captures, checkpoint, engine, suite
from ..common import InfraError, SuiteError, counted, shown_path, status, write_atomically
from .shared import (
    OK,
    add_allow_code,
    add_target,
    command_parser,
    parse_with_overrides,
    planned,
    say,
    source_of,
    writing,
)

EXAMPLES = (
    "qsa capture gate.qsa.yaml -o run.qsa",
    "qsa capture gate.qsa.yaml -o part-0.qsa --samples 0:8",
    "qsa capture gate.qsa.yaml -o original.qsa-reference --for-reference --model.path checkpoints/my-model",
)
MOST_ROWS = 4096


def run(arguments: Sequence[str]) -> int:
    """Run the command. A run that was interrupted goes on from its sums, which are kept beside the output.

    Raises:
        SuiteError: the suite is wrong, asks for nothing that a pass measures, or doesn't name the original.
        InfraError: the model or data can't be loaded, or the file can't be written.
    """
    parser = _parser()
    options, overrides = parse_with_overrides(parser, arguments)
    source = source_of(parser, options)
    _check_options(options)
    # Before the pass, which may take hours.
    if options.output.is_dir():
        raise InfraError(f"{shown_path(options.output)} is a folder: give -o the name of a file in it")
    if not options.output.absolute().parent.is_dir():
        folder = shown_path(options.output.absolute().parent)
        raise InfraError(f"there is no folder {folder} to write {options.output.name} in")
    held = (_keep_reference if options.for_reference else _keep_capture)(options, source, overrides)
    say(f"{shown_path(options.output)}: {held}")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __name__, __doc__, "TARGET -o FILE [--samples A:B | --for-reference] [--KEY VALUE …]", examples=EXAMPLES
    )
    add_target(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the capture goes")
    parser.add_argument("--samples", metavar="A:B", help="only the samples from A up to B, for `qsa merge`")
    add_allow_code(parser)
    group = parser.add_argument_group("a reference that suites name instead of the original")
    group.add_argument(
        "--for-reference",
        action="store_true",
        help="save a reference file of the model",
    )
    group.add_argument("--rows", type=int, metavar="N", help="tokens that are kept of each sample and site; default: 4")
    group.add_argument("--rows-seed", type=int, metavar="N", help="the seed that they are drawn with; default: 0")
    group.add_argument("--with-head", action="store_true", help="keep the layer that makes logits in the file as well")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    given = [name for name in ("rows", "rows_seed", "with_head") if getattr(options, name) not in (None, False)]
    if given and not options.for_reference:
        raise SuiteError(f"--{given[0].replace('_', '-')} is for a reference: give --for-reference as well")
    if options.for_reference and options.samples:
        raise SuiteError("--samples: a reference is kept of all samples in one run; leave it out")
    if options.rows is not None and not 1 <= options.rows <= MOST_ROWS:
        raise SuiteError(f"--rows {options.rows}: write a number from 1 to {MOST_ROWS}")
    if options.rows_seed is not None and options.rows_seed < 0:
        raise SuiteError(f"--rows-seed {options.rows_seed}: write 0 or more")


def _keep_capture(options: argparse.Namespace, source: suite.YamlSource, overrides: Sequence[str]) -> str:
    """Measure and write a capture; return what it holds."""
    file = suite.load_suite(source, overrides, "--")
    subject = suite.subject_of(file)
    if subject.model.logprobs_only:
        raise InfraError("a served model is asked by pytest alone: give the checkpoint to capture, --model.path")
    samples, code = _samples(options.samples), options.qsa_allow_code
    requests = _requests(file, _layers(file, subject, allow_code=code))
    hashes = suite.FileHashes(None)
    fingerprint = suite.fingerprint_of(subject, hashes, with_reference=captures.compares(requests))
    # An interrupted pass leaves its sums in a file. The fingerprint in its name lets only the same pass go on from it.
    partial = options.output.with_name(f"{options.output.name}.{fingerprint[:16]}.partial") if fingerprint else None
    share = engine.SampleShare(samples=samples, sums=captures.PartialSums(partial) if partial else None)
    with status(subject.name) as progress:
        capture = engine.capture_subject(subject, requests, allow_code=code, progress=progress, share=share)
    with writing(options.output):
        suite.identified(capture, subject, hashes).save(options.output)
    return f"{counted(len(capture.tokens), 'sample')}, {counted(len(capture.sites), 'site')}"


def _samples(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise SuiteError(f"--samples {text}: write A:B, the first sample and the one after the last, as in 0:8")
    return int(match[1]), int(match[2])


def _layers(file: suite.SuiteFile, subject: suite.NamedSubject, *, allow_code: bool) -> captures.LayerNames:
    """Return the names of the layers that patterns are about: of the files where no model runs, else of the model."""
    measured = [each.request for each in file.assertions if isinstance(each, suite.MeasuredAssertion)]
    of_pass, of_files = subject.divided(measured)
    if of_files and not of_pass:
        return checkpoint.weight_names(suite.files_of(subject))
    return engine.layer_names(subject.model, subject.path, subject.memory, allow_code=allow_code, base=subject.base)


def _requests(file: suite.SuiteFile, names: captures.LayerNames) -> list[captures.Request]:
    """Return the requests of the assertions, or without any those of the pictures; every pattern must match a layer."""
    requests = [each.request for each in file.assertions if isinstance(each, suite.MeasuredAssertion)]
    for request in requests:
        if request.site != captures.LOGITS:
            names.find(request.pattern, request.site, request.exclude, request.statistics)
    return requests or list(planned(file, names.called).requests)


def _keep_reference(options: argparse.Namespace, source: suite.YamlSource, overrides: Sequence[str]) -> str:
    """Run the original and write a reference file; return what it holds."""
    own = source.data.get("model")
    named = isinstance(own, dict) and own.get("reference") is not None
    if not named and not any(each.startswith("model.reference=") for each in overrides):
        # The assertions that compare need a reference to be valid: it is the file that is made here.
        overrides = [*overrides, f"model.reference={options.output.absolute()}"]
    file = suite.load_suite(source, overrides, "--")
    subject = _original(file, overrides, named=named)
    measured = [each.request for each in file.assertions if isinstance(each, suite.MeasuredAssertion)]
    requests = captures.merge_requests(each for each in measured if captures.against_reference(each.statistics))
    record = engine.RecordOptions(options.rows or 4, options.rows_seed or 0, options.with_head)
    with status(subject.name) as progress:
        recording = engine.record_reference(
            subject, requests, record, options.output, allow_code=options.qsa_allow_code, progress=progress
        )
    content = recording.content.to_bytes()
    with writing(options.output):
        write_atomically(options.output, content)
    return "; ".join(_reference_text(recording, subject, len(content)))


def _original(file: suite.SuiteFile, overrides: Sequence[str], *, named: bool) -> suite.NamedSubject:
    """Return the model to keep: that of --model.path, else the suite's reference, else the suite's model."""
    subject = suite.subject_of(file)
    original = subject
    if named and subject.reference is not None and not any(each.startswith("model.path=") for each in overrides):
        if isinstance(subject.reference, Path):
            raise file.source.error(
                ("model", "reference"),
                f"{subject.model.reference} is made of the original: say where that is, --model.path ORIGINAL",
            )
        original = subject.reference
    # A reference file is made of one model alone, run by what everybody can compare with: not in the subject's engine,
    # nor with its rounded cache.
    own = {"reference": None, "engine": suite.Engine(), "kv_cache": None}
    return replace(original, model=original.model.model_copy(update=own))


def _reference_text(recording: engine.Recording, subject: suite.NamedSubject, size: int) -> Iterator[str]:
    content = recording.content
    sites = len({call[:2] for call, rows in content.calls.items() if rows.rows is not None})
    yield f"{len(content.samples)} samples of {subject.path}, {content.rows} tokens of each at {sites} sites"
    if content.head is None:
        yield f"nothing of what it predicts, for {recording.problem}"
    elif content.hidden is not None:
        head = "with the head" if content.weights else "the head is read from there"
        yield f"the last hidden states of {int(content.hidden.counts.sum()):,} tokens, {head}"
    yield f"{size / 1e6:.1f} MB"

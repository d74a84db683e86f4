"""`qsa capture`: the pass alone, as a file; the whole of it, or the samples that one job of many is to run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common import InfraError, SuiteError, shown_path
from . import capture_reference as keeping
from .codes import OK
from .common import keep, planned, subject_of

if TYPE_CHECKING:
    from ..captures import PartialSums, Request
    from ..suite import SuiteFile


def run(arguments: Sequence[str]) -> int:
    """Run the command. A run that was stopped goes on where it was: its sums lie beside the output.

    Raises:
        SuiteError: the suite is wrong, or asks for nothing that a pass measures.
        InfraError: the model or data can't be had, or the file can't be written.
    """
    from ..captures import compares
    from ..common import progress_bar
    from ..engine import Share, capture_subject, layer_names
    from ..suite import FileHashes, fingerprint_of, identified, load_suite
    from .overrides import parse_with_overrides

    options, overrides = parse_with_overrides(_parser(), arguments)
    keeping.check_options(options)
    if not options.output.absolute().parent.is_dir():
        folder = shown_path(options.output.absolute().parent)
        raise InfraError(f"there is no folder {folder} to write {options.output.name} in")
    if options.for_reference:
        return keeping.run(options, overrides)
    file = load_suite(options.config, overrides, "--")
    model, subject = subject_of(file)
    samples, output, code = _samples(options.samples), options.output, options.qsa_allow_code
    requests = _requests(file, layer_names(model, subject.path, subject.memory, allow_code=code))
    hashes = FileHashes(None)
    share = Share(samples=samples, sums=_sums(output, fingerprint_of(subject, hashes, beside=compares(requests))))
    with progress_bar(subject.name) as progress:
        capture = capture_subject(subject, requests, allow_code=code, progress=progress, share=share)
    keep(identified(capture, subject, hashes), output)
    print(f"{shown_path(output)}: {len(capture.tokens)} samples, {len(capture.sites)} sites")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsa capture", usage="qsa capture --config FILE -o FILE [--samples A:B | --for-reference] [--KEY VALUE …]",
        description="Measure what a suite's assertions need (or, without any, a configuration's pictures), to a file.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a suite or configuration")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the capture goes")
    parser.add_argument("--samples", metavar="A:B", help="only the samples from A up to B, for `qsa merge`")
    keeping.add_options(parser)
    parser.add_argument("--qsa-allow-code", action="store_true", help="let the model run code of its own")
    return parser


def _samples(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise SuiteError(f"--samples {text}: write A:B, the first sample and the one after the last, as in 0:8")
    return int(match[1]), int(match[2])


def _sums(output: Path, fingerprint: str | None) -> PartialSums | None:
    """Return the place of an unfinished pass, under a name that another model, data or machine doesn't find."""
    from ..captures import PartialSums

    return PartialSums(output.with_name(f"{output.name}.{fingerprint[:16]}.partial")) if fingerprint else None


def _requests(file: SuiteFile, names: Sequence[str]) -> list[Request]:
    """Return what the assertions need, else what the pictures do; every pattern has to find one of the layers."""
    from ..captures import LOGITS, match_layers, no_match
    from ..suite import MeasuredAssertion

    requests = [each.request for each in file.assertions if isinstance(each, MeasuredAssertion)]
    for request in requests:
        if request.site != LOGITS and not match_layers(names, request.pattern, request.exclude):
            raise no_match(names, request.pattern, request.exclude)
    return requests or list(planned(file, names).requests)

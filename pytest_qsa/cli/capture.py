"""`qsa capture`: the pass alone, as a file; the whole of it, or the samples that one job of many is to run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InfraError, SuiteError, shown_path
from .codes import OK

if TYPE_CHECKING:
    from ..config import SuiteFile
    from ..plan import Request
    from ..subjects import Subject


def run(arguments: Sequence[str]) -> int:
    """Run the command. A run that was stopped goes on where it was: its sums lie beside the output.

    Raises:
        SuiteError: the suite is wrong, or asks for nothing that a pass measures.
        InfraError: the model or data can't be had, or the file can't be written.
    """
    from tqdm import tqdm

    from ..config import load_suite
    from ..engine.running import Share, capture_subject
    from ..partial import PartialSums
    from ..subjects import Subject
    from .overrides import read_overrides

    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    overrides = read_overrides(options, unknown)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    file = load_suite(options.config, overrides, "--")
    model = file.suite.model
    if model is None:
        raise SuiteError(f"{shown_path(options.config)}:1: there is no section 'model'")
    subject = Subject(model.id, model, file.suite.data, file.suite.memory, file.path.parent)
    output: Path = options.output
    if not output.absolute().parent.is_dir():
        raise InfraError(f"there is no folder {shown_path(output.absolute().parent)} to write {output.name} in")
    share = Share(samples=_samples(options.samples), sums=PartialSums(output.with_name(f"{output.name}.partial")))
    requests = _requests(file, subject, allow_code=options.qsa_allow_code)
    with tqdm(desc=f"qsa {subject.name}", unit="sample", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        capture = capture_subject(subject, requests, allow_code=options.qsa_allow_code, progress=progress, share=share)
    try:
        capture.save(output)
    except OSError as error:
        raise InfraError(f"{shown_path(output)} can't be written: {error.strerror or error}") from None
    print(f"{shown_path(output)}: {len(capture.tokens)} samples, {len(capture.sites)} sites")
    return OK


def _parser() -> argparse.ArgumentParser:
    from .overrides import add_overrides

    parser = argparse.ArgumentParser(
        prog="qsa capture", usage="qsa capture --config FILE -o FILE [--samples A:B] [--KEY VALUE …]",
        description="Measure what a suite's assertions need (or, without any, a configuration's pictures), to a file.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a suite or configuration")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the capture goes")
    parser.add_argument("--samples", metavar="A:B", help="only the samples from A up to B, for `qsa merge`")
    parser.add_argument("--qsa-allow-code", action="store_true", help="let the model run code of its own")
    add_overrides(parser)
    return parser


def _samples(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise SuiteError(f"--samples {text}: write A:B, the first sample and the one after the last, as in 0:8")
    return int(match[1]), int(match[2])


def _requests(file: SuiteFile, subject: Subject, *, allow_code: bool) -> list[Request]:
    """Return what the assertions need, else what the pictures do; every pattern has to find a layer."""
    from ..analysis.planning import PatternError, plan_pictures
    from ..config.suite import MeasuredAssertion
    from ..engine.outline import layer_names
    from ..plan import match_layers, no_match

    assert subject.model is not None
    names = layer_names(subject.model, subject.path, subject.memory, allow_code=allow_code)
    requests = [each.request for each in file.assertions if isinstance(each, MeasuredAssertion)]
    for request in requests:
        if not match_layers(names, request.pattern, request.exclude):
            raise no_match(names, request.pattern, request.exclude)
    if requests:
        return requests
    try:
        pictures = plan_pictures(file.suite.visualization, names)
    except PatternError as error:
        raise file.source.error(error.location, str(error)) from None
    if not pictures.pictures:
        raise SuiteError(f"{shown_path(file.path)}:1: neither an assertion nor a picture asks for anything of a pass")
    return list(pictures.requests)

"""`qsa calibrate`: how much a suite's numbers vary when nothing is wrong, and bounds that leave them that room."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AnomalyError, InfraError, SuiteError, shown_path
from .codes import OK
from .common import subject_of

if TYPE_CHECKING:
    from ..calibration import Finding, Proposal, Sampled
    from ..config import SuiteFile

PARTS, PASSES, SIGMAS = 8, 2, 6.0
"""The defaults. Of six sigmas, for a maximum over samples has a longer tail than a mean (docs/bounds.md)."""


def run(arguments: Sequence[str]) -> int:
    """Print a bound for each that the suite has, and write them into it where that is asked for.

    Raises:
        SuiteError: the suite is wrong, or has nothing to calibrate.
        InfraError: the model or data can't be had, or the suite can't be written.
    """
    from ..config import load_suite
    from ..files import write_atomically
    from ..suite_edits import calibrated
    from .overrides import parse_with_overrides

    options, overrides = parse_with_overrides(_parser(), arguments)
    file = load_suite(options.suite, overrides, "--", noise=False)
    target = _target(options)
    sampled = sample(file, options)
    findings = [_finding(sampled, file, index, options.k) for index in range(len(file.assertions))]
    print("\n".join(lines_of(findings, sampled, file)))
    text = options.suite.read_bytes().decode("utf-8")
    own = {each.id: each.proposals for each in findings if each.proposals}
    changed, left = calibrated(text, own, data_text(sampled, file))
    if left:
        print(f"not in {options.suite.name} itself, so not written: {', '.join(left)}")
    if target is not None:
        write_atomically(target, changed.encode("utf-8"))
        print(f"{shown_path(target)} is written; look at what changed before you commit it")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsa calibrate", usage="qsa calibrate SUITE [options] [--KEY VALUE …]",
        description="Measure how much a suite's numbers vary over disjoint parts of its data and over repeated passes, "
        "and propose each bound as mean ± k sigma.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("suite", type=Path, metavar="SUITE", help="a suite with model and assertions")
    add_sampling(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the suite with these bounds there")
    parser.add_argument("--write", action="store_true", help="write them into the suite itself")
    parser.add_argument("--force", action="store_true", help="let --output replace a file")
    return parser


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the noise is measured."""
    parser.add_argument("--parts", type=_at_least(2), default=PARTS, metavar="N", help=f"of the data (default {PARTS})")
    parser.add_argument(
        "--passes", type=_at_least(1), default=PASSES, metavar="N", help=f"over the first part (default {PASSES})"
    )
    parser.add_argument("-k", type=_sigmas, default=SIGMAS, metavar="K", help=f"sigmas of room (default {SIGMAS:g})")
    parser.add_argument("--qsa-allow-code", action="store_true", help="let the model run code of its own")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number of {least} or more")
        return int(text)

    return number


def _sigmas(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1000")
    return value


def _target(options: argparse.Namespace) -> Path | None:
    """Return where the calibrated suite goes.

    Raises:
        InfraError: it may not be written there.
    """
    if options.write:
        return Path(options.suite)
    target: Path | None = options.output
    if target is not None and target.resolve().parent != options.suite.resolve().parent:
        raise InfraError(f"paths in a suite are relative to its folder: write {target.name} beside {options.suite}")
    if target is not None and target.exists() and not options.force:
        raise InfraError(f"{shown_path(target)} exists: give --force to replace it, or --write for the suite itself")
    return target


def sample(file: SuiteFile, options: argparse.Namespace) -> Sampled:
    """Run the suite's subject over parts of its data.

    Raises:
        SuiteError: no assertion needs a pass.
        InfraError: it can't be run.
    """
    from ..config import MeasuredAssertion
    from ..engine.parts import capture_parts
    from ..plan import merge_requests
    from ..progress import progress_bar

    _, subject = subject_of(file)
    requests = merge_requests(each.request for each in file.assertions if isinstance(each, MeasuredAssertion))
    if not requests:
        raise SuiteError(f"{shown_path(file.path)}:1: no assertion measures anything that could vary")
    with progress_bar(subject.name) as progress:
        return capture_parts(
            subject, requests, options.parts, options.passes, allow_code=options.qsa_allow_code, progress=progress
        )


def _finding(sampled: Sampled, file: SuiteFile, index: int, k: float) -> Finding:
    assertion = file.assertions[index]
    try:
        return sampled.finding(assertion, k)
    except AnomalyError as error:
        raise InfraError(f"{file.place_of(index)}: {assertion.id} can't be calibrated: {error}") from None


def data_text(sampled: Sampled, file: SuiteFile) -> str:
    """Say what was measured: `8 parts of 5 × 512 tokens`."""
    size = len(sampled.whole.tokens) // len(sampled.parts)
    return f"{len(sampled.parts)} parts of {size} × {file.suite.data.seq_len} tokens"


def lines_of(findings: Sequence[Finding], sampled: Sampled, file: SuiteFile) -> Iterator[str]:
    """Yield the table, and what is to be said of the rest."""
    model, data = file.suite.model, file.suite.data
    assert model is not None
    yield f"{model.id}: {data_text(sampled, file)} of {data.source}; {_repeats_text(sampled, file)}"
    rows = [_cells(each.id, proposal) for each in findings for proposal in each.proposals]
    table = [["assertion", "bound", "mean ± sigma", "floor", "proposed", "decided by"], *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table if rows else ():
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    yield from (f"{each.id}: {each.remark}" for each in findings if each.remark)


def _repeats_text(sampled: Sampled, file: SuiteFile) -> str:
    if not sampled.repeated:
        return "no pass was repeated"
    apart, many = sampled.repeats(file.assertions), len(sampled.repeated) + 1
    return f"{many} passes over one part differ by {apart:.2g}" if apart else f"{many} passes over one part are equal"


def _cells(name: str, each: Proposal) -> list[str]:
    noise, group = each.noise, f" of {each.group}" if each.group else ""
    return [
        name, f"{each.side}{group} {each.bound:g}", f"{noise.mean:g} ± {noise.sigma:g}",
        f"{noise.floor(each.side):.4g}", f"{each.proposed:g}", each.layer,
    ]  # fmt: skip

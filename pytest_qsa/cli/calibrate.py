"""Measure how much the numbers of a suite vary when nothing is wrong, and propose its bounds.

The numbers are measured over disjoint parts of the data and over repeated passes; each bound becomes mean ± k sigma.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import suite, tools
from ..common import InfraError, SuiteError, shown_path, status, write_atomically
from .shared import OK, add_sampling, command_parser, parse_with_overrides, roots_of, say, writing

SIZES = ("data.num_samples", "data.seq_len")

EXAMPLES = ("qsa calibrate gate.qsa.yaml", "qsa calibrate gate.qsa.yaml --parts 16 --write")


def run(arguments: Sequence[str]) -> int:
    """Print a proposal for each bound of the suite, and write them into it if asked to.

    Raises:
        SuiteError: the suite is wrong, no assertion measures anything, or the data would be of another size than its.
        InfraError: the model or data can't be loaded, or the suite can't be written.
    """
    options, overrides = parse_with_overrides(_parser(), arguments)
    file = _loaded(options, overrides)
    _check_size(file, options, overrides)
    target = _target(options)
    subject = suite.subject_of(file)
    with status(subject.name):
        sampled = tools.Sampled.of(subject, file, options.parts, options.passes, allow_code=options.qsa_allow_code)
    findings = [sampled.finding_at(file, index, options.k) for index in range(len(file.assertions))]
    say(*sampled.lines(findings, file))
    text = options.suite.read_bytes().decode("utf-8")  # as bytes, to keep its line ends
    proposals = {each.id: each.proposals for each in findings if each.proposals}
    changed, left = tools.calibrated(text, proposals, sampled.data_text(file))
    if left:
        say(f"not in {options.suite.name} itself, so not written: {', '.join(left)}")
    if target is not None:
        with writing(target):
            write_atomically(target, changed.encode("utf-8"))
        say(f"{shown_path(target)} is written; look at what changed before you commit it")
    return OK


def _loaded(options: argparse.Namespace, overrides: Sequence[str]) -> suite.SuiteFile:
    # Without the noise of an earlier calibration: a bound that it forbids now is what this command mends.
    return suite.load_suite(options.suite, overrides, "--", noise=False, roots=roots_of(options))


def _check_size(file: suite.SuiteFile, options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Refuse data of another size than the suite's, for how much a number varies follows from it.

    Raises:
        SuiteError: it is of another size.
    """
    kept = [each for each in overrides if each.partition("=")[0] not in SIZES]
    if len(kept) == len(overrides):
        return
    own, given = _loaded(options, kept).suite.data, file.suite.data
    if (own.num_samples, own.seq_len) != (given.num_samples, given.seq_len):
        other = f"{given.num_samples} × {given.seq_len} tokens are measured, and the suite runs on {own.num_samples}"
        advice = "change data in the suite instead, and calibrate it then"
        raise SuiteError(
            f"{shown_path(file.path)}: {other} × {own.seq_len}: its bounds would be of other data; {advice}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__name__, __doc__, "TARGET [options] [--KEY VALUE …]", examples=EXAMPLES)
    parser.add_argument("suite", type=Path, metavar="TARGET", help="a suite with model and assertions")
    add_sampling(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the suite with these bounds there")
    parser.add_argument("--write", action="store_true", help="write them into the suite itself")
    parser.add_argument("--force", action="store_true", help="let --output replace a file")
    return parser


def _target(options: argparse.Namespace) -> Path | None:
    """Return the file to write, if any.

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

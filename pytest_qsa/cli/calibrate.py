"""`qsa calibrate`: how much a suite's numbers vary when nothing is wrong, and bounds that leave them that room."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common import AnomalyError, InfraError, shown_path
from .codes import OK
from .sampling import add_sampling, data_text, lines_of, sample

if TYPE_CHECKING:
    from ..suite import SuiteFile
    from ..tools import Finding, Sampled


def run(arguments: Sequence[str]) -> int:
    """Print a bound for each that the suite has, and write them into it where that is asked for.

    Raises:
        SuiteError: the suite is wrong, or has nothing to calibrate.
        InfraError: the model or data can't be had, or the suite can't be written.
    """
    from ..common import write_atomically
    from ..suite import load_suite
    from ..tools import calibrated
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


def _finding(sampled: Sampled, file: SuiteFile, index: int, k: float) -> Finding:
    assertion = file.assertions[index]
    try:
        return sampled.finding(assertion, k)
    except AnomalyError as error:
        raise InfraError(f"{file.place_of(index)}: {assertion.id} can't be calibrated: {error}") from None

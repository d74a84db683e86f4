"""What `qsa calibrate` and `qsa init` have in common: how the noise is measured, and how it is told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..common import SuiteError, shown_path
from .common import subject_of

if TYPE_CHECKING:
    from ..suite import SuiteFile
    from ..tools import Finding, Proposal, Sampled

PARTS, PASSES, SIGMAS = 8, 2, 10.0
"""The defaults. Of ten sigmas, for one that comes from eight parts is itself uncertain (docs/bounds.md)."""


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


def sample(file: SuiteFile, options: argparse.Namespace) -> Sampled:
    """Run the suite's subject over parts of its data.

    Raises:
        SuiteError: no assertion needs a pass.
        InfraError: it can't be run.
    """
    from ..captures import merge, merge_requests
    from ..common import progress_bar
    from ..engine import capture_parts
    from ..suite import MeasuredAssertion
    from ..tools import Sampled

    _, subject = subject_of(file)
    requests = merge_requests(each.request for each in file.assertions if isinstance(each, MeasuredAssertion))
    if not requests:
        raise SuiteError(f"{shown_path(file.path)}:1: no assertion measures anything that could vary")
    with progress_bar(subject.name) as progress:
        parts, repeated = capture_parts(
            subject, requests, options.parts, options.passes, allow_code=options.qsa_allow_code, progress=progress
        )
    return Sampled(parts, merge(parts), repeated)


def data_text(sampled: Sampled, file: SuiteFile) -> str:
    """Say what was measured: `8 parts of 5 × 512 tokens`."""
    size = len(sampled.whole.tokens) // len(sampled.parts)
    return f"{len(sampled.parts)} parts of {size} × {file.suite.data.seq_len} tokens"


def lines_of(findings: Sequence[Finding], sampled: Sampled, file: SuiteFile, *, stated: bool = True) -> Iterator[str]:
    """Yield the table, and what is to be said of the rest. `stated`: the suite had bounds before."""
    model, data = file.suite.model, file.suite.data
    assert model is not None
    yield f"{model.id}: {data_text(sampled, file)} of {data.source}; {_repeats_text(sampled, file)}"
    rows = [_cells(each.id, proposal, stated=stated) for each in findings for proposal in each.proposals]
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


def _cells(name: str, each: Proposal, *, stated: bool) -> list[str]:
    noise, group = each.noise, f" of {each.group}" if each.group else ""
    bound = f" {each.bound:g}" if stated else ""
    return [
        name, f"{each.side}{group}{bound}", f"{noise.mean:g} ± {noise.sigma:g}",
        f"{noise.floor(each.side):.4g}", f"{each.proposed:g}", each.layer,
    ]  # fmt: skip

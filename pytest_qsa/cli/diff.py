"""Show what moved between two versions of a model, from captures, baselines or reports.

A side is a capture (.qsa), a baseline, a folder of baselines, or a report.json; PATH::SUBJECT picks one of several
subjects. No model is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import tools
from ..common import counted, shown_path, write_atomically
from .shared import FAILED, OK, command_parser, say, writing

EXAMPLES = (
    "qsa diff old.qsa new.qsa",
    "qsa diff qsa_baselines/my-model qsa-results/report.json --fail-on 'magnitude.median > 5%' --markdown diff.md",
)


def run(arguments: Sequence[str]) -> int:
    """Compare two sides, print what moved, and check the conditions; return 1 where one is broken.

    Raises:
        QsaError: a side can't be read, or the two can't be compared.
    """
    options = _parser().parse_args(arguments)

    # First, so that a misspelt condition is reported before any large file is read.
    conditions = tools.parse_all(options.fail_on)
    also = [condition.metric for condition in conditions if condition.metric is not None]
    diff = tools.compare_sides(tools.read_side(options.old), tools.read_side(options.new), also, options.threshold)
    red = [change for condition in conditions for change in condition.broken_by(diff)]
    failures = [(condition.text, condition.violations(diff)) for condition in conditions]
    say(*tools.diff_lines(diff, options.top, options.least))
    if options.html is not None:
        _write(options.html, tools.diff_page(diff, failures, options.least, red))
    if options.markdown is not None:
        _write(options.markdown, tools.diff_markdown(diff, failures, options.top, options.least))
    for text, lines in failures:
        say("", f"{'FAILED' if lines else 'holds'}  {text}" + (f": in {counted(len(lines), 'layer')}" if lines else ""))
        for line in lines[: options.top]:
            say(f"  {line}")
    return FAILED if any(lines for _, lines in failures) else OK


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__name__, __doc__, examples=EXAMPLES)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the comparison as a page")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write it as a comment for a pull request")
    parser.add_argument(
        "--fail-on",
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit with 1 where a layer breaks it, such as 'magnitude.top1 > 5%%', 'rms@weight > +1%%' or "
        "'new_outliers > 0'; repeatable",
    )
    parser.add_argument("--top", type=int, default=20, metavar="N", help="how many layers to list (default: 20)")
    # argparse formats its help with %, so that a percent sign is doubled.
    parser.add_argument(
        "--least", type=_share, default=0.01, metavar="N%", help="the change from which on a layer moved (default: 1%%)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=64.0,
        metavar="N",
        help="an outlier token is above N × the median of its sample (default: 64)",
    )
    return parser


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def _write(path: Path, content: str) -> None:
    with writing(path):
        write_atomically(path, content)
    say("", f"written: {shown_path(path)}")

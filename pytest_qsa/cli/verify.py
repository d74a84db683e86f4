"""Say whether a checkpoint is the one that passed: its files, all tests of the tier, nothing overridden. No torch.

REPORT is the report.json of a run with --qsa-report=always. The exit code is 0 only if CHECKPOINT has the very files
that the run judged, all tests of its tier ran and passed, and nothing was overridden.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .. import suite, tools
from .shared import FAILED, OK, add_allow_path, command_parser, roots_of, say, writing

EXAMPLES = (
    "qsa verify qsa-results/report.json checkpoints/my-model",
    "qsa verify qsa-results/report.json checkpoints/my-model --suite gate.qsa.yaml --statement pass.json",
)


def run(arguments: Sequence[str]) -> int:
    """Verify a checkpoint, and write the statement if it holds; return 1 where it doesn't.

    Raises:
        InfraError: the report or the checkpoint can't be read, or the report was changed.
        SuiteError: the file is no report with a manifest, or a suite is wrong.
    """
    parser = command_parser(__name__, __doc__, examples=EXAMPLES)
    parser.add_argument("report", type=Path, metavar="REPORT", help="the report.json of the run")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the folder that ships")
    parser.add_argument(
        "--suite", type=Path, action="append", default=[], metavar="SUITE",
        help="must be a suite of the run, with the baselines that it was held against; repeatable",
    )  # fmt: skip
    parser.add_argument("--base", type=Path, metavar="DIR", help="where an adapter's base lies, if not where it was")
    parser.add_argument("--tier", choices=suite.TIERS, help="refuse a run of an earlier tier")
    parser.add_argument("--allow-waivers", action="store_true", help="a waiver that was used is no override")
    parser.add_argument("--statement", type=Path, metavar="FILE", help="write an in-toto statement for a signer")
    add_allow_path(parser)
    given = parser.parse_args(arguments)
    demands = tools.Demands(given.suite, given.base, given.tier, given.allow_waivers, roots_of(given))
    found = tools.verify(given.report, given.checkpoint, demands)
    say(*(f"holds  {text}" for text in found.held))
    if found.problems:
        say(*(f"FAILED {text}" for text in found.problems), file=sys.stderr)
        return FAILED
    if given.statement is not None:
        with writing(given.statement):
            tools.write_statement(found, given.report, given.statement)
        say(f"written: {given.statement}")
    return OK

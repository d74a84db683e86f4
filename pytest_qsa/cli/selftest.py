"""Put faults into copies of a checkpoint, one at a time, and see which of them a suite catches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from .. import checkpoint, suite, tools
from ..common import InfraError, SuiteError, phase, shown_path, status
from .shared import FAILED, OK, add_allow_path, between, command_parser, roots_of, say, writing

EXAMPLES = (
    "qsa selftest gate.qsa.yaml",
    "qsa selftest gate.qsa.yaml --min-score 0.9 --output DIR",
    "qsa selftest --list",
)


def run(arguments: Sequence[str]) -> int:
    """Print what became of each fault; return 1 where the mutation score is below `--min-score`.

    Raises:
        SuiteError: the suite is wrong, names no checkpoint, or fails on the unchanged one; or there is no such fault.
        InfraError: there is no such suite or checkpoint, or pytest can't run.
    """
    parser = _parser()
    options, more = parser.parse_known_args(arguments)  # pytest gets what the parser doesn't know
    if options.list:
        return _list()
    if options.suite is None:
        parser.error("give a suite")
    faults = tools.chosen([name for names in options.faults for name in names.split(",") if name])
    test = _selftest(options, more)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with status(shown_path(test.suite), live=False):
        outcomes = list(test.run(faults, _tell))
    say(*tools.lines_of(outcomes))
    score = tools.score_of(outcomes)
    passed = options.min_score is None or score >= options.min_score
    if options.output is not None:
        session = {
            "suite": shown_path(test.suite),
            "model": shown_path(test.folder.path),
            "started": started,
            "min_score": options.min_score,
            "passed": passed,
            "arguments": list(test.arguments),
        }
        with writing(options.output):
            say(f"report: {shown_path(tools.write_outcomes(outcomes, options.output, session))}")
    if not passed:
        say(f"qsa: {tools.score_line(outcomes)}, and --min-score asks for {options.min_score:.0%}", file=sys.stderr)
    return OK if passed else FAILED


def _tell(text: str) -> None:
    phase(text)
    say(f"… {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__name__, __doc__, "TARGET [options] [-- more arguments for pytest]", examples=EXAMPLES)
    parser.add_argument("suite", nargs="?", type=Path, metavar="TARGET", help="a suite with model.path")
    parser.add_argument("--model", metavar="PATH", help="another checkpoint than the suite's own, to be broken")
    parser.add_argument("--faults", action="append", default=[], metavar="A,B", help="only these (--list names all)")
    parser.add_argument("--layers", metavar="REGEX", help="put faults only into layers that it finds")
    parser.add_argument("--min-score", type=between(0, 1), metavar="X", help="exit with 1 below this share, 0.95 say")
    parser.add_argument("--first", action="store_true", help="stop each run at the first assertion that fails")
    parser.add_argument(
        "--bisect",
        choices=("slipped", "all", "none"),
        default="slipped",
        help="look for the smallest strength that is caught (default: of what slipped through)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write selftest.json, .md and .html there")
    parser.add_argument(
        "--perplexity",
        action=argparse.BooleanOptionalAction,
        help="what a gate on perplexity alone would catch (default: where the suite makes a pass, and without --first)",
    )
    add_allow_path(parser)
    parser.add_argument("--list", action="store_true", help="list the faults")
    return parser


def _list() -> int:

    for fault in tools.FAULTS.values():
        strength = f"{fault.default:g} {fault.unit}, up to {fault.strongest:g}" if fault.graded else "one strength"
        say(f"{fault.name:<22}{fault.text} ({strength})")
    return OK


def _selftest(options: argparse.Namespace, more: Sequence[str]) -> tools.Selftest:
    """Return the self-test of a suite, on its own checkpoint or that of `--model`."""
    if not options.suite.is_file():
        raise InfraError(f"{options.suite}: there is no such suite")
    file = suite.load_suite(options.suite, roots=roots_of(options))
    model = file.suite.model
    path = options.model or (model.path if model else None)
    if path is None:
        raise SuiteError(f"{shown_path(options.suite)} names no checkpoint in model.path: give --model")
    # A path of the command line is relative to where one stands, that of a suite to its folder.
    local = (Path.cwd() if options.model else options.suite.parent) / path
    # The revision pins the suite's own hub id and means nothing for another checkpoint.
    revision = model.revision if model and not options.model else None
    gguf = model.gguf_file if model else None
    if (local / checkpoint.ADAPTER).is_file() and not (local / "config.json").is_file():
        raise InfraError(
            f"{shown_path(local)} holds an adapter, and faults are put into a whole model: give --model BASE"
        )
    folder = checkpoint.open_folder(local if local.is_dir() else path, revision, gguf)
    wanted = options.perplexity
    if wanted is None:
        # To compare with perplexity takes a pass for each fault, which a suite of static checks spares.
        wanted = tools.makes_a_pass(file) and not options.first
    return tools.Selftest(
        options.suite,
        folder,
        arguments=tuple(word for word in more if word != "--"),
        layers=options.layers,
        allowed=file.boundary.allowed,
        first_only=options.first,
        bisect=options.bisect,
        perplexity=tools.perplexity_suite(file) if wanted else "",
    )

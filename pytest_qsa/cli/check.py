"""Check suites without running them, and that a change doesn't loosen them. Neither a model nor torch is loaded.

Each wrong suite is told with its file and line. With `--against REF`, suites and baselines are compared with those of a
git commit: whatever was removed, moved to a later tier, loosened or waived, and each baseline that moved, is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import suite, tools
from ..common import SuiteError, counted, shown_path, write_atomically
from .shared import FAILED, OK, SUITE_IS_WRONG, add_allow_path, command_parser, roots_of, say, writing

EXAMPLES = (
    "qsa check gates/",
    "qsa check gate.qsa.yaml --against origin/main --markdown changes.md",
)


def run(arguments: Sequence[str]) -> int:
    """Check each suite, whatever is wrong with the others; return 2 where one is wrong, 1 where one was loosened.

    Raises:
        SuiteError: there is no suite to check.
        InfraError: the commit of `--against` can't be read.
    """
    parser = command_parser(__name__, __doc__, examples=EXAMPLES)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path()], metavar="PATH", help="a suite, or a folder")
    add_allow_path(parser)
    parser.add_argument("--against", metavar="REF", help="the commit that may not be loosened, such as origin/main")
    parser.add_argument("--allow-loosening", action="store_true", help="list what was loosened, and exit with 0")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the comparison for a pull request")
    options = parser.parse_args(arguments)
    if options.against is None and (options.allow_loosening or options.markdown):
        parser.error("--allow-loosening and --markdown are for a comparison: give --against REF")
    first = options.paths[0] if options.paths[0].is_dir() else options.paths[0].parent
    revision = tools.Revision.of(options.against, first) if options.against is not None else None
    roots = roots_of(options)
    suites, wrong = _checked(options.paths, revision, roots)
    if revision is None:
        return SUITE_IS_WRONG if wrong else OK
    found = tools.compared(options.paths, suites, revision, roots)
    if options.markdown is not None:
        with writing(options.markdown):
            write_atomically(options.markdown, tools.loosening_markdown(found, revision))
    failed = _told(found, revision, allowed=options.allow_loosening)
    return SUITE_IS_WRONG if wrong else FAILED if failed else OK


def _checked(
    paths: Sequence[Path], revision: tools.Revision | None, roots: suite.Roots
) -> tuple[list[suite.SuiteFile], int]:
    """Load every suite, and say what is wrong with each; return the sound ones, and how many are wrong."""
    # A suite may be named twice, by its own path and by its folder's.
    files = dict.fromkeys(found for path in paths for found in _suites_at(path, revision))
    suites: list[suite.SuiteFile] = []
    for path in files:
        try:
            loaded = suite.load_suite(path, roots=roots)
        except SuiteError as error:
            say(str(error), file=sys.stderr)
            continue
        suites.append(loaded)
        count = len(loaded.assertions)
        say(f"{shown_path(path)}: {counted(count, 'assertion') if count else 'no assertions yet'}")
    wrong, assertions = len(files) - len(suites), sum(len(loaded.assertions) for loaded in suites)
    verdict = f": {wrong} wrong" if wrong else f", {counted(assertions, 'assertion')}: all valid"
    say(f"{counted(len(files), 'suite')}{verdict}")
    return suites, wrong


def _told(found: Sequence[tools.Loosening], revision: tools.Revision, *, allowed: bool) -> bool:
    """List what was loosened, one a line; return whether that is an error."""
    say(*map(str, found))
    count = sum(each.counts for each in found)
    accepted = ", which --allow-loosening accepts" if allowed else ": a person may accept it by --allow-loosening"
    looser = f"looser than at {revision.shown} in {counted(count, 'place')}{accepted}"
    say(looser if count else f"as strict as at {revision.shown}")
    return bool(count) and not allowed


def _suites_at(path: Path, revision: tools.Revision | None) -> Iterator[Path]:
    """Yield a file as it is, or the suites below a folder in the order of their paths.

    In a comparison one that is gone is told as removed, and a Python test has baselines alone.

    Raises:
        SuiteError: there is nothing to check.
    """
    if not path.is_dir():
        here = path.exists() or revision is None or revision.text(path) is None
        if here and (revision is None or path.suffix != ".py"):
            yield path
        return
    below = {*path.rglob("*.qsa.yaml"), *path.rglob("*.qsa.yml")}
    # Hidden folders hold environments and copies that are no part of the project.
    found = sorted(file for file in below if not any(part[0] == "." for part in file.relative_to(path).parts))
    if not found and (revision is None or not revision.has_gates(path)):
        raise SuiteError(f"{shown_path(path)}: there is no suite (*.qsa.yaml) in this folder or below it")
    yield from found

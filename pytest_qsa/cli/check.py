"""Check suites without running them: each wrong one with its file and line. Neither a model nor torch is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import suite
from ..common import SuiteError, counted, shown_path
from .shared import OK, SUITE_IS_WRONG, add_allow_path, command_parser, roots_of, say


def run(arguments: Sequence[str]) -> int:
    """Check each suite, whatever is wrong with the others; return 2 where one is wrong.

    Raises:
        SuiteError: there is no suite to check.
    """
    parser = command_parser(__name__, __doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path()], metavar="PATH", help="a suite, or a folder")
    add_allow_path(parser)
    options = parser.parse_args(arguments)
    roots = roots_of(options)
    # A suite may be named twice, by its own path and by its folder's.
    suites = dict.fromkeys(found for path in options.paths for found in _suites_at(path))
    assertions, wrong = 0, 0
    for path in suites:
        try:
            count = len(suite.load_suite(path, roots=roots).assertions)
        except SuiteError as error:
            wrong += 1
            say(str(error), file=sys.stderr)
            continue
        assertions += count
        say(f"{shown_path(path)}: {counted(count, 'assertion') if count else 'no assertions yet'}")
    verdict = f": {wrong} wrong" if wrong else f", {counted(assertions, 'assertion')}: all valid"
    say(f"{counted(len(suites), 'suite')}{verdict}")
    return SUITE_IS_WRONG if wrong else OK


def _suites_at(path: Path) -> Iterator[Path]:
    """Yield a file as it is, or the suites below a folder in the order of their paths.

    Raises:
        SuiteError: there is none.
    """
    if not path.is_dir():
        yield path
        return
    below = {*path.rglob("*.qsa.yaml"), *path.rglob("*.qsa.yml")}
    # Hidden folders hold environments and copies that are no part of the project.
    found = sorted(file for file in below if not any(part[0] == "." for part in file.relative_to(path).parts))
    if not found:
        raise SuiteError(f"{shown_path(path)}: there is no suite (*.qsa.yaml) in this folder or below it")
    yield from found

"""Show how the numbers of a suite moved over the releases: baselines at git tags as steps, reports as points.

Nothing is kept for it: it reads the baselines that each tag has in git, those of the working tree, and the reports that
--reports names. SUITE may be left out where the folder has one suite; SUITE::ID is about one assertion.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .. import report, suite, tools
from ..common import SuiteError, shown_path
from .compare import put
from .shared import OK, add_allow_path, command_parser, roots_of

EXAMPLES = (
    "qsa history gate.qsa.yaml",
    "qsa history gate.qsa.yaml::drift --reports 'qsa-results/runs/*/report.json' -o history.html",
)


def run(arguments: Sequence[str]) -> int:
    """Print or write the history.

    Raises:
        SuiteError: the suite is wrong or has no such assertion, or a file is no report.
        InfraError: there is no number, a report can't be read, or the file can't be written.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    path, _, name = (options.suite or shown_path(_only_suite())).partition("::")
    file = suite.load_suite(suite.read_suite(Path(path), roots_of(options)))
    history = tools.Historian(file, name or None, options.layer, options.reports).read()
    put(_written(parser, history, options, shlex.join(["qsa", "history", *arguments])), options.output)
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __name__, __doc__, "[SUITE[::ID]] [--reports GLOB] [--layer NAME] [options]", examples=EXAMPLES
    )
    parser.add_argument("suite", nargs="?", metavar="SUITE[::ID]", help="a suite, or one of its assertions")
    parser.add_argument("--reports", action="append", default=[], metavar="GLOB", help="reports of runs; repeatable")
    parser.add_argument("--layer", metavar="NAME", help="the number of this layer, instead of the worst one's")
    parser.add_argument(
        "--format", choices=("text", "html", "md", "csv", "svg"), help="default: by -o's suffix, else text"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there")
    parser.add_argument("--last", type=int, default=12, metavar="N", help="points in text and md (default 12)")
    add_allow_path(parser)
    return parser


def _only_suite() -> Path:
    """Return the suite of the current folder.

    Raises:
        SuiteError: there is none, or there are several.
    """
    found = sorted({*Path().glob("*.qsa.yaml"), *Path().glob("*.qsa.yml")})
    if len(found) != 1:
        have = f"has {', '.join(path.name for path in found)}" if found else "has no suite"
        raise SuiteError(f"name a suite: the current folder {have}")
    return found[0]


def _written(
    parser: argparse.ArgumentParser, history: report.History, options: argparse.Namespace, command: str
) -> str | Iterable[str]:
    suffix = options.output.suffix.removeprefix(".") if options.output is not None else ""
    form = options.format or {"htm": "html", "markdown": "md"}.get(suffix, suffix)
    if form == "svg" and len(history.tracks) != 1:
        parser.error("a plot is of one assertion: name SUITE::ID, or write html")
    forms: dict[str, Callable[[], str | Iterable[str]]] = {
        "html": lambda: report.history_page(history, command),
        "md": lambda: report.history_markdown(history, options.last),
        "csv": lambda: report.history_csv(history),
        "svg": lambda: report.history_plot(history.tracks[0]),
    }
    return forms.get(form, lambda: report.history_lines(history, options.last))()

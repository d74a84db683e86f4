"""Put checkpoints, captures or reports side by side: a row a metric and a column each, then a row a layer.

A TARGET is [NAME=]PATH: a checkpoint's folder, a GGUF file or a hub id, which are measured here; a capture (.qsa); or a
report.json, of which PATH::SUBJECT picks a subject. Without a suite these are compared: KL divergence, margin_ratio,
overlap, ln_ppl_ratio, and the SQNR of blocks and weights, all against --reference; and the size of the files.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .. import report, suite, tools
from ..common import shown_path, visible, write_atomically
from .shared import (
    FAILED,
    OK,
    add_allow_code,
    command_parser,
    parse_with_overrides,
    roots_of,
    say,
    writing,
)

EXAMPLES = (
    "qsa compare checkpoints/int8 checkpoints/w4a16 --reference checkpoints/original",
    "qsa compare checkpoints/int8 w4=checkpoints/w4a16 --suite gate.qsa.yaml --format html -o compare.html",
    "qsa compare qsa-results/report.json last-week/report.json::my-model",
)


def run(arguments: Sequence[str]) -> int:
    """Measure what has to be measured and print or write the comparison; 1 where something could not be measured.

    Raises:
        SuiteError: the suite or an option is wrong, or a file is of another kind.
        InfraError: a file can't be read or written.
        AnomalyError: the numbers can't be compared.
    """
    parser = _parser()
    options, overrides = parse_with_overrides(parser, arguments)
    comparison = measured(parser, options, overrides, [tools.Target.parse(text) for text in options.targets])
    text = _written(comparison, options, shlex.join(["qsa", "compare", *arguments]))
    put(text, options.output)
    return FAILED if any(cell and cell.stopped for line in comparison.lines for cell in line.cells) else OK


def measured(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    overrides: Sequence[str],
    targets: Sequence[tools.Target],
    *,
    more: Sequence[str] = (),
) -> report.Comparison:
    """Measure what has to be measured of targets, and put them side by side. `more`: metrics beside the usual ones.

    Raises:
        QsaError: as `run`.
    """
    file = _file(parser, options, overrides, targets)
    measurer = tools.Measurer(file, options.suite is not None, _cache(options), options.qsa_allow_code, tuple(more))
    columns: list[report.Column] = []
    for index, target in enumerate(targets, 1):
        if target.is_checkpoint and len(targets) > 1:
            say(f"[{index}/{len(targets)}] {target.label}", file=sys.stderr)
        columns += measurer.columns([target])
    return report.comparison_of(tools.distinct(columns))


def put(content: str | Iterable[str], output: Path | None) -> None:
    """Print a text or lines, or write them to a file and say so.

    Raises:
        InfraError: the file can't be written.
    """
    if output is None and isinstance(content, str):
        print(content, end="" if content.endswith("\n") else "\n")
    elif output is None:
        say(*content)
    else:
        with writing(output):
            write_atomically(output, content if isinstance(content, str) else "\n".join(map(visible, content)))
        say(f"written: {shown_path(output)}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __name__,
        __doc__,
        "TARGET TARGET … [--reference R] [--suite SUITE] [options] [--KEY VALUE …]",
        examples=EXAMPLES,
    )
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="[NAME=]PATH of a checkpoint, capture or report")
    add_measuring(parser)
    parser.add_argument("--format", choices=("text", "html", "md", "csv"), help="default: by -o's suffix, else text")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there")
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="layers of a metric in text and md (default 10)"
    )
    return parser


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Offer what says how targets are measured."""
    parser.add_argument("--reference", metavar="R", help="the original: a folder, a hub id, or a reference file")
    parser.add_argument(
        "--suite", type=Path, metavar="SUITE", help="compare by its assertions, with its bounds and data"
    )
    parser.add_argument("--qsa-cache", type=Path, metavar="DIR", help="where captures are kept")
    parser.add_argument("--qsa-no-cache", action="store_true", help="measure anew, and keep nothing")
    add_allow_code(parser)


def _file(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    overrides: Sequence[str],
    targets: Sequence[tools.Target],
) -> suite.SuiteFile | None:
    """Return the suite, or the sections of one that measures checkpoints; None where nothing is measured here."""
    if options.reference is not None:
        reference = Path(os.path.expanduser(options.reference))
        overrides = [*overrides, f"model.reference={reference.absolute() if reference.exists() else options.reference}"]
    if options.suite is not None:
        return suite.load_suite(suite.read_suite(options.suite, roots_of(options)), overrides, "--")
    checkpoints = [target for target in targets if target.is_checkpoint]
    if not checkpoints:
        return None
    if not any(each.startswith("model.reference=") for each in overrides):
        parser.error(
            "checkpoints are compared with their original: give --reference, or a suite that names it, --suite"
        )
    data = {"model": {"path": checkpoints[0].path}}
    # Its errors name the argument in the place of a file.
    return suite.load_suite(suite.YamlSource(Path("TARGET"), data, roots=roots_of(options)), overrides, "--")


def _cache(options: argparse.Namespace) -> Path | None:
    import platformdirs

    return None if options.qsa_no_cache else options.qsa_cache or platformdirs.user_cache_path("pytest-qsa")


def _written(comparison: report.Comparison, options: argparse.Namespace, command: str) -> str | Iterable[str]:
    suffix = options.output.suffix.removeprefix(".") if options.output is not None else ""
    form = options.format or {"htm": "html", "markdown": "md"}.get(suffix, suffix)
    forms: dict[str, Callable[[], str | Iterable[str]]] = {
        "html": lambda: report.comparison_page(comparison, command),
        "md": lambda: report.comparison_markdown(comparison, options.top),
        "csv": lambda: report.comparison_csv(comparison),
    }
    return forms.get(form, lambda: report.comparison_lines(comparison, options.top))()

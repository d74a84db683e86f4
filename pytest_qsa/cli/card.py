"""Write a Markdown table for a model card: what quantization did to a checkpoint, measured against its reference.

TARGET is a checkpoint, a capture or a report, as in `qsa compare`. The table says on what data, with which versions and
by which command it was measured, so that anyone can repeat it.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from .. import captures, report, suite, tools
from ..common import AnomalyError
from .compare import add_measuring, measured, put
from .shared import FAILED, OK, command_parser, parse_with_overrides

EXAMPLES = (
    "qsa card checkpoints/my-model-int8 --reference checkpoints/my-model",
    "qsa card checkpoints/my-model-int8 --suite gate.qsa.yaml -o table.md",
    "qsa card qsa-results/report.json::my-model-int8",
)


def run(arguments: Sequence[str]) -> int:
    """Measure a checkpoint and print or write its table; 1 where something could not be measured.

    Raises:
        SuiteError: the suite or an option is wrong.
        InfraError: a file can't be read or written.
        AnomalyError: the report has several subjects.
    """
    parser = _parser()
    options, overrides = parse_with_overrides(parser, arguments)
    target = tools.Target.parse(options.target)
    comparison = measured(parser, options, overrides, [target], more=("perplexity",))
    if len(comparison.columns) > 1:
        names = ", ".join(f"{options.target}::{name}" for name in comparison.names)
        raise AnomalyError(f"a card is of one checkpoint: pick one of {names}")
    card = report.model_card(comparison, shlex.join(["qsa", "card", *arguments]), _size_of_reference(comparison))
    put(card, options.output)
    return FAILED if any(cell and cell.stopped for line in comparison.lines for cell in line.cells) else OK


def _size_of_reference(comparison: report.Comparison) -> report.Size | None:
    """Return the size of the reference's files; None where they aren't here."""
    references = (captures.Provenance.of(result.get("run") or {}).reference for result in comparison.columns[0].results)
    path = next((each.path for each in references if each is not None and each.path), "")
    return tools.size_of(path, suite.Model(path=path)) if Path(path).is_dir() and path else None


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __name__, __doc__, "TARGET [--reference R] [--suite SUITE] [-o FILE] [--KEY VALUE …]", examples=EXAMPLES
    )
    parser.add_argument("target", metavar="TARGET", help="a checkpoint, a capture, or a report")
    add_measuring(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there")
    return parser

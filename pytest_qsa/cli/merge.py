"""Merge captures of disjoint samples, from any scheduler, into the capture of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import captures
from ..common import shown_path
from .shared import OK, command_parser, say, writing

EXAMPLES = ("qsa merge part-0.qsa part-1.qsa -o run.qsa",)


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        InfraError: a file is no capture, the captures can't be merged, or the result can't be written.
    """
    parser = command_parser(__name__, __doc__, examples=EXAMPLES)
    parser.add_argument("captures", nargs="+", type=Path, metavar="CAPTURE", help="a file of `qsa capture --samples`")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the result goes")
    options = parser.parse_args(arguments)
    merged = captures.merge([captures.Capture.load(path) for path in options.captures])
    with writing(options.output):
        merged.save(options.output)
    # None once all samples are in it.
    held = merged.provenance.samples
    missing = f", samples {held.first}:{held.end} of {held.total}" if held else ""
    say(f"{shown_path(options.output)}: {len(options.captures)} captures merged{missing}")
    return OK

"""`qsa merge`: captures of disjoint samples, from any scheduler, become the capture of all."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..common import shown_path
from .codes import OK
from .common import keep


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        InfraError: a file is no capture, or they can't be merged, or the result can't be written.
    """
    from ..captures import Capture, merge

    parser = argparse.ArgumentParser(prog="qsa merge", description="Merge captures of disjoint samples.")
    parser.add_argument("captures", nargs="+", type=Path, metavar="CAPTURE", help="a file of `qsa capture --samples`")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the result goes")
    options = parser.parse_args(arguments)
    merged = merge([Capture.load(path) for path in options.captures])
    keep(merged, options.output)
    held = merged.provenance.samples
    missing = f", samples {held.first}:{held.end} of {held.total}" if held else ""
    print(f"{shown_path(options.output)}: {len(options.captures)} captures merged{missing}")
    return OK

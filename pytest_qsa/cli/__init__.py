"""The commands of `qsa`: arguments and printing. `python -m pytest_qsa` is the same program."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

from ..common import QsaError, SuiteError
from .codes import FAILED, OK, SUITE_IS_WRONG, USAGE

COMMANDS: Mapping[str, str] = {
    "analyze": "draw and export what a configuration asks for, in one pass over its model",
    "capture": "measure what a suite or configuration needs, all of it or some samples, and keep it as a file",
    "merge": "merge captures of disjoint samples into the capture of all of them",
    "diff": "show what moved between two versions of a model, from captures, baselines or reports",
    "calibrate": "measure how much the numbers of a suite vary when nothing is wrong, and propose its bounds",
    "init": "write a first suite of a model, its bounds calibrated",
    "layers": "list a model's layers, or what a regex finds, without reading weights",
    "selftest": "put faults into copies of a checkpoint and see which of them a suite catches",
    "schema": "print the JSON Schema of suites, for editors",
}
"""Command, also the name of its module → one line of help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return pytest's own exit codes: 1 for a failure, 2 where a suite is wrong, 4 for a wrong usage."""
    parser = argparse.ArgumentParser(prog="qsa", description="Look at models and suites of pytest-qsa.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    try:
        options, rest = parser.parse_known_args(arguments)
        module = importlib.import_module(f".{options.command}", __name__)
        return int(module.run(rest))
    except SystemExit as stop:
        return USAGE if stop.code else OK
    except SuiteError as error:
        print(f"qsa: {error}", file=sys.stderr)
        return SUITE_IS_WRONG
    except QsaError as error:
        print(f"qsa: {error}", file=sys.stderr)
        return FAILED

"""The program `qsa`, also `python -m pytest_qsa`.

A command is a module of this package that has a function `run`. The name of the module is the command's, the first line
of its docstring is the command's help. The modules import whole rooms, `from .. import engine`: a room loads a module
of its own, and torch with it, when a command uses one of its names, so that `qsa --help` loads none.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from ..common import QsaError, SuiteError, one_line, own_cores, visible
from .shared import FAILED, OK, SUITE_IS_WRONG, USAGE, add_verbose, first_line, log_on_stderr, say

CLOSED_PIPE = 141
"""The exit code of a program that SIGPIPE ends: 128 + 13."""


def commands() -> Mapping[str, ModuleType]:
    """Return the modules of the commands by name."""
    names = (info.name for info in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f".{name}", __name__) for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "run")}


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line, without the line of our own code that raised it."""
    say(f"qsa: warning: {message}", file=sys.stderr)


class _Version(argparse.Action):
    """Prints the version, which is looked up only then: that takes as long as all else of `qsa --help`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        from .. import __version__

        print(f"pytest-qsa {__version__}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return pytest's own exit codes: 1 for a failure, 2 for a wrong suite, 4 for wrong usage."""
    parser = argparse.ArgumentParser(prog="qsa", description="Look at models and suites of pytest-qsa.")
    add_verbose(parser)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and stop")
    known = commands()
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in known.items():
        # Without help: `qsa merge --help` is for the parser of the command, which knows its options.
        subparsers.add_parser(name, help=first_line(module.__doc__), add_help=False)
    own_cores.watch()  # while a command imports torch, if it does
    with log_on_stderr(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            options, rest = parser.parse_known_args(arguments)
            code = int(known[options.command].run(rest))
            sys.stdout.flush()  # here, where a closed pipe is caught
            return code
        except SystemExit as stop:  # argparse: 2 for a mistake, 0 after --help
            return USAGE if stop.code else OK
        except BrokenPipeError:  # `qsa layers … | head` has read enough
            # Python flushes once more when it ends, and would print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return CLOSED_PIPE
        except OSError as error:  # a path that the system refuses, a full disk
            where = f" ({visible(str(error.filename))[:80]})" if error.filename else ""
            print(f"qsa: {one_line(error) if error.strerror is None else error.strerror}{where}", file=sys.stderr)
            return FAILED
        except QsaError as error:
            print(f"qsa: {error}", file=sys.stderr)
            return SUITE_IS_WRONG if isinstance(error, SuiteError) else FAILED

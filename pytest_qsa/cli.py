"""The program `qsa`; also `python -m pytest_qsa`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import QsaError, SuiteError

OK, SUITE_IS_WRONG, USAGE = 0, 2, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; return pytest's own exit codes: 2 where a suite is wrong, 4 for a wrong usage."""
    parser = argparse.ArgumentParser(prog="qsa", description="Look at models and suites of pytest-qsa.")
    commands = parser.add_subparsers(dest="command", required=True)
    layers = commands.add_parser("layers", help="list a model's layers, or what a regex finds, without reading weights")
    layers.add_argument("--config", type=Path, help="a suite or configuration, for its model section")
    layers.add_argument("--model", help="a folder or hub id, instead of --config")
    layers.add_argument("regex", nargs="?", help="show only the layers that it finds")
    commands.add_parser("schema", help="print the JSON Schema of suites, for editors")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return USAGE if stop.code else OK
    try:
        return _schema() if options.command == "schema" else _layers(options)
    except SuiteError as error:
        print(f"qsa: {error}", file=sys.stderr)
        return SUITE_IS_WRONG
    except QsaError as error:
        print(f"qsa: {error}", file=sys.stderr)
        return 1


def _schema() -> int:
    from .config import Suite

    print(json.dumps(Suite.model_json_schema(), indent=2))
    return OK


def _layers(options: argparse.Namespace) -> int:
    from .config import Data, Memory, Model, load_suite
    from .plan import match_layers, no_match
    from .subjects import Subject

    if (options.config is None) == (options.model is None):
        print("qsa layers: give one of --config and --model", file=sys.stderr)
        return USAGE
    model = load_suite(options.config).suite.model if options.config else Model(path=options.model)
    if model is None:
        raise SuiteError(f"{options.config}: there is no section 'model'")
    folder = options.config.parent if options.config else Path.cwd()
    from .engine.outline import outline

    rows = outline(model, Subject(model.id, model, Data(), Memory(), folder).path)
    names = [row[0] for row in rows]
    found = match_layers(names, options.regex) if options.regex else names
    if not found:
        raise no_match(names, options.regex, None)
    wanted = set(found)
    width = max(len(name) for name in found)
    for name, kind, shape, parameters in rows:
        if name in wanted:
            print(f"{name:<{width}}  {kind:<28}  {shape:<16}  {parameters:>13,}")
    print(f"{len(found)} of {len(rows)} layers")
    return OK

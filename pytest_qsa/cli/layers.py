"""`qsa layers`: what a regex of a suite would find, without reading weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..common import SuiteError
from .codes import OK


def run(arguments: Sequence[str]) -> int:
    """Print name, class, shape of the weight and number of parameters of the layers."""
    from ..captures import match_layers, no_match
    from ..suite import Data, Memory, Model, Subject, load_suite

    parser = argparse.ArgumentParser(prog="qsa layers", description="List a model's layers without reading weights.")
    parser.add_argument("--config", type=Path, help="a suite or configuration, for its model section")
    parser.add_argument("--model", help="a folder or hub id, instead of --config")
    parser.add_argument("regex", nargs="?", help="show only the layers that it finds")
    options = parser.parse_args(arguments)
    if (options.config is None) == (options.model is None):
        parser.error("give one of --config and --model")
    model = load_suite(options.config).suite.model if options.config else Model(path=options.model)
    if model is None:
        raise SuiteError(f"{options.config}: there is no section 'model'")
    folder = options.config.parent if options.config else Path.cwd()
    from ..engine import outline

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

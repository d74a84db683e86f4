"""Write a first suite of a model, its bounds calibrated.

Each assertion has a comment that says why it is there. With an original, --reference, the suite also compares with it.
With --kv-cache it gates the model with a quantized KV cache, against the same model without one.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from .. import suite, tools
from ..common import InfraError, SuiteError, shown_path, status, write_atomically
from .shared import OK, SUFFIXES, add_sampling, command_parser, parse_with_overrides, roots_of, say, writing

DOCUMENT = {"source": "document"}
EXAMPLES = (
    "qsa init checkpoints/my-model-int8",
    "qsa init checkpoints/my-model-int8 --reference checkpoints/my-model -o gate.qsa.yaml --data.num_samples 16",
    "qsa init checkpoints/my-model --kv-cache fp8_e4m3 -o kv.qsa.yaml",
)


def run(arguments: Sequence[str]) -> int:
    """Measure the model over parts of the data, write the suite and say what to run next.

    Raises:
        SuiteError: an option is wrong.
        InfraError: the model or data can't be loaded, or the file exists already.
    """
    options, overrides = parse_with_overrides(_parser(), arguments)
    target = options.output or Path(f"{_name(options.model)}.qsa.yaml")
    # Before the measuring, which takes most of the time.
    if target.suffix not in SUFFIXES:
        what = "pytest takes suites from .yaml and .yml files alone"
        raise SuiteError(f"-o {shown_path(target)}: {what}: name it {target.stem}.qsa.yaml")
    if target.exists() and not options.force:
        raise InfraError(f"{shown_path(target)} exists: give --force to replace it, or another -o")
    # As if it were read from the file that is to be written: messages and relative paths refer to that one.
    source = suite.YamlSource(target, _sections(options, target), roots=roots_of(options))
    subject = suite.subject_of(suite.load_suite(source, overrides, "--"))
    with status(subject.name):
        first = tools.first_suite(
            subject,
            source,
            overrides,
            options.parts,
            options.passes,
            options.k,
            allow_code=options.qsa_allow_code,
            generation=not options.no_answers,
        )
    with writing(target):
        write_atomically(target, first.text)
    say(*first.lines)
    shown = shown_path(target)
    say(f"{shown} is written: {len(first.ids)} assertions. Next:")
    if first.baselines:
        names = ", ".join(first.baselines)
        say(f"  pytest {shown} --snapshot-update    # once, for the baselines of {names}; commit them")
    say(f"  pytest {shown}")
    say(f"  qsa selftest {shown}    # which faults it would catch")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __name__,
        __doc__,
        "TARGET [--reference ORIGINAL | --kv-cache GRID] [-o FILE.qsa.yaml] [--KEY VALUE …]",
        examples=EXAMPLES,
    )
    parser.add_argument("model", metavar="TARGET", help="a checkpoint's folder, or a hub id")
    against = parser.add_mutually_exclusive_group()
    against.add_argument("--reference", metavar="ORIGINAL", help="what the model was made from: hold it against that")
    against.add_argument(
        "--kv-cache",
        choices=get_args(suite.KvCache),
        metavar="GRID",
        help=f"gate a quantized KV cache, against the same model without: {', '.join(get_args(suite.KvCache))}",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the model's name, .qsa.yaml")
    add_sampling(parser)
    parser.add_argument(
        "--no-answers", action="store_true", help="let the models answer no prompts, which takes longest"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    return parser


def _name(model: str) -> str:
    """Return the name of a folder or hub id, of the letters that the name of a model in a suite may have."""
    name = Path(os.path.abspath(model)).name if Path(model).is_dir() else model.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def _sections(options: argparse.Namespace, target: Path) -> dict[str, dict[str, Any]]:
    """Return the sections model and data of the suite, without overrides."""
    model = {"name": _name(options.model), "path": _named(options.model, target)}
    data = suite.Data().model_dump(include={"source", "num_samples", "seq_len", "seed"})
    if options.kv_cache is not None:
        # One text whose later parts refer to earlier ones: what the cache has lost is needed again.
        return {"model": {**model, "kv_cache": options.kv_cache, "reference": suite.SELF}, "data": data | DOCUMENT}
    if options.reference is not None:
        model["reference"] = _named(options.reference, target)
    return {"model": model, "data": data}


def _named(model: str, target: Path) -> str:
    """Return a folder relative to the suite's folder, and a hub id unchanged."""
    path = Path(os.path.expanduser(model))
    return os.path.relpath(path, target.parent) if path.is_dir() else model

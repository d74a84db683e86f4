"""Draw and export what a configuration asks for, in one pass over its model."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .. import captures, engine, suite, tools
from ..common import InfraError, counted, earlier_objects_frozen, shown_path, status
from .shared import (
    FAILED,
    OK,
    add_allow_code,
    add_target,
    command_parser,
    parse_with_overrides,
    planned,
    say,
    source_of,
    writing,
)

EXAMPLES = (
    "qsa analyze checkpoints/my-model",
    "qsa analyze configs/default.yaml --model.path checkpoints/my-model --enabled.distribution true",
    "qsa analyze gate.qsa.yaml --dry-run",
)
SHOWN_LAYERS = 20
"""How many layers are listed, as in quant-smooth-ana."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; 1 where a picture could not be drawn.

    Raises:
        SuiteError: the configuration is wrong, or a pattern matches no layer; before any weight is read.
        InfraError: nothing can be written where the pictures should go, or the model or data can't be loaded.
    """
    options, overrides, source = _options(arguments)
    file = suite.load_suite(source, overrides, "--")
    subject = suite.subject_of(file)
    layers = engine.layer_names(
        subject.model, subject.path, subject.memory, allow_code=options.qsa_allow_code, base=subject.base
    )
    names = layers.called  # thousands of experts would be no picture
    analysis = planned(file, names)
    visualization = file.suite.visualization
    folder = file.path.parent / Path(os.path.expanduser(visualization.save_dir))
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process prints for all
        if options.dry_run or options.verbose:
            _list(names, analysis, folder, verbose=options.verbose)
        for warning in analysis.warnings:
            _warn(warning)
    _check_writable(folder, make=not options.dry_run)  # before the pass, which may take hours
    if options.dry_run:
        say("dry run: nothing was loaded, nothing written")
        return OK
    started = time.perf_counter()
    with earlier_objects_frozen():  # or the collector looks through all that was imported, for a second
        capture = _captured(subject, analysis, options)
        if capture is None:  # under torchrun the first process draws
            return OK
        if options.verbose:
            say(f"measured in {time.perf_counter() - started:.1f} s")
        capture = capture.redacted() if options.redact else capture
        export = tools.Export(visualization, subject, analysis, capture, folder)
        return _write(export, shlex.join(["qsa", "analyze", *arguments]), verbose=options.verbose)


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str], suite.YamlSource]:
    parser = command_parser(
        __name__,
        __doc__,
        "TARGET [options] [--KEY VALUE …]",
        verbose="list each picture's layers",
        examples=EXAMPLES,
    )
    add_target(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be drawn, and stop")
    parser.add_argument(
        "--qsa-cache", type=Path, metavar="DIR", help="where captures are kept; default: the user's cache"
    )
    parser.add_argument("--qsa-no-cache", action="store_true", help="measure anew, and keep nothing")
    add_allow_code(parser)
    parser.add_argument(
        "--redact",
        "--qsa-redact",
        action="store_true",
        help="leave tokens, their text and their ids, out of all that is written",
    )
    options, overrides = parse_with_overrides(parser, arguments)
    return options, overrides, source_of(parser, options)


def _list(names: Sequence[str], analysis: tools.Analysis, folder: Path, *, verbose: bool) -> None:
    """Print the first layers of the model, the planned pictures, and the warnings about their patterns."""
    say(f"Total layers found: {len(names)}")
    say(f"Showing first {min(SHOWN_LAYERS, len(names))} layers:")
    for name in names[:SHOWN_LAYERS]:
        say(f"  {name}")
    say(f"Pictures, into {shown_path(folder)}:")
    width = max(len(picture.name) for picture in analysis.pictures)
    for picture in analysis.pictures:
        say(f"  {picture.name:<{width}}  {picture.site} of {counted(len(picture.layers), 'layer')}")
        if verbose:
            say(*(f"      {layer}" for layer in picture.layers))


def _check_writable(folder: Path, *, make: bool) -> None:
    """Check that the folder can be written, before the pass rather than after it."""
    # A dry run makes no folder, so the nearest one that exists stands for it.
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
            existing = folder
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InfraError(
            f"visualization.save_dir {shown_path(folder)}: can't be written: {error.strerror or error}; "
            "give another with --save_dir"
        ) from None


def _captured(subject: suite.Subject, analysis: tools.Analysis, options: argparse.Namespace) -> captures.Capture | None:
    """Return the capture. Under torchrun all processes make it, and the first one alone gets it."""
    import platformdirs

    cache = None if options.qsa_no_cache else options.qsa_cache or platformdirs.user_cache_path("pytest-qsa")
    with engine.joined() as ranks, status(subject.name) as progress:

        def make(requests: Sequence[captures.Request], sums: captures.PartialSums | None) -> captures.Capture:
            code, share = options.qsa_allow_code, engine.SampleShare(ranks=ranks, sums=sums)
            return engine.capture_subject(subject, requests, allow_code=code, progress=progress, share=share)

        def get(make: suite.MakeCapture) -> captures.Capture:
            return suite.Captures(cache=cache).get(subject.key, subject, analysis.requests, make)

        return ranks.led(get, make)


def _write(export: tools.Export, command: str, *, verbose: bool) -> int:
    with writing(export.folder):
        export.write(command, print if verbose else lambda _: None)
    for warning in export.warnings:
        _warn(warning)
    if verbose:
        for path in export.files:
            say(shown_path(path))
    for finding in export.findings:
        say(finding)
    page = next((path for path in export.files if path.suffix == ".html"), None)
    say(
        f"{counted(len(export.files), 'file')} in {shown_path(export.folder)}"
        + (f"; open {shown_path(page)}" if page else "")
    )
    for drawn in export.problems:
        say(f"qsa: {drawn.picture.name} was not drawn: {drawn.problem}", file=sys.stderr)
    return FAILED if export.problems else OK


def _warn(text: str) -> None:
    say(f"qsa: warning: {text}", file=sys.stderr)

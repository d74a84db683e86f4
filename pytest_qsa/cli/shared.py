"""What several commands use: exit codes, parsers, the log, pictures, and the error of a file that can't be written."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import InfraError, logger, shown_path

if TYPE_CHECKING:
    from ..suite import SuiteFile
    from ..tools import Analysis

OK, FAILED, SUITE_IS_WRONG, USAGE = 0, 1, 2, 4
"""The exit codes of `qsa`: pytest's own."""


def first_line(docstring: str | None) -> str:
    """Return the first line of a command's docstring as a line of help: `draw …` of `Draw ….`."""
    line = (docstring or "").partition("\n")[0].removesuffix(".")
    return line[:1].lower() + line[1:]


def command_parser(
    name: str, docstring: str | None, usage: str | None = None, *, verbose: str = ""
) -> argparse.ArgumentParser:
    """Return the parser of a command.

    `name`, `docstring`: those of its module. `usage`: what stands behind the command. `verbose`: what else `-v` does.
    """
    program = f"qsa {name.rpartition('.')[2]}"
    parser = argparse.ArgumentParser(prog=program, usage=usage and f"{program} {usage}", description=docstring)
    add_verbose(parser, verbose)
    return parser


class _Verbose(argparse.Action):
    """Lets `log_on_stderr` show the log."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, True)
        logger.setLevel(logging.DEBUG)


def add_verbose(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Offer `--verbose`, which stands before the command or after it. `also`: what else it does."""
    text = "; ".join(filter(None, (also, "log on stderr what is hashed, why a kept capture is used or not, and times")))
    parser.add_argument("-v", "--verbose", action=_Verbose, nargs=0, default=False, help=text)


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Print the package's log on stderr: its warnings, and all of it once `--verbose` is parsed."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(relativeCreated)8.0f ms  %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Offer `--qsa-allow-code`."""
    parser.add_argument("--qsa-allow-code", action="store_true", help="let the model run code of its own")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Offer how `qsa calibrate` and `qsa init` measure the noise."""
    parser.add_argument("--parts", type=_at_least(2), default=8, metavar="N", help="of the data (default 8)")
    parser.add_argument("--passes", type=_at_least(1), default=2, metavar="N", help="over the first part (default 2)")
    # Ten, because a sigma of eight parts is itself uncertain (docs/bounds.md).
    parser.add_argument("-k", type=between(0, 1000), default=10.0, metavar="K", help="sigmas of room (default 10)")
    add_allow_code(parser)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number of {least} or more")
        return int(text)

    return number


def between(low: float, high: float) -> Callable[[str], float]:
    """Return the type of an option that takes a number from `low` to `high`."""

    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return number


def planned(file: SuiteFile, names: Sequence[str]) -> Analysis:
    """Return the pictures that a file enables, with the layers that they show among a model's `names`.

    Raises:
        SuiteError: nothing is enabled, a pattern matches no layer, or there is no such sample; at its line.
    """
    from ..tools import PatternError, plan_pictures

    visualization, data = file.suite.visualization, file.suite.data
    if visualization.enabled.heatmap_3d and visualization.heatmap_3d.sample_idx >= data.num_samples:
        raise file.source.error(
            ("visualization", "heatmap_3d", "sample_idx"),
            f"sample_idx {visualization.heatmap_3d.sample_idx}: the {data.num_samples} samples begin with 0",
        )
    try:
        analysis = plan_pictures(visualization, names)
    except PatternError as error:
        raise file.source.error(error.location, str(error)) from None
    if not analysis.pictures:
        raise file.source.error(("visualization", "enabled"), "nothing is enabled: there is nothing to draw")
    return analysis


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the error of a file or folder that can't be written into one line.

    Raises:
        InfraError: it can't be written.
    """
    try:
        yield
    except OSError as error:
        raise InfraError(f"{shown_path(path)}: can't be written: {error.strerror or error}") from None

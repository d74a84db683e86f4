"""What several commands use: exit codes, the log, parsers, the keys of a suite as options, and errors of writing."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, Union, get_args, get_origin

from .. import suite, tools
from ..common import InfraError, allowed_code, allowed_paths, for_terminal, logger, shown_path, shows_colours, visible

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


OK, FAILED, SUITE_IS_WRONG, USAGE = 0, 1, 2, 4
"""The exit codes of `qsa`: pytest's own."""
SECTIONS = ("model", "data", "generation", "memory", "visualization")
"""The sections of a suite whose keys are options, `--data.num_samples 128`; pydantic checks them as in the file."""


def first_line(docstring: str | None) -> str:
    """Return the first line of a command's docstring as a line of help: `draw …` of `Draw ….`."""
    line = (docstring or "").partition("\n")[0].removesuffix(".")
    return line[:1].lower() + line[1:]


def command_parser(
    name: str, docstring: str | None, usage: str | None = None, *, verbose: str = "", examples: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Return the parser of a command.

    `name`, `docstring`: those of its module. `usage`: what stands behind the command. `verbose`: what else `-v` does.
    `examples`: command lines that the help ends with.
    """
    program = f"qsa {name.rpartition('.')[2]}"
    parser = argparse.ArgumentParser(
        prog=program,
        usage=usage and f"{program} {usage}",
        description=docstring,
        epilog="\n  ".join(["examples:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command that takes every key of a suite as an option; return its options and `KEY=VALUE` overrides.

    Raises:
        SuiteError: an unknown option looks like a key; the text names the nearest key.
    """
    parser.allow_abbrev = False  # `--data.num` would set the first key that begins so
    add_overrides(parser)
    options, unknown = parser.parse_known_args(arguments)
    overrides = read_overrides(options, unknown)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options, overrides


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Offer every key of the sections as an option.

    A key of `visualization` may stand without that word: `--outlier.threshold 100`. `--help-keys` lists them; a hundred
    keys would drown the command's own options in `--help`.
    """
    lines: dict[str, list[tuple[str, str]]] = {}
    for section in SECTIONS:
        for key, field in _values(section, suite.Suite.model_fields[section]):
            short = key.removeprefix("visualization.")
            words = [f"--{key}"] if short == key else [f"--{short}", f"--{key}"]
            # SUPPRESS leaves out what was not given, so that only real overrides are applied.
            parser.add_argument(*words, dest=key, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            lines.setdefault(section, []).append((f"{words[0]} {_shown(field.annotation)}", _key_text(field)))
    parser.add_argument(
        "--help-keys",
        action=_HelpKeys,
        const=lines,
        nargs="?",
        choices=SECTIONS,
        metavar="SECTION",
        help=f"list the keys of a suite that are options too, of a section ({', '.join(SECTIONS)}) or all; and stop",
    )


class _HelpKeys(argparse.Action):
    """Prints the keys of a suite as options, and ends the program."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        for section, lines in self.const.items():
            if values in (section, None, self.const):  # argparse hands on `const` where no value is given
                say(f"keys of {section}; each overrides the file's own value:")
                for option, text in lines:
                    say(f"  {option}", *([f"      {text}"] if text else []))
        parser.exit()


def _key_text(field: FieldInfo) -> str:
    """Return what a key means, and its default."""
    default = field.get_default(call_default_factory=True, validated_data={}) if not field.is_required() else None
    return "; ".join(filter(None, (field.description, (default is not None and f"default: {_written(default)}") or "")))


def _values(key: str, field: FieldInfo) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted key and the field of every plain value at a key or below it."""
    section = suite.section_of(field.annotation)
    if section is None:
        yield key, field
    else:
        for name, inner in section.model_fields.items():
            yield from _values(f"{key}.{name}", inner)


def read_overrides(options: argparse.Namespace, unknown: Sequence[str]) -> list[str]:
    """Return `KEY=VALUE` for each override; paths, relative to the current folder, become absolute.

    Raises:
        SuiteError: an unknown option looks like a key; the text names the nearest key.
    """
    for word in unknown:
        key, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and "." in key:
            prefix = "visualization." if key.partition(".")[0] in suite.Visualization.model_fields else ""
            suite.check_override(f"{prefix}{key}={value}", "--")
    given = {key: value for key, value in vars(options).items() if key.partition(".")[0] in SECTIONS and "." in key}
    return [f"{key}={_absolute(key, value)}" for key, value in given.items()]


def _absolute(key: str, value: str) -> str:
    # A path in a suite is relative to its folder, one of the command line to where the user stands.
    here = Path(os.path.expanduser(value.removeprefix("custom:")))
    if key == "visualization.save_dir" or (key in ("model.path", "model.base", "model.reference") and here.exists()):
        return str(here.absolute())
    if key in ("data.source", "generation.prompts") and value.startswith("custom:"):
        return f"custom:{here.absolute()}"
    return value


def _written(value: Any) -> str:
    """Return a value as it is written in a suite."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, list) else str(value)


def _shown(annotation: Any) -> str:
    """Return a type as a user would write it: `int`, `cpu|disk`, `[str, …]`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _shown(inner[0])
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return "|".join("null" if arm is type(None) else _shown(arm) for arm in inner)
    if origin is list:
        return f"[{_shown(inner[0])}, …]"
    return str(getattr(annotation, "__name__", annotation))


SUFFIXES = (".yaml", ".yml")
"""The suffixes of suites."""


def add_target(parser: argparse.ArgumentParser) -> None:
    """Offer what a command works on, in the same words for all: a suite, a folder or a hub id."""
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help="a suite, a checkpoint's folder, a GGUF file, or a hub id"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the suite or configuration, instead of TARGET")


def source_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> suite.YamlSource:
    """Read the suite that the options name, or make one that is of a checkpoint alone.

    Raises:
        SuiteError: it can't be read.
    """
    if (options.config is None) == (options.target is None):
        parser.error("name one TARGET: a suite, a checkpoint's folder, a GGUF file, or a hub id")
    target = options.config or Path(options.target)
    gguf = target.is_file() and target.suffix == ".gguf"
    if gguf or (options.config is None and not target.is_file() and target.suffix not in SUFFIXES):
        named = {"path": str(target.parent), "gguf_file": target.name} if gguf else {"path": options.target}
        # Its errors then name the argument in the place of a file.
        return suite.YamlSource(Path("TARGET"), {"model": named}, roots=roots_of(options))
    return suite.read_suite(target, roots_of(options))


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Offer `--qsa-allow-code` and `--qsa-allow-path`.

    Raises:
        SuiteError: `QSA_ALLOW_CODE` says neither yes nor no.
    """
    allowed = bool(allowed_code())
    parser.add_argument(
        "--qsa-allow-code", action="store_true", default=allowed, help="let the model run code of its own"
    )
    add_allow_path(parser)


def add_allow_path(parser: argparse.ArgumentParser) -> None:
    """Offer `--qsa-allow-path`."""
    text = "let the suite read in that folder as well as in its own repository; repeatable"
    parser.add_argument(suite.ALLOW_PATH, action="append", default=[], metavar="DIR", help=text)


def roots_of(options: argparse.Namespace) -> suite.Roots:
    """Return where a suite may read beside its repository.

    Raises:
        SuiteError: a folder that is allowed isn't there.
    """
    return suite.Roots(allowed=allowed_paths(options.qsa_allow_path))


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


def planned(file: suite.SuiteFile, names: Sequence[str]) -> tools.Analysis:
    """Return the pictures that a file enables, with the layers that they show among a model's `names`.

    Raises:
        SuiteError: nothing is enabled, a pattern matches no layer, or there is no such sample; at its line.
    """
    visualization, data = file.suite.visualization, file.suite.data
    if visualization.enabled.heatmap_3d and visualization.heatmap_3d.sample_idx >= data.num_samples:
        raise file.source.error(
            ("visualization", "heatmap_3d", "sample_idx"),
            f"sample_idx {visualization.heatmap_3d.sample_idx}: the {data.num_samples} samples begin with 0",
        )
    try:
        analysis = tools.plan_pictures(visualization, names)
    except tools.PatternError as error:
        raise file.source.error(error.location, str(error)) from None
    if not analysis.pictures:
        raise file.source.error(("visualization", "enabled"), "nothing is enabled: there is nothing to draw")
    return analysis


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines that may hold text of a suite or of a checkpoint, at once; tables in colours where they show."""
    shown = for_terminal if shows_colours(file or sys.stdout) else visible
    for line in lines:
        print(shown(line), file=file, flush=True)


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

"""Writes what the documentation and the editors take from the code: `make generate`; `make lint` runs it with --check.

A generator is a function from the file's present text to its new one, registered for the file by `generates`. Part of
a page lies between `<!-- generated: NAME -->` and `<!-- end of NAME -->`: `between` replaces it.
"""

from __future__ import annotations

import difflib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from rooms import rooms_picture, rooms_table

from pytest_qsa.captures import STATISTICS
from pytest_qsa.checkpoint import CHECKS
from pytest_qsa.cli import commands
from pytest_qsa.cli.shared import first_line
from pytest_qsa.metrics import METRICS, Definition, Metric
from pytest_qsa.tools import FAULTS

ROOT = Path(__file__).resolve().parent.parent
GENERATORS: dict[str, Callable[[str], str]] = {}
"""File, relative to the repository → its generator."""


def generates(path: str) -> Callable[[Callable[[str], str]], Callable[[str], str]]:
    """Register the generator of a file."""

    def register(generator: Callable[[str], str]) -> Callable[[str], str]:
        GENERATORS[path] = generator
        return generator

    return register


def between(text: str, name: str, new: str) -> str:
    """Replace the part `name` of a page.

    Raises:
        ValueError: the page has no such part.
    """
    begin, end = f"<!-- generated: {name} -->\n", f"<!-- end of {name} -->"
    before, marker, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not marker or not last:
        raise ValueError(f"the page has no part between '{begin.strip()}' and '{end}'")
    return f"{before}{begin}\n{new}\n\n{end}{after}"


@generates("docs/metrics.md")
def metrics_page(text: str) -> str:
    """Write the table of all metrics: a row each, from the function's signature, its docstring and its registration."""
    rows = ["| metric (parameters = defaults) | what it is | unit | `reduce` | sites |", "|---|---|---|---|---|"]
    return between(text, "metrics", "\n".join([*rows, *map(_row, sorted(METRICS.values(), key=lambda m: m.name))]))


def _row(metric: Metric) -> str:
    what = (metric.compute.__doc__ or "").partition("\n")[0].replace("|", "\\|")
    sites = [site for site in metric.sites if not (metric.tokenwise and site == "weight")]
    return f"| {_signature(metric)} | {what} | {metric.unit} | {metric.reduce or 'pooled'} | {', '.join(sites)} |"


def _signature(definition: Definition) -> str:
    """Write a metric with its parameters and their defaults."""
    parameters = ", ".join(f"{name}={_plain(p.default)}" for name, p in definition.parameters.items())
    return f"`{definition.name}({parameters})`" if parameters else f"`{definition.name}`"


def _plain(value: object) -> str:
    """Write a default as YAML does."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


@generates("docs/commands.md")
def commands_page(text: str) -> str:
    """List the commands, each with its help and the page that shows most of it."""
    pages = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
    del pages["commands.md"]
    rows = ["| command | what it does | more |", "|---|---|---|"]
    for name, module in commands().items():
        shown = {page: len(re.findall(rf"^\$ qsa {name}\b", content, re.MULTILINE)) for page, content in pages.items()}
        page = max(shown, key=shown.__getitem__)
        title = pages[page].partition("\n")[0].removeprefix("# ")
        rows.append(f"| `qsa {name}` | {first_line(module.__doc__)} | {f'[{title}]({page})' if shown[page] else ''} |")
    return between(text, "commands", "\n".join(rows))


@generates("docs/checkpoints.md")
def checkpoints_page(text: str) -> str:
    """List the static checks with their parameters and what each counts."""
    rows = ["| metric (parameters = defaults) | what it counts |", "|---|---|"]
    for check in CHECKS.values():
        what = " ".join((inspect.getdoc(check.compute) or "").partition("\n\nRaises")[0].split()).removeprefix("Count ")
        rows.append(f"| {_signature(check)} | {what.removesuffix('.')} |")
    return between(text, "checks", "\n".join(rows))


@generates("docs/selftest.md")
def selftest_page(text: str) -> str:
    """List the faults of the selftest with the strengths that it tries."""
    rows = ["| fault | what it does | default, strongest | has to be named |", "|---|---|---|---|"]
    for fault in FAULTS.values():
        strengths = ", ".join(f"{strength:g}" for strength in sorted({fault.default, fault.strongest}))
        counted = f"all {fault.unit}" if fault.unit.startswith("of ") else f"{strengths} {fault.unit}"
        strength = counted if fault.graded else ""
        rows.append(f"| `{fault.name}` | {fault.text.removesuffix('.')} | {strength} | {fault.names} |")
    return between(text, "faults", "\n".join(rows))


@generates("docs/rooms.svg")
def rooms_drawing(text: str) -> str:
    """Draw the rooms of the package in the order of the contracts."""
    return rooms_picture()


@generates("docs/architecture.md")
def architecture_page(text: str) -> str:
    """List the rooms of the engine."""
    return between(text, "engine", rooms_table("engine", "pytest_qsa.engine"))


@generates("CONTRIBUTING.md")
def contributing_page(text: str) -> str:
    """List the rooms of the package."""
    return between(text, "rooms", rooms_table("rooms"))


@generates("docs/capture-format.md")
def capture_page(text: str) -> str:
    """Write the table of all statistics from their classes."""
    rows = ["| statistic | what it keeps | by default |", "|---|---|---|"]
    for name, kind in sorted(STATISTICS.items()):
        form = ":".join([name, *(field.name.upper() for field in fields(kind))])
        what = " ".join((kind.__doc__ or "").split()).replace("|", "\\|")
        rows.append(f"| `{form}` | {what} | {'yes' if kind.default else ''} |")
    return between(text, "statistics", "\n".join(rows))


@generates("pytest_qsa/metrics/methods.pyi")
def metric_methods(text: str) -> str:
    """Write the stub that gives each metric's method its signature and the first sentence of its docstring."""
    head = ["from typing import Any, Literal", "", "from .query import Positions", "from .registry import Reduce"]
    methods = [_method(metric) for metric in METRICS.values() if not metric.origin]
    lines = [
        *head,
        "from .series import Series",
        "",
        "class MetricMethods:",
        *methods,
        ANY_METHOD,
    ]
    return _formatted("\n".join(lines), "methods.pyi")


ANY_METHOD = "    def __getattr__(self, name: str) -> Any: ...\n"
"""Stands for the metrics of conftests and entry points."""


def _method(metric: Metric) -> str:
    own = [f"{name}: {_type_text(p.annotation)} = {p.default!r}" for name, p in metric.parameters.items()]
    more = ["reduce: Reduce | None = None"] * (metric.reduce is not None)
    more += ["positions: Positions | None = None"] * metric.positional
    arguments = ", ".join(["self", *own, *(["*", *more] if more else [])])
    what = (metric.compute.__doc__ or "").partition("\n")[0]
    return f'    def {metric.name}({arguments}) -> Series:\n        """{what}"""\n'


def _type_text(annotation: Any) -> str:
    """Write a type out, so that the stub need not import the aliases that metrics use."""
    if get_origin(annotation) is Annotated:
        return _type_text(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(annotation)))}]"
    if arms := get_args(annotation):
        return " | ".join(map(_type_text, arms))
    return "None" if annotation is type(None) else str(annotation.__name__)


def _formatted(text: str, name: str) -> str:
    command = [sys.executable, "-m", "ruff", "format", "--quiet", "--stdin-filename", str(ROOT / name), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main(check: bool) -> int:
    """Write every generated file; with `check` only say which ones are stale. Return the exit code."""
    stale = 0
    for path, generator in GENERATORS.items():
        file = ROOT / path
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        new = re.sub(r"[ \t]+$", "", generator(old), flags=re.MULTILINE)
        if new == old:
            continue
        stale += 1
        if check:
            print(f"{path} is stale: run `make generate`")
            print("\n".join(list(difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0))[:20]))
        else:
            file.write_text(new, encoding="utf-8")
            print(f"wrote {path}")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

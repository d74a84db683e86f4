"""Writes what the documentation and the editors take from the code: `make generate`; `make lint` runs it with --check.

A generator is a function from the file's present text to its new one, registered for the file by `generates`. Part of
a page lies between `<!-- generated: NAME -->` and `<!-- end of NAME -->`: `between` replaces it.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from rooms import rooms_picture, rooms_table

from pytest_qsa.cli import commands
from pytest_qsa.cli.shared import first_line
from pytest_qsa.metrics import METRICS, Metric
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
    parameters = ", ".join(f"{name}={_plain(p.default)}" for name, p in metric.parameters.items())
    what = (metric.compute.__doc__ or "").partition("\n")[0].replace("|", "\\|")
    signature = f"`{metric.name}({parameters})`" if parameters else f"`{metric.name}`"
    sites = [site for site in metric.sites if not (metric.tokenwise and site == "weight")]
    return f"| {signature} | {what} | {metric.unit} | {metric.reduce or 'pooled'} | {', '.join(sites)} |"


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


@generates("docs/selftest.md")
def selftest_page(text: str) -> str:
    """List the faults of the selftest with the strengths that it tries."""
    rows = ["| fault | what it does | default, strongest |", "|---|---|---|"]
    for fault in FAULTS.values():
        strengths = ", ".join(f"{strength:g}" for strength in sorted({fault.default, fault.strongest}))
        counted = f"all {fault.unit}" if fault.unit.startswith("of ") else f"{strengths} {fault.unit}"
        rows.append(f"| `{fault.name}` | {fault.text.removesuffix('.')} | {counted if fault.graded else ''} |")
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

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
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from refusals import refusals
from rooms import rooms_picture, rooms_table

import pytest_qsa
from pytest_qsa import metrics, plugin
from pytest_qsa.captures import CACHE_SITES, STATISTICS
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
    # All four sites of the KV cache have the same metrics: one name in the table.
    shown = list(dict.fromkeys("KV cache" if site in CACHE_SITES else str(site) for site in sites))
    return f"| {_signature(metric)} | {what} | {metric.unit} | {metric.reduce or 'pooled'} | {', '.join(shown)} |"


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


@generates("docs/reliability.md")
def reliability_page(text: str) -> str:
    """Write what is refused with its sentence: each refusal is done."""
    return between(text, "refusals", "\n".join(refusals()))


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


@generates("docs/api.md")
def api_page(text: str) -> str:
    """Write the reference of the Python names from their signatures and docstrings."""
    public = [getattr(pytest_qsa, name) for name in dir(pytest_qsa) if name[0] != "_"]
    functions = [each for each in public if inspect.isfunction(each)]
    errors = [each for each in public if isinstance(each, type) and issubclass(each, (Exception, Warning))]
    classes = [each for each in public if isinstance(each, type) and each not in errors]
    distances = [getattr(metrics, name) for name in ("ks", "psi", "wasserstein")]
    fixtures = {name: each for name, each in vars(plugin).items() if _is_fixture(each) and name != "qsa_gate"}
    lines = [line for each in functions for line in _api(each)]
    lines += [line for each in [classes[0], metrics.Selection, *classes[1:]] for line in _api_of_class(each)]
    lines += ["## Distances between two captures", "", "In `pytest_qsa.metrics`.", ""]
    lines += [line for each in distances for line in _api(each, level=3)]
    lines += ["## Fixtures", "", "| fixture | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {_first_paragraph(each)} |" for name, each in fixtures.items()]
    lines += ["", "## Errors and warnings", "", "| class | base | raised when |", "|---|---|---|"]
    lines += [f"| `{each.__name__}` | `{each.__mro__[1].__name__}` | {_first_paragraph(each)} |" for each in errors]
    return between(text, "api", re.sub(r"\n{3,}", "\n\n", "\n".join(lines)))


def _is_fixture(value: object) -> bool:
    return type(value).__name__ == "FixtureFunctionDefinition"


def _api_of_class(kind: type) -> Iterator[str]:
    """Yield a class with its public methods and properties; of those of metrics there is a table of its own."""
    yield from [f"## {kind.__name__}", "", *_markdown(inspect.getdoc(kind) or ""), ""]
    for name, value in vars(kind).items():
        if name.startswith("_") or name in HIDDEN:
            continue
        if isinstance(value, (property, cached_property)):
            getter = value.fget if isinstance(value, property) else value.func
            yield from [f"### {kind.__name__}.{name}", "", *_markdown(inspect.getdoc(getter) or ""), ""]
        elif inspect.isfunction(value) or isinstance(value, classmethod):
            yield from _api(getattr(kind, name), f"{kind.__name__}.", level=3)
    if kind is metrics.Selection:
        yield from [
            "### Selection: the metrics",
            "",
            "Each returns a `Series`.",
            "",
            "| method | what it is |",
            "|---|---|",
        ]
        for metric in METRICS.values():
            what = (metric.compute.__doc__ or "").partition("\n")[0].replace("|", "\\|")
            yield f"| `{metric.name}{str(metric.signature).replace('|', chr(92) + '|')}` | {what} |"
        yield ""


HIDDEN = {"judge", "covers", "weights_looked_at", "within", "folded", "check"}
"""Public only for other rooms of the package."""


def _api(function: Any, owner: str = "", level: int = 2) -> Iterator[str]:
    """Yield a heading, the signature and the docstring of a function."""
    name = f"{owner}{function.__name__}"
    signature = inspect.signature(function)
    parameters = [
        p if p.annotation is p.empty else p.replace(annotation=_Text(p.annotation))
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    result = _Text(signature.return_annotation)
    text = str(signature.replace(parameters=parameters, return_annotation=result))
    if len(name) + len(text) > WIDTH:
        # The separate parameters don't say what stands before them, a `*` for one.
        inside, _, rest = text[1:].rpartition(")")
        text = "(\n    " + ",\n    ".join(re.split(r", (?=\*|\w+: |\w+=)", inside)) + f",\n){rest}"
    yield from [f"{'#' * level} {name}", "", "```py", name + text, "```", ""]
    yield from [*_markdown(inspect.getdoc(function) or ""), ""]


WIDTH = 100


class _Text(str):
    """An annotation, which a signature shows as it is written and not as a string."""

    __slots__ = ()
    __repr__ = str.__str__


def _markdown(docstring: str) -> Iterator[str]:
    """Yield a docstring as Markdown: the entries below `Args:`, `Attributes:` and `Raises:` become a list."""
    for block in docstring.split("\n\n"):
        head, _, rest = block.partition("\n")
        if head not in ("Args:", "Attributes:", "Raises:"):
            yield from [block, ""]
            continue
        yield from [f"**{head.removesuffix(':')}**", ""]
        for entry in re.split(r"\n(?=    \S)", f"\n{rest}")[1:]:
            name, _, what = " ".join(entry.split()).partition(": ")
            yield f"- `{name}`: {what}"
        yield ""


def _first_paragraph(value: Any) -> str:
    text = (inspect.getdoc(value) or "").partition("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|")


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
    more += ["positions: Positions | None = None"] * metric.of_tokens
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

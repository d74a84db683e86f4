"""How the code is laid out: size, rooms, what exists twice, comments, and which room imports which.

`python benchmarks/house.py [CHECKOUT …]` prints a column for each checkout of the repository; this one by default.
`--rooms` lists the size of every room, the largest modules, the longest functions, and what exists twice.
`--seed N` draws 40 docstrings and 30 comments of the first checkout, for a reader to judge.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import random
import re
import textwrap
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "pytest_qsa"
LONG = 30
"""Code lines from which a function is listed as long."""
DIRECTIVE = re.compile(r"#\s*(fmt:|noqa|type:|ruff:|pragma:)")
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Text:
    """A docstring or a comment, and where it stands."""

    path: Path
    line: int
    words: str


@dataclass(frozen=True)
class Function:
    """A function and its code lines."""

    path: Path
    name: str
    lines: int


@dataclass(frozen=True)
class Module:
    """A module of the package; `path` is relative to the package's folder."""

    path: Path
    source: str

    @property
    def room(self) -> str:
        """The folder at the top of the package in which it lies; a loose module is a room of its own."""
        return self.path.parts[0].removesuffix(".py")

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.source)

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        """Every token, comments included."""
        return list(tokenize.generate_tokens(io.StringIO(self.source).readline))

    @cached_property
    def strings(self) -> list[tuple[str, ast.stmt, str]]:
        """Statements that are a string alone, such as docstrings: what is documented, the statement, the string."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = getattr(node, "name", "module")
                for statement in node.body:
                    found += [(name, statement, text) for text in _string(statement)]
                    name = next(_defined(statement), name)  # a string below a constant is about the constant
        return found

    @cached_property
    def code(self) -> set[int]:
        """The numbers of the lines that are neither blank, nor a comment alone, nor a docstring."""
        spans = [(t.start[0], t.end[0]) for t in self.tokens if t.type not in LAYOUT | {tokenize.COMMENT}]
        lines = {line for first, last in spans for line in range(first, last + 1)}
        return lines - {line for _, node, _ in self.strings for line in _span(node)}

    @cached_property
    def comments(self) -> list[Text]:
        """Comments, full lines and trailing; without what only a tool reads (`noqa`, `fmt:`, `type:`)."""
        found = [t for t in self.tokens if t.type == tokenize.COMMENT and not DIRECTIVE.match(t.string)]
        return [Text(self.path, token.start[0], f"{_before(token)}{token.string}") for token in found]

    @cached_property
    def docstrings(self) -> list[Text]:
        """Docstrings of the module, of its classes and functions, and of its constants."""
        return [Text(self.path, node.lineno, f"{name}: {inspect.cleandoc(text)}") for name, node, text in self.strings]

    @cached_property
    def functions(self) -> list[Function]:
        """Every function and method with its code lines."""
        nodes = [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        return [Function(self.path, node.name, len(self.code.intersection(_span(node)))) for node in nodes]

    @cached_property
    def public_names(self) -> set[str]:
        """What the module itself defines without an underscore: classes, functions and constants."""
        return {name for statement in self.tree.body for name in _defined(statement) if not name.startswith("_")}

    @cached_property
    def imported_rooms(self) -> set[str]:
        """The other rooms that it imports; what only a type checker imports is left out."""
        visitor = _Imports((PACKAGE, *self.path.parts[:-1]))
        visitor.visit(self.tree)
        return visitor.rooms - {self.room, ""}


def _string(statement: ast.stmt) -> Iterator[str]:
    """Give the string that is all of a statement."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str() as text)):
            yield text


def _before(comment: tokenize.TokenInfo) -> str:
    """Return the code that a trailing comment stands behind."""
    return f"{code}  " if (code := comment.line[: comment.start[1]].strip()) else ""


def _span(node: ast.stmt) -> range:
    """Return the numbers of a statement's lines."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _defined(statement: ast.stmt) -> Iterator[str]:
    """Name what a statement at the top of a module defines."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name


class _Imports(ast.NodeVisitor):
    """Collects the rooms of the package that a module in `folder` imports."""

    def __init__(self, folder: tuple[str, ...]) -> None:
        self.folder = folder
        self.rooms: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name.split("."))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = list(self.folder[: len(self.folder) - node.level + 1]) if node.level else []
        path = [*base, *(node.module or "").split(".")] if node.module else base
        for names in [path] if len(path) > 1 else [[*path, alias.name] for alias in node.names]:
            self._add(names)

    def _add(self, path: list[str]) -> None:
        if path[0] == PACKAGE and len(path) > 1:
            self.rooms.add(path[1])


@dataclass(frozen=True)
class House:
    """All modules of a checkout."""

    modules: list[Module]

    @classmethod
    def read(cls, checkout: Path) -> House:
        """Read the package of a checkout.

        Raises:
            SystemExit: the folder holds no package of this name.
        """
        folder = checkout / PACKAGE
        if not folder.is_dir():
            raise SystemExit(f"{checkout}: no folder {PACKAGE}")
        paths = sorted(folder.rglob("*.py"))
        return cls([Module(path.relative_to(folder), path.read_text(encoding="utf-8")) for path in paths])

    @property
    def rooms(self) -> dict[str, list[Module]]:
        """The modules of each room; loose modules are rooms of their own."""
        rooms = defaultdict(list)
        for module in self.modules:
            rooms[module.room].append(module)
        return dict(sorted(rooms.items()))

    @property
    def loose(self) -> list[Module]:
        """Modules at the package's root."""
        return [module for module in self.modules if len(module.path.parts) == 1]

    @property
    def edges(self) -> set[tuple[str, str]]:
        """Which room imports which; faces (`__init__` at the root) import nothing by themselves."""
        rooms = set(self.rooms)
        return {(m.room, room) for m in self.modules if m.room != "__init__" for room in m.imported_rooms & rooms}

    @property
    def files_twice(self) -> dict[str, list[Path]]:
        """File names that several modules have; `__init__`, a format's halves, and a command with its tool may."""
        named = defaultdict(list)
        for module in self.modules:
            named[module.path.name].append(module.path)
        del named["__init__.py"]
        apart = {name: _without_commands(_without_halves(paths)) for name, paths in named.items()}
        return {name: paths for name, paths in apart.items() if len(paths) > 1}

    @property
    def names_twice(self) -> dict[str, list[Path]]:
        """Public names that several modules define.

        The halves of a format may share one; what pytest or the program `qsa` looks up by name has to.
        """
        defined = defaultdict(list)
        for module in self.modules:
            given = {"run", "add_arguments"} if module.room == "cli" else set()
            for name in module.public_names - given:
                if not name.startswith("pytest_"):
                    defined[name].append(module.path)
        apart = {name: _without_halves(paths) for name, paths in sorted(defined.items())}
        return {name: paths for name, paths in apart.items() if len(paths) > 1}

    def total(self, pattern: str) -> int:
        """Count the lines in which a regular expression is found."""
        return sum(bool(re.search(pattern, line)) for module in self.modules for line in module.source.splitlines())


def _without_halves(paths: list[Path]) -> list[Path]:
    """Leave out the engine's half of a format that has one in the room of checkpoints."""
    both = any(path.parts[:2] == ("checkpoint", "formats") for path in paths)
    return [path for path in paths if not (both and path.parts[:2] == ("engine", "formats"))]


def _without_commands(paths: list[Path]) -> list[Path]:
    """Leave out a command that has a tool of the same name."""
    tool = any(path.parts[0] == "tools" for path in paths)
    return [path for path in paths if not (tool and path.parts[0] == "cli")]


def measures(house: House) -> dict[str, str]:
    """Measure a house; the names are the table's rows."""
    lines = sum(module.source.count("\n") for module in house.modules)
    comments = sum(len(module.comments) for module in house.modules)
    full = sum(c.line not in m.code for m in house.modules for c in m.comments)
    functions = [function for module in house.modules for function in module.functions]
    return {
        "rooms at the top": str(len(house.rooms) - len(house.loose)),
        "loose modules": str(len(house.loose)),
        "modules": str(len(house.modules)),
        "code lines": f"{sum(len(module.code) for module in house.modules):,}",
        "all lines": f"{lines:,}",
        "file names that exist twice": str(len(house.files_twice)),
        "public names in several modules": str(len(house.names_twice)),
        "comments": f"{comments} ({comments / max(lines, 1):.1%}; {full} of them full lines)",
        "import edges between rooms": str(len(house.edges)),
        "fmt: skip": str(house.total(r"# fmt: (skip|off)")),
        "lines with Any": str(house.total(r"\bAny\b")),
        "modules over 400 lines": str(sum(module.source.count("\n") > 400 for module in house.modules)),
        f"functions over {LONG} code lines": str(sum(function.lines > LONG for function in functions)),
    }


GOALS = {
    "rooms at the top": "12",
    "loose modules": "≤ 3",
    "modules": "≤ 165",
    "code lines": "≤ 17,000",
    "file names that exist twice": "≤ 3",
    "public names in several modules": "≤ 10",
    "comments": "about 3 %",
    "fmt: skip": "≤ 118",
    "lines with Any": "≤ 400",
}


def print_table(checkouts: list[Path]) -> None:
    """Print a row a measure, a column a checkout."""
    columns = [measures(House.read(checkout)) for checkout in checkouts]
    rows = [["", *map(str, checkouts), "goal"]]
    rows += [[name, *(column[name] for column in columns), GOALS.get(name, "")] for name in columns[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_rooms(house: House) -> None:
    """List the size of every room, the largest modules, the longest functions, and what exists twice."""
    for room, modules in house.rooms.items():
        print(f"{room:12} {len(modules):4} modules {sum(len(module.code) for module in modules):6,} code lines")
    print("\nthe largest modules")
    for module in sorted(house.modules, key=lambda module: -module.source.count("\n"))[:10]:
        print(f"{module.source.count(chr(10)):6} {module.path}")
    print("\nthe longest functions")
    functions = [function for module in house.modules for function in module.functions if function.lines > LONG]
    for function in sorted(functions, key=lambda function: -function.lines):
        print(f"{function.lines:6} {function.path}: {function.name}")
    for title, twice in [("file names", house.files_twice), ("public names", house.names_twice)]:
        print(f"\n{title} that exist twice")
        for name, paths in twice.items():
            print(f"       {name}: {', '.join(map(str, paths))}")


def _joined(comments: list[Text]) -> list[Text]:
    """Join the lines of a comment that takes several."""
    joined: list[Text] = []
    for comment in comments:
        last = joined[-1] if joined else None
        if last and comment.line == last.line + last.words.count("\n") + 1 and comment.words.startswith("#"):
            joined[-1] = Text(last.path, last.line, f"{last.words}\n{comment.words}")
        else:
            joined.append(comment)
    return joined


def print_drawn(house: House, seed: int) -> None:
    """Draw 40 docstrings and 30 comments for a reader to judge."""
    draw = random.Random(seed)
    for texts, count in [
        ([text for module in house.modules for text in module.docstrings], 40),
        ([text for module in house.modules for text in _joined(module.comments)], 30),
    ]:
        for text in draw.sample(texts, min(count, len(texts))):
            print(f"\n{PACKAGE}/{text.path}:{text.line}\n{textwrap.indent(text.words, '    ')}")


def main() -> None:
    """Print what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT], metavar="CHECKOUT")
    parser.add_argument("--rooms", action="store_true", help="list rooms, the largest modules, and what exists twice")
    parser.add_argument("--seed", type=int, help="draw 40 docstrings and 30 comments")
    options = parser.parse_args()
    print_table(options.checkouts)
    if options.rooms:
        print()
        print_rooms(House.read(options.checkouts[0]))
    if options.seed is not None:
        print_drawn(House.read(options.checkouts[0]), options.seed)


if __name__ == "__main__":
    main()

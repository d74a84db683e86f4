"""YAML text → plain data, and for each key and value the file and the line where it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..common import InfraError, SuiteError, did_you_mean, one_line, refuse_special, shown_path
from .paths import Boundary, Roots

MAX_NODES = 100_000
"""How many values a document may have with its aliases expanded; a few lines can expand to billions."""
MAX_BYTES = 10_000_000
MAX_BITS = 3_320
"""The length of a whole number: about 1,000 digits. Python prints none of more than 4,300."""
Key = str | int
Location = tuple[Key, ...]


Reader = Callable[[Path], str | None]
"""Returns the text of a file; None where there is none."""
_reader: ContextVar[Reader | None] = ContextVar("reader", default=None)


@contextmanager
def suites_read_by(reader: Reader) -> Iterator[None]:
    """Read suites and what they extend by a function, such as one that knows another commit.

    What is merged then is the same on any machine: paths of checkpoints stay as a base writes them, here or not.
    """
    token = _reader.set(reader)
    try:
        yield
    finally:
        _reader.reset(token)


def disk_text(path: Path) -> str | None:
    """Return the text of a file as it is today: for `suites_read_by`."""
    return path.read_text(encoding="utf-8") if path.is_file() else None


def reads_disk() -> bool:
    """Say whether suites are read as a run reads them, and not by a function."""
    return _reader.get() is None


def is_there(path: Path) -> bool:
    """Say whether there is a file for `read_yaml`."""
    reader = _reader.get()
    return path.is_file() if reader is None else reader(path) is not None


def _text_of(path: Path) -> str:
    reader = _reader.get()
    if reader is not None:
        return reader(path) or ""
    refuse_special(path, MAX_BYTES)
    return path.read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the floats of YAML 1.2: `1e-3` is a number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make the value of a node; one that is none, such as the day 2027-02-30, is an error with its line."""
        try:
            made = super().construct_object(node, deep=deep)
            if isinstance(made, int) and made.bit_length() > MAX_BITS:
                raise ValueError("a whole number has at most 1,000 digits")
            if isinstance(made, str):
                if "\0" in made:
                    raise ValueError("a text holds the character NUL")
                made.encode()  # half a surrogate pair can't be printed or written
            return made
        # PyYAML lets those of `datetime` through, and with a tag (`!!bool abc`) those of a failed look-up.
        except (ValueError, OverflowError) as error:
            raise yaml.constructor.ConstructorError(None, None, _first_line(error), node.start_mark) from None
        except (LookupError, AttributeError, TypeError):
            problem = f"the value is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


# In YAML 1.1, which PyYAML reads, a float needs a dot and a signed exponent: `1e-3` is a string there.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


class LocatedError(SuiteError):
    """A mistake at a location of a document. `what`: its text without file and line."""

    def __init__(self, message: str, location: Location, what: str) -> None:
        super().__init__(message)
        self.location = location
        self.what = what


class Place(NamedTuple):
    """A file and a line in it, counted from 1."""

    path: Path
    line: int

    def __str__(self) -> str:
        """Return `file:line`, with the file as a user would type it."""
        return f"{shown_path(self.path)}:{self.line}"


@dataclass
class YamlSource:
    """A parsed document: `data`, and the place of each value, which is in another file where a suite extends others.

    `roots`: where its files may lie beside its repository. `given`: texts of overrides, which are the operator's own.
    """

    path: Path
    data: Any
    places: dict[Location, Place] = field(default_factory=dict)
    roots: Roots = field(default_factory=Roots)
    given: set[str] = field(default_factory=set)

    @property
    def boundary(self) -> Boundary:
        """Where the files that the document names may lie."""
        return self.roots.around(self.path)

    def place(self, location: Location) -> Place:
        """Return the place of a location; where it has none, as for an absent key, that of its nearest parent."""
        while location and location not in self.places:
            location = location[:-1]
        return self.places.get(location, Place(self.path, 1))

    def error(self, location: Location, message: str) -> SuiteError:
        """Return the error for a location, `file:line: message`."""
        return LocatedError(f"{self.place(location)}: {message}", location, message)


@dataclass(frozen=True)
class Node:
    """A value of a document and its place. The values of a mapping and of a list are nodes as well."""

    value: Any
    place: Place

    @classmethod
    def of(cls, source: YamlSource, value: Any, at: Location = ()) -> Node:
        """Return the node of the value at a location of a document."""
        if isinstance(value, dict):
            value = {key: cls.of(source, item, (*at, str(key))) for key, item in value.items()}
        elif isinstance(value, list):
            value = [cls.of(source, item, (*at, index)) for index, item in enumerate(value)]
        return cls(value, source.place(at))

    def plain(self) -> Any:
        """Return the value as plain data."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def places(self, at: Location = ()) -> Iterator[tuple[Location, Place]]:
        """Yield the location and the place of each value in this one, which is at `at`."""
        yield at, self.place
        if isinstance(self.value, dict | list):
            inner = self.value.items() if isinstance(self.value, dict) else enumerate(self.value)
            for key, node in inner:
                yield from node.places((*at, key if isinstance(self.value, list) else str(key)))


def read_yaml(path: Path) -> YamlSource:
    """Read a YAML file without running any of its tags; every error names its line.

    Raises:
        SuiteError: the file can't be read, is not YAML, is empty, repeats a key, or its aliases expand to too much.
    """
    try:
        text = _text_of(path)
    except InfraError as error:
        raise SuiteError(f"{shown_path(path)}:1: {str(error).partition(': ')[2]}") from None
    except FileNotFoundError:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = did_you_mean(path.name, (each.name for each in beside if each.is_file()))
        raise SuiteError(f"{shown_path(path)}: there is no such file{near}") from None
    except OSError as error:
        raise SuiteError(f"{shown_path(path)}:1: can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise SuiteError(f"{shown_path(path)}:1: can't be read as UTF-8 text: {error}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise SuiteError(
                f"{shown_path(path)}:1: the file is empty; a suite has the sections model, data and assertions"
            )
        source = YamlSource(path, None)
        _Walk(source).visit(node, ())  # before the values are made: it stops aliases that would fill the memory
        source.data = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise SuiteError(_syntax_error(path, error)) from None
    except RecursionError:
        raise SuiteError(f"{shown_path(path)}:1: not valid YAML: it is nested too deeply") from None
    return source


def read_value(text: str) -> Any:
    """Read the VALUE of an override `KEY=VALUE` as YAML, so that `1e-3` and `[a, b]` mean what they mean in a suite."""
    try:
        # A plain text, such as a regex, need not be valid YAML.
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


class _Walk:
    """Records the line of each value, and refuses what PyYAML accepts: repeated keys, aliases that expand too far."""

    def __init__(self, source: YamlSource) -> None:
        self.source = source
        self.nodes = 0
        self.open: set[int] = set()  # the nodes around the current one: an alias to one of them never ends

    def visit(self, node: yaml.Node, location: Location) -> None:
        self.nodes += 1
        # The key of a mapping has set the place already; its value may begin lines below.
        self.source.places.setdefault(location, self._place(node))
        # Each visit of an alias counts like a new value, because that is what it expands to.
        if self.nodes > MAX_NODES or id(node) in self.open:
            raise self.source.error(
                location, f"the document expands to more than {MAX_NODES} values through its aliases"
            )
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, location)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, (*location, index))
        self.open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, location: Location) -> None:
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            here = (*location, name)
            if name in seen and name != "<<":  # a mapping may merge several others
                self.source.places[here] = self._place(key)
                raise self.source.error(here, f"the key '{name}' stands twice in the same place")
            seen.add(name)
            self.source.places[here] = self._place(key)
            self.visit(value, here)

    def _place(self, node: yaml.Node) -> Place:
        return Place(self.source.path, node.start_mark.line + 1)


def _first_line(error: Exception) -> str:
    # Python's error of a number with too many digits gives advice for programmers.
    return "a whole number has at most 1,000 digits" if "digits" in str(error) else one_line(error)


def _syntax_error(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark else 1
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    # Layer patterns are full of backslashes, so this is a likely mistake.
    if "unknown escape character" in problem:
        problem += "; in double quotes a backslash is YAML's own: "
        problem += r"write a regex without quotes or in single ones, 'layers\.\d+$'"
    if "'\\t'" in problem:
        problem += "; indent by spaces, not by tabs"
    if "expected <block end>" in problem:
        problem += "; it is indented otherwise than the lines above it"
    return f"{shown_path(path)}:{line}: not valid YAML: {problem}"

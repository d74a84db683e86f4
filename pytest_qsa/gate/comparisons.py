"""A comparison in a Python test, as its source has it: at which line it stands, and whether its result is used."""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path

import pytest

from .. import suite

PACKAGE = Path(__file__).parent.parent


def caller() -> suite.Place | None:
    """Return the line of the test that compares."""
    # context=0: the source lines of the frames are not read.
    for frame in inspect.stack(context=0):
        if not frame.filename.startswith(str(PACKAGE)):
            return suite.Place(Path(frame.filename), frame.lineno)
    return None


UNCHECKED = (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Tuple, ast.IfExp)
"""The expressions whose value is lost where they stand alone; a call may do something with it."""


def unasserted(place: suite.Place | None) -> str | None:
    """Return why a comparison at a line of a test checks nothing: its result is lost. None where it may be used."""
    tree = _tree(place.path) if place is not None else ast.Module([], [])
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and place and _spans(n, place.line)]
    statement = max(around, key=lambda node: (node.lineno, node.col_offset), default=None)
    if not isinstance(statement, ast.Expr | ast.Assign) or not isinstance(statement.value, UNCHECKED):
        return None
    withs = [item.context_expr for node in around if isinstance(node, ast.With) for item in node.items]
    if any("raises" in ast.unparse(expression) for expression in withs):
        return None
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    names = {target.id if isinstance(target, ast.Name) else "" for target in targets}
    if "" in names or any(
        isinstance(n, ast.Name) and n.id in names and n.ctx.__class__ is ast.Load for n in ast.walk(tree)
    ):
        return None
    return "the result of this comparison is lost, so that nothing is checked: write assert before it"


def _spans(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or line)


@functools.cache
def _tree(path: Path) -> ast.Module:
    """Return the source of a test, parsed; empty where it can't be read."""
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def asserts(call: pytest.CallInfo[None], place: suite.Place | None) -> bool:
    """Say whether the failed assert statement holds the comparison at `place`: the test may have gone on to another."""
    if call.excinfo is None or place is None:
        return False
    frame = call.excinfo.traceback[-1]
    line, at = place.line, frame.lineno + 1
    tree = _tree(Path(frame.path))
    if not tree.body:
        return line == at
    return any(isinstance(n, ast.Assert) and _spans(n, at) and _spans(n, line) for n in ast.walk(tree))

"""The one place that reaches into pytest: what it knows and has no public name for."""

from __future__ import annotations

import pytest


def fixture_source(item: pytest.Item, name: str) -> str:
    """Say which of the fixtures of a name an item gets: where it is defined, and its parameter.

    Without it (a pytest that has moved it), all items are taken to get the same one.
    """
    manager = getattr(item.session, "_fixturemanager", None)
    definitions = manager.getfixturedefs(name, item) if manager else None
    callspec = getattr(item, "callspec", None)
    parameter = callspec.indices.get(name, "") if callspec else ""
    return f"{definitions[-1].baseid if definitions else ''}[{parameter}]"

"""Registries: built-ins are found without a list of them; other packages are asked for what no built-in has."""

import sys
from types import SimpleNamespace

import pytest

from pytest_qsa.common import InfraError, Registry

MODULE = "from home import REGISTRY\n\nclass {name}: pass\n\nREGISTRY.add({name}.__name__, {name})\n"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Return the registry of a package with two modules, and one entry point that another package offers."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "home").mkdir()
    registry = Registry("house.things", "home")
    (tmp_path / "home" / "__init__.py").write_text("import builtins\nREGISTRY = builtins.house_registry\n")
    monkeypatch.setattr("builtins.house_registry", registry, raising=False)
    for name in ("Second", "First"):
        (tmp_path / "home" / f"{name.lower()}.py").write_text(MODULE.format(name=name))
    (tmp_path / "foreign.py").write_text(MODULE.format(name="Foreign"))
    registry.asked = []

    def entry_points(group):
        registry.asked.append(group)
        return [SimpleNamespace(name="foreign", value="foreign", load=lambda: __import__("foreign"))]

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    yield registry
    for name in ("home", "home.first", "home.second", "foreign"):
        sys.modules.pop(name, None)


def names(things):
    return [thing.__name__ for thing in things]


def test_every_module_of_the_package_is_a_built_in(registry):
    assert names(registry.built_in()) == ["First", "Second"]
    assert registry.find("Second").__name__ == "Second"
    assert registry.asked == []


def test_other_packages_are_asked_where_no_built_in_has_the_name_and_once(registry):
    assert registry.find("Foreign").__name__ == "Foreign"
    assert registry.find("Nothing") is None
    assert names(registry.all()) == ["First", "Second", "Foreign"]
    assert registry.asked == ["house.things"]


def test_two_things_of_one_name_are_refused_and_one_twice_is_not(registry):
    first = registry.find("First")
    registry.add("First", first)
    with pytest.raises(InfraError, match=r"house\.things: 'First' is defined twice, by home\.first\.First and by "):
        registry.add("First", type("Other", (), {}))


def test_an_entry_point_that_can_not_be_loaded_is_named(registry, monkeypatch):
    def load():
        raise ZeroDivisionError("at import")

    entry = SimpleNamespace(name="broken", value="broken:thing", load=load)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    with pytest.raises(InfraError, match=r"broken = broken:thing of the group house\.things .*ZeroDivisionError"):
        registry.find("Nothing")
    assert registry.find("First").__name__ == "First"

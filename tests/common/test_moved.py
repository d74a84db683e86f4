"""Import paths of earlier releases: they work for one more, and say where the names are now."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest

from pytest_qsa.common import imports
from support.projects import Project

MOVED = {
    "pytest_qsa.divergence": ["ks", "psi", "wasserstein"],
    "pytest_qsa.errors": ["QsaWarning", "QsaError", "SuiteError"],
    "pytest_qsa.checkpoint.smoothing": ["compare_norms"],
}
"""The import paths and names that the documentation of earlier releases showed."""


@pytest.mark.parametrize("old", MOVED)
def test_an_old_import_path_works_and_names_the_new_one(old):
    if old in sys.modules and sys.modules[old].__spec__.loader is imports.MovedModules:
        del sys.modules[old]  # it warns when it is imported; a module of this name that is real stays what it is
    new = importlib.import_module(imports.MOVED[old])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        module = importlib.import_module(old)
    if module.__spec__.loader is imports.MovedModules:  # else a room has a module of this name still
        assert [str(w.message) for w in shown] == [f"{old} has moved: import its names from {new.__name__}"]
    assert [getattr(module, name) for name in MOVED[old]] == [getattr(new, name) for name in MOVED[old]]
    with pytest.raises(AttributeError):
        _ = module.nothing


def test_a_module_that_never_existed_is_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"pytest_qsa\.divergences"):
        importlib.import_module("pytest_qsa.divergences")


@pytest.mark.process
def test_a_filter_of_warnings_may_name_the_old_path_behind_error(tmp_path):
    project = Project(tmp_path / "project")
    project.write("pytest.ini", "[pytest]\nfilterwarnings =\n  error\n  default::pytest_qsa.errors.QsaWarning\n")
    project.write("test_nothing.py", "def test_nothing(): pass\n")
    done = project.program(sys.executable, "-m", "pytest", "-q", "-p", "no:randomly")
    assert done.returncode == 0, done.stdout
    assert "pytest_qsa.errors has moved" in done.stdout

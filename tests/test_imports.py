"""A run of pytest that uses nothing of ours pays for nothing of ours."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import pytest_qsa
from support.projects import HEAVY, Project

PROBE = """
import sys

HEAVY = {heavy!r}

def test_probe():
    assert [name for name in HEAVY if name in sys.modules] == []
"""


@pytest.mark.process
@pytest.mark.parametrize(
    "module",
    ["pytest_qsa", "pytest_qsa.plugin", "pytest_qsa.gate.options", "pytest_qsa.gate.reporting", "pytest_qsa.cli"],
)
def test_importing_imports_nothing_heavy(tmp_path, module):
    project = Project(tmp_path / "project")
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = project.program(sys.executable, "-c", code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.process
@pytest.mark.parametrize(("beside", "named"), [("other.yaml", []), ("a.qsa.yaml", ["test_probe.py"])])
def test_a_run_without_a_suite_imports_nothing_heavy(tmp_path, beside, named):
    project = Project(tmp_path / "project")
    project.write("test_probe.py", PROBE.format(heavy=HEAVY))
    project.write(beside, "not: ours\n")
    quiet = ("-p", "no:hypothesispytest", "-p", "no:anyio", "-p", "no:html", "-p", "no:metadata", "-p", "no:randomly")
    done = project.program(sys.executable, "-m", "pytest", "-q", *quiet, *named)
    assert done.returncode == 0, done.stdout
    assert "qsa" not in done.stdout
    assert not (project.folder / "qsa-results").exists()


@pytest.mark.process
def test_collecting_a_suite_imports_no_torch(tmp_path):
    project = Project(tmp_path / "project")
    project.write("a.qsa.yaml", "assertions: [{id: a, metric: rms, layers: x, site: input, max: 1}]\n")
    code = (
        "import sys, pytest\n"
        "code = pytest.main(['-q', '--co', '-p', 'no:randomly'])\n"
        "print('found', [name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = project.program(sys.executable, "-c", code)
    assert "a.qsa.yaml::a" in done.stdout
    assert "found []" in done.stdout


def test_the_public_names_come_from_the_package():
    errors = {"QsaError", "SuiteError", "InfraError", "AnomalyError", "BaselineError"}
    warnings = {"QsaWarning", "QsaUnplannedCaptureWarning"}
    extending = {"Format", "View", "metric"}
    assert set(pytest_qsa.__all__) == {"Capture", "Series", "capture", *extending, *errors, *warnings}
    assert all(getattr(pytest_qsa, name) for name in pytest_qsa.__all__)
    with pytest.raises(AttributeError, match="captures_"):
        pytest_qsa.captures_  # noqa: B018


@pytest.mark.process
def test_the_plugin_loads_its_options_and_tiers_alone(tmp_path):
    project = Project(tmp_path / "project")
    code = (
        "import sys, pytest_qsa.plugin; print(sorted(name for name in sys.modules if name.startswith('pytest_qsa.')))"
    )
    loaded = set(ast.literal_eval(project.program(sys.executable, "-c", code).stdout))
    faces = {f"pytest_qsa.{name}" for name in ("plugin", "common", "gate", "suite", "verdicts")}
    light = {
        "pytest_qsa.common.collector",
        "pytest_qsa.common.errors",
        "pytest_qsa.common.imports",
        "pytest_qsa.gate.options",
        "pytest_qsa.suite.tiers",
    }
    assert loaded <= faces | light


FACES = sorted(stub.parent.name for stub in Path(pytest_qsa.__file__).parent.glob("*/__init__.pyi"))


def test_every_room_has_a_face():
    rooms = {path.name for path in Path(pytest_qsa.__file__).parent.iterdir() if (path / "__init__.py").exists()}
    assert rooms - {"cli"} == set(FACES)  # nothing stands above the command line, which has `main` alone


@pytest.mark.process
@pytest.mark.parametrize("room", FACES)
def test_a_face_imports_no_torch_and_has_every_name_that_it_says(tmp_path, room):
    code = (
        f"import sys, pytest_qsa.{room} as face\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "missing = [name for name in face.__all__ if not hasattr(face, name)]\n"
        "print([heavy, missing, 'torch' in sys.modules])"
    )
    heavy, missing, torch = ast.literal_eval(Project(tmp_path / "p").program(sys.executable, "-c", code).stdout)
    assert (heavy, missing) == ([], [])
    assert torch == (room in TORCH)


TORCH = {"engine"}
"""The rooms whose names need torch, once they are used."""

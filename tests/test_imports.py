"""A run of pytest that uses nothing of ours pays for nothing of ours."""

from __future__ import annotations

import sys

import pytest
from checkpoint_folders import HEAVY, Project

PROBE = """
import sys

HEAVY = {heavy!r}

def test_probe():
    assert [name for name in HEAVY if name in sys.modules] == []
"""


@pytest.mark.parametrize(
    "module",
    ["pytest_qsa", "pytest_qsa.plugin", "pytest_qsa.gate.options", "pytest_qsa.gate.reporting", "pytest_qsa.cli"],
)
def test_importing_imports_nothing_heavy(tmp_path, module):
    project = Project(tmp_path / "project")
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = project.program(sys.executable, "-c", code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_run_without_a_suite_imports_nothing_heavy(tmp_path):
    project = Project(tmp_path / "project")
    project.write("test_probe.py", PROBE.format(heavy=HEAVY))
    project.write("other.yaml", "not: ours\n")
    quiet = ("-p", "no:hypothesispytest", "-p", "no:anyio", "-p", "no:html", "-p", "no:metadata", "-p", "no:randomly")
    done = project.program(sys.executable, "-m", "pytest", "-q", *quiet)
    assert done.returncode == 0, done.stdout
    assert "qsa" not in done.stdout
    assert not (project.folder / "qsa-results").exists()


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
    import pytest_qsa

    assert set(pytest_qsa.__all__) == {"Capture", "Series", "capture"}
    assert all(getattr(pytest_qsa, name) for name in pytest_qsa.__all__)
    with pytest.raises(AttributeError, match="captures_"):
        pytest_qsa.captures_  # noqa: B018

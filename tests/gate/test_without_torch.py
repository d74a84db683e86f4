"""Where nothing is installed that only a pass needs, files are checked as elsewhere; a pass says what is missing."""

from __future__ import annotations

import sys
import textwrap

import pytest

from support.projects import peaks, suite

HEAVY = ("torch", "transformers", "accelerate", "datasets", "numba", "matplotlib", "triton")
WITHOUT = f"""
import sys

sys.modules.update(dict.fromkeys({HEAVY!r}))
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.process
def test_files_are_checked_without_torch_and_a_pass_says_that_it_is_missing(own_project, llama):
    rms = "id: rms, metric: rms, layers: down_proj$, site: weight, max: 1"
    own_project.write("files.qsa.yaml", suite(llama, "id: health, metric: checkpoint_health", rms).replace(
        f"path: {llama}", f"path: {llama}, weights: files"
    ))  # fmt: skip
    own_project.write("pass.qsa.yaml", suite(llama, peaks("max: 100")))
    own_project.write("without.py", textwrap.dedent(WITHOUT))
    plain = ("-p", "no:hypothesispytest", "-p", "no:anyio", "-p", "no:randomly")
    done = own_project.program(sys.executable, "without.py", *plain, "--qsa-report=never")
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert "INFRA peaks: a model is loaded and run with torch, which isn't installed here" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr

